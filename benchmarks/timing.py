"""Clocks, statistics, turn taking, CUDA graphs and peak memory.

Nothing here knows about attention: a ``Runner`` is a name and some callables that do the same work
on different data.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

MIN_CALLS_PER_TURN = 3
WARMUP_CALLS = 3


@dataclass(frozen=True)
class Stats:
    """Median and the 20th and 80th percentile of ``count`` samples, in the samples' unit."""

    median: float
    p20: float
    p80: float
    count: int


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which ``share`` (0 to 1) of the samples lie, linearly interpolated."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples: Sequence[float]) -> Stats:
    """Statistics of at least one sample."""
    if not samples:
        raise ValueError("samples: at least one is needed, got none")
    return Stats(
        median=statistics.median(samples),
        p20=percentile(samples, 0.2),
        p80=percentile(samples, 0.8),
        count=len(samples),
    )


class CudaClock:
    """Times calls with CUDA events on the current stream; the host runs ahead of the device."""

    def __init__(self, device: torch.device):
        self.device = device

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def time_calls(self, calls: Sequence[Callable], count: int) -> list[float]:
        """Milliseconds of each of ``count`` back-to-back calls, cycling through ``calls``."""
        begins = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        self.synchronize()
        for call, begin, end in zip(itertools.cycle(calls), begins, ends, strict=False):
            begin.record()
            call()
            end.record()
        self.synchronize()
        return [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]


class HostClock:
    """Times calls with the host's clock, for devices without events (the CPU)."""

    def synchronize(self) -> None:
        pass

    def time_calls(self, calls: Sequence[Callable], count: int) -> list[float]:
        """Milliseconds of each of ``count`` calls, cycling through ``calls``."""
        samples = []
        for call in itertools.islice(itertools.cycle(calls), count):
            begin = time.perf_counter()
            call()
            samples.append((time.perf_counter() - begin) * 1e3)
        return samples


def make_clock(device: torch.device) -> CudaClock | HostClock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass
class Runner:
    """A contestant: ``calls`` do the same work on different data, inside ``context``."""

    name: str
    calls: Sequence[Callable]
    context: Callable[[], AbstractContextManager] = nullcontext
    samples: list[float] = field(default_factory=list)
    error: str | None = None


def describe_error(error: Exception) -> str:
    """The exception's type and the first line of its text, for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


@contextmanager
def recorded_failure(runner: Runner):
    """Turns an exception into ``runner.error``, so that one contestant cannot end the run."""
    try:
        yield
    except Exception as error:
        runner.error = describe_error(error)
        runner.calls = ()
        runner.samples.clear()


def calls_per_turn(clock, runner: Runner, limit: int, turn_ms: float) -> int:
    """Warms ``runner`` up and returns how many of its calls fit in a turn of ``turn_ms``."""
    clock.time_calls(runner.calls, max(WARMUP_CALLS, len(runner.calls)))
    fastest = min(clock.time_calls(runner.calls, WARMUP_CALLS))
    fitting = int(min(limit, turn_ms / max(fastest, 1e-3)))
    return max(min(MIN_CALLS_PER_TURN, limit), fitting)


def turn_orders(runners: Sequence[Runner]) -> Iterator[list[Runner]]:
    """Endless orders of the runners, after Williams' balanced design.

    In n rounds (2 n where n is odd) every runner comes right after each other one equally often.
    """
    count = len(runners)
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]  # 0, 1, -1, 2, -2, ...
    for turn in itertools.count():
        order = [runners[(place + turn) % count] for place in zigzag]
        mirrored = count % 2 == 1 and turn // count % 2 == 1
        yield order[::-1] if mirrored else order


def take_turns(clock, runners: Sequence[Runner], rounds: int, limit: int, turn_ms: float) -> None:
    """Fills each runner's ``samples`` (milliseconds) over ``rounds`` rounds.

    In a round every runner has one turn: one call that is not counted, then up to ``limit`` calls,
    fewer (but at least 3) when they would exceed ``turn_ms``. The order changes from round
    to round (``turn_orders``): a runner that draws much power slows the one that follows it.
    """
    counts = {}
    for runner in runners:
        if runner.error is None:
            with recorded_failure(runner), runner.context():
                counts[runner.name] = calls_per_turn(clock, runner, limit, turn_ms)
    for order in itertools.islice(turn_orders(runners), rounds):
        for runner in order:
            if runner.error is None:
                with recorded_failure(runner), runner.context():
                    samples = clock.time_calls(runner.calls, 1 + counts[runner.name])
                    runner.samples += samples[1:]


def capture_graph(build: Callable[[], Callable]) -> Callable:
    """Captures the call that ``build`` returns in a CUDA graph; returns the graph's replay.

    ``build`` runs on the capturing stream too: autograd runs each backward step on the stream of
    its forward step, and a capture must not touch another stream.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = build()
        for _ in range(WARMUP_CALLS):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = call()
    torch.cuda.synchronize()

    def replay(alive=(call, outputs)):  # the memory that the graph reads and writes lives with it
        graph.replay()
        return alive[1]

    return replay


def cache_bytes(device: torch.device) -> int:
    """Size of the device's last cache; for a CPU 1 MiB, of the order of a core's own."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 1 << 20


def input_sets(bytes_per_set: int, cache: int, most: int = 16) -> int:
    """How many input sets to rotate so that together they are at least twice the cache.

    One set that is larger than the cache needs no rotation.
    """
    if bytes_per_set > cache:
        return 1
    return min(most, math.ceil(2 * cache / bytes_per_set))


def peak_bytes(device: torch.device, work: Callable[[], object]) -> tuple[int, object]:
    """Peak device memory that ``work`` takes above what is allocated now, and its result."""
    torch.cuda.synchronize(device)
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - base, result


def release_memory(device: torch.device) -> None:
    """Gives cached blocks back, so that one cell's leftovers cannot starve the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def raise_clocks(device: torch.device, seconds: float = 1.0) -> None:
    """Keeps the device busy with matrix products, so that its clocks are up before timing."""
    if device.type != "cuda":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize(device)
