"""Kernels against their references, references against float64 loops.

Three kinds: on this CPU; under Triton's interpreter (`test_interpreted_case_*`), in a child process because
the interpreter is chosen when kernels are decorated and would take over CUDA launches; and on a GPU at the
real shapes (`-m gpu`). A kernel passes if its error against float64 is at most twice that of plain PyTorch in
the same dtype, plus a tiny absolute amount.
"""

import os
import re
import subprocess
import sys
import types
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
        "w, n = torch.randn(3, 7, requires_grad=True), torch.arange(5)\n"
        "tk.fp8_head_loss(x[0], w, n, n.int(), torch.ones(3)).backward()\n"
        "assert w.grad.shape == (3, 7)\n"
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


def loss_by_loop(logits_NV, targets_N, slots, weights_K):
    """`slots` are the lengths of the slots that lie one after another."""
    z_NV = 23 / (1 + torch.exp(-(logits_NV + 5) / 7.5))
    losses, end = [], 0
    for length in slots:
        end += length
        for r in range(end - length, end):
            loss = logits_NV.new_zeros(())
            for k, weight in enumerate(weights_K):
                if r + k < end:
                    loss = loss + weight * (torch.logsumexp(z_NV[r], 0) - z_NV[r, targets_N[r + k]])
            losses.append(loss)
    return torch.stack(losses)


def positions_of(slots, device="cpu"):
    return torch.cat([torch.arange(n, dtype=torch.int32) for n in slots]).to(device)


def loss_inputs(rows: int = 24, vocab: int = 320, dtype=torch.float64, scale: float = 8.0, device="cpu"):
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[1:3] = targets[0]  # one column is the target of several terms
    return logits.to(device, dtype), targets.to(device), torch.rand(rows, generator=generator).to(device)


WEIGHTS = ([1.0, 0.5, 0.25], [1.0, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.3, 0.0, 2.0])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("slots", [[24], [8] * 3, [2] * 12, [1] * 24, [5, 1, 2, 16], [22, 1, 1]], ids=str)
def test_loss_ref_is_the_loop(weights, slots):
    logits, targets, dy = loss_inputs()
    positions, weights_K = positions_of(slots), torch.tensor(weights, dtype=torch.float64)
    got = with_grads(lambda x: tk.softcapped_cross_entropy(x, targets, positions, weights_K), (logits,), dy)
    want = with_grads(lambda x: loss_by_loop(x, targets, slots, weights_K), (logits,), dy)
    assert_close(got, want, want, tiny=1e-12)


def test_evaluation_loss_is_cross_entropy_of_the_capped_logits():
    logits, targets, _ = loss_inputs(dtype=torch.bfloat16)
    logits.requires_grad_()
    got = tk.softcapped_nll(logits, targets)
    want = torch.nn.functional.cross_entropy(tk.softcap(logits.detach()), targets, reduction="none")
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert torch.allclose(got, want, atol=1e-5)


def test_evaluation_takes_the_exact_sigmoid_and_training_the_fast_one(monkeypatch):
    seen, (logits, targets, _) = [], loss_inputs(dtype=torch.float32)
    constants = tk._ce_constants(1024, 4, is_fast=True), tk._ce_constants(1024, 4, is_fast=False)
    assert [c["IS_FAST"] for c in constants] == [True, False]

    def op(logits, targets, positions, weights, is_fast):
        seen.append(is_fast)
        return logits.new_zeros(len(logits)), None

    monkeypatch.setattr(tk, "_FORCE_KERNELS", True)
    monkeypatch.setattr(tk, "_ce", op)
    tk.softcapped_nll(logits, targets)
    rest = targets, positions_of([24]), torch.ones(3)
    tk.softcapped_cross_entropy(logits, *rest)
    tk.softcapped_cross_entropy(logits, *rest, is_fast=False)
    assert seen == [False, True, False]
    assert not tk._ce_constants(1024, 4, is_fast=True)["IS_FAST"], "the interpreter knows no assembly"


# ------------------------------------------------------------------------------------------------------------
# 3. fp8


def test_fp8_is_exact_on_representable_values():
    """Rounding, transposes, and the three products of a layer."""
    x = torch.tensor([[1.0, -2.0, 0.5], [448.0, 0.0, 3.5]]) * 0.25
    w = torch.tensor([[1.0, 2.0], [0.0, -1.0], [4.0, 448.0]]) * 0.5
    dy = torch.tensor([[1.0, -4.0], [57344.0, 0.25]])
    want = with_grads(lambda x, w: x @ w, (x, w), dy)
    scaled = (x, 4, tk.E4M3), (w, 2, tk.E4M3), (dy, 1, tk.E5M2)
    x8, w8, dy8 = eights = [tk._eight(*source) for source in scaled]
    x8_t, w8_t, dy8_t = columns = [tk._columns8(t) for t in eights]
    for (source, factor, dtype), rows, cols in zip(scaled, eights, columns, strict=True):
        assert rows.dtype == cols.dtype == dtype
        assert torch.equal(rows.float() / factor, source)
        assert cols.shape == (source.shape[1], 16)
        assert cols.is_contiguous()
        assert torch.equal(cols.float()[:, : len(source)] / factor, source.T)
        assert not cols.float()[:, len(source) :].any()
    products = (x8, w8_t[:, :3], 4 * 2), (dy8, w8, 1 * 2), (x8_t, dy8_t, 4 * 1)
    for e, (a, b, factor) in zip(want, products, strict=True):
        out = torch.empty_like(e)
        assert tk._matmul_fp8(a, b, factor, out, is_fast=False) is out
        assert torch.equal(out, e)
        assert torch.equal(tk._product8(a, b, factor, False, torch.float64), e.double())


def head_loss_inputs(slots, dim, vocab, dtype=torch.float32, device="cpu", weights=(1.0, 0.5, 0.25)):
    """(x, w), (targets, positions, weights)."""
    rows = sum(slots)
    torch.manual_seed(rows)
    x, w = torch.randn(rows, dim, device=device), torch.randn(dim, vocab, device=device).div(8)
    targets = torch.randint(vocab, (rows,), device=device)
    targets[1:3] = targets[0]
    rest = targets, positions_of(slots, device), torch.tensor(weights, device=device)
    return (x.to(dtype), w.to(dtype)), rest


def head_loss_apart(x, w, *rest):
    """(loss, dx, dw) with every rounding of fp8_head_loss: autograd does the loss, matmuls are float32."""
    x32, w32 = (tk._eight(t, factor).float() / factor for t, factor in ((x, 16), (w, 256)))
    logits = (x32 @ w32).to(x.dtype).float()
    loss, g = with_grads(lambda z: tk.softcapped_cross_entropy_ref(z, *rest).sum(), (logits,))
    g32 = tk._eight(g, 512, tk.E5M2).float() / 512
    return loss, g32 @ w32.T, x32.T @ g32


def head_loss_unrounded(*inputs_and_rest):
    x, w, *rest = inputs_and_rest
    return tk.softcapped_cross_entropy_ref(x @ w, *rest).sum()


