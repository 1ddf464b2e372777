"""Every kernel of the trainer, each beside the plain PyTorch function that says what it computes.

    from triton_kernels import xxt, linear_relu2, softcapped_cross_entropy, fp8_head_loss, attention
    python benchmarks/kernels.py        # on a GPU: speed and error of each, against its reference

A public function runs its Triton kernel where the tensors are on a GPU and Triton is installed, and its
`_ref` otherwise, so that the same trainer runs on a laptop. All of them work eagerly and under
torch.compile(fullgraph=True), with any number of rows in one graph. Kernels accumulate in float32 and take
the dtype that they write from the pointer. Launches use the current CUDA device: it must be the one that
holds the tensors. Configs are frozen in the table at the top of each family; nothing is tuned, compiled or
allocated at import.

Roofline times are for one H200: 4.3 TB/s measured copy bandwidth, 790 TFLOP/s measured bf16 matmul.

Dimensions: M matrices in a bank, N rows of a flattened op, K inner dimension, D model, F hidden, V padded
vocabulary. In attention: H heads, K head dimension. In the loss: K prediction terms, C rows of a chunk.
"""

import functools
import math
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
# 0. dispatch, and the product that the symmetric kernels share

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
    # Tiles are sized for operands of 2 bytes or 1: float32 ones would need twice the shared memory of an SM.
    return _FORCE_KERNELS or (triton is not None and x.is_cuda and x.element_size() <= 2)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@jit
