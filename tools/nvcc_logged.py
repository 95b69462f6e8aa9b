#!/usr/bin/env python3
"""Runs nvcc and keeps what ptxas says about registers and spills beside the object file.

    python tools/nvcc_logged.py [ccache] /path/to/nvcc ARGUMENTS -o OBJECT

The build passes -Xptxas -v; the answer comes on stderr. All of it goes to OBJECT.ptxas, from where
cuda_build.ptxas reads it at the end; warnings and errors also go on to the terminal. ccache stores
and replays stderr, so a cached object has its log too.

torch's build has one list of flags for all sources; some sources get their own here:
- csrc/sm90: compiled for sm_90a alone, as no other architecture runs them;
- the later rows of the sm80 backward's tile table: not compiled for sm_90a, which has the shared
  memory for the first row of every head dim. Each architecture is a compilation of its own;
- the sm80 forward, whose source is the same for all: its code for sm_90 comes from the compilation
  for another architecture, where there is one.
"""

import re
import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
    result = subprocess.run(
        for_its_source(command), stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if "-o" in command:
        with open(command[command.index("-o") + 1] + ".ptxas", "w") as log:
            log.write(result.stderr)
    lines = result.stderr.splitlines(keepends=True)
    if result.returncode == 0:
        lines = [line for line in lines if not is_resource_line(line)]
    sys.stderr.writelines(lines)
    return result.returncode


def for_its_source(command: list[str]) -> list[str]:
    """The command with the flags that its source takes."""
    source = next((Path(word) for word in command if word.endswith(".cu")), Path())
    if "sm90" in source.parts:
        return without_gencode(command, "(?!.*sm_90a)")
    if "sm80" in source.parts and re.search(r"_bwd_[1-9]", source.stem):
        return without_gencode(command, ".*sm_90a")
    if "sm80" in source.parts and "_fwd_" in source.stem:
        return with_shared_code_for_sm_90(command)
    return command


def without_gencode(command: list[str], pattern: str) -> list[str]:
    """The command without the -gencode flags whose rest matches ``pattern``."""
    return [word for word in command if not re.match(f"-gencode={pattern}", word)]


def with_shared_code_for_sm_90(command: list[str]) -> list[str]:
    """The command whose code for Hopper is made, for sm_90, in the compilation for another GPU.

    That is the first architecture of compute capability 8; without one nothing changes.
    """
    compiled = re.search(r"-gencode=arch=compute_(8\d),", " ".join(command))
    if compiled is None:
        return command
    shared = f"-gencode=arch=compute_{compiled[1]},code=sm_90"
    return [shared if word.endswith(",code=sm_90a") else word for word in command]


def is_resource_line(line: str) -> bool:
    return line.startswith("ptxas info") or line.strip().endswith("bytes spill loads")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