def relative_error(got, want) -> float:
    """Of the norm: rounding errors average."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("slots", [[24], [8] * 3, [5, 1, 2, 16], [1] * 24], ids=str)
def test_fp8_head_loss_is_the_composition(slots, weights):
    inputs, rest = head_loss_inputs(slots, 16, 320, weights=weights)
    loss, *grads = with_grads(lambda *t: tk.fp8_head_loss(*t, *rest), inputs)
    want, *want_grads = head_loss_apart(*inputs, *rest)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert torch.allclose(loss, want, rtol=1e-6)
    if not any(weights):
        assert not any(grad.any() for grad in grads)
        return
    for g, e in zip(grads, want_grads, strict=True):  # of a few elements the rounding to 2 bits may differ
        assert relative_error(g, e) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_head_loss_error_is_that_of_the_formats(dtype):
    """Against what is computed without any rounding."""
    inputs, rest = head_loss_inputs([48, 48], 64, 320, dtype)
    got = with_grads(lambda *t: tk.fp8_head_loss(*t, *rest), inputs)
    want = with_grads(lambda *t: head_loss_unrounded(*t, *rest), doubled(inputs))
    for g, e, bound in zip(got, want, (2e-3, 2**-3, 2**-3), strict=True):
        assert relative_error(g, e) < bound
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype]


def test_fp8_head_loss_gradient_scales_with_the_upstream_factor():
    """Made in forward for a factor of 1, multiplied in backward: no factor costs precision or underflows."""
    inputs, rest = head_loss_inputs([12, 12], 16, 320)
    once = with_grads(lambda *t: tk.fp8_head_loss(*t, *rest), inputs)
    for factor in (1 / 8, -4.0, 2.0**-40, 0.0):
        scaled = with_grads(lambda *t, f=factor: f * tk.fp8_head_loss(*t, *rest), inputs)
        for g, e in zip(scaled, once, strict=True):
            assert torch.equal(g, factor * e)
    two = with_grads(lambda *t: tk.fp8_head_loss(*t, *rest) + tk.fp8_head_loss(*t, *rest) / 2, inputs)
    for g, e in zip(two, once, strict=True):
        assert torch.allclose(g, 1.5 * e)


def test_fp8_saturates_and_keeps_dtypes():
    (x, w), rest = head_loss_inputs([2, 4], 8, 16)
    huge, large = (x.sign() * size for size in (1e4, 28.0))
    heavy, full = (w.sign() * size for size in (30.0, 1.75))
    for over, limit in (((huge, w), (large, w)), ((x, heavy), (x, full))):
        got, want = (with_grads(lambda *t: tk.fp8_head_loss(*t, *rest), inputs) for inputs in (over, limit))
        assert all(torch.isfinite(g).all() for g in got)
        assert all(torch.equal(g, e) for g, e in zip(got, want, strict=True))
    # The gradient of the logits: with a one-hot x it can be read off dw.
    _, _, dw = with_grads(
        lambda x, w: tk.fp8_head_loss(x, w, *rest[:2], torch.tensor([1e6, 0, 0])), (torch.eye(6, 8), w)
    )
    assert float(dw.abs().max()) == 57344 / 512
    _, dx, dw = with_grads(
        lambda x, w: tk.fp8_head_loss(x, w, *rest), (x.to(torch.bfloat16), w.to(torch.float16))
    )
    assert (dx.dtype, dw.dtype) == (torch.bfloat16, torch.float16)
    for dtype in (tk.E4M3, tk.E5M2):
        values = torch.tensor([[float("nan"), 1e9, -1e9]])
        nan, *ends = tk._eight(values, 1, dtype).float().flatten().tolist()
        assert nan != nan
        assert ends == [torch.finfo(dtype).max, torch.finfo(dtype).min]


def relu2_inputs(n, d, f, dtype=torch.float32, device="cpu"):
    """RMS-normalised x, weights as training makes them, an upstream gradient within the range of FP8."""
    torch.manual_seed(n)
    x = torch.nn.functional.rms_norm(torch.randn(n, d), (d,))
    tensors = x, *(torch.randn(f, d) * 0.03 for _ in range(2)), torch.randn(n, d) / 64
    *inputs, dy = (t.to(device, dtype) for t in tensors)
    return tuple(inputs), dy


def rounded(x, factor, dtype=tk.E4M3):
    return tk._eight(x, factor, dtype).to(x.dtype) / factor


def rounded_gradient(g):
    return rounded(g, 8192, tk.E5M2)


def relu2_by_hand(x, w1, w2, dy):
    """(y, dx, dw1, dw2) of fp8_linear_relu2 by products of rounded float64 tensors."""
    x8, w1_8, w2_8 = (rounded(t.double(), f) for t, f in ((x, 16), (w1, 256), (w2, 256)))
    post = rounded(torch.relu(x8 @ w1_8.T).square(), 1)
    g8 = rounded_gradient(dy.double())
    dpre = rounded_gradient((g8 @ w2_8.T) * 2 * post.sqrt())
    return post @ w2_8, dpre @ w1_8, dpre.T @ x8, post.T @ g8


def relu2_of_what_was_written(x, w1, w2, dy):
    """The same, of the 8-bit post and dpre that the op writes: how it rounded no longer matters."""
    (x8, w1_8), w2_8, g8 = tk._eights(x, w1), tk._eight(w2, 256), tk._e5m2_gradient(dy)
    post8, _ = tk._fp8_relu2(x8, w1_8)
    dpre8, _ = tk._fp8_relu2(g8, w2_8, post8)
    x, w1, w2, post = (t.double() / f for t, f in ((x8, 16), (w1_8, 256), (w2_8, 256), (post8, 1)))
    g, dpre = g8.double() / 8192, dpre8.double() / 8192
    return post @ w2, dpre @ w1, dpre.T @ x, post.T @ g


def test_fp8_linear_relu2_rounds_what_it_says():
    inputs, dy = relu2_inputs(50, 64, 96)
    got = with_grads(tk.fp8_linear_relu2, inputs, dy)
    for g, e in zip(got, relu2_by_hand(*inputs, dy), strict=True):
        assert relative_error(g, e) < 1e-5


def test_fp8_linear_relu2_error_is_that_of_the_format():
    inputs, dy = relu2_inputs(48, 64, 320)
    got = with_grads(tk.fp8_linear_relu2, inputs, dy)
    want = with_grads(tk.linear_relu2_ref, doubled(inputs), dy)
    # Of the norm: e4m3 rounds by 2^-4 at most, e5m2, which every gradient has been through, by 2^-3.
    for g, e, most in zip(got, want, (2**-4, 2**-3, 2**-3, 2**-3), strict=True):
        assert 2**-9 < relative_error(g, e) < most


def test_fp8_linear_relu2_saturates_and_keeps_dtypes():
    x, w1 = torch.full((2, 8), 100.0, dtype=torch.bfloat16), torch.full((16, 8), 5.0, dtype=torch.bfloat16)
    y, *grads = with_grads(tk.fp8_linear_relu2, (x, w1, torch.full_like(w1, 1e4)))
    assert torch.equal(y, torch.full_like(x, 16 * 448 * 1.75))  # x at 28, w1 and w2 at 1.75, post at 448
    assert {t.dtype for t in (y, *grads)} == {torch.bfloat16}
    assert all(torch.isfinite(t).all() for t in grads)
    assert tk.fp8_linear_relu2(x * float("nan"), w1, w1).isnan().all()
    inputs = torch.full((8, 8), 0.5), torch.ones(16, 8), torch.ones(16, 8)
    huge, limit = (with_grads(tk.fp8_linear_relu2, inputs, torch.full((8, 8), g))[1] for g in (1e6, 7.0))
    assert torch.equal(huge, limit), "a gradient beyond e5m2's range saturates"


def linear_inputs(n, d, c, dtype=torch.float32, device="cpu"):
    """As relu2_inputs: (x, w), dy."""
    (x, w, _), _ = relu2_inputs(n, d, c, dtype, device)
    return (x, w), (torch.randn(n, c) / 64).to(device, dtype)


def fp8_linear_all(x, w):
    """The product of fp8_linear_qkv, whose weight's gradient is in FP8 too."""
    return tk._Fp8Linear.apply(x, w, True)


each_linear = pytest.mark.parametrize("op", [tk.fp8_linear, fp8_linear_all])


@each_linear
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fp8_linear_rounds_what_it_says(dtype, op):
    """Products of the same 8-bit values; the weight's gradient is that of the exact product, or not."""
    (x, w), dy = linear_inputs(50, 64, 96, dtype)
    y, dx, dw = with_grads(op, (x, w), dy)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert {t.dtype for t in (y, dx, dw)} == {dtype}
    x8, w8, g8 = rounded(x.double(), 16), rounded(w.double(), 256), rounded_gradient(dy.double())
    assert relative_error(y, x8 @ w8.T) < tolerance
    assert relative_error(dx, g8 @ w8) < tolerance
    exact = with_grads(torch.nn.functional.linear, (x, w), dy)
    assert relative_error(dw, g8.T @ x8 if op is fp8_linear_all else exact[2]) < tolerance
    assert relative_error(y, exact[0]) > 2**-9
    assert 2**-9 < relative_error(dx, exact[1]) < 2**-3


def test_fp8_linear_error_is_within_that_of_the_format():
    """Of each element: half a unit of 3 bits, 2^-4; below 2^-6, where numbers are subnormal, 2^-10."""
    (x, w), _ = linear_inputs(48, 64, 320)
    error_x, error_w = (t.double().abs() / 16 + 2**-10 / f for t, f in ((x, 16), (w, 256)))
    bound = error_x @ w.double().abs().T + x.double().abs() @ error_w.T + error_x @ error_w.T
    error = (tk.fp8_linear(x, w).double() - x.double() @ w.double().T).abs()
    assert (error <= bound + 1e-6).all()
    assert 2**-9 < relative_error(tk.fp8_linear(x, w), x.double() @ w.double().T) < 2**-4


