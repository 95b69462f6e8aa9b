"""What the benchmarks make of their figures: files, tables, the speed gate, floors, plots."""

import json
import math

import pytest
import torch
from benchmark_samples import CPU, OURS, PEERS, synthetic_results

from benchmarks import cases, floor, report
from benchmarks.__main__ import make_parser
from benchmarks.cases import Case, UsageError
from benchmarks.plot import MOST_BYTES, plot_results


def test_environment_takes_the_given_commit():
    env = report.environment(CPU, "abc-dirty")
    assert (env["commit"], env["dirty"]) == ("abc", True)
    assert report.source_state("abc") == {"commit": "abc", "dirty": False}
    assert env["torch"] == torch.__version__


def test_results_file_round_trip_has_a_line_for_each_row(tmp_path):
    args = make_parser().parse_args(["attention", "--output-dir", str(tmp_path), "--name", "x"])
    results = synthetic_results()
    path = report.save(args, results | {"worst": math.inf, "third": 1 / 3})
    text = path.read_text()
    loaded = json.loads(text)
    assert loaded["rows"] == report.rounded(results["rows"])
    assert (loaded["worst"], loaded["third"]) == (None, 0.333333)
    assert len(text.splitlines()) < len(loaded["rows"]) + 20
    assert str(tmp_path) not in text
    assert loaded["arguments"]["rounds"] == 6


def test_geometric_mean():
    assert report.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    assert math.isnan(report.geometric_mean([]))


@pytest.mark.parametrize(
    ("ours", "peer", "equal", "slower"),
    [
        ((1.0, 1.02), (1.1, 1.12), False, False),  # faster
        ((1.1, 1.12), (1.0, 1.02), False, True),  # slower
        ((1.1, 1.00), (1.0, 1.02), True, False),  # slower within the spread
    ],
)
def test_equal_within_the_spread_of_the_passes(ours, peer, equal, slower):
    rows = synthetic_results(cases.grid([64], [512], [True]), our_passes=ours, peer_passes=peer)
    mine, theirs = (report.select_rows(rows, "forward", "eager")[p] for p in (OURS, "torch[flash]"))
    pair = report.compare_rows(*mine.values(), *theirs.values())
    assert (pair.equal, pair.slower) == (equal, slower)
    assert pair.label == "d64 causal s512"


def test_markdown_has_every_cell_and_the_mean():
    text = report.attention_markdown(synthetic_results())
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 * (36 + 1)
    assert f"{OURS} / torch[flash]: geometric mean 1.100 over 36 cells" in text
    assert "below 1.0: none" in text
    assert "commit 0123456789ab with changes" in text
    row = next(line for line in lines if "| causal" in line and "| 16384" in line)
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "64", "causal", "16384", "1100", "1000", "1.10",
    ]  # fmt: skip


def test_markdown_compares_ours_with_a_baseline_of_ours():
    results = synthetic_results(peer_ms=0.8)
    slow = "flash_attn2[sm80, deterministic]"
    names = {OURS: slow, "torch[flash]": OURS}
    results["rows"] = [row | {"provider": names[row["provider"]]} for row in results["rows"]]
    text = report.attention_markdown(results, OURS)
    assert f"- {slow} / {OURS}: geometric mean 0.800 over 36 cells, smallest 0.800" in text
    assert f"- {OURS} / " not in text


def test_speed_gate():
    assert report.speed_gate(synthetic_results(), "torch[flash]", 1.05) == []
    misses = report.speed_gate(synthetic_results(peer_ms=0.9), "torch[flash]", 1.05)
    assert len(misses) == 2 * (36 + 1)
    assert f"forward, eager, {OURS}: d64 full s512 is 0.900 of torch[flash]" in misses
    assert len(report.speed_gate(synthetic_results(peer_ms=1.02), "torch[flash]", 1.05)) == 2
    failed = synthetic_results()
    failed["rows"][0] = {
        key: value for key, value in failed["rows"][0].items() if key not in ("ms", "tflops")
    } | {"error": "RuntimeError: no"}
    assert report.speed_gate(failed, "torch[flash]", 1.05) == [
        f"forward, eager, {OURS}: d64 full s512 was not measured"
    ]
    assert f"{OURS}, forward, eager: RuntimeError: no (d64 full s512)" in report.markdown(failed)


