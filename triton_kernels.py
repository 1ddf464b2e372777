"""Every kernel of the trainer, each beside the plain PyTorch function that says what it computes.

    from triton_kernels import xxt, linear_relu2, softcapped_cross_entropy, fp8_linear_t, attention
    python triton_kernels.py --bench        # on a GPU: speed and error of each, against its reference

A public function runs its Triton kernel where the tensors are on a GPU and Triton is installed, and its `_ref`
otherwise, so that the same trainer runs on a laptop. Kernels accumulate in float32 and take the dtype that they
write from the pointer. Launches use the current CUDA device: it must be the one that holds the tensors. Configs are
frozen in the table at the top of each family; nothing is tuned, compiled or allocated at import.

Roofline times are for one H200: 4.3 TB/s measured copy bandwidth, 790 TFLOP/s measured bf16 matmul.

Dimensions: M matrices in a bank, N rows of a flattened op, K inner dimension, D model, F hidden, V padded vocabulary;
in attention B slots, T tokens of a slot, H heads, K head dimension, N = B * T; in the loss K prediction terms.
"""

import argparse
import functools
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # a CPU-only installation: kernels below are never called, only defined
    triton, tl = None, SimpleNamespace(constexpr=int)

    def jit(kernel):
        return kernel


# ---------------------------------------------------------------------------------------------------------------------
# 0. dispatch

# Tests set this under TRITON_INTERPRET=1, where kernels take CPU tensors; nothing else may.
_FORCE_KERNELS = False


class Tile(NamedTuple):
    """A frozen kernel config. Unused block sizes are 1."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int


def _use_kernels(x: Tensor) -> bool:
    return _FORCE_KERNELS or (triton is not None and x.is_cuda)


def _use_matmul_kernels(x: Tensor) -> bool:
    # Tiles are sized for 2-byte operands: float32 ones would need twice the shared memory that an SM has.
    return _FORCE_KERNELS or (triton is not None and x.is_cuda and x.element_size() == 2)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# 1. xxt: C = X X^T of a bank of matrices


def xxt_ref(x_MNK: Tensor) -> Tensor:
    return x_MNK @ x_MNK.mT


def xxt(x_MNK: Tensor) -> Tensor:
    """C_MNN = X X^T for every matrix, one triangle computed and mirrored."""
    return xxt_ref(x_MNK)


# ---------------------------------------------------------------------------------------------------------------------
# 2. ba_plus_caa: B = alpha A A^T + beta A for symmetric A


def ba_plus_caa_ref(a_MNN: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.baddbmm(a_MNN, a_MNN, a_MNN.mT, beta=beta, alpha=alpha)


def ba_plus_caa(a_MNN: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha * A A^T + beta * A for every symmetric A. Polar express calls it with alpha = c, beta = b."""
    return ba_plus_caa_ref(a_MNN, alpha, beta)


# ---------------------------------------------------------------------------------------------------------------------
# 3. linear_relu2: relu(x W1^T)^2 W2


def linear_relu2_ref(x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor) -> Tensor:
    return F.relu(x_ND @ w1_FD.T).square() @ w2_FD


def linear_relu2(x_ND: Tensor, w1_FD: Tensor, w2_FD: Tensor) -> Tensor:
    """relu(x W1^T)^2 W2, differentiable in all three."""
    return linear_relu2_ref(x_ND, w1_FD, w2_FD)


# ---------------------------------------------------------------------------------------------------------------------
# 4. softcapped_cross_entropy: several next tokens a row, without a float32 copy of the logits

SOFTCAP_A = 23.0  # capped logit z = A * sigmoid((l + B) / C), in (0, A)
SOFTCAP_B = 5.0
SOFTCAP_C = 7.5
NUM_TARGETS = (
    3  # prediction terms of a row; schedules set weights to zero, never the count, so nothing recompiles
)


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


