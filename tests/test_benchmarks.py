"""The benchmarks' own logic, on the CPU and at tiny sizes."""

import contextlib
import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from benchmark_samples import (
    CPU,
    OURS,
    TINY,
    broken_provider,
    dense_provider,
    wrong_provider,
)

from benchmarks import accuracy, attention, cases, timing
from benchmarks.__main__ import make_parser
from benchmarks.cases import Case, UsageError
from benchmarks.providers import find_providers, select_providers

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


def test_sizes_of_other_shapes():
    window = Case(2, 6, 5, 7, 8, False, heads_k=3, head_dim_v=16, window=(1, 2), name="a")
    # Row i stands at i + 2 and sees i + 1 to i + 4: all four of the 7 keys but in the last two.
    assert window.scores() == 4 + 4 + 4 + 3 + 2
    assert window.flops("forward") == 2 * 2 * 6 * 17 * (8 + 16)
    assert window.flops("backward") == 2 * 2 * 6 * 17 * (3 * 8 + 2 * 16)
    assert window.input_bytes() == 2 * 2 * (6 * 5 * 8 + 3 * 7 * (8 + 16))
    inputs = cases.draw_inputs(window, CPU, 0)
    assert inputs.k.shape == (2, 7, 3, 8) and inputs.v.shape == (2, 7, 3, 16)
    assert inputs.dout.shape == (2, 5, 6, 16)
    assert window.label() == "a bf16"
    assert len({case.name for case in cases.SHAPES}) == len(cases.SHAPES)
    assert all(case.heads % case.kv_heads == 0 for case in cases.SHAPES)


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


def test_dense_attention_of_grouped_heads_in_a_window():
    case = Case(2, 6, 5, 7, 8, False, "fp32", heads_k=3, head_dim_v=16, window=(1, 2))
    inputs = cases.draw_inputs(case, CPU, 0)
    distance = torch.arange(7) - (torch.arange(5)[:, None] + 2)
    expected = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v)),
        attn_mask=(distance >= -1) & (distance <= 2),
        enable_gqa=True,
    ).transpose(1, 2)
    out = cases.dense_attention(inputs.q, inputs.k, inputs.v, False, (1, 2))
    torch.testing.assert_close(out, expected)


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
    ours = {"flash_attn2[reference]", "flash_attn2[reference, deterministic]"}
    assert {p.name for p in found} == ours | {"torch[flash]", "torch[math]"}
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


@pytest.mark.parametrize(("key", "expected"), [("ours", False), ("deterministic", True)])
def test_our_providers_ask_for_their_mode(key, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "flash_attn2.flash_attn_func",
        lambda q, k, v, *, deterministic, **options: asked.append(deterministic) or q,
    )
    (provider,) = select_providers(CPU, [key])
    provider.call(None, None, None, True)
    assert asked == [expected]


def test_selection_says_why_a_provider_is_missing():
    with pytest.raises(UsageError, match="'cudnn' cannot be used on cpu: .*no cudnn backend"):
        select_providers(CPU, ["ours", "cudnn"])
    choices = "all, ours, deterministic, flash, math"
    with pytest.raises(UsageError, match=f"'nonsense' .*choices are {choices}"):
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
