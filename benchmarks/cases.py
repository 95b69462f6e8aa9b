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

# Matrix products of a direction over the columns of Q, and over those of V: the forward has one of
# each, the backward three and two (section 4.1 of the paper counts it so), "both" is their sum.
DIRECTION_PRODUCTS = {"forward": (1, 1), "backward": (3, 2), "both": (4, 3)}


class UsageError(ValueError):
    """A wrong argument of the command line; its text names the argument, its value, the limit."""


@dataclass(frozen=True)
class Case:
    """One attention problem: ``batch`` sequences of ``heads`` heads of ``head_dim`` columns.

    Queries and keys have their own lengths; the grid uses equal ones. ``causal`` is aligned to the
    bottom right corner. ``dtype`` is a key of ``DTYPES``. ``heads_k`` heads of K and V, None for as
    many as Q has, ``head_dim_v`` columns of V, None for those of Q, and ``window`` = (left, right)
    are for ``SHAPES``, which have a ``name``.
    """

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool
    dtype: str = "bf16"
    heads_k: int | None = None
    head_dim_v: int | None = None
    window: tuple[int, int] | None = None
    name: str = ""

    @property
    def kv_heads(self) -> int:
        return self.heads_k or self.heads

    @property
    def columns_v(self) -> int:
        return self.head_dim_v or self.head_dim

    def scores(self) -> float:
        """Entries of a head's score matrix, as the paper counts them: half of them when causal."""
        if self.window is None:
            return self.seqlen_q * self.seqlen_k * (0.5 if self.causal else 1.0)
        left, right = self.window
        ends = ((row + self.seqlen_k - self.seqlen_q) for row in range(self.seqlen_q))
        return sum(max(min(at + right + 1, self.seqlen_k) - max(at - left, 0), 0) for at in ends)

    def flops(self, direction: str) -> float:
        """FLOPs as the paper counts them: 4*b*sq*sk*h*d forward, half of it when causal."""
        of_q, of_v = DIRECTION_PRODUCTS[direction]
        columns = of_q * self.head_dim + of_v * self.columns_v
        return 2.0 * self.batch * self.heads * self.scores() * columns

    def input_bytes(self) -> int:
        """Bytes of q, k and v together."""
        of_q = self.heads * self.seqlen_q * self.head_dim
        of_kv = self.kv_heads * self.seqlen_k * (self.head_dim + self.columns_v)
        return self.batch * (of_q + of_kv) * DTYPES[self.dtype].itemsize

    def label(self) -> str:
        if self.name:
            return f"{self.name} {self.dtype}"
        mask = "causal" if self.causal else "full"
        length = str(self.seqlen_q)
        if self.seqlen_k != self.seqlen_q:
            length += f"x{self.seqlen_k}"
        return f"d{self.head_dim} {mask} s{length} {self.dtype}"


def _shape(name, batch, seqlen, heads, head_dim, mask="causal", seqlen_k=None) -> Case:
    """``heads``: (of Q, of K), ``head_dim``: of Q or (of Q, of V), ``mask``: or a window."""
    d, dv = head_dim if isinstance(head_dim, tuple) else (head_dim, None)
    window = mask if isinstance(mask, tuple) else None
    return Case(
        batch, heads[0], seqlen, seqlen_k or seqlen, d, mask == "causal",
        heads_k=heads[1], head_dim_v=dv, window=window, name=name,
    )  # fmt: skip


# What models bring beside the grid: grouped heads, windows, odd lengths and head dims.
SHAPES = (
    _shape("GQA 32/8 d128 4x2k causal", 4, 2048, (32, 8), 128),
    _shape("GQA 32/8 d128 1x2k causal", 1, 2048, (32, 8), 128),
    _shape("GQA 32/4 d128 2x2k causal", 2, 2048, (32, 4), 128),
    _shape("GQA 32/8 d128 1x8k causal", 1, 8192, (32, 8), 128),
    _shape("GQA 64/8 d64 2x4k causal", 2, 4096, (64, 8), 64),
    _shape("GQA 16/8 d256 2x4k causal", 2, 4096, (16, 8), 256),
    _shape("MQA 32/1 d128 1x4k causal", 1, 4096, (32, 1), 128),
    _shape("GQA 64/8 d64 2x4k window 128", 2, 4096, (64, 8), 64, (127, 0)),
    _shape("d128 4x4k window 1024", 4, 4096, (16, 16), 128, (1023, 0)),
    _shape("d128 1x16k window 1024", 1, 16384, (16, 16), 128, (1023, 0)),
    _shape("d128 1x16k window 4096", 1, 16384, (16, 16), 128, (4095, 0)),
    _shape("d256 2x8k window 4096", 2, 8192, (8, 8), 256, (4095, 0)),
    _shape("d128 2x8k window 256 both sides", 2, 8192, (16, 16), 128, (256, 256)),
    _shape("192 and V 128 h16 4x4k causal", 4, 4096, (16, 16), (192, 128)),
    _shape("192 and V 128 h128 1x4k causal", 1, 4096, (128, 128), (192, 128)),
    _shape("d192 h10 4x4k causal", 4, 4096, (10, 10), 192),
    _shape("d96 h32 8x2k causal", 8, 2048, (32, 32), 96),
    _shape("d80 h32 8x2k causal", 8, 2048, (32, 32), 80),
    _shape("d72 h16 16x729 full", 16, 729, (16, 16), 72, "full"),
    _shape("d64 h12 64x197 full", 64, 197, (12, 12), 64, "full"),
    _shape("d64 h20 8x1500 full", 8, 1500, (20, 20), 64, "full"),
    _shape("d128 h24 2x4250 full", 2, 4250, (24, 24), 128, "full"),
    _shape("d128 h16 4x3000 causal", 4, 3000, (16, 16), 128),
    _shape("d64 h10 8x4096 by 77 full", 8, 4096, (10, 10), 64, "full", 77),
    _shape("GQA 32/8 d128 1x2k by 16k causal", 1, 2048, (32, 8), 128, "causal", 16384),
)


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

    def draw(rows: int, heads: int, columns: int) -> torch.Tensor:
        return torch.randn(case.batch, rows, heads, columns, **options)

    return Inputs(
        q=draw(case.seqlen_q, case.heads, case.head_dim),
        k=draw(case.seqlen_k, case.kv_heads, case.head_dim),
        v=draw(case.seqlen_k, case.kv_heads, case.columns_v),
        dout=draw(case.seqlen_q, case.heads, case.columns_v),
    )


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    window: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Attention written out, in the inputs' own precision: (b, s, h, d) in and out.

    The score matrix is stored, so it serves small problems only. A row without a key gives 0.
    """
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if not causal and window is None:
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    left, right = window or (seqlen_k, 0)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    visible = visible.tril(seqlen_k - seqlen_q + right).triu(seqlen_k - seqlen_q - left)
    # A row that sees nothing keeps its scores and is zeroed after the softmax: a row of -inf would
    # turn its gradients into NaN.
    hidden = ~visible & visible.any(-1, keepdim=True)
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1) * visible
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, v)


OUTPUTS = ("out", "dq", "dk", "dv")


def reference_outputs(
    inputs: Inputs, causal: bool, window: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """out, dq, dk, dv of ``inputs`` in fp64 by ``dense_attention`` and autograd."""
    q, k, v = (t.double().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out = dense_attention(q, k, v, causal, window)
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