@each_linear
def test_fp8_linear_is_exact_on_representable_values_and_saturates(op):
    x = torch.nn.functional.one_hot(torch.arange(48) % 32, 32) * 2.0
    w = torch.tensor([-0.5, 0.0, 0.25, 0.5, 1.75])[torch.randint(5, (64, 32))]
    dy = torch.randint(-2, 3, (48, 64)) / 2
    for got, want in zip(
        with_grads(op, (x, w), dy), with_grads(lambda x, w: x @ w.T, (x, w), dy), strict=True
    ):
        assert torch.equal(got, want)
    x, w = torch.full((2, 16), 100.0, dtype=torch.bfloat16), torch.full((32, 16), -5.0, dtype=torch.bfloat16)
    y, dx, dw = with_grads(op, (x, w))
    assert torch.equal(y, torch.full_like(y, -16 * 28 * 1.75))
    assert torch.equal(dx, torch.full_like(x, -32 * 1.75)), "of the weight that was multiplied"
    # Of the exact product beyond the range too, or of what was multiplied.
    assert torch.equal(dw, torch.full_like(w, 2 * 28.0 if op is fp8_linear_all else 200.0))
    huge, limit = (with_grads(op, (x, w), torch.full_like(y, g))[1] for g in (1e6, 7.0))
    assert torch.equal(huge, limit), "a gradient beyond e5m2's range saturates"
    assert op(x * float("nan"), w).isnan().all()


@pytest.mark.parametrize("rows", [10, 32])
def test_fp8_ops_are_registered_properly(rows):
    # test_schema lacks FP8 arithmetic
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    (x, w1, w2), dy = relu2_inputs(rows, 16, 32)
    x8, w1_8, w2_8, g8 = *tk._eights(x, w1), tk._eight(w2, 256), tk._e5m2_gradient(dy)
    post8, _ = tk._fp8_relu2(x8, w1_8)
    inputs, rest = head_loss_inputs([rows - 3, 3], 16, 32)
    for op, arguments in (
        (tk._product8, (x8, w1_8, 4096, True, torch.float32)),
        (tk._columns8, (x8,)),
        (tk._fp8_relu2, (x8, w1_8)),
        (tk._fp8_relu2, (g8, w2_8, post8)),
        (tk._fp8_head_loss, (*tk._eights(*inputs), *rest, torch.float32)),
    ):
        torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.parametrize(("size", "is_used"), [(1, True), (2, True), (4, False), (8, False)])
def test_matrices_of_one_and_two_bytes_go_to_the_kernels(monkeypatch, size, is_used):
    """Those of one went to the emulation once, which no test of values can notice."""
    monkeypatch.setattr(tk, "_has_tma", lambda device: True)
    monkeypatch.setattr(tk, "triton", tk.triton or object())
    x = types.SimpleNamespace(is_cuda=True, element_size=lambda: size, device="cuda")
    assert tk._use_tma(x, torch.empty(48, 32), size) == is_used


def test_fp8_factors_are_whole_powers_of_two():
    """A float would be a symbol under torch.compile; another number would round twice."""
    factors = tk.E4M3_X_FACTOR, tk.E4M3_W_FACTOR, tk.E4M3_POST_FACTOR, tk.E5M2_GRAD_FACTOR
    for factor in (*factors, tk.E5M2_LOGITS_FACTOR):
        assert isinstance(factor, int)
        assert factor.bit_count() == 1


def test_fp8_available_says_why_not():
    is_available, reason = tk.fp8_available("cpu")
    assert not is_available
    assert "cpu" in reason


# ------------------------------------------------------------------------------------------------------------
# 4. prepare_qkv


