"""FlashAttention-2 in plain PyTorch: the paper's tiled algorithm (arXiv 2307.08691, section 3.1).

This module is the CPU implementation of the ``flash_attn2`` ops, the oracle of the tests and the
place to read the algorithm. The comments F1..F7 and B1..B8 name the steps of docs/algorithm.md; the
CUDA kernels carry the same names. What the kernels spread over thread blocks is a Python loop over
tiles here, vectorised over batch and heads. No tensor is larger than the inputs, except for one
tile of scores per (batch, head), so memory grows linearly with the sequence length.

Layout inside: ``q`` becomes (b * hk, sq, g, d) with g = h / hk query heads for each KV head, ``k``
becomes (b * hk, sk, d) and ``v`` (b * hk, sk, dv). A block of Q rows together with its g heads is
then one matrix of ``rows * g`` rows, so that grouped heads share the K/V block in one product and
K/V are never repeated.

Numbers: half types are computed in fp32, other types in their own. Scores live in units of log2:
``softmax_scale * log2(e)`` is folded into the product, and exp is exp2.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

BLOCK_Q = 256
BLOCK_K = 128


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inputs of ``dtype`` are computed: fp64 stays, all others become fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Tiling(NamedTuple):
    """Which (query, key) pairs are visible, and which tiles that leaves to visit.

    Query i stands at key position p = i + seqlen_k - seqlen_q; key j is visible iff
    p - window_left <= j <= p + window_right, where a negative window is unbounded.
    """

    seqlen_q: int
    seqlen_k: int
    window_left: int
    window_right: int
    block_q: int
    block_k: int

    @property
    def shift(self) -> int:
        return self.seqlen_k - self.seqlen_q

    def q_blocks(self):
        """All blocks of Q rows, as (first row, end row)."""
        return _blocks(0, self.seqlen_q, self.block_q)

    def k_blocks(self):
        """All blocks of K/V rows."""
        return _blocks(0, self.seqlen_k, self.block_k)

    def k_blocks_of(self, q0: int, q1: int):
        """The K/V blocks that hold a key visible to some row in [q0, q1)."""
        begin, end = 0, self.seqlen_k
        if self.window_left >= 0:
            begin = max(begin, q0 + self.shift - self.window_left)
        if self.window_right >= 0:
            end = min(end, q1 + self.shift + self.window_right)
        return _blocks(begin // self.block_k * self.block_k, end, self.block_k, self.seqlen_k)

    def q_blocks_of(self, k0: int, k1: int):
        """The Q blocks that hold a row which sees some key in [k0, k1)."""
        begin, end = 0, self.seqlen_q
        if self.window_right >= 0:
            begin = max(begin, k0 - self.shift - self.window_right)
        if self.window_left >= 0:
            end = min(end, k1 - self.shift + self.window_left)
        return _blocks(begin // self.block_q * self.block_q, end, self.block_q, self.seqlen_q)

    def hidden(self, q0: int, q1: int, k0: int, k1: int, device=None) -> Tensor | None:
        """Bool (q1 - q0, k1 - k0), True where masked; None for a tile that is wholly visible."""
        left = self.window_left >= 0 and k0 < q1 - 1 + self.shift - self.window_left
        right = self.window_right >= 0 and k1 - 1 > q0 + self.shift + self.window_right
        if not (left or right):
            return None
        j = torch.arange(k0, k1, device=device)
        p = torch.arange(q0, q1, device=device)[:, None] + self.shift
        offset = j - p
        hidden = torch.zeros_like(offset, dtype=torch.bool)
        if left:
            hidden |= offset < -self.window_left
        if right:
            hidden |= offset > self.window_right
        return hidden


def _blocks(begin: int, end: int, block: int, limit: int | None = None):
    """(first, end) of the blocks from ``begin`` that cover ``end``, cut at ``limit``."""
    limit = end if limit is None else limit
    return [(first, min(first + block, limit)) for first in range(begin, end, block)]


class _Scratch:
    """One buffer that every tile of scores is written to, instead of an allocation for each."""

    def __init__(self, like: Tensor, elements: int):
        self.buffer = like.new_empty(elements)

    def tile(self, *shape: int) -> Tensor:
        return self.buffer[: math.prod(shape)].view(shape)


def _group_heads(x: Tensor, heads_k: int) -> Tensor:
    """(b, s, hk * g, d) -> (b * hk, s, g, d), contiguous, in the compute dtype."""
    b, s, h, d = x.shape
    g = h // heads_k
    x = x.to(compute_dtype(x.dtype)).reshape(b, s, heads_k, g, d)
    return x.permute(0, 2, 1, 3, 4).reshape(b * heads_k, s, g, d).contiguous()


def _ungroup_heads(x: Tensor, heads_k: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `_group_heads`: (b * hk, s, g, d) -> (b, s, hk * g, d) of ``dtype``."""
    n, s, g, d = x.shape
    batch = n // heads_k
    x = x.view(batch, heads_k, s, g, d).permute(0, 2, 1, 3, 4).to(dtype)
    return x.reshape(batch, s, heads_k * g, d).contiguous()


