#!/usr/bin/env python3
"""Says whether the CUDA extension can be built here; exit status 0 if so, 1 with the reason if not.

    python tools/can_build.py [--for-this-gpu]

With --for-this-gpu the answer is no on a machine without a GPU that the kernels run on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cuda_build import settings, toolchain
from cuda_build.command import find_fitting_toolkit, gpu_capabilities


def main() -> None:
    parser = argparse.ArgumentParser(description="Can the CUDA extension be built here?")
    parser.add_argument("--for-this-gpu", action="store_true", help="only where a GPU can run it")
    arguments = parser.parse_args()
    try:
        torch = toolchain.import_torch()
        if arguments.for_this_gpu and not has_fitting_gpu(torch):
            sys.exit("No CUDA build: this machine has no GPU of sm_80 or newer.")
        find_fitting_toolkit(torch)
    except settings.BuildError as error:
        sys.exit(f"No CUDA build:{error}")


def has_fitting_gpu(torch: Any) -> bool:
    oldest = divmod(settings.MIN_ARCH, 10)
    return any(capability >= oldest for capability in gpu_capabilities(torch))


if __name__ == "__main__":
    main()
