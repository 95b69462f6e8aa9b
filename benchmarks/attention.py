"""``attention``: speed and peak memory of attention over the paper's grid, providers in turns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

from . import cases, report, timing
from .cases import Case, Inputs, UsageError
from .providers import Provider, select_providers

METHOD = (
    "Providers take turns within each cell (in balanced orders), {rounds} rounds of at "
    "most {iters} calls each; the whole grid is run in {passes} passes with fresh random inputs. "
    "ms is the median over all passes, every pass's own median is kept. eager: each of many "
    "back-to-back calls is timed by its own pair of CUDA events, host cost included where the host "
    "is the slower; graph: replay of a captured CUDA graph, timed alike. forward: under no_grad; "
    "backward: torch.autograd.grad on a prepared graph, without the forward; both: the two "
    "together. Inputs that fit in the L2 cache are rotated among several sets. FLOPs = "
    "4*b*s*s*h*d, halved when causal (under a window by what is visible), x2.5 for the backward, "
    "x3.5 for both; products over V's columns with V's head dim. peak_memory is what "
    "one call (with the forward it needs) allocates above q, k, v and dout. Times on a CPU are the "
    "host clock's."
)
GUARD_ROWS = 512
GUARD_LIMIT = 0.02


@dataclass
class Cell:
    """What was measured for one provider, case, direction and mode."""

    provider: str
    case: Case
    direction: str
    mode: str
    samples: list[float] = field(default_factory=list)
    passes: list[dict] = field(default_factory=list)
    peak_memory: int | None = None
    error: str | None = None

    def add_pass(self, runner: timing.Runner) -> None:
        """Takes over one pass: its samples and their statistics, or its error."""
        if runner.error is not None:
            self.error = runner.error
            return
        stats = timing.summarize(runner.samples)
        self.samples += runner.samples
        self.passes.append(
            {"ms": stats.median, "p20": stats.p20, "p80": stats.p80, "count": stats.count}
        )

    def shape(self) -> dict:
        """What the grid's cells do not differ in."""
        case = self.case
        if not case.name:
            return {}
        sizes = {"seqlen_k": case.seqlen_k, "heads_k": case.kv_heads, "head_dim_v": case.columns_v}
        return {"shape": case.name, **sizes, "window": case.window}

    def row(self) -> dict:
        """The flat record that is written to the results file."""
        case = self.case
        row = {
            "provider": self.provider,
            "head_dim": case.head_dim,
            "causal": case.causal,
            "seqlen": case.seqlen_q,
            "batch": case.batch,
            "heads": case.heads,
            "dtype": case.dtype,
            "direction": self.direction,
            "mode": self.mode,
            **self.shape(),
            "peak_memory": self.peak_memory,
            "error": self.error,
        }
        if self.samples:
            stats = timing.summarize(self.samples)
            row |= {
                "ms": stats.median,
                "p20": stats.p20,
                "p80": stats.p80,
                "count": stats.count,
                "tflops": case.flops(self.direction) / stats.median * 1e-9,
                "passes": self.passes,
            }
        return row