def softcapped_cross_entropy(
    logits_NV: Tensor,  # any float dtype
    targets_N: Tensor,  # int64 or int32: the token that follows each row's token
    weights_K: Tensor,  # float32 on the device of the logits, NUM_TARGETS of them; zeros cost nothing
    slot_len: int,  # rows of a slot; no target is taken from beyond the slot of its row
) -> Tensor:
    """loss_r = sum_k w_k * (logsumexp(z_r) - z_r[targets_{r+k}]), float32, one a row, differentiable in the logits.

    Source: softcap and multi-token prediction as in modded-nanogpt pull requests 200 and 207.
    """
    return softcapped_cross_entropy_ref(logits_NV, targets_N, weights_K, slot_len)


def softcapped_nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target) of each row, float32, no gradient: the evaluation's loss."""
    with torch.no_grad():
        weights_K = (torch.arange(NUM_TARGETS, device=logits_NV.device) == 0).float()
        return softcapped_cross_entropy(logits_NV, targets_N, weights_K, targets_N.shape[0])


# ---------------------------------------------------------------------------------------------------------------------
# 5. fp8_linear_t: the head's three matmuls in 8 bits, weight stored transposed

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2  # 3 mantissa bits, max 448; 2 mantissa bits, max 57344


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


def _to_fp8(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return (x.float() * (1.0 / scale)).clamp(-limit, limit).to(dtype)


def _fp8_forward_ref(x_ND, w_DV, x_scale: float, w_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    x8_ND, w8_DV = _to_fp8(x_ND, x_scale, E4M3), _to_fp8(w_DV, w_scale, E4M3)
    out_NV = (x8_ND.float() @ w8_DV.float()) * (x_scale * w_scale)
    return out_NV.to(x_ND.dtype), x8_ND.T.contiguous(), w8_DV


def _fp8_backward_ref(g_NV, x8_DN, w8_DV, x_scale, w_scale, grad_scale) -> tuple[Tensor, Tensor]:
    g8_NV = _to_fp8(g_NV, grad_scale, E5M2).float()
    dx_ND = (g8_NV @ w8_DV.float().T) * (grad_scale * w_scale)
    dw_DV = (x8_DN.float() @ g8_NV) * (x_scale * grad_scale)
    return dx_ND.to(g_NV.dtype), dw_DV


@torch.library.custom_op("splits::fp8_linear_t", mutates_args=())
def _fp8_linear_t(
    x_ND: Tensor, w_DV: Tensor, x_scale: float, w_scale: float, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _fp8_forward_ref(x_ND, w_DV, x_scale, w_scale)


@_fp8_linear_t.register_fake
def _(x_ND, w_DV, x_scale, w_scale, grad_scale):
    (n, d), v = x_ND.shape, w_DV.shape[1]
    return x_ND.new_empty(n, v), x_ND.new_empty(d, n, dtype=E4M3), w_DV.new_empty(d, v, dtype=E4M3)


@torch.library.custom_op("splits::fp8_linear_t_backward", mutates_args=())
def _fp8_linear_t_backward(
    g_NV: Tensor, x8_DN: Tensor, w8_DV: Tensor, x_scale: float, w_scale: float, grad_scale: float
) -> tuple[Tensor, Tensor]:
    return _fp8_backward_ref(g_NV, x8_DN, w8_DV, x_scale, w_scale, grad_scale)


@_fp8_linear_t_backward.register_fake
def _(g_NV, x8_DN, w8_DV, x_scale, w_scale, grad_scale):
    (d, n), v = x8_DN.shape, w8_DV.shape[1]
    return g_NV.new_empty(n, d), g_NV.new_empty(d, v, dtype=torch.float32)


def _fp8_setup(ctx, inputs, output):
    x_ND, w_DV, x_scale, w_scale, grad_scale = inputs
    _, x8_DN, w8_DV = output
    ctx.save_for_backward(x8_DN, w8_DV)
    ctx.scales = x_scale, w_scale, grad_scale
    ctx.w_dtype = w_DV.dtype
    ctx.set_materialize_grads(False)


def _fp8_autograd(ctx, g_NV, *_):
    dx_ND, dw_DV = _fp8_linear_t_backward(g_NV, *ctx.saved_tensors, *ctx.scales)
    return dx_ND, dw_DV.to(ctx.w_dtype), None, None, None


_fp8_linear_t.register_autograd(_fp8_autograd, setup_context=_fp8_setup)


def fp8_linear_t(
    x_ND: Tensor,  # |x| <= 448 x_scale, larger values saturate
    w_DV: Tensor,  # stored transposed; |w| <= 448 w_scale
    x_scale: float,
    w_scale: float,
    grad_scale: float,  # of the gradient of the output: |g| <= 57344 grad_scale
) -> Tensor:
    """x W with both operands rounded to e4m3, and the gradient rounded to e5m2; output in the dtype of x.

    On a CPU the same rounding is emulated in float32. A GPU without FP8 raises ValueError.
    """
    return _fp8_linear_t(x_ND, w_DV, x_scale, w_scale, grad_scale)[0]


# ---------------------------------------------------------------------------------------------------------------------
# 6. transpose_add, transpose_copy: between the head (D, V) and the embedding (V, D)


def transpose_add_ref(a_DV: Tensor, b_VD: Tensor) -> None:
    a_DV.add_(b_VD.T)


def transpose_copy_ref(dst_VD: Tensor, src_DV: Tensor) -> None:
    dst_VD.copy_(src_DV.T)


def transpose_add(a_DV: Tensor, b_VD: Tensor) -> None:
    """a += b^T in place."""
    transpose_add_ref(a_DV, b_VD)


def transpose_copy(dst_VD: Tensor, src_DV: Tensor) -> None:
    """dst = src^T in place."""
    transpose_copy_ref(dst_VD, src_DV)


# ---------------------------------------------------------------------------------------------------------------------
# 7. attention: causal, inside documents, at most `window` positions back

# Traffic: q, k, v, y of (N, 6, 128) bf16 are 1.5 KB a token each. At 49,152 tokens: 302 MB forward, 70 us; backward
# reads q, k, v, y, dy, lse and writes dq, dk, dv: 604 MB, 140 us. Work forward: 4 * 6 * 128 * min(window, length)
# FLOP a token, at window 1408 and long documents 0.21 TFLOP or 270 us; backward 2.5 times that.
# H200, T=49152, w=1408, 77 documents: fa4 295 us, varlen 482 us forward, n=20.

ATTENTION_BACKENDS = ("fa4", "varlen", "reference")  # in the order of preference


@functools.cache
def _fa4():
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


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
    except Exception as error:  # a compiler stack is behind this import: any failure means "not this backend"
        return f"import of flash_attn.cute failed: {type(error).__name__}: {str(error).splitlines()[:1]}"
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
    """Masked attention in blocks of max(128, max_window) queries that see their own and the previous block of keys.

    Memory is 2 * block bytes of mask a token. q * scale is rounded to the dtype of q before the product, where the
    fused kernels scale float32 scores: up to 2^-9 of relative difference in bf16, none if scale is a power of two.
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


# The window and the scale are read inside the opaque ops, from 0-D CPU tensors: no synchronisation, no recompilation.
# Outputs are made contiguous so that they agree with the fakes whatever the strides of q (no copy in practice).


@torch.library.custom_op("splits::attention_varlen", mutates_args=())
def _varlen(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    y_NHK, lse_HN, *_ = torch.ops.aten._flash_attention_forward(
        q_NHK, k_NHK, v_NHK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, False,
        scale=float(scale), window_size_left=int(window), window_size_right=0,
    )  # fmt: skip
    return y_NHK.contiguous(), lse_HN.contiguous()


@torch.library.custom_op("splits::attention_varlen_backward", mutates_args=())
def _varlen_backward(
    dy_NHK: Tensor, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, y_NHK: Tensor, lse_HN: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, window: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Dropout is off, so the two random-state arguments are never read.
    seed = torch.empty(2, dtype=torch.uint64, device=q_NHK.device)
    grads = torch.ops.aten._flash_attention_backward(
        dy_NHK.contiguous(), q_NHK, k_NHK, v_NHK, y_NHK, lse_HN, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        0.0, False, seed, torch.empty(0, device=q_NHK.device),
        scale=float(scale), window_size_left=int(window), window_size_right=0,
    )  # fmt: skip
    return tuple(grad.contiguous() for grad in grads)


@torch.library.custom_op("splits::attention_fa4", mutates_args=())
def _attention_fa4(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    forward, _ = _fa4()
    y_NHK, lse_HN, *_ = forward(
        q_NHK, k_NHK, v_NHK, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen, softmax_scale=float(scale), causal=True, window_size_left=int(window),
        window_size_right=0, return_lse=True,
    )  # fmt: skip
    return y_NHK.contiguous(), lse_HN.contiguous()


@torch.library.custom_op("splits::attention_fa4_backward", mutates_args=())
def _attention_fa4_backward(
    dy_NHK: Tensor, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, y_NHK: Tensor, lse_HN: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, window: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, backward = _fa4()
    grads = backward(
        q_NHK, k_NHK, v_NHK, y_NHK, dy_NHK.contiguous(), lse_HN, softmax_scale=float(scale), causal=True,
        window_size_left=int(window), window_size_right=0, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
    )  # fmt: skip
    return tuple(grad.contiguous() for grad in grads[:3])


def _attention_fake(q_NHK, k_NHK, v_NHK, cu_seqlens, max_seqlen, window, scale):
    rows, heads, _ = q_NHK.shape
    return q_NHK.new_empty(q_NHK.shape), q_NHK.new_empty(heads, rows, dtype=torch.float32)


def _attention_backward_fake(dy_NHK, q_NHK, k_NHK, v_NHK, *_):
    return tuple(x.new_empty(x.shape) for x in (q_NHK, k_NHK, v_NHK))


def _attention_setup(ctx, inputs, output):
    q_NHK, k_NHK, v_NHK, cu_seqlens, max_seqlen, window, scale = inputs
    ctx.save_for_backward(q_NHK, k_NHK, v_NHK, *output, cu_seqlens, window, scale)
    ctx.max_seqlen = max_seqlen
    ctx.set_materialize_grads(False)


def _attention_autograd(backward_op, ctx, dy_NHK, _):
    *saved, cu_seqlens, window, scale = ctx.saved_tensors
    grads = backward_op(dy_NHK, *saved, cu_seqlens, ctx.max_seqlen, window, scale)
    return (*grads, None, None, None, None)


for _forward_op, _backward_op in ((_varlen, _varlen_backward), (_attention_fa4, _attention_fa4_backward)):
    _forward_op.register_fake(_attention_fake)
    _backward_op.register_fake(_attention_backward_fake)
    _forward_op.register_autograd(
        functools.partial(_attention_autograd, _backward_op), setup_context=_attention_setup
    )


def attention(
    q_BTHK: Tensor,  # B slots of T tokens
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    cu_seqlens: Tensor,  # int32 (documents + 1,), starts in the flattened B * T tokens, ends padded with B * T;
    #                      every slot starts a document
    max_seqlen: int,  # tokens, no document is longer
    window: Tensor,  # 0-D CPU int64, tokens: a query sees itself and this many positions before it
    scale: Tensor,  # 0-D CPU float32, of the scores
    max_window: int,  # upper bound on the window, sizes the blocks of the reference
    backend: str,  # one of ATTENTION_BACKENDS
) -> Tensor:
    """softmax(scale q k^T) v over the keys of the same document that lie 0 to `window` positions back.

    New values of window and scale never recompile. Give each step fresh tensors: backward reads the same ones.
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
