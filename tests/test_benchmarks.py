"""The benchmarks' own logic, on the CPU and at tiny sizes."""

import contextlib
import itertools
import json
import math
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from benchmarks import accuracy, attention, cases, floor, memory, overhead, report, timing, training
from benchmarks.__main__ import main, make_parser
from benchmarks.cases import Case, UsageError
from benchmarks.plot import MOST_BYTES, plot_results
from benchmarks.providers import Provider, find_providers, select_providers

CPU = torch.device("cpu")
OURS = "flash_attn2[sm80]"
TINY = [
    "--device", "cpu", "--head-dims", "16", "--seqlens", "32", "64", "--tokens", "64",
    "--hidden", "32", "--dtype", "fp32", "--rounds", "2", "--iters", "3",
]  # fmt: skip


def dense_provider(name="dense", key="dense"):
    return Provider(key, name, cases.dense_attention)


def broken_provider():
    def call(q, k, v, causal):
        raise RuntimeError("no kernel for this\nand a second line")

    return Provider("broken", "broken", call)


def wrong_provider():
    return Provider("wrong", "wrong", lambda q, k, v, causal: 1.1 * v + 0 * (q + k))


# ---- cases ----


def test_default_grid_is_the_papers():
    grid = cases.grid()
    assert len(grid) == len(set(grid)) == 36
    assert all(case.batch * case.seqlen_q == 16384 for case in grid)
    assert all(case.heads * case.head_dim == 2048 for case in grid)
    assert {case.seqlen_q for case in grid} == {512, 1024, 2048, 4096, 8192, 16384}


@pytest.mark.parametrize(
    ("causal", "direction", "expected"),
    [
        (False, "forward", 2.199023255552e12),  # 4 * 16384^2 * 16 * 128
        (True, "forward", 1.099511627776e12),
        (False, "backward", 5.49755813888e12),
        (True, "both", 3.848290697216e12),
    ],
)
def test_flops_against_hand_numbers(causal, direction, expected):
    assert Case(1, 16, 16384, 16384, 128, causal).flops(direction) == expected


def test_input_bytes():
    assert Case(2, 3, 5, 7, 8, False, "bf16").input_bytes() == 2 * 3 * (5 + 14) * 8 * 2
    assert Case(2, 3, 5, 7, 8, False, "fp32").input_bytes() == 2 * 3 * (5 + 14) * 8 * 4


@pytest.mark.parametrize("argument", [{"seqlens": [99999]}, {"head_dims": [4096]}])
def test_grid_refuses_what_does_not_fit(argument):
    with pytest.raises(UsageError, match=r"99999 .* 16384|4096 .* 2048"):
        cases.grid(**argument)


def test_inputs_are_reproducible_and_differ_between_seeds():
    case = Case(1, 2, 4, 6, 8, True, "fp16")
    first, again, other = (cases.draw_inputs(case, CPU, seed) for seed in (1, 1, 2))
    assert first.q.shape == first.dout.shape == (1, 4, 2, 8)
    assert first.k.shape == first.v.shape == (1, 6, 2, 8)
    assert torch.equal(first.v, again.v)
    assert not torch.equal(first.v, other.v)
    assert first.q.dtype == torch.float16


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 5), (3, 7), (7, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_dense_attention_is_bottom_right_aligned(seqlen_q, seqlen_k, causal):
    inputs = cases.draw_inputs(Case(2, 3, seqlen_q, seqlen_k, 8, causal, "fp32"), CPU, 0)
    q, k, v = (t.double().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out = cases.dense_attention(q, k, v, causal)
    rows = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    visible = torch.arange(seqlen_k) <= rows if causal else torch.ones(seqlen_q, seqlen_k).bool()
    some = visible.any(-1)
    expected = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q[:, some], k, v)), attn_mask=visible[some]
    ).transpose(1, 2)
    torch.testing.assert_close(out[:, some], expected)
    assert not out[:, ~some].any()
    grads = torch.autograd.grad(out, (q, k, v), inputs.dout.double())
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, ~some].any()


