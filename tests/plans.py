"""Plans of the compiled extension, for the tests of csrc/plan. They need no GPU."""

import pytest

import flash_attn2
from flash_attn2 import ops

EXTENSION = ops.EXTENSION
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="flash_attn2._C is not built")

GPUS = {gpu["name"]: gpu for gpu in EXTENSION.list_gpus()} if EXTENSION else {}
KERNELS = {row["name"]: row for row in EXTENSION.list_kernels()} if EXTENSION else {}
DIRECTIONS = ("forward", "backward")

FAMILIES = {row["family"] for row in KERNELS.values()}
needs_sm80 = pytest.mark.skipif("sm80" not in FAMILIES, reason="built without the sm80 family")
needs_sm90 = pytest.mark.skipif("sm90" not in FAMILIES, reason="built without the sm90 family")
needs_whole_heads = pytest.mark.skipif(
    not any(row["head_rows"] for row in KERNELS.values()),
    reason="no kernel that takes whole heads in this build",
)
# (window_left, window_right) of a random problem, by the kind of its mask.
RANDOM_WINDOWS = {
    "full": lambda rng, seqlen_q, seqlen_k: (-1, -1),
    "causal": lambda rng, seqlen_q, seqlen_k: (-1, 0),
    "window": lambda rng, seqlen_q, seqlen_k: (rng.randrange(seqlen_k), rng.randrange(seqlen_q)),
    "narrow": lambda rng, seqlen_q, seqlen_k: (rng.randrange(150), rng.randrange(150)),
    "left": lambda rng, seqlen_q, seqlen_k: (rng.randrange(seqlen_k), -1),
    "right": lambda rng, seqlen_q, seqlen_k: (-1, rng.randrange(seqlen_q)),
}

# The sm90 family is for Hopper alone.
SERVED_GPUS = [
    pytest.param(name, marks=() if gpu["arch"] == 90 else needs_sm80) for name, gpu in GPUS.items()
]


def built(direction: str, dtype: str) -> list[int]:
    """Head dim buckets of this build, which a filter may have narrowed."""
    return sorted(
        {
            row["head_dim"]
            for row in KERNELS.values()
            if row["direction"] == direction and row["dtype"] == dtype
        }
    )


def plan_for(direction="forward", dtype=None, **sizes) -> dict:
    """The plan for a small problem with the largest built head dim, except as given."""
    dtype = dtype or EXTENSION.build_info()["dtypes"][0]
    problem = {
        "batch": 2,
        "seqlen_q": 1000,
        "seqlen_k": 1000,
        "heads_q": 8,
        "heads_k": 8,
        "head_dim": built(direction, dtype)[-1],
    }
    return flash_attn2.plan(direction, dtype=dtype, **{**problem, **sizes})


def is_persistent(plan: dict) -> bool:
    """Whether the kernel's grid has one thread block a multiprocessor at most."""
    return KERNELS[plan["kernel"]]["persistent"]


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step
