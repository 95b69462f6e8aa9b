"""``accuracy``: errors of ours and of torch's FLASH backend against fp64, and their ratio."""

from __future__ import annotations

import argparse
import math

import torch
from tqdm import tqdm

from . import cases, report, timing
from .attention import GUARD_LIMIT, make_call
from .cases import OUTPUTS, Case
from .providers import Provider, select_providers

METHOD = (
    "Relative error ||x - ref|| / ||ref|| against attention written out in fp64 on the same "
    "standard normal inputs, batch {batch}, heads {heads}. Noise is kept out by size and pooling: "
    "the squares are summed over all elements of {seeds} draws before the ratio is taken. ratio is "
    "our error over the peer's on the same inputs. Causal masks are aligned to the bottom right; "
    "torch's backend gets there for unequal lengths through torch.nn.attention.bias."
)
HEAD_DIMS = (64, 96, 128, 192, 256)


def accuracy_cases(args: argparse.Namespace) -> list[Case]:
    """Square problems, more keys than queries, and (full only) more queries than keys.

    A causal problem with more queries than keys has rows without a key, for which the peer
    returns NaN, so there is nothing to compare with.
    """
    long, short = args.seqlen, args.seqlen // 2
    shapes = {False: [(long, long), (short, long), (long, short)],
              True: [(long, long), (short, long)]}  # fmt: skip
    return [
        Case(args.batch, args.heads, seqlen_q, seqlen_k, head_dim, causal, dtype)
        for dtype in args.dtypes
        for head_dim in args.head_dims
        for causal, lengths in shapes.items()
        for seqlen_q, seqlen_k in lengths
    ]


def provider_outputs(provider: Provider, inputs: cases.Inputs, causal: bool) -> dict:
    """out, dq, dk, dv of ``provider`` in (b, s, h, d)."""
    with provider.context():
        tensors = make_call(provider, inputs, causal, "both")()
    return dict(zip(OUTPUTS, map(provider.view, tensors), strict=True))


def pooled_errors(case: Case, providers: list[Provider], device: torch.device, seeds: int) -> dict:
    """{provider name: {output: relative error}}, squares pooled over ``seeds`` draws."""
    totals = {p.name: {name: [0.0, 0.0] for name in OUTPUTS} for p in providers}
    for seed in range(seeds):
        inputs = cases.draw_inputs(case, device, seed)
        reference = None
        for provider in providers:  # before the reference, which would leave answers in memory
            results = provider_outputs(provider, inputs, case.causal)
            reference = reference or cases.reference_outputs(inputs, case.causal)
            for name, (difference, norm) in cases.squared_errors(results, reference).items():
                totals[provider.name][name][0] += difference
                totals[provider.name][name][1] += norm
    return {
        provider: {name: cases.relative_error(*pair) for name, pair in outputs.items()}
        for provider, outputs in totals.items()
    }


def compare(ours: dict[str, float], peer: dict[str, float]) -> dict:
    """Both relative errors of each output, and their ratio."""
    return {
        "ours": ours,
        "peer": peer,
        "ratio": {name: ours[name] / peer[name] for name in OUTPUTS},
    }


def measure(case: Case, ours: Provider, peer: Provider, device: torch.device, seeds: int) -> dict:
    """The row of a case; a provider that fails leaves its error, and the run goes on."""
    row = {
        "provider": ours.name,
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "causal": case.causal,
        "seqlen_q": case.seqlen_q,
        "seqlen_k": case.seqlen_k,
    }
    try:
        errors = pooled_errors(case, [ours, peer], device, seeds)
    except Exception as error:
        return row | {"error": timing.describe_error(error)}
    if not all(
        e <= GUARD_LIMIT for e in errors[peer.name].values()
    ):  # else a wrong peer would flatter us
        row["error"] = f"{peer.name} is wrong: relative errors {errors[peer.name]}"
    return row | compare(errors[ours.name], errors[peer.name])


def worst_ratio(rows: list[dict]) -> float:
    """The largest ratio of all rows and outputs; a NaN or a failed case counts as infinite."""
    if any("error" in row for row in rows):
        return math.inf
    ratios = [ratio for row in rows for ratio in row["ratio"].values()]
    return max(math.inf if math.isnan(ratio) else ratio for ratio in ratios)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--dtypes", nargs="+", choices=list(cases.DTYPES),
                        default=["bf16", "fp16"])  # fmt: skip
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3, help="draws that are pooled")
    parser.add_argument("--limit", type=float, default=1.05, help="largest ratio that passes")


def run(args: argparse.Namespace) -> int:
    """Measures, writes, prints; 1 when the worst ratio is above ``--limit``."""
    device = torch.device(args.device)
    families, (peer,) = (select_providers(device, [key]) for key in ("ours", "flash"))
    rows = []
    for case in (progress := tqdm(accuracy_cases(args), unit="case", disable=None)):
        progress.set_postfix_str(case.label())
        rows += [measure(case, ours, peer, device, args.seeds) for ours in families]
    worst = worst_ratio(rows)
    passed = worst <= args.limit
    path = report.save(
        args,
        {
            "kind": "accuracy",
            "environment": report.environment(device, args.commit),
            "method": METHOD.format(**vars(args)),
            "providers": {"ours": [ours.name for ours in families], "peer": peer.name},
            "limit": args.limit,
            "worst": worst,
            "passed": passed,
            "rows": rows,
        },
    )
    print(report.rows_markdown(rows))
    print(f"worst ratio {worst:.4f} (limit {args.limit}) {path}")
    return 0 if passed else 1
