#!/usr/bin/env python3
"""Runs nvcc and keeps what ptxas says about registers and spills beside the object file.

    python tools/nvcc_logged.py [ccache] /path/to/nvcc ARGUMENTS -o OBJECT

The build passes -Xptxas -v; the answer comes on stderr. All of it goes to OBJECT.ptxas, from where
cuda_build.ptxas reads it at the end; warnings and errors also go on to the terminal. ccache stores
and replays stderr, so a cached object has its log too.
"""

import subprocess
import sys


def main(command: list[str]) -> int:
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if "-o" in command:
        with open(command[command.index("-o") + 1] + ".ptxas", "w") as log:
            log.write(result.stderr)
    lines = result.stderr.splitlines(keepends=True)
    if result.returncode == 0:
        lines = [line for line in lines if not is_resource_line(line)]
    sys.stderr.writelines(lines)
    return result.returncode


def is_resource_line(line: str) -> bool:
    return line.startswith("ptxas info") or line.strip().endswith("bytes spill loads")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
