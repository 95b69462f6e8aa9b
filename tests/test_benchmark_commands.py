"""The benchmarks from their command line, on the CPU and at tiny sizes."""

import json
import math
import re

import pytest
from benchmark_samples import (
    CPU,
    OURS,
    PEERS,
    TINY,
    broken_provider,
    dense_provider,
    wrong_provider,
)

from benchmarks import accuracy, attention, cases, memory, overhead, report, timing, training
from benchmarks.__main__ import main, make_parser
from benchmarks.cases import Case
from benchmarks.providers import Provider


def test_attention_command_writes_tables_and_plots(tmp_path, capsys):
    options = ["--output-dir", str(tmp_path), "--commit", "c0ffee"]
    assert main(["attention", *TINY, *options, "--providers", "ours", "flash"]) == 0
    printed = capsys.readouterr().out
    results = report.load(tmp_path / "attention.json")
    assert len(results["rows"]) == 2 * 2 * 2 * 2  # masks, lengths, directions, providers
    assert all(len(row["passes"]) == 2 and row["error"] is None for row in results["rows"])
    assert results["environment"]["commit"] == "c0ffee"
    assert "2 rounds of at most 3 calls" in results["method"]
    assert "flash_attn2[reference] / torch[flash]: geometric mean" in printed
    path = str(tmp_path / "attention.json")
    table = tmp_path / "table.md"
    assert main(["summarize", path, "--output", str(table)]) == 0
    assert "### backward, eager (TFLOP/s)" in table.read_text()
    peers = tmp_path / "peers.json"
    peers.write_text(json.dumps(PEERS))
    assert main(["summarize", path, "--peers", str(peers), "--matrix-tflops", "650"]) == 0
    assert "Floor: FLOPs at 650 TFLOP/s" in capsys.readouterr().out
    assert main(["summarize", path, "--check", "--mean", "1000"]) == 1
    assert "geometric mean" in capsys.readouterr().err
    assert main(["plot", path, "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "attention-forward-eager.png").stat().st_size > 2_000


def test_attention_command_of_other_shapes(tmp_path, monkeypatch, capsys):
    shapes = (
        Case(2, 4, 32, 32, 16, True, heads_k=2, name="grouped"),
        Case(1, 2, 48, 64, 16, False, head_dim_v=8, window=(9, 0), name="window"),
    )
    monkeypatch.setattr(cases, "SHAPES", shapes)
    options = [*TINY, "--shapes", "--output-dir", str(tmp_path), "--name", "shapes"]
    assert main(["attention", *options, "--providers", "ours", "math"]) == 0
    assert "| grouped |" in capsys.readouterr().out
    results = report.load(tmp_path / "shapes.json")
    rows = {(row["shape"], row["provider"], row["direction"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 2 * 2 * 2
    ours = rows["window", "flash_attn2[reference]", "backward"]
    assert ours["error"] is None and ours["tflops"] > 0
    sizes = {name: ours[name] for name in ("seqlen", "seqlen_k", "heads_k", "head_dim_v")}
    assert sizes == {"seqlen": 48, "seqlen_k": 64, "heads_k": 2, "head_dim_v": 8}
    assert ours["window"] == [9, 0]
    assert rows["grouped", "torch[math]", "backward"]["error"] is None
    assert "not called with a window" in rows["window", "torch[math]", "forward"]["error"]
    assert main(["plot", str(tmp_path / "shapes.json")]) == 2
    assert "only attention results are plotted, got 'shapes'" in capsys.readouterr().err


def test_interrupted_attention_keeps_what_it_has(tmp_path, monkeypatch):
    run_case = attention.Benchmark.run_case

    def interrupted(self, case, seed):
        if case.seqlen_q == 64:
            raise KeyboardInterrupt
        run_case(self, case, seed)

    monkeypatch.setattr(attention.Benchmark, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["attention", *TINY, "--output-dir", str(tmp_path), "--providers", "flash"])
    rows = report.load(tmp_path / "attention.json")["rows"]
    assert {row["seqlen"] for row in rows} == {32}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["attention", *TINY, "--modes", "graph"], "modes: graph needs a CUDA device, got cpu"),
        (["attention", *TINY, "--providers", "cudnn"], "'cudnn' cannot be used on cpu"),
        (["attention", *TINY, "--seqlens", "128"], "seqlens: 128 is not within 1 and tokens = 64"),
        (["memory", "--device", "cpu"], "device: peak memory .* got cpu"),
        (["summarize", "missing.json"], "missing.json"),
    ],
)
def test_wrong_arguments_give_one_line_and_code_2(command, message, tmp_path, capsys):
    extra = [] if command[0] == "summarize" else ["--output-dir", str(tmp_path)]
    assert main([*command, *extra]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


def test_overhead_command(tmp_path, capsys):
    options = ["--device", "cpu", "--output-dir", str(tmp_path), "--calls", "3", "--batches", "4"]
    assert main(["overhead", *options]) == 0
    rows = report.load(tmp_path / "overhead.json")["rows"]
    assert [(row["provider"], row["mode"]) for row in rows] == [
        (name, mode)
        for name in ("flash_attn2[reference]", "torch[flash]")
        for mode in ("no_grad", "grad")
    ]
    assert all(row["batches"] == 4 and row["us_per_call"] > 0 for row in rows)
    assert "us_per_call" in capsys.readouterr().out


def test_overhead_divides_by_the_calls(monkeypatch):
    now = iter([10.0, 10.5])
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(now))
    calls = []
    microseconds = overhead.host_microseconds(timing.HostClock(), lambda: calls.append(1), 100)
    assert microseconds == pytest.approx(5000.0)
    assert len(calls) == 100


def test_accuracy_command_fails_above_the_limit(tmp_path, capsys):
    options = ["--device", "cpu", "--output-dir", str(tmp_path), "--head-dims", "16"]
    options += ["--seqlen", "32", "--seeds", "2"]
    assert main(["accuracy", *options]) == 0
    results = report.load(tmp_path / "accuracy.json")
    assert len(results["rows"]) == 2 * 5  # dtypes; three full and two causal shapes
    assert {row["provider"] for row in results["rows"]} == {"flash_attn2[reference]"}
    assert results["passed"]
    assert 0 < results["worst"] <= 1.05
    assert main(["accuracy", *options, "--limit", "0.001"]) == 1
    assert "ratio dq" in capsys.readouterr().out
    assert main(["summarize", str(tmp_path / "accuracy.json")]) == 0


def test_accuracy_pools_squares_and_counts_failures_as_worst():
    case = Case(1, 1, 8, 8, 16, False, "fp32")
    errors = accuracy.pooled_errors(case, [wrong_provider()], CPU, seeds=2)["wrong"]
    difference = norm = 0.0
    for seed in range(2):
        inputs = cases.draw_inputs(case, CPU, seed)
        reference = cases.reference_outputs(inputs, False)["out"]
        difference += (1.1 * inputs.v.double() - reference).square().sum().item()
        norm += reference.square().sum().item()
    assert errors["out"] == pytest.approx((difference / norm) ** 0.5, rel=1e-5)
    row = accuracy.measure(case, broken_provider(), dense_provider(), CPU, 1)
    assert row["error"] == "RuntimeError: no kernel for this"
    assert accuracy.worst_ratio([{"ratio": {"out": 1.0}}, row]) == math.inf
    assert accuracy.worst_ratio([{"ratio": {"out": 1.0, "dq": 1.2}}]) == 1.2
    row = accuracy.measure(case, dense_provider(), wrong_provider(), CPU, 1)
    assert row["error"].startswith("wrong is wrong: relative errors")
    assert accuracy.worst_ratio([row]) == math.inf


def test_memory_needed_bytes_by_hand():
    case = Case(1, 8, 131072, 131072, 128, True)
    tensor = 8 * 131072 * 128 * 2  # 268 MB each: q, k, v, dout, out, dq, dk, dv
    assert memory.needed_bytes(case) == 8 * tensor + 2 * tensor + 8 * 131072 * 4


@pytest.mark.parametrize(("share", "code"), [(1.05, 0), (1.2, 1)])
def test_memory_command_fails_above_the_limit(share, code, tmp_path):
    arguments = ["memory", "--device", "cpu", "--output-dir", str(tmp_path)]
    args = make_parser().parse_args([*arguments, "--dtype", "fp32"])
    case = Case(1, 2, 64, 64, 16, True, "fp32")
    worked = []

    def peak_of(device, work):
        worked.append(work())
        return share * memory.needed_bytes(case), None

    provider = Provider("ours", OURS, cases.dense_attention)
    row = memory.measure(provider, case, CPU, peak_of)
    assert row["ratio"] == pytest.approx(share)
    inputs, results = worked[0]
    assert len(results) == 4
    assert memory.finish(args, CPU, [row]) == code
    assert report.load(tmp_path / "memory.json")["passed"] is (code == 0)


TINY_TRAINING = [
    "training", "--device", "cpu", "--sizes", "tiny", "--seqlens", "16", "--tokens", "32",
    "--vocab", "64", "--rounds", "1", "--steps", "2", "--no-compile",
]  # fmt: skip


def test_training_command(tmp_path, capsys):
    options = ["--output-dir", str(tmp_path), "--providers", "ours", "flash"]
    assert main([*TINY_TRAINING, *options]) == 0
    rows = report.load(tmp_path / "training.json")["rows"]
    assert [row["provider"] for row in rows] == ["flash_attn2[reference]", "torch[flash]"]
    for row in rows:
        assert row["error"] is None
        assert row["steps"] == 2
        assert row["tokens_per_s"] == pytest.approx(32 / row["ms"] * 1e3, rel=1e-4)
        flops = 6 * row["parameters"] * 32 + 12 * 2 * 32 * 16**2 * 2
        assert row["tflops"] == pytest.approx(flops / row["ms"] * 1e-9, rel=1e-4)
        assert row["loss"] == pytest.approx(math.log(64), rel=0.1)
    assert "tokens_per_s" in capsys.readouterr().out


def test_training_switches_the_provider_of_one_model():
    used = []

    def recording(name):
        def call(q, k, v, causal):
            assert causal
            used.append(name)
            return cases.dense_attention(q, k, v, causal)

        return Provider(name, name, call)

    args = make_parser().parse_args(TINY_TRAINING)
    rows = training.measure(args, "tiny", 16, [recording("a"), recording("b"), broken_provider()])
    assert [row["error"] for row in rows] == [None, None, "RuntimeError: no kernel for this"]
    steps = 2 * timing.WARMUP_CALLS + 1 + args.steps
    assert used.count("a") == used.count("b") == 2 * steps  # two layers