def make_call(
    provider: Provider,
    inputs: Inputs,
    causal: bool,
    direction: str,
    window: tuple[int, int] | None = None,
) -> Callable:
    """A function without arguments that does one ``direction`` of ``provider`` on ``inputs``.

    It returns what it computed: (out,), (dq, dk, dv) or all four, in the provider's layout.
    """
    q, k, v = (provider.view(t.detach()) for t in (inputs.q, inputs.k, inputs.v))
    dout = provider.view(inputs.dout)
    mask = (causal,) if window is None else (causal, window)

    def forward():
        with torch.no_grad():
            return (provider.call(q, k, v, *mask),)

    if direction == "forward":
        return forward
    leaves = tuple(t.requires_grad_() for t in (q, k, v))

    def both():
        out = provider.call(*leaves, *mask)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    if direction == "both":
        return both
    out = provider.call(*leaves, *mask)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def guard_error(provider: Provider, case: Case, device: torch.device, grads: bool) -> dict:
    """Relative errors of ``provider`` against fp64 on a small relative of ``case``."""
    rows, heads_k = min(case.seqlen_q, GUARD_ROWS), min(case.kv_heads, 4)
    heads = heads_k * min(case.heads // case.kv_heads, 4)
    small = replace(case, batch=2, heads=heads, heads_k=heads_k, seqlen_q=rows, seqlen_k=rows)
    inputs = cases.draw_inputs(small, device, seed=rows)
    with provider.context():
        direction = "both" if grads else "forward"
        call = make_call(provider, inputs, small.causal, direction, small.window)
        tensors = [provider.view(t) for t in call()]
    results = dict(zip(cases.OUTPUTS, tensors, strict=False))
    reference = cases.reference_outputs(inputs, small.causal, small.window)
    errors = cases.squared_errors(results, {name: reference[name] for name in results})
    return {name: cases.relative_error(*pair) for name, pair in errors.items()}


class Benchmark:
    """The measurement of a list of cases; results accumulate in ``cells`` and ``guards``."""

    def __init__(self, args: argparse.Namespace, providers: Sequence[Provider]):
        self.args = args
        self.device = torch.device(args.device)
        self.clock = timing.make_clock(self.device)
        self.cache = timing.cache_bytes(self.device)
        self.providers = providers
        self.environment = report.environment(self.device, args.commit)
        self.cells: dict[tuple, Cell] = {}
        self.guards: dict[tuple, dict] = {}

    def cell(self, provider: Provider, case: Case, direction: str, mode: str) -> Cell:
        key = (provider.name, case, direction, mode)
        return self.cells.setdefault(key, Cell(provider.name, case, direction, mode))

    def guard(self, provider: Provider, case: Case) -> str | None:
        """Checks ``provider`` once per head dim, mask, dtype and shape: what is wrong, or None."""
        key = (provider.name, case.head_dim, case.causal, case.dtype, case.name)
        if key not in self.guards:
            names = ("provider", "head_dim", "causal", "dtype", "shape")
            record = dict(zip(names, key, strict=True))
            grads = any(direction != "forward" for direction in self.args.directions)
            try:
                errors = guard_error(provider, case, self.device, grads)
                record |= {"relative_error": errors, "error": None}
                wrong = {name: e for name, e in errors.items() if not e <= GUARD_LIMIT}  # NaN too
                if wrong:
                    text = ", ".join(f"{name} {error:.3g}" for name, error in wrong.items())
                    record["error"] = f"wrong result: relative error of {text} > {GUARD_LIMIT}"
            except Exception as error:
                record |= {"relative_error": None, "error": timing.describe_error(error)}
            self.guards[key] = record
        return self.guards[key]["error"]

    def run_case(self, case: Case, seed: int) -> None:
        """One pass over ``case``: all its directions and modes, all providers in turns."""
        count = timing.input_sets(case.input_bytes(), self.cache)
        inputs = [cases.draw_inputs(case, self.device, seed + i) for i in range(count)]
        for direction in self.args.directions:
            for mode in self.args.modes:
                self.run_cell(case, direction, mode, inputs)
        del inputs
        timing.release_memory(self.device)

    def run_cell(self, case: Case, direction: str, mode: str, inputs: list[Inputs]) -> None:
        runners = [
            self.prepare(provider, case, direction, mode, inputs) for provider in self.providers
        ]
        args = self.args
        timing.take_turns(self.clock, runners, args.rounds, args.iters, args.turn_ms)
        for provider, runner in zip(self.providers, runners, strict=True):
            self.cell(provider, case, direction, mode).add_pass(runner)

    def prepare(
        self, provider: Provider, case: Case, direction: str, mode: str, inputs: list[Inputs]
    ) -> timing.Runner:
        """A runner with one prepared call per input set; measures the first one's peak memory."""
        runner = timing.Runner(provider.name, (), provider.context)
        cell = self.cell(provider, case, direction, mode)
        runner.error = cell.error or self.guard(provider, case)
        if runner.error is not None:
            return runner
        with timing.recorded_failure(runner), provider.context():
            if cell.peak_memory is None and mode == "eager" and self.device.type == "cuda":
                cell.peak_memory = self.peak_memory(provider, case, direction, inputs[0])
            builders = [
                lambda one=one: make_call(provider, one, case.causal, direction, case.window)
                for one in inputs
            ]
            if mode == "graph":
                runner.calls = [timing.capture_graph(build) for build in builders]
            else:
                runner.calls = [build() for build in builders]
        if runner.error is not None:
            timing.release_memory(self.device)
        return runner

    def peak_memory(self, provider: Provider, case: Case, direction: str, one: Inputs) -> int:
        def work():
            make_call(provider, one, case.causal, direction, case.window)()

        work()  # the first call may allocate what stays, such as a library's workspace
        return timing.peak_bytes(self.device, work)[0]

    def results(self, method: str) -> dict:
        """The content of the results file."""
        return {
            "kind": "shapes" if self.args.shapes else "attention",
            "environment": self.environment,
            "method": method,
            "guards": list(self.guards.values()),
            "rows": [cell.row() for cell in self.cells.values()],
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--providers", nargs="+", metavar="KEY",
                        help="keys or names, or all (default: ours flash cudnn)")  # fmt: skip
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(cases.HEAD_DIMS))
    parser.add_argument("--seqlens", nargs="+", type=int, default=list(cases.SEQLENS))
    parser.add_argument("--shapes", action="store_true", help="other shapes in place of the grid")
    parser.add_argument("--causal", action="store_true", help="causal cells only")
    parser.add_argument("--full", action="store_true", help="full (not causal) cells only")
    parser.add_argument("--directions", nargs="+", choices=cases.DIRECTIONS,
                        default=["forward", "backward"])  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=cases.MODES, default=["eager"])
    parser.add_argument("--dtype", choices=list(cases.DTYPES), default="bf16")
    parser.add_argument("--tokens", type=int, default=cases.TOKENS, help="batch x seqlen")
    parser.add_argument("--hidden", type=int, default=cases.HIDDEN, help="heads x head dim")
    parser.add_argument("--passes", type=int, default=2, help="independent runs of the grid")
    parser.add_argument("--rounds", type=int, default=6, help="turns of a provider in a cell")
    parser.add_argument("--iters", type=int, default=10, help="most calls in a turn")
    parser.add_argument("--turn-ms", type=float, default=50.0, help="time budget of a turn")
    parser.add_argument("--quick", action="store_true",
                        help="a look: one pass, one round, lengths 512, 2048, 8192")  # fmt: skip


