"""What benchmarks/kernels.py measures: each op of triton_kernels.py with its inputs, baselines and errors.

A new op is a function that makes its cases, and one row of FAMILIES. Ops are looked up when they are called.
"""

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import triton_kernels as tk  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# 1. shapes


class Stage(NamedTuple):
    """What a micro-batch of a stage asks of the kernels."""

    rows: int
    slot_len: int
    windows: tuple[int, ...]  # tokens, of attention
    weights: tuple[float, ...]  # of the next tokens, as the stage begins


STAGES = (  # the first timed is the one whose references are compiled
    #     rows   slot   windows      weights
    Stage(49152, 49152, (640, 1408), (1.0, 0.0, 0.0)),  # 3
    Stage(32768, 16384, (128, 384), (1.0, 0.5, 0.25)),  # 1
    Stage(32768, 32768, (384, 896), (1.0, 0.5, 0.0)),  # 2
)
D, HIDDEN, V = 768, 3072, 50304
HEADS, HEAD_DIM, MAX_SEQ_LEN = 6, 128, 2048
BANKS = ((24, 768, 3072), (40, 768, 768))
TALL = ((24, 3072, 768),)  # as the MLP bank is stored: xxt takes its transposed view
QKV_KINDS = (False, True, True), (True, False, False)  # paired, key offset, value embedding: most, least work
FEW, FEW_SLOT = 512, 100  # rows at which errors are computed, and of a slot there
FEW_WEIGHTS = 1.0, 0.5, 0.25  # there, whatever the stage's: every term of the loss is checked


class Case(NamedTuple):
    """One row of the table. A baseline that is None is not timed."""

    part: str  # "", "forward", "backward", "fwd+bwd"
    shape: str
    kernel: Callable[[], object]
    ref: Callable[[], object] | None
    library: tuple[str, Callable[[], object]] | None
    tera: float  # 1e12 bytes or FLOP of one call
    unit: str  # "TB" or "TFLOP"
    error: Callable[[], float]
    reads: tuple[Tensor, ...]


class Family(NamedTuple):
    """The cases of one op at each of the shapes that a stage asks for."""

    op: str
    make: Callable[..., list[Case]]
    shapes: Callable[[Stage], list[tuple]]


# ------------------------------------------------------------------------------------------------------------
# 2. inputs, errors


@functools.cache
def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def _compiled(ref: Callable) -> Callable:
    return torch.compile(ref, dynamic=False)