def _dot_rows(
    x_ptr, a_rows, b_rows, stride, K,  # (BM,) and (BN,) row numbers, all valid
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """acc[i, j] = sum_k x[a_rows[i], k] * x[b_rows[j], k] in float32.

    Both operands are read along k, so that loads coalesce; the second is transposed on its way to the tensor
    core (record 69, pull request 217).
    """
    ks = tl.arange(0, BK)
    a_ptrs = x_ptr + a_rows[:, None] * stride + ks[None, :]
    b_ptrs = x_ptr + b_rows[:, None] * stride + ks[None, :]
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

# Traffic: 40 matrices of 768 x 768 bf16 are read and written: 94 MB, 22 us. Work: the lower triangle of
# blocks, 21 of 36, 21 GFLOP: 27 us. 24 of 768 x 3072: 142 MB, 33 us; 51 GFLOP, 64 us. Tile of record 65's
# search (pull request 215), warps of record 69.
XXT_TILE = Tile(128, 128, 64, 4, 8)


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
def _symmetric_kernel(
    x_ptr,  # (M, N, K), last stride 1
    c_ptr,  # (M, N, N) contiguous
    N, K, stride_m, stride_n,
    alpha, beta,  # not read if not ADDS_X
    ADDS_X: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One block of X X^T, or of alpha X X^T + beta X with X added before rounding, and its mirror image.

    Blocks strictly above the diagonal have nothing to do.
    """
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
    cols = n0 + tl.arange(0, BN)
    acc = _dot_rows(x_ptr, rows_in, tl.minimum(cols, N - 1), stride_n, K, BM, BN, BK, EVEN_K)
    if ADDS_X:
        x = tl.load(x_ptr + rows_in[:, None] * stride_n + cols[None, :], mask=cols[None, :] < N, other=0.0)
        acc = alpha * acc + beta * x.to(tl.float32)
    _store_symmetric(c_ptr, acc, m0, n0, N, BM, BN)


def _symmetric(x_MNK: Tensor, tile: Tile, alpha: float, beta: float, adds_x: bool) -> Tensor:
    x_MNK = _rows_contiguous(x_MNK)
    m, n, k = x_MNK.shape
    c_MNN = x_MNK.new_empty(m, n, n)
    grid = (_cdiv(n, tile.block_m) * _cdiv(n, tile.block_n), m)
    strides = x_MNK.stride(0), x_MNK.stride(1)
    _symmetric_kernel[grid](x_MNK, c_MNN, n, k, *strides, alpha, beta, ADDS_X=adds_x, **tile.launch(k))
    return c_MNN


@torch.library.custom_op("splits::xxt", mutates_args=())
def _xxt(x_MNK: Tensor) -> Tensor:
    # Of a tall Y (24 x 3072 x 768) cuBLAS makes all of C in 120 us, half of it took this kernel about 370.
    if x_MNK.stride(1) == 1:
        return torch.bmm(x_MNK, x_MNK.mT)
    return _symmetric(x_MNK, XXT_TILE, alpha=1.0, beta=0.0, adds_x=False)


_xxt.register_fake(lambda x_MNK: x_MNK.new_empty(*x_MNK.shape[:2], x_MNK.shape[1]))


def xxt(x_MNK: Tensor) -> Tensor:
    """C_MNN = X X^T of every matrix; one triangle is computed and mirrored. No gradient.

    X may be a transposed view: then it is Y^T Y of a tall Y, which is not copied.
    """
    return _xxt(x_MNK) if _use_matmul_kernels(x_MNK) else xxt_ref(x_MNK)


# ------------------------------------------------------------------------------------------------------------
# 2. ba_plus_caa: B = alpha A A^T + beta A for symmetric A

# Traffic: 24 matrices of 768 x 768 bf16 read and written: 57 MB, 13 us; 21 of 36 blocks, 13 GFLOP: 16 us.
BA_TILE = Tile(128, 128, 64, 4, 8)


def ba_plus_caa_ref(a_MNN: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.baddbmm(a_MNN, a_MNN, a_MNN.mT, beta=beta, alpha=alpha)


@torch.library.custom_op("splits::ba_plus_caa", mutates_args=())
def _ba_plus_caa(a_MNN: Tensor, alpha: float, beta: float) -> Tensor:
    return _symmetric(a_MNN, BA_TILE, alpha, beta, adds_x=True)


_ba_plus_caa.register_fake(lambda a_MNN, *_: a_MNN.new_empty(a_MNN.shape))


def ba_plus_caa(a_MNN: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha * A A^T + beta * A of every symmetric A. Polar express: alpha = c, beta = b. No gradient."""
    if _use_matmul_kernels(a_MNN):
        return _ba_plus_caa(a_MNN, alpha, beta)
    return ba_plus_caa_ref(a_MNN, alpha, beta)


# ------------------------------------------------------------------------------------------------------------
# 3. matrices in 8 bits: rounding, transposes, products

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2  # 3 mantissa bits, max 448; 2 mantissa bits, max 57344
# Static factors; e4m3 is normal from 2^-6. Powers of two round nothing; a float would become a symbol under
# torch.compile.
E4M3_X_FACTOR = 16  # to 28: x is RMS-normalised, |x| <= sqrt(768) = 27.7
E4M3_W_FACTOR = 256  # to 1.75: weights of 0.03 become 8
E4M3_POST_FACTOR = 1  # to 448: |pre| <= 21
E5M2_GRAD_FACTOR = 8192  # to 7; the smallest is 2e-9. In `tiny` 98 % of |g| and |dpre| lie in 4e-7 to 1e-2
E5M2_LOGITS_FACTOR = 512  # of the gradient of the logits: to 112
LINEAR_FACTOR = E4M3_X_FACTOR * E4M3_W_FACTOR
DX_FACTOR, DW_FACTOR = E5M2_GRAD_FACTOR * E4M3_W_FACTOR, E5M2_GRAD_FACTOR * E4M3_X_FACTOR


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


def _eight(x: Tensor, factor: int, dtype: torch.dtype = E4M3) -> Tensor:
    """x times the factor in 8 bits, saturated, no gradient. Compiled, part of the kernel that makes x."""
    limit = torch.finfo(dtype).max
    return (x.detach().float() * factor).clamp(-limit, limit).to(dtype)


def _eights(x_ND: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return _eight(x_ND, E4M3_X_FACTOR), _eight(w, E4M3_W_FACTOR)


def _e5m2_gradient(g: Tensor) -> Tensor:
    return _eight(g, E5M2_GRAD_FACTOR, E5M2)


@jit
def _saturate(x, LIMIT: tl.constexpr):
    return tl.clamp(x, -1.0 * LIMIT, 1.0 * LIMIT, propagate_nan=tl.PropagateNan.ALL)


@functools.cache
def _on_device(scale: float, device: torch.device) -> Tensor:
    # cuBLAS 13 wants each scale at a 16-byte aligned address: its own allocation has one, a slice need not.
    return torch.full((), scale, dtype=torch.float32, device=device)


def _matmul_fp8(a8: Tensor, b8_t: Tensor, factor: int, out: Tensor, is_fast: bool) -> Tensor:
    """out = a8 @ b8_t.T over the product of their factors; rows contiguous. Emulated in float32 on a CPU.

    Fast sums keep about 14 bits: for the short ones over D or F, not for those over tokens or logits.
    """
    if not a8.is_cuda:
        return out.copy_((a8.float() @ b8_t.float().T) / factor)
    is_available, reason = fp8_available(a8.device)
    if not is_available:
        raise ValueError(f"FP8 product: {reason}; leave it to bf16")
    scales = (_on_device(scale, a8.device) for scale in (1.0 / factor, 1.0))
    return torch._scaled_mm(a8, b8_t.T, *scales, out_dtype=out.dtype, use_fast_accum=is_fast, out=out)


@torch.library.custom_op("splits::product8", mutates_args=())
def _product8(a8_NK: Tensor, b8_CK: Tensor, factor: int, is_fast: bool, dtype: torch.dtype) -> Tensor:
    out_NC = a8_NK.new_empty(a8_NK.shape[0], b8_CK.shape[0], dtype=dtype)
    return _matmul_fp8(a8_NK, b8_CK, factor, out_NC, is_fast)


_product8.register_fake(lambda a, b, f, fast, dtype: a.new_empty(a.shape[0], b.shape[0], dtype=dtype))


def _padded(n: int) -> int:
    """The inner dimension of a product over n tokens: a multiple of 16, which FP8 products and TMA want."""
    return _cdiv(n, 16) * 16


def _empty_columns(n: int, c: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    make = torch.empty if n == _padded(n) else torch.zeros
    return make(c, _padded(n), dtype=torch.int8, device=device).view(dtype)


# Traffic at N = 49,152: 76 MB for D = 768, 18 us (25 measured), 302 for F, 70 us (84); 49,152 x 50,304 in 10.
# With fixed strides Inductor writes an argument anew for each op that reads it: the MLP's gradient twice.
@torch.library.custom_op("splits::columns8", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _columns8(x8_NC: Tensor) -> Tensor:
    """(C, padded N): the transpose, because an FP8 product takes both operands along the inner dimension."""
    x8_CN = _empty_columns(*x8_NC.shape, x8_NC.dtype, x8_NC.device)
    transpose_copy(x8_CN.view(torch.int8)[:, : len(x8_NC)], x8_NC.view(torch.int8))
    return x8_CN


_columns8.register_fake(lambda x8_NC: x8_NC.new_empty(x8_NC.shape[1], _padded(x8_NC.shape[0])))


# ------------------------------------------------------------------------------------------------------------
# 4. linear_relu2: relu(x W1^T)^2 W2, in bf16 or FP8

# At N = 49,152, D = 768, F = 3072 a product is 232 GFLOP, 294 us, half in FP8. The first moves 382 MB, 89
# us. Forward is 2 such products, backward 4: 0.59 and 1.17 ms. Fusing the activation saves a write and a
# read of the (N, F) tensor, 604 MB or 140 us, in each direction. One such tensor is kept for backward: post
# = relu(pre)^2, and backward takes relu(pre) = sqrt(post) (pull request 322), closer than a stored bf16 pre:
# the root halves post's rounding. Tiles go along F first: W1 (4.7 MB) stays in the L2 cache. The kernel is
# persistent, its two loops flattened into one, and the tensor memory accelerator (TMA) carries the blocks.
# One H200, torch 2.11, medians of 10, us: forward 387, backward 491; the bare product by cuBLAS: 336.
RELU2_FORWARD = Tile(128, 256, 64, 3, 8), 1, 1  # and programs a processor, parts in which a tile is stored
RELU2_BACKWARD = Tile(128, 128, 64, 5, 4), 2, 1  # in two waves, since one fills a processor; in one 501 us
# In FP8 post and dpre are kept in 8 bits alone, each beside its transpose for the weights' gradients: 340 MB
# forward, 79 us, backward 491, 114 us; a product 147 us at twice the bf16 rate. Measured 219 and 308, without
# the transposes 196 and 253, and 84 more for each by a kernel of its own (one H200, medians of 15).
RELU2_FP8 = Tile(128, 128, 128, 3, 4), 2, 2
RELU2_FP8_BACKWARD = Tile(128, 128, 64, 4, 8), 2, 1


def linear_relu2_ref(x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor) -> Tensor:
    """The same by cuBLAS and, compiled, one fused elementwise kernel: also the arm to time against."""
    return F.relu(x_ND @ w1_FD.T).square() @ w2_FD


def fp8_relu2_ref(a8_NK: Tensor, w8_FK: Tensor, post8_NF: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(post8_NF, its transpose) of x and w1; with post8, (dpre8_NF, its transpose) of the gradient and w2."""
    out_NF = (a8_NK.float() @ w8_FK.float().T) * _relu2_scale(post8_NF is not None, is_fp8=True)
    out_NF = F.relu(out_NF).square() if post8_NF is None else out_NF * post8_NF.float().sqrt()
    out8_NF = _eight(out_NF, 1, a8_NK.dtype)
    return out8_NF, _columns8(out8_NF)


@jit
def _relu2_store(
    acc, post_desc, out_desc, columns_desc, row, col, SCALE: tl.constexpr, LIMIT: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
):  # fmt: skip
    acc *= SCALE
    if IS_BACKWARD:
        acc *= tl.sqrt(post_desc.load([row, col]).to(tl.float32))
    else:
        acc = tl.maximum(acc, 0.0)
        acc *= acc
    if LIMIT:
        acc = _saturate(acc, LIMIT)
    out = acc.to(out_desc.dtype)
    out_desc.store([row, col], out)
    if LIMIT:
        columns_desc.store([col, row], tl.trans(out.to(tl.int8, bitcast=True)))


@jit
def _relu2_kernel(
    a_desc,  # (N, K) in blocks (BM, BK): x, in backward the gradient of y
    w_desc,  # (F, K) in blocks (BN, BK): w1, in backward w2
    post_desc,  # (N, F) in blocks (BM, BN / PARTS), read in backward
    out_desc,  # (N, F) in the same blocks: post, in backward dpre
    columns_desc,  # (F, N) in blocks (BN / PARTS, BM): the transpose as bytes, written where LIMIT is given
    N, F_, K,
    SCALE: tl.constexpr, LIMIT: tl.constexpr,  # LIMIT: the largest value of out in FP8, or 0; a whole number
    IS_BACKWARD: tl.constexpr, PROGRAMS: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = relu(SCALE a w^T)^2, in backward (SCALE a w^T) sqrt(post), rounded once.

    Descriptors read zeros and write nothing beyond the edges.
    """
    blocks_f = tl.cdiv(F_, BN)
    tiles = tl.cdiv(N, BM) * blocks_f
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row = tile // blocks_f * BM
        col = tile % blocks_f * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, K, BK):
            acc = tl.dot(a_desc.load([row, start]), w_desc.load([col, start]).T, acc)
        descs = post_desc, out_desc, columns_desc
        if PARTS == 2:
            left, acc = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            _relu2_store(left, *descs, row, col, SCALE, LIMIT, IS_BACKWARD)
            col += BN // 2
        _relu2_store(acc, *descs, row, col, SCALE, LIMIT, IS_BACKWARD)


@functools.cache
def _processors(device: torch.device) -> int:
    """How many the device has; for the interpreter any number, fewer than the tiles of its tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _has_tma(device: torch.device) -> bool:
    # Compute capability 12 (GPUs for desktops) has it too, but too little shared memory for these tiles.
    return 9 <= torch.cuda.get_device_properties(device).major < 12


def tma_problem(device: torch.device) -> str:
    """Why linear_relu2 runs in plain PyTorch on the device; empty if it does not."""
    has_it = triton is not None and device.type == "cuda" and _has_tma(device)
    return "" if has_it else "its kernel needs Triton and compute capability 9 to 11"


def _use_tma(x_ND: Tensor, w_FD: Tensor, element_size: int) -> bool:
    """Whether TMA can carry rows of D and of F elements, of that many bytes each, and the device has it."""
    is_aligned = all(size * element_size % 16 == 0 for size in w_FD.shape)
    return is_aligned and _use_matmul_kernels(x_ND) and (_FORCE_KERNELS or _has_tma(x_ND.device))


def _aligned(x: Tensor) -> Tensor:
    """x, copied unless rows are contiguous and start at multiples of 16 bytes: TMA reads no other."""
    is_aligned = x.stride(1) == 1 and not (x.stride(0) * x.element_size() | x.data_ptr()) % 16
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def _relu2_scale(is_backward: bool, is_fp8: bool) -> float:
    """All factors of the operands and of what is written are one. That of the gradients cancels."""
    root = math.sqrt(E4M3_POST_FACTOR)
    if is_backward:
        return 2.0 / (E4M3_W_FACTOR * root) if is_fp8 else 2.0
    return root / LINEAR_FACTOR if is_fp8 else 1.0


def _relu2_constants(tile: Tile, programs: int, parts: int, is_backward: bool, is_fp8: bool) -> dict:
    limit = int(torch.finfo(E5M2 if is_backward else E4M3).max) if is_fp8 else 0
    numbers = {"SCALE": _relu2_scale(is_backward, is_fp8), "LIMIT": limit}
    kind = {"IS_BACKWARD": is_backward, "PROGRAMS": programs, "PARTS": parts}
    blocks = {"BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k}
    return {**numbers, **kind, **blocks, "num_stages": tile.stages, "num_warps": tile.warps}


def _launch_relu2(
    config: tuple[Tile, int, int], a_NK: Tensor, w_FK: Tensor, out_NF: Tensor, out_FN: Tensor | None = None,
    post_NF: Tensor | None = None,
) -> None:  # fmt: skip
    """Backward where `post_NF` is given; FP8 where `out_FN` is, whose rows may be longer: see _padded."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    describe, (tile, per_processor, parts) = TensorDescriptor.from_tensor, config
    a_NK, w_FK, (n, f), k = _aligned(a_NK), _aligned(w_FK), out_NF.shape, a_NK.shape[1]
    (bm, bn, bk), is_fp8 = tile[:3], out_FN is not None
    block = [bm, bn // parts]
    out_desc, post_desc = describe(out_NF, block), describe(out_NF if post_NF is None else post_NF, block)
    columns_desc = describe(out_FN.view(torch.int8), block[::-1]) if is_fp8 else out_desc
    programs = min(_processors(a_NK.device) * per_processor, _cdiv(n, bm) * _cdiv(f, bn))
    descs = describe(a_NK, [bm, bk]), describe(w_FK, [bn, bk]), post_desc, out_desc, columns_desc
    constants = _relu2_constants(tile, programs, parts, post_NF is not None, is_fp8)
    _relu2_kernel[(programs,)](*descs, n, f, k, **constants)


@torch.library.custom_op("splits::linear_relu2", mutates_args=())
def _linear_relu2(x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor) -> tuple[Tensor, Tensor]:
    post_NF = x_ND.new_empty(x_ND.shape[0], w1_FD.shape[0])
    _launch_relu2(RELU2_FORWARD, x_ND, w1_FD, post_NF)
    return post_NF @ w2_FD, post_NF


@torch.library.custom_op("splits::linear_relu2_backward", mutates_args=())
def _linear_relu2_backward(
    g_ND: Tensor, x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor, post_NF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dpre_NF = torch.empty_like(post_NF)
    _launch_relu2(RELU2_BACKWARD, g_ND, w2_FD, dpre_NF, post_NF=post_NF)
    return dpre_NF @ w1_FD, dpre_NF.T @ x_ND, post_NF.T @ g_ND


_linear_relu2.register_fake(lambda x, w1, w2: (x.new_empty(x.shape), x.new_empty(x.shape[0], w1.shape[0])))
_linear_relu2_backward.register_fake(lambda g_ND, *t: tuple(x.new_empty(x.shape) for x in t[:3]))


def _linear_relu2_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


_linear_relu2.register_autograd(
    lambda ctx, g_ND, _: _linear_relu2_backward(g_ND, *ctx.saved_tensors), setup_context=_linear_relu2_setup
)


def _fp8_relu2_outputs(a8_NK: Tensor, w8_FK: Tensor, *_) -> tuple[Tensor, Tensor]:
    n, f = a8_NK.shape[0], w8_FK.shape[0]
    return a8_NK.new_empty(n, f), a8_NK.new_empty(f, _padded(n))


@torch.library.custom_op("splits::fp8_relu2", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _fp8_relu2(a8_NK: Tensor, w8_FK: Tensor, post8_NF: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if not _use_tma(a8_NK, w8_FK, a8_NK.element_size()):
        return fp8_relu2_ref(a8_NK, w8_FK, post8_NF)
    config, outputs = RELU2_FP8 if post8_NF is None else RELU2_FP8_BACKWARD, _fp8_relu2_outputs(a8_NK, w8_FK)
    _launch_relu2(config, a8_NK, w8_FK, *outputs, post8_NF)
    return outputs


_fp8_relu2.register_fake(_fp8_relu2_outputs)


class _Fp8LinearRelu2(torch.autograd.Function):
    # Not an op: x in bf16 would have to be written for it.
    @staticmethod
    def forward(ctx, x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor) -> Tensor:
        (x8_ND, w1_8_FD), w2_8_FD = _eights(x_ND, w1_FD), _eight(w2_FD, E4M3_W_FACTOR)
        post8_NF, post8_FN = _fp8_relu2(x8_ND, w1_8_FD)
        ctx.save_for_backward(x8_ND, w1_8_FD, w2_8_FD, post8_NF, post8_FN)
        w2_8_DF, factor = w2_8_FD.T.contiguous(), E4M3_POST_FACTOR * E4M3_W_FACTOR
        return _product8(post8_NF, w2_8_DF, factor, is_fast=True, dtype=x_ND.dtype)

    @staticmethod
    def backward(ctx, g_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x8_ND, w1_8_FD, w2_8_FD, post8_NF, post8_FN = ctx.saved_tensors
        g8_ND, dtype = _e5m2_gradient(g_ND), g_ND.dtype
        dpre8_NF, dpre8_FN = _fp8_relu2(g8_ND, w2_8_FD, post8_NF)
        factor, exact = E4M3_POST_FACTOR * E5M2_GRAD_FACTOR, {"is_fast": False, "dtype": dtype}
        dw1_FD = _product8(dpre8_FN, _columns8(x8_ND), DW_FACTOR, **exact)
        dw2_FD = _product8(post8_FN, _columns8(g8_ND), factor, **exact)
        return _fp8_dx(dpre8_NF, w1_8_FD, dtype), dw1_FD, dw2_FD


def linear_relu2(x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor) -> Tensor:
    """relu(x W1^T)^2 W2, differentiable in all three; keeps one (N, F) tensor for backward.

    Source: Primer, arXiv 2109.08668. `linear_relu2_ref` is the unfused version, to time against.
    """
    if _use_tma(x_ND, w1_FD, x_ND.element_size()):
        return _linear_relu2(x_ND, w1_FD, w2_FD)[0]
    return linear_relu2_ref(x_ND, w1_FD, w2_FD)


def fp8_linear_relu2(x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor) -> Tensor:
    """linear_relu2 with all six products in FP8 (for forward pull requests 306, 342, for dx 363).

    Weights and activations in e4m3, gradients in e5m2, factors above. Without TMA, and where D or F is no
    multiple of 16, the rounding is emulated, which gains no time.
    """
    return _Fp8LinearRelu2.apply(x_ND, w1_FD, w2_FD)


# ------------------------------------------------------------------------------------------------------------
# 5. fp8_linear: x W^T in FP8

# At N = 49,152, D = 768, C = 2304: 174 GFLOP, 220 us, half in FP8. Source: pull requests 322 and 344. The
# weight's gradient in FP8 takes 127 us, not 257, at C = 768 80, not 88; transposes of 8 bits 65 and 25 (one
# H200, medians of 15).


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, w_CD: Tensor, has_dw8: bool) -> Tensor:  # dw in FP8 too
        x8_ND, w8_CD = _eights(x_ND, w_CD)
        ctx.save_for_backward(x8_ND if has_dw8 else x_ND, w8_CD)
        ctx.has_dw8 = has_dw8
        return _product8(x8_ND, w8_CD, LINEAR_FACTOR, is_fast=True, dtype=x_ND.dtype)

    @staticmethod
    def backward(ctx, g_NC: Tensor) -> tuple[Tensor, Tensor, None]:
        (x_ND, w8_CD), g8_NC = ctx.saved_tensors, _e5m2_gradient(g_NC)
        dw_CD = _fp8_dw(g8_NC, x_ND, g_NC.dtype) if ctx.has_dw8 else g_NC.T @ x_ND
        return _fp8_dx(g8_NC, w8_CD, g_NC.dtype), dw_CD, None


def _fp8_dx(g8_NC: Tensor, w8_CD: Tensor, dtype: torch.dtype) -> Tensor:
    return _product8(g8_NC, w8_CD.T.contiguous(), DX_FACTOR, is_fast=True, dtype=dtype)


def _fp8_dw(g8_NC: Tensor, x8_ND: Tensor, dtype: torch.dtype) -> Tensor:
    return _product8(_columns8(g8_NC), _columns8(x8_ND), DW_FACTOR, is_fast=False, dtype=dtype)


def fp8_linear(x_ND: Tensor, w_CD: Tensor) -> Tensor:
    """F.linear with FP8 products in forward and for dx: to |x| of 28, |w| of 1.75, |gradient| of 7.

    C and D are multiples of 16. The weight's gradient is a product of unrounded tensors: at C = D = 768 two
    transposes cost more than FP8 saves.
    """
    return _Fp8Linear.apply(x_ND, w_CD, False)  # has_dw8


# ------------------------------------------------------------------------------------------------------------
# 6. softcapped_cross_entropy: several next tokens a row, no float32 copy of the logits

# Traffic at N = 49,152, V = 50,304, bf16: forward reads 4.9 GB, 1.15 ms; backward reads and writes, 2.3 ms
# (1.7 ms with a gradient in 8 bits). Special-function operations bound them where each element costs three
# (exp, reciprocal, exp; 16 a clock and SM: 2.0 ms), so training takes the sigmoid from the hardware tanh, one
# operation: forward fell from 2.30 to 1.31 ms (one H200, median of 7). Its error, 2^-11 of tanh or 0.006 of
# the capped logit, is below that of rounding the logit to bf16. Evaluation takes the exact sigmoid.
CE_FORWARD_BLOCK, CE_FORWARD_WARPS = 2048, 4
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
    logits_NV: Tensor, targets_N: Tensor, positions_N: Tensor, weights_K: Tensor
) -> Tensor:
    z_NV = softcap(logits_NV)
    lse_N = z_NV.logsumexp(dim=-1)
    loss_N = torch.zeros_like(lse_N)
    for k in range(NUM_TARGETS):
        # Rolling wraps round to rows of a slot's beginning, whose positions are below k: not counted.
        is_counted_N = positions_N.roll(-k) >= k
        nll_N = lse_N - z_NV.gather(1, targets_N.roll(-k).long()[:, None]).squeeze(1)
        loss_N = loss_N + torch.where(is_counted_N, weights_K[k] * nll_N, 0.0)
    return loss_N


@jit
def _half_tanh(logit, B: tl.constexpr, INV_C: tl.constexpr, IS_FAST: tl.constexpr):
    """t = tanh((l + B) / 2C), so that z = A/2 (1 + t); by the hardware's approximation if IS_FAST."""
    u = logit.to(tl.float32) * (0.5 * INV_C) + (0.5 * B * INV_C)
    if IS_FAST:
        asm: tl.constexpr = "tanh.approx.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * u))


@jit
def _target(targets_ptr, positions_ptr, weights_ptr, row, num_rows, K: tl.constexpr):
    """Term K of a row: (target, weight), the weight 0 where the slot ends before the target."""
    is_inside = row + K < num_rows
    is_counted = is_inside & (tl.load(positions_ptr + row + K, mask=is_inside, other=-1) >= K)
    weight = tl.where(is_counted, tl.load(weights_ptr + K).to(tl.float32), 0.0)
    return tl.load(targets_ptr + row + K, mask=weight != 0.0, other=0).to(tl.int32), weight


@jit
def _ce_gradient(
    logit, scale, shift, weight, target_weight,
    A: tl.constexpr, B: tl.constexpr, INV_C: tl.constexpr, LOG2_E: tl.constexpr, IS_FAST: tl.constexpr,
):  # fmt: skip
    """scale (1 - t^2) (weight p - target_weight), p = exp(z - lse) = 2^(t A/2 log2(e) + shift)."""
    t = _half_tanh(logit, B, INV_C, IS_FAST)
    return (scale - scale * t * t) * (weight * tl.exp2(t * (0.5 * A * LOG2_E) + shift) - target_weight)


@jit
def _ce_forward_kernel(
    logits_ptr,  # (rows, V) from `first_row` on, last stride 1
    targets_ptr, positions_ptr, weights_ptr,
    loss_ptr, lse_ptr,  # (N,) float32
    first_row, num_rows, num_cols, stride,
    A: tl.constexpr, B: tl.constexpr, INV_C: tl.constexpr, LOG2_E: tl.constexpr, BLOCK: tl.constexpr,
    IS_FAST: tl.constexpr,
):  # fmt: skip
    """One row. z lies in (0, A): exp(z - A) neither overflows nor vanishes, no running maximum is needed."""
    row = first_row + tl.program_id(0)
    logits_ptr += tl.program_id(0).to(tl.int64) * stride  # N * V exceeds 2^31
    cols = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    whole = num_cols // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):  # exp(z - A) as a power of two: one operation less an element
        t = _half_tanh(tl.load(logits_ptr + start + cols), B, INV_C, IS_FAST)
        total += tl.exp2(t * (0.5 * A * LOG2_E) - (0.5 * A * LOG2_E))
    inside = cols < num_cols - whole
    t = _half_tanh(tl.load(logits_ptr + whole + cols, mask=inside, other=0.0), B, INV_C, IS_FAST)
    total += tl.where(inside, tl.exp2(t * (0.5 * A * LOG2_E) - (0.5 * A * LOG2_E)), 0.0)
    lse = A + tl.log(tl.sum(total, axis=0))
    t0, w0 = _target(targets_ptr, positions_ptr, weights_ptr, row, num_rows, 0)
    t1, w1 = _target(targets_ptr, positions_ptr, weights_ptr, row, num_rows, 1)
    t2, w2 = _target(targets_ptr, positions_ptr, weights_ptr, row, num_rows, 2)
    loss = w0 * (lse - 0.5 * A * (1.0 + _half_tanh(tl.load(logits_ptr + t0), B, INV_C, IS_FAST)))
    loss += w1 * (lse - 0.5 * A * (1.0 + _half_tanh(tl.load(logits_ptr + t1), B, INV_C, IS_FAST)))
    loss += w2 * (lse - 0.5 * A * (1.0 + _half_tanh(tl.load(logits_ptr + t2), B, INV_C, IS_FAST)))
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


@jit
def _ce_backward_kernel(
    grad_ptr, lse_ptr,  # (N,) float32, the first of the losses
    logits_ptr,  # (rows, V) from `first_row` on, last stride 1
    targets_ptr, positions_ptr, weights_ptr,
    dlogits_ptr,  # (rows, V) contiguous
    first_row, num_rows, num_cols, stride,
    A: tl.constexpr, B: tl.constexpr, INV_C: tl.constexpr, LOG2_E: tl.constexpr, BLOCK: tl.constexpr,
    IS_FAST: tl.constexpr,
):  # fmt: skip
    """dl_j = grad A/4C (1 - t_j^2) (p_j sum_k w_k - sum_k w_k [j == target_k]), p the softmax of z.

    The targets' columns are written twice, the second time with their term: comparing every column with every
    target took a third of the time.
    """
    row = first_row + tl.program_id(0)
    logits_ptr += tl.program_id(0).to(tl.int64) * stride
    dlogits_ptr += tl.program_id(0).to(tl.int64) * num_cols
    t0, w0 = _target(targets_ptr, positions_ptr, weights_ptr, row, num_rows, 0)
    t1, w1 = _target(targets_ptr, positions_ptr, weights_ptr, row, num_rows, 1)
    t2, w2 = _target(targets_ptr, positions_ptr, weights_ptr, row, num_rows, 2)
    scale, weight = tl.load(grad_ptr + row) * (0.25 * A * INV_C), w0 + w1 + w2
    shift = (0.5 * A - tl.load(lse_ptr + row)) * LOG2_E
    dtype = dlogits_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    whole = num_cols // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        logit = tl.load(logits_ptr + start + cols)
        g = _ce_gradient(logit, scale, shift, weight, 0.0, A, B, INV_C, LOG2_E, IS_FAST)
        tl.store(dlogits_ptr + start + cols, g.to(dtype))
    inside = cols < num_cols - whole
    logit = tl.load(logits_ptr + whole + cols, mask=inside, other=0.0)
    g = _ce_gradient(logit, scale, shift, weight, 0.0, A, B, INV_C, LOG2_E, IS_FAST)
    tl.store(dlogits_ptr + whole + cols, g.to(dtype), mask=inside)
    # One column may be the target of several terms, so each write of it has the weights of all.
    at = tl.arange(0, 4)
    target = tl.where(at == 1, t1, tl.where(at == 2, t2, t0))
    of_target = tl.where(target == t0, w0, 0.0) + tl.where(target == t1, w1, 0.0)
    of_target += tl.where(target == t2, w2, 0.0)
    logit = tl.load(logits_ptr + target)
    g = _ce_gradient(logit, scale, shift, weight, of_target, A, B, INV_C, LOG2_E, IS_FAST)
    tl.debug_barrier()  # the first write comes from other threads
    tl.store(dlogits_ptr + target, g.to(dtype))


# ------------------------------------------------------------------------------------------------------------
# 7. softcapped_cross_entropy: launchers and op


def _ce_constants(block: int, warps: int, is_fast: bool) -> dict[str, float | int]:
    numbers = {"A": SOFTCAP_A, "B": SOFTCAP_B, "INV_C": 1.0 / SOFTCAP_C, "LOG2_E": math.log2(math.e)}
    # The interpreter, which the tests force, knows no inline assembly.
    return {**numbers, "BLOCK": block, "num_warps": warps, "IS_FAST": is_fast and not _FORCE_KERNELS}


@torch.library.custom_op("splits::softcapped_cross_entropy", mutates_args=())
def _ce(
    logits_NV: Tensor, targets_N: Tensor, positions_N: Tensor, weights_K: Tensor, is_fast: bool
) -> tuple[Tensor, Tensor]:
    logits_NV = _rows_contiguous(logits_NV)
    loss_N, lse_N = (targets_N.new_empty(len(targets_N), dtype=torch.float32) for _ in range(2))
    (n, v), stride = logits_NV.shape, logits_NV.stride(0)
    constants = _ce_constants(CE_FORWARD_BLOCK, CE_FORWARD_WARPS, is_fast)
    tensors = logits_NV, targets_N.contiguous(), positions_N.contiguous(), weights_K, loss_N, lse_N
    _ce_forward_kernel[(n,)](*tensors, 0, n, v, stride, **constants)
    return loss_N, lse_N


@_ce.register_fake
def _(logits_NV, targets_N, positions_N, weights_K, is_fast):
    n = logits_NV.shape[0]
    return logits_NV.new_empty(n, dtype=torch.float32), logits_NV.new_empty(n, dtype=torch.float32)


@torch.library.custom_op("splits::softcapped_cross_entropy_backward", mutates_args=())
def _ce_backward(
    grad_N: Tensor, lse_N: Tensor, logits_NV: Tensor, targets_N: Tensor, positions_N: Tensor,
    weights_K: Tensor, is_fast: bool,
) -> Tensor:  # fmt: skip
    logits_NV = _rows_contiguous(logits_NV)
    (n, v), stride = logits_NV.shape, logits_NV.stride(0)
    dlogits_NV = logits_NV.new_empty(n, v)
    constants = _ce_constants(CE_BACKWARD_BLOCK, CE_BACKWARD_WARPS, is_fast)
    tensors = grad_N.contiguous(), lse_N, logits_NV, targets_N.contiguous(), positions_N.contiguous()
    _ce_backward_kernel[(n,)](*tensors, weights_K, dlogits_NV, 0, n, v, stride, **constants)
    return dlogits_NV


_ce_backward.register_fake(lambda grad_N, lse_N, logits_NV, *_: logits_NV.new_empty(logits_NV.shape))


def _ce_setup(ctx, inputs, output):
    *tensors, ctx.is_fast = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _ce_autograd(ctx, grad_N, _):
    return _ce_backward(grad_N, *ctx.saved_tensors, ctx.is_fast), None, None, None, None


_ce.register_autograd(_ce_autograd, setup_context=_ce_setup)


def softcapped_cross_entropy(
    logits_NV: Tensor,  # any float dtype
    targets_N: Tensor,  # int64 or int32: the token that follows each row's token
    positions_N: Tensor,  # int32, of the row's token in its slot; no target lies beyond the slot's end
    weights_K: Tensor,  # float32, NUM_TARGETS of them, on the device of the logits; a zero term costs nothing
    is_fast: bool = True,  # the hardware's approximate tanh, for training
) -> Tensor:
    """loss_r = sum_k w_k (logsumexp(z_r) - z_r[targets_{r+k}]), float32, one a row; gradient for the logits.

    Source: modded-nanogpt pull requests 200 (softcap and multi-token prediction), 207, 217 and 251 (kernel).
    """
    if _use_kernels(logits_NV):
        return _ce(logits_NV, targets_N, positions_N, weights_K, is_fast)[0]
    return softcapped_cross_entropy_ref(logits_NV, targets_N, positions_N, weights_K)


def softcapped_nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target) of each row, float32, no gradient: the evaluation's loss."""
    with torch.no_grad():
        weights_K = (torch.arange(NUM_TARGETS, device=logits_NV.device) == 0).float()
        positions_N = torch.zeros_like(targets_N, dtype=torch.int32)  # only the term of weight zero reads on
        return softcapped_cross_entropy(logits_NV, targets_N, positions_N, weights_K, is_fast=False)


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
    num_rows, num_cols, stride_dst, stride_src, IS_ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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


def _launch_transpose(dst: Tensor, src: Tensor, is_add: bool = False) -> None:
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
    _launch_transpose(dst_VD, src_DV)


def transpose_add(a_DV: Tensor, b_VD: Tensor) -> None:
    """a += b^T in place."""
    (_transpose_add if _use_kernels(a_DV) else transpose_add_ref)(a_DV, b_VD)


def transpose_copy(dst_VD: Tensor, src_DV: Tensor) -> None:
    """dst = src^T in place."""
    (_transpose_copy if _use_kernels(dst_VD) else transpose_copy_ref)(dst_VD, src_DV)


# ------------------------------------------------------------------------------------------------------------
# 9. fp8_head_loss: the head in 8 bits and its loss, with their gradients, a chunk of rows at a time

# Work at N = 49,152, D = 768, V = 50,304: 3 products of 3.8 TFLOP, 2.4 ms each at twice the bf16 rate.
# Traffic besides: logits written and read twice, 15 GB; the e5m2 gradient written, and read and written
# transposed, 7.4 GB; together 5.2 ms. The gradient is made in forward (pull request 251), so that a chunk's
# logits are all that is kept of them, and rounded once, from float32 to e5m2 (pull request 207).
HEAD_CHUNK = 16384  # rows; fewer take less memory, and fill the GPU less well in the product for dx
HEAD_DX_FACTOR, HEAD_DW_FACTOR = E5M2_LOGITS_FACTOR * E4M3_W_FACTOR, E4M3_X_FACTOR * E5M2_LOGITS_FACTOR


def fp8_head_loss_ref(
    x8_ND: Tensor, w8_DV: Tensor, targets_N: Tensor, positions_N: Tensor, weights_K: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, dx, dw): the same rounding by plain PyTorch, everything at once."""
    shapes = (len(x8_ND), w8_DV.shape[1]), x8_ND.shape, w8_DV.shape
    logits_NV, dx_ND, dw_DV = (x8_ND.new_empty(shape, dtype=dtype) for shape in shapes)
    _matmul_fp8(x8_ND, w8_DV.T.contiguous(), LINEAR_FACTOR, logits_NV, is_fast=True)
    loss = softcapped_cross_entropy_ref(logits_NV, targets_N, positions_N, weights_K).sum()
    # By hand: autograd is switched off inside a custom op.
    z_NV = softcap(logits_NV)
    p_NV, g_NV = z_NV.softmax(dim=-1), torch.zeros_like(z_NV)
    for k in range(NUM_TARGETS):
        w_N1 = torch.where(positions_N.roll(-k) >= k, weights_K[k], 0.0)[:, None]
        g_NV += w_N1 * p_NV
        g_NV.scatter_add_(1, targets_N.roll(-k).long()[:, None], -w_N1)
    g8_NV = _eight(g_NV * z_NV * (1 - z_NV / SOFTCAP_A) / SOFTCAP_C, E5M2_LOGITS_FACTOR, E5M2)
    _matmul_fp8(g8_NV, w8_DV, HEAD_DX_FACTOR, dx_ND, is_fast=False)
    _matmul_fp8(_columns8(x8_ND), _columns8(g8_NV), HEAD_DW_FACTOR, dw_DV, is_fast=False)
    return loss, dx_ND, dw_DV


@torch.library.custom_op("splits::fp8_head_loss", mutates_args=())
def _fp8_head_loss(
    x8_ND: Tensor, w8_DV: Tensor, targets_N: Tensor, positions_N: Tensor, weights_K: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not _use_kernels(x8_ND):
        return fp8_head_loss_ref(x8_ND, w8_DV, targets_N, positions_N, weights_K, dtype)
    (n, d), v, device = x8_ND.shape, w8_DV.shape[1], x8_ND.device
    x8_DN, w8_VD = _columns8(x8_ND), _columns8(w8_DV)[:, :d]
    loss_N, lse_N = (torch.empty(n, device=device) for _ in range(2))
    rows = targets_N.contiguous(), positions_N.contiguous(), weights_K
    grad_N = torch.full_like(lse_N, E5M2_LOGITS_FACTOR)
    forward = _ce_constants(CE_FORWARD_BLOCK, CE_FORWARD_WARPS, is_fast=True)
    backward = _ce_constants(CE_BACKWARD_BLOCK, CE_BACKWARD_WARPS, is_fast=True)
    chunk = min(n, HEAD_CHUNK)
    logits_CV, g8_CV = (torch.empty(chunk, v, dtype=t, device=device) for t in (dtype, E5M2))
    g8_VN = _empty_columns(n, v, E5M2, device)
    dx_ND, dw_DV = (torch.empty(t.shape, dtype=dtype, device=device) for t in (x8_ND, w8_DV))
    for first in range(0, n, chunk):
        c, part = min(chunk, n - first), slice(first, min(first + chunk, n))
        logits, g8 = logits_CV[:c], g8_CV[:c]
        _matmul_fp8(x8_ND[part], w8_VD, LINEAR_FACTOR, logits, is_fast=True)
        _ce_forward_kernel[(c,)](logits, *rows, loss_N, lse_N, first, n, v, v, **forward)
        _ce_backward_kernel[(c,)](grad_N, lse_N, logits, *rows, g8, first, n, v, v, **backward)
        _launch_transpose(g8_VN.view(torch.int8)[:, part], g8.view(torch.int8))
        _matmul_fp8(g8, w8_DV, HEAD_DX_FACTOR, dx_ND[part], is_fast=False)
    _matmul_fp8(x8_DN, g8_VN, HEAD_DW_FACTOR, dw_DV, is_fast=False)
    return loss_N.sum(), dx_ND, dw_DV


@_fp8_head_loss.register_fake
def _(x8_ND, w8_DV, targets_N, positions_N, weights_K, dtype):
    dx_ND, dw_DV = (torch.empty_like(t, dtype=dtype) for t in (x8_ND, w8_DV))
    return x8_ND.new_empty((), dtype=torch.float32), dx_ND, dw_DV


class _Fp8HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_DV, *rows):
        loss, *grads = _fp8_head_loss(*_eights(x_ND, w_DV), *rows, x_ND.dtype)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx_ND, dw_DV = ctx.saved_tensors
        return dx_ND * grad, dw_DV * grad, None, None, None


def fp8_head_loss(
    x_ND: Tensor, w_DV: Tensor, targets_N: Tensor, positions_N: Tensor, weights_K: Tensor
) -> Tensor:
    """The sum of softcapped_cross_entropy(x W), arguments as there; x, RMS-normalised, and W rounded to e4m3,
    the gradient of the logits to e5m2. Values beyond the range saturate. On a GPU D and V are multiples of
    16, and one without FP8 raises ValueError; on a CPU the rounding is emulated.
    """
    return _Fp8HeadLoss.apply(x_ND, w_DV, targets_N, positions_N, weights_K)


# ------------------------------------------------------------------------------------------------------------
# 10. prepare_qkv: from the qkv product to what attention reads, in one pass

# Traffic: q, k or v of N = 49,152 tokens, 6 heads of 128, bf16: 75.5 MB. Forward reads three of these and
# writes three: 453 MB, 105 us; a value embedding adds one: 528 MB, 123 us. Backward reads the three gradients
# and, of qkv, q and k, and writes three: 604 MB, 140 us; a value embedding and its gradient add two: 755 MB,
# 176 us. The tables, and the rows that the key offset reads twice, come from the caches.
QKV_ROWS, QKV_WARPS = 16, 8  # 16 bytes of a tensor a thread: with more, cos and sin cross shared memory
QKV_EPS = torch.finfo(torch.float32).eps  # what F.rms_norm takes up to float32
# How the product's gradient leaves backward: as it is, or in 8 bits: 147 us, not 171, and no pass of 112.
QKV_EXACT = {"FACTOR": 1.0, "LIMIT": 0}
QKV_E5M2 = {"FACTOR": float(E5M2_GRAD_FACTOR), "LIMIT": int(torch.finfo(E5M2).max)}


def prepare_qkv_ref(
    qkv_N3HK: Tensor, cos_LK: Tensor, sin_LK: Tensor, pos_N: Tensor, ve_NHK: Tensor | None,
    gate_NH: Tensor | None, is_paired: bool, has_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    heads, dim = qkv_N3HK.shape[2:]
    at_NH = pos_N[:, None]
    if is_paired:
        at_NH = 2 * at_NH + torch.arange(heads, device=pos_N.device) % 2
    # The pairs that do not rotate have the angle 0.
    cos_NHK, sin_NHK = (F.pad(t[at_NH], (0, dim // 4), value=v) for t, v in ((cos_LK, 1.0), (sin_LK, 0.0)))

    def rotate(x_NHK: Tensor) -> Tensor:
        even, odd = x_NHK.unflatten(-1, (-1, 2)).unbind(-1)
        turned = even * cos_NHK + odd * sin_NHK, odd * cos_NHK - even * sin_NHK
        return torch.stack(turned, dim=-1).flatten(-2)

    (q_NHK, k_NHK, v_NHK), eps = qkv_N3HK.unbind(1), torch.finfo(torch.float32).eps  # QKV_EPS, a constant
    q_NHK, k_NHK = (rotate(F.rms_norm(z_NHK, (dim,), eps=eps)) for z_NHK in (q_NHK, k_NHK))
    if has_offset:
        begins_N = pos_N == 0
        if is_paired:  # a token is two rows of half the heads; only the first can begin a slot
            begins_N = torch.stack((begins_N, torch.zeros_like(begins_N)), dim=1).flatten()
        turning, still = k_NHK.view(begins_N.shape[0], -1, dim).chunk(2, dim=-1)
        still = torch.where(begins_N[:, None, None], still, torch.cat((still[:1], still[:-1])))
        k_NHK = torch.cat((turning, still), dim=-1).view(k_NHK.shape)
    if ve_NHK is not None:
        v_NHK = v_NHK + (2 * torch.sigmoid(gate_NH)).unsqueeze(-1) * ve_NHK
    return q_NHK, k_NHK, v_NHK.contiguous()


@jit
def _qkv_at(rows, K: tl.constexpr):
    """(ROWS, K) offsets of whole rows of K."""
    return rows.to(tl.int64)[:, None] * K + tl.arange(0, K)[None, :]  # elements may exceed 2^31


@jit
def _qkv_begins(rows, pos_ptr, H: tl.constexpr, SHIFT: tl.constexpr):
    """Whether the slot has no row SHIFT before."""
    return (tl.load(pos_ptr + rows // H) == 0) & (rows % H < SHIFT)


@jit
def _qkv_angles(rows, cos_ptr, sin_ptr, pos_ptr, H: tl.constexpr, K: tl.constexpr, IS_PAIRED: tl.constexpr):
    """(ROWS, K / 2) float32 cosines and sines; of the angle 0 for the pairs that do not rotate."""
    pos = tl.load(pos_ptr + rows // H)
    if IS_PAIRED:
        pos = 2 * pos + rows % H % 2
    pairs = tl.arange(0, K // 2)[None, :]
    at = pos[:, None] * (K // 4) + pairs
    cos = tl.load(cos_ptr + at, mask=pairs < K // 4, other=1.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=pairs < K // 4, other=0.0).to(tl.float32)


@jit
def _qkv_rotate(x, cos, sin):
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.interleave(even * cos + odd * sin, odd * cos - even * sin)


@jit
def _qkv_unit(x, EPS: tl.constexpr):
    """x over its root mean square, and the factor that did it, in float32."""
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / x.shape[1] + EPS)[:, None]
    return x * scale, scale


@jit
def _qkv_unit_backward(x, dy, EPS: tl.constexpr):
    unit, scale = _qkv_unit(x, EPS)
    return scale * (dy - unit * (tl.sum(dy * unit, axis=1) / x.shape[1])[:, None])


@jit
def _qkv_store_gradient(ptrs, x, inside, FACTOR: tl.constexpr, LIMIT: tl.constexpr):
    if LIMIT:
        x = _saturate(x.to(tl.float32) * FACTOR, LIMIT)
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), mask=inside[:, None])


@jit
def _prepare_qkv_kernel(
    qkv_ptr,  # (N, 3, H, K) contiguous
    cos_ptr, sin_ptr, pos_ptr, ve_ptr, gate_ptr,  # contiguous; the last two may be None
    q_ptr, k_ptr, v_ptr,  # (N, H, K) contiguous
    num_rows,  # N * H
    H: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, IS_PAIRED: tl.constexpr,
    SHIFT: tl.constexpr,  # 0, or from how many rows back a key's still half comes
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, of one head and token each; those beyond the last read the last and are not stored."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < num_rows)[:, None]
    rows = tl.minimum(rows, num_rows - 1)
    at, qkv_at = _qkv_at(rows, K), _qkv_at(rows + rows // H * (2 * H), K)
    q, k = tl.load(qkv_ptr + qkv_at), tl.load(qkv_ptr + H * K + qkv_at)
    v = tl.load(qkv_ptr + 2 * H * K + qkv_at)
    cos, sin = _qkv_angles(rows, cos_ptr, sin_ptr, pos_ptr, H, K, IS_PAIRED)
    q, _ = _qkv_unit(q, EPS)
    k, _ = _qkv_unit(k, EPS)
    if SHIFT:
        source = tl.where(_qkv_begins(rows, pos_ptr, H, SHIFT), rows, rows - SHIFT)
        before = tl.load(qkv_ptr + H * K + _qkv_at(source + source // H * (2 * H), K))
        before, _ = _qkv_unit(before, EPS)
        k = tl.where(tl.arange(0, K)[None, :] < K // 2, k, before)
    if ve_ptr is not None:
        gate = tl.sigmoid(tl.load(gate_ptr + rows).to(tl.float32))[:, None]
        v = v.to(tl.float32) + 2.0 * gate * tl.load(ve_ptr + at).to(tl.float32)
    dtype = q_ptr.dtype.element_ty
    tl.store(q_ptr + at, _qkv_rotate(q, cos, sin).to(dtype), mask=inside)
    tl.store(k_ptr + at, _qkv_rotate(k, cos, sin).to(dtype), mask=inside)
    tl.store(v_ptr + at, v.to(dtype), mask=inside)


@jit
def _prepare_qkv_backward_kernel(
    qkv_ptr, cos_ptr, sin_ptr, pos_ptr, ve_ptr, gate_ptr,  # as forward's
    dq_ptr, dk_ptr, dv_ptr,  # (N, H, K) contiguous
    dqkv_ptr, dve_ptr, dgate_ptr,  # like qkv, ve and gate; dqkv in FP8 where LIMIT is given
    num_rows,
    H: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, IS_PAIRED: tl.constexpr, SHIFT: tl.constexpr,
    ROWS: tl.constexpr, FACTOR: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Rotation transposed, then dx = (dy - u mean(dy u)) / rms(x) with u = x / rms(x); rows as forward's."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    rows = tl.minimum(rows, num_rows - 1)
    at, qkv_at = _qkv_at(rows, K), _qkv_at(rows + rows // H * (2 * H), K)
    q, k = tl.load(qkv_ptr + qkv_at), tl.load(qkv_ptr + H * K + qkv_at)
    dq, dv = tl.load(dq_ptr + at).to(tl.float32), tl.load(dv_ptr + at)
    if SHIFT:  # a still half went SHIFT rows on, if that does not begin a slot; stayed too, if this one does
        is_turning = tl.arange(0, K)[None, :] < K // 2
        begins = _qkv_begins(rows, pos_ptr, H, SHIFT)[:, None]
        dk = tl.load(dk_ptr + at, mask=is_turning | begins, other=0.0).to(tl.float32)
        after = tl.minimum(rows + SHIFT, num_rows - 1)
        went = (rows + SHIFT < num_rows) & ~_qkv_begins(after, pos_ptr, H, SHIFT)
        dk += tl.load(dk_ptr + _qkv_at(after, K), mask=~is_turning & went[:, None], other=0.0).to(tl.float32)
    else:
        dk = tl.load(dk_ptr + at).to(tl.float32)
    cos, sin = _qkv_angles(rows, cos_ptr, sin_ptr, pos_ptr, H, K, IS_PAIRED)
    if ve_ptr is not None:
        gate = tl.sigmoid(tl.load(gate_ptr + rows).to(tl.float32))
        dve = 2.0 * gate[:, None] * dv.to(tl.float32)
        dgate = (1.0 - gate) * tl.sum(dve * tl.load(ve_ptr + at).to(tl.float32), axis=1)
        tl.store(dve_ptr + at, dve.to(dve_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(dgate_ptr + rows, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    _qkv_store_gradient(dqkv_ptr + 2 * H * K + qkv_at, dv, inside, FACTOR, LIMIT)
    dq = _qkv_unit_backward(q, _qkv_rotate(dq, cos, -sin), EPS)
    dk = _qkv_unit_backward(k, _qkv_rotate(dk, cos, -sin), EPS)
    _qkv_store_gradient(dqkv_ptr + qkv_at, dq, inside, FACTOR, LIMIT)
    _qkv_store_gradient(dqkv_ptr + H * K + qkv_at, dk, inside, FACTOR, LIMIT)


# ------------------------------------------------------------------------------------------------------------
# 11. prepare_qkv: launchers and op


def _qkv_constants(heads: int, dim: int, is_paired: bool, has_offset: bool) -> dict[str, float | int]:
    shift = (heads // 2 if is_paired else heads) if has_offset else 0
    sizes = {"H": heads, "K": dim, "EPS": QKV_EPS, "IS_PAIRED": is_paired, "SHIFT": shift}
    return {**sizes, "ROWS": QKV_ROWS, "num_warps": QKV_WARPS}


def _launch_qkv(kernel, inputs, outputs, is_paired: bool, has_offset: bool, **more: float) -> None:
    n, _, heads, dim = inputs[0].shape
    inputs = [x if x is None else x.contiguous() for x in inputs]
    constants = _qkv_constants(heads, dim, is_paired, has_offset) | more
    kernel[(_cdiv(n * heads, QKV_ROWS),)](*inputs, *outputs, n * heads, **constants)


def _qkv_outputs(qkv_N3HK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, _, heads, dim = qkv_N3HK.shape
    return tuple(qkv_N3HK.new_empty(n, heads, dim) for _ in range(3))


def _qkv_gradients(
    qkv_N3HK: Tensor, ve_NHK: Tensor | None, gate_NH: Tensor | None, is_fp8: bool
) -> tuple[Tensor, ...]:
    """Memory for gradients; an op cannot return None, so an empty tensor for what there is not."""
    dve = (qkv_N3HK.new_empty((0,) if x is None else x.shape) for x in (ve_NHK, gate_NH))
    return qkv_N3HK.new_empty(qkv_N3HK.shape, dtype=E5M2 if is_fp8 else None), *dve


@torch.library.custom_op("splits::prepare_qkv", mutates_args=())
def _prepare_qkv(
    qkv_N3HK: Tensor, cos_LK: Tensor, sin_LK: Tensor, pos_N: Tensor, ve_NHK: Tensor | None,
    gate_NH: Tensor | None, is_paired: bool, has_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs, outputs = (qkv_N3HK, cos_LK, sin_LK, pos_N, ve_NHK, gate_NH), _qkv_outputs(qkv_N3HK)
    _launch_qkv(_prepare_qkv_kernel, inputs, outputs, is_paired, has_offset)
    return outputs


_prepare_qkv.register_fake(lambda qkv_N3HK, *_: _qkv_outputs(qkv_N3HK))


@torch.library.custom_op("splits::prepare_qkv_backward", mutates_args=())
def _prepare_qkv_backward(
    dq_NHK: Tensor, dk_NHK: Tensor, dv_NHK: Tensor, qkv_N3HK: Tensor, cos_LK: Tensor, sin_LK: Tensor,
    pos_N: Tensor, ve_NHK: Tensor | None, gate_NH: Tensor | None, is_paired: bool, has_offset: bool,
    is_fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dqkv, dve, dgate); dqkv times E5M2_GRAD_FACTOR in e5m2, or as qkv."""
    inputs = qkv_N3HK, cos_LK, sin_LK, pos_N, ve_NHK, gate_NH, dq_NHK, dk_NHK, dv_NHK
    outputs = _qkv_gradients(qkv_N3HK, ve_NHK, gate_NH, is_fp8)
    kernel, rounding = _prepare_qkv_backward_kernel, QKV_E5M2 if is_fp8 else QKV_EXACT
    _launch_qkv(kernel, inputs, outputs, is_paired, has_offset, **rounding)
    return outputs


@_prepare_qkv_backward.register_fake
def _(dq_NHK, dk_NHK, dv_NHK, qkv_N3HK, cos_LK, sin_LK, pos_N, ve_NHK, gate_NH, *flags):
    return _qkv_gradients(qkv_N3HK, ve_NHK, gate_NH, flags[-1])


def _prepare_qkv_setup(ctx, inputs, output):
    *tensors, ctx.is_paired, ctx.has_offset = inputs
    ctx.save_for_backward(*tensors)


def _prepare_qkv_autograd(ctx, *grads_NHK):
    saved = ctx.saved_tensors
    dqkv_N3HK, *dve = _prepare_qkv_backward(*grads_NHK, *saved, ctx.is_paired, ctx.has_offset, False)
    return dqkv_N3HK, None, None, None, *((None, None) if saved[4] is None else dve), None, None


_prepare_qkv.register_autograd(_prepare_qkv_autograd, setup_context=_prepare_qkv_setup)


def prepare_qkv(
    qkv_N3HK: Tensor,  # the product's output, viewed; K a power of two on a GPU
    cos_LK: Tensor,  # (L, K / 4) rotary tables; no gradient
    sin_LK: Tensor,
    pos_N: Tensor,  # int32: position of the row's token in its slot; 0 begins a slot
    ve_NHK: Tensor | None,  # value embedding
    gate_NH: Tensor | None,  # its logits: v + 2 sigmoid(gate) ve
    is_paired: bool,  # head h has position 2 pos + h % 2, not pos
    has_offset: bool,  # the half of a key that does not rotate comes from the token before in the slot
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), each (N, H, K) contiguous: q and k with RMS 1, adjacent pairs of their first half rotated.

    Kernels compute in float32 and round once. With both flags the offset is one row of the paired sequence
    (2N, H / 2, K), half a token. Source: modded-nanogpt records with rotary, paired heads and key offset.
    """
    op = _prepare_qkv if _use_kernels(qkv_N3HK) else prepare_qkv_ref
    return op(qkv_N3HK, cos_LK, sin_LK, pos_N, ve_NHK, gate_NH, is_paired, has_offset)


def linear_qkv(x_ND: Tensor, w_CD: Tensor, cos_LK: Tensor, *where) -> tuple[Tensor, Tensor, Tensor]:
    """prepare_qkv of x W^T, whose C columns are q, k, v of all heads; `where` from sin_LK on as there."""
    return prepare_qkv(F.linear(x_ND, w_CD).view(-1, *_qkv_shape(w_CD, cos_LK)), cos_LK, *where)


def _qkv_shape(w_CD: Tensor, cos_LK: Tensor) -> tuple[int, int, int]:
    dim = 4 * cos_LK.shape[1]
    return 3, w_CD.shape[0] // (3 * dim), dim


class _Fp8LinearQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_CD, cos_LK, sin_LK, pos_N, ve_NHK, gate_NH, is_paired, has_offset):
        x8_ND, w8_CD = _eights(x_ND, w_CD)
        qkv_NC = _product8(x8_ND, w8_CD, LINEAR_FACTOR, is_fast=True, dtype=x_ND.dtype)
        kept = qkv_NC.view(-1, *_qkv_shape(w_CD, cos_LK)), cos_LK, sin_LK, pos_N, ve_NHK, gate_NH
        ctx.save_for_backward(x8_ND, w8_CD, *kept)
        ctx.flags = is_paired, has_offset
        return _prepare_qkv(*kept, is_paired, has_offset)

    @staticmethod
    def backward(ctx, *grads_NHK):
        x8_ND, w8_CD, *kept = ctx.saved_tensors
        dqkv8_N3HK, *dve = _prepare_qkv_backward(*grads_NHK, *kept, *ctx.flags, True)
        g8_NC, dtype = dqkv8_N3HK.flatten(1), grads_NHK[0].dtype
        dx_ND, dw_CD = _fp8_dx(g8_NC, w8_CD, dtype), _fp8_dw(g8_NC, x8_ND, dtype)
        return dx_ND, dw_CD, None, None, None, *((None, None) if kept[4] is None else dve), None, None


def fp8_linear_qkv(x_ND: Tensor, w_CD: Tensor, cos_LK: Tensor, *where) -> tuple[Tensor, Tensor, Tensor]:
    """linear_qkv with its three products in FP8; shapes and ranges as fp8_linear's."""
    if _use_kernels(x_ND):
        return _Fp8LinearQkv.apply(x_ND, w_CD, cos_LK, *where)
    qkv_NC = _Fp8Linear.apply(x_ND, w_CD, True)  # has_dw8
    return prepare_qkv_ref(qkv_NC.view(-1, *_qkv_shape(w_CD, cos_LK)), cos_LK, *where)


# ------------------------------------------------------------------------------------------------------------
# 12. attention: causal, inside documents, at most `window` positions back


def _with_previous(x_CQ: Tensor, fill: float) -> Tensor:
    """Blocks (C, Q, ...) -> (C, 2Q, ...): each behind the block before it, the first behind `fill`."""
    return torch.cat([torch.cat([torch.full_like(x_CQ[:1], fill), x_CQ[:-1]]), x_CQ], dim=1)


def attention_ref(
    q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, cu_seqlens: Tensor, window: Tensor, scale: Tensor,
    max_window: int,
) -> Tensor:  # fmt: skip
    """Plain masked attention; blocks of max(128, max_window) queries see their own and the previous block.

    Memory is 2 * block bytes of mask a token. q * scale is rounded to the dtype of q before the product; the
    fused kernels scale float32 scores: up to 2^-9 of relative difference in bf16, none for powers of two.
    """
    tokens = q_NHK.shape[0]
    positions_N = torch.arange(tokens, device=q_NHK.device, dtype=cu_seqlens.dtype)
    docs_N = torch.bucketize(positions_N, cu_seqlens[1:], right=True)
    block = min(max(128, max_window), tokens)
    blocks = -(-tokens // block)

    def split(x_N: Tensor, fill: float) -> Tensor:
        widths = (0, 0) * (x_N.ndim - 1) + (0, blocks * block - tokens)
        return F.pad(x_N, widths, value=fill).unflatten(0, (blocks, block))

    q_CQ, k_CS, v_CS = (split(x, 0.0) for x in (q_NHK * scale, k_NHK, v_NHK))
    docs_CQ = docs_CS = split(docs_N, -1)
    if blocks > 1:
        k_CS, v_CS, docs_CS = (
            _with_previous(x, fill) for x, fill in ((k_CS, 0.0), (v_CS, 0.0), (docs_CS, -2))
        )
    span = k_CS.shape[1]
    offsets = torch.arange(span, device=q_NHK.device)
    lag_QS = offsets[span - block :, None] - offsets
    near_QS = (lag_QS >= 0) & (lag_QS <= window)
    mask_CQS = near_QS & (docs_CQ[..., :, None] == docs_CS[..., None, :])
    q, k, v = (x.transpose(1, 2) for x in (q_CQ, k_CS, v_CS))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_CQS[:, None], scale=1.0)
    return y.transpose(1, 2).flatten(0, 1)[:tokens]


# ------------------------------------------------------------------------------------------------------------
# 13. attention on GPUs: FlashAttention-4 and -2 as opaque ops

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
# 14. attention: the choice of a backend

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
    q_NHK: Tensor,  # slots one after another
    k_NHK: Tensor,
    v_NHK: Tensor,
    cu_seqlens: Tensor,  # int32 (documents + 1,), starts of documents in the N tokens; ends padded with N;
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
        if backend not in ATTENTION_BACKENDS or _backend_problem(backend, q_NHK.device, q_NHK.dtype):
            _refuse_backend(backend, q_NHK.device, q_NHK.dtype)
        if backend == "reference" and int(window) > max_window:
            raise ValueError(f"window {int(window)} is over max_window {max_window}: raise max_window")
    if backend == "reference":
        return attention_ref(q_NHK, k_NHK, v_NHK, cu_seqlens, window, scale, max_window)
    op = _attention_fa4 if backend == "fa4" else _varlen
    return op(q_NHK, k_NHK, v_NHK, cu_seqlens, max_seqlen, window, scale)[0]
