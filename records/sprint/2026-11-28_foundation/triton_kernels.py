"""Every kernel of the trainer, each beside the plain PyTorch function that says what it computes.

    from triton_kernels import xxt, linear_relu2, softcapped_cross_entropy, fp8_linear_t, attention
    python triton_kernels.py --bench        # on a GPU: speed and error of each, against its reference

A public function runs its Triton kernel where the tensors are on a GPU and Triton is installed, and its
`_ref` otherwise, so that the same trainer runs on a laptop. All of them work eagerly and under
torch.compile(fullgraph=True, dynamic=False). Kernels accumulate in float32 and take the dtype that they write
from the pointer. Launches use the current CUDA device: it must be the one that holds the tensors. Configs are
frozen in the table at the top of each family; nothing is tuned, compiled or allocated at import.

Roofline times are for one H200: 4.3 TB/s measured copy bandwidth, 790 TFLOP/s measured bf16 matmul.

Dimensions: M matrices in a bank, N rows of a flattened op, K inner dimension, D model, F hidden, V padded
vocabulary. In attention: B slots, T tokens of a slot, H heads, K head dimension, N = B * T. In the loss: K
prediction terms.
"""

import argparse
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # a CPU-only installation: the kernels below are defined but never called
    triton, tl = None, SimpleNamespace(constexpr=int)

    def jit(kernel):
        return kernel


# ------------------------------------------------------------------------------------------------------------
# 0. dispatch, and the product that the matmul kernels share

# Tests set this under TRITON_INTERPRET=1, where kernels take CPU tensors; nothing else may.
_FORCE_KERNELS = False


class Tile(NamedTuple):
    """A frozen kernel config."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int

    def launch(self, k: int) -> dict[str, int | bool]:
        blocks = {"BM": self.block_m, "BN": self.block_n, "BK": self.block_k, "EVEN_K": k % self.block_k == 0}
        return {**blocks, "num_stages": self.stages, "num_warps": self.warps}


def _use_kernels(x: Tensor) -> bool:
    return _FORCE_KERNELS or (triton is not None and x.is_cuda)


def _use_matmul_kernels(x: Tensor) -> bool:
    # Tiles are sized for 2-byte operands: float32 ones would need twice the shared memory that an SM has.
    return _FORCE_KERNELS or (triton is not None and x.is_cuda and x.element_size() == 2)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@jit
def _dot_rows(
    a_ptr,
    b_ptr,
    a_rows,  # (BM,) row numbers, all valid
    b_rows,  # (BN,)
    stride_a,
    stride_b,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """acc[i, j] = sum_k a[a_rows[i], k] * b[b_rows[j], k] in float32.

    Both operands are read along k, so that loads coalesce; the second is transposed on its way to the tensor
    core (record 69, pull request 217).
    """
    ks = tl.arange(0, BK)
    a_ptrs = a_ptr + a_rows[:, None] * stride_a + ks[None, :]
    b_ptrs = b_ptr + b_rows[:, None] * stride_b + ks[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            inside = ks[None, :] < K - start
            a = tl.load(a_ptrs, mask=inside, other=0.0)
            b = tl.load(b_ptrs, mask=inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
        a_ptrs += BK
        b_ptrs += BK
    return acc


# ------------------------------------------------------------------------------------------------------------
# 1. xxt: C = X X^T of a bank of matrices

# Traffic: 24 matrices of 768 x 3072 bf16 are read (113 MB) and 24 of 768 x 768 written (28 MB): 33 us. Work:
# the lower triangle of blocks, 21 of 36, 51 GFLOP: 64 us. 40 of 768 x 768: 94 MB, 22 us; 21 GFLOP, 27 us.
# The tiles are the winners of record 65's search (pull request 215), the warps those of record 69.
XXT_TILES = {768: Tile(128, 128, 64, 4, 8)}  # by inner dimension
XXT_TILE_OTHER = Tile(64, 128, 128, 4, 8)


def xxt_ref(x_MNK: Tensor) -> Tensor:
    return x_MNK @ x_MNK.mT


@jit
def _store_symmetric(c_ptr, acc, m0, n0, N, BM: tl.constexpr, BN: tl.constexpr):
    """Store a block and its mirror image; of a block on the diagonal, the lower half twice.

    Both halves of a diagonal block are computed, and their roundings may differ: storing
    both would be a race.
    """
    tile = acc.to(c_ptr.dtype.element_ty)
    rows = m0 + tl.arange(0, BM)
    cols = n0 + tl.arange(0, BN)
    inside = (rows < N)[:, None] & (cols < N)[None, :]
    inside_t = (cols < N)[:, None] & (rows < N)[None, :]
    c_ptrs = c_ptr + rows[:, None] * N + cols[None, :]
    c_ptrs_t = c_ptr + cols[:, None] * N + rows[None, :]
    if m0 >= n0 + BN:
        tl.store(c_ptrs, tile, mask=inside)
        tl.store(c_ptrs_t, tl.trans(tile), mask=inside_t)
    else:  # a mask that varies inside a vector of columns costs single stores, so only here
        tl.store(c_ptrs, tile, mask=inside & (rows[:, None] >= cols[None, :]))
        tl.store(c_ptrs_t, tl.trans(tile), mask=inside_t & (cols[:, None] < rows[None, :]))


@jit
def _xxt_kernel(
    x_ptr,  # (M, N, K), last stride 1
    c_ptr,  # (M, N, N) contiguous
    N,
    K,
    stride_m,
    stride_n,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One block of C and its mirror image; blocks strictly above the diagonal have nothing to do."""
    blocks_n = tl.cdiv(N, BN)
    m0 = tl.program_id(0) // blocks_n * BM
    n0 = tl.program_id(0) % blocks_n * BN
    if m0 + BM <= n0:
        return
    matrix = tl.program_id(1).to(tl.int64)
    x_ptr += matrix * stride_m
    c_ptr += matrix * N * N
    # Rows beyond N read row N - 1 and are not stored: cheaper than a mask in the loop.
    rows_in = tl.minimum(m0 + tl.arange(0, BM), N - 1)
    cols_in = tl.minimum(n0 + tl.arange(0, BN), N - 1)
    acc = _dot_rows(x_ptr, x_ptr, rows_in, cols_in, stride_n, stride_n, K, BM, BN, BK, EVEN_K)
    _store_symmetric(c_ptr, acc, m0, n0, N, BM, BN)


@torch.library.custom_op("splits::xxt", mutates_args=())
def _xxt(x_MNK: Tensor) -> Tensor:
    x_MNK = _rows_contiguous(x_MNK)
    m, n, k = x_MNK.shape
    tile = XXT_TILES.get(k, XXT_TILE_OTHER)
    c_MNN = x_MNK.new_empty(m, n, n)
    grid = (_cdiv(n, tile.block_m) * _cdiv(n, tile.block_n), m)
    _xxt_kernel[grid](x_MNK, c_MNN, n, k, x_MNK.stride(0), x_MNK.stride(1), **tile.launch(k))
    return c_MNN


@_xxt.register_fake
def _(x_MNK):
    m, n, _ = x_MNK.shape
    return x_MNK.new_empty(m, n, n)


def xxt(x_MNK: Tensor) -> Tensor:
    """C_MNN = X X^T of every matrix; one triangle is computed and mirrored. No gradient."""
    return _xxt(x_MNK) if _use_matmul_kernels(x_MNK) else xxt_ref(x_MNK)


# ------------------------------------------------------------------------------------------------------------
# 2. ba_plus_caa: B = alpha A A^T + beta A for symmetric A

# Traffic: 24 matrices of 768 x 768 bf16 read and written: 57 MB, 13 us; 21 of 36 blocks, 13 GFLOP: 16 us.
BA_TILE = Tile(128, 128, 64, 4, 8)