def test_floor_by_hand():
    case = Case(1, 16, 16384, 16384, 128, False)
    assert floor.floor_ms(case, "forward", 800, 4.0) == pytest.approx(2199.023255552 / 800)
    small = Case(32, 32, 512, 512, 64, True)  # bound by memory
    tensor = 32 * 32 * 512 * 64 * 2
    lse = 32 * 32 * 512 * 4
    assert floor.moved_bytes(small, "forward") == 4 * tensor + lse
    assert floor.moved_bytes(small, "backward") == 8 * tensor + lse
    assert floor.moved_bytes(small, "both") == 12 * tensor + 2 * lse
    expected = (4 * tensor + lse) / 4e12 * 1e3
    assert floor.floor_ms(small, "forward", 800, 4.0) == pytest.approx(expected)


def floor_results():
    """sm90 takes 1 ms in every cell, cuDNN 1.2 ms."""
    results = synthetic_results(cases.grid([64], [512]), peer_ms=1.2)
    names = {OURS: floor.OURS, "torch[flash]": floor.CUDNN}
    results["rows"] = [row | {"provider": names[row["provider"]]} for row in results["rows"]]
    return results


def test_floor_tables():
    text = floor.floor_markdown(floor_results(), PEERS)
    assert text.startswith("Floor: FLOPs at 800 TFLOP/s or bytes at 4 TB/s")
    assert "relative to cuDNN on a GPU, 2026-01-01" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    full, causal = [
        [line for line in lines if line[:1] == [f"d64 {m} s512"]] for m in ("full", "causal")
    ]
    flops = 4 * 32 * 32 * 512**2 * 64
    # The floor, cuDNN, and FA3: 1.5 and 0.8 times as fast as cuDNN there.
    microseconds = f"{flops / 800e6:.0f}"
    assert full[0][1:] == ["1000", microseconds, "0.09", "1200", "1.20", "800", "0.80"]
    assert full[1][1:2] + full[1][4:] == ["1000", "1200", "1.20", "1500", "1.50"]
    assert causal[0][-2:] == ["-", "-"]  # the file has no FA3 there
    assert "cuDNN 1.200 (2 cells), FA3 est. 0.800 (1 cells)" in text
    half = floor.floor_markdown(floor_results(), PEERS, matrix_tflops=400)
    assert f"| {flops / 400e6:.0f} " in half


def test_floor_tables_leave_out_what_was_not_measured():
    results = floor_results()
    del results["rows"][0]["ms"]
    results["rows"] = [row for row in results["rows"] if row["provider"] == floor.OURS]
    text = floor.floor_markdown(results, PEERS)
    assert text.count("d64 full s512") == 1 and text.count("d64 causal s512") == 2
    assert "cuDNN nan (0 cells)" in text
    assert "###" not in floor.floor_markdown(synthetic_results(), PEERS)  # sm80 alone


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots_are_small(tmp_path, suffix):
    paths = plot_results(synthetic_results(), tmp_path, suffix)
    assert [path.name for path in paths] == [
        f"synthetic-{direction}-eager.{suffix}" for direction in ("forward", "backward")
    ]
    magic = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    for path in paths:
        assert path.read_bytes().startswith(magic)
        assert 2_000 < path.stat().st_size < MOST_BYTES


def test_plot_refuses_other_results(tmp_path):
    with pytest.raises(UsageError, match="'memory' with 0 rows"):
        plot_results({"name": "m", "kind": "memory", "rows": []}, tmp_path)
