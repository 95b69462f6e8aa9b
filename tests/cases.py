"""The problems that the tests share: sizes, masks, groups of heads, and inputs for them."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)

# Multiples of 8 around and on every kernel's bucket.
HEAD_DIMS = (8, 40, 64, 72, 96, 128, 160, 192, 256)

# (of Q and K, of V): the buckets of the unequal kernels, and what those of equal ones serve.
UNEQUAL_BUCKETS = ((192, 128), (64, 128))
HEAD_DIM_PAIRS = (*UNEQUAL_BUCKETS, (128, 64), (72, 40), (256, 8), (8, 256))

# Likewise: every bucket that the contract compares with torch's kernel.
YARDSTICK_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256), *UNEQUAL_BUCKETS)

# Around the edges of 64- and 128-row tiles.
EDGE_LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 191, 255, 256, 257)
# And of tiles of 80, 96 and 112 keys, and clusters of two of them.
KEY_EDGE_LENGTHS = (*EDGE_LENGTHS, 79, 80, 81, 95, 96, 97, 112, 160, 161, 192, 193)

# name: (window_left, window_right)
MASKS = {
    "full": (-1, -1),
    "causal": (-1, 0),
    "left": (40, -1),
    "right": (-1, 23),
    "window": (70, 9),
    "diagonal": (0, 0),
}

# Wide enough for the ring of dQ's slots, see ring_pays in csrc/plan/plan.cpp.
WIDE_WINDOW = {"wide window": (1100, 9)}

# (query heads, KV heads): multi-head, grouped, multi-query, odd groups
GROUPS = ((2, 2), (4, 2), (6, 1), (9, 3))


@dataclass(frozen=True)
class Case:
    """One attention problem."""

    seqlen_q: int
    seqlen_k: int
    heads_q: int = 2
    heads_k: int = 2
    head_dim: int = 64
    batch: int = 2
    mask: str = "full"
    head_dim_v: int | None = None  # that of V; None: head_dim

    @property
    def window(self) -> tuple[int, int]:
        return (MASKS | WIDE_WINDOW)[self.mask]

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def columns_v(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    def with_enough_rows(self, rows: int = 64) -> "Case":
        """A larger batch where few rows see a key: the error of a few numbers is a matter of luck,
        and no measure for the error of others.
        """
        rows_of_batch = max(self.heads_q * min(self.seqlen_q, self.seqlen_k), 1)
        return replace(self, batch=max(self.batch, -(-rows // rows_of_batch)))

    def __str__(self) -> str:
        return (
            f"b{self.batch}-s{self.seqlen_q}x{self.seqlen_k}-h{self.heads_q}x{self.heads_k}"
            f"-d{self.head_dim}v{self.columns_v}-{self.mask}"
        )


class Inputs(NamedTuple):
    """Leaves q, k, v, and the gradients of out and of lse to start the backward with."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor


def random_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    def normal(*shape, dtype=dtype):
        return torch.randn(shape, device=device, dtype=dtype)

    q_rows = (case.batch, case.seqlen_q, case.heads_q)
    k_rows = (case.batch, case.seqlen_k, case.heads_k)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        normal(*q_rows, case.head_dim).requires_grad_(),
        normal(*k_rows, case.head_dim).requires_grad_(),
        normal(*k_rows, case.columns_v).requires_grad_(),
        normal(*q_rows, case.columns_v),
        normal(case.batch, case.heads_q, case.seqlen_q, dtype=lse_dtype),
    )
