"""Plots of an ``attention`` results file in the manner of the paper's Figures 4 to 7."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import report
from .cases import UsageError

MOST_BYTES = 200_000
OUR_COLORS = ("#7b3294", "#c51b7d")
PEER_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b0b0b0", "#e4b63a", "#72b7b2", "#9d755d")


def provider_colors(providers: list[str]) -> dict[str, str]:
    """Ours in its own colours, so that it is found at a glance, peers in theirs."""
    ours, peers = iter(OUR_COLORS), iter(PEER_COLORS)
    return {name: next(ours if report.is_ours(name) else peers, "#333333") for name in providers}


def draw_panel(axis, rows: dict[str, dict[tuple, dict]], head_dim: int, causal: bool) -> None:
    """One panel: a group of bars for each length, a bar for each provider."""
    colors = provider_colors(list(rows))
    lengths = sorted({key[3] for cells in rows.values() for key in cells})
    width = 0.84 / len(rows)
    for number, (name, cells) in enumerate(rows.items()):
        speeds = {key[3]: row["tflops"] for key, row in cells.items()
                  if key[1:3] == (head_dim, causal) and "tflops" in row}  # fmt: skip
        places = [
            lengths.index(length) + (number - (len(rows) - 1) / 2) * width for length in speeds
        ]
        bars = axis.bar(places, list(speeds.values()), width, label=name, color=colors[name])
        axis.bar_label(bars, fmt=report.format_speed, fontsize=6, rotation=90, padding=2)
    axis.set_xticks(range(len(lengths)), [report.short_length(length) for length in lengths])
    axis.set_title(f"head dim {head_dim}, {'causal' if causal else 'full'}", fontsize=10)
    axis.margins(y=0.16)
    axis.spines[["top", "right"]].set_visible(False)


def draw_figure(results: dict, direction: str, mode: str):
    """The figure of a section: panels for head dim (columns) and mask (rows)."""
    rows = report.select_rows(results, direction, mode)
    keys = sorted({key for cells in rows.values() for key in cells})
    head_dims = sorted({key[1] for key in keys})
    masks = sorted({key[2] for key in keys})
    figure, axes = plt.subplots(
        len(masks), len(head_dims), figsize=(4.6 * len(head_dims), 3.2 * len(masks) + 0.6),
        squeeze=False, sharey="col", layout="constrained",
    )  # fmt: skip
    for line, causal in zip(axes, masks, strict=True):
        for axis, head_dim in zip(line, head_dims, strict=True):
            draw_panel(axis, rows, head_dim, causal)
        line[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    dtypes = "/".join(sorted({key[0] for key in keys}))
    what = "forward + backward" if direction == "both" else direction
    device = results["environment"]["device"]
    figure.suptitle(f"Attention {what}, {dtypes}, {mode}, {device}", fontsize=11)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=9
    )
    return figure


def save_figure(figure, path: Path) -> Path:
    """Writes ``figure``; a PNG at the finest resolution that stays below 200 kB."""
    if path.suffix == ".svg":
        with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flash_attn2"}):
            figure.savefig(path, metadata={"Date": None})
        return path
    for dots in (130, 110, 90, 70, 50):
        figure.savefig(path, dpi=dots)
        if path.stat().st_size < MOST_BYTES:
            break
    return path


def plot_results(results: dict, folder: Path, suffix: str = "png") -> list[Path]:
    """One figure for each direction and mode: <folder>/<name>-<direction>-<mode>.<suffix>.

    Raises ``UsageError`` for a results file of another kind, or one without a measured cell.
    """
    if results["kind"] != "attention" or not results["rows"]:
        raise UsageError(f"results: only attention results are plotted, got {results['kind']!r} "
                         f"with {len(results['rows'])} rows")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for direction, mode in report.sections(results):
        figure = draw_figure(results, direction, mode)
        paths.append(save_figure(figure, folder / f"{results['name']}-{direction}-{mode}.{suffix}"))
        plt.close(figure)
    return paths
