"""Kernels against their references, references against float64 loops.

Three kinds: on this CPU; under Triton's interpreter (`test_interpreted_case_*`), in a child process because
the interpreter is chosen when kernels are decorated and would take over CUDA launches; and on a GPU at the
real shapes (`-m gpu`). A kernel passes if its error against float64 is at most twice that of plain PyTorch in
the same dtype, plus a tiny absolute amount.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import triton_kernels as tk  # noqa: E402

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and tk.triton is not None
IS_CHILD = IS_INTERPRETED and os.environ.get("SPLITS_INTERPRETED_CHILD") == "1"
needs_triton = pytest.mark.skipif(tk.triton is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not IS_CHILD, reason="runs in test_interpreted_kernels' child process")


def gpu(test):
    reason = "kernels are interpreted in this process" if IS_INTERPRETED else "no CUDA device"
    is_skipped = IS_INTERPRETED or tk.triton is None or not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(is_skipped, reason=reason)(test))


@pytest.fixture
def forced_kernels(monkeypatch):
    monkeypatch.setattr(tk, "_FORCE_KERNELS", True)


def child(*command: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "SPLITS_"))}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )


def max_error(got, want) -> float:
    return float((got.detach().double() - want.detach().double()).abs().max())


def assert_close(got, same_dtype, exact, tiny: float = 1e-6) -> None:
    """Each tensor: err <= 2 * err of torch in the same dtype + tiny * largest magnitude."""
    for i, (g, s, e) in enumerate(zip(got, same_dtype, exact, strict=True)):
        assert g.shape == e.shape, f"tensor {i}: {tuple(g.shape)} is not {tuple(e.shape)}"
        assert torch.isfinite(g).all(), f"tensor {i} is not finite"
        bound = 2 * max_error(s, e) + tiny * (float(e.abs().max()) or 1.0)
        assert max_error(g, e) <= bound, f"tensor {i}: error {max_error(g, e):.3e} is over {bound:.3e}"


def with_grads(op, inputs, dy=None):
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    y = op(*inputs)
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y) if dy is None else dy.to(y))
    return y.detach(), *grads


def doubled(inputs):
    return tuple(x.double() for x in inputs)


# ------------------------------------------------------------------------------------------------------------
# 1. import


def test_import_needs_neither_triton_nor_gpu_and_does_nothing(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import torch, triton_kernels as tk\n"
        "assert tk.triton is None and not torch.cuda.is_initialized()\n"
        "x = torch.randn(2, 5, 3); assert torch.equal(tk.xxt(x), tk.xxt_ref(x))\n"
        "w = torch.randn(3, 7); assert tk.fp8_linear_t(x[0], w, 0.1, 0.1, 0.1).shape == (5, 7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------
# 2. loss


def loss_by_loop(logits_NV, targets_N, weights_K, slot_len):
    z_NV = 23 / (1 + torch.exp(-(logits_NV + 5) / 7.5))
    losses = []
    for r in range(len(targets_N)):
        loss = logits_NV.new_zeros(())
        for k, weight in enumerate(weights_K):
            if r % slot_len + k < slot_len:
                loss = loss + weight * (torch.logsumexp(z_NV[r], 0) - z_NV[r, targets_N[r + k]])
        losses.append(loss)
    return torch.stack(losses)


def loss_inputs(rows: int = 24, vocab: int = 320, dtype=torch.float64, scale: float = 8.0, device="cpu"):
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[1:3] = targets[0]  # one column is the target of several terms
    return logits.to(device, dtype), targets.to(device), torch.rand(rows, generator=generator).to(device)


WEIGHTS = ([1.0, 0.5, 0.25], [1.0, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.3, 0.0, 2.0])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("slot_len", [24, 8, 2, 1])
def test_loss_ref_is_the_loop(weights, slot_len):
    logits, targets, dy = loss_inputs()
    weights_K = torch.tensor(weights, dtype=torch.float64)
    got = with_grads(lambda x: tk.softcapped_cross_entropy(x, targets, weights_K, slot_len), (logits,), dy)
    want = with_grads(lambda x: loss_by_loop(x, targets, weights_K, slot_len), (logits,), dy)
    assert_close(got, want, want, tiny=1e-12)


def test_evaluation_loss_is_cross_entropy_of_the_capped_logits():
    logits, targets, _ = loss_inputs(dtype=torch.bfloat16)
    logits.requires_grad_()
    got = tk.softcapped_nll(logits, targets)
    want = torch.nn.functional.cross_entropy(tk.softcap(logits.detach()), targets, reduction="none")
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert torch.allclose(got, want, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# 3. fp8


def test_fp8_is_exact_on_representable_values():
    x = torch.tensor([[1.0, -2.0, 0.5], [448.0, 0.0, 3.5]]) * 0.25
    w = torch.tensor([[1.0, 2.0], [0.0, -1.0], [4.0, 448.0]]) * 0.5
    dy = torch.tensor([[1.0, -4.0], [57344.0, 0.25]]) * 2.0
    got = with_grads(lambda x, w: tk.fp8_linear_t(x, w, 0.25, 0.5, 2.0), (x, w), dy)
    want = with_grads(lambda x, w: x @ w, (x, w), dy)
    for g, e in zip(got, want, strict=True):
        assert torch.equal(g, e)


def test_fp8_error_is_that_of_the_formats():
    torch.manual_seed(0)
    x, w, dy = torch.randn(48, 64), torch.randn(64, 320) * 0.1, torch.randn(48, 320) * 1e-3
    scales = 100 / 448, 1.6 / 448, 1e-7
    got = with_grads(lambda x, w: tk.fp8_linear_t(x, w, *scales), (x, w), dy)
    want = with_grads(lambda x, w: x @ w, doubled((x, w)), dy)
    for g, e, bound in zip(
        got, want, (2**-4, 2**-3, 2**-3), strict=True
    ):  # of the norm: rounding errors average
        assert float((g - e).norm() / e.norm()) < bound


def test_fp8_saturates_and_keeps_dtypes():
    x, w = torch.full((2, 4), 1e4, dtype=torch.bfloat16), torch.ones(4, 6, dtype=torch.float16)
    y, dx, dw = with_grads(lambda x, w: tk.fp8_linear_t(x, w, 1.0, 1.0, 1.0), (x, w))
    assert torch.equal(y, torch.full((2, 6), 4 * 448.0, dtype=torch.bfloat16))
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float16)
    nan = tk.quantize_ref(torch.tensor([[float("nan")]]), 1.0, tk.E4M3)[0]
    assert nan.float().isnan().all()


def head_loss_inputs(rows, dim, vocab, dtype=torch.float32, device="cpu"):
    torch.manual_seed(rows)
    x, w = (
        torch.randn(rows, dim, device=device).to(dtype),
        torch.randn(dim, vocab, device=device).div(8).to(dtype),
    )
    rest = (
        torch.randint(vocab, (rows,), device=device),
        torch.tensor([1.0, 0.5, 0.25], device=device),
        rows // 2,
    )
    return (x, w), (*rest, 0.05, 0.005, 2 / 57344), torch.rand(rows, device=device)


def head_loss_apart(x, w, targets, weights, slot_len, *scales):
    return tk.softcapped_cross_entropy(tk.fp8_linear_t(x, w, *scales), targets, weights, slot_len)


def test_fp8_head_loss_is_the_composition():
    inputs, rest, dy = head_loss_inputs(24, 16, 320)
    got = with_grads(lambda *t: tk.fp8_head_loss(*t, *rest), inputs, dy)
    want = with_grads(lambda *t: head_loss_apart(*t, *rest), inputs, dy)
    assert all(torch.equal(g, e) for g, e in zip(got, want, strict=True))


def test_fp8_op_is_registered_properly():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    checks = ("test_autograd_registration", "test_faketensor")  # test_schema lacks FP8 arithmetic
    torch.library.opcheck(tk._fp8_linear_t, (x, w, 0.1, 0.1, 0.1), test_utils=checks)


def test_fp8_available_says_why_not():
    is_available, reason = tk.fp8_available("cpu")
    assert not is_available
    assert "cpu" in reason


# ------------------------------------------------------------------------------------------------------------
# 4. attention


def attention_by_loop(q_BTHK, k_BTHK, v_BTHK, cu_seqlens, window: int, scale: float):
    shape = q_BTHK.shape
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTHK, v_BTHK))
    out = []
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        for i in range(start, end):
            reach = slice(max(start, i - window), i + 1)
            weights = torch.softmax(scale * torch.einsum("hk,jhk->hj", q[i], k[reach]), dim=-1)
            out.append(torch.einsum("hj,jhk->hk", weights, v[reach]))
    return torch.stack(out).view(shape)


def attention_inputs(
    slots: int, tokens: int, heads: int = 2, dim: int = 8, dtype=torch.float64, device="cpu"
):
    torch.manual_seed(tokens)
    return tuple(torch.randn(slots, tokens, heads, dim, device=device, dtype=dtype) for _ in range(3))


def sched(window: int, scale: float):
    return torch.tensor(window), torch.tensor(scale)


ATTENTION_CASES = {
    # name: (slots, tokens, document starts in the flattened tokens, window, max_window)
    "one block": (1, 50, [0, 7, 8, 30], 5, 100),
    "window over document": (1, 50, [0, 7, 8, 30], 90, 100),
    "window zero": (1, 40, [0, 11], 0, 4),
    "single token documents": (1, 30, list(range(30)), 10, 16),
    "two slots": (2, 40, [0, 13, 40, 41, 70], 9, 16),
    "blocks": (2, 150, [0, 100, 150, 170, 280], 60, 100),
    "blocks, longest window": (1, 300, [0, 40], 140, 140),
    "blocks, tokens a multiple": (1, 256, [0, 5], 128, 128),
    "max_window over tokens": (1, 140, [0, 70], 139, 4096),
}


@pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES)
def test_attention_reference_is_the_loop(case):
    slots, tokens, starts, window, max_window = case
    qkv = attention_inputs(slots, tokens)
    cu = torch.tensor(starts + [slots * tokens] * 4, dtype=torch.int32)
    dy = torch.randn_like(qkv[0])
    arguments = cu, tokens, *sched(window, 0.25), max_window, "reference"
    got = with_grads(lambda *x: tk.attention(*x, *arguments), qkv, dy)
    want = with_grads(lambda *x: attention_by_loop(*x, cu, window, 0.25), qkv, dy)
    assert_close(got, want, want, tiny=1e-12)


def test_attention_reference_in_bfloat16():
    qkv = attention_inputs(2, 200, dtype=torch.bfloat16)
    cu = torch.tensor([0, 90, 200, 400], dtype=torch.int32)
    got = tk.attention(*qkv, cu, 200, *sched(50, 0.25), 64, "reference")
    assert got.dtype == torch.bfloat16
    assert max_error(got, attention_by_loop(*doubled(qkv), cu, 50, 0.25)) < 2**-6


def test_attention_refuses_what_it_cannot_do():
    qkv, cu = attention_inputs(1, 16), torch.tensor([0, 16], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"'nonsense'.*none of that name.*usable here: reference"):
        tk.attention(*qkv, cu, 16, *sched(4, 1.0), 8, "nonsense")
    for backend in ("fa4", "varlen"):
        with pytest.raises(ValueError, match=r"needs an NVIDIA GPU.*usable here: reference"):
            tk.attention(*qkv, cu, 16, *sched(4, 1.0), 8, backend)
    with pytest.raises(ValueError, match="window 9 is over max_window 8"):
        tk.attention(*qkv, cu, 16, *sched(9, 1.0), 8, "reference")


def test_attention_backends_are_listed_in_order_with_reasons():
    rows = tk.attention_backends("cpu", torch.float32)
    assert [name for name, *_ in rows] == ["fa4", "varlen", "reference"]
    assert all(is_usable == (reason == "") for _, is_usable, reason in rows)
    assert rows[-1][1]


@pytest.fixture(scope="module")
def plumbed():
    """The op that FlashAttention is wrapped in, around CPU functions: checks the wrapping without a GPU."""

    def weights_HQS(q, k, cu, window, scale):
        docs = torch.bucketize(torch.arange(len(q), dtype=cu.dtype), cu[1:], right=True)
        lag = torch.arange(len(q))[:, None] - torch.arange(len(q))
        mask = (lag >= 0) & (lag <= window) & (docs[:, None] == docs)
        scores = scale * torch.einsum("qhk,shk->hqs", q, k)
        return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)

    def forward(q, k, v, cu, max_seqlen, window, scale):
        y = torch.einsum("hqs,shk->qhk", weights_HQS(q, k, cu, window, scale), v)
        return y, torch.zeros(q.shape[1], q.shape[0])

    def backward(dy, q, k, v, y, lse, cu, max_seqlen, window, scale):
        p = weights_HQS(q, k, cu, window, scale)
        dp = torch.einsum("qhk,shk->hqs", dy, v)
        ds = scale * p * (dp - (dp * p).sum(dim=-1, keepdim=True))
        return (
            torch.einsum("hqs,shk->qhk", ds, k),
            torch.einsum("hqs,qhk->shk", ds, q),
            torch.einsum("hqs,qhk->shk", p, dy),
        )

    return tk._register_attention("of_tests", forward, backward)


def test_attention_op_passes_gradients_and_fakes(plumbed):
    q, k, v = (x[0].float() for x in attention_inputs(1, 30))
    cu = torch.tensor([0, 9, 30, 30], dtype=torch.int32)
    dy = torch.randn_like(q)
    got = with_grads(lambda *x: plumbed(*x, cu, 30, *sched(6, 0.25))[0], (q, k, v), dy)
    want = with_grads(lambda *x: attention_by_loop(*(t[None] for t in x), cu, 6, 0.25)[0], (q, k, v), dy)
    assert_close(got, want, want, tiny=1e-5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(plumbed, (*leaves, cu, 30, *sched(6, 0.25)), test_utils=checks)


def test_flash_attention_2_takes_our_arguments():
    """Its fake accepts the call: names and order of arguments match the installed PyTorch's schema."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(64, 2, 128, device="meta", dtype=torch.bfloat16)
        cu = torch.empty(5, device="meta", dtype=torch.int32)
        y, lse = tk._varlen_forward(q, q, q, cu, 32, 16, 0.1)
        assert y.shape == q.shape
        assert lse.shape == (2, 64)
        grads = tk._varlen_backward(y, q, q, q, y, lse, cu, 32, 16, 0.1)
        assert [grad.shape for grad in grads] == [q.shape] * 3


