#!/usr/bin/env python3
"""Runs nvcc and keeps what ptxas says about registers and spills beside the object file.

    python tools/nvcc_logged.py [ccache] /path/to/nvcc ARGUMENTS -o OBJECT

The build passes -Xptxas -v; the answer comes on stderr. All of it goes to OBJECT.ptxas, from where
cuda_build.ptxas reads it at the end; warnings and errors also go on to the terminal. ccache stores
and replays stderr, so a cached object has its log too.

torch's build has one list of flags for all sources; those under csrc/sm90 get their own here. They
are compiled for sm_90a alone, as no other architecture runs them, and with all of CuTe's wgmma
atoms, whose headers would cost every other source 20 s.
"""

import subprocess
import sys
from pathlib import Path

# Empty, as `#define NAME` has it: N in steps of 8. CuTe's headers ask whether it is defined.
SM90_FLAGS = ["-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED="]


def main(command: list[str]) -> int:
    result = subprocess.run(
        for_its_family(command), stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if "-o" in command:
        with open(command[command.index("-o") + 1] + ".ptxas", "w") as log:
            log.write(result.stderr)
    lines = result.stderr.splitlines(keepends=True)
    if result.returncode == 0:
        lines = [line for line in lines if not is_resource_line(line)]
    sys.stderr.writelines(lines)
    return result.returncode


def for_its_family(command: list[str]) -> list[str]:
    """The command with the flags of its source's kernel family."""
    if not any(Path(word).suffix == ".cu" and "sm90" in Path(word).parts for word in command):
        return command
    kept = [word for word in command if not word.startswith("-gencode") or "sm_90a" in word]
    return [*kept, *SM90_FLAGS]


def is_resource_line(line: str) -> bool:
    return line.startswith("ptxas info") or line.strip().endswith("bytes spill loads")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
