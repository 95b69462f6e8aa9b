"""Plain fp64 attention, the error measure, and memory that is poisoned before a kernel writes it.

Nothing here uses flash_attn2.reference: that module is among the things tested.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import Case, Inputs
from torch import Tensor


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


# Running what is tested ---------------------------------------------------------------------------


def _poison_cuda_allocator(device: torch.device) -> None:
    """Fills the free blocks of the caching allocator with bytes that read as NaN.

    An op that allocates then gets NaN, and not the right answer of an earlier call.
    """
    # Spare blocks, so that a larger or later request finds a poisoned one, too. The allocator keeps
    # requests of up to 1 MiB in a pool of their own.
    spare = [torch.empty(1 << 20, dtype=torch.uint8, device=device) for _ in range(8)]
    spare += [torch.empty(32 << 20, dtype=torch.uint8, device=device) for _ in range(4)]
    del spare
    sizes = []
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] != (device.index or 0):
            continue
        largest = 1 << 20 if segment["segment_type"] == "small" else 1 << 40
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                full, rest = divmod(block["size"], largest)
                sizes += [largest] * full + [rest] * (rest > 0)
    held = [
        torch.empty(n, dtype=torch.uint8, device=device).fill_(255)
        for n in sorted(sizes, reverse=True)
    ]
    del held


@contextlib.contextmanager
def poisoned(device: torch.device):
    """Inside, memory that an op allocates and does not write holds NaN."""
    if device.type == "cuda":
        _poison_cuda_allocator(device)
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def amid_nan(x: Tensor) -> Tensor:
    """A copy of ``x`` whose rows are cut out of longer ones, with 16 NaN on either side."""
    wide = F.pad(x.detach(), (16, 16), value=math.nan)
    return wide[..., 16:-16]


def run_op(
    inputs: Inputs,
    softmax_scale: float,
    window: tuple[int, int] = (-1, -1),
    *,
    with_dlse: bool = True,
    deterministic: bool = False,
) -> Result:
    """The op's forward and, through autograd, its backward, with poisoned outputs."""
    q, k, v, dout, dlse = inputs
    with poisoned(q.device):
        out, lse = torch.ops.flash_attn2.forward(q, k, v, softmax_scale, *window, deterministic)
        if with_dlse:
            grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
        else:
            grads = torch.autograd.grad(out, (q, k, v), dout)
    return Result(out.detach(), lse.detach(), *grads)


# What it is compared with -------------------------------------------------------------------------


def hidden_pairs(seqlen_q: int, seqlen_k: int, window: tuple[int, int], device) -> Tensor:
    """Bool (sq, sk), True where a query must not see a key."""
    left, right = window
    p = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    j = torch.arange(seqlen_k, device=device)[None, :]
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        hidden = hidden | (j < p - left)
    if right >= 0:
        hidden = hidden | (j > p + right)
    return hidden


def _scores(q: Tensor, k: Tensor, softmax_scale: float, window) -> Tensor:
    s = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
    return s.masked_fill(hidden_pairs(q.shape[1], k.shape[1], window, q.device), -math.inf)


