"""The dispatcher ops ``torch.ops.flash_attn2.forward`` and ``.backward``.

Importing this module defines the schemas and registers everything that needs no GPU: the CPU
implementation (`flash_attn2.reference`), the fake kernels for torch.compile and torch.export, and
the autograd formulas. It then loads the compiled extension ``flash_attn2._C``, which adds the CUDA
kernels and, for CUDA tensors, an autograd kernel in C++. In a Python-only build the ops raise for
CUDA tensors and say what to type.

Shapes: q and dq are (b, sq, h, d), out and dout (b, sq, h, dv); k and dk are (b, sk, hk, d), v and
its gradient (b, sk, hk, dv); lse and dlse are (b, h, sq) in fp32 (fp64 for fp64 inputs).
`flash_attn2.functional` documents the arguments.
"""

import importlib
import importlib.util

import torch
from torch import Tensor

from . import reference

_LIBRARY = torch.library.Library("flash_attn2", "DEF")

_LIBRARY.define(
    "forward(Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left=-1, "
    "int window_right=-1, bool deterministic=False) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    "float softmax_scale, int window_left=-1, int window_right=-1, bool deterministic=False) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# CPU: all tensors are on it, the dispatcher takes a call with any other elsewhere -----------------


def _check_tensor(name: str, x: Tensor, q: Tensor) -> None:
    """What holds for each of q, k, v alone, and the dtype that they share."""
    if x.dim() != 4:
        raise RuntimeError(
            f"{name}: has {x.dim()} dimensions, it must have 4: (batch, seqlen, heads, head_dim)"
        )
    if not x.is_floating_point():
        raise RuntimeError(f"{name}: dtype is {x.dtype}, it must be a floating point type")
    if x.dtype != q.dtype:
        raise RuntimeError(f"{name}: dtype is {x.dtype}, it must be q's {q.dtype}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        axis, size = ("heads", x.shape[2]) if x.shape[2] < 1 else ("head_dim", x.shape[3])
        raise RuntimeError(f"{name}: {axis} is {size}, it must be at least 1")
    if x.stride(3) != 1 and x.shape[3] > 1 and x.numel() > 0:
        raise RuntimeError(f"{name}: the last dimension has stride {x.stride(3)}, it must be 1")


def _check_size(name: str, x: Tensor, dim: int, what: str, other_name: str, other: Tensor) -> None:
    if x.shape[dim] != other.shape[dim]:
        raise RuntimeError(
            f"{name}: {what} is {x.shape[dim]}, it must be {other_name}'s {other.shape[dim]}"
        )


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, q)
    _check_size("k", k, 0, "batch", "q", q)
    _check_size("k", k, 3, "head_dim", "q", q)
    _check_size("v", v, 0, "batch", "q", q)
    _check_size("v", v, 1, "seqlen", "k", k)
    _check_size("v", v, 2, "heads", "k", k)
    if q.shape[2] % k.shape[2] != 0:
        raise RuntimeError(
            f"k: has {k.shape[2]} heads, which does not divide q's {q.shape[2]} heads"
        )


def _check_like(name: str, x: Tensor, shape, dtype: torch.dtype) -> None:
    if x.shape != shape:
        raise RuntimeError(f"{name}: shape is {tuple(x.shape)}, it must be {tuple(shape)}")
    if x.dtype != dtype:
        raise RuntimeError(f"{name}: dtype is {x.dtype}, it must be {dtype}")


def _out_shape(q: Tensor, v: Tensor):
    return (*q.shape[:3], v.shape[3])


def _lse_shape(q: Tensor):
    return (q.shape[0], q.shape[2], q.shape[1])


def _forward_cpu(
    q, k, v, softmax_scale, window_left=-1, window_right=-1, deterministic=False
) -> tuple[Tensor, Tensor]:
    # The tiles run one after the other here, so the results are reproducible in either mode.
    _check_inputs(q, k, v)
    return reference.forward(q, k, v, softmax_scale, window_left, window_right)


