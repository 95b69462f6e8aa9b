"""The measured section of README.md, made of the results files.

It stands between two comments; what is around them is written by hand. Every figure names its file
and the device and commit that the file names. A file that is not there leaves out its tables or its
row of the last table.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from . import report
from .accuracy import worst_ratio
from .cases import UsageError

BEGIN = "<!-- measured: `python -m benchmarks readme` writes from here -->"
END = "<!-- measured: to here -->"

FLASH, CUDNN, FA3 = "torch[flash]", "torch[cudnn]", "flash-attn 3"
# On Hopper cuDNN takes kernels of the kind of sm90's, which are no measure for sm80's.
PEERS = {"sm80": (FLASH,)}
ALL_PEERS = (CUDNN, FLASH)
SHORT = {CUDNN: "cuDNN", FLASH: "FLASH"}


def family(provider: str) -> str:
    """sm90 of flash_attn2[sm90], "sm90 deterministic" of flash_attn2[sm90, deterministic]."""
    return provider.partition("[")[2].rstrip("]").replace(",", "")


def ours(providers: Iterable[str]) -> list[str]:
    """Our providers, the newest family first."""
    return sorted({name for name in providers if report.is_ours(name)}, reverse=True)


def table(headers: list[str], lines: Iterable[list[str]]) -> str:
    """Markdown without the spaces that align columns: a changed cell changes one line."""
    return "\n".join(
        f"| {' | '.join(line)} |" for line in (headers, ["---"] * len(headers), *lines)
    )


def source(results: dict) -> str:
    """The file, and the device and commit of what it holds."""
    env = results["environment"]
    changed = " with changes" if env["dirty"] else ""
    return f"`{results['name']}.json`: {env['device']}, `{(env['commit'] or '?')[:7]}`{changed}"


# The attention tables -----------------------------------------------------------------------------


def speed_cell(row: dict | None, ratios: list[report.Comparison | None]) -> str:
    """TFLOP/s (ratio to each peer)."""
    if row is None or "tflops" not in row:
        return "-"
    shown = ", ".join("-" if one is None else f"{one.ratio:.2f}" for one in ratios)
    return report.format_speed(row["tflops"]) + (f" ({shown})" if ratios else "")


def speed_table(rows: dict[str, dict[tuple, dict]], provider: str, peers: list[str]) -> str:
    """A line for each head dim and mask, a column for each length."""
    cells = rows[provider]
    pairs = [report.compare_providers(rows, provider, peer) for peer in peers]
    lengths = sorted({key[3] for key in cells})
    lines = []
    for group in sorted({key[:3] for key in cells}):
        _, head_dim, causal = group
        keys = [(*group, length, "") for length in lengths]
        shown = [speed_cell(cells.get(key), [pair.get(key) for pair in pairs]) for key in keys]
        lines.append([f"d{head_dim} {'causal' if causal else 'full'}", *shown])
    return table(["", *map(report.short_length, lengths)], lines)


def speed_section(results: dict, provider: str, direction: str, mode: str) -> str:
    """The title, with the geometric means, and the table of one family and direction."""
    rows = report.select_rows(results, direction, mode)
    peers = [peer for peer in PEERS.get(family(provider), ALL_PEERS) if peer in rows]
    title = f"**{family(provider)} {direction}**, TFLOP/s"
    if peers:
        pairs = [report.compare_providers(rows, provider, peer).values() for peer in peers]
        means = [report.geometric_mean(one.ratio for one in cells) for cells in pairs]
        title += f" (ratio to {', to '.join(SHORT[peer] for peer in peers)}); geometric mean "
        title += ", ".join(f"{mean:.2f}" for mean in means)
    return f"{title}:\n\n{speed_table(rows, provider, peers)}"


def attention_blocks(results: dict, folder: Path, link: str) -> list[str]:
    """What was run, a table for each family and direction, and the plots that are there."""
    used, sections = results["arguments"], report.sections(results)
    blocks = [
        f"{used['dtype']}, {report.short_length(used['tokens'])} tokens in all, hidden size "
        f"{used['hidden']}, the paper's grid; eager calls, all providers taking turns in one run "
        f"({source(results)}). cuDNN and FLASH (FlashAttention-2) are torch's backends."
    ]
    for provider in ours(row["provider"] for row in results["rows"]):
        blocks += [speed_section(results, provider, *one) for one in sections]
    plots = {f"{results['name']}-{one}-{mode}.png": one for one, mode in sections}
    links = [f"![{one}]({link}/{name})" for name, one in plots.items() if (folder / name).is_file()]
    return [*blocks, "\n".join(links)] if links else blocks


# The last table: a line is a label, one text for each provider, and the source --------------------


def figures_line(label: str, texts: dict[str, str], results: dict) -> list[str]:
    mine = ", ".join(f"{family(name)} {texts[name]}" for name in ours(texts))
    return [label, mine, texts.get(FLASH, ""), texts.get(CUDNN, ""), source(results)]


def grouped(rows: list[dict]) -> dict[str, list[dict]]:
    """{provider: its rows}."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["provider"], []).append(row)
    return groups


