#!/usr/bin/env python3
"""Random problems through forward and backward, against attention written out in fp64.

    python tools/fuzz_kernels.py [--count 10000] [--seed 0] [--family sm90] [--seconds 170]
    python tools/fuzz_kernels.py --seed 0 --only 4711      # one draw again, alone

A draw is a function of (seed, index): sizes around the edges of tiles, masks, scales, strides.
Memory is poisoned, the kernels run, then the reference. Every row of every result has a bound of
its own, a few times what rounding to the inputs' dtype does to it (see `expected`), so a single
wrong row is found in a large tensor and an unlucky one in a small tensor is not. Rows without a key
and keys without a query must be exactly 0, and their LSE -inf. Exit codes: 1 for a mismatch or an
error, 3 for a hang; both name the draw.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cases import Inputs  # noqa: E402
from numerics import Result, hidden_pairs, poisoned  # noqa: E402

from flash_attn2 import flash_attn_func  # noqa: E402
from flash_attn2.introspection import families_of_gpu, forced_family, list_kernels  # noqa: E402

BUCKETS = (64, 96, 128, 192, 256)
TILE_ROWS = (16, 64, 80, 96, 112, 128, 192)
LAYOUTS = ("contiguous", "heads first", "fused", "cut out")
USUAL_LENGTH, LONG_LENGTH = 700, 2800
MOST_SCORES = 1 << 23  # of a problem: 64 MiB for each of the reference's matrices
MOST_MISMATCHES = 10

# Draws --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One problem; `values` seeds what the tensors hold."""

    seed: int
    index: int
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int  # of q and k
    head_dim_v: int
    causal: bool
    window_size: tuple[int, int]
    softmax_scale: float | None
    layout: str
    deterministic: bool
    with_dlse: bool
    values: int

    @property
    def window(self) -> tuple[int, int]:
        """What `causal` and `window_size` mean together."""
        return (self.window_size[0], 0) if self.causal else self.window_size

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale


def draw_length(rng: random.Random) -> int:
    """Mostly next to a multiple of a tile's rows."""
    kind = rng.random()
    if kind < 0.06:
        return rng.randrange(3)
    longest = LONG_LENGTH if kind > 0.95 else USUAL_LENGTH
    if kind < 0.30:
        return rng.randint(1, longest)
    rows = rng.choice(TILE_ROWS)
    return rows * rng.randint(1, longest // rows) + rng.choice((-1, 0, 1))


def draw_head_dim(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(BUCKETS)
    return 8 * rng.randint(1, 32) if kind < 0.8 else rng.randint(1, 256)


def draw_mask(rng: random.Random) -> tuple[bool, tuple[int, int]]:
    """causal and window_size; negative sides are unbounded."""

    def side() -> int:
        return rng.choice((-1, -7, 0, rng.randint(1, 40), rng.randint(1, USUAL_LENGTH)))

    kind = rng.random()
    if kind < 0.3:
        return False, (-1, -1)
    if kind < 0.6:
        return True, (-1, -1)
    return rng.random() < 0.3, (side(), side())


def draw_scale(rng: random.Random, head_dim: int) -> float | None:
    """The default for most; else up to four times it, of either sign, and 0 now and then."""
    kind = rng.random()
    if kind < 0.8:
        return None
    return 0.0 if kind < 0.82 else rng.uniform(-4, 4) * head_dim**-0.5


def draw(seed: int, index: int) -> Draw:
    rng = random.Random(f"{seed}/{index}")
    seqlen_q = draw_length(rng)
    seqlen_k = seqlen_q if rng.random() < 0.3 else draw_length(rng)
    sizes = [rng.randint(1, 3), rng.randint(1, 4), rng.choice((1, 1, 2, 3, 4, 8))]
    if rng.random() < 0.15:  # enough heads for a thread block to take whole ones
        sizes = [rng.randint(27, 66), 4, 1]
    while math.prod(sizes) * seqlen_q * seqlen_k > MOST_SCORES:
        largest = sizes.index(max(sizes))
        sizes[largest] = (sizes[largest] + 1) // 2
    batch, heads_k, group = sizes
    head_dim = draw_head_dim(rng)
    head_dim_v = head_dim if rng.random() < 0.7 else draw_head_dim(rng)
    causal, window_size = draw_mask(rng)
    return Draw(
        seed=seed,
        index=index,
        dtype=rng.choice(("float16", "bfloat16")),
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads_q=heads_k * group,
        heads_k=heads_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        causal=causal,
        window_size=window_size,
        softmax_scale=draw_scale(rng, head_dim),
        layout=rng.choice(LAYOUTS),
        deterministic=rng.random() < 0.4,
        with_dlse=rng.random() < 0.5,
        values=rng.getrandbits(63),
    )


def make_inputs(draw: Draw, device: torch.device) -> Inputs:
    """Standard normal tensors in the draw's layout ("fused" needs one head dim)."""
    torch.manual_seed(draw.values)
    dtype, layout = getattr(torch, draw.dtype), draw.layout
    b, d, dv = draw.batch, draw.head_dim, draw.head_dim_v

    def normal(seqlen: int, heads: int, columns: int) -> Tensor:
        if layout == "heads first":
            shape = (b, heads, seqlen, columns)
            return torch.randn(shape, dtype=dtype, device=device).transpose(1, 2)
        if layout == "cut out":  # of NaN, which a kernel must not read
            shape = (b, seqlen + 2, heads, columns + 16)
            around = torch.full(shape, math.nan, dtype=dtype, device=device)
            return around[:, 1:-1, :, 8:-8].normal_()
        return torch.randn((b, seqlen, heads, columns), dtype=dtype, device=device)

    heads_q, heads_k = draw.heads_q, draw.heads_k
    if layout != "fused" or d != dv:
        q = normal(draw.seqlen_q, heads_q, d)
        k, v = normal(draw.seqlen_k, heads_k, d), normal(draw.seqlen_k, heads_k, dv)
    elif draw.seqlen_q == draw.seqlen_k:
        qkv = normal(draw.seqlen_k, heads_q + 2 * heads_k, d)
        q, k, v = qkv.split((heads_q, heads_k, heads_k), 2)
    else:
        q = normal(draw.seqlen_q, heads_q, d)
        k, v = normal(draw.seqlen_k, 2 * heads_k, d).split(heads_k, 2)
    dout = normal(draw.seqlen_q, heads_q, dv)
    dlse = torch.randn((b, heads_q, draw.seqlen_q), device=device)
    return Inputs(*(x.detach().requires_grad_() for x in (q, k, v)), dout, dlse)


# What is tested, and what it is compared with -----------------------------------------------------


def run(draw: Draw, inputs: Inputs) -> Result:
    """Forward and backward with poisoned outputs; done when it returns."""
    q, k, v, dout, dlse = inputs
    with poisoned(q.device):
        out, lse, _ = flash_attn_func(
            q,
            k,
            v,
            softmax_scale=draw.softmax_scale,
            causal=draw.causal,
            window_size=draw.window_size,
            deterministic=draw.deterministic,
            return_attn_probs=True,
        )
        outputs, gradients = ((out, lse), (dout, dlse)) if draw.with_dlse else ((out,), (dout,))
        grads = torch.autograd.grad(outputs, (q, k, v), gradients)
    if q.is_cuda:
        torch.cuda.synchronize()  # a hang or an error is then the kernels', not the reference's
    return Result(out.detach(), lse.detach(), *grads)


@torch.no_grad()
def expected(draw: Draw, inputs: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (result in fp64, (b, h, s, d) or (b, h, s); bound of each row's error, (b, h, s))}.

    Rounding moves P, dS and the results by at most `unit` of themselves (or of the smallest normal
    number), each in its own direction, so the squares of what that does to a row are summed. Two
    more errors sit in D = rowsum(dO * O), the rounding of O and that of P in O; one number moves a
    whole row of dS, so for dQ, where that row is summed, it counts with the sum. The bound is 4
    such errors: 7 standard deviations even where every number rounds as badly as it can. That dK
    and dV of parts of a group are rounded before they are added is not counted.
    """
    finfo = torch.finfo(inputs.q.dtype)
    unit, tiny2 = finfo.eps / 2, finfo.tiny**2
    group, scale = draw.heads_q // draw.heads_k, draw.scale
    q, k, v, dout = (x.transpose(1, 2).double() for x in inputs[:4])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    hidden = hidden_pairs(draw.seqlen_q, draw.seqlen_k, draw.window, q.device)

    def row2(x):  # squared norms of rows, as a column
        return x.square().sum(-1, keepdim=True)

    def sum_group(x):
        return x.unflatten(1, (-1, group)).sum(2)

    def bound(rounded2, result, seen):
        own = row2(result) + result.shape[-1] * tiny2
        return torch.where(seen, 4 * unit * (rounded2 + own)[..., 0].sqrt(), 0.0)

    s = (scale * (q @ k.mT)).masked_fill(hidden, -math.inf)
    lse = s.logsumexp(-1, keepdim=True)
    p = (s - lse.nan_to_num(neginf=0.0)).exp()
    out = p @ v
    dp = dout @ v.mT
    delta = (dout * out).sum(-1, keepdim=True)
    if draw.with_dlse:
        delta = delta - inputs.dlse[..., None]
    ds = p * (dp - delta)
    dq = scale * (ds @ k)
    dk, dv = sum_group(scale * (ds.mT @ q)), sum_group(p.mT @ dout)

    p2 = p.square() + tiny2
    delta2 = row2(dout * out) + row2(p * dp)
    ds2 = ds.square() + p.square() * delta2 + tiny2
    sees, seen = ~hidden.all(-1), ~hidden.all(-2)
    largest_key = F.pad(k.norm(dim=-1), (0, 1)).amax(-1, keepdim=True)  # 0 where there is none
    scores = abs(scale) * q.norm(dim=-1) * largest_key
    return {
        "out": (out, bound(p2 @ row2(v), out, sees)),
        "lse": (lse[..., 0], 2**-17 * (1 + scores)),
        "dq": (dq, bound(scale**2 * (ds2 @ row2(k) + delta2 * row2(p @ k)), dq, sees)),
        "dk": (dk, bound(sum_group(scale**2 * (ds2.mT @ row2(q))), dk, seen)),
        "dv": (dv, bound(sum_group(p2.mT @ row2(dout)), dv, seen)),
    }


def error_ratios(result: Result, wanted: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """{name: largest error of a row as a share of its bound}; not at most 1 where it is wrong."""
    worst = []
    for name, (reference, bound) in wanted.items():
        x = getattr(result, name).double()
        x = x if name == "lse" else x.transpose(1, 2)
        if x.shape != reference.shape:
            raise RuntimeError(f"{name}: shape {tuple(x.shape)}, not {tuple(reference.shape)}")
        error = torch.where(x == reference, 0.0, x - reference)  # -inf is as it should be
        error = error.abs() if name == "lse" else error.norm(dim=-1)
        # A bound of 0 stays one: any error is then far above 1.
        worst.append(F.pad((error / bound.clamp_min(1e-300)).flatten(), (0, 1)).amax())
    return dict(zip(wanted, torch.stack(worst).tolist(), strict=True))


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[object], None]]:
    """Gives a function to call with each draw before it is tried.

    When one takes longer, a thread names it and ends the process.
    """
    state = {}
    over = threading.Event()

    def feed(under_way: object) -> None:
        state.update(under_way=under_way, deadline=time.monotonic() + seconds)

    def watch() -> None:
        while not over.wait(min(0.2, seconds)):
            if time.monotonic() > state["deadline"]:
                print(f"\nhang of {seconds:g} s: {state['under_way']}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(3)

    feed("the start")
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield feed
    finally:
        over.set()


# The command --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What runs the draws: a kernel family on a GPU, or the CPU path."""

    name: str
    context: Callable[[], contextlib.AbstractContextManager]
    serves: Callable[[Draw], bool]


def find_targets(device: torch.device, wanted: list[str] | None) -> list[Target]:
    """The kernel families wanted (None: all that this GPU runs); for a CPU its one path."""
    if device.type != "cuda":
        return [Target("cpu", contextlib.nullcontext, lambda draw: True)]
    found = families_of_gpu()
    for family in wanted or found:
        if family not in found:
            raise SystemExit(f"family: is {family!r}, this build on this GPU runs {found}")
    return [_family_target(family) for family in wanted or found]


def _family_target(family: str) -> Target:
    """A build may have been filtered: it serves the dtypes and head dims that it has kernels of."""
    buckets = [
        (row["dtype"], row["head_dim"], row["head_dim_v"])
        for row in list_kernels()
        if row["family"] == family
    ]

    def serves(draw: Draw) -> bool:
        return any(
            draw.dtype == dtype and draw.head_dim <= d and draw.head_dim_v <= dv
            for dtype, d, dv in buckets
        )

    return Target(family, lambda: forced_family(family), serves)


def try_draw(draw: Draw, targets: list[Target], device: torch.device) -> Iterator[tuple]:
    """(target's name, error ratios) of those that serve the draw."""
    serving = [target for target in targets if target.serves(draw)]
    if not serving:
        return
    inputs = make_inputs(draw, device)
    results = []
    for target in serving:
        with target.context():
            results.append((target.name, run(draw, inputs)))
    wanted = expected(draw, inputs)
    for name, result in results:
        yield name, error_ratios(result, wanted)


def indices(args: argparse.Namespace) -> Iterator[int]:
    """The draws to try, until the time is over."""
    if args.only is not None:
        yield args.only
        return
    begin = time.monotonic()
    for index in tqdm(range(args.count), unit="draw", disable=None, mininterval=0.5):
        if args.seconds is not None and time.monotonic() - begin > args.seconds:
            return
        yield index


def fuzz(args: argparse.Namespace) -> int:
    """Tries the draws; the number of mismatches."""
    device = torch.device(args.device)
    targets = find_targets(device, args.family)
    ratios_of: dict[str, list[dict[str, float]]] = {target.name: [] for target in targets}
    mismatches = 0
    begin = time.monotonic()
    with watchdog(args.hang_seconds) as feed:
        for index in indices(args):
            one = draw(args.seed, index)
            feed(one)
            try:
                for name, ratios in try_draw(one, targets, device):
                    ratios_of[name].append(ratios)
                    if not all(ratio <= 1 for ratio in ratios.values()):
                        mismatches += 1
                        tqdm.write(describe(name, ratios, one))
            except Exception:
                tqdm.write(f"an error, in {one}", file=sys.stderr)
                raise
            if mismatches >= MOST_MISMATCHES:
                break
    for name, all_ratios in ratios_of.items():
        worst = {
            key: max((ratios[key] for ratios in all_ratios), default=0.0) for key in Result._fields
        }
        shares = ", ".join(f"{key} {ratio:.2f}" for key, ratio in worst.items())
        print(f"{name}: {len(all_ratios)} draws; largest error of a row over its bound: {shares}")
    print(f"{mismatches} mismatches, {time.monotonic() - begin:.0f} s")
    return mismatches


def describe(name: str, ratios: dict[str, float], one: Draw) -> str:
    wrong = ", ".join(f"{key} {ratio:.3g}" for key, ratio in ratios.items() if not ratio <= 1)
    return (
        f"mismatch, {name}: largest error of a row over its bound: {wrong}\n    {one}\n"
        f"    again: --seed {one.seed} --only {one.index} --family {name}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="INDEX", help="this draw alone")
    parser.add_argument("--family", action="append", help="repeatable; default: all")
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--hang-seconds", type=float, default=60.0, help="most for one draw")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(1 if fuzz(parse(None)) else 0)