# ------------------------------------------------------------------------------------------------------------
# 5. everything under torch.compile


def tiny_model(x, w1, w2, head, q, k, v, targets, weights, cu, window, scale, attend):
    h = tk.linear_relu2(x, w1, w2)
    logits = tk.fp8_linear_t(h, head, 0.1, 0.1, 0.1)
    loss = tk.softcapped_cross_entropy(logits, targets, weights, 16).sum()
    bank = tk.ba_plus_caa(tk.xxt(w1.detach()[None]), 0.3, 0.2)
    return loss + attend(q, k, v, cu, window, scale).square().sum() + bank.sum()


def check_compiled(backend: str, attend) -> None:
    torch.manual_seed(0)
    shapes = ((32, 16), (24, 16), (24, 16), (16, 48), (2, 150, 3, 16), (2, 150, 3, 16), (2, 150, 3, 16))
    leaves = tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
    targets, cu = torch.randint(48, (32,)), torch.tensor([0, 5, 150, 190, 300, 300], dtype=torch.int32)
    compiled = torch.compile(tiny_model, fullgraph=True, dynamic=False, backend=backend)

    def grads_of(model, weights, window, scale):
        loss = model(*leaves, targets, torch.tensor(weights), cu, *sched(window, scale), attend)
        return loss, *torch.autograd.grad(loss, leaves)

    with torch.compiler.set_stance("default"):
        first = grads_of(compiled, [1.0, 0.5, 0.25], 30, 0.1)
        with torch.compiler.set_stance("fail_on_recompile"):
            second = grads_of(compiled, [1.0, 0.5, 0.0], 17, 0.15)
    for got, values in ((first, ([1.0, 0.5, 0.25], 30, 0.1)), (second, ([1.0, 0.5, 0.0], 17, 0.15))):
        for g, e in zip(got, grads_of(tiny_model, *values), strict=True):
            assert torch.allclose(g, e, rtol=1e-4, atol=1e-4)