def accuracy_lines(results: dict) -> list[list[str]]:
    # Files of before there were two families name ours once, for all rows.
    rows = [{"provider": results["providers"]["ours"], **row} for row in results["rows"]]
    families = grouped(rows)
    texts = {name: f"{worst_ratio(mine):.3f}" for name, mine in families.items()}
    count = len(next(iter(families.values())))
    label = f"worst error against fp64, over torch FLASH's (out, dq, dk, dv; {count} problems)"
    return [figures_line(label, {**texts, results["providers"]["peer"]: "1"}, results)]


def overhead_lines(results: dict) -> list[list[str]]:
    texts = {
        name: " / ".join(f"{row['us_per_call']:.1f}" for row in rows)
        for name, rows in grouped(results["rows"]).items()
    }
    modes = " / ".join(dict.fromkeys(row["mode"].replace("_", " ") for row in results["rows"]))
    return [figures_line(f"host time of an eager forward, {modes}, microseconds", texts, results)]


def memory_lines(results: dict) -> list[list[str]]:
    longest = max(row["tokens"] for row in results["rows"])
    texts = {r["provider"]: f"{r['ratio']:.3f}" for r in results["rows"] if r["tokens"] == longest}
    label = (
        f"peak memory of forward + backward at {report.short_length(longest)} tokens, over inputs, "
        "outputs, gradients, LSE and fp32 dQ"
    )
    return [figures_line(label, texts, results)]


def mean_speeds(results: dict) -> dict[str, str]:
    """{provider: its geometric mean of TFLOP/s in each section, over the cells that all have}."""
    means: dict[str, list[str]] = {}
    for direction, mode in report.sections(results):
        rows = report.select_rows(results, direction, mode)
        measured = [{k for k, row in cells.items() if "tflops" in row} for cells in rows.values()]
        common = set.intersection(*measured)
        for name, cells in rows.items():
            mean = report.geometric_mean(cells[key]["tflops"] for key in common)
            means.setdefault(name, []).append(f"{mean:.0f}")
    return {name: " / ".join(each) for name, each in means.items()}


def directions(results: dict) -> str:
    return " / ".join(direction for direction, _ in report.sections(results))


def mean_lines(what: str) -> Callable[[dict], list[list[str]]]:
    """What makes the line of the means of results that ``what`` names."""

    def lines(results: dict) -> list[list[str]]:
        label = f"{what}, {directions(results)}, geometric mean of TFLOP/s"
        return [figures_line(label, mean_speeds(results), results)]

    return lines


def fa3_lines(results: dict) -> list[list[str]]:
    means = mean_speeds(results)
    label = (
        f"the grid beside FlashAttention-3, {directions(results)}, geometric mean of TFLOP/s "
        f"(FlashAttention-3: {means[FA3]})"
    )
    return [figures_line(label, means, results)]


def training_lines(results: dict) -> list[list[str]]:
    lines = []
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["model"] == model]
        texts = {
            name: " / ".join(f"{row['tflops']:.0f}" if "tflops" in row else "-" for row in mine)
            for name, mine in grouped(rows).items()
        }
        lengths = " / ".join(dict.fromkeys(report.short_length(row["seqlen"]) for row in rows))
        label = f"training step of a {model} GPT, length {lengths}, TFLOP/s"
        lines.append(figures_line(label, texts, results))
    return lines


FIGURES = {
    "attention-fa3": fa3_lines,
    "attention-graph": mean_lines("CUDA-graph replays of the grid"),
    "attention-deterministic": mean_lines("the grid in deterministic mode and by default"),
    "training": training_lines,
    "accuracy": accuracy_lines,
    "overhead": overhead_lines,
    "memory": memory_lines,
}


# The section --------------------------------------------------------------------------------------


def section(folder: Path, link: str) -> str:
    """Everything between the comments; ``link`` leads from the page to ``folder``."""

    def found(name: str) -> list[dict]:
        path = folder / f"{name}.json"
        return [report.load(path)] if path.is_file() else []

    blocks = [
        block for results in found("attention") for block in attention_blocks(results, folder, link)
    ]
    lines = [
        line for name, make in FIGURES.items() for results in found(name) for line in make(results)
    ]
    if lines:
        blocks.append(table(["", "ours", "torch FLASH", "torch cuDNN", f"`{link}/`"], lines))
    return "\n\n".join(blocks)


def updated(page: str, folder: Path, link: str) -> str:
    """``page`` with its measured section written anew."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"readme: there are no lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n\n{section(folder, link)}\n\n{end}{after}"


def run(args: argparse.Namespace) -> int:
    """Rewrites the page."""
    link = Path(os.path.relpath(args.results, args.page.parent)).as_posix()
    args.page.write_text(updated(args.page.read_text(), args.results, link))
    return 0