def _group_rows(x: Tensor, heads_k: int, dtype: torch.dtype) -> Tensor:
    """(b, hk * g, sq) -> (b * hk, sq, g): one number per row of `_group_heads`."""
    b, h, s = x.shape
    g = h // heads_k
    x = x.to(dtype).reshape(b, heads_k, g, s)
    return x.transpose(2, 3).reshape(b * heads_k, s, g).contiguous()


def _ungroup_rows(x: Tensor, heads_k: int) -> Tensor:
    """The inverse of `_group_rows`."""
    n, s, g = x.shape
    batch = n // heads_k
    return x.view(batch, heads_k, s, g).transpose(2, 3).reshape(batch, heads_k * g, s).contiguous()


def _scores(scratch: _Scratch, q_tile: Tensor, k_tile: Tensor, scale: float, hidden) -> Tensor:
    """F2, F3 and the first half of B2: masked scores of a tile, (n, rows * g, columns), log2."""
    n, rows, _ = q_tile.shape
    s = scratch.tile(n, rows, k_tile.shape[1])
    torch.baddbmm(s, q_tile, k_tile.transpose(1, 2), beta=0, alpha=scale * LOG2_E, out=s)
    if hidden is not None:
        q_rows, columns = hidden.shape
        by_row = s.view(n, q_rows, rows // q_rows, columns)
        by_row.masked_fill_(hidden[:, None, :], -math.inf)
    return s


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int = -1,
    window_right: int = -1,
    *,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores (Algorithm 1 of the paper).

    Args:
        q: (b, sq, h, d), any floating dtype, any strides.
        k: (b, sk, hk, d), h a multiple of hk; query head i reads KV head i // (h / hk).
        v: (b, sk, hk, dv).
        softmax_scale: factor of the scores q.k.
        window_left, window_right: keys visible on either side of a query's own position
            i + sk - sq; negative is unbounded, window_right = 0 is causal.
        block_q, block_k: rows of a tile of Q and of K/V.

    Returns:
        out, (b, sq, h, dv) in q's dtype, and lse, (b, h, sq), natural log, in fp32 (fp64 for fp64).
        A row that sees no key, or whose visible scores are all -inf, has out 0 and lse -inf.
    """
    seqlen_q, d = q.shape[1], q.shape[3]
    _, seqlen_k, heads_k, dv = v.shape
    tiling = _Tiling(seqlen_q, seqlen_k, window_left, window_right, block_q, block_k)

    qg = _group_heads(q, heads_k)
    kg, vg = (_group_heads(x, heads_k).squeeze(2) for x in (k, v))
    n, _, g, _ = qg.shape
    out = qg.new_zeros(n, seqlen_q, g, dv)
    lse = qg.new_empty(n, seqlen_q, g)
    scratch = _Scratch(qg, n * min(block_q, seqlen_q) * g * min(block_k, seqlen_k))

    for q0, q1 in tiling.q_blocks():
        rows = (q1 - q0) * g
        q_tile = qg[:, q0:q1].view(n, rows, d)  # F1
        o = out[:, q0:q1].view(n, rows, dv)
        m = qg.new_full((n, rows, 1), -math.inf)
        l = qg.new_zeros(n, rows, 1)  # noqa: E741 (the paper's letter)
        for k0, k1 in tiling.k_blocks_of(q0, q1):
            hidden = tiling.hidden(q0, q1, k0, k1, q.device)
            s = _scores(scratch, q_tile, kg[:, k0:k1], softmax_scale, hidden)  # F2, F3
            m_new = torch.maximum(m, s.amax(-1, keepdim=True))
            # A row that has seen no key yet subtracts 0 and not -inf, so that its P is 0, not NaN.
            subtrahend = m_new.masked_fill(m_new == -math.inf, 0.0)
            p = s.sub_(subtrahend).exp2_()  # F4
            rescale = torch.exp2(m - subtrahend)
            l.mul_(rescale).add_(p.sum(-1, keepdim=True))  # F5
            o.mul_(rescale)
            o.baddbmm_(p, vg[:, k0:k1])  # F6
            m = m_new
        o.div_(l.masked_fill(l == 0, 1.0))  # F7
        lse[:, q0:q1] = (m * LN_2 + l.log()).view(n, q1 - q0, g)

    return _ungroup_heads(out, heads_k, q.dtype), _ungroup_rows(lse, heads_k)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window_left: int = -1,
    window_right: int = -1,
    *,
    dlse: Tensor | None = None,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` (Algorithm 2 of the paper), scores computed anew from q, k and lse.

    Args:
        dout: (b, sq, h, dv), the gradient of out.
        q, k, v, softmax_scale, window_left, window_right: as given to `forward`.
        out, lse: what `forward` returned.
        dlse: (b, h, sq), the gradient of lse; None for zero.
        block_q, block_k: rows of a tile of Q and of K/V.

    Returns:
        dq, dk, dv: contiguous, shaped and typed like q, k, v. Rows that see no key have dq = 0 and
        leave dk and dv alone.
    """
    seqlen_q, d = q.shape[1], q.shape[3]
    seqlen_k, heads_k = k.shape[1], k.shape[2]
    tiling = _Tiling(seqlen_q, seqlen_k, window_left, window_right, block_q, block_k)

    qg, dog = _group_heads(q, heads_k), _group_heads(dout, heads_k)
    kg, vg = (_group_heads(x, heads_k).squeeze(2) for x in (k, v))
    n, _, g, _ = qg.shape
    lse_g = _group_rows(lse, heads_k, qg.dtype) * LOG2_E
    no_key = lse_g == -math.inf
    lse_g.masked_fill_(no_key, math.inf)  # exp2(s - inf) = 0: the row takes no part

    delta = (dog * _group_heads(out, heads_k)).sum(-1)  # B1
    if dlse is not None:
        delta.sub_(_group_rows(dlse, heads_k, qg.dtype))
    delta.masked_fill_(no_key, 0.0)

    dq, dk, dv = torch.zeros_like(qg), torch.zeros_like(kg), torch.zeros_like(vg)
    tile = n * min(block_q, seqlen_q) * g * min(block_k, seqlen_k)
    scratch_s, scratch_dp = _Scratch(qg, tile), _Scratch(qg, tile)

    for k0, k1 in tiling.k_blocks():
        k_tile, v_tile = kg[:, k0:k1], vg[:, k0:k1]
        for q0, q1 in tiling.q_blocks_of(k0, k1):
            rows = (q1 - q0) * g
            q_tile = qg[:, q0:q1].view(n, rows, d)
            do_tile = dog[:, q0:q1].view(n, rows, dog.shape[3])
            hidden = tiling.hidden(q0, q1, k0, k1, q.device)
            s = _scores(scratch_s, q_tile, k_tile, softmax_scale, hidden)
            p = s.sub_(lse_g[:, q0:q1].view(n, rows, 1)).exp2_()  # B2
            dp = scratch_dp.tile(n, rows, k1 - k0)
            torch.bmm(do_tile, v_tile.transpose(1, 2), out=dp)  # B3
            ds = dp.sub_(delta[:, q0:q1].view(n, rows, 1)).mul_(p)  # B4
            dv[:, k0:k1].baddbmm_(p.transpose(1, 2), do_tile)  # B5
            dk[:, k0:k1].baddbmm_(ds.transpose(1, 2), q_tile)  # B6
            dq[:, q0:q1].view(n, rows, d).baddbmm_(ds, k_tile)  # B7
    dq.mul_(softmax_scale)  # B8
    dk.mul_(softmax_scale)

    return (
        _ungroup_heads(dq, heads_k, q.dtype),
        _ungroup_heads(dk.unsqueeze(2), heads_k, k.dtype),
        _ungroup_heads(dv.unsqueeze(2), heads_k, v.dtype),
    )
