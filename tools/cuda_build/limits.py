"""How many compilers to run at once, and what the build took."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from .settings import BuildError

GIB = 1024**3
JOB_BYTES = 4 * GIB  # what nvcc may need for the largest instance file


def job_count(environ: Mapping[str, str], cores: int, free_bytes: int) -> int:
    """Compilers to run at once: MAX_JOBS if set, else one per core and per JOB_BYTES free."""
    asked = environ.get("MAX_JOBS", "").strip()
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise BuildError(f"MAX_JOBS={asked!r}: expected a number of jobs, 1 or more")
        return int(asked)
    return max(1, min(cores, free_bytes // JOB_BYTES))


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def available_memory(root: Path = Path("/")) -> int:
    """Free memory in bytes: the machine's, or the control group's where that is less."""
    fields = dict(
        line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines() if line
    )
    free = int(fields["MemAvailable"].split()[0]) * 1024
    groups = (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    )
    for limit_file, used_file in groups:
        limit, used = _read_number(root / limit_file), _read_number(root / used_file)
        if limit is not None and used is not None:
            free = min(free, max(0, limit - used))
    return free


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


class BuildMonitor:
    """Measures a ``with`` block: wall seconds and the peak memory of this process and its children.

    Memory is the sum of the resident sets over the process tree, sampled from /proc. Pages that
    processes share count once each, so the figure errs on the large side.
    """

    def __init__(self, interval: float = 0.2) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> BuildMonitor:
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._start

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, tree_rss(os.getpid()))
            if self._stop.wait(self._interval):
                return


def tree_rss(root_pid: int) -> int:
    """Resident memory in bytes of a process and all its descendants."""
    page = os.sysconf("SC_PAGE_SIZE")
    parents, resident = {}, {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            # Fields after the command's closing parenthesis, which itself may hold spaces:
            # index 1 is the parent, index 21 the resident pages.
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process has just ended
        parents[int(entry.name)] = int(fields[1])
        resident[int(entry.name)] = int(fields[21]) * page

    def descends(pid: int) -> bool:
        while pid and pid != root_pid:
            pid = parents.get(pid, 0)
        return pid == root_pid

    return sum(size for pid, size in resident.items() if descends(pid))