def ba_plus_caa_ref(a_MNN: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.baddbmm(a_MNN, a_MNN, a_MNN.mT, beta=beta, alpha=alpha)


@jit
def _ba_plus_caa_kernel(
    a_ptr,  # (M, N, N), last stride 1, symmetric
    c_ptr,  # (M, N, N) contiguous
    N,
    stride_m,
    stride_n,
    alpha,
    beta,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """As _xxt_kernel, with the block of A at the output's place added in float32 before rounding."""
    blocks_n = tl.cdiv(N, BN)
    m0 = tl.program_id(0) // blocks_n * BM
    n0 = tl.program_id(0) % blocks_n * BN
    if m0 + BM <= n0:
        return
    matrix = tl.program_id(1).to(tl.int64)
    a_ptr += matrix * stride_m
    c_ptr += matrix * N * N
    rows_in = tl.minimum(m0 + tl.arange(0, BM), N - 1)
    cols_in = tl.minimum(n0 + tl.arange(0, BN), N - 1)
    acc = _dot_rows(a_ptr, a_ptr, rows_in, cols_in, stride_n, stride_n, N, BM, BN, BK, EVEN_K)
    cols = n0 + tl.arange(0, BN)
    a = tl.load(a_ptr + rows_in[:, None] * stride_n + cols[None, :], mask=cols[None, :] < N, other=0.0)
    _store_symmetric(c_ptr, alpha * acc + beta * a.to(tl.float32), m0, n0, N, BM, BN)


@torch.library.custom_op("splits::ba_plus_caa", mutates_args=())
def _ba_plus_caa(a_MNN: Tensor, alpha: float, beta: float) -> Tensor:
    a_MNN = _rows_contiguous(a_MNN)
    m, n, _ = a_MNN.shape
    c_MNN = a_MNN.new_empty(m, n, n)
    grid = (_cdiv(n, BA_TILE.block_m) * _cdiv(n, BA_TILE.block_n), m)
    strides = a_MNN.stride(0), a_MNN.stride(1)
    _ba_plus_caa_kernel[grid](a_MNN, c_MNN, n, *strides, alpha, beta, **BA_TILE.launch(n))
    return c_MNN


@_ba_plus_caa.register_fake
def _(a_MNN, alpha, beta):
    return a_MNN.new_empty(a_MNN.shape)


def ba_plus_caa(a_MNN: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha * A A^T + beta * A of every symmetric A. Polar express: alpha = c, beta = b. No gradient."""
    if _use_matmul_kernels(a_MNN):
        return _ba_plus_caa(a_MNN, alpha, beta)
    return ba_plus_caa_ref(a_MNN, alpha, beta)


# ------------------------------------------------------------------------------------------------------------
# 3. linear_relu2: relu(x W1^T)^2 W2

# At N = 49,152, D = 768, F = 3072 a product is 232 GFLOP, 294 us. The first moves 382 MB, 89 us. Forward is 2
# such products, backward 4: 0.59 and 1.17 ms. Fusing the activation saves a write and a read of the (N, F)
# tensor, 604 MB or 140 us, in each direction. One (N, F) tensor is kept for backward: post = relu(pre)^2, and
# backward takes relu(pre) = sqrt(post) (pull request 322). It is the accurate choice as well as the small
# one: post is rounded once, to a relative error of 2^-9 in bf16, and the root halves that, so 2 sqrt(post) is
# closer than 2 relu(pre) from a stored bf16 pre would be. Keeping relu(pre) instead would cost a pass to
# square it for dW2. Tiles go along F first: W1 (4.7 MB) stays in the L2 cache and each row block of x is read
# from memory once.
RELU2_FORWARD_TILE = Tile(128, 256, 64, 3, 8)
RELU2_BACKWARD_TILE = Tile(128, 256, 64, 3, 8)


def linear_relu2_ref(x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor) -> Tensor:
    """The same by cuBLAS and, compiled, one fused elementwise kernel: also the arm to time against."""
    return F.relu(x_ND @ w1_FD.T).square() @ w2_FD


@jit
def _block_of_rows(
    a_ptr, w_ptr, N, F_, K, stride_a, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """This program's block of a w^T, its first row, its offsets from there in an (N, F) tensor, its mask."""
    blocks_f = tl.cdiv(F_, BN)
    first = (tl.program_id(0) // blocks_f * BM).to(tl.int64)  # offsets of whole tensors may exceed 2^31
    rows = tl.arange(0, BM)
    cols = tl.program_id(0) % blocks_f * BN + tl.arange(0, BN)
    rows_left = (N - first).to(tl.int32)
    rows_in = tl.minimum(rows, rows_left - 1)
    cols_in = tl.minimum(cols, F_ - 1)
    a_ptr += first * stride_a
    acc = _dot_rows(a_ptr, w_ptr, rows_in, cols_in, stride_a, stride_w, K, BM, BN, BK, EVEN_K)
    inside = (rows < rows_left)[:, None] & (cols < F_)[None, :]
    return acc, first, rows[:, None] * F_ + cols[None, :], inside


@jit
def _relu2_forward_kernel(
    x_ptr,  # (N, K), last stride 1
    w_ptr,  # (F, K), last stride 1
    post_ptr,  # (N, F) contiguous
    N, F_, K, stride_x, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """post = relu(x w^T)^2, the square of the float32 accumulator, rounded once."""
    acc, first, offsets, inside = _block_of_rows(
        x_ptr, w_ptr, N, F_, K, stride_x, stride_w, BM, BN, BK, EVEN_K
    )
    acc = tl.maximum(acc, 0.0)
    post_ptrs = post_ptr + first * F_ + offsets
    tl.store(post_ptrs, (acc * acc).to(post_ptr.dtype.element_ty), mask=inside)


@jit
def _relu2_backward_kernel(
    g_ptr,  # (N, K), last stride 1
    w_ptr,  # (F, K), last stride 1
    post_ptr,  # (N, F) contiguous
    dpre_ptr,  # (N, F) contiguous
    N, F_, K, stride_g, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """dpre = (g w^T) * 2 sqrt(post)."""
    acc, first, offsets, inside = _block_of_rows(
        g_ptr, w_ptr, N, F_, K, stride_g, stride_w, BM, BN, BK, EVEN_K
    )
    post = tl.load(post_ptr + first * F_ + offsets, mask=inside, other=0.0).to(tl.float32)
    dpre_ptrs = dpre_ptr + first * F_ + offsets
    tl.store(dpre_ptrs, (acc * 2.0 * tl.sqrt(post)).to(dpre_ptr.dtype.element_ty), mask=inside)


def _launch_relu2(kernel, tile: Tile, a_NK: Tensor, w_FK: Tensor, *tensors_NF: Tensor) -> None:
    (n, k), f = a_NK.shape, w_FK.shape[0]
    grid = (_cdiv(n, tile.block_m) * _cdiv(f, tile.block_n),)
    kernel[grid](a_NK, w_FK, *tensors_NF, n, f, k, a_NK.stride(0), w_FK.stride(0), **tile.launch(k))


@torch.library.custom_op("splits::linear_relu2", mutates_args=())
def _linear_relu2(x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor) -> tuple[Tensor, Tensor]:
    x_ND, w1_FD = _rows_contiguous(x_ND), _rows_contiguous(w1_FD)
    post_NF = x_ND.new_empty(x_ND.shape[0], w1_FD.shape[0])
    _launch_relu2(_relu2_forward_kernel, RELU2_FORWARD_TILE, x_ND, w1_FD, post_NF)
    return post_NF @ w2_FD, post_NF


@_linear_relu2.register_fake
def _(x_ND, w1_FD, w2_FD):
    n = x_ND.shape[0]
    return x_ND.new_empty(n, w2_FD.shape[1]), x_ND.new_empty(n, w1_FD.shape[0])


@torch.library.custom_op("splits::linear_relu2_backward", mutates_args=())
def _linear_relu2_backward(
    g_ND: Tensor, x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor, post_NF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    g_ND, w2_FD = _rows_contiguous(g_ND), _rows_contiguous(w2_FD)
    dpre_NF = torch.empty_like(post_NF)
    _launch_relu2(_relu2_backward_kernel, RELU2_BACKWARD_TILE, g_ND, w2_FD, post_NF, dpre_NF)
    return dpre_NF @ w1_FD, dpre_NF.T @ x_ND, post_NF.T @ g_ND


@_linear_relu2_backward.register_fake
def _(g_ND, x_ND, w1_FD, w2_FD, post_NF):
    return tuple(t.new_empty(t.shape) for t in (x_ND, w1_FD, w2_FD))


def _linear_relu2_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _linear_relu2_autograd(ctx, g_ND, _):
    return _linear_relu2_backward(g_ND, *ctx.saved_tensors)


_linear_relu2.register_autograd(_linear_relu2_autograd, setup_context=_linear_relu2_setup)


def linear_relu2(x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor) -> Tensor:
    """relu(x W1^T)^2 W2, differentiable in all three; keeps one (N, F) tensor for backward.

    Source: Primer, arXiv 2109.08668. `linear_relu2_ref` is the unfused version, to time against.
    """
    if _use_matmul_kernels(x_ND):
        return _linear_relu2(x_ND, w1_FD, w2_FD)[0]
    return linear_relu2_ref(x_ND, w1_FD, w2_FD)


# ------------------------------------------------------------------------------------------------------------
# 4. softcapped_cross_entropy: several next tokens a row, no float32 copy of the logits

# Traffic at N = 49,152, V = 50,304, bf16: forward reads 4.9 GB, 1.15 ms; backward reads and writes, 2.3 ms.
# Each element costs three special-function operations (exp, reciprocal, exp), 16 a clock and SM: 2.0 ms a
# pass, which is what bounds forward.
CE_FORWARD_BLOCK, CE_FORWARD_WARPS = 1024, 2  # record 67, pull request 207
CE_BACKWARD_BLOCK, CE_BACKWARD_WARPS = 1024, 4  # record 75, pull request 235

SOFTCAP_A = 23.0  # capped logit z = A * sigmoid((l + B) / C), in (0, A)
SOFTCAP_B = 5.0
SOFTCAP_C = 7.5
NUM_TARGETS = 3  # K: schedules set weights to zero, never change the count, so nothing recompiles


def softcap(logits: Tensor) -> Tensor:
    """A * sigmoid((l + B) / C), in float32 (float64 stays)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return SOFTCAP_A * torch.sigmoid((wide + SOFTCAP_B) / SOFTCAP_C)


def softcapped_cross_entropy_ref(
    logits_NV: Tensor, targets_N: Tensor, weights_K: Tensor, slot_len: int
) -> Tensor:
    z_NV = softcap(logits_NV)
    lse_N = z_NV.logsumexp(dim=-1)
    num_rows = targets_N.shape[0]
    rows_N = torch.arange(num_rows, device=targets_N.device)
    loss_N = torch.zeros_like(lse_N)
    for k in range(NUM_TARGETS):
        counted_N = (rows_N % slot_len + k < slot_len) & (rows_N + k < num_rows)
        target_N = targets_N[(rows_N + k).clamp(max=num_rows - 1)].long()
        nll_N = lse_N - z_NV.gather(1, target_N[:, None]).squeeze(1)
        loss_N = loss_N + torch.where(counted_N, weights_K[k] * nll_N, 0.0)
    return loss_N


@jit
def _sigmoid(logit, B: tl.constexpr, INV_C: tl.constexpr):
    return 1.0 / (1.0 + tl.exp(-(logit.to(tl.float32) + B) * INV_C))


@jit
def _target(targets_ptr, weights_ptr, row, num_rows, slot_len, K: tl.constexpr):
    """Term K of a row: (target, weight), the weight 0 where the slot ends before the target."""
    counted = (row % slot_len + K < slot_len) & (row + K < num_rows)
    weight = tl.where(counted, tl.load(weights_ptr + K).to(tl.float32), 0.0)
    return tl.load(targets_ptr + row + K, mask=weight != 0.0, other=0), weight


@jit
def _ce_forward_kernel(
    logits_ptr,  # (N, V), last stride 1
    targets_ptr,
    weights_ptr,
    loss_ptr,  # (N,) float32
    lse_ptr,  # (N,) float32
    num_rows,
    num_cols,
    stride,
    slot_len,
    A: tl.constexpr,
    B: tl.constexpr,
    INV_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. z lies in (0, A): exp(z - A) neither overflows nor vanishes, no running maximum is needed."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride  # N * V exceeds 2^31
    cols = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, num_cols, BLOCK):
        inside = cols < num_cols - start
        logit = tl.load(logits_ptr + start + cols, mask=inside, other=0.0)
        total += tl.where(inside, tl.exp(A * _sigmoid(logit, B, INV_C) - A), 0.0)
    lse = A + tl.log(tl.sum(total, axis=0))
    t0, w0 = _target(targets_ptr, weights_ptr, row, num_rows, slot_len, 0)
    t1, w1 = _target(targets_ptr, weights_ptr, row, num_rows, slot_len, 1)
    t2, w2 = _target(targets_ptr, weights_ptr, row, num_rows, slot_len, 2)
    loss = w0 * (lse - A * _sigmoid(tl.load(logits_ptr + t0), B, INV_C))
    loss += w1 * (lse - A * _sigmoid(tl.load(logits_ptr + t1), B, INV_C))
    loss += w2 * (lse - A * _sigmoid(tl.load(logits_ptr + t2), B, INV_C))
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


@jit
def _ce_backward_kernel(
    grad_ptr,  # (N,) float32, of the losses
    lse_ptr,
    logits_ptr,  # (N, V), last stride 1
    targets_ptr,
    weights_ptr,
    dlogits_ptr,  # (N, V) contiguous
    num_rows,
    num_cols,
    stride,
    slot_len,
    A: tl.constexpr,
    B: tl.constexpr,
    INV_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dl_j = g A/C s_j (1 - s_j) (p_j sum_k w_k - sum_k w_k [j == t_k]); s the sigmoid, p softmax of z."""
    row = tl.program_id(0)
    wide_row = row.to(tl.int64)
    logits_ptr += wide_row * stride
    dlogits_ptr += wide_row * num_cols
    lse = tl.load(lse_ptr + row)
    factor = tl.load(grad_ptr + row) * (A * INV_C)
    t0, w0 = _target(targets_ptr, weights_ptr, row, num_rows, slot_len, 0)
    t1, w1 = _target(targets_ptr, weights_ptr, row, num_rows, slot_len, 1)
    t2, w2 = _target(targets_ptr, weights_ptr, row, num_rows, slot_len, 2)
    w_all = w0 + w1 + w2
    cols = tl.arange(0, BLOCK)
    for start in range(0, num_cols, BLOCK):
        col = start + cols
        inside = col < num_cols
        s = _sigmoid(tl.load(logits_ptr + col, mask=inside, other=0.0), B, INV_C)
        dz = w_all * tl.exp(A * s - lse)
        dz -= tl.where(col == t0, w0, 0.0) + tl.where(col == t1, w1, 0.0) + tl.where(col == t2, w2, 0.0)
        dlogit = factor * s * (1.0 - s) * dz
        tl.store(dlogits_ptr + col, dlogit.to(dlogits_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------------
# 5. softcapped_cross_entropy: launchers and op


def _ce_constants(block: int, warps: int) -> dict[str, float | int]:
    return {"A": SOFTCAP_A, "B": SOFTCAP_B, "INV_C": 1.0 / SOFTCAP_C, "BLOCK": block, "num_warps": warps}


@torch.library.custom_op("splits::softcapped_cross_entropy", mutates_args=())
def _ce(logits_NV: Tensor, targets_N: Tensor, weights_K: Tensor, slot_len: int) -> tuple[Tensor, Tensor]:
    logits_NV, targets_N = _rows_contiguous(logits_NV), targets_N.contiguous()
    (n, v), stride = logits_NV.shape, logits_NV.stride(0)
    loss_N, lse_N = (torch.empty(n, dtype=torch.float32, device=logits_NV.device) for _ in range(2))
    constants = _ce_constants(CE_FORWARD_BLOCK, CE_FORWARD_WARPS)
    _ce_forward_kernel[(n,)](
        logits_NV, targets_N, weights_K, loss_N, lse_N, n, v, stride, slot_len, **constants
    )
    return loss_N, lse_N


@_ce.register_fake
def _(logits_NV, targets_N, weights_K, slot_len):
    n = logits_NV.shape[0]
    return logits_NV.new_empty(n, dtype=torch.float32), logits_NV.new_empty(n, dtype=torch.float32)


def _launch_ce_backward(
    grad_N, lse_N, logits_NV, targets_N, weights_K, slot_len: int, out_NV: Tensor
) -> None:
    """Write the logits' gradient in the dtype of `out_NV`, which is contiguous."""
    tensors = grad_N.contiguous(), lse_N, logits_NV, targets_N.contiguous(), weights_K, out_NV
    (n, v), stride = logits_NV.shape, logits_NV.stride(0)
    constants = _ce_constants(CE_BACKWARD_BLOCK, CE_BACKWARD_WARPS)
    _ce_backward_kernel[(n,)](*tensors, n, v, stride, slot_len, **constants)


@torch.library.custom_op("splits::softcapped_cross_entropy_backward", mutates_args=())
def _ce_backward(
    grad_N: Tensor, lse_N: Tensor, logits_NV: Tensor, targets_N: Tensor, weights_K: Tensor, slot_len: int
) -> Tensor:
    logits_NV = _rows_contiguous(logits_NV)
    dlogits_NV = logits_NV.new_empty(logits_NV.shape)
    _launch_ce_backward(grad_N, lse_N, logits_NV, targets_N, weights_K, slot_len, dlogits_NV)
    return dlogits_NV


@_ce_backward.register_fake
def _(grad_N, lse_N, logits_NV, targets_N, weights_K, slot_len):
    return logits_NV.new_empty(logits_NV.shape)


def _ce_setup(ctx, inputs, output):
    *tensors, ctx.slot_len = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _ce_autograd(ctx, grad_N, _):
    return _ce_backward(grad_N, *ctx.saved_tensors, ctx.slot_len), None, None, None


_ce.register_autograd(_ce_autograd, setup_context=_ce_setup)


def softcapped_cross_entropy(
    logits_NV: Tensor,  # any float dtype
    targets_N: Tensor,  # int64 or int32: the token that follows each row's token
    weights_K: Tensor,  # float32, NUM_TARGETS of them, on the device of the logits; a zero term costs nothing
    slot_len: int,  # rows of a slot; no target is taken from beyond the end of the row's slot
) -> Tensor:
    """loss_r = sum_k w_k (logsumexp(z_r) - z_r[targets_{r+k}]), float32, one a row; gradient for the logits.

    Source: modded-nanogpt pull requests 200 (softcap and multi-token prediction), 207 and 217 (kernel).
    """
    if _use_kernels(logits_NV):
        return _ce(logits_NV, targets_N, weights_K, slot_len)[0]
    return softcapped_cross_entropy_ref(logits_NV, targets_N, weights_K, slot_len)


def softcapped_nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target) of each row, float32, no gradient: the evaluation's loss."""
    with torch.no_grad():
        weights_K = (torch.arange(NUM_TARGETS, device=logits_NV.device) == 0).float()
        return softcapped_cross_entropy(logits_NV, targets_N, weights_K, targets_N.shape[0])


# ------------------------------------------------------------------------------------------------------------
# 6. quantize: FP8 of x / scale in both layouts

# Traffic for the logits' gradient at N = 49,152, V = 50,304: bf16 read 4.9 GB, written in both layouts 2 x
# 2.5 GB: 2.3 ms in one pass (three eager passes and a transpose: 6 ms). The second layout is there because an
# FP8 matmul takes both operands along the inner dimension only.
QUANTIZE_TILE = (64, 128)  # rows, columns; record 76, pull request 240
QUANTIZE_WARPS = 8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2  # 3 mantissa bits, max 448; 2 mantissa bits, max 57344


def quantize_ref(x_NC: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    limit = torch.finfo(dtype).max
    x8_NC = (x_NC.float() * (1.0 / scale)).clamp(-limit, limit).to(dtype)
    return x8_NC, x8_NC.T.contiguous()


@jit
def _quantize_kernel(
    x_ptr,  # (N, C), last stride 1
    row_ptr,  # (N, C) contiguous, FP8
    col_ptr,  # (C, N) contiguous, the same values as bytes
    num_rows,
    num_cols,
    stride,
    inv_scale,
    LIMIT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """x / scale rounded once to FP8, written in both layouts; saturates, and keeps NaN."""
    blocks_c = tl.cdiv(num_cols, BC)
    rows = (tl.program_id(0) // blocks_c).to(tl.int64) * BN + tl.arange(0, BN)  # N * V exceeds 2^31
    cols = tl.program_id(0) % blocks_c * BC + tl.arange(0, BC)
    row_ok = rows < num_rows
    col_ok = cols < num_cols
    inside = row_ok[:, None] & col_ok[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    x *= inv_scale
    x = tl.where(x > LIMIT, LIMIT, x)
    x = tl.where(x < -LIMIT, -LIMIT, x)
    x8 = x.to(row_ptr.dtype.element_ty)
    tl.store(row_ptr + rows[:, None] * num_cols + cols[None, :], x8, mask=inside)
    wide_cols = cols.to(tl.int64)
    col_ptrs = col_ptr + wide_cols[:, None] * num_rows + rows[None, :]
    bytes_CN = tl.trans(x8.to(tl.int8, bitcast=True))
    tl.store(col_ptrs, bytes_CN, mask=col_ok[:, None] & row_ok[None, :])


def _quantize(x_NC: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x8_NC, x8_CN): FP8 of x / scale in both layouts."""
    if not _use_kernels(x_NC):
        return quantize_ref(x_NC, scale, dtype)
    x_NC, (block_n, block_c) = _rows_contiguous(x_NC), QUANTIZE_TILE
    (n, c), stride = x_NC.shape, x_NC.stride(0)
    x8_NC = torch.empty(n, c, dtype=dtype, device=x_NC.device)
    x8_CN = torch.empty(c, n, dtype=dtype, device=x_NC.device)
    grid = (_cdiv(n, block_n) * _cdiv(c, block_c),)
    constants = {"LIMIT": torch.finfo(dtype).max, "BN": block_n, "BC": block_c, "num_warps": QUANTIZE_WARPS}
    _quantize_kernel[grid](x_NC, x8_NC, x8_CN.view(torch.int8), n, c, stride, 1.0 / scale, **constants)
    return x8_NC, x8_CN


# ------------------------------------------------------------------------------------------------------------
# 7. fp8_linear_t: the head's three matmuls in 8 bits, weight stored transposed

# Work at N = 49,152, D = 768, V = 50,304: 3 products of 3.8 TFLOP, 2.4 ms each at twice the bf16 rate, 4.8 ms
# at the bf16 rate. Traffic besides the quantization above: the bf16 logits are written, 4.9 GB, 1.15 ms.


@functools.cache
def fp8_available(device: torch.device | str) -> tuple[bool, str]:
    """Whether the device multiplies FP8 matrices, and if not the reason."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return False, f"FP8 matmul needs an NVIDIA GPU, the device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return False, f"FP8 matmul needs compute capability 8.9, the device has {major}.{minor}"
    return True, ""


def _matmul_fp8(a8: Tensor, b8_t: Tensor, scale_a: float, scale_b: float, dtype: torch.dtype, is_fast: bool):
    """a8 @ b8_t.T times both scales; both operands row-major. Emulated in float32 on a CPU."""
    if not a8.is_cuda:
        return ((a8.float() @ b8_t.float().T) * (scale_a * scale_b)).to(dtype)
    is_available, reason = fp8_available(a8.device)
    if not is_available:
        raise ValueError(f"fp8_linear_t: {reason}; use the bf16 head")
    # cuBLAS 13 wants each scale at a 16-byte aligned address: its own allocation has one, a slice need not.
    scales = (torch.full((), s, dtype=torch.float32, device=a8.device) for s in (scale_a, scale_b))
    return torch._scaled_mm(a8, b8_t.T, *scales, out_dtype=dtype, use_fast_accum=is_fast)


@torch.library.custom_op("splits::fp8_linear_t", mutates_args=())
def _fp8_linear_t(
    x_ND: Tensor, w_DV: Tensor, x_scale: float, w_scale: float, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    x8_ND, x8_DN = _quantize(x_ND, x_scale, E4M3)
    w8_DV, w8_VD = _quantize(w_DV, w_scale, E4M3)
    return _matmul_fp8(x8_ND, w8_VD, x_scale, w_scale, x_ND.dtype, is_fast=True), x8_DN, w8_DV


@_fp8_linear_t.register_fake
def _(x_ND, w_DV, x_scale, w_scale, grad_scale):
    (n, d), v = x_ND.shape, w_DV.shape[1]
    return x_ND.new_empty(n, v), x_ND.new_empty(d, n, dtype=E4M3), w_DV.new_empty(d, v, dtype=E4M3)


@torch.library.custom_op("splits::fp8_linear_t_backward", mutates_args=())
def _fp8_linear_t_backward(
    g_NV: Tensor, x8_DN: Tensor, w8_DV: Tensor, x_scale: float, w_scale: float, grad_scale: float
) -> tuple[Tensor, Tensor]:
    g8_NV, g8_VN = _quantize(g_NV, grad_scale, E5M2)
    dx_ND = _matmul_fp8(g8_NV, w8_DV, grad_scale, w_scale, g_NV.dtype, is_fast=False)
    return dx_ND, _matmul_fp8(x8_DN, g8_VN, x_scale, grad_scale, torch.float32, is_fast=False)


@_fp8_linear_t_backward.register_fake
def _(g_NV, x8_DN, w8_DV, x_scale, w_scale, grad_scale):
    (d, n), v = x8_DN.shape, w8_DV.shape[1]
    return g_NV.new_empty(n, d), g_NV.new_empty(d, v, dtype=torch.float32)


def _fp8_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.w_dtype, ctx.scales = inputs[1].dtype, inputs[2:]
    ctx.set_materialize_grads(False)


def _fp8_autograd(ctx, g_NV, *_):
    dx_ND, dw_DV = _fp8_linear_t_backward(g_NV, *ctx.saved_tensors, *ctx.scales)
    return dx_ND, dw_DV.to(ctx.w_dtype), None, None, None


_fp8_linear_t.register_autograd(_fp8_autograd, setup_context=_fp8_setup)


def fp8_linear_t(
    x_ND: Tensor,  # |x| <= 448 x_scale, larger values saturate; N, D and V multiples of 16 on a GPU
    w_DV: Tensor,  # stored transposed; |w| <= 448 w_scale
    x_scale: float,
    w_scale: float,
    grad_scale: float,  # of the gradient of the output: |g| <= 57344 grad_scale
) -> Tensor:
    """x W with both operands rounded to e4m3 and, in backward, the gradient to e5m2; in the dtype of x.

    The weight's gradient is computed in float32, then cast to the weight's dtype. On a CPU the same rounding
    is emulated (`quantize_ref`, products in float32). A GPU without FP8 raises ValueError.
    """
    return _fp8_linear_t(x_ND, w_DV, x_scale, w_scale, grad_scale)[0]


# ------------------------------------------------------------------------------------------------------------
# 8. transpose_add, transpose_copy: between the head (D, V) and the embedding (V, D)

# Traffic at D = 768, V = 50,304, bf16: add reads 155 MB and writes 77 MB, 54 us; copy 155 MB, 36 us. Both
# sides of a tile are whole 128-byte lines. Eager kernels hold every SM for longer and starve NCCL (pull
# request 233).
TRANSPOSE_BYTES, TRANSPOSE_WARPS = 128, 4


def transpose_add_ref(a_DV: Tensor, b_VD: Tensor) -> None:
    a_DV.add_(b_VD.T)


def transpose_copy_ref(dst_VD: Tensor, src_DV: Tensor) -> None:
    dst_VD.copy_(src_DV.T)


@jit
def _transpose_kernel(
    dst_ptr,  # (R, C), last stride 1
    src_ptr,  # (C, R), last stride 1
    num_rows,
    num_cols,
    stride_dst,
    stride_src,
    IS_ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dst = src^T, or dst += src^T with one rounding."""
    blocks_c = tl.cdiv(num_cols, BLOCK)
    rows = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cols = (tl.program_id(0) % blocks_c).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_ok = rows < num_rows
    col_ok = cols < num_cols
    src_inside = col_ok[:, None] & row_ok[None, :]
    inside = row_ok[:, None] & col_ok[None, :]
    tile = tl.trans(tl.load(src_ptr + cols[:, None] * stride_src + rows[None, :], mask=src_inside, other=0.0))
    dst_ptrs = dst_ptr + rows[:, None] * stride_dst + cols[None, :]
    if IS_ADD:
        tile = tile.to(tl.float32) + tl.load(dst_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(dst_ptrs, tile.to(dst_ptr.dtype.element_ty), mask=inside)


def _launch_transpose(dst: Tensor, src: Tensor, is_add: bool) -> None:
    rows, cols = dst.shape
    assert src.shape == (cols, rows), f"the transpose of {tuple(src.shape)} is not {tuple(dst.shape)}"
    assert dst.stride(1) == 1, "the destination is written in place, so its rows must be contiguous"
    src = _rows_contiguous(src)
    block = TRANSPOSE_BYTES // dst.element_size()
    grid = (_cdiv(rows, block) * _cdiv(cols, block),)
    constants = {"IS_ADD": is_add, "BLOCK": block, "num_warps": TRANSPOSE_WARPS}
    _transpose_kernel[grid](dst, src, rows, cols, dst.stride(0), src.stride(0), **constants)


@torch.library.custom_op("splits::transpose_add", mutates_args=("a_DV",))
def _transpose_add(a_DV: Tensor, b_VD: Tensor) -> None:
    _launch_transpose(a_DV, b_VD, is_add=True)


@torch.library.custom_op("splits::transpose_copy", mutates_args=("dst_VD",))
def _transpose_copy(dst_VD: Tensor, src_DV: Tensor) -> None:
    _launch_transpose(dst_VD, src_DV, is_add=False)


def transpose_add(a_DV: Tensor, b_VD: Tensor) -> None:
    """a += b^T in place."""
    (_transpose_add if _use_kernels(a_DV) else transpose_add_ref)(a_DV, b_VD)


def transpose_copy(dst_VD: Tensor, src_DV: Tensor) -> None:
    """dst = src^T in place."""
    (_transpose_copy if _use_kernels(dst_VD) else transpose_copy_ref)(dst_VD, src_DV)


# ------------------------------------------------------------------------------------------------------------
# 9. fp8_head_loss: the FP8 head and its loss as one op, the logits' gradient never in bf16

# Traffic of backward before the products at N = 49,152, V = 50,304: logits read 4.9 GB, the e5m2 gradient
# written, read and written transposed 3 x 2.5 GB: 2.9 ms. Apart, families 4 and 6 move 19.8 GB: 4.6 ms.
# Source: pull request 207.


@torch.library.custom_op("splits::fp8_head_loss", mutates_args=())
def _fp8_head_loss(
    x_ND: Tensor, w_DV: Tensor, targets_N: Tensor, weights_K: Tensor, slot_len: int,
    x_scale: float, w_scale: float, grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    logits_NV, x8_DN, w8_DV = _fp8_linear_t(x_ND, w_DV, x_scale, w_scale, grad_scale)
    loss_N, lse_N = _ce(logits_NV, targets_N, weights_K, slot_len)
    return loss_N, lse_N, logits_NV, x8_DN, w8_DV


@_fp8_head_loss.register_fake
def _(x_ND, w_DV, targets_N, weights_K, slot_len, x_scale, w_scale, grad_scale):
    (n, d), v = x_ND.shape, w_DV.shape[1]
    loss_N, lse_N = (x_ND.new_empty(n, dtype=torch.float32) for _ in range(2))
    x8_DN, w8_DV = x_ND.new_empty(d, n, dtype=E4M3), w_DV.new_empty(d, v, dtype=E4M3)
    return loss_N, lse_N, x_ND.new_empty(n, v), x8_DN, w8_DV


@torch.library.custom_op("splits::fp8_head_loss_backward", mutates_args=())
def _fp8_head_loss_backward(
    grad_N: Tensor, lse_N: Tensor, logits_NV: Tensor, x8_DN: Tensor, w8_DV: Tensor, targets_N: Tensor,
    weights_K: Tensor, slot_len: int, x_scale: float, w_scale: float, grad_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    g8_NV = torch.empty_like(logits_NV, dtype=E5M2)
    _launch_ce_backward(grad_N * (1.0 / grad_scale), lse_N, logits_NV, targets_N, weights_K, slot_len, g8_NV)
    g8_VN = g8_NV.new_empty(g8_NV.shape[1], g8_NV.shape[0])
    _launch_transpose(g8_VN.view(torch.int8), g8_NV.view(torch.int8), is_add=False)
    dx_ND = _matmul_fp8(g8_NV, w8_DV, grad_scale, w_scale, logits_NV.dtype, is_fast=False)
    return dx_ND, _matmul_fp8(x8_DN, g8_VN, x_scale, grad_scale, torch.float32, is_fast=False)


@_fp8_head_loss_backward.register_fake
def _(grad_N, lse_N, logits_NV, x8_DN, w8_DV, *_):
    (d, n), v = x8_DN.shape, w8_DV.shape[1]
    return logits_NV.new_empty(n, d), logits_NV.new_empty(d, v, dtype=torch.float32)


def _fp8_head_loss_setup(ctx, inputs, output):
    _, w_DV, targets_N, weights_K, ctx.slot_len, *ctx.scales = inputs
    ctx.save_for_backward(*output[1:], targets_N, weights_K)
    ctx.w_dtype = w_DV.dtype
    ctx.set_materialize_grads(False)


def _fp8_head_loss_autograd(ctx, grad_N, *_):
    dx_ND, dw_DV = _fp8_head_loss_backward(grad_N, *ctx.saved_tensors, ctx.slot_len, *ctx.scales)
    return dx_ND, dw_DV.to(ctx.w_dtype), *(None,) * 6


_fp8_head_loss.register_autograd(_fp8_head_loss_autograd, setup_context=_fp8_head_loss_setup)


def fp8_head_loss(
    x_ND: Tensor, w_DV: Tensor, targets_N: Tensor, weights_K: Tensor, slot_len: int,
    x_scale: float, w_scale: float, grad_scale: float,
) -> Tensor:  # fmt: skip
    """softcapped_cross_entropy(fp8_linear_t(x, w)), arguments as there: the same loss, and a gradient rounded
    once, to e5m2, instead of to bf16 first. On a CPU it is that composition."""
    if not _use_kernels(x_ND):
        logits_NV = fp8_linear_t(x_ND, w_DV, x_scale, w_scale, grad_scale)
        return softcapped_cross_entropy(logits_NV, targets_N, weights_K, slot_len)
    return _fp8_head_loss(x_ND, w_DV, targets_N, weights_K, slot_len, x_scale, w_scale, grad_scale)[0]


# ------------------------------------------------------------------------------------------------------------
# 10. attention: causal, inside documents, at most `window` positions back


def _with_previous(x_BCQ: Tensor, fill: float) -> Tensor:
    """Blocks (B, C, Q, ...) -> (B, C, 2Q, ...): each behind the block before it, the first behind `fill`."""
    before_BCQ = torch.cat([torch.full_like(x_BCQ[:, :1], fill), x_BCQ[:, :-1]], dim=1)
    return torch.cat([before_BCQ, x_BCQ], dim=2)


def attention_ref(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    cu_seqlens: Tensor,
    window: Tensor,
    scale: Tensor,
    max_window: int,
) -> Tensor:
    """Plain masked attention; blocks of max(128, max_window) queries see their own and the previous block.

    Memory is 2 * block bytes of mask a token. q * scale is rounded to the dtype of q before the product; the
    fused kernels scale float32 scores: up to 2^-9 of relative difference in bf16, none for powers of two.
    """
    slots, tokens, heads, head_dim = q_BTHK.shape
    positions_N = torch.arange(slots * tokens, device=q_BTHK.device, dtype=cu_seqlens.dtype)
    docs_BT = torch.bucketize(positions_N, cu_seqlens[1:], right=True).view(slots, tokens)
    block = min(max(128, max_window), tokens)
    blocks = -(-tokens // block)
    pad = blocks * block - tokens

    def split(x_BT: Tensor, fill: float) -> Tensor:
        widths = (0, 0) * (x_BT.ndim - 2) + (0, pad)
        return F.pad(x_BT, widths, value=fill).unflatten(1, (blocks, block))

    q_BCQ, k_BCS, v_BCS = (split(x, 0.0) for x in (q_BTHK * scale, k_BTHK, v_BTHK))
    docs_BCQ = docs_BCS = split(docs_BT, -1)
    if blocks > 1:
        k_BCS, v_BCS, docs_BCS = (
            _with_previous(k_BCS, 0.0),
            _with_previous(v_BCS, 0.0),
            _with_previous(docs_BCS, -2),
        )
    span = k_BCS.shape[2]
    offsets = torch.arange(span, device=q_BTHK.device)
    lag_QS = offsets[span - block :, None] - offsets
    near_QS = (lag_QS >= 0) & (lag_QS <= window)
    mask_BCQS = near_QS & (docs_BCQ[..., :, None] == docs_BCS[..., None, :])
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q_BCQ, k_BCS, v_BCS))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BCQS.flatten(0, 1)[:, None], scale=1.0)
    return y.transpose(1, 2).reshape(slots, blocks * block, heads, head_dim)[:, :tokens]


# ------------------------------------------------------------------------------------------------------------
# 11. attention on GPUs: FlashAttention-4 and -2 as opaque ops

# Traffic: q, k, v, y of (N, 6, 128) bf16 are 1.5 KB a token each. At 49,152 tokens: 302 MB forward, 70 us;
# backward reads q, k, v, y, dy and writes dq, dk, dv: 604 MB, 140 us. Work forward: 4 * 6 * 128 FLOP for each
# query and key in reach, at most 0.21 TFLOP or 270 us with window 1408; backward 2.5 times that. H200,
# T=49152, w=1408, 77 documents: fa4 295 us, varlen 482 us forward; 977 and 1,657 us with backward, n=20.


@functools.cache
def _fa4():
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


# The window and the scale are read inside the ops, from 0-D CPU tensors: no synchronisation, no
# recompilation. Outputs are made contiguous so that they agree with the fakes for any strides of q; no known
# case copies.


def _varlen_forward(q_NHK, k_NHK, v_NHK, cu_seqlens, max_seqlen: int, window: int, scale: float):
    return torch.ops.aten._flash_attention_forward(
        q_NHK, k_NHK, v_NHK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, False,
        scale=scale, window_size_left=window, window_size_right=0,
    )[:2]  # fmt: skip


def _varlen_backward(dy, q, k, v, y, lse, cu_seqlens, max_seqlen: int, window: int, scale: float):
    # Dropout is off, so the two random-state arguments are never read.
    states = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dy, q, k, v, y, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, *states,
        scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip


def _fa4_options(cu_seqlens, max_seqlen: int, window: int, scale: float) -> dict:
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    bounds = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
    reach = {"causal": True, "window_size_left": window, "window_size_right": 0}
    return {"softmax_scale": scale, **lengths, **bounds, **reach}


def _fa4_forward(q_NHK, k_NHK, v_NHK, *arguments):
    qkv = (x.detach() for x in (q_NHK, k_NHK, v_NHK))  # DLPack refuses tensors that require gradients
    return _fa4()[0](*qkv, return_lse=True, **_fa4_options(*arguments))[:2]


def _fa4_backward(dy_NHK, q_NHK, k_NHK, v_NHK, y_NHK, lse_HN, *arguments):
    tensors = (x.detach() for x in (q_NHK, k_NHK, v_NHK, y_NHK, dy_NHK, lse_HN))
    return _fa4()[1](*tensors, **_fa4_options(*arguments))[:3]


def _register_attention(name: str, forward: Callable, backward: Callable) -> Callable:
    """A custom op with fake and autograd: (q, k, v, cu_seqlens, max_seqlen, window, scale) -> (y, lse)."""

    @torch.library.custom_op(f"splits::attention_{name}", mutates_args=())
    def op(
        q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, cu_seqlens: Tensor, max_seqlen: int,
        window: Tensor, scale: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y_NHK, lse_HN = forward(q_NHK, k_NHK, v_NHK, cu_seqlens, max_seqlen, int(window), float(scale))
        return y_NHK.contiguous(), lse_HN.contiguous()

    @torch.library.custom_op(f"splits::attention_{name}_backward", mutates_args=())
    def backward_op(
        dy_NHK: Tensor, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, y_NHK: Tensor, lse_HN: Tensor,
        cu_seqlens: Tensor, max_seqlen: int, window: Tensor, scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        saved = q_NHK, k_NHK, v_NHK, y_NHK, lse_HN, cu_seqlens
        grads = backward(dy_NHK.contiguous(), *saved, max_seqlen, int(window), float(scale))
        dq_NHK, dk_NHK, dv_NHK = (grad.contiguous() for grad in grads)
        return dq_NHK, dk_NHK, dv_NHK

    @op.register_fake
    def _(q_NHK, k_NHK, v_NHK, cu_seqlens, max_seqlen, window, scale):
        rows, heads, _ = q_NHK.shape
        return q_NHK.new_empty(q_NHK.shape), q_NHK.new_empty(heads, rows, dtype=torch.float32)

    @backward_op.register_fake
    def _(dy_NHK, q_NHK, k_NHK, v_NHK, *_):
        return tuple(x.new_empty(x.shape) for x in (q_NHK, k_NHK, v_NHK))

    def setup(ctx, inputs, output):
        q_NHK, k_NHK, v_NHK, cu_seqlens, ctx.max_seqlen, window, scale = inputs
        ctx.save_for_backward(q_NHK, k_NHK, v_NHK, *output, cu_seqlens, window, scale)
        ctx.set_materialize_grads(False)

    def autograd(ctx, dy_NHK, _):
        *saved, window, scale = ctx.saved_tensors
        return *backward_op(dy_NHK, *saved, ctx.max_seqlen, window, scale), None, None, None, None

    op.register_autograd(autograd, setup_context=setup)
    return op


_varlen = _register_attention("varlen", _varlen_forward, _varlen_backward)
_attention_fa4 = _register_attention("fa4", _fa4_forward, _fa4_backward)


# ------------------------------------------------------------------------------------------------------------
# 12. attention: the choice of a backend

ATTENTION_BACKENDS = ("fa4", "varlen", "reference")  # in the order of preference


@functools.cache
def _backend_problem(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot run on the device with the dtype; empty if it can."""
    if backend == "reference":
        return ""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"needs an NVIDIA GPU, the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, the dtype is {str(dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(device)
    if backend == "varlen":
        if major < 8:
            return f"needs compute capability 8.0, the device has {major}.{minor}"
        return "" if torch.backends.cuda.is_flash_attention_available() else "PyTorch was built without it"
    if major < 9:
        return f"needs compute capability 9.0, the device has {major}.{minor}"
    try:
        _fa4()
    except ModuleNotFoundError as error:
        return f"package flash-attn-4 is not installed (no module {error.name})"
    except Exception as error:  # a compiler stack is behind this import: any failure means "not this backend"
        return f"import of flash_attn.cute failed: {type(error).__name__}: {error}".split("\n")[0]
    return ""


def attention_backends(device: torch.device | str, dtype: torch.dtype) -> list[tuple[str, bool, str]]:
    """(name, usable, reason why not) of each backend, in the order of preference."""
    problems = [(name, _backend_problem(name, torch.device(device), dtype)) for name in ATTENTION_BACKENDS]
    return [(name, not problem, problem) for name, problem in problems]


def _refuse_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    rows = attention_backends(device, dtype)
    usable = ", ".join(name for name, is_usable, _ in rows if is_usable)
    reason = dict((name, problem) for name, _, problem in rows).get(backend, "there is none of that name")
    raise ValueError(f"attention backend {backend!r}: {reason}; usable here: {usable}")


def attention(
    q_BTHK: Tensor,  # B slots of T tokens
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    cu_seqlens: Tensor,  # int32 (documents + 1,), starts in the B * T tokens; ends padded with B * T;
    #                      every slot starts a document
    max_seqlen: int,  # tokens, no document is longer
    window: Tensor,  # 0-D CPU int64, tokens: a query sees itself and this many positions before it
    scale: Tensor,  # 0-D CPU float32, of the scores
    max_window: int,  # upper bound on the window, sizes the blocks of the reference
    backend: str,  # one of ATTENTION_BACKENDS
) -> Tensor:
    """softmax(scale q k^T) v over the keys of the same document that lie 0 to `window` positions back.

    New values of window and scale never recompile. Do not change them in place: backward reads the same ones.
    """
    if not torch.compiler.is_compiling():
        if backend not in ATTENTION_BACKENDS or _backend_problem(backend, q_BTHK.device, q_BTHK.dtype):
            _refuse_backend(backend, q_BTHK.device, q_BTHK.dtype)
        if backend == "reference" and int(window) > max_window:
            raise ValueError(f"window {int(window)} is over max_window {max_window}: raise max_window")
    if backend == "reference":
        return attention_ref(q_BTHK, k_BTHK, v_BTHK, cu_seqlens, window, scale, max_window)
    op = _attention_fa4 if backend == "fa4" else _varlen
    q_NHK, k_NHK, v_NHK = (x.flatten(0, 1) for x in (q_BTHK, k_BTHK, v_BTHK))
    y_NHK, _ = op(q_NHK, k_NHK, v_NHK, cu_seqlens, max_seqlen, window, scale)
    return y_NHK.unflatten(0, q_BTHK.shape[:2])


# ------------------------------------------------------------------------------------------------------------
# 13. bench: the lines of its table


class Case(NamedTuple):
    """One line. `error` compares with a float64 or float32 reference, at a size that allows it."""

    name: str
    shape: str
    kernel: Callable[[], object]
    ref: Callable[[], object] | None
    tera: float  # 1e12 bytes or FLOP of one call
    unit: str  # "TB" or "TFLOP"
    error: Callable[[], float]


def _median_us(call: Callable[[], object], repeats: int = 15) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[repeats // 2]


def _max_error(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...]) -> float:
    """Largest difference over the largest magnitude, of the worst tensor."""
    pairs = zip((got,), (want,), strict=True) if isinstance(got, Tensor) else zip(got, want, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def _randn(*shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
    x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(scale)
    return x.requires_grad_(grad)


def _with_grads(op: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output and the gradients for an upstream gradient that differs from element to element."""
    y = op(*inputs)
    dy = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def _wide(inputs: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(x.detach().to(dtype).requires_grad_() for x in inputs)


def _train_call(op: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward and backward with a constant upstream gradient, allocated at the first call."""
    upstream: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        y = op(*inputs)
        if not upstream:
            upstream.append(torch.ones_like(y))
        return torch.autograd.grad(y, inputs, upstream[0])

    return call


def _bank_cases(m: int, n: int, k: int) -> list[Case]:
    x = _randn(m, n, k, scale=k**-0.5)
    a = xxt_ref(x[:, :, :n])
    triangle = m * n * n * 1e-12
    compiled_xxt = torch.compile(xxt_ref, dynamic=False)
    compiled_ba = torch.compile(ba_plus_caa_ref, dynamic=False)
    return [
        Case("xxt", f"{m}x{n}x{k}", lambda: xxt(x), lambda: compiled_xxt(x), triangle * k, "TFLOP",
             lambda: _max_error(xxt(x), xxt_ref(x.double()))),
        Case("ba_plus_caa", f"{m}x{n}x{n}", lambda: ba_plus_caa(a, 0.5, -1.5),
             lambda: compiled_ba(a, 0.5, -1.5), triangle * n, "TFLOP",
             lambda: _max_error(ba_plus_caa(a, 0.5, -1.5), ba_plus_caa_ref(a.double(), 0.5, -1.5))),
    ]  # fmt: skip


def _relu2_cases(n: int, d: int = 768, f: int = 3072) -> list[Case]:
    inputs = _randn(n, d, grad=True), _randn(f, d, scale=0.03, grad=True), _randn(f, d, scale=0.03, grad=True)
    few = inputs[0][:1000].detach().requires_grad_(), *inputs[1:]
    compiled = torch.compile(linear_relu2_ref, dynamic=False)
    work = 2e-12 * n * d * f

    def error() -> float:
        return _max_error(_with_grads(linear_relu2, few), _with_grads(linear_relu2_ref, _wide(few)))

    def forward(op):
        def call():
            with torch.no_grad():
                op(*inputs)

        return call

    return [
        Case("linear_relu2 forward", f"{n}x{d}x{f}", forward(linear_relu2), forward(compiled), 2 * work,
             "TFLOP", error),
        Case("linear_relu2 fwd+bwd", f"{n}x{d}x{f}", _train_call(linear_relu2, inputs),
             _train_call(compiled, inputs), 6 * work, "TFLOP", error),
    ]  # fmt: skip


def _loss_cases(n: int, v: int = 50304) -> list[Case]:
    logits = _randn(n, v, scale=4.0, grad=True)
    targets = torch.randint(v, (n,), device="cuda")
    weights = torch.tensor([1.0, 0.5, 0.25], device="cuda")
    few = (logits[:500].detach().requires_grad_(),)
    compiled = torch.compile(softcapped_cross_entropy_ref, dynamic=False)
    terabytes = 2e-12 * n * v

    def loss_of(op, t=targets, slot_len=n):
        return lambda logits_NV: op(logits_NV, t, weights, slot_len)

    def error() -> float:
        got = _with_grads(loss_of(softcapped_cross_entropy, targets[:500], 100), few)
        return _max_error(
            got, _with_grads(loss_of(softcapped_cross_entropy_ref, targets[:500], 100), _wide(few))
        )

    kernel, ref = loss_of(softcapped_cross_entropy), loss_of(compiled)
    detached = logits.detach()
    return [
        Case("cross entropy forward", f"{n}x{v}", lambda: kernel(detached), lambda: ref(detached), terabytes,
             "TB", error),
        Case("cross entropy fwd+bwd", f"{n}x{v}", _train_call(kernel, (logits,)),
             lambda: torch.autograd.grad(ref(logits).sum(), logits), 3 * terabytes, "TB", error),
    ]  # fmt: skip


def _fp8_cases(n: int, d: int = 768, v: int = 50304) -> list[Case]:
    inputs = _randn(n, d, grad=True), _randn(d, v, scale=0.05, grad=True)
    scales = 100 / 448, 1.6 / 448, 2 / 57344
    few = inputs[0][:512].detach().requires_grad_(), inputs[1]
    gradient = _randn(n, v, scale=1e-3)
    compiled = torch.compile(quantize_ref, dynamic=False)

    def head(x_ND: Tensor, w_DV: Tensor) -> Tensor:
        return fp8_linear_t(x_ND, w_DV, *scales)

    targets = torch.randint(v, (n,), device="cuda")
    weights = torch.tensor([1.0, 0.5, 0.25], device="cuda")

    def apart(x_ND: Tensor, w_DV: Tensor) -> Tensor:
        rows = x_ND.shape[0]
        return softcapped_cross_entropy(head(x_ND, w_DV), targets[:rows], weights, rows)

    def fused(x_ND: Tensor, w_DV: Tensor) -> Tensor:
        rows = x_ND.shape[0]
        return fp8_head_loss(x_ND, w_DV, targets[:rows], weights, rows, *scales)

    def error() -> float:  # against the same rounding, emulated
        on_cpu = tuple(x.detach().cpu().requires_grad_() for x in few)
        return _max_error(tuple(t.cpu() for t in _with_grads(head, few)), _with_grads(head, on_cpu))

    def quantize_error() -> float:
        got, want = _quantize(gradient[:512], 1e-4, E5M2), quantize_ref(gradient[:512], 1e-4, E5M2)
        return _max_error(tuple(t.float() for t in got), tuple(t.float() for t in want))

    work = 2e-12 * n * d * v
    return [
        Case("quantize e5m2, 2 layouts", f"{n}x{v}", lambda: _quantize(gradient, 1e-4, E5M2),
             lambda: compiled(gradient, 1e-4, E5M2), 4e-12 * n * v, "TB", quantize_error),
        Case("fp8 head forward", f"{n}x{d}x{v}", lambda: head(*inputs), lambda: inputs[0] @ inputs[1], work,
             "TFLOP", error),
        Case("fp8 head fwd+bwd", f"{n}x{d}x{v}", _train_call(head, inputs), _train_call(torch.matmul, inputs),
             3 * work, "TFLOP", error),
        Case("fp8 head and loss fwd+bwd", f"{n}x{d}x{v}", _train_call(fused, inputs),
             _train_call(apart, inputs), 3 * work, "TFLOP",
             lambda: _max_error(_with_grads(fused, few), _with_grads(apart, few))),
    ]  # fmt: skip


def _transpose_cases(d: int = 768, v: int = 50304) -> list[Case]:
    a, b = _randn(d, v), _randn(v, d)
    compiled_add, compiled_copy = (
        torch.compile(f, dynamic=False) for f in (transpose_add_ref, transpose_copy_ref)
    )

    def add_error() -> float:
        got = a.clone()
        transpose_add(got, b)
        return _max_error(got, a.double() + b.double().T)

    def copy_error() -> float:
        got = torch.empty_like(b)
        transpose_copy(got, a)
        return _max_error(got, a.T)

    return [
        Case("transpose_add", f"{d}x{v}", lambda: transpose_add(a, b), lambda: compiled_add(a, b),
             6e-12 * d * v, "TB", add_error),
        Case("transpose_copy", f"{v}x{d}", lambda: transpose_copy(b, a), lambda: compiled_copy(b, a),
             4e-12 * d * v, "TB", copy_error),
    ]  # fmt: skip


def _attention_cases(tokens: int, window: int, backend: str, heads: int = 6) -> list[Case]:
    generator = torch.Generator().manual_seed(tokens)
    lengths = torch.randn(tokens // 100, generator=generator).mul(1.0).add(6.0).exp().long().clamp(32, 2048)
    ends = lengths.cumsum(0).clamp(max=tokens)
    ends[-1] = tokens
    cu_seqlens = F.pad(ends.int(), (1, 0)).cuda()
    inputs = tuple(_randn(1, tokens, heads, 128, grad=True) for _ in range(3))
    window_t, scale_t = torch.tensor(window), torch.tensor(0.1)
    longest = int(cu_seqlens.diff().max())
    pairs = sum(min(i, window) + 1 for length in cu_seqlens.diff().tolist() for i in range(length))

    def call(name: str) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(q, k, v, cu_seqlens, longest, window_t, scale_t, window, name)

    def error() -> float:
        return _max_error(
            _with_grads(call(backend), inputs), _with_grads(call("reference"), _wide(inputs, torch.float32))
        )

    work = 4e-12 * pairs * heads * 128
    detached = tuple(x.detach() for x in inputs)
    return [
        Case(f"{backend} forward", f"{tokens}, w={window}", lambda: call(backend)(*detached), None, work,
             "TFLOP", error),
        Case(f"{backend} fwd+bwd", f"{tokens}, w={window}", _train_call(call(backend), inputs), None,
             3.5 * work, "TFLOP", error),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# 14. bench: python triton_kernels.py --bench


def _print_case(case: Case) -> None:
    line = f"{case.name:<26} {case.shape:<18}"
    try:
        us = _median_us(case.kernel)
        line += f" {us:>9.1f} {case.tera / us * 1e6:>8.2f} {case.unit + '/s':<8}"
        line += f" {_median_us(case.ref) / us:>7.2f}x" if case.ref else f" {'-':>8}"
        line += f" {case.error():>9.1e}"
    except Exception as error:  # one failing kernel must not hide the others
        line += f" {type(error).__name__}: {str(error)[:300]}"
    print(line, flush=True)


def _bench_families(rows: int) -> list[tuple[Callable[..., list[Case]], tuple]]:
    attention_shapes = ((16384, 128), (49152, 640), (49152, 1408))
    return [
        (_bank_cases, (24, 768, 3072)),
        (_bank_cases, (40, 768, 768)),
        (_relu2_cases, (rows,)),
        (_loss_cases, (rows,)),
        (_fp8_cases, (rows,)),
        (_transpose_cases, ()),
        *((_attention_cases, (*shape, name)) for shape in attention_shapes for name in ("varlen", "fa4")),
    ]


def _bench(rows: int) -> None:
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for name, is_usable, reason in attention_backends("cuda", torch.bfloat16):
        print(f"attention backend {name}: {'usable' if is_usable else reason}")
    print(f"{'kernel':<26} {'shape':<18} {'us':>9} {'rate':>8} {'':<8} {'vs ref':>8} {'max error':>9}")
    for make_cases, arguments in _bench_families(rows):
        try:
            cases = make_cases(*arguments)
        except Exception as error:
            print(f"{make_cases.__name__}{arguments}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        for case in cases:
            _print_case(case)
        del cases
        torch.cuda.empty_cache()


def _tune(rows: int) -> None:
    """Time each family's candidate configs; the winners are then written into the tables by hand."""
    tiles = [
        Tile(128, 256, 64, 3, 8),
        Tile(128, 256, 64, 4, 8),
        Tile(128, 128, 64, 4, 8),
        Tile(128, 128, 64, 4, 4),
    ]
    square = [
        Tile(128, 128, 64, 4, 8),
        Tile(128, 128, 64, 3, 4),
        Tile(64, 128, 128, 4, 8),
        Tile(128, 64, 64, 4, 4),
    ]
    blocks = [(1024, 2), (1024, 4), (2048, 2), (2048, 4), (2048, 8), (4096, 8)]
    plans = [
        (_bank_cases, (24, 768, 3072), 0, ("XXT_TILE_OTHER",), [(tile,) for tile in square]),
        (_bank_cases, (24, 768, 3072), 1, ("BA_TILE",), [(tile,) for tile in square]),
        (_relu2_cases, (rows,), 0, ("RELU2_FORWARD_TILE",), [(tile,) for tile in tiles]),
        (_relu2_cases, (rows,), 1, ("RELU2_BACKWARD_TILE",), [(tile,) for tile in tiles]),
        (_loss_cases, (rows,), 0, ("CE_FORWARD_BLOCK", "CE_FORWARD_WARPS"), blocks),
        (_loss_cases, (rows,), 1, ("CE_BACKWARD_BLOCK", "CE_BACKWARD_WARPS"), blocks),
        (_fp8_cases, (rows,), 0, ("QUANTIZE_TILE", "QUANTIZE_WARPS"),
         [((64, 128), 8), ((64, 128), 4), ((128, 128), 8), ((64, 64), 4), ((128, 64), 8)]),
        (_transpose_cases, (), 0, ("TRANSPOSE_BYTES", "TRANSPOSE_WARPS"), [(64, 4), (128, 4), (128, 8)]),
    ]  # fmt: skip
    for make_cases, arguments, index, names, candidates in plans:
        case = make_cases(*arguments)[index]
        frozen = {name: globals()[name] for name in names}
        for candidate in candidates:
            globals().update(zip(names, candidate, strict=True))
            print(" ".join(f"{name}={value}" for name, value in zip(names, candidate, strict=True)))
            _print_case(case._replace(ref=None))
        globals().update(frozen)
        del case
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and error of every kernel, on the current GPU.")
    parser.add_argument("--bench", action="store_true", help="print the table")
    parser.add_argument("--tune", action="store_true", help="time the candidate configs of each family")
    parser.add_argument("--rows", type=int, default=49152, help="tokens of the flattened batch")
    options = parser.parse_args()
    if not (options.bench or options.tune):
        parser.error("nothing to do: give --bench or --tune")
    if triton is None or not torch.cuda.is_available():
        parser.error("--bench and --tune need a GPU and Triton")
    if options.bench:
        _bench(options.rows)
    if options.tune:
        _tune(options.rows)


if __name__ == "__main__":
    main()
