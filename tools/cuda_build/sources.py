"""Which source files make the extension."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .settings import BuildError, InstanceFilter


def is_instance(source: Path) -> bool:
    """Whether ``source`` is a kernel instance file, which a filter may leave out."""
    return source.parent.name == "instances"


def select_sources(csrc: Path, instance_filter: InstanceFilter, archs: Sequence[str]) -> list[Path]:
    """All .cpp and .cu files under ``csrc``, less the instance files the filter leaves out.

    The sm90 family is code for sm_90a alone: without that arch its kernels are left out as well.
    """
    sources = [path for pattern in ("*.cpp", "*.cu") for path in csrc.rglob(pattern)]
    if "90a" not in archs:
        sources = [path for path in sources if "sm90" not in path.relative_to(csrc).parts]
    instances = [path for path in sources if is_instance(path)]
    chosen = [path for path in instances if instance_filter.accepts(path)]
    if instances and not chosen:
        known = ", ".join(sorted({path.stem for path in instances}))
        raise BuildError(f"FLASH_ATTN2_FILTER fits no instance file; there are: {known}")
    return sorted(path for path in sources if path in chosen or not is_instance(path))
