#!/usr/bin/env python3
"""Runs nvcc and keeps what ptxas says about registers and spills beside the object file.

    python tools/nvcc_logged.py [ccache] /path/to/nvcc ARGUMENTS -o OBJECT

The build passes -Xptxas -v; the answer comes on stderr. All of it goes to OBJECT.ptxas, from where
cuda_build.ptxas reads it at the end; warnings and errors also go on to the terminal. ccache stores
and replays stderr, so a cached object has its log too.

Sources under csrc/sm90 are compiled for sm_90a alone: other architectures do not run them, and
torch's build has one list of flags for all.
"""

import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
    result = subprocess.run(
        for_its_archs(command), stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if "-o" in command:
        with open(command[command.index("-o") + 1] + ".ptxas", "w") as log:
            log.write(result.stderr)
    lines = result.stderr.splitlines(keepends=True)
    if result.returncode == 0:
        lines = [line for line in lines if not is_resource_line(line)]
    sys.stderr.writelines(lines)
    return result.returncode


def for_its_archs(command: list[str]) -> list[str]:
    """The command without the architectures that its source is not for."""
    if not any(Path(word).suffix == ".cu" and "sm90" in Path(word).parts for word in command):
        return command
    return [word for word in command if not word.startswith("-gencode") or "sm_90a" in word]


def is_resource_line(line: str) -> bool:
    return line.startswith("ptxas info") or line.strip().endswith("bytes spill loads")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