def attend_by_reference(q, k, v, cu, window, scale):
    return tk.attention(q, k, v, cu, 150, window, scale, 40, "reference")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_new_schedule_values_do_not_recompile(backend):
    check_compiled(backend, attend_by_reference)


def test_opaque_attention_compiles(plumbed):
    def attend(q, k, v, cu, window, scale):
        y, _ = plumbed(*(x.flatten(0, 1) for x in (q, k, v)), cu, 150, window, scale)
        return y.unflatten(0, q.shape[:2])

    check_compiled("aot_eager", attend)


# ------------------------------------------------------------------------------------------------------------
# 6. kernels in Triton's interpreter (a child process), not in bfloat16: it truncates stores and breaks dots


@needs_triton
@pytest.mark.skipif(IS_CHILD, reason="this is the child")
def test_interpreted_kernels():
    done = child(
        *(
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            str(Path(__file__)),
            "-k",
            "interpreted_case",
        ),
        TRITON_INTERPRET="1",
        SPLITS_INTERPRETED_CHILD="1",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 200, 96), (1, 130, 768), (3, 64, 128), (2, 1, 40), (1, 257, 70)], ids=str
)
def test_interpreted_case_xxt(shape, dtype, forced_kernels):
    m, n, k = shape
    x = torch.randn(m, n, k + 5, dtype=dtype)[:, :, :k]  # rows are contiguous, the matrix is not
    got = tk.xxt(x)
    assert_close((got,), (tk.xxt_ref(x),), (tk.xxt_ref(x.double()),))
    assert torch.equal(got, got.mT)
    assert torch.equal(tk.xxt(x.mT.contiguous().mT), got)  # columns contiguous: copied first


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [64, 150, 256])
def test_interpreted_case_ba_plus_caa(n, dtype, forced_kernels):
    a = torch.randn(2, n, n).div(n**0.5)
    a = (a + a.mT).to(dtype)
    args = 0.5, -1.25
    exact = tk.ba_plus_caa_ref(a.double(), *args)
    assert_close((tk.ba_plus_caa(a, *args),), (tk.ba_plus_caa_ref(a, *args),), (exact,))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(150, 72, 300), (1, 64, 256), (129, 130, 70)], ids=str)
