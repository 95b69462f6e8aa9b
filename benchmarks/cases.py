"""The problems that the benchmarks run: the paper's grid, its FLOP counts, inputs, reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS = 16384
HIDDEN = 2048
DIRECTIONS = ("forward", "backward", "both")
MODES = ("eager", "graph")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# FLOPs of a direction in units of the forward's two matrix products: the backward has five
# (section 4.1 of the paper counts it so), "both" is their sum.
DIRECTION_FLOPS = {"forward": 1.0, "backward": 2.5, "both": 3.5}


class UsageError(ValueError):
    """A wrong argument of the command line; its text names the argument, its value, the limit."""


@dataclass(frozen=True)
class Case:
    """One attention problem: ``batch`` sequences of ``heads`` heads of ``head_dim`` columns.

    Queries and keys have their own lengths; the grid uses equal ones. ``causal`` is aligned to the
    bottom right corner. ``dtype`` is a key of ``DTYPES``.
    """

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool
    dtype: str = "bf16"

    def flops(self, direction: str) -> float:
        """FLOPs as the paper counts them: 4*b*sq*sk*h*d forward, half of it when causal."""
        products = 4.0 * self.batch * self.heads * self.seqlen_q * self.seqlen_k * self.head_dim
        return products * (0.5 if self.causal else 1.0) * DIRECTION_FLOPS[direction]

    def input_bytes(self) -> int:
        """Bytes of q, k and v together."""
        rows = self.seqlen_q + 2 * self.seqlen_k
        return self.batch * self.heads * rows * self.head_dim * DTYPES[self.dtype].itemsize

    def label(self) -> str:
        mask = "causal" if self.causal else "full"
        length = str(self.seqlen_q)
        if self.seqlen_k != self.seqlen_q:
            length += f"x{self.seqlen_k}"
        return f"d{self.head_dim} {mask} s{length} {self.dtype}"


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the output's gradient, each (b, s, h, d), contiguous, fresh and random."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


def grid(
    head_dims=HEAD_DIMS,
    seqlens=SEQLENS,
    masks=(False, True),
    dtype: str = "bf16",
    tokens: int = TOKENS,
    hidden: int = HIDDEN,
) -> list[Case]:
    """The paper's grid: ``tokens`` tokens in all, ``hidden`` columns over all heads.

    Raises ``UsageError`` for a length above ``tokens`` or a head dim above ``hidden``.
    """
    for seqlen in seqlens:
        if not 1 <= seqlen <= tokens:
            raise UsageError(f"seqlens: {seqlen} is not within 1 and tokens = {tokens}")
    for head_dim in head_dims:
        if not 1 <= head_dim <= hidden:
            raise UsageError(f"head_dims: {head_dim} is not within 1 and hidden = {hidden}")
    return [
        Case(tokens // seqlen, hidden // head_dim, seqlen, seqlen, head_dim, causal, dtype)
        for head_dim in head_dims
        for causal in masks
        for seqlen in seqlens
    ]


def draw_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Draws standard normal inputs of ``case`` on ``device``; the same seed gives the same."""
    generator = torch.Generator(device=device).manual_seed(seed)
    options = {"generator": generator, "device": device, "dtype": DTYPES[case.dtype]}
    query_shape = (case.batch, case.seqlen_q, case.heads, case.head_dim)
    key_shape = (case.batch, case.seqlen_k, case.heads, case.head_dim)
    return Inputs(
        q=torch.randn(query_shape, **options),
        k=torch.randn(key_shape, **options),
        v=torch.randn(key_shape, **options),
        dout=torch.randn(query_shape, **options),
    )


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> torch.Tensor:
    """Attention written out, in the inputs' own precision: (b, s, h, d) in and out.

    The score matrix is stored, so it serves small problems only. A row without a key gives 0.
    """
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if not causal:
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    visible = visible.tril(seqlen_k - seqlen_q)
    # A row that sees nothing keeps its scores and is zeroed after the softmax: a row of -inf would
    # turn its gradients into NaN.
    hidden = ~visible & visible.any(-1, keepdim=True)
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1) * visible
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, v)


OUTPUTS = ("out", "dq", "dk", "dv")


def reference_outputs(inputs: Inputs, causal: bool) -> dict[str, torch.Tensor]:
    """out, dq, dk, dv of ``inputs`` in fp64 by ``dense_attention`` and autograd."""
    q, k, v = (t.double().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out = dense_attention(q, k, v, causal)
    grads = torch.autograd.grad(out, (q, k, v), inputs.dout.double())
    return dict(zip(OUTPUTS, (out.detach(), *grads), strict=True))


def squared_errors(
    results: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """For each output (||x - ref||^2, ||ref||^2): sums, so that several draws can be pooled."""
    return {
        name: (
            (results[name].double() - reference[name]).square().sum().item(),
            reference[name].square().sum().item(),
        )
        for name in reference
    }


def relative_error(difference: float, norm: float) -> float:
    """||x - ref|| / ||ref|| from the squares that ``squared_errors`` returns."""
    return (difference / norm) ** 0.5 if norm else difference**0.5
