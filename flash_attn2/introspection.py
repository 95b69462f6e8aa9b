"""What the CUDA extension holds, and which kernel it takes for a problem. Needs no GPU."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import ops
from .version import __version__

_RESOURCES = Path(__file__).with_name("_kernel_resources.json")
_PER_ENTRY = ("registers", "spill_bytes", "stack_bytes")


def _extension():
    if ops.EXTENSION is None:
        raise RuntimeError(ops.NO_EXTENSION)
    return ops.EXTENSION


def build_info() -> dict:
    """What was built: version, archs, cuda, cutlass, torch, head_dims, head_dim_pairs, dtypes.

    head_dims are the buckets of Q and K, head_dim_pairs (of Q and K, of V) those of the kernels.

    Raises:
        RuntimeError: the package was installed without its CUDA extension.
    """
    return {**_extension().build_info(), "version": __version__}


def list_kernels() -> list[dict]:
    """One dict for each kernel of the registry, in the order of preference.

    Keys: name, family, direction ("forward" or "backward"), dtype, head_dim and head_dim_v (the
    largest of Q and K, and of V, that it serves), tile_m and tile_n (rows of a Q and of a K/V
    tile), threads (of a block), smem_bytes (of a block), persistent (one block a multiprocessor at
    most), head_rows (a block of a backward takes whole heads, of so many query rows at most; 0: key
    blocks), delta_ahead (blocks make D for later heads), cluster (blocks that load for each other),
    teams (tiles that a persistent block works on at a time), max_keys and max_unmasked_keys (the
    longest seqlen_k it serves, with and without a mask); and from the build's log, as the largest
    over all architectures, registers (of a thread), spill_bytes and stack_bytes, None where the
    build left no log; "resources" lists them for each architecture.

    Raises:
        RuntimeError: the package was installed without its CUDA extension.
    """
    rows = _extension().list_kernels()
    entries = json.loads(_RESOURCES.read_text())["entries"] if _RESOURCES.exists() else []
    return [_with_resources(row, [e for e in entries if e["name"] == row["name"]]) for row in rows]


def families_of_gpu(device=None) -> list[str]:
    """The kernel families of this build that a GPU (default: the current one) runs.

    Raises:
        RuntimeError: the package was installed without its CUDA extension.
    """
    families = sorted({row["family"] for row in _extension().list_kernels()})
    if torch.cuda.get_device_capability(device) != (9, 0):
        families = [family for family in families if family != "sm90"]
    return families


@contextmanager
def forced_family(family: str) -> Iterator[None]:
    """Holds calls and plans of the whole process to one kernel family inside the block.

    Args:
        family: "sm80" or "sm90"; "" for any. FLASH_ATTN2_FAMILY sets what holds outside.

    Raises:
        RuntimeError: the package was installed without its CUDA extension.
        ValueError: there is no such family.
    """
    extension = _extension()
    before = extension.force_family(family)
    try:
        yield
    finally:
        extension.force_family(before)


def _with_resources(row: dict, entries: list[dict]) -> dict:
    resources = [{key: entry[key] for key in ("arch", *_PER_ENTRY)} for entry in entries]
    largest = {key: max((r[key] for r in resources), default=None) for key in _PER_ENTRY}
    return {**row, **largest, "resources": resources}


def plan(
    direction: str,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    dtype: str = "bfloat16",
    window_left: int = -1,
    window_right: int = -1,
    deterministic: bool = False,
    gpu: str = "H200",
    family: str = "",
    head_dim_v: int | None = None,
) -> dict:
    """Which kernel serves a problem on a GPU, how it is launched, and why others were refused.

    Args:
        direction: "forward" or "backward".
        batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim: sizes of the problem.
        dtype: "float16" or "bfloat16".
        window_left, window_right: keys visible on either side, negative for all; causal is
            window_right = 0.
        deterministic: concerns the backward.
        gpu: name of a GPU; it need not be in this machine.
        family: "sm80" or "sm90" for kernels of that family only; else what FLASH_ATTN2_FAMILY
            says, or any.
        head_dim_v: the head dim of V; None is head_dim.

    Returns:
        kernel (row name, None where none fits), family, tile_m, tile_n, threads, grid (blocks),
        smem_bytes (of a block), workspace_bytes, heads_per_group, head_parts (of a group of
        query heads, each with dk and dv of its own, summed afterwards), delta_lead (KV heads,
        see csrc/sm90/delta_ahead.cuh), dq_slots and dq_lag (likewise,
        csrc/sm90/dq_accumulator.cuh), tail_heads, heads_together and
        heads_in_reverse (csrc/core/schedule.h), groups_turn and rounds_turn
        (csrc/sm90/schedule.cuh), turn_group (csrc/core/turn_order.h), and refused, a list of
        {"kernel", "reason"}.

    Raises:
        RuntimeError: the package was installed without its CUDA extension.
        ValueError: an argument is wrong; the message names it, its value and the limit.
    """
    return _extension().plan(
        direction,
        batch,
        seqlen_q,
        seqlen_k,
        heads_q,
        heads_k,
        head_dim,
        head_dim if head_dim_v is None else head_dim_v,
        dtype,
        window_left,
        window_right,
        deterministic,
        gpu,
        family,
    )
