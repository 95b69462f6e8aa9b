"""``memory``: peak memory of forward and backward against the tensors that must exist."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from tqdm import tqdm

from . import cases, report, timing
from .attention import make_call
from .cases import Case, UsageError
from .providers import Provider, select_providers

METHOD = (
    "Peak allocated device memory of one causal forward and backward, batch {batch}, heads "
    "{heads}, head dim {head_dim}, {dtype}, inputs included, after one run that was not counted. "
    "needed is the sum of q, k, v and dout, the output, dq, dk and dv, the fp32 LSE and the fp32 "
    "dQ accumulator; ratio = peak / needed."
)


def needed_bytes(case: Case) -> int:
    """Bytes of inputs, outputs, gradients, LSE and the fp32 dQ of one forward and backward."""
    item = cases.DTYPES[case.dtype].itemsize
    rows_q = case.batch * case.heads * case.seqlen_q
    rows_k = case.batch * case.heads * case.seqlen_k
    like_q = 4 * rows_q * case.head_dim * item  # q, dout, out, dq
    like_k = 4 * rows_k * case.head_dim * item  # k, v, dk, dv
    return like_q + like_k + rows_q * 4 + rows_q * case.head_dim * 4


def run_once(provider: Provider, case: Case, device: torch.device) -> Callable[[], object]:
    """A function that draws inputs and does one forward and backward; it returns all results."""

    def work():
        inputs = cases.draw_inputs(case, device, seed=0)
        return inputs, make_call(provider, inputs, case.causal, "both")()

    return work


def measure(
    provider: Provider, case: Case, device: torch.device, peak_of: Callable = timing.peak_bytes
) -> dict:
    """The row of one length; ``peak_of(device, work)`` returns (peak bytes, result)."""
    work = run_once(provider, case, device)
    with provider.context():
        work()
        timing.release_memory(device)
        peak, _ = peak_of(device, work)
    needed = needed_bytes(case)
    return {
        "provider": provider.name,
        "tokens": case.seqlen_q,
        "peak_bytes": peak,
        "needed_bytes": needed,
        "ratio": peak / needed,
        "bytes_per_token": peak / case.seqlen_q,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--providers", nargs="+", default=["ours", "flash"], metavar="KEY")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192 << i for i in range(5)])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=list(cases.DTYPES), default="bf16")
    parser.add_argument("--limit", type=float, default=1.10, help="largest ratio that passes")


def run(args: argparse.Namespace) -> int:
    """Measures, writes, prints; 1 when a ratio of ours is above ``--limit``."""
    device = torch.device(args.device)
    if device.type != "cuda":
        raise UsageError(f"device: peak memory is counted on a CUDA device only, got {device}")
    providers = select_providers(device, args.providers)
    rows = []
    for tokens in tqdm(args.tokens, unit="length", disable=None):
        case = Case(args.batch, args.heads, tokens, tokens, args.head_dim, True, args.dtype)
        for provider in providers:
            rows.append(measure(provider, case, device))
            timing.release_memory(device)
    return finish(args, device, rows)


def finish(args: argparse.Namespace, device: torch.device, rows: list[dict]) -> int:
    """Writes and prints the rows; the exit code that ours earn."""
    worst = max(row["ratio"] for row in rows if report.is_ours(row["provider"]))
    passed = worst <= args.limit
    path = report.save(
        args,
        {
            "kind": "memory",
            "environment": report.environment(device, args.commit),
            "method": METHOD.format(**vars(args)),
            "limit": args.limit,
            "worst": worst,
            "passed": passed,
            "rows": rows,
        },
    )
    print(report.rows_markdown(rows))
    print(f"worst ratio of ours {worst:.4f} (limit {args.limit}) {path}")
    return 0 if passed else 1
