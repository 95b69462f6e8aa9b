#!/usr/bin/env python3
"""Fails when a kernel spills registers, or when there are more kernels than the budget allows.

    python tools/check_kernels.py [RESOURCES]

RESOURCES is what the build wrote (default: flash_attn2/_kernel_resources.json). The limits are in
tools/kernel_budget.json:
    entries_per_arch   the most kernel entries that one architecture may have
    spills             the kernels that may spill: {name: {"max_bytes": n, "reason": why}}
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from cuda_build.ptxas import RESOURCE_FILE, KernelResources, read_resources  # noqa: E402


def problems(entries: Sequence[KernelResources], budget: dict[str, Any]) -> list[str]:
    """What is wrong with the kernels, one sentence each; empty when all is well."""
    found = []
    if not entries:
        found.append("the build lists no kernel entry at all")
    for arch, count in sorted(Counter(entry.arch for entry in entries).items()):
        if count > budget["entries_per_arch"]:
            found.append(
                f"{arch} has {count} kernel entries, the budget is {budget['entries_per_arch']} "
                "(entries_per_arch): drop some, or raise the budget and say why in the commit"
            )
    for entry in entries:
        allowed = budget["spills"].get(entry.name, {"max_bytes": 0})["max_bytes"]
        if entry.spill_bytes > allowed:
            found.append(
                f"{entry.name} on {entry.arch} spills {entry.spill_bytes} bytes "
                f"({entry.registers} registers), allowed are {allowed}"
            )
    for name, allowance in budget["spills"].items():
        if not allowance.get("reason", "").strip():
            found.append(f"{name} is allowed to spill without a reason")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Check spills and the number of kernels.")
    default = HERE.parent / "flash_attn2" / RESOURCE_FILE
    parser.add_argument("resources", type=Path, nargs="?", default=default)
    arguments = parser.parse_args()
    if not arguments.resources.is_file():
        sys.exit(f"{arguments.resources} is not there: build the CUDA extension first (make build)")
    entries = read_resources(arguments.resources)
    budget = json.loads((HERE / "kernel_budget.json").read_text())
    found = problems(entries, budget)
    for problem in found:
        print(f"check_kernels: {problem}", file=sys.stderr)
    if found:
        sys.exit(1)
    counts = Counter(entry.arch for entry in entries)
    shown = ", ".join(f"{arch}: {count}" for arch, count in sorted(counts.items()))
    print(f"check_kernels: {shown} entries of {budget['entries_per_arch']}; no spill off the list")


if __name__ == "__main__":
    main()