def test_interpreted_case_linear_relu2(shape, dtype, forced_kernels):
    n, d, f = shape
    inputs = tuple(torch.randn(s, d).mul(d**-0.25).to(dtype) for s in (n, f, f))
    dy = torch.randn(n, d).to(dtype)
    got = with_grads(tk.linear_relu2, inputs, dy)
    assert_close(
        got, with_grads(tk.linear_relu2_ref, inputs, dy), with_grads(tk.linear_relu2_ref, doubled(inputs), dy)
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_interpreted_case_loss(weights, dtype, forced_kernels):
    for rows, vocab, slot_len in ((13, 1320, 13), (24, 320, 8), (5, 1024, 1)):
        logits, targets, dy = loss_inputs(rows, vocab, dtype)
        weights_K = torch.tensor(weights)

        def ref(x, targets=targets, slot_len=slot_len, weights_K=weights_K):
            return tk.softcapped_cross_entropy_ref(x, targets, weights_K, slot_len)

        got = with_grads(
            lambda x, t=targets, s=slot_len, w=weights_K: tk.softcapped_cross_entropy(x, t.int(), w, s),
            (logits,),
            dy,
        )
        assert got[0].dtype == torch.float32
        assert_close(got, with_grads(ref, (logits,), dy), with_grads(ref, doubled((logits,)), dy))


@interpreted
def test_interpreted_case_loss_of_extreme_and_strided_logits(forced_kernels):
    logits = torch.randn(6, 700)[:, :640] * 100
    targets = torch.randint(640, (6,))
    exact = tk.softcapped_cross_entropy_ref(logits.double(), targets, torch.tensor([1.0, 0, 0]).double(), 6)
    assert torch.allclose(tk.softcapped_nll(logits, targets).double(), exact, rtol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_case_transposes(dtype, forced_kernels):
    for d, v in ((70, 130), (64, 64), (1, 5)):
        a, b = torch.randn(d, v).to(dtype), torch.randn(v, d).to(dtype)
        total, copy = a.clone(), torch.empty_like(b)
        tk.transpose_add(total, b)
        tk.transpose_copy(copy, a)
        assert_close((total,), (a + b.T,), (a.double() + b.double().T,), tiny=0.0)
        assert torch.equal(copy, a.T)


@interpreted
@pytest.mark.parametrize("dtype", [tk.E4M3, tk.E5M2])
def test_interpreted_case_quantize_layouts(dtype, forced_kernels):
    x = torch.randn(70, 200)
    rows, cols = tk._quantize(x, 1e-2, dtype)
    assert torch.equal(rows.view(torch.int8), cols.view(torch.int8).T)
    # The interpreter's FP8 rounding differs from torch's on some values; on a GPU they must agree.
    agreement = (rows.float() == tk.quantize_ref(x, 1e-2, dtype)[0].float()).float().mean()
    assert agreement > 0.9


@interpreted
def test_interpreted_case_fp8_head_loss(forced_kernels):
    inputs, rest, dy = head_loss_inputs(24, 16, 320)
    got = with_grads(lambda *t: tk.fp8_head_loss(*t, *rest), inputs, dy)
    want = with_grads(lambda *t: head_loss_apart(*t, *rest), inputs, dy)
    assert torch.equal(got[0], want[0])
    for g, e in zip(
        got[1:], want[1:], strict=True
    ):  # the interpreter's e5m2 stores round otherwise: see above
        assert float((g - e).norm() / e.norm()) < 0.1
    leaves = tuple(t.requires_grad_() for t in inputs)
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(tk._fp8_head_loss, (*leaves, *rest), test_utils=checks)


@interpreted
def test_interpreted_case_ops_are_registered_properly(forced_kernels):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, w1, w2 = (torch.randn(s, 16, requires_grad=True) for s in (10, 20, 20))
    logits, targets, _ = loss_inputs(6, 320, torch.float32)
    cases = (
        (tk._xxt, (x.detach()[None],)),
        (tk._ba_plus_caa, (torch.eye(16)[None], 0.5, 0.25)),
        (tk._linear_relu2, (x, w1, w2)),
        (tk._ce, (logits.requires_grad_(), targets, torch.tensor([1.0, 0.5, 0.0]), 3)),
        (tk._transpose_add, (torch.zeros(4, 6), torch.ones(6, 4))),
        (tk._transpose_copy, (torch.zeros(6, 4), torch.ones(4, 6))),
    )
    for op, arguments in cases:
        torch.library.opcheck(op, arguments, test_utils=checks)


@interpreted
def test_interpreted_case_kernels_inside_a_compiled_function(forced_kernels):
    check_compiled("aot_eager", attend_by_reference)

    def tie(head_DV, grad_DV, embed_VD):
        tk.transpose_add(grad_DV, embed_VD * 2.0)
        tk.transpose_copy(embed_VD, head_DV)
        return grad_DV.sum() + embed_VD[0, 0]

    tensors = torch.randn(8, 12), torch.randn(8, 12), torch.randn(12, 8)
    eager = tuple(t.clone() for t in tensors)
    total = tie(*eager)
    assert torch.allclose(torch.compile(tie, fullgraph=True, backend="aot_eager")(*tensors), total)
    assert all(torch.equal(got, want) for got, want in zip(tensors, eager, strict=True))


# ------------------------------------------------------------------------------------------------------------
# 7. kernels compiled for Hopper without a GPU: types, shared memory, tensor core instructions

COMPILE_FOR_HOPPER = '''
import torch, triton, triton_kernels as tk
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def build(kernel, types, constants, is_matmul=False):
    """Arguments not in `types` are 32-bit integers; pointers and integers are multiples of 16."""
    if kernel.__class__.__name__ != "JITFunction":
        raise TypeError(f"{kernel} is interpreted")
    constants = dict(constants)
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [i for i, n in enumerate(names) if signature[n] == "i32" or signature[n].startswith("*")]
    source = ASTSource(kernel, signature=signature, attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
                       constexprs={(names.index(k),): v for k, v in constants.items()})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    shared = built.metadata.shared
    assert shared <= 232448, f"{kernel.__name__}: {shared} bytes of shared memory, an SM has 232448"
    assert ("wgmma" in built.asm["ptx"]) == is_matmul, f"{kernel.__name__}: wgmma"

B, S = "*bf16", "*fp32"
for k in (768, 3072, 70):
    tile = tk.XXT_TILES.get(k, tk.XXT_TILE_OTHER)
    build(tk._xxt_kernel, {"x_ptr": B, "c_ptr": B}, tile.launch(k), True)
build(tk._ba_plus_caa_kernel, {"a_ptr": B, "c_ptr": B, "alpha": "fp32", "beta": "fp32"},
      tk.BA_TILE.launch(768), True)
build(tk._relu2_forward_kernel, {"x_ptr": B, "w_ptr": B, "post_ptr": B},
      tk.RELU2_FORWARD_TILE.launch(768), True)
build(tk._relu2_backward_kernel, {"g_ptr": B, "w_ptr": B, "post_ptr": B, "dpre_ptr": B},
      tk.RELU2_BACKWARD_TILE.launch(768), True)
loss = {"logits_ptr": B, "targets_ptr": "*i64", "weights_ptr": S, "lse_ptr": S}
build(tk._ce_forward_kernel, loss | {"loss_ptr": S},
      tk._ce_constants(tk.CE_FORWARD_BLOCK, tk.CE_FORWARD_WARPS))
for gradient in (B, "*fp8e5"):
    build(tk._ce_backward_kernel, loss | {"grad_ptr": S, "dlogits_ptr": gradient},
          tk._ce_constants(tk.CE_BACKWARD_BLOCK, tk.CE_BACKWARD_WARPS))
for name, dtype in (("*fp8e4nv", tk.E4M3), ("*fp8e5", tk.E5M2)):
    build(tk._quantize_kernel, {"x_ptr": B, "row_ptr": name, "col_ptr": "*i8", "inv_scale": "fp32"},
          {"LIMIT": torch.finfo(dtype).max, "BN": tk.QUANTIZE_TILE[0], "BC": tk.QUANTIZE_TILE[1],
           "num_warps": tk.QUANTIZE_WARPS})
for is_add in (True, False):
    build(tk._transpose_kernel, {"dst_ptr": B, "src_ptr": B},
          {"IS_ADD": is_add, "BLOCK": tk.TRANSPOSE_BYTES // 2, "num_warps": tk.TRANSPOSE_WARPS})
build(tk._transpose_kernel, {"dst_ptr": "*i8", "src_ptr": "*i8"},
      {"IS_ADD": False, "BLOCK": tk.TRANSPOSE_BYTES, "num_warps": tk.TRANSPOSE_WARPS})
'''


@needs_triton
@pytest.mark.skipif(IS_CHILD, reason="kernels are interpreted in this process")
def test_kernels_compile_for_hopper(tmp_path):
    (tmp_path / "build.py").write_text(COMPILE_FOR_HOPPER)
    cache = str(tmp_path / "cache")
    done = child(str(tmp_path / "build.py"), PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


# ------------------------------------------------------------------------------------------------------------
# 8. on a GPU, at the trainer's shapes


def on_gpu(*shape: int, scale: float = 1.0, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").mul_(scale).to(dtype)


def each_way(op):
    torch._dynamo.reset()
    return {"eager": op, "compiled": torch.compile(op, fullgraph=True, dynamic=False)}.items()


@gpu
@pytest.mark.parametrize("shape", [(24, 768, 3072), (40, 768, 768), (16, 256, 768), (3, 200, 104)], ids=str)
def test_gpu_bank_products(shape):
    m, n, k = shape
    x = on_gpu(m, n, k, scale=k**-0.5)
    a = tk.xxt_ref(x)
    for _, op in each_way(tk.xxt):
        got = op(x)
        assert_close((got,), (tk.xxt_ref(x),), (tk.xxt_ref(x.double()),))
        assert torch.equal(got, got.mT)
    exact = tk.ba_plus_caa_ref(a.double(), 0.5, -1.5)
    for _, op in each_way(lambda a: tk.ba_plus_caa(a, 0.5, -1.5)):
        assert_close((op(a),), (tk.ba_plus_caa_ref(a, 0.5, -1.5),), (exact,))


@gpu
@pytest.mark.parametrize("shape", [(16384, 768, 3072), (1000, 768, 3072), (77, 104, 200)], ids=str)
def test_gpu_linear_relu2(shape):
    n, d, f = shape
    inputs = on_gpu(n, d), on_gpu(f, d, scale=0.03), on_gpu(f, d, scale=0.03)
    dy = on_gpu(n, d)
    same, exact = (with_grads(tk.linear_relu2_ref, x, dy) for x in (inputs, doubled(inputs)))
    for _, op in each_way(tk.linear_relu2):
        assert_close(with_grads(op, inputs, dy), same, exact)


@gpu
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_gpu_loss(weights):
    logits, targets, dy = loss_inputs(512, 50304, torch.bfloat16, device="cuda")
    weights_K = torch.tensor(weights, device="cuda")

    def ref(x):
        return tk.softcapped_cross_entropy_ref(x, targets, weights_K, 128)

    same, exact = (with_grads(ref, x, dy) for x in ((logits,), doubled((logits,))))
    for _, op in each_way(lambda x, w: tk.softcapped_cross_entropy(x, targets, w, 128)):
        got = with_grads(lambda x, op=op: op(x, weights_K), (logits,), dy)
        assert_close(got, same, exact, tiny=1e-5)


@gpu
def test_gpu_loss_beyond_32_bit_offsets():
    rows, vocab = 49152, 50304
    logits = torch.zeros(rows, vocab, device="cuda", dtype=torch.bfloat16)
    logits[-1] = on_gpu(vocab, scale=4.0)
    logits.requires_grad_()
    targets = torch.randint(vocab, (rows,), device="cuda")
    loss = tk.softcapped_cross_entropy(logits, targets, torch.tensor([1.0, 0.0, 0.0], device="cuda"), rows)
    loss.sum().backward()
    last = logits.detach()[-1:].double()
    exact = with_grads(
        lambda x: tk.softcapped_cross_entropy_ref(
            x, targets[-1:], torch.tensor([1.0, 0, 0], device="cuda"), 1
        ),
        (last,),
    )
    assert max_error(loss[-1:], exact[0]) < 1e-4
    assert max_error(logits.grad[-1:], exact[1]) < 1e-2


@gpu
def test_gpu_fp8_head():
    is_available, reason = tk.fp8_available("cuda")
    if not is_available:
        pytest.skip(reason)
    x, w, dy = on_gpu(1024, 768), on_gpu(768, 50304, scale=0.05), on_gpu(1024, 50304, scale=1e-3)
    scales = 100 / 448, 1.6 / 448, 1e-6

    def head(x, w):
        return tk.fp8_linear_t(x, w, *scales)

    for source, scale, dtype in ((x, 0.01, tk.E4M3), (w, 0.01, tk.E4M3), (dy, 1e-6, tk.E5M2)):
        for got, want in zip(
            tk._quantize(source, scale, dtype), tk.quantize_ref(source, scale, dtype), strict=True
        ):
            assert torch.equal(got.view(torch.int8), want.view(torch.int8))
    emulated = with_grads(head, (x.cpu(), w.cpu()), dy.cpu())
    for _, op in each_way(head):
        for got, want in zip(with_grads(op, (x, w), dy), emulated, strict=True):
            want = want.cuda().float()
            # use_fast_accum keeps about 14 bits of the sum: 1e-3 of the norm, besides bf16 rounding.
            assert float((got.float() - want).norm() / want.norm()) < 5e-3


@gpu
def test_gpu_fp8_head_loss():
    if not tk.fp8_available("cuda")[0]:
        pytest.skip(tk.fp8_available("cuda")[1])
    inputs, rest, dy = head_loss_inputs(1024, 768, 50304, torch.bfloat16, "cuda")
    want = with_grads(lambda *t: head_loss_apart(*t, *rest), inputs, dy)
    for _, op in each_way(lambda *t: tk.fp8_head_loss(*t, *rest)):
        got = with_grads(op, inputs, dy)
        assert torch.equal(got[0], want[0])
        for g, e in zip(got[1:], want[1:], strict=True):  # one rounding against two, the second to 2 bits
            assert float((g.float() - e.float()).norm() / e.float().norm()) < 0.03


@gpu
def test_gpu_transposes():
    a, b = on_gpu(768, 50304), on_gpu(50304, 768)
    for _, op in each_way(lambda a, b: tk.transpose_add(a, b)):
        got = a.clone()
        op(got, b)
        assert_close((got,), (a + b.T,), (a.double() + b.double().T,), tiny=0.0)
    for _, op in each_way(lambda d, s: tk.transpose_copy(d, s)):
        got = torch.empty_like(b)
        op(got, a)
        assert torch.equal(got, a.T)


@gpu
@pytest.mark.parametrize("backend", ["fa4", "varlen"])
@pytest.mark.parametrize("shape", [(1, 16384, 6), (4, 4096, 6), (1, 32768, 3)], ids=str)
def test_gpu_attention(backend, shape):
    usable = {
        name: (is_usable, reason) for name, is_usable, reason in tk.attention_backends("cuda", torch.bfloat16)
    }
    if not usable[backend][0]:
        pytest.skip(usable[backend][1])
    slots, tokens, heads = shape
    qkv = attention_inputs(slots, tokens, heads, 128, torch.bfloat16, "cuda")
    starts = [s * tokens + i for s in range(slots) for i in (0, 1, 300, 301, 1500, 1501, 3000)]
    cu = torch.tensor(starts + [slots * tokens] * 20, dtype=torch.int32, device="cuda")
    dy = torch.randn_like(qkv[0])
    longest = int(cu.diff().max())
    torch._dynamo.reset()
    compiled = torch.compile(tk.attention, fullgraph=True, dynamic=False)
    for i, (window, scale) in enumerate(((128, 0.1), (384, 0.125), (1408, 0.13))):
        rest = cu, longest, *sched(window, scale), 1408

        def ref(*x, rest=rest):
            return tk.attention(*x, *rest, "reference")

        same, exact = (with_grads(ref, x, dy) for x in (qkv, tuple(x.float() for x in qkv)))
        assert_close(
            with_grads(lambda *x, r=rest: tk.attention(*x, *r, backend), qkv, dy), same, exact, tiny=1e-3
        )
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = with_grads(lambda *x, r=rest: compiled(*x, *r, backend), qkv, dy)
        assert_close(got, same, exact, tiny=1e-3)