def select_cases(args: argparse.Namespace) -> list[Case]:
    """The cells that the arguments leave of the grid, or the other shapes."""
    if args.shapes:
        return [replace(case, dtype=args.dtype) for case in cases.SHAPES]
    masks = (False, True) if args.causal == args.full else (args.causal,)
    return cases.grid(args.head_dims, args.seqlens, masks, args.dtype, args.tokens, args.hidden)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and writes its results; 1 when a cell of ours failed."""
    if args.quick:
        args.passes = args.rounds = 1
        args.seqlens = [s for s in args.seqlens if s in (512, 2048, 8192)] or args.seqlens
    benchmark = Benchmark(args, select_providers(torch.device(args.device), args.providers))
    selected = select_cases(args)
    if benchmark.device.type == "cpu" and "graph" in args.modes:
        raise UsageError("modes: graph needs a CUDA device, got cpu")
    method = METHOD.format(rounds=args.rounds, iters=args.iters, passes=args.passes)
    timing.raise_clocks(benchmark.device)
    begin = time.perf_counter()
    steps = [(number, case) for number in range(args.passes) for case in selected]
    for number, case in (progress := tqdm(steps, unit="case", disable=None)):
        progress.set_postfix_str(f"pass {number + 1}, {case.label()}")
        benchmark.run_case(case, seed=1000 * number)
        # After every case, so that a run that is ended early keeps what it has measured.
        path = report.save(args, benchmark.results(method))
    results = report.load(path)
    print(report.attention_markdown(results))
    print(f"{path}, {time.perf_counter() - begin:.0f} s")
    failed = [row for row in results["rows"] if row["error"] and report.is_ours(row["provider"])]
    return 1 if failed else 0