def test_relative_error():
    reference = {"out": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    errors = cases.squared_errors({"out": torch.tensor([3.0, 4.5])}, reference)
    assert errors == {"out": (0.25, 25.0)}
    assert cases.relative_error(*errors["out"]) == pytest.approx(0.1)
    assert math.isnan(cases.relative_error(math.nan, 25.0))


# ---- timing ----


def test_statistics_against_hand_numbers():
    stats = timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (stats.median, stats.p20, stats.p80, stats.count) == (3.5, 2.0, 5.0, 6)
    assert timing.percentile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert timing.percentile([7.0], 0.8) == 7.0
    with pytest.raises(ValueError, match="samples"):
        timing.summarize([])


@pytest.mark.parametrize(
    ("size", "cache", "expected"),
    [(201, 60, 1), (61, 60, 1), (60, 60, 2), (30, 60, 4), (50, 60, 3), (1, 60, 16)],
)
def test_input_sets_exceed_the_cache_twice(size, cache, expected):
    assert timing.input_sets(size, cache) == expected


class ScriptedClock:
    """A clock whose calls take as long as they say; it records who ran."""

    def __init__(self):
        self.turns = []

    def synchronize(self):
        pass

    def time_calls(self, calls, count):
        times = [calls[i % len(calls)]() for i in range(count)]
        self.turns.append((times[0], count))
        return times


def test_turns_rotate_and_keep_to_the_budget():
    clock = ScriptedClock()
    runners = [timing.Runner(str(ms), [lambda ms=ms: ms]) for ms in (1.0, 20.0, 100.0)]
    timing.take_turns(clock, runners, rounds=4, limit=10, turn_ms=100.0)
    measured = clock.turns[6:]  # two warm-up turns for each runner come first
    assert [ms for ms, _ in measured] == [1, 20, 100, 20, 100, 1, 100, 1, 20, 100, 20, 1]
    assert dict(measured) == {1.0: 11, 20.0: 6, 100.0: 4}
    assert [len(runner.samples) for runner in runners] == [40, 20, 12]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_each_runner_follows_each_other_one_equally_often(count):
    rounds = count if count % 2 == 0 else 2 * count
    orders = [*itertools.islice(timing.turn_orders(range(count)), rounds)]
    assert all(sorted(order) == [*range(count)] for order in orders)
    neighbours = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(neighbours) == {*itertools.permutations(range(count), 2)}
    assert len({*neighbours.values()}) <= 1


def test_an_unbounded_turn_takes_every_call():
    runner = timing.Runner("a", [lambda: 5.0])
    timing.take_turns(ScriptedClock(), [runner], rounds=1, limit=2, turn_ms=math.inf)
    assert runner.samples == [5.0, 5.0]


def test_every_input_set_is_used():
    used = []
    calls = [lambda i=i: used.append(i) for i in range(5)]
    timing.HostClock().time_calls(calls, 7)
    assert used == [0, 1, 2, 3, 4, 0, 1]


def test_a_failing_runner_does_not_end_the_run():
    def fail():
        raise RuntimeError("out of luck")

    runners = [timing.Runner("bad", [fail]), timing.Runner("good", [lambda: None])]
    timing.take_turns(timing.HostClock(), runners, rounds=2, limit=3, turn_ms=1000)
    assert runners[0].error == "RuntimeError: out of luck"
    assert runners[0].samples == []
    assert runners[1].error is None
    assert len(runners[1].samples) == 6


def test_runners_run_inside_their_context():
    inside = []

    @contextlib.contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    runner = timing.Runner("a", [lambda: seen.append(bool(inside))], context)
    seen: list[bool] = []
    timing.take_turns(timing.HostClock(), [runner], rounds=1, limit=3, turn_ms=1000)
    assert seen
    assert all(seen)
    assert not inside


# ---- providers ----


def test_providers_on_the_cpu():
    found, missing = find_providers(CPU)
    assert {p.name for p in found} == {"flash_attn2[reference]", "torch[flash]", "torch[math]"}
    assert {"cudnn", "efficient", "flex", "fa2", "fa3", "fa4"} == set(missing)


@pytest.mark.parametrize("causal", [False, True])
def test_providers_agree(causal):
    case = Case(1, 2, 33, 48, 16, causal, "fp32")
    inputs = cases.draw_inputs(case, CPU, 3)
    reference = cases.reference_outputs(inputs, causal)
    for provider in select_providers(CPU, ["all"]):
        results = accuracy.provider_outputs(provider, inputs, causal)
        for name, pair in cases.squared_errors(results, reference).items():
            assert cases.relative_error(*pair) < 1e-5, (provider.name, name)


def test_default_selection_takes_what_the_device_has():
    assert [p.key for p in select_providers(CPU)] == ["ours", "flash"]


def test_selection_says_why_a_provider_is_missing():
    with pytest.raises(UsageError, match="'cudnn' cannot be used on cpu: .*no cudnn backend"):
        select_providers(CPU, ["ours", "cudnn"])
    with pytest.raises(UsageError, match="'nonsense' .*choices are all, ours, flash, math"):
        select_providers(CPU, ["nonsense"])


# ---- attention ----


def attention_benchmark(arguments, providers):
    args = make_parser().parse_args(["attention", *TINY, *arguments])
    return attention.Benchmark(args, providers), attention.select_cases(args)


def test_directions_compute_what_they_say():
    inputs = cases.draw_inputs(Case(1, 2, 8, 8, 16, True, "fp32"), CPU, 0)
    expected = list(cases.reference_outputs(inputs, True).values())
    flash = select_providers(CPU, ["flash"])[0]
    for direction, wanted in (
        ("forward", expected[:1]),
        ("backward", expected[1:]),
        ("both", expected),
    ):
        call = attention.make_call(flash, inputs, True, direction)
        for results in (call(), call()):  # a call can be repeated
            for result, tensor in zip(results, wanted, strict=True):
                torch.testing.assert_close(flash.view(result).double(), tensor, atol=1e-5, rtol=0)
        assert not any(result.requires_grad for result in call())


def test_mask_filters():
    for flags, expected in (
        ([], {False, True}),
        (["--causal"], {True}),
        (["--full"], {False}),
        (["--causal", "--full"], {False, True}),
    ):
        _, selected = attention_benchmark(flags, [])
        assert {case.causal for case in selected} == expected


def test_failing_and_wrong_providers_are_recorded():
    providers = [dense_provider(), broken_provider(), wrong_provider()]
    benchmark, selected = attention_benchmark(["--causal"], providers)
    for case in selected:
        benchmark.run_case(case, seed=0)
    results = benchmark.results("how")
    assert len(results["rows"]) == 3 * 2 * len(selected)
    for row in results["rows"]:
        if row["provider"] == "dense":
            assert row["error"] is None
            assert row["tflops"] > 0
        else:
            assert "ms" not in row
    errors = {row["provider"]: row["error"] for row in results["rows"]}
    assert errors["broken"] == "RuntimeError: no kernel for this"
    assert errors["wrong"].startswith("wrong result: relative error of out")
    guards = {guard["provider"]: guard for guard in results["guards"]}
    assert len(results["guards"]) == 3
    assert all(error < 1e-5 for error in guards["dense"]["relative_error"].values())


def test_graph_mode_captures_one_graph_for_each_input_set(monkeypatch):
    captured = []

    def capture(build):
        captured.append(build)
        return build()

    monkeypatch.setattr(timing, "capture_graph", capture)
    benchmark, selected = attention_benchmark(["--modes", "graph", "--full"], [dense_provider()])
    benchmark.cache = 2 * selected[0].input_bytes()
    benchmark.run_case(selected[0], seed=0)
    assert len(captured) == 2 * 4  # two directions, inputs of half the cache
    assert all(row["mode"] == "graph" and row["count"] for row in benchmark.results("")["rows"])


def test_passes_are_kept_apart():
    cell = attention.Cell(OURS, Case(1, 1, 1024, 1024, 64, False), "forward", "eager")
    cell.add_pass(timing.Runner(OURS, (), samples=[1.0, 1.0, 2.0]))
    cell.add_pass(timing.Runner(OURS, (), samples=[3.0, 3.0, 3.0]))
    row = cell.row()
    assert row["ms"] == 2.5
    assert [one["ms"] for one in row["passes"]] == [1.0, 3.0]
    assert row["count"] == 6
    assert row["tflops"] == pytest.approx(4 * 1024**2 * 64 / 2.5e-3 / 1e12)


# ---- report ----


def synthetic_results(grid=None, peer_ms=1.1, our_passes=(1.0, 1.0), peer_passes=None):
    """An ``attention`` results file in which every cell takes the same time."""
    peer_passes = peer_passes or (peer_ms, peer_ms)
    rows = []
    for case in grid or cases.grid():
        for name, times in ((OURS, our_passes), ("torch[flash]", peer_passes)):
            for direction in ("forward", "backward"):
                cell = attention.Cell(name, case, direction, "eager")
                for ms in times:
                    cell.add_pass(timing.Runner(name, (), samples=[ms] * 3))
                rows.append(cell.row())
    environment = report.environment(CPU, "0123456789abcdef-dirty")
    return {"name": "synthetic", "kind": "attention", "environment": environment, "rows": rows}


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


PEERS = {
    "device": "a GPU", "date": "2026-01-01",
    "ceilings": {"gemm_bf16_8192_tflops": 800, "gemm_bf16_16384_tflops": 700, "copy_tb_s": 4.0},
    "dense_tflops_fwd_bwd": [
        {"d": 64, "causal": False, "s": 512, "cudnn": [200, 100], "fa3": [300, 80]},
        {"d": 64, "causal": True, "s": 512, "cudnn": [200, 100]},
    ],
}  # fmt: skip


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


# ---- the command line ----


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
