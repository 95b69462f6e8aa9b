"""Reads ptxas's logs: registers, spills and stack of every kernel entry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESOURCE_FILE = "_kernel_resources.json"

_ENTRY = re.compile(r"Compiling entry function '(?P<entry>\S+)' for '(?P<arch>\w+)'")
_PROPERTIES = re.compile(r"Function properties for (?P<function>\S+)")
_STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
)
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")

_DTYPES = {"bfloat16_t": "bf16", "half_t": "fp16"}  # cutlass's names


@dataclass
class KernelResources:
    """What ptxas gave one kernel entry on one architecture. Bytes are per thread."""

    name: str
    entry: str  # mangled
    arch: str  # e.g. sm_90a
    registers: int = 0
    spill_bytes: int = 0  # stores plus loads
    stack_bytes: int = 0


def parse_log(text: str) -> list[KernelResources]:
    """The kernel entries in the stderr of one ``nvcc -Xptxas -v``, in its order.

    Spills and stack of a device function that was not inlined count for the entry compiled with it.
    """
    entries: list[KernelResources] = []
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            entries.append(KernelResources(row_name(match["entry"]), match["entry"], match["arch"]))
        elif not entries:
            continue
        elif match := _STACK.search(line):
            entries[-1].spill_bytes += int(match["stores"]) + int(match["loads"])
            entries[-1].stack_bytes += int(match["stack"])
        elif match := _REGISTERS.search(line):
            entries[-1].registers = int(match["registers"])
    return entries


def row_name(mangled: str) -> str:
    """The registry row's name of a main kernel; a readable name for any other entry.

    flash_attn2::sm80::forward_kernel<ForwardTraits<bfloat16_t, 128, 128, 64, ...>> is the row
    sm80_fwd_bf16_d128_128x64: the traits name dtype, head dim, tile_m and tile_n in this order, and
    those of sm90 then V's head dim and the thread blocks of a cluster.
    Other kernels, such as the backward's pre- and post-processing, get family, function, dtype and
    their numbers: sm80 backward_convert_dq_kernel<fp16, 64>.
    """
    words = identifiers(mangled)
    function = next((word for word in words if word.endswith("_kernel")), None)
    if function is None:
        return mangled
    family = next((word for word in words if re.fullmatch(r"sm\d+", word)), None)
    dtype = next((_DTYPES[word] for word in words if word in _DTYPES), None)
    numbers = re.findall(r"L[a-z](\d+)E", mangled)
    direction = {"forward_kernel": "fwd", "backward_kernel": "bwd"}.get(function)
    if direction and family and dtype and len(numbers) >= 3:
        head_dim, tile_m, tile_n = numbers[:3]
        head_dim_v = numbers[3] if family == "sm90" else head_dim
        value = f"_v{head_dim_v}" if head_dim_v != head_dim else ""
        cluster = numbers[4] if family == "sm90" else "1"
        blocks = f"_x{cluster}" if cluster != "1" else ""
        return f"{family}_{direction}_{dtype}_d{head_dim}{value}_{tile_m}x{tile_n}{blocks}"
    arguments = ", ".join(([dtype] if dtype else []) + numbers)
    return (f"{family} " if family else "") + function + (f"<{arguments}>" if arguments else "")


def identifiers(mangled: str) -> list[str]:
    """The names in an Itanium-mangled symbol, in order: each is its length, then its letters."""
    words, position = [], 0
    while position < len(mangled):
        token = _TOKEN.match(mangled, position)
        position = token.end()
        if token["length"]:
            end = position + int(token["length"])
            words.append(mangled[position:end])
            position = end
    return words


# Substitutions (S1_), template parameters (T0_) and values (Li128E) hold numbers that are not the
# length of a name.
_TOKEN = re.compile(r"S[0-9A-Z]*_|T[0-9A-Z]*_|L[a-z]n?\d+E|(?P<length>\d+)|.", re.DOTALL)


def read_logs(logs: Iterable[Path]) -> list[KernelResources]:
    """The entries of all logs, by architecture, then name."""
    entries = [entry for log in logs for entry in parse_log(log.read_text(errors="replace"))]
    return sorted(entries, key=lambda entry: (entry.arch, entry.name, entry.entry))


def write_resources(path: Path, entries: Sequence[KernelResources]) -> None:
    """Writes flash_attn2/_kernel_resources.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(entry) for entry in entries]
    path.write_text(json.dumps({"entries": rows}, indent=1) + "\n")


def read_resources(path: Path) -> list[KernelResources]:
    """Reads what write_resources wrote."""
    return [KernelResources(**row) for row in json.loads(path.read_text())["entries"]]


def format_table(entries: Sequence[KernelResources]) -> str:
    """One line per entry: arch, registers, spill and stack bytes, name."""
    lines = [f"{'arch':8} {'registers':>9} {'spill B':>8} {'stack B':>8}  kernel"]
    lines += [
        f"{e.arch:8} {e.registers:9} {e.spill_bytes:8} {e.stack_bytes:8}  {e.name}" for e in entries
    ]
    return "\n".join(lines)
