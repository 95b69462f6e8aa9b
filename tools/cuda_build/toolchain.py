"""Finds nvcc and torch, and says which of them is missing or does not fit."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .settings import BuildError

PYTHON_ONLY = "For the Python-only package (CPU path), type:\n    FLASH_ATTN2_CUDA=0 pip install ."


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its root folder and the version (major, minor) of its nvcc."""

    home: Path
    version: tuple[int, int]

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def library_dirs(self) -> list[Path]:
        return [self.home / name for name in ("lib64", "lib") if (self.home / name).is_dir()]


def nvidia_wheel_dirs(torch_package: Path) -> list[Path]:
    """The folders of the nvidia-* wheels installed beside torch, each with include/ or lib/."""
    root = torch_package.parent / "nvidia"
    return sorted(path for path in root.glob("*") if path.is_dir())


def find_toolkit(environ: Mapping[str, str], wheel_dirs: Iterable[Path] = ()) -> Toolkit | None:
    """The toolkit of the first nvcc found, or None.

    Looked at in this order: CUDA_HOME or CUDA_PATH (alone, where one is set), PATH,
    /usr/local/cuda, and the nvidia-cuda-nvcc wheel beside torch.
    """
    asked = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if asked:
        candidates = [Path(asked) / "bin" / "nvcc"]
    else:
        on_path = shutil.which("nvcc", path=environ.get("PATH"))
        candidates = [Path(on_path)] if on_path else []
        candidates.append(Path("/usr/local/cuda/bin/nvcc"))
        candidates += [path / "bin" / "nvcc" for path in wheel_dirs]
    for nvcc in candidates:
        if nvcc.is_file() and os.access(nvcc, os.X_OK):
            return describe_toolkit(nvcc)
    return None


def describe_toolkit(nvcc: Path) -> Toolkit:
    """Asks ``nvcc`` for its version and for its root, which a script in PATH may hide."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"release (\d+)\.(\d+)", version.stdout)
    if match is None:
        raise BuildError(f"{nvcc} --version names no release:\n{version.stdout}")
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    home = Path(top[1].strip()) if top else nvcc.parent.parent
    return Toolkit(home.resolve(), (int(match[1]), int(match[2])))


def import_torch() -> Any:
    """Imports torch, or says how to install it and how to let an isolated build see it."""
    if importlib.util.find_spec("torch") is None:
        raise BuildError(
            "torch is not installed where this build can see it. Install it first; and if it is "
            "installed, build without an isolated environment:\n"
            "    pip install torch\n"
            "    pip install --no-build-isolation .    (python -m build: --no-isolation)\n"
            f"{PYTHON_ONLY}"
        )
    import torch

    return torch


def check(
    torch_version: str,
    torch_cuda: str | None,
    toolkit: Toolkit | None,
    environ: Mapping[str, str],
) -> Toolkit:
    """Returns ``toolkit`` if it can build for this torch, else raises BuildError with the reason.

    ``torch_cuda`` is torch.version.cuda ("13.0"), None for a CPU-only torch.
    """
    if torch_cuda is None:
        raise BuildError(
            f"the installed torch {torch_version} is CPU-only (torch.version.cuda is None), and "
            "the kernels need a torch built for CUDA. Type:\n"
            f"    pip install --force-reinstall torch=={torch_version.split('+')[0]}\n"
            "from an index that carries CUDA builds, then install flash_attn2 again.\n"
            f"{PYTHON_ONLY}"
        )
    major = torch_cuda.split(".")[0]
    if toolkit is None:
        asked = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
        looked = "CUDA_HOME, PATH, /usr/local/cuda"
        if asked:
            looked = f"CUDA_HOME={asked} and, as that is set, nowhere else"
        raise BuildError(
            f"no nvcc found (looked at {looked}). torch {torch_version} is built for CUDA "
            f"{torch_cuda}: install a CUDA {major} toolkit and type:\n"
            f"    CUDA_HOME=/path/to/cuda-{torch_cuda} pip install .\n"
            f"{nvcc_from_pip(torch_cuda)}{PYTHON_ONLY}"
        )
    if str(toolkit.version[0]) != major:
        found = ".".join(map(str, toolkit.version))
        raise BuildError(
            f"nvcc in {toolkit.home} is CUDA {found}, but torch {torch_version} is built for CUDA "
            f"{torch_cuda}: the majors must be equal. Point CUDA_HOME at a CUDA {major} toolkit:\n"
            f"    CUDA_HOME=/path/to/cuda-{torch_cuda} pip install .\n"
            f"or install a torch built for CUDA {toolkit.version[0]}.\n"
            f"{PYTHON_ONLY}"
        )
    return toolkit


def nvcc_from_pip(torch_cuda: str) -> str:
    """The hint that wheels carry nvcc too, which is so from CUDA 13 on; else nothing."""
    if int(torch_cuda.split(".")[0]) < 13:
        return ""
    return (
        "or take nvcc from wheels:\n"
        f'    pip install "cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]=={torch_cuda}.*" && '
        "pip install .\n"
    )


def find_cudart(directories: Iterable[Path]) -> tuple[Path, str] | None:
    """The folder and the -l name of the CUDA runtime library: (path, "cudart").

    The wheels carry libcudart.so.13 without the bare name that a linker looks for, so there the
    name is ":libcudart.so.13".
    """
    directories = list(directories)
    for directory in directories:
        if (directory / "libcudart.so").exists():
            return directory, "cudart"
    for directory in directories:
        versioned = sorted(directory.glob("libcudart.so.*"))
        if versioned:
            return directory, f":{versioned[0].name}"
    return None
