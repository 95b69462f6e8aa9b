"""Results files, and the tables made of them."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BASELINE = "torch[flash]"


def is_ours(provider: str) -> bool:
    return provider.startswith("flash_attn2[")


def command_output(*command: str) -> str | None:
    """The stripped standard output of ``command`` run in the repository, None if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source_state(override: str | None) -> dict:
    """The commit that is measured and whether files differ from it (None: unknown).

    ``override`` names the commit where there is no git repository; a "-dirty" suffix, as ``git
    describe --dirty`` writes it, says that files differ.
    """
    if override:
        return {"commit": override.removesuffix("-dirty"), "dirty": override.endswith("-dirty")}
    commit = command_output("git", "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}
    # A results file that this run rewrites does not make the measured code another one.
    changes = command_output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": commit, "dirty": bool(changes)}


def package_version() -> str | None:
    """flash_attn2's version: its own word, else that of the installed distribution."""
    try:
        import flash_attn2

        return getattr(flash_attn2, "__version__", None) or importlib.metadata.version(
            "flash_attn2"
        )
    except ImportError:  # PackageNotFoundError is one
        return None


def environment(device: torch.device, commit: str | None = None) -> dict:
    """What the numbers depend on: device, driver, versions, commit and date (UTC)."""
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "flash_attn2": package_version(),
        **source_state(commit),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if device.type != "cuda":
        return {"device": platform.machine() + " CPU", **record}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": (
            command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            or "unknown"
        ).splitlines()[0],
        "cudnn": torch.backends.cudnn.version(),
        **record,
    }


def rounded(value):
    """``value`` with every float in it cut to six digits, and None for what JSON cannot hold."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def dump(results: dict) -> str:
    """JSON with one line per row, so that a change of one cell is a change of one line."""
    parts = []
    for key, value in rounded(results).items():
        if isinstance(value, list) and value:
            lines = ",\n".join("  " + json.dumps(item) for item in value)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n ]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def save(args: argparse.Namespace, results: dict) -> Path:
    """Writes ``results`` and the command's arguments to <output_dir>/<name>.json."""
    hidden = ("command", "handler", "output_dir", "commit", "name")
    arguments = {key: value for key, value in vars(args).items() if key not in hidden}
    path = Path(args.output_dir) / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump({"name": args.name, **results, "arguments": arguments}))
    return path


def load(path: Path | str) -> dict:
    """Reads a results file."""
    return json.loads(Path(path).read_text())


def flattened(row: dict) -> dict:
    """``row`` with the items of its dictionaries as columns of their own, "ratio dq"."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key} {inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat


def rows_markdown(rows: list[dict]) -> str:
    """Any list of records as a Markdown table."""
    return tabulate(map(flattened, rows), headers="keys", tablefmt="github", floatfmt=".5g")


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@dataclass(frozen=True)
class Comparison:
    """One cell of ours against a peer: ``ratio`` is ours over the peer's speed.

    ``equal`` says that the ranges of the passes' medians of the two overlap, so the difference is
    within the spread of the runs.
    """

    label: str
    ratio: float
    equal: bool

    @property
    def slower(self) -> bool:
        return self.ratio < 1.0 and not self.equal


def cell_key(row: dict) -> tuple:
    """What identifies a cell within one direction and mode, in table order."""
    return (row["dtype"], row["head_dim"], row["causal"], row["seqlen"], row.get("shape", ""))


def cell_label(row: dict) -> str:
    if row.get("shape"):
        return row["shape"]
    return f"d{row['head_dim']} {'causal' if row['causal'] else 'full'} s{row['seqlen']}"


def compare_rows(ours: dict, peer: dict) -> Comparison | None:
    """The comparison of two rows of a cell, None when one of them was not measured."""
    if "ms" not in ours or "ms" not in peer:
        return None
    our_passes = [one["ms"] for one in ours["passes"]]
    peer_passes = [one["ms"] for one in peer["passes"]]
    overlap = min(our_passes) <= max(peer_passes) and min(peer_passes) <= max(our_passes)
    return Comparison(cell_label(ours), peer["ms"] / ours["ms"], overlap)


def select_rows(results: dict, direction: str, mode: str) -> dict[str, dict[tuple, dict]]:
    """{provider: {cell key: row}} of one direction and mode, in the order of measurement."""
    selected: dict[str, dict[tuple, dict]] = {}
    for row in results["rows"]:
        if (row["direction"], row["mode"]) == (direction, mode):
            selected.setdefault(row["provider"], {})[cell_key(row)] = row
    return selected


def sections(results: dict) -> list[tuple[str, str]]:
    """The (direction, mode) pairs that a results file holds, in the order of measurement."""
    return list(dict.fromkeys((row["direction"], row["mode"]) for row in results["rows"]))


def compare_providers(rows: dict[str, dict[tuple, dict]], ours: str, peer: str):
    """{cell key: Comparison} of the cells that both measured."""
    pairs = {
        key: compare_rows(row, rows[peer][key])
        for key, row in rows[ours].items()
        if key in rows[peer]
    }
    return {key: pair for key, pair in pairs.items() if pair is not None}


def short_length(seqlen: int) -> str:
    """512, 1k, 16k."""
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def format_speed(tflops: float) -> str:
    """Whole TFLOP/s, or two digits of a small figure."""
    return f"{tflops:.0f}" if tflops >= 10 else f"{tflops:.2g}"


def section_table(rows: dict[str, dict[tuple, dict]], baseline: str) -> str:
    """TFLOP/s of every provider per cell, and ours over the baseline's."""
    ratios = {
        f"{name} / {baseline}": compare_providers(rows, name, baseline)
        for name in rows
        if is_ours(name) and baseline in rows
    }
    table = []
    for key in sorted({key for cells in rows.values() for key in cells}):
        _, head_dim, causal, seqlen, shape = key
        line = {"head dim": head_dim, "mask": "causal" if causal else "full", "seqlen": seqlen}
        if shape:
            line = {"shape": shape}
        for name, cells in rows.items():
            row = cells.get(key, {})
            line[name] = format_speed(row["tflops"]) if "tflops" in row else "-"
        for title, pairs in ratios.items():
            pair = pairs.get(key)
            line[title] = "-" if pair is None else f"{pair.ratio:.2f}"
        table.append(line)
    return tabulate(table, headers="keys", tablefmt="github", disable_numparse=True)


