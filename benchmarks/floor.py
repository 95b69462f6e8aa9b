"""How far sm90 is from the floor, from cuDNN in the same run, and from where FA3 would stand.

FA3 is no part of the run. Where another run had both, in a file of peers, its speed here is
estimated as cuDNN's speed in this run times FA3's over cuDNN's in that one. The file's keys:
    device, date            of that run
    ceilings                gemm_bf16_*_tflops and copy_tb_s, measured in it
    dense_tflops_fwd_bwd    rows {d, causal, s, cudnn: [forward, backward], fa3: [...]}, bf16
"""

from __future__ import annotations

from tabulate import tabulate

from . import report
from .cases import DTYPES, Case

OURS, CUDNN = "flash_attn2[sm90]", "torch[cudnn]"
COLUMNS = ("floor", "cuDNN", "FA3 est.")

# Tensors of Q's and of K's shape that a direction reads or writes once, and passes over the LSE.
TENSORS = {"forward": (2, 2, 1), "backward": (4, 4, 1), "both": (6, 6, 2)}


def moved_bytes(case: Case, direction: str) -> int:
    """What has to pass between the GPU and its memory at least."""
    like_q, like_k, lse = TENSORS[direction]
    rows = case.batch * case.heads
    row_bytes = case.head_dim * DTYPES[case.dtype].itemsize
    per_head = (like_q * case.seqlen_q + like_k * case.seqlen_k) * row_bytes
    return rows * (per_head + lse * 4 * case.seqlen_q)


def floor_ms(case: Case, direction: str, matrix_tflops: float, copy_tb_s: float) -> float:
    """The longer of all FLOPs at the rate of matrix products and all bytes at that of a copy."""
    products = case.flops(direction) / matrix_tflops
    return 1e-9 * max(products, moved_bytes(case, direction) / copy_tb_s)


def fastest_product(ceilings: dict) -> float:
    return max(value for key, value in ceilings.items() if key.startswith("gemm_bf16_"))


def fa3_over_cudnn(peers: dict, direction: str) -> dict[tuple, float]:
    """{cell key: FA3's speed over cuDNN's}; empty for a direction that the file has not."""
    if direction == "both":
        return {}
    column = ("forward", "backward").index(direction)
    return {
        ("bf16", row["d"], row["causal"], row["s"], ""): row["fa3"][column] / row["cudnn"][column]
        for row in peers["dense_tflops_fwd_bwd"]
        if {"fa3", "cudnn"} <= row.keys()
    }


def cell_times(row: dict, cudnn: dict, fa3: float | None, rates: tuple[float, float]) -> list:
    """Milliseconds of the COLUMNS; None for what is not known."""
    seqlen = row["seqlen"]
    case = Case(row["batch"], row["heads"], seqlen, seqlen, row["head_dim"], row["causal"],
                row["dtype"])  # fmt: skip
    cudnn_ms = cudnn.get("ms")
    known = cudnn_ms is not None and fa3 is not None
    return [floor_ms(case, row["direction"], *rates), cudnn_ms, cudnn_ms / fa3 if known else None]


def section_lines(results: dict, peers: dict, direction: str, mode: str, rates) -> list[str]:
    """The table of a direction and mode and its geometric means; empty without a cell of sm90."""
    rows = report.select_rows(results, direction, mode)
    fa3 = fa3_over_cudnn(peers, direction)
    table, ratios = [], {name: [] for name in COLUMNS}
    for key, row in sorted(rows.get(OURS, {}).items()):
        if "ms" not in row:
            continue
        line = {"cell": report.cell_label(row), "sm90": f"{1e3 * row['ms']:.0f}"}
        cudnn = rows.get(CUDNN, {}).get(key, {})
        for name, ms in zip(COLUMNS, cell_times(row, cudnn, fa3.get(key), rates), strict=True):
            line[name] = "-" if ms is None else f"{1e3 * ms:.0f}"
            line[f"{name} / sm90"] = "-" if ms is None else f"{ms / row['ms']:.2f}"
            ratios[name] += [] if ms is None else [ms / row["ms"]]
        table.append(line)
    if not table:
        return []
    means = [
        f"{name} {report.geometric_mean(values):.3f} ({len(values)} cells)"
        for name, values in ratios.items()
    ]
    return [
        f"### {direction}, {mode} (microseconds; above 1: sm90 is the faster)",
        tabulate(table, headers="keys", tablefmt="github", disable_numparse=True),
        f"Geometric means of the times over sm90's: {', '.join(means)}",
    ]


def floor_markdown(results: dict, peers: dict, matrix_tflops: float | None = None) -> str:
    """A table for each direction and mode of an ``attention`` results file."""
    ceilings = peers["ceilings"]
    rates = (matrix_tflops or fastest_product(ceilings), ceilings["copy_tb_s"])
    blocks = [
        f"Floor: FLOPs at {rates[0]:g} TFLOP/s or bytes at {rates[1]:g} TB/s, whichever takes "
        f"longer. FA3: cuDNN's time here over FA3's speed relative to cuDNN on {peers['device']}, "
        f"{peers['date']}."
    ]
    for direction, mode in report.sections(results):
        blocks += section_lines(results, peers, direction, mode, rates)
    return "\n\n".join(blocks)
