"""The setuptools command that builds flash_attn2._C."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from . import limits, ptxas, settings, sources, toolchain

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EXTENSION = "flash_attn2._C"

# -g0 because many Pythons pass on the -g they were built with.
CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-g0", "-fvisibility=hidden"]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "--use_fast_math",
    "-Xcompiler=-fvisibility=hidden",
    "-Xptxas=-v",
]


def placeholder_extension() -> Extension:
    """What setup.py declares: the name alone, for torch must not be imported for metadata."""
    return Extension(EXTENSION, sources=[])


class BuildCudaExtension(build_ext):
    """Builds the extension with torch's BuildExtension, and reports time, memory and kernels."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Not setuptools' own choice, which for an editable install is a folder that is deleted
        # afterwards: object files stay here, so that ninja rebuilds only what changed.
        self.build_temp = str(ROOT / "build" / f"{sysconfig.get_platform()}-{_python_tag()}")

    def run(self) -> None:
        if not self.distribution.ext_modules:  # FLASH_ATTN2_CUDA=0
            return
        with limits.BuildMonitor() as monitor:
            kernels = self._build()
        jobs = os.environ["MAX_JOBS"]
        print(f"\nKernels ({len(kernels)} entries):\n{ptxas.format_table(kernels)}")
        print(
            f"Built {EXTENSION} in {monitor.seconds:.0f} s with {jobs} job(s), "
            f"peak memory {monitor.peak_bytes / limits.GIB:.2f} GiB\n",
            flush=True,
        )

    def _build(self) -> list[ptxas.KernelResources]:
        torch = toolchain.import_torch()
        toolkit = find_fitting_toolkit(torch)
        archs = settings.choose_archs(os.environ, gpu_capabilities(torch))
        chosen = sources.select_sources(
            CSRC, settings.parse_filter(os.environ.get("FLASH_ATTN2_FILTER", "")), archs
        )
        set_tool_environment(toolkit)
        print(
            f"flash_attn2 {self.distribution.get_version()}: nvcc "
            f"{'.'.join(map(str, toolkit.version))} in {toolkit.home}, torch {torch.__version__}, "
            f"archs {';'.join(archs)}, {len(chosen)} sources, {os.environ['MAX_JOBS']} job(s)",
            flush=True,
        )

        version = self.distribution.get_version()
        self._run_torch_build(torch_extension(torch, chosen, archs, toolkit, version))
        objects = [Path(self.build_temp, path.relative_to(ROOT)) for path in chosen]
        kernels = ptxas.read_logs(
            path.with_suffix(".o.ptxas") for path in objects if path.suffix == ".cu"
        )
        package = Path(self.get_ext_fullpath(EXTENSION)).parent
        ptxas.write_resources(package / ptxas.RESOURCE_FILE, kernels)
        return kernels

    def _run_torch_build(self, extension: Extension) -> None:
        from torch.utils.cpp_extension import BuildExtension

        self.distribution.ext_modules[:] = [extension]
        command = BuildExtension(self.distribution)
        command.inplace, command.editable_mode = self.inplace, self.editable_mode
        command.build_lib, command.build_temp = self.build_lib, self.build_temp
        command.ensure_finalized()
        try:
            command.run()
        except RuntimeError as error:  # torch's, after ninja has printed what the compiler said
            raise settings.BuildError(f"{error}: see the compiler's message above") from None


def _python_tag() -> str:
    return f"{sys.implementation.name}{sys.version_info.major}{sys.version_info.minor}"


def find_fitting_toolkit(torch: Any) -> toolchain.Toolkit:
    """The toolkit to build with, or BuildError that says what does not fit this torch."""
    wheel_dirs = toolchain.nvidia_wheel_dirs(Path(torch.__file__).parent)
    found = toolchain.find_toolkit(os.environ, wheel_dirs)
    return toolchain.check(torch.__version__, torch.version.cuda, found, os.environ)


def gpu_capabilities(torch: Any) -> list[tuple[int, int]]:
    """Compute capabilities of this machine's GPUs, each once; empty where there is none."""
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return sorted({torch.cuda.get_device_capability(index) for index in range(count)})


def set_tool_environment(toolkit: toolchain.Toolkit) -> None:
    """Tells torch's build which nvcc to run, through what, and how many at once."""
    os.environ["CUDA_HOME"] = str(toolkit.home)
    wrapper = [sys.executable, str(ROOT / "tools" / "nvcc_logged.py")]
    ccache = shutil.which("ccache")
    if ccache:
        # ccache would otherwise compare preprocessed text, and nvcc -E shows one architecture
        # only: a change under __CUDA_ARCH__ >= 900 would hit the old object. In this mode it
        # compares the contents of every included file.
        os.environ["CCACHE_DEPEND"] = "1"
        os.environ.setdefault("CCACHE_BASEDIR", str(ROOT))
        wrapper.append(ccache)
    if not shutil.which("ninja"):  # installed beside this interpreter, but not in PATH
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    os.environ["PYTORCH_NVCC"] = shlex.join([*wrapper, str(toolkit.nvcc)])
    jobs = limits.job_count(os.environ, limits.available_cores(), limits.available_memory())
    os.environ["MAX_JOBS"] = str(jobs)


def torch_extension(
    torch: Any,
    chosen: Sequence[Path],
    archs: Sequence[str],
    toolkit: toolchain.Toolkit,
    version: str,
) -> Extension:
    """The extension as torch's BuildExtension takes it.

    Kernels (.cu) get the CUTLASS headers and csrc but none of torch's include folders: they must
    not depend on torch, and its headers take long to compile. Host files (.cpp) get torch's and,
    after the toolkit's, those of the nvidia wheels beside torch, which hold the cuBLAS, cuSPARSE
    and other headers that torch includes and that a small toolkit lacks.
    """
    from torch.utils.cpp_extension import CUDAExtension

    cutlass = fetch_cutlass()
    wheel_dirs = toolchain.nvidia_wheel_dirs(Path(torch.__file__).parent)
    extension = CUDAExtension(EXTENSION, [str(path.relative_to(ROOT)) for path in chosen])
    host_includes = list(extension.include_dirs)
    host_includes += [str(path / "include") for path in wheel_dirs if (path / "include").is_dir()]
    extension.include_dirs = [str(CSRC), str(cutlass)]

    library_dirs = toolkit.library_dirs + [path / "lib" for path in wheel_dirs]
    cudart = toolchain.find_cudart(library_dirs)
    if cudart is not None:
        if str(cudart[0]) not in extension.library_dirs:
            extension.library_dirs.append(str(cudart[0]))
        extension.libraries = [cudart[1] if x == "cudart" else x for x in extension.libraries]

    macros = [f'-DFLASH_ATTN2_VERSION="{version}"', f'-DFLASH_ATTN2_ARCHS="{";".join(archs)}"']
    extension.extra_compile_args = {
        "cxx": [*CXX_FLAGS, *macros, *(f"-I{path}" for path in host_includes)],
        "nvcc": [*NVCC_FLAGS, *settings.gencode_flags(archs)],
    }
    return extension


def fetch_cutlass() -> Path:
    """The include folder of the pinned CUTLASS headers, fetched if it is not there."""
    sys.path.insert(0, str(ROOT / "third_party"))
    try:
        from fetch_cutlass import FetchError, fetch

        return fetch()
    except FetchError as error:
        raise settings.BuildError(str(error)) from None
    finally:
        sys.path.pop(0)
