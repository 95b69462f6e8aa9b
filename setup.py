"""Builds flash_attn2. Metadata is in pyproject.toml; the CUDA build is in tools/cuda_build."""

import os
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

from cuda_build.command import BuildCudaExtension, placeholder_extension
from cuda_build.settings import cuda_wanted

setup(
    ext_modules=[placeholder_extension()] if cuda_wanted(os.environ) else [],
    cmdclass={"build_ext": BuildCudaExtension},
)
