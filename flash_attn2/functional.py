"""The functions of the flash-attn package (2.8): its names, arguments, defaults and layouts.

On CUDA tensors (fp16 or bf16, head dims at most 256) they run the kernels; on CPU tensors (any
floating dtype and head dims) the same tiled algorithm in PyTorch. Memory is linear in the sequence
length. They trace under torch.compile and torch.export, and are differentiable once.

Common arguments:
    dropout_p: must be 0.0; other values raise NotImplementedError.
    softmax_scale: factor of the scores; default 1 / sqrt(q's head_dim).
    causal: query i sees the keys up to its own position p = i + sk - sq (the mask is aligned to
        the bottom right corner). A row that sees no key gives zeros.
    window_size: (left, right), or a CPU tensor of two elements: query i sees the keys in
        [p - left, p + right]; a negative number is unbounded. With causal, right is 0.
    softcap: must be 0.0; other values raise NotImplementedError.
    alibi_slopes: must be None; other values raise NotImplementedError.
    deterministic: dq, too, is bitwise reproducible (the output, dk and dv always are).
    return_attn_probs: return (out, lse, S_dmask) and not out alone. lse, (b, h, sq), fp32 (fp64 for
        fp64 inputs), is the natural log of the sum of exp(scaled scores), -inf for a row that sees
        no key; it is differentiable. S_dmask is an empty tensor of shape (0,).

Under autocast the inputs are cast to its dtype. Errors are RuntimeErrors (NotImplementedError for
what is not there yet) that name the argument, its value and the limit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops  # noqa: F401 (registers torch.ops.flash_attn2)

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"]

_forward = torch.ops.flash_attn2.forward.default

# CUDA kernels read rows in 16-byte pieces: other head dims are padded with zeros, up to the limit.
_HEAD_DIM_MULTIPLE = 8
_HEAD_DIM_LIMIT = 256


def _refuse(dropout_p, softcap, alibi_slopes) -> None:
    """Raises for the arguments that are not implemented."""
    if dropout_p != 0.0:
        raise NotImplementedError(f"dropout_p: is {dropout_p}, only 0.0 is implemented")
    if softcap != 0.0:
        raise NotImplementedError(f"softcap: is {softcap}, only 0.0 is implemented")
    if alibi_slopes is not None:
        shape = tuple(getattr(alibi_slopes, "shape", ()))
        raise NotImplementedError(
            f"alibi_slopes: is a tensor of shape {shape}, only None is implemented"
        )


def _window(window_size) -> tuple[int, int]:
    """(left, right) of a pair or of a tensor of two elements; -1 is unbounded."""
    if isinstance(window_size, Tensor):
        window_size = window_size.tolist()
    if len(window_size) != 2:
        raise RuntimeError(f"window_size: has {len(window_size)} elements, it must have 2")
    left, right = window_size
    return (-1 if left < 0 else int(left)), (-1 if right < 0 else int(right))


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an input of a matrix product: fp64 and integers stay."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _padded(x: Tensor) -> Tensor:
    pad = -x.shape[-1] % _HEAD_DIM_MULTIPLE
    return F.pad(x, (0, pad)) if pad > 0 else x


def _padded_forward(q, k, v, softmax_scale, left, right, deterministic):
    """Head dims that the CUDA kernels do not take as they are: zeros are appended."""
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] > _HEAD_DIM_LIMIT:
            raise RuntimeError(f"{name}: head_dim is {x.shape[-1]}, the limit is {_HEAD_DIM_LIMIT}")
    if k.shape[-1] != q.shape[-1]:
        raise RuntimeError(f"k: head_dim is {k.shape[-1]}, it must be q's {q.shape[-1]}")
    out, lse = _forward(
        _padded(q), _padded(k), _padded(v), softmax_scale, left, right, deterministic
    )
    return out[..., : v.shape[-1]], lse


def _shape_error(name: str, x: Tensor, layout: str) -> RuntimeError:
    return RuntimeError(f"{name}: shape is {tuple(x.shape)}, it must be {layout}")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """softmax(softmax_scale * q k^T + mask) v, the paper's Algorithm 1 (backward: Algorithm 2).

    Args:
        q: (b, sq, h, d).
        k: (b, sk, hk, d) of q's dtype and device. h is a multiple of hk: query head i reads KV head
            i // (h / hk), so hk = h is multi-head, hk = 1 multi-query attention.
        v: (b, sk, hk, dv), likewise; dv need not be d.
        The others: see the module.

    Returns:
        out, (b, sq, h, dv), contiguous, of q's dtype; with return_attn_probs (out, lse, S_dmask).
    """
    if dropout_p != 0.0 or softcap != 0.0 or alibi_slopes is not None:
        _refuse(dropout_p, softcap, alibi_slopes)
    left, right = (-1, -1) if window_size == (-1, -1) else _window(window_size)
    if causal:
        right = 0

    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = _autocast(q, dtype), _autocast(k, dtype), _autocast(v, dtype)
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        name, x = next(pair for pair in (("q", q), ("k", k), ("v", v)) if pair[1].dim() != 4)
        raise _shape_error(name, x, "(batch, seqlen, heads, head_dim)")
    if q.stride(3) != 1:
        q = q.contiguous()
    if k.stride(3) != 1:
        k = k.contiguous()
    if v.stride(3) != 1:
        v = v.contiguous()

    d = q.shape[3]
    if softmax_scale is None:
        softmax_scale = d**-0.5 if d > 0 else 1.0  # the op refuses head_dim 0
    if device == "cuda" and (d % _HEAD_DIM_MULTIPLE or v.shape[3] % _HEAD_DIM_MULTIPLE):
        out, lse = _padded_forward(q, k, v, softmax_scale, left, right, deterministic)
    else:
        out, lse = _forward(q, k, v, softmax_scale, left, right, deterministic)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` with k and v in one tensor, whose gradient is put together at once.

    Args:
        q: (b, sq, h, d).
        kv: (b, sk, 2, hk, d), any strides of the first four dimensions.
        The others, and the returns: see `flash_attn_func`.
    """
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise _shape_error("kv", kv, "(batch, seqlen, 2, heads, head_dim)")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` with q, k and v in one tensor, as a fused projection writes them.

    Args:
        qkv: (b, s, 3, h, d), any strides of the first four dimensions.
        The others, and the returns: see `flash_attn_func`.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise _shape_error("qkv", qkv, "(batch, seqlen, 3, heads, head_dim)")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