def plain_attention(q, k, v, softmax_scale: float, window=(-1, -1)) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v and its log-sum-exp, quadratic memory, differentiable.

    Rows without a visible key give out 0 and lse -inf.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = _scores(q, k, softmax_scale, window)
    no_key = hidden_pairs(q.shape[1], k.shape[1], window, q.device).all(-1)[:, None]
    # A row of -inf alone would be NaN in the softmax and in its gradient: finite, then zeroed.
    s = s.masked_fill(no_key, 0.0)
    p = s.softmax(-1).masked_fill(no_key, 0.0)
    lse = s.logsumexp(-1).masked_fill(no_key[:, 0], -math.inf)
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def fp64_result(inputs: Inputs, softmax_scale, window=(-1, -1), *, with_dlse=True) -> Result:
    """`plain_attention` and its gradients, all in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs[:3])
    out, lse = plain_attention(q, k, v, softmax_scale, window)
    loss = (out * inputs.dout.double()).sum()
    if with_dlse:
        loss = loss + torch.where(lse == -math.inf, 0.0, lse * inputs.dlse.double()).sum()
    return Result(out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v)))


def rounded_result(inputs: Inputs, softmax_scale, window=(-1, -1), *, with_dlse=True) -> Result:
    """Exact attention but for the roundings that any half-precision kernel has to make.

    Rounded to the inputs' dtype are the operands of the second product, P and dS, and the results.
    Its error is what a kernel that accumulates in fp32 should have.
    """
    dtype, group = inputs.q.dtype, inputs.q.shape[2] // inputs.k.shape[2]
    q, k, v, dout = (x.detach().double() for x in inputs[:4])
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)

    def rounded(x):
        return x.to(dtype).double()

    def sum_group(x):
        return x.unflatten(2, (-1, group)).sum(3).to(dtype)

    s = _scores(q, k, softmax_scale, window)
    if s.shape[-1] == 0:
        m = s.new_zeros(*s.shape[:-1], 1)
    else:
        m = s.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    p = (s - m).exp()
    total = p.sum(-1, keepdim=True)
    out = torch.einsum("bhij,bjhd->bihd", rounded(p), v)
    out = (out / total.masked_fill(total == 0, 1.0).transpose(1, 2)).to(dtype)
    lse = m + total.log()

    p = (s - lse.masked_fill(lse == -math.inf, math.inf)).exp()
    delta = (dout * out.double()).sum(-1).transpose(1, 2)
    if with_dlse:
        delta = delta - inputs.dlse
    ds = rounded(p * (torch.einsum("bihd,bjhd->bhij", dout, v) - delta[..., None]))
    dq = (torch.einsum("bhij,bjhd->bihd", ds, k) * softmax_scale).to(dtype)
    dk = sum_group(torch.einsum("bhij,bihd->bjhd", ds, q) * softmax_scale)
    dv = sum_group(torch.einsum("bhij,bihd->bjhd", rounded(p), dout))
    return Result(out, lse[..., 0].to(inputs.dlse.dtype), dq, dk, dv)


def torch_flash(q, k, v, softmax_scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's FLASH_ATTENTION backend, the yardstick: out (b, sq, h, d) and lse, differentiable.

    Called beneath scaled_dot_product_attention, which refuses or aligns to the top left what is not
    square; the backend itself aligns a causal mask to the bottom right, as flash_attn2 does. It
    takes one head dim: where V's differs, zeros are appended to the smaller.
    """
    head_dim = max(q.shape[3], v.shape[3])
    padded = (F.pad(x, (0, head_dim - x.shape[3])).transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *padded, 0.0, causal, scale=softmax_scale
    )
    return out.transpose(1, 2)[..., : v.shape[3]], lse


# The measure --------------------------------------------------------------------------------------


def relative_error(x: Tensor, ref: Tensor) -> float:
    """||x - ref|| / ||ref|| in fp64; ||x|| where ref is zero or empty. NaN where x has a NaN."""
    assert x.shape == ref.shape, f"{tuple(x.shape)} against {tuple(ref.shape)}"
    distance = torch.linalg.vector_norm(x.double() - ref.double()).item()
    norm = torch.linalg.vector_norm(ref.double()).item()
    return distance / norm if norm > 0 else distance


# Share of the result, and an absolute floor for each element: differences that cancel (dS where a
# row has one key) leave the rounding errors of numbers of size 1.
_EXACT_BOUNDS = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-12, 1e-14)}


def assert_near(got: Tensor, ref: Tensor, rounded: Tensor | None, name: str) -> None:
    """``got`` within twice the error of ``rounded``, or, without it, within fp32's or fp64's."""
    assert got.shape == ref.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(ref.shape)}"
    error = torch.linalg.vector_norm(got.double() - ref).item()
    if rounded is None:
        share, floor = _EXACT_BOUNDS[got.dtype]
        allowed = share * torch.linalg.vector_norm(ref).item()
    else:
        floor = torch.finfo(got.dtype).eps / 64
        allowed = 2 * torch.linalg.vector_norm(rounded.double() - ref).item()
    bound = allowed + floor * math.sqrt(ref.numel())
    assert error <= bound, f"{name}: error {error:.3g} is above {bound:.3g}"


def assert_lse_near(got: Tensor, ref: Tensor) -> None:
    empty = ref == -math.inf
    assert torch.equal(got == -math.inf, empty), "lse: -inf on other rows than those without a key"
    finite = (got.masked_fill(empty, 0.0), ref.masked_fill(empty, 0.0))
    assert_near(*finite, None, "lse")


def assert_result(got: Result, inputs: Inputs, case: Case, *, with_dlse: bool = True) -> None:
    """All five tensors against fp64, with the bound that the dtype allows."""
    arguments = (inputs, case.softmax_scale, case.window)
    ref = fp64_result(*arguments, with_dlse=with_dlse)
    half = inputs.q.dtype in (torch.float16, torch.bfloat16)
    rounded = rounded_result(*arguments, with_dlse=with_dlse) if half else (None,) * 5
    likes = (inputs.dout, inputs.q, inputs.k, inputs.v)
    for name, x, like in zip(("out", "dq", "dk", "dv"), (got.out, *got[2:]), likes, strict=True):
        assert x.dtype == inputs.q.dtype and x.is_contiguous(), name
        assert x.shape == like.shape, name
    assert_lse_near(got.lse, ref.lse)
    for i, name in enumerate(Result._fields):
        if name != "lse":
            assert_near(got[i], ref[i], rounded[i], name)
