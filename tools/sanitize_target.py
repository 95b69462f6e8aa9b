"""Small forward and backward calls of every kernel row that this GPU takes, for compute-sanitizer.

`make sanitize` runs it under memcheck, synccheck and racecheck. It also compares with the CPU path,
so that a sanitizer that skips the kernels cannot pass. By hand, for example:

    compute-sanitizer --tool racecheck python tools/sanitize_target.py --quick sm90
"""

import argparse
import itertools

import torch

from flash_attn2 import flash_attn_func
from flash_attn2.introspection import (
    build_info,
    families_of_gpu,
    forced_family,
    list_kernels,
)


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double().cpu() - reference).norm() / reference.norm()).item()


def run(
    dtype: torch.dtype,
    d: int,
    dv: int,
    keys: int,
    kv_heads: int,
    causal: bool,
    deterministic: bool,
    batch: int = 1,
    queries: int = 131,
    group: int = 2,
) -> float:
    """Largest relative error of out, dq, dk, dv of one problem with odd lengths."""
    b, hk, h = batch, kv_heads, group * kv_heads
    shapes = ((b, queries, h, d), (b, keys, hk, d), (b, keys, hk, dv), (b, queries, h, dv))
    *inputs, dout = (torch.randn(shape, dtype=dtype) for shape in shapes)

    def attend(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs)
        out = flash_attn_func(q, k, v, causal=causal, deterministic=deterministic)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(device, dtype))]

    pairs = zip(attend("cuda", dtype), attend("cpu", torch.float64), strict=True)
    return max(relative_error(x, reference) for x, reference in pairs)


def lengths(family: str, d: int, dv: int) -> list[int]:
    """Of K and V: a short one, and one past each limit of a row."""
    rows = [row for row in list_kernels() if row["family"] == family]
    limits = {row["max_keys"] for row in rows if (row["head_dim"], row["head_dim_v"]) == (d, dv)}
    return [197, *(limit + 29 for limit in limits if limit < 2**31 - 1)]


def takes_whole_heads(family: str, d: int, dv: int) -> bool:
    rows = [row for row in list_kernels() if row["family"] == family and row["head_rows"] > 0]
    return (d, dv) in {(row["head_dim"], row["head_dim_v"]) for row in rows}


def check_family(family: str, quick: bool) -> None:
    """Calls every dtype and pair of head dims of the build; ends the process at a wrong result."""
    both = [(False, False), (True, True)]
    variants = both if quick else list(itertools.product((False, True), repeat=2))
    info = build_info()

    def check(dtype: str, d: int, dv: int, **problem: int | bool) -> None:
        error = run(getattr(torch, dtype), d, dv, **problem)
        print(f"{family} {dtype} d{d} v{dv} {problem}: {error:.2e}", flush=True)
        if not error < 1e-2:
            raise SystemExit("wrong result")

    for dtype, (d, dv) in itertools.product(info["dtypes"], info["head_dim_pairs"]):
        for (causal, deterministic), keys in itertools.product(variants, lengths(family, d, dv)):
            heads = 1 if quick else 2
            check(dtype, d, dv, keys=keys, kv_heads=heads, causal=causal,
                  deterministic=deterministic)  # fmt: skip
        # Three tiles for each multiprocessor: thread blocks that stay take some, those that do not
        # make D for later heads.
        check(dtype, d, dv, keys=67, kv_heads=2, causal=False, deterministic=False, batch=200,
              queries=35)  # fmt: skip
        # Two heads for each multiprocessor.
        if takes_whole_heads(family, d, dv):
            for causal in (False, True):
                check(dtype, d, dv, keys=197, kv_heads=4, causal=causal, deterministic=False,
                      batch=66, group=1)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*",
                        help="kernel families (default: those that this GPU runs)")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="two small calls for each dtype and kernel")  # fmt: skip
    args = parser.parse_args()
    families = families_of_gpu()
    for family in args.families or families:
        if family not in families:
            parser.error(f"{family}: this build on this GPU runs {', '.join(families)}")
        with forced_family(family):
            check_family(family, args.quick)


if __name__ == "__main__":
    main()