def _backward_cpu(
    dout,
    q,
    k,
    v,
    out,
    lse,
    dlse,
    softmax_scale,
    window_left=-1,
    window_right=-1,
    deterministic=False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_inputs(q, k, v)
    _check_like("dout", dout, _out_shape(q, v), q.dtype)
    _check_like("out", out, _out_shape(q, v), q.dtype)
    lse_dtype = reference.compute_dtype(q.dtype)
    _check_like("lse", lse, _lse_shape(q), lse_dtype)
    if dlse is not None:
        _check_like("dlse", dlse, _lse_shape(q), lse_dtype)
    return reference.backward(
        dout, q, k, v, out, lse, softmax_scale, window_left, window_right, dlse=dlse
    )


_LIBRARY.impl("forward", _forward_cpu, "CPU")
_LIBRARY.impl("backward", _backward_cpu, "CPU")


# Fake: shapes and dtypes alone, for torch.compile and torch.export --------------------------------


def _empty_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, whatever x's strides


@torch.library.register_fake("flash_attn2::forward", lib=_LIBRARY)
def _forward_fake(q, k, v, softmax_scale, window_left=-1, window_right=-1, deterministic=False):
    out = q.new_empty(_out_shape(q, v))
    return out, q.new_empty(_lse_shape(q), dtype=reference.compute_dtype(q.dtype))


@torch.library.register_fake("flash_attn2::backward", lib=_LIBRARY)
def _backward_fake(
    dout,
    q,
    k,
    v,
    out,
    lse,
    dlse,
    softmax_scale,
    window_left=-1,
    window_right=-1,
    deterministic=False,
):
    return _empty_like(q), _empty_like(k), _empty_like(v)


# Autograd: serves every device but CUDA, for which the extension has its own in C++ ---------------


def _setup_forward_context(ctx, inputs, output) -> None:
    q, k, v, *ctx.arguments = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # an unused LSE then has no gradient, not one full of zeros


def _forward_autograd(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 7
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(-1) != 1:
        dout = dout.contiguous()  # the gradient of a sum is an expanded scalar
    grads = torch.ops.flash_attn2.backward.default(dout, q, k, v, out, lse, dlse, *ctx.arguments)
    return (*grads, None, None, None, None)


def _backward_autograd(ctx, *grads):
    raise RuntimeError(
        "flash_attn2::backward has no derivative: gradients of gradients are not implemented. "
        "For them, use torch.nn.functional.scaled_dot_product_attention with SDPBackend.MATH"
    )


torch.library.register_autograd(
    "flash_attn2::forward", _forward_autograd, setup_context=_setup_forward_context, lib=_LIBRARY
)
torch.library.register_autograd("flash_attn2::backward", _backward_autograd, lib=_LIBRARY)


# CUDA ---------------------------------------------------------------------------------------------

NO_EXTENSION = (
    "flash_attn2 was installed without its CUDA extension (flash_attn2._C), so it serves CPU "
    "tensors only. On a machine with nvcc, of the CUDA major version of your torch, type in the "
    "flash_attn2 checkout:\n    pip install ."
)


def load_extension():
    """The module flash_attn2._C, or None in a Python-only build.

    Raises:
        ImportError: the extension is there, but does not load.
    """
    spec = importlib.util.find_spec("flash_attn2._C")
    if spec is None:
        return None
    try:
        return importlib.import_module("flash_attn2._C")
    except ImportError as error:
        raise ImportError(
            f"{spec.origin} does not load: {error}\nIt was probably built for another torch than "
            f"this one ({torch.__version__}). To build it anew, type in the flash_attn2 "
            f"checkout:\n    pip install .",
            name="flash_attn2._C",
            path=spec.origin,
        ) from error


def _no_cuda(*args, **kwargs):
    raise RuntimeError(NO_EXTENSION)


EXTENSION = load_extension()
if EXTENSION is None:
    _LIBRARY.impl("forward", _no_cuda, "CUDA")
    _LIBRARY.impl("backward", _no_cuda, "CUDA")