def section_summary(rows: dict[str, dict[tuple, dict]], baseline: str) -> list[str]:
    """A line for each pair of ours and a peer, or the baseline if that is one of ours: geometric
    mean, smallest ratio, cells below 1."""
    lines = []
    for ours in filter(is_ours, rows):
        for peer in (name for name in rows if not is_ours(name) or ours != name == baseline):
            pairs = list(compare_providers(rows, ours, peer).values())
            if not pairs:
                continue
            least = min(pairs, key=lambda pair: pair.ratio)
            below = [
                f"{pair.label} {pair.ratio:.3f}{' (within the spread)' if pair.equal else ''}"
                for pair in pairs
                if pair.ratio < 1.0
            ]
            lines.append(
                f"- {ours} / {peer}: geometric mean {geometric_mean(p.ratio for p in pairs):.3f} "
                f"over {len(pairs)} cells, smallest {least.ratio:.3f} ({least.label}); "
                f"below 1.0: {', '.join(below) or 'none'}"
            )
    return lines


def failures(results: dict) -> list[str]:
    """A line for each provider, direction, mode and error that occurred, with its cells."""
    grouped: dict[tuple, list[str]] = {}
    for row in results["rows"]:
        if row["error"]:
            key = (row["provider"], row["direction"], row["mode"], row["error"])
            grouped.setdefault(key, []).append(cell_label(row))
    return [
        f"- {provider}, {direction}, {mode}: {error} ({', '.join(labels)})"
        for (provider, direction, mode, error), labels in grouped.items()
    ]


def describe_environment(results: dict) -> str:
    """One line on where and when the results were measured."""
    env = results["environment"]
    parts = [env["device"]]
    parts += [
        f"{name} {env[name]}" for name in ("driver", "cuda", "torch", "cudnn") if env.get(name)
    ]
    commit = (env["commit"] or "unknown")[:12] + (" with changes" if env["dirty"] else "")
    return ", ".join([*parts, f"commit {commit}", env["date"]])


def attention_markdown(results: dict, baseline: str = BASELINE) -> str:
    """The whole ``attention`` results file as Markdown: a table and a summary per section."""
    blocks = [describe_environment(results)]
    for direction, mode in sections(results):
        rows = select_rows(results, direction, mode)
        blocks.append(f"### {direction}, {mode} (TFLOP/s)")
        blocks.append(section_table(rows, baseline))
        blocks += ["\n".join(lines)] if (lines := section_summary(rows, baseline)) else []
    if lines := failures(results):
        blocks += ["### Not measured", "\n".join(lines)]
    return "\n\n".join(blocks)


def markdown(results: dict, baseline: str = BASELINE) -> str:
    """Any results file as Markdown."""
    if results["kind"] in ("attention", "shapes"):
        return attention_markdown(results, baseline)
    return f"{describe_environment(results)}\n\n{rows_markdown(results['rows'])}"


def speed_gate(results: dict, baseline: str, mean_limit: float) -> list[str]:
    """What misses the goal: a cell slower beyond the spread, or a geometric mean too low.

    An empty list means that each section has every cell of ours measured and passes.
    """
    misses = []
    for direction, mode in sections(results):
        rows = select_rows(results, direction, mode)
        for ours in filter(is_ours, rows):
            if baseline not in rows:
                misses.append(f"{direction}, {mode}: {baseline} was not measured")
                continue
            pairs = compare_providers(rows, ours, baseline)
            where = f"{direction}, {mode}, {ours}"
            unmeasured = [cell_label(row) for row in rows[ours].values() if "ms" not in row]
            misses += [f"{where}: {label} was not measured" for label in unmeasured]
            misses += [
                f"{where}: {p.label} is {p.ratio:.3f} of {baseline}"
                for p in pairs.values()
                if p.slower
            ]
            mean = geometric_mean(pair.ratio for pair in pairs.values())
            if not mean >= mean_limit:
                misses.append(f"{where}: geometric mean {mean:.3f} < {mean_limit}")
    return misses