def qkv_inputs(
    slots: list[int], heads: int = 4, dim: int = 32, has_ve: bool = True, dtype=torch.float64, device="cpu"
):
    """(tensors with gradients, tables and positions, dy) for slots of these lengths, side by side."""
    rows, generator = sum(slots), torch.Generator().manual_seed(sum(slots))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    freqs = torch.logspace(0, -2, dim // 4)
    angles = torch.outer(torch.arange(2 * max(slots)), freqs).to(device)
    pos_N = torch.cat([torch.arange(n, dtype=torch.int32) for n in slots]).to(device)
    differentiable = (draw(rows, 3, heads, dim), *((draw(rows, heads, dim), draw(rows, heads)) * has_ve))
    return differentiable, (angles.cos().to(dtype), angles.sin().to(dtype), pos_N), draw(3, rows, heads, dim)


def stacked_qkv(op, tables, is_paired: bool, has_offset: bool):
    """One tensor (3, N, H, K) of (qkv[, ve, gate]), for with_grads."""

    def call(qkv, ve=None, gate=None):
        cos, sin, pos = tables
        tables_too = cos.to(qkv.dtype), sin.to(qkv.dtype), pos
        return torch.stack(op(qkv, *tables_too, ve, gate, is_paired, has_offset))

    return call


def qkv_of_slots(tables, B: int, T: int, eps, is_paired: bool, has_offset: bool):
    """What the model computed before there was an op, on (B, T, ...) and with attention's own shapes."""

    def rotate(x, cos, sin):
        turning, still = x.chunk(2, dim=-1)
        even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1)
        return torch.cat((turned.flatten(-2), still), dim=-1)

    def call(qkv, ve=None, gate=None):
        _, _, H, K = qkv.shape
        q, k, v = qkv.view(B, T, 3 * H, K).chunk(3, dim=2)
        q, k = (torch.nn.functional.rms_norm(x, (K,), eps=eps) for x in (q, k))
        if ve is not None:
            v = v + (2 * torch.sigmoid(gate.view(B, T, H))).unsqueeze(-1) * ve.view(B, T, H, K)
        if is_paired:
            cos, sin = (table[: 2 * T].view(T, 1, 2, -1) for table in tables[:2])
            q, k = (rotate(z.view(B, T, H // 2, 2, K), cos, sin).reshape(B, 2 * T, H // 2, K) for z in (q, k))
        else:
            cos, sin = (table[:T].unsqueeze(1) for table in tables[:2])
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if has_offset:
            turning, still = k.chunk(2, dim=-1)
            k = torch.cat((turning, torch.cat((still[:, :1], still[:, :-1]), dim=1)), dim=-1)
        return torch.stack([x.reshape(B * T, H, K) for x in (q, k, v)])

    return call


FLAGS = [(False, False), (False, True), (True, False), (True, True)]
each_qkv = pytest.mark.parametrize("has_ve", [True, False], ids=["ve", ""])
each_flags = pytest.mark.parametrize("flags", FLAGS, ids=["plain", "offset", "paired", "paired offset"])


@each_flags
@each_qkv
def test_qkv_ref_is_that_of_the_slots(flags, has_ve):
    inputs, tables, dy = qkv_inputs([10] * 3, has_ve=has_ve)
    got = with_grads(stacked_qkv(tk.prepare_qkv, tables, *flags), inputs, dy)
    want = with_grads(qkv_of_slots(tables, 3, 10, tk.QKV_EPS, *flags), inputs, dy)
    assert_close(got, want, want, tiny=1e-14)
    assert all(x.is_contiguous() for x in tk.prepare_qkv(inputs[0], *tables, None, None, *flags))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_flags
def test_qkv_ref_is_bitwise_that_of_the_slots(flags, dtype):
    inputs, tables, _ = qkv_inputs([10] * 3, dtype=dtype)
    want = qkv_of_slots(tables, 3, 10, None, *flags)(*inputs)
    assert torch.equal(stacked_qkv(tk.prepare_qkv, tables, *flags)(*inputs), want)


def stacked_with_tables(tables, qkv, ve=None, gate=None):
    return torch.stack(tk.prepare_qkv(qkv, *tables, ve, gate, True, True))


def check_compiled_qkv(backend: str) -> None:
    """One graph, and one more for changing sizes, gives what eager gives."""
    compiled = torch.compile(stacked_with_tables, fullgraph=True, backend=backend)
    for has_ve in (True, False):
        for rows, stance in ((7, "default"), (9, "default"), (13, "fail_on_recompile")):
            inputs, tables, dy = qkv_inputs([16, rows], has_ve=has_ve, dtype=torch.float32)
            inputs = tuple(x.requires_grad_() for x in inputs)
            with torch.compiler.set_stance(stance):
                y = compiled(tables, *inputs)
            got = y.detach(), *torch.autograd.grad(y, inputs, dy)
            want = with_grads(lambda *x, t=tables: stacked_with_tables(t, *x), inputs, dy)
            assert all(torch.equal(g, e) for g, e in zip(got, want, strict=True))


def test_qkv_compiles_for_any_number_of_rows():
    check_compiled_qkv("aot_eager")


def linear_qkv_inputs(
    slots, heads: int = 4, dim: int = 32, has_ve: bool = True, dtype=torch.float32, device="cpu"
):
    """As qkv_inputs, x and w in the place of qkv, a gradient within the range of FP8."""
    (_, *rest), tables, dy = qkv_inputs(slots, heads, dim, has_ve, dtype, device)
    (x, w), _ = linear_inputs(sum(slots), 64, 3 * heads * dim, dtype, device)
    return (x, w, *rest), tables, dy / 64


def stacked_linear(op, tables, is_paired: bool, has_offset: bool):
    def call(x, w, ve=None, gate=None):
        return torch.stack(op(x, w, *tables, ve, gate, is_paired, has_offset))

    return call


def fp8_qkv_by_hand(inputs, tables, dy, *flags):
    """(y, dx, dw[, dve, dgate]) of fp8_linear_qkv by products of rounded float64 tensors."""
    x, w, *rest = doubled(inputs)
    x8, w8 = rounded(x, 16), rounded(w, 256)
    qkv = (x8 @ w8.T).view(len(x), 3, *dy.shape[2:])
    y, dqkv, *dve = with_grads(stacked_qkv(tk.prepare_qkv_ref, tables, *flags), (qkv, *rest), dy)
    g8 = rounded_gradient(dqkv.flatten(1))
    return y, g8 @ w8, g8.T @ x8, *dve


@each_flags
@each_qkv
def test_linear_qkv_is_the_composition(flags, has_ve):
    inputs, tables, dy = linear_qkv_inputs([10] * 3, has_ve=has_ve)
    got = with_grads(stacked_linear(tk.linear_qkv, tables, *flags), inputs, dy)
    x, w, *rest = (x.detach().requires_grad_() for x in inputs)
    y = stacked_qkv(tk.prepare_qkv_ref, tables, *flags)((x @ w.T).view(30, 3, 4, 32), *rest)
    for g, e in zip(got, (y, *torch.autograd.grad(y, (x, w, *rest), dy)), strict=True):
        assert torch.allclose(g, e, rtol=1e-5, atol=1e-6)
    got = with_grads(stacked_linear(tk.fp8_linear_qkv, tables, *flags), inputs, dy)
    for g, e in zip(got, fp8_qkv_by_hand(inputs, tables, dy, *flags), strict=True):
        assert relative_error(g, e) < 1e-5


# ------------------------------------------------------------------------------------------------------------
# 5. attention


def attention_by_loop(q_NHK, k_NHK, v_NHK, cu_seqlens, window: int, scale: float):
    out = []
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        for i in range(start, end):
            reach = slice(max(start, i - window), i + 1)
            weights = torch.softmax(scale * torch.einsum("hk,jhk->hj", q_NHK[i], k_NHK[reach]), dim=-1)
            out.append(torch.einsum("hj,jhk->hk", weights, v_NHK[reach]))
    return torch.stack(out)


def attention_inputs(rows: int, heads: int = 2, dim: int = 8, dtype=torch.float64, device="cpu"):
    torch.manual_seed(rows)
    return tuple(torch.randn(rows, heads, dim, device=device, dtype=dtype) for _ in range(3))


def sched(window: int, scale: float):
    return torch.tensor(window), torch.tensor(scale)


ATTENTION_CASES = {
    # name: (slots, tokens of a slot, document starts in the rows, window, max_window)
    "one block": (1, 50, [0, 7, 8, 30], 5, 100),
    "window over document": (1, 50, [0, 7, 8, 30], 90, 100),
    "window zero": (1, 40, [0, 11], 0, 4),
    "single token documents": (1, 30, list(range(30)), 10, 16),
    "two slots": (2, 40, [0, 13, 40, 41, 70], 9, 16),
    "blocks": (2, 150, [0, 100, 150, 170, 280], 60, 100),
    "blocks, longest window": (1, 300, [0, 40], 140, 140),
    "blocks, tokens a multiple": (1, 256, [0, 5], 128, 128),
    "blocks, slots cut by them": (5, 60, [0, 60, 90, 120, 180, 181, 240], 60, 60),
    "max_window over tokens": (1, 140, [0, 70], 139, 4096),
}


@pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES)
def test_attention_reference_is_the_loop(case):
    slots, tokens, starts, window, max_window = case
    qkv = attention_inputs(slots * tokens)
    cu = torch.tensor(starts + [slots * tokens] * 4, dtype=torch.int32)
    dy = torch.randn_like(qkv[0])
    arguments = cu, tokens, *sched(window, 0.25), max_window, "reference"
    got = with_grads(lambda *x: tk.attention(*x, *arguments), qkv, dy)
    want = with_grads(lambda *x: attention_by_loop(*x, cu, window, 0.25), qkv, dy)
    assert_close(got, want, want, tiny=1e-12)


def test_attention_reference_in_bfloat16():
    qkv = attention_inputs(400, dtype=torch.bfloat16)
    cu = torch.tensor([0, 90, 200, 400], dtype=torch.int32)
    got = tk.attention(*qkv, cu, 200, *sched(50, 0.25), 64, "reference")
    assert got.dtype == torch.bfloat16
    assert max_error(got, attention_by_loop(*doubled(qkv), cu, 50, 0.25)) < 2**-6


def test_attention_refuses_what_it_cannot_do():
    qkv, cu = attention_inputs(16), torch.tensor([0, 16], dtype=torch.int32)
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
    q, k, v = attention_inputs(30, dtype=torch.float32)
    cu = torch.tensor([0, 9, 30, 30], dtype=torch.int32)
    dy = torch.randn_like(q)
    got = with_grads(lambda *x: plumbed(*x, cu, 30, *sched(6, 0.25))[0], (q, k, v), dy)
    want = with_grads(lambda *x: attention_by_loop(*x, cu, 6, 0.25), (q, k, v), dy)
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
# 6. everything under torch.compile


def tiny_model(x, w1, w2, head, q, k, v, targets, positions, weights, cu, window, scale, attend):
    h = tk.linear_relu2(x, w1, w2)
    rows = targets, positions, weights
    loss = tk.fp8_head_loss(h, head, *rows) / 8
    loss = (
        loss + tk.softcapped_cross_entropy(h @ head, *rows).sum() + tk.softcapped_nll(h @ head, targets).sum()
    )
    bank = tk.ba_plus_caa(tk.xxt(w1.detach()[None]), 0.3, 0.2)
    return loss + attend(q, k, v, cu, window, scale).square().sum() + bank.sum()


def check_compiled(backend: str, attend) -> None:
    """One graph for new schedule values, another number of rows, of slots and of documents."""
    torch.manual_seed(0)
    weights = tuple(torch.randn(shape, requires_grad=True) for shape in ((24, 16), (24, 16), (16, 48)))
    compiled = torch.compile(tiny_model, fullgraph=True, dynamic=True, backend=backend)

    def arguments(slots, starts, tokens, mtp, window, scale):
        x = torch.randn(sum(slots), 16, requires_grad=True)
        qkv = tuple(torch.randn(tokens, 3, 16, requires_grad=True) for _ in range(3))
        targets, cu = torch.randint(48, (sum(slots),)), torch.tensor([*starts, tokens, tokens]).int()
        rest = targets, positions_of(slots), torch.tensor(mtp), cu, *sched(window, scale), attend
        return x, *weights, *qkv, *rest

    def grads_of(model, inputs):
        loss = model(*inputs)
        return loss, *torch.autograd.grad(loss, inputs[:7])

    calls = (
        arguments([16, 16], [0, 5, 150, 190], 300, [1.0, 0.5, 0.25], 30, 0.1),
        arguments([16, 16], [0, 5, 150, 190], 300, [1.0, 0.5, 0.0], 17, 0.15),
        arguments([12, 12, 12, 12], [0, 30, 100, 150, 310, 311, 330], 420, [1.0, 0.0, 0.0], 40, 0.2),
        arguments([21], [0, 99], 290, [1.0, 0.0, 0.5], 0, 0.12),
    )
    for i, inputs in enumerate(calls):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = grads_of(compiled, inputs)
        for g, e in zip(got, grads_of(tiny_model, inputs), strict=True):
            assert torch.allclose(g, e, rtol=1e-4, atol=1e-4), f"call {i}"


def attend_by_reference(q, k, v, cu, window, scale):
    return tk.attention(q, k, v, cu, 150, window, scale, 40, "reference")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_new_schedule_values_and_rows_do_not_recompile(backend):
    check_compiled(backend, attend_by_reference)


def test_opaque_attention_compiles(plumbed):
    def attend(q, k, v, cu, window, scale):
        return plumbed(q, k, v, cu, 150, window, scale)[0]

    check_compiled("aot_eager", attend)


def check_any_number_of_rows(op, tolerance: float) -> None:
    """One graph for every N, values and gradients as in eager mode."""
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs_of = linear_inputs if op is tk.fp8_linear else relu2_inputs
    for i, n in enumerate((40, 70, 200)):
        inputs, dy = inputs_of(n, 32, 48)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = with_grads(compiled, inputs, dy)
        for g, e in zip(got, with_grads(op, inputs, dy), strict=True):
            assert relative_error(g, e) <= tolerance


@pytest.mark.parametrize("op", [tk.linear_relu2, tk.fp8_linear_relu2, tk.fp8_linear])
def test_linear_products_compile_for_any_number_of_rows(op):
    check_any_number_of_rows(op, 1e-6)


@pytest.mark.slow
def test_compiled_fp8_products_are_cached_and_never_stale(monkeypatch):
    """A second start finds the graphs that the first one made; after a change in backward it does not."""
    import torch._functorch.config
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    (x, w), dy = linear_inputs(32, 64, 48)

    def start() -> tuple[int, tuple[torch.Tensor, ...]]:
        torch._dynamo.reset()
        counters.clear()
        got = with_grads(torch.compile(tk.fp8_linear, fullgraph=True), (x, w), dy)
        return counters["aot_autograd"]["autograd_cache_hit"], got

    with torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True), fresh_cache():
        (first, want), (second, again) = start(), start()
        assert (first, second) == (0, 1)
        assert all(torch.equal(g, e) for g, e in zip(again, want, strict=True))
        monkeypatch.setattr(tk, "DX_FACTOR", 2 * tk.DX_FACTOR)
        third, (y, dx, dw) = start()
        assert third == 0
        assert torch.equal(dx, want[1] / 2)
        assert torch.equal(y, want[0])
        assert torch.equal(dw, want[2])
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_operand_of_two_ops_is_written_once():
    """With ops of fixed strides Inductor copies what it has not written yet, for each of them anew."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    def backward(g, w2_8, post8):
        g8 = tk._e5m2_gradient(2 * g)
        return tk._fp8_relu2(g8, w2_8, post8)[0], tk._columns8(g8)

    n, d, f = 64, 32, 48
    operands = torch.randn(n, d), torch.randn(f, d).to(tk.E4M3), torch.rand(n, f).to(tk.E4M3)
    with fresh_cache():
        got, (code,) = run_and_get_code(torch.compile(backward, fullgraph=True), *operands)
    torch._dynamo.reset()
    read = [re.search(rf"splits\.{op}\.default\((\w+)", code)[1] for op in ("fp8_relu2", "columns8")]
    assert read[0] == read[1]
    for g, e in zip(got, backward(*operands), strict=True):
        assert torch.equal(g.view(torch.int8), e.view(torch.int8))


# ------------------------------------------------------------------------------------------------------------
# 7. kernels in Triton's interpreter (a child process), not in bfloat16: it truncates stores and breaks dots


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
    tall = torch.randn(m, k, n + 3, dtype=dtype)[:, :, :n].copy_(x.mT).mT  # columns are
    thin = torch.randn(m, n, 2 * k, dtype=dtype)[:, :, ::2].copy_(x)  # neither: copied first
    for view in (x, tall, thin):
        got = tk.xxt(view)
        assert_close((got,), (tk.xxt_ref(x),), (tk.xxt_ref(x.double()),))
        assert view is tall or torch.equal(got, got.mT)


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
@pytest.mark.parametrize("shape", [(150, 72, 304), (1, 64, 256), (257, 136, 72), (129, 130, 70)], ids=str)
def test_interpreted_case_linear_relu2(shape, dtype, forced_kernels):
    n, d, f = shape  # the last has rows that TMA cannot read
    assert tk._use_tma(torch.empty(n, d, dtype=dtype), torch.empty(f, d), dtype.itemsize) == (n != 129)
    inputs = tuple(torch.randn(s, d).mul(d**-0.25).to(dtype) for s in (n, f, f))
    dy = torch.randn(n, d).to(dtype)
    got = with_grads(tk.linear_relu2, inputs, dy)
    assert_close(
        got, with_grads(tk.linear_relu2_ref, inputs, dy), with_grads(tk.linear_relu2_ref, doubled(inputs), dy)
    )


@interpreted
def test_interpreted_case_linear_relu2_of_unaligned_views(forced_kernels):
    (x, w1, w2), dy = relu2_inputs(40, 64, 96)
    want = with_grads(tk.linear_relu2, (x, w1, w2), dy)
    wide, shifted = torch.zeros(40, 67), torch.zeros(96 * 64 + 1)
    wide[:, :64], shifted[1:] = x, w1.flatten()
    views = wide[:, :64], shifted[1:].view(96, 64), w2.T.contiguous().T
    for view, upstream in ((views, dy), ((x, w1, w2), dy.T.contiguous().T)):
        for got, e in zip(with_grads(tk.linear_relu2, view, upstream), want, strict=True):
            assert relative_error(got, e) < 1e-6


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(150, 80, 304), (1, 64, 256), (257, 144, 80), (129, 136, 80)], ids=str)
def test_interpreted_case_fp8_linear_relu2(shape, dtype, forced_kernels):
    n, d, f = shape
    inputs, dy = relu2_inputs(n, d, f, dtype)
    got = with_grads(tk.fp8_linear_relu2, inputs, dy)
    for g, e in zip(got, relu2_by_hand(*inputs, dy), strict=True):
        assert g.dtype == dtype
        assert relative_error(g, e) < 2**-3  # the interpreter truncates subnormals and drops carries
    for g, e in zip(got, relu2_of_what_was_written(*inputs, dy), strict=True):
        assert relative_error(g, e) < (1e-3 if dtype == torch.float16 else 1e-6)


@interpreted
@pytest.mark.parametrize("n", [150, 160, 1])
def test_interpreted_case_fp8_relu2_writes_the_transpose(n, forced_kernels):
    (x, w1, w2), dy = relu2_inputs(n, 80, 304)
    post8, post8_t = tk._fp8_relu2(*tk._eights(x, w1))
    for rows, cols in ((post8, post8_t), tk._fp8_relu2(tk._e5m2_gradient(dy), tk._eight(w2, 256), post8)):
        assert cols.shape == (304, tk._padded(n))
        assert torch.equal(cols[:, :n].view(torch.int8), rows.view(torch.int8).T)
        assert not cols[:, n:].float().any()


@interpreted
def test_interpreted_case_fp8_linear_relu2_is_exact_on_representable_values(forced_kernels):
    """One term a sum, so that every dpre has few bits."""
    x = torch.nn.functional.one_hot(torch.arange(150) % 80, 80) * 2.0
    w1 = torch.tensor([-0.5, 0.0, 0.25, 0.5, 0.75])[torch.randint(5, (304, 80))]
    w2 = torch.nn.functional.one_hot(torch.arange(304) % 80, 80) * 0.5
    dy = torch.randint(-2, 3, (150, 80)) / 2
    got, want = (with_grads(op, (x, w1, w2), dy) for op in (tk.fp8_linear_relu2, tk.linear_relu2_ref))
    for g, e in zip(got, want, strict=True):
        assert torch.allclose(g, e, rtol=1e-6, atol=1e-6)


@interpreted
def test_interpreted_case_fp8_linear_relu2_saturates(forced_kernels):
    x, w1 = torch.full((2, 16), 100.0), torch.full((16, 16), 5.0)
    assert torch.equal(tk.fp8_linear_relu2(x, w1, w1), torch.full((2, 16), 16 * 448 * 1.75))


@interpreted
def test_interpreted_case_fp8_relu2_is_registered_properly(forced_kernels):
    test_fp8_ops_are_registered_properly(10)


@interpreted
@pytest.mark.parametrize("op", [tk.linear_relu2, tk.fp8_linear_relu2])
def test_interpreted_case_linear_relu2_compiles_for_any_number_of_rows(op, forced_kernels):
    check_any_number_of_rows(op, 1e-6)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_interpreted_case_loss(weights, dtype, forced_kernels):
    for vocab, slots in ((1320, [13]), (320, [8, 8, 8]), (1024, [1] * 5), (2100, [3, 1, 1, 2])):
        logits, targets, dy = loss_inputs(sum(slots), vocab, dtype)
        rest = positions_of(slots), torch.tensor(weights)

        def ref(x, rest=(targets, *rest)):
            return tk.softcapped_cross_entropy_ref(x, *rest)

        got = with_grads(
            lambda x, t=targets, r=rest: tk.softcapped_cross_entropy(x, t.int(), *r), (logits,), dy
        )
        assert got[0].dtype == torch.float32
        assert_close(got, with_grads(ref, (logits,), dy), with_grads(ref, doubled((logits,)), dy))


@interpreted
def test_interpreted_case_loss_of_extreme_and_strided_logits(forced_kernels):
    logits = torch.randn(6, 700)[:, :640] * 100
    targets = torch.randint(640, (6,))
    rest = targets, positions_of([6]), torch.tensor([1.0, 0, 0])
    exact = tk.softcapped_cross_entropy_ref(logits.double(), *rest[:2], rest[2].double())
    assert torch.allclose(tk.softcapped_nll(logits, targets).double(), exact, rtol=1e-5)
    wide = torch.stack((targets, positions_of([6]).long()), dim=1)  # targets and positions with a stride
    got = tk.softcapped_cross_entropy(logits, wide[:, 0], wide[:, 1].int(), rest[2])
    assert torch.allclose(got.double(), exact, rtol=1e-5)


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
@pytest.mark.parametrize("n", [70, 64])
def test_interpreted_case_columns8(n, forced_kernels):
    x8 = tk._eight(torch.randn(n, 200), 16)
    cols = tk._columns8(x8)
    assert torch.equal(cols[:, :n].view(torch.int8), x8.view(torch.int8).T)
    assert not cols[:, n:].float().any()


@interpreted
@pytest.mark.parametrize("weights", WEIGHTS[::3], ids=str)
@pytest.mark.parametrize("slots", [[24], [5, 1, 2, 16]], ids=str)
def test_interpreted_case_fp8_head_loss(slots, weights, forced_kernels):
    inputs, rest = head_loss_inputs(slots, 16, 320, weights=weights)
    loss, *grads = with_grads(lambda *t: tk.fp8_head_loss(*t, *rest), inputs)
    want, *want_grads = head_loss_apart(*inputs, *rest)
    assert torch.allclose(loss, want, rtol=2e-3)  # the interpreter rounds to FP8 otherwise: see above
    for g, e in zip(grads, want_grads, strict=True):
        assert float((g - e).norm()) <= 0.1 * float(e.norm())


class Launches:
    """A kernel that notes how many programs each launch has."""

    def __init__(self, kernel) -> None:
        self.kernel, self.programs = kernel, []

    def __getitem__(self, grid):
        self.programs.append(grid[0])
        return self.kernel[grid]


@interpreted
@pytest.mark.parametrize("chunk", [8, 7, 23, 1])
def test_interpreted_case_fp8_head_loss_in_chunks(chunk, forced_kernels, monkeypatch):
    """Terms of a row reach into the next chunk; the last chunk may be short."""
    inputs, rest = head_loss_inputs([9, 15], 16, 320)
    whole = with_grads(lambda *t: tk.fp8_head_loss(*t, *rest), inputs)
    launches = Launches(tk._ce_forward_kernel), Launches(tk._ce_backward_kernel)
    monkeypatch.setattr(tk, "_ce_forward_kernel", launches[0])
    monkeypatch.setattr(tk, "_ce_backward_kernel", launches[1])
    monkeypatch.setattr(tk, "HEAD_CHUNK", chunk)
    parts = with_grads(lambda *t: tk.fp8_head_loss(*t, *rest), inputs)
    programs = [min(chunk, 24 - first) for first in range(0, 24, chunk)]
    assert launches[0].programs == launches[1].programs == programs
    assert torch.equal(parts[0], whole[0])
    for g, e in zip(parts[1:], whole[1:], strict=True):  # products of other shapes may sum in another order
        assert torch.allclose(g, e, rtol=1e-5, atol=1e-7)


@interpreted
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("block", [8192, 128, 64])
def test_interpreted_case_loss_and_gradient_a_chunk_at_a_time(block, weights, forced_kernels):
    """In chunks of 7 rows with a stride; rows of 320 are less than a block, or blocks and a rest, or none."""
    logits, targets, _ = loss_inputs(24, 320, torch.float32)
    positions, weights_K, factor = positions_of([9, 1, 14]), torch.tensor(weights), torch.full((24,), 3.5)
    same, exact = (
        with_grads(lambda z: tk.softcapped_cross_entropy_ref(z, targets, positions, weights_K), (z,), factor)
        for z in (logits, logits.double())
    )
    wide = torch.cat((logits, logits), dim=1)[:, :320]
    rows = targets.int(), positions, weights_K
    got, lse, grad = torch.empty(24), torch.empty(24), torch.full((24, 320), float("nan"))
    constants = tk._ce_constants(block, 4, is_fast=True)
    for first in range(0, 24, 7):
        part, sizes = slice(first, first + 7), (first, 24, 320, wide.stride(0))
        grid = (len(wide[part]),)
        tk._ce_forward_kernel[grid](wide[part], *rows, got, lse, *sizes, **constants)
        tk._ce_backward_kernel[grid](factor, lse, wide[part], *rows, grad[part], *sizes, **constants)
    assert_close((got, grad), same, exact)
    assert torch.allclose(lse, tk.softcap(logits).logsumexp(dim=-1))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_flags
@each_qkv
def test_interpreted_case_qkv(flags, has_ve, dtype, forced_kernels):
    for slots, heads, dim in (([13, 1, 9, 2], 4, 32), ([1], 2, 8), ([40], 6, 128)):
        inputs, tables, dy = qkv_inputs(slots, heads, dim, has_ve, dtype)
        got = with_grads(stacked_qkv(tk.prepare_qkv, tables, *flags), inputs, dy)
        ref = stacked_qkv(tk.prepare_qkv_ref, tables, *flags)
        assert_close(got, with_grads(ref, inputs, dy), with_grads(ref, doubled(inputs), dy))


@interpreted
def test_interpreted_case_qkv_in_strange_layouts(forced_kernels):
    inputs, tables, dy = qkv_inputs([5, 6], dtype=torch.float32)
    strided = tuple(torch.stack((x, x), dim=-1)[..., 0] for x in inputs)
    assert not strided[0].is_contiguous()
    got = with_grads(stacked_qkv(tk.prepare_qkv, tables, True, False), strided, dy)
    want = with_grads(stacked_qkv(tk.prepare_qkv, tables, True, False), inputs, dy)
    assert all(torch.equal(g, e) for g, e in zip(got, want, strict=True))


@interpreted
@each_qkv
def test_interpreted_case_qkv_op_is_registered_properly(has_ve, forced_kernels):
    inputs, tables, dy = qkv_inputs([4, 3], has_ve=has_ve, dtype=torch.float32)
    qkv, *rest = (x.requires_grad_() for x in inputs)
    arguments = qkv, *tables, *(rest or (None, None)), True, True
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(tk._prepare_qkv, arguments, test_utils=(*checks, "test_aot_dispatch_dynamic"))
    arguments = (x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    arguments = *dy.unbind(0), *arguments
    torch.library.opcheck(tk._prepare_qkv_backward, (*arguments, False), test_utils=checks)
    torch.library.opcheck(tk._prepare_qkv_backward, (*arguments, True), test_utils=checks[1:])


@interpreted
def test_interpreted_case_qkv_inside_a_compiled_function(forced_kernels):
    check_compiled_qkv("aot_eager")


@interpreted
@each_flags
@each_qkv
def test_interpreted_case_fp8_linear_qkv(flags, has_ve, forced_kernels):
    inputs, tables, dy = linear_qkv_inputs([13, 1, 9, 2], has_ve=has_ve)
    got = with_grads(stacked_linear(tk.fp8_linear_qkv, tables, *flags), inputs, dy)
    for g, e in zip(got, fp8_qkv_by_hand(inputs, tables, dy, *flags), strict=True):
        assert relative_error(g, e) < 2**-3  # the interpreter truncates subnormals and drops carries


@interpreted
def test_interpreted_case_fp8_linear_qkv_saturates(forced_kernels):
    """Of the gradient that leaves the kernel in 8 bits."""
    inputs, tables, dy = linear_qkv_inputs([8], has_ve=False)
    huge, limit = (
        with_grads(stacked_linear(tk.fp8_linear_qkv, tables, False, False), inputs, dy.sign() * size)
        for size in (2.0**30, 2.0**28)
    )
    assert all(torch.isfinite(g).all() for g in huge)
    assert all(torch.equal(g, e) for g, e in zip(huge[1:], limit[1:], strict=True))


@interpreted
def test_interpreted_case_fp8_linear_qkv_inside_a_compiled_function(forced_kernels):
    """One graph for any number of rows, values and gradients as in eager mode."""

    def model(cos, sin, pos, x, w, *rest):
        return torch.stack(tk.fp8_linear_qkv(x, w, cos, sin, pos, *(rest or (None, None)), True, True))

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for has_ve in (True, False):
        for rows, stance in ((7, "default"), (9, "fail_on_recompile")):
            inputs, tables, dy = linear_qkv_inputs([16, rows], has_ve=has_ve)
            with torch.compiler.set_stance(stance):
                got = with_grads(lambda *x, t=tables: compiled(*t, *x), inputs, dy)
            want = with_grads(lambda *x, t=tables: model(*t, *x), inputs, dy)
            assert all(torch.equal(g, e) for g, e in zip(got, want, strict=True))


@interpreted
def test_interpreted_case_ops_are_registered_properly(forced_kernels):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, w1, w2 = (torch.randn(s, 16, requires_grad=True) for s in (10, 20, 20))
    logits, targets, _ = loss_inputs(6, 320, torch.float32)
    cases = (
        (tk._xxt, (x.detach()[None],)),
        (tk._ba_plus_caa, (torch.eye(16)[None], 0.5, 0.25)),
        (tk._linear_relu2, (x, w1, w2)),
        *(
            (
                tk._ce,
                (logits.requires_grad_(), targets, positions_of([3, 3]), torch.tensor([1.0, 0.5, 0.0]), x),
            )
            for x in (True, False)
        ),
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
# 8. kernels compiled for Hopper without a GPU: types, shared memory, tensor core instructions

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
    return built

B, S = "*bf16", "*fp32"
symmetric = {"x_ptr": B, "c_ptr": B, "alpha": "fp32", "beta": "fp32"}
for k in (768, 3072, 70):
    tile = tk.XXT_TILE
    build(tk._symmetric_kernel, symmetric, tile.launch(k) | {"ADDS_X": False}, True)
build(tk._symmetric_kernel, symmetric, tk.BA_TILE.launch(768) | {"ADDS_X": True}, True)
def blocks(kind, rows, cols):
    return f"tensordesc<{kind}[{rows}, {cols}]>"

for (tile, programs, parts), kind, is_backward in (
    (tk.RELU2_FORWARD, "bf16", False), (tk.RELU2_BACKWARD, "bf16", True), (tk.RELU2_FP8, "fp8e4nv", False),
    (tk.RELU2_FP8_BACKWARD, "fp8e5", True),
):
    (m, n, k), is_fp8 = tile[:3], kind != "bf16"
    types = {"a_desc": blocks(kind, m, k), "w_desc": blocks("fp8e4nv" if is_fp8 else kind, n, k)}
    types |= {"post_desc": blocks("fp8e4nv" if is_fp8 else kind, m, n // parts)}
    types |= {"out_desc": blocks(kind, m, n // parts)}
    types |= {"columns_desc": blocks("i8", n // parts, m) if is_fp8 else blocks(kind, m, n // parts)}
    constants = tk._relu2_constants(tile, 132 * programs, parts, is_backward, is_fp8)
    build(tk._relu2_kernel, types, constants, True)
for kernel in (tk._prepare_qkv_kernel, tk._prepare_qkv_backward_kernel):
    types = {name: B for name in kernel.arg_names if name.endswith("_ptr")} | {"pos_ptr": "*i32"}
    for none in ({}, {"ve_ptr": None, "gate_ptr": None}):
        for paired, offset in ((False, False), (True, False), (False, True), (True, True)):
            constants = tk._qkv_constants(6, 128, paired, offset) | none
            if kernel is tk._prepare_qkv_kernel:
                build(kernel, types, constants)
            else:
                build(kernel, types, constants | tk.QKV_EXACT)
                build(kernel, types | {"dqkv_ptr": "*fp8e5"}, constants | tk.QKV_E5M2)
loss = {"logits_ptr": B, "targets_ptr": "*i32", "positions_ptr": "*i32", "weights_ptr": S, "lse_ptr": S}
forward, gradient = loss | {"loss_ptr": S}, loss | {"grad_ptr": S, "dlogits_ptr": B}
for is_fast in (True, False):
    for kernel, types, config in (
        (tk._ce_forward_kernel, forward, (tk.CE_FORWARD_BLOCK, tk.CE_FORWARD_WARPS)),
        (tk._ce_backward_kernel, gradient, (tk.CE_BACKWARD_BLOCK, tk.CE_BACKWARD_WARPS)),
        (tk._ce_backward_kernel, gradient | {"dlogits_ptr": "*fp8e5"},
         (tk.CE_BACKWARD_BLOCK, tk.CE_BACKWARD_WARPS)),
    ):
        built = build(kernel, types, tk._ce_constants(*config, is_fast))
        assert ("tanh.approx.f32" in built.asm["ptx"]) == is_fast
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
# 9. on a GPU, at the trainer's shapes


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
        for view in (x, x.mT.contiguous().mT):
            got = op(view)
            assert_close((got,), (tk.xxt_ref(x),), (tk.xxt_ref(x.double()),))
            assert view is not x or torch.equal(got, got.mT)
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


# Of the norm: y, dx, dw1, dw2. Fast sums keep about 14 bits: some roundings to 8 bits differ, of e5m2 by a
# quarter. Emulated with errors of 1e-3 in the fast sums: 9e-3, 1.5e-2, 1.5e-2, 9e-3.
GPU_FP8_ERRORS = 1e-2, 2e-2, 2e-2, 1e-2


@gpu
@pytest.mark.parametrize("shape", [(16384, 768, 3072), (1000, 768, 3072)], ids=str)
def test_gpu_fp8_linear_relu2(shape, monkeypatch):
    if tk.tma_problem(torch.device("cuda")):
        pytest.skip(tk.tma_problem(torch.device("cuda")))
    monkeypatch.delattr(tk, "fp8_relu2_ref")  # the emulation agrees too, in ten times the time
    inputs, dy = relu2_inputs(*shape, torch.bfloat16, "cuda")
    emulated = relu2_by_hand(*inputs, dy)
    for _, op in each_way(tk.fp8_linear_relu2):
        got = with_grads(op, inputs, dy)
        for g, e, most in zip(got, emulated, GPU_FP8_ERRORS, strict=True):
            assert relative_error(g, e) < most
        written = relu2_of_what_was_written(*inputs, dy)
        for g, e, most in zip(got, written, (1e-2, 1e-2, 5e-3, 5e-3), strict=True):  # fast sums, exact ones
            assert relative_error(g, e) < most


@gpu
@pytest.mark.parametrize("shape", [(16384, 768, 2304), (1000, 768, 2304), (16, 32, 96)], ids=str)
def test_gpu_fp8_linear(shape):
    skip_without_fp8()
    inputs, dy = linear_inputs(*shape, torch.bfloat16, "cuda")
    x8, w8 = (rounded(t.double(), f) for t, f in zip(inputs, (16, 256), strict=True))
    g, g8 = dy.double(), rounded_gradient(dy.double())
    for product, has_dw8 in ((tk.fp8_linear, False), (fp8_linear_all, True)):
        emulated = x8 @ w8.T, g8 @ w8, g8.T @ x8 if has_dw8 else g.T @ inputs[0].double()
        for _, op in each_way(product):
            for got, want in zip(with_grads(op, inputs, dy), emulated, strict=True):
                # bf16 rounding, and the fast sum
                assert relative_error(got, want) < 5e-3
            assert relative_error(op(*inputs), torch.nn.functional.linear(*doubled(inputs))) < 2**-4


@gpu
@each_flags
@each_qkv
def test_gpu_fp8_linear_qkv(flags, has_ve):
    skip_without_fp8()
    inputs, tables, dy = linear_qkv_inputs([8192, 4096, 4095, 1], 6, 128, has_ve, torch.bfloat16, "cuda")
    want = fp8_qkv_by_hand(inputs, tables, dy, *flags)
    for _, op in each_way(tk.fp8_linear_qkv):
        got = with_grads(stacked_linear(op, tables, *flags), inputs, dy)
        # The product is kept in bf16, so that some gradients round otherwise in e5m2: 7e-3, emulated.
        for g, e, most in zip(got, want, (1e-2, 2e-2, 2e-2, 1e-2, 1e-2), strict=False):
            assert relative_error(g, e) < most


@gpu
@each_flags
@each_qkv
def test_gpu_qkv(flags, has_ve):
    inputs, tables, dy = qkv_inputs([8192, 4096, 4095, 1], 6, 128, has_ve, torch.bfloat16, "cuda")
    ref = stacked_qkv(tk.prepare_qkv_ref, tables, *flags)
    same, exact = with_grads(ref, inputs, dy), with_grads(ref, doubled(inputs), dy)
    for _, op in each_way(tk.prepare_qkv):
        assert_close(with_grads(stacked_qkv(op, tables, *flags), inputs, dy), same, exact)


@gpu
def test_gpu_qkv_beyond_32_bit_offsets():
    rows = 2**31 // (3 * 6 * 128) + 10  # the last rows of qkv lie beyond 2^31 elements
    qkv = on_gpu(rows, 3, 6, 128)
    pos = torch.arange(rows, device="cuda", dtype=torch.int32) % 4096
    _, (cos, sin, _), _ = qkv_inputs([4096], 6, 128, False, torch.bfloat16, "cuda")
    qkv.requires_grad_()
    got = tk.prepare_qkv(qkv, cos, sin, pos, None, None, False, True)
    torch.autograd.backward(got, tuple(torch.ones_like(x) for x in got))
    tail = slice(-9, None)  # its first row lacks the one before
    last = qkv.detach()[tail].double().requires_grad_()
    want = tk.prepare_qkv_ref(last, cos.double(), sin.double(), pos[tail], None, None, False, True)
    torch.autograd.backward(want, tuple(torch.ones_like(x) for x in want))
    for g, e in zip((*got, qkv.grad), (*want, last.grad), strict=True):
        assert max_error(g[tail][1:], e[1:]) < 0.05


@gpu
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_gpu_loss(weights):
    logits, targets, dy = loss_inputs(512, 50304, torch.bfloat16, device="cuda")
    rest = targets, positions_of([128] * 4, "cuda")
    weights_K = torch.tensor(weights, device="cuda")

    def ref(x):
        return tk.softcapped_cross_entropy_ref(x, *rest, weights_K)

    same, exact = (with_grads(ref, x, dy) for x in ((logits,), doubled((logits,))))
    for _, op in each_way(lambda x, w: tk.softcapped_cross_entropy(x, *rest, w, is_fast=False)):
        got = with_grads(lambda x, op=op: op(x, weights_K), (logits,), dy)
        assert_close(got, same, exact, tiny=1e-5)
    # The hardware's tanh: 2^-11 of it, 0.006 of a capped logit, in a log-sum-exp and in a target's logit.
    for _, op in each_way(lambda x, w: tk.softcapped_cross_entropy(x, *rest, w)):
        got = with_grads(lambda x, op=op: op(x, weights_K), (logits,), dy)
        assert max_error(got[0], exact[0]) <= 0.012 * sum(weights)
        assert max_error(got[1], exact[1]) <= 0.02 * float(exact[1].abs().max())
        assert float((got[1] - exact[1]).norm()) <= 0.01 * float(exact[1].norm())


@gpu
def test_gpu_loss_beyond_32_bit_offsets():
    rows, vocab = 49152, 50304
    logits = torch.zeros(rows, vocab, device="cuda", dtype=torch.bfloat16)
    logits[-1] = on_gpu(vocab, scale=4.0)
    logits.requires_grad_()
    targets, weights_K = torch.randint(vocab, (rows,), device="cuda"), torch.tensor([1.0, 0, 0]).cuda()
    loss = tk.softcapped_cross_entropy(
        logits, targets, positions_of([rows], "cuda"), weights_K, is_fast=False
    )
    loss.sum().backward()
    last, first = logits.detach()[-1:].double(), positions_of([1], "cuda")
    exact = with_grads(lambda x: tk.softcapped_cross_entropy_ref(x, targets[-1:], first, weights_K), (last,))
    assert max_error(loss[-1:], exact[0]) < 1e-4
    assert max_error(logits.grad[-1:], exact[1]) < 1e-2


def skip_without_fp8() -> None:
    is_available, reason = tk.fp8_available("cuda")
    if not is_available:
        pytest.skip(reason)


@gpu
def test_gpu_fp8_products():
    skip_without_fp8()
    x, w, dy = on_gpu(1024, 768), on_gpu(768, 50304, scale=0.05), on_gpu(1024, 50304, scale=1e-3)
    x8, w8, dy8 = eights = [
        tk._eight(*source) for source in ((x, 16, tk.E4M3), (w, 256, tk.E4M3), (dy, 512, tk.E5M2))
    ]
    x8_t, w8_t, dy8_t = columns = [tk._columns8(t) for t in eights]
    for rows, cols in zip(eights, columns, strict=True):
        assert torch.equal(cols.view(torch.int8), rows.view(torch.int8).T)
    for a, b, factor in ((x8, w8_t, 16 * 256), (dy8, w8, 512 * 256), (x8_t, dy8_t, 16 * 512)):
        for is_fast in (True, False):
            got = tk._matmul_fp8(a, b, factor, x.new_empty(len(a), len(b)), is_fast)
            want = tk._matmul_fp8(a.cpu(), b.cpu(), factor, torch.empty(len(a), len(b)), is_fast)
            # use_fast_accum keeps about 14 bits of the sum: 5.6e-3 measured over 50,304 terms, bf16 rounding
            # included; the trainer uses it over 3,072 at most.
            assert relative_error(got, want.cuda()) < (1e-2 if is_fast else 5e-3)


@gpu
@pytest.mark.parametrize("weights", WEIGHTS[:3], ids=str)
def test_gpu_fp8_head_loss(weights, monkeypatch):
    """Against the same rounding emulated on the CPU, the bf16 head, and itself in other chunks."""
    skip_without_fp8()
    inputs, rest = head_loss_inputs([256, 256, 512], 768, 50304, torch.bfloat16, "cuda", weights)
    eights = (t.cpu() for t in (*tk._eights(*inputs), *rest))
    emulated = [t.cuda() for t in tk.fp8_head_loss_ref(*eights, torch.bfloat16)]
    bf16 = with_grads(lambda *t: head_loss_unrounded(*t, *rest), inputs)
    for chunk in (16384, 1024, 400):
        monkeypatch.setattr(tk, "HEAD_CHUNK", chunk)
        for _, op in each_way(lambda *t: tk.fp8_head_loss(*t, *rest)):
            got = with_grads(op, inputs)
            # The fast tanh and the fast sum move the gradient's rounding to 2 bits here and there.
            for g, e, bound in zip(got, emulated, (1e-3, 0.06, 0.06), strict=True):
                assert relative_error(g, e) < bound
            for g, e, bound in zip(got, bf16, (5e-3, 2**-3, 2**-3), strict=True):
                assert relative_error(g, e) < bound
            eighth = with_grads(lambda *t, op=op: op(*t) / 8, inputs)
            assert all(torch.equal(g, e / 8) for g, e in zip(eighth, got, strict=True))


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
    qkv = attention_inputs(slots * tokens, heads, 128, torch.bfloat16, "cuda")
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