def _randn(*shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
    x = torch.randn(*shape, device=_device(), dtype=torch.bfloat16).mul_(scale)
    return x.requires_grad_(grad)


def _targets(n: int, slot_len: int, weights: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Targets of n rows, their positions in their slots, the weights of the next tokens."""
    positions_N = torch.arange(n, device=_device(), dtype=torch.int32) % slot_len
    return torch.randint(V, (n,), device=_device()), positions_N, torch.tensor(weights, device=_device())


def _max_error(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...]) -> float:
    """Largest difference over the largest magnitude, of the worst tensor; NaN if any element is."""
    pairs = zip((got,), (want,), strict=True) if isinstance(got, Tensor) else zip(got, want, strict=True)
    errors = [float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _outputs(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else tuple(y)


def _with_grads(op: Callable, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs and the gradients for upstream gradients that differ from element to element."""
    ys = _outputs(op(*inputs))
    dys = [torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype) for y in ys]
    return *(y.detach() for y in ys), *torch.autograd.grad(ys, inputs, dys)


def _copies(inputs: tuple[Tensor, ...], *to: torch.dtype | str) -> tuple[Tensor, ...]:
    return tuple(x.detach().to(*to).requires_grad_() for x in inputs)


# ------------------------------------------------------------------------------------------------------------
# 3. cases


def _with_backward(op: Callable, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward and backward with constant upstream gradients, allocated at the first call."""
    upstream: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        ys = _outputs(op(*inputs))
        if not upstream:
            upstream.extend(map(torch.ones_like, ys))
        return torch.autograd.grad(ys, inputs, upstream)

    return call


def _backward(op: Callable, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Backward alone, of a forward that the first call runs."""
    kept: list[tuple[Tensor, ...]] = []

    def call() -> tuple[Tensor, ...]:
        if not kept:
            ys = _outputs(op(*inputs))
            kept.extend((ys, tuple(map(torch.ones_like, ys))))
        return torch.autograd.grad(kept[0], inputs, kept[1], retain_graph=True)

    return call


def _training_cases(
    shape: str,
    op: Callable,
    ref: Callable,
    inputs: tuple[Tensor, ...],  # all of them require gradients
    tera: tuple[float, float],  # of forward, of forward and backward
    unit: str,
    error: Callable[[], float],
    library: tuple[str, Callable[[], object], Callable[[], object]] | None = None,  # forward, both
    is_split: bool = True,  # whether backward alone is timed as well
) -> list[Case]:
    """Forward, as training runs it; backward, which has no baseline; and both together."""
    error, (forward, both) = functools.cache(error), tera
    libraries = (None, None) if library is None else ((library[0], call) for call in library[1:])
    library_forward, library_both = libraries
    calls = (
        ("forward", lambda: op(*inputs), lambda: ref(*inputs), library_forward, forward),
        ("backward", _backward(op, inputs), None, None, both - forward),
        ("fwd+bwd", _with_backward(op, inputs), _with_backward(ref, inputs), library_both, both),
    )
    cases = [
        Case(part, shape, call, ref_call, library_call, work, unit, error, inputs)
        for part, call, ref_call, library_call, work in calls
    ]
    return cases if is_split else [cases[0], cases[2]]


def _xxt_cases(m: int, n: int, k: int) -> list[Case]:
    """X X^T of (m, n, k); of a tall bank, n over k, X is its transposed view."""
    stored, shape = _randn(m, n, k, scale=max(n, k) ** -0.5), f"{m}x{n}x{k}"
    x, shape = (stored.mT, f"{shape} view") if n > k else (stored, shape)
    ref, library = _compiled(tk.xxt_ref), ("bmm", lambda: torch.bmm(x, x.mT))
    error = lambda: _max_error(tk.xxt(x), tk.xxt_ref(x.double()))  # noqa: E731
    work = m * min(n, k) ** 2 * max(n, k) * 1e-12  # of one triangle
    return [Case("", shape, lambda: tk.xxt(x), lambda: ref(x), library, work, "TFLOP", error, (x,))]


def _ba_cases(m: int, n: int, _: int) -> list[Case]:
    a, mix = tk.xxt_ref(_randn(m, n, n, scale=n**-0.5)), (0.5, -1.5)
    ref = _compiled(tk.ba_plus_caa_ref)

    def error() -> float:
        return _max_error(tk.ba_plus_caa(a, *mix), tk.ba_plus_caa_ref(a.double(), *mix))

    library = ("baddbmm", lambda: torch.baddbmm(a, a, a.mT, beta=mix[1], alpha=mix[0]))
    calls = (lambda: tk.ba_plus_caa(a, *mix), lambda: ref(a, *mix), library)
    return [Case("", f"{m}x{n}x{n}", *calls, m * n**3 * 1e-12, "TFLOP", error, (a,))]


def _relu2_inputs(n: int) -> tuple[Tensor, ...]:
    """x, as it comes out of a norm, and both weights."""
    weights = (_randn(HIDDEN, D, scale=0.03, grad=True) for _ in range(2))
    return F.rms_norm(_randn(n, D), (D,)).requires_grad_(), *weights


def _relu2_error(op: Callable[..., Tensor], ref: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    few = inputs[0][:FEW].detach().requires_grad_(), *inputs[1:]
    return _max_error(_with_grads(op, few), _with_grads(ref, _copies(few, torch.float64)))


def _relu2_cases(n: int) -> list[Case]:
    inputs = x, w1, w2 = _relu2_inputs(n)
    work = 2e-12 * n * D * HIDDEN

    @torch.no_grad()
    def products() -> tuple[Tensor, Tensor]:
        hidden = x @ w1.T
        return hidden, hidden @ w2

    @torch.no_grad()
    def all_products() -> tuple[Tensor, ...]:
        hidden, y = products()
        dhidden = y @ w2.T
        return dhidden @ w1, dhidden.T @ x, hidden.T @ y

    return _training_cases(
        f"{n}x{D}x{HIDDEN}", tk.linear_relu2, _compiled(tk.linear_relu2_ref), inputs, (2 * work, 6 * work),
        "TFLOP", lambda: _relu2_error(tk.linear_relu2, tk.linear_relu2_ref, inputs),
        ("matmul", products, all_products),
    )  # fmt: skip


def _scaled(a8: Tensor, b8_t: Tensor) -> Tensor:
    one = torch.ones((), device=_device())
    return torch._scaled_mm(a8, b8_t.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _bf16_relu2(
    a_NK: Tensor, w_FK: Tensor, post_NF: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What tk._fp8_relu2 makes, of a product in bf16."""
    out_NF = a_NK @ w_FK.T
    out8_NF = tk._eight(F.relu(out_NF).square() if post_NF is None else out_NF * post_NF.sqrt(), 1, dtype)
    return out8_NF, out8_NF.view(torch.int8).T.contiguous()


def _fp8_relu2_cases(n: int) -> list[Case]:
    """The kernel alone; the baseline has its product in bf16, the library makes the product in FP8 alone."""
    x, w1, w2 = (t.detach() for t in _relu2_inputs(n))
    g = _randn(n, D, scale=0.01)
    (x8, w1_8), w2_8, g8 = tk._eights(x, w1), tk._eight(w2, tk.E4M3_W_FACTOR), tk._e5m2_gradient(g)
    post8, ref = tk._fp8_relu2(x8, w1_8)[0], _compiled(_bf16_relu2)
    post, work = post8.bfloat16(), 2e-12 * n * D * HIDDEN

    def error(*arguments: Tensor) -> float:
        got, want = (f(*arguments) for f in (tk._fp8_relu2, tk.fp8_relu2_ref))
        return _max_error(tuple(t.float() for t in got), tuple(t.float() for t in want))

    few = slice(0, FEW)
    parts = (
        ("forward", (x8, w1_8), (x, w1, None, tk.E4M3), (x8[few], w1_8)),
        ("backward", (g8, w2_8, post8), (g, w2, post, tk.E5M2), (g8[few], w2_8, post8[few])),
    )
    return [
        Case(
            part, f"{n}x{D}x{HIDDEN}", lambda ours=ours: tk._fp8_relu2(*ours),
            lambda theirs=theirs: ref(*theirs), ("_scaled_mm", lambda ours=ours: _scaled(*ours[:2])), work,
            "TFLOP", lambda these=these: error(*these), ours,
        )
        for part, ours, theirs, these in parts
    ]  # fmt: skip


def _fp8_linear_relu2_cases(n: int) -> list[Case]:
    """The op is compiled, as in training, so that one kernel rounds an operand. The baseline is the reference
    in bf16; the library, the products alone.
    """
    inputs = x, w1, w2 = _relu2_inputs(n)
    op, ref = _compiled(tk.fp8_linear_relu2), _compiled(tk.linear_relu2_ref)
    (x8_ND, w1_8_FD), w2_8_FD = tk._eights(x, w1), tk._eight(w2, tk.E4M3_W_FACTOR)
    w1_8_DF, w2_8_DF, x8_DN = (t.T.contiguous() for t in (w1_8_FD, w2_8_FD, x8_ND))
    post8_NF, g8_ND = tk._eight(_randn(n, HIDDEN).abs(), 1), tk._e5m2_gradient(_randn(n, D, scale=0.01))
    post8_FN, g8_DN = post8_NF.T.contiguous(), g8_ND.T.contiguous()
    dpre8_NF, dpre8_FN = post8_NF.to(tk.E5M2), post8_FN.to(tk.E5M2)

    def products() -> tuple[Tensor, ...]:
        return _scaled(x8_ND, w1_8_FD), _scaled(post8_NF, w2_8_DF)

    def all_products() -> tuple[Tensor, ...]:
        dx = _scaled(g8_ND, w2_8_FD), _scaled(dpre8_NF, w1_8_DF)
        return *products(), *dx, _scaled(dpre8_FN, x8_DN), _scaled(post8_FN, g8_DN)

    error = lambda: _against_cpu(tk.fp8_linear_relu2, (x[:FEW], w1, w2))  # noqa: E731
    work = 2e-12 * n * D * HIDDEN
    return _training_cases(
        f"{n}x{D}x{HIDDEN}", op, ref, inputs, (2 * work, 6 * work), "TFLOP", error,
        ("products", products, all_products),
    )  # fmt: skip


def _against_cpu(op: Callable, few: tuple[Tensor, ...]) -> float:
    """Error of an FP8 op on inputs of few rows: on a CPU the same rounding is emulated."""
    got, want = (_with_grads(op, _copies(few, *to)) for to in ((_device(),), ("cpu", torch.float32)))
    return _max_error(tuple(t.cpu() for t in got), want)


def _fp8_linear_cases(n: int) -> list[Case]:
    """As for fp8_linear_relu2, at the shape of the output projection."""
    inputs = x, w = _randn(n, D, grad=True), _randn(D, D, scale=0.03, grad=True)
    op, ref = _compiled(tk.fp8_linear), _compiled(torch.nn.functional.linear)
    (x8_ND, w8_CD), g_NC = tk._eights(x, w), _randn(n, D, scale=0.01)
    g8_NC, w8_DC = tk._e5m2_gradient(g_NC), w8_CD.T.contiguous()

    @torch.no_grad()
    def products() -> tuple[Tensor, ...]:
        return _scaled(x8_ND, w8_CD), _scaled(g8_NC, w8_DC), g_NC.T @ x

    work = 2e-12 * n * D * D
    return _training_cases(
        f"{n}x{D}x{D}", op, ref, inputs, (work, 3 * work), "TFLOP",
        lambda: _against_cpu(tk.fp8_linear, (x[:FEW], w)),
        ("products", lambda: _scaled(x8_ND, w8_CD), products),
    )  # fmt: skip


def _fp8_linear_qkv_cases(n: int, slot_len: int) -> list[Case]:
    """With key offset and value embedding; the baseline is the same in bf16, the library its products."""
    angles = torch.rand(2 * slot_len, HEAD_DIM // 4, device=_device()) * 2 * math.pi
    inputs = x, w, _, _ = (
        _randn(n, D, grad=True), _randn(3 * D, D, scale=0.03, grad=True),
        _randn(n, HEADS, HEAD_DIM, grad=True), _randn(n, HEADS, grad=True),
    )  # fmt: skip
    (x8_ND, w8_CD), g8_NC = tk._eights(x, w), tk._e5m2_gradient(_randn(n, 3 * D, scale=0.01))
    w8_DC, g8_CN, x8_DN = (t.T.contiguous() for t in (w8_CD, g8_NC, x8_ND))

    def bf16(x: Tensor, w: Tensor, *where: Tensor | bool) -> tuple[Tensor, ...]:
        return tk.prepare_qkv_ref(F.linear(x, w).view(-1, 3, HEADS, HEAD_DIM), *where)

    def bound(op: Callable, length: int) -> Callable[..., tuple[Tensor, ...]]:
        def call(x: Tensor, w: Tensor, ve: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
            tables = (t.to(x.device, x.dtype) for t in (angles.cos(), angles.sin()))
            positions_N = torch.arange(len(x), device=x.device, dtype=torch.int32) % length
            return op(x, w, *tables, positions_N, ve, gate, False, True)

        return call

    def products() -> tuple[Tensor, ...]:
        return _scaled(x8_ND, w8_CD), _scaled(g8_NC, w8_DC), _scaled(g8_CN, x8_DN)

    def error() -> float:
        few = x[:FEW], w, *(t[:FEW] for t in inputs[2:])
        return _against_cpu(bound(tk.fp8_linear_qkv, FEW_SLOT), few)

    work, arms = 6e-12 * n * D * D, (bound(_compiled(op), slot_len) for op in (tk.fp8_linear_qkv, bf16))
    return _training_cases(
        f"{n} offset ve", *arms, inputs, (work, 3 * work), "TFLOP", error,
        ("products", lambda: _scaled(x8_ND, w8_CD), products),
    )  # fmt: skip


def _loss_cases(n: int, slot_len: int, weights: tuple[float, ...]) -> list[Case]:
    logits, targets = _randn(n, V, scale=4.0, grad=True), _targets(n, slot_len, weights)
    parts = logits.detach().split(4096)  # the softcap is float32
    capped = torch.cat([tk.softcap(part).bfloat16() for part in parts]).requires_grad_()
    few, few_targets = (logits[:FEW].detach().requires_grad_(),), _targets(FEW, FEW_SLOT, FEW_WEIGHTS)

    def error() -> float:
        got = _with_grads(lambda x: tk.softcapped_cross_entropy(x, *few_targets), few)
        exact = _copies(few, torch.float64)
        return _max_error(got, _with_grads(lambda x: tk.softcapped_cross_entropy_ref(x, *few_targets), exact))

    def library(z_NV: Tensor) -> Tensor:
        return F.cross_entropy(z_NV, targets[0], reduction="none")

    ref, read = _compiled(tk.softcapped_cross_entropy_ref), 2e-12 * n * V
    return _training_cases(
        f"{n}x{V}/{slot_len}", lambda x: tk.softcapped_cross_entropy(x, *targets), lambda x: ref(x, *targets),
        (logits,), (read, 3 * read), "TB", error,
        ("F.cross_entropy", lambda: library(capped), _with_backward(library, (capped,))),
    )  # fmt: skip


def _columns_cases(n: int, c: int) -> list[Case]:
    x8 = _randn(n, c).to(tk.E5M2)
    ref = _compiled(lambda x: x.T.contiguous())
    calls = (lambda: tk._columns8(x8), lambda: ref(x8.view(torch.int8)))
    error = lambda: _max_error(tk._columns8(x8)[:, :n].float(), x8.T.float())  # noqa: E731
    return [Case("", f"{n}x{c}", *calls, ("clone", lambda: x8.clone()), 2e-12 * n * c, "TB", error, (x8,))]


def _scaled_mm(n: int) -> tuple[str, Callable[[], object]]:
    """The three products of the head, of operands that are already FP8."""
    one = torch.ones((), device=_device())

    def product(a8: Tensor, b8_t: Tensor, dtype: torch.dtype, is_fast: bool = False) -> Tensor:
        return torch._scaled_mm(a8, b8_t.T, one, one, out_dtype=dtype, use_fast_accum=is_fast)

    shapes = (n, D), (D, n), (D, V), (V, D)
    x8_ND, x8_DN, w8_DV, w8_VD = (_randn(*shape).to(tk.E4M3) for shape in shapes)
    g8_NV, g8_VN = (_randn(*shape).to(tk.E5M2) for shape in ((n, V), (V, n)))
    bf16 = torch.bfloat16
    return "_scaled_mm", lambda: (
        product(x8_ND, w8_VD, bf16, is_fast=True), product(g8_NV, w8_DV, bf16), product(x8_DN, g8_VN, bf16)
    )  # fmt: skip


def _bf16_head_loss(x_ND: Tensor, w_DV: Tensor, *targets: Tensor) -> Tensor:
    return tk.softcapped_cross_entropy_ref(x_ND @ w_DV, *targets).sum()


def _head_loss_cases(n: int, slot_len: int, weights: tuple[float, ...]) -> list[Case]:
    """Loss and gradients, both made in forward. Torch cannot compile the `_ref`, which calls autograd inside:
    the baseline is the same in bf16.
    """
    inputs = _randn(n, D, grad=True), _randn(D, V, scale=0.05, grad=True)
    targets = _targets(n, slot_len, weights)
    op, ref = _compiled(tk.fp8_head_loss), _compiled(_bf16_head_loss)

    def error() -> float:  # few enough rows and columns to emulate FP8 on a CPU
        columns = min(V, 8 * FEW)
        few = _copies((inputs[0][:FEW], inputs[1][:, :columns].contiguous()), _device())
        targets_N, positions_N, weights_K = _targets(FEW, FEW_SLOT, FEW_WEIGHTS)
        limits = targets_N % columns, positions_N, weights_K
        got = _with_grads(lambda x, w: tk.fp8_head_loss(x, w, *limits), few)
        eights = (t.cpu() for t in (*tk._eights(*few), *limits))
        return _max_error(tuple(x.cpu() for x in got), tk.fp8_head_loss_ref(*eights, torch.bfloat16))

    calls = (
        _with_backward(lambda x, w: op(x, w, *targets), inputs),
        _with_backward(lambda x, w: ref(x, w, *targets), inputs),
    )
    work = 6e-12 * n * D * V
    return [Case("", f"{n}x{D}x{V}/{slot_len}", *calls, _scaled_mm(n), work, "TFLOP", error, inputs)]


def _transpose_add_cases() -> list[Case]:
    a, b, ref = _randn(D, V), _randn(V, D), _compiled(tk.transpose_add_ref)

    def error() -> float:
        got = a.clone()
        tk.transpose_add(got, b)
        return _max_error(got, a.double() + b.double().T)

    calls = (lambda: tk.transpose_add(a, b), lambda: ref(a, b), ("add_", lambda: a.add_(b.view(D, V))))
    return [Case("", f"{D}x{V}", *calls, 6e-12 * D * V, "TB", error, (a, b))]


def _transpose_copy_cases() -> list[Case]:
    a, b, ref = _randn(D, V), _randn(V, D), _compiled(tk.transpose_copy_ref)

    def error() -> float:
        got = torch.empty_like(b)
        tk.transpose_copy(got, a)
        return _max_error(got, a.T)

    calls = (lambda: tk.transpose_copy(b, a), lambda: ref(b, a), ("copy_", lambda: b.copy_(a.view(V, D))))
    return [Case("", f"{V}x{D}", *calls, 4e-12 * D * V, "TB", error, (a,))]


def _qkv_cases(n: int, slot_len: int, is_paired: bool, has_offset: bool, has_ve: bool) -> list[Case]:
    """The library call is F.rms_norm of q and k alone, contiguous ones."""
    angles = torch.rand(2 * slot_len, HEAD_DIM // 4, device=_device()) * 2 * math.pi
    tables = angles.cos().bfloat16(), angles.sin().bfloat16()
    shapes = (n, 3, HEADS, HEAD_DIM), *((n, HEADS, HEAD_DIM), (n, HEADS)) * has_ve
    inputs = tuple(_randn(*shape, grad=True) for shape in shapes)
    few = tuple(x[:FEW].detach().requires_grad_() for x in inputs)
    q_and_k = tuple(x.detach().clone().requires_grad_() for x in inputs[0].unbind(1)[:2])

    def bound(op: Callable, rows: int, length: int) -> Callable[..., tuple[Tensor, ...]]:
        positions_N = torch.arange(rows, device=_device(), dtype=torch.int32) % length

        def call(qkv: Tensor, ve: Tensor | None = None, gate: Tensor | None = None) -> tuple[Tensor, ...]:
            return op(qkv, *(x.to(qkv.dtype) for x in tables), positions_N, ve, gate, is_paired, has_offset)

        return call

    def error() -> float:
        exact = _with_grads(bound(tk.prepare_qkv_ref, len(few[0]), FEW_SLOT), _copies(few, torch.float64))
        return _max_error(_with_grads(bound(tk.prepare_qkv, len(few[0]), FEW_SLOT), few), exact)

    def norms(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.rms_norm(x, (HEAD_DIM,)) for x in tensors)

    kind = zip(("paired", "offset", "ve"), (is_paired, has_offset, has_ve), strict=True)
    shape = " ".join((str(n), *(name for name, is_there in kind if is_there)))
    moved = 2e-12 * n * HEADS * HEAD_DIM  # of one of q, k and v
    return _training_cases(
        shape, bound(tk.prepare_qkv, n, slot_len), bound(_compiled(tk.prepare_qkv_ref), n, slot_len), inputs,
        ((6 + has_ve) * moved, (14 + 3 * has_ve) * moved), "TB", error,
        ("F.rms_norm q, k", lambda: norms(*q_and_k), _with_backward(norms, q_and_k)),
    )  # fmt: skip


def documents(tokens: int) -> Tensor:
    """cu_seqlens of log-normal documents of 700 tokens on average, padded at the end as the trainer pads."""
    generator = torch.Generator().manual_seed(tokens)
    draws = torch.randn(tokens // 128 + 8, generator=generator)
    lengths = draws.add(6.2).exp().long().clamp(32, MAX_SEQ_LEN)  # the mean of these is 698
    ends = lengths.cumsum(0)
    starts = F.pad(ends[ends < tokens], (1, 0))
    return F.pad(starts, (0, max(1, tokens // 512 - len(starts))), value=tokens).int()


def _attention_cases(tokens: int, window: int) -> list[Case]:
    cu_seqlens = documents(tokens).to(_device())
    lengths = cu_seqlens.diff().long()
    inputs = tuple(_randn(tokens, HEADS, HEAD_DIM, grad=True) for _ in range(3))
    window_t, scale_t = torch.tensor(window), torch.tensor(0.1)
    near = lengths.clamp(max=window + 1)
    pairs = int((near * (near + 1) // 2 + (lengths - near) * (window + 1)).sum())
    work = 4e-12 * pairs * HEADS * HEAD_DIM
    ref = _compiled(tk.attention_ref)

    def call(backend: str) -> Callable[..., Tensor]:
        limits = cu_seqlens, MAX_SEQ_LEN, window_t, scale_t, window
        return lambda q, k, v: tk.attention(q, k, v, *limits, backend)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # not in every torch

        limits = cu_seqlens, cu_seqlens, MAX_SEQ_LEN, MAX_SEQ_LEN
        return varlen_attn(q, k, v, *limits, scale=0.1, window_size=(window, 0))

    exact = functools.cache(lambda: _with_grads(call("reference"), _copies(inputs, torch.float32)))
    usable = [name for name, is_usable, _ in tk.attention_backends(_device(), torch.bfloat16) if is_usable]
    cases = []
    for backend in [name for name in usable if name != "reference"] or usable:
        these = _training_cases(
            f"{tokens} w={window}", call(backend),
            lambda q, k, v: ref(q, k, v, cu_seqlens, window_t, scale_t, window), inputs, (work, 3.5 * work),
            "TFLOP", lambda backend=backend: _max_error(_with_grads(call(backend), inputs), exact()),
            ("varlen_attn", lambda: varlen(*inputs), _with_backward(varlen, inputs)), is_split=False,
        )  # fmt: skip
        cases += [case._replace(part=f"{backend} {case.part}") for case in these]
    return cases


def _has_fp8() -> bool:
    return _device() == "cpu" or tk.fp8_available("cuda")[0]  # a CPU emulates it


FAMILIES = (
    Family("xxt", _xxt_cases, lambda stage: [*BANKS, *TALL]),
    Family("ba_plus_caa", _ba_cases, lambda stage: list(BANKS)),
    Family("linear_relu2", _relu2_cases, lambda stage: [(stage.rows,)]),
    Family("fp8_relu2", _fp8_relu2_cases, lambda stage: [(stage.rows,)] * _has_fp8()),
    Family("fp8_linear_relu2", _fp8_linear_relu2_cases, lambda stage: [(stage.rows,)] * _has_fp8()),
    Family("fp8_linear", _fp8_linear_cases, lambda stage: [(stage.rows,)] * _has_fp8()),
    Family("fp8_linear_qkv", _fp8_linear_qkv_cases, lambda s: [(s.rows, s.slot_len)] * _has_fp8()),
    Family("softcapped_cross_entropy", _loss_cases, lambda s: [(s.rows, s.slot_len, s.weights)]),
    Family("columns8", _columns_cases, lambda stage: [(stage.rows, c) for c in (D, HIDDEN, V)]),
    Family("fp8_head_loss", _head_loss_cases, lambda s: [(s.rows, s.slot_len, s.weights)] * _has_fp8()),
    Family("transpose_add", _transpose_add_cases, lambda stage: [()]),
    Family("transpose_copy", _transpose_copy_cases, lambda stage: [()]),
    Family("prepare_qkv", _qkv_cases, lambda s: [(s.rows, s.slot_len, *kind) for kind in QKV_KINDS]),
    Family("attention", _attention_cases, lambda stage: [(stage.rows, window) for window in stage.windows]),
)
