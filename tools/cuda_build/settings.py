"""What the environment asks of the build: architectures, filter, CUDA on or off."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIN_ARCH = 80
DEFAULT_ARCHS = ("80", "90a")
DTYPES = ("bf16", "fp16")
FAMILIES = ("sm80", "sm90")


class BuildError(SystemExit):
    """Ends the build with a message that says what to type, and with no traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nflash_attn2: {message}\n")


def cuda_wanted(environ: Mapping[str, str]) -> bool:
    """Whether the CUDA extension is to be built: FLASH_ATTN2_CUDA is unset or 1, not 0."""
    value = environ.get("FLASH_ATTN2_CUDA", "1").strip()
    if value not in ("0", "1"):
        raise BuildError(f"FLASH_ATTN2_CUDA={value!r}: expected 0 (Python only) or 1")
    return value == "1"


def parse_archs(text: str) -> tuple[str, ...]:
    """Parses FLASH_ATTN2_ARCHS, e.g. "80;90a", into ("80", "90a"): sorted, each once.

    Separators are ; , or space. An arch is a compute capability without its dot, 80 or more, with
    an optional suffix a or f for code that only that architecture (family) runs.
    """
    archs = set()
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d{2,3})([af]?)", word)
        if match is None:
            raise BuildError(
                f"FLASH_ATTN2_ARCHS={text!r}: {word!r} is no architecture; "
                'expected e.g. "80;90a" (compute capability without the dot)'
            )
        if int(match[1]) < MIN_ARCH:
            raise BuildError(
                f"FLASH_ATTN2_ARCHS={text!r}: {word} is older than sm_{MIN_ARCH}, "
                "the oldest architecture the kernels run on"
            )
        archs.add(word)
    return tuple(sorted(archs, key=arch_key))


def arch_key(arch: str) -> tuple[int, str]:
    """Sorts "80" < "90" < "90a" < "100"."""
    return int(arch.rstrip("af")), arch


def choose_archs(
    environ: Mapping[str, str], capabilities: Sequence[tuple[int, int]]
) -> tuple[str, ...]:
    """The architectures to build for.

    FLASH_ATTN2_ARCHS if it is set, else those of this machine's GPUs (``capabilities``, one pair
    (major, minor) each; 9.0 becomes 90a), else 80 and 90a.
    """
    if environ.get("FLASH_ATTN2_ARCHS", "").strip():
        return parse_archs(environ["FLASH_ATTN2_ARCHS"])
    archs = {
        "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
        for major, minor in capabilities
        if 10 * major + minor >= MIN_ARCH
    }
    return tuple(sorted(archs, key=arch_key)) or DEFAULT_ARCHS


def gencode_flags(archs: Sequence[str]) -> list[str]:
    """nvcc's -gencode flags: machine code for each arch, and PTX that newer GPUs can run.

    The PTX is that of the newest arch without a suffix, because code for 90a is for 90 alone.
    Where every arch has a suffix, the PTX of the oldest one's base is compiled besides.
    """
    generic = [arch for arch in archs if arch.isdigit()]
    with_ptx = max(generic, key=int, default=None)
    flags = []
    for arch in archs:
        code = f"[sm_{arch},compute_{arch}]" if arch == with_ptx else f"sm_{arch}"
        flags.append(f"-gencode=arch=compute_{arch},code={code}")
    if with_ptx is None:
        base = min(archs, key=arch_key).rstrip("af")
        flags.append(f"-gencode=arch=compute_{base},code=compute_{base}")
    return flags


@dataclass(frozen=True)
class InstanceFilter:
    """Which kernel instance files to build; an empty tuple accepts all.

    Instance files are called {family}/instances/{dtype}_d{head_dim}*.cu, where V's head dim differs
    {dtype}_d{head_dim}_v{head_dim_v}*.cu. A head dim is that of Q: d192 accepts every V's.
    """

    dtypes: tuple[str, ...] = ()
    head_dims: tuple[str, ...] = ()
    families: tuple[str, ...] = ()

    def accepts(self, source: Path) -> bool:
        words = [*source.stem.split("_"), source.parent.parent.name]
        return all(
            not wanted or any(word in wanted for word in words)
            for wanted in (self.dtypes, self.head_dims, self.families)
        )


def parse_filter(text: str) -> InstanceFilter:
    """Parses FLASH_ATTN2_FILTER, e.g. "d128,bf16,sm90" or "d64,d128".

    Words of one kind (head dims; dtypes; families) are alternatives, and all kinds must fit.
    """
    dtypes, head_dims, families = [], [], []
    for word in filter(None, re.split(r"[;,\s]+", text.strip())):
        if word in DTYPES:
            dtypes.append(word)
        elif re.fullmatch(r"d\d+", word):
            head_dims.append(word)
        elif word in FAMILIES:
            families.append(word)
        else:
            raise BuildError(
                f"FLASH_ATTN2_FILTER={text!r}: {word!r} is neither a head dim (d64, d128, ...) "
                f"nor a dtype ({', '.join(DTYPES)}) nor a family ({', '.join(FAMILIES)})"
            )
    return InstanceFilter(tuple(dtypes), tuple(head_dims), tuple(families))
