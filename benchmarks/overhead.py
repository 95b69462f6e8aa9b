"""``overhead``: what one eager forward call costs the host, ours against torch's SDPA."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from . import cases, report, timing
from .attention import make_call
from .cases import Case
from .providers import Provider, select_providers

METHOD = (
    "Host microseconds per eager causal forward call (batch {batch}, seqlen {seqlen}, heads "
    "{heads}, head dim {head_dim}, {dtype}): a batch of {calls} calls is issued without waiting "
    "for the device between them, and the host's clock is divided by the count. Providers take "
    "turns, {batches} batches each; the median and the 20th and 80th percentile over batches. "
    "no_grad: inputs without gradients under torch.no_grad; grad: inputs that require gradients, "
    "so the autograd node is built, and dropped. The garbage collector is off while a batch runs."
)


def grad_call(provider: Provider, inputs: cases.Inputs) -> Callable:
    """A forward call on inputs that require gradients."""
    leaves = [provider.view(t.detach()).requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    return lambda: provider.call(*leaves, True)


def host_microseconds(clock, call: Callable, calls: int) -> float:
    """Host time per call over ``calls`` calls that are issued without waiting for the device."""
    clock.synchronize()
    gc.disable()
    try:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        elapsed = time.perf_counter() - begin
    finally:
        gc.enable()
    clock.synchronize()
    return elapsed / calls * 1e6


def measure(args: argparse.Namespace, providers: list[Provider]) -> list[dict]:
    """One row per provider and gradient mode."""
    device = torch.device(args.device)
    clock = timing.make_clock(device)
    case = Case(args.batch, args.heads, args.seqlen, args.seqlen, args.head_dim, True, args.dtype)
    inputs = cases.draw_inputs(case, device, seed=0)
    contestants = []
    for provider in providers:
        contestants.append((provider, "no_grad", make_call(provider, inputs, True, "forward")))
        contestants.append((provider, "grad", grad_call(provider, inputs)))
    samples: list[list[float]] = [[] for _ in contestants]
    gc.collect()
    for batch in tqdm(range(args.batches + 1), unit="batch", disable=None):
        for (provider, _, call), taken in zip(contestants, samples, strict=True):
            with provider.context():
                microseconds = host_microseconds(clock, call, args.calls)
            if batch > 0:  # the first one warms up
                taken.append(microseconds)
    rows = []
    for (provider, mode, _), taken in zip(contestants, samples, strict=True):
        stats = timing.summarize(taken)
        rows.append({"provider": provider.name, "mode": mode, "us_per_call": stats.median,
                     "p20": stats.p20, "p80": stats.p80, "batches": stats.count})  # fmt: skip
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--providers", nargs="+", default=["ours", "flash"], metavar="KEY")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=list(cases.DTYPES), default="bf16")
    parser.add_argument("--calls", type=int, default=200, help="calls in a batch")
    parser.add_argument("--batches", type=int, default=40)


def run(args: argparse.Namespace) -> int:
    """Measures, writes the results and prints the table."""
    device = torch.device(args.device)
    rows = measure(args, select_providers(device, args.providers))
    path = report.save(
        args,
        {
            "kind": "overhead",
            "environment": report.environment(device, args.commit),
            "method": METHOD.format(**vars(args)),
            "rows": rows,
        },
    )
    print(report.rows_markdown(rows))
    print(path)
    return 0
