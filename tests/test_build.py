"""The build: its settings, sources, messages and packages. Nothing here compiles the kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import nvcc_logged
import pytest
from cuda_build import command, limits, settings, sources, toolchain
from cuda_build.settings import BuildError, InstanceFilter

ROOT = Path(__file__).resolve().parents[1]

# A module that stands in for torch and fails when it is used: for what must work without torch.
BLOCK_TORCH = "raise ImportError('torch must not be imported here')\n"


# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80", ("80",)),
        ("80;90a", ("80", "90a")),
        ("90a, 80 80", ("80", "90a")),
        ("120;100a;90", ("90", "100a", "120")),
    ],
)
def test_archs_are_sorted_and_unique(text, archs):
    assert settings.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["75", "8.0", "sm_80", "80;", "90b", "all"])
def test_bad_archs_name_the_value(text):
    with pytest.raises(BuildError) as caught:
        settings.parse_archs(text)
    assert f"FLASH_ATTN2_ARCHS={text!r}" in str(caught.value)


def test_archs_default_to_this_machines_gpus():
    choose = settings.choose_archs
    assert choose({}, [(9, 0)]) == ("90a",)
    assert choose({}, [(8, 0), (8, 9), (9, 0), (7, 5)]) == ("80", "89", "90a")
    assert choose({}, []) == ("80", "90a")
    assert choose({}, [(7, 5)]) == ("80", "90a")
    assert choose({"FLASH_ATTN2_ARCHS": "86"}, [(9, 0)]) == ("86",)


def test_the_extension_is_built_for_gpus_torch_reports():
    pairs = [(9, 0), (8, 9), (9, 0)]
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: len(pairs),
        get_device_capability=lambda index: pairs[index],
    )
    assert command.gpu_capabilities(types.SimpleNamespace(cuda=cuda)) == [(8, 9), (9, 0)]
    cuda.is_available = lambda: False
    assert command.gpu_capabilities(types.SimpleNamespace(cuda=cuda)) == []


def test_every_build_carries_ptx_that_newer_gpus_run():
    assert settings.gencode_flags(["80", "90a"]) == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    assert settings.gencode_flags(["80", "89"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_89,code=[sm_89,compute_89]",
    ]
    assert settings.gencode_flags(["90a"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(("value", "wanted"), [(None, True), ("1", True), ("0", False)])
def test_cuda_switch(value, wanted):
    environ = {} if value is None else {"FLASH_ATTN2_CUDA": value}
    assert settings.cuda_wanted(environ) is wanted


def test_cuda_switch_refuses_other_values():
    with pytest.raises(BuildError, match="FLASH_ATTN2_CUDA='off'"):
        settings.cuda_wanted({"FLASH_ATTN2_CUDA": "off"})


# --- filter and sources ---------------------------------------------------------------------------


@pytest.fixture
def csrc(tmp_path):
    names = ["ops/module.cpp", "plan/plan.cpp", "plan/plan.h", "common/preprocess.cu"]
    names += [f"sm80/instances/{t}_d{d}.cu" for t in ("bf16", "fp16") for d in (64, 128, 256)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "instances"),
    [
        ("", {"bf16_d64", "bf16_d128", "bf16_d256", "fp16_d64", "fp16_d128", "fp16_d256"}),
        ("d128,bf16", {"bf16_d128"}),
        ("d64 d128;fp16", {"fp16_d64", "fp16_d128"}),
        ("d64", {"bf16_d64", "fp16_d64"}),
        ("bf16", {"bf16_d64", "bf16_d128", "bf16_d256"}),
    ],
)
def test_filter_selects_instances_and_keeps_the_rest(csrc, text, instances):
    selected = sources.select_sources(csrc, settings.parse_filter(text), ("80", "90a"))
    assert {path.stem for path in selected if sources.is_instance(path)} == instances
    others = {path.name for path in selected if not sources.is_instance(path)}
    assert others == {"module.cpp", "plan.cpp", "preprocess.cu"}


def test_filter_by_family():
    accepts = settings.parse_filter("d64,sm90").accepts
    assert accepts(Path("csrc/sm90/instances/bf16_d64_fwd_0.cu"))
    assert not accepts(Path("csrc/sm80/instances/bf16_d64_fwd_0.cu"))
    assert not accepts(Path("csrc/sm90/instances/bf16_d128_fwd_0.cu"))


def test_sm90_sources_need_the_arch_they_are_for(csrc):
    (csrc / "sm90" / "instances").mkdir(parents=True)
    (csrc / "sm90" / "instances" / "bf16_d64_fwd_0.cu").touch()
    for archs, expected in ((("80", "90a"), {"sm80", "sm90"}), (("80", "90"), {"sm80"})):
        selected = sources.select_sources(csrc, InstanceFilter(), archs)
        families = {path.parts[-3] for path in selected if sources.is_instance(path)}
        assert families == expected


def test_sm90_sources_are_compiled_for_sm_90a_alone():
    flags = ["nvcc", *settings.gencode_flags(["80", "90a"]), "-c"]
    other = [*flags, "/x/csrc/sm80/a.cu"]
    assert nvcc_logged.for_its_source(other) == other
    assert nvcc_logged.for_its_source([*flags, "/x/csrc/sm90/a.cu"]) == [
        "nvcc",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-c",
        "/x/csrc/sm90/a.cu",
    ]


def test_rows_for_little_shared_memory_are_not_compiled_for_sm_90a():
    first, later = (f"/x/csrc/sm80/instances/bf16_d96_bwd_{row}.cu" for row in (0, 1))
    for archs, left in (
        (["80", "90a"], ["-gencode=arch=compute_80,code=[sm_80,compute_80]"]),
        (["90a"], ["-gencode=arch=compute_90,code=compute_90"]),
    ):
        flags = ["nvcc", *settings.gencode_flags(archs), "-c"]
        assert nvcc_logged.for_its_source([*flags, first]) == [*flags, first]
        assert nvcc_logged.for_its_source([*flags, later]) == ["nvcc", *left, "-c", later]


def test_sm80_forward_is_compiled_once_for_all_architectures():
    source = "/x/csrc/sm80/instances/bf16_d96_fwd_0.cu"
    for archs, expected in (
        (
            ["80", "90a"],
            [
                "-gencode=arch=compute_80,code=[sm_80,compute_80]",
                "-gencode=arch=compute_80,code=sm_90",
            ],
        ),
        (["90a"], settings.gencode_flags(["90a"])),
        (["86"], settings.gencode_flags(["86"])),
    ):
        flags = ["nvcc", *settings.gencode_flags(archs), "-c"]
        assert nvcc_logged.for_its_source([*flags, source]) == ["nvcc", *expected, "-c", source]


def test_filter_by_head_dim_is_that_of_q():
    unequal = Path("csrc/sm90/instances/bf16_d192_v128_bwd_0.cu")
    assert settings.parse_filter("d192,bf16").accepts(unequal)
    assert not settings.parse_filter("d128,bf16").accepts(unequal)


def test_filter_compares_whole_words():
    accepts = InstanceFilter(head_dims=("d64",)).accepts
    assert accepts(Path("bf16_d64.cu"))
    assert not accepts(Path("bf16_d640.cu"))


@pytest.mark.parametrize("text", ["128", "bf16,d", "float32", "D128"])
def test_bad_filter_names_the_value(text):
    with pytest.raises(BuildError) as caught:
        settings.parse_filter(text)
    assert f"FLASH_ATTN2_FILTER={text!r}" in str(caught.value)


def test_filter_that_fits_nothing_lists_what_there_is(csrc):
    with pytest.raises(BuildError, match="fits no instance file; there are: bf16_d128"):
        sources.select_sources(csrc, settings.parse_filter("d32"), ("80", "90a"))


def test_the_projects_sources_are_found_and_kernels_know_no_torch():
    selected = sources.select_sources(ROOT / "csrc", InstanceFilter(), ("80", "90a"))
    assert {"ops", "plan", "sm80"} <= {
        path.relative_to(ROOT / "csrc").parts[0] for path in selected
    }
    kernel_folders = [ROOT / "csrc" / name for name in ("core", "plan", "common", "sm80")]
    for path in (path for folder in kernel_folders for path in folder.rglob("*.*")):
        text = path.read_text()
        assert "#include <torch/" not in text and "#include <ATen/" not in text, path


# --- jobs and measurements ------------------------------------------------------------------------

GIB = limits.GIB


@pytest.mark.parametrize(
    ("environ", "cores", "free", "jobs"),
    [
        ({}, 2, 100 * GIB, 2),
        ({}, 64, 4 * limits.JOB_BYTES, 4),
        ({}, 8, limits.JOB_BYTES // 2, 1),
        ({"MAX_JOBS": "5"}, 2, GIB, 5),
    ],
)
def test_jobs_are_capped_by_cores_and_free_memory(environ, cores, free, jobs):
    assert limits.job_count(environ, cores, free) == jobs


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_bad_max_jobs_names_the_value(value):
    with pytest.raises(BuildError, match=f"MAX_JOBS='{value}'"):
        limits.job_count({"MAX_JOBS": value}, 2, GIB)


@pytest.mark.parametrize(
    ("group", "free_gib"),
    [
        ({}, 20),
        ({"memory.max": f"{8 * GIB}", "memory.current": f"{3 * GIB}"}, 5),
        ({"memory.max": "max", "memory.current": f"{3 * GIB}"}, 20),
        (
            {
                "memory/memory.limit_in_bytes": f"{4 * GIB}",
                "memory/memory.usage_in_bytes": f"{GIB}",
            },
            3,
        ),
    ],
)
def test_free_memory_heeds_the_control_group(tmp_path, group, free_gib):
    meminfo = tmp_path / "proc/meminfo"
    meminfo.parent.mkdir()
    meminfo.write_text(f"MemTotal: 1 kB\nMemAvailable:  {20 * GIB // 1024} kB\n")
    for name, text in group.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert limits.available_memory(tmp_path) == free_gib * GIB


def test_monitor_sees_the_memory_of_children():
    eat = "import time; block = bytearray(b'x') * (96 << 20); time.sleep(0.5)"
    with limits.BuildMonitor(interval=0.05) as monitor:
        own = limits.tree_rss(os.getpid())
        subprocess.run([sys.executable, "-c", eat], check=True)
    assert monitor.peak_bytes - own > 90 << 20
    assert monitor.seconds >= 0.5


# --- toolchain ------------------------------------------------------------------------------------


def fake_nvcc(home, release, top=None):
    """A script that answers --version and --dryrun as nvcc does."""
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then\n'
        f'  echo "Cuda compilation tools, release {release}, V{release}.88"\n'
        f'else echo "#$ TOP={top or home}" >&2; fi\n'
    )
    script.chmod(0o755)
    return script


def test_toolkit_is_found_through_cuda_home_and_path(tmp_path):
    fake_nvcc(tmp_path / "a", "13.0")
    fake_nvcc(tmp_path / "b", "12.8")
    found = toolchain.find_toolkit({"CUDA_HOME": str(tmp_path / "a")})
    assert (found.home, found.version) == (tmp_path / "a", (13, 0))
    path = f"{tmp_path / 'b/bin'}:{os.environ['PATH']}"
    assert toolchain.find_toolkit({"PATH": path}).version == (12, 8)


def test_toolkit_root_is_asked_of_nvcc_not_guessed_from_path(tmp_path):
    """A script in PATH that runs the real nvcc elsewhere must not make its folder the toolkit."""
    real = tmp_path / "cuda-13.0"
    real.mkdir()
    fake_nvcc(tmp_path / "usr", "13.0", top=f"{real}/bin/..")
    (real / "bin").mkdir()
    found = toolchain.find_toolkit({"CUDA_HOME": str(tmp_path / "usr")})
    assert found.home == real


def test_cuda_home_without_nvcc_ends_the_search(tmp_path):
    assert toolchain.find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": os.environ["PATH"]}) is None


def test_three_messages_say_which_it_is_and_what_to_type():
    toolkit = toolchain.Toolkit(Path("/opt/cuda-12.8"), (12, 8))
    with pytest.raises(BuildError) as no_nvcc:
        toolchain.check("2.11.0+cu130", "13.0", None, {})
    with pytest.raises(BuildError) as cpu_only:
        toolchain.check("2.11.0+cpu", None, toolkit, {})
    with pytest.raises(BuildError) as mismatch:
        toolchain.check("2.11.0+cu130", "13.0", toolkit, {})
    no_nvcc, cpu_only, mismatch = str(no_nvcc.value), str(cpu_only.value), str(mismatch.value)
    assert "no nvcc found" in no_nvcc
    assert "CUDA_HOME=/path/to/cuda-13.0 pip install ." in no_nvcc
    assert "2.11.0+cpu is CPU-only" in cpu_only
    assert "pip install --force-reinstall torch==2.11.0" in cpu_only
    assert "nvcc in /opt/cuda-12.8 is CUDA 12.8" in mismatch
    assert "torch 2.11.0+cu130 is built for CUDA 13.0" in mismatch
    for message in (no_nvcc, cpu_only, mismatch):
        assert "FLASH_ATTN2_CUDA=0 pip install ." in message


def test_a_fitting_toolkit_passes():
    toolkit = toolchain.Toolkit(Path("/opt/cuda-13.2"), (13, 2))
    assert toolchain.check("2.11.0+cu130", "13.0", toolkit, {}) is toolkit


def test_missing_torch_is_explained(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="--no-build-isolation"):
        toolchain.import_torch()


def test_cuda_runtime_of_toolkit_or_wheel(tmp_path):
    wheel, toolkit = tmp_path / "wheel", tmp_path / "toolkit"
    wheel.mkdir()
    toolkit.mkdir()
    assert toolchain.find_cudart([wheel, toolkit]) is None
    (wheel / "libcudart.so.13").touch()
    assert toolchain.find_cudart([wheel, toolkit]) == (wheel, ":libcudart.so.13")
    (toolkit / "libcudart.so").touch()
    assert toolchain.find_cudart([wheel, toolkit]) == (toolkit, "cudart")


def test_cuda_extension_without_nvcc_fails_with_the_message(tmp_path):
    """The whole command, in a process of its own, on a machine that has no nvcc."""
    environ = {**os.environ, "CUDA_HOME": str(tmp_path), "FLASH_ATTN2_CUDA": "1"}
    arguments = ["build_ext", "--build-lib", str(tmp_path / "lib")]
    result = run_setup(arguments, environ)
    assert result.returncode != 0
    torch = pytest.importorskip("torch")
    expected = "no nvcc found" if torch.version.cuda else "is CPU-only"
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def run_setup(arguments, environ, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
    )


# --- metadata, sdist, wheel -----------------------------------------------------------------------


def call_backend(hook, folder, tmp_path, **environ):
    """Runs one PEP 517 hook as a front end does, where importing torch fails."""
    blocked = tmp_path / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "torch.py").write_text(BLOCK_TORCH)
    code = (
        f"import sys; sys.path.insert(0, 'tools'); import build_backend; "
        f"print(build_backend.{hook}({str(folder)!r}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(blocked), **environ},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder / result.stdout.split()[-1]


def package_version():
    scope = {}
    exec((ROOT / "flash_attn2/version.py").read_text(), scope)
    return scope["__version__"]


def test_metadata_resolves_without_torch(tmp_path):
    info = call_backend("prepare_metadata_for_build_wheel", tmp_path, tmp_path)
    metadata = (info / "METADATA").read_text()
    assert f"\nVersion: {package_version()}\n" in metadata
    assert "\nRequires-Dist: torch>=" in metadata


def test_sdist_builds_without_torch_and_holds_what_a_build_needs(tmp_path):
    archive = call_backend("build_sdist", tmp_path, tmp_path)
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = ["setup.py", "pyproject.toml", "LICENSE", "flash_attn2/version.py"]
    needed += ["tools/build_backend.py", "tools/nvcc_logged.py", "tools/cuda_build/command.py"]
    needed += ["third_party/fetch_cutlass.py", "third_party/cutlass.txt"]
    for source in (ROOT / "csrc").rglob("*.*"):
        needed.append(str(source.relative_to(ROOT)))
    assert sorted(set(needed) - names) == []
    assert not [name for name in names if name.startswith("third_party/cutlass/")]


def test_python_only_wheel_is_pure_and_needs_no_torch(tmp_path):
    wheel = call_backend("build_wheel", tmp_path, tmp_path, FLASH_ATTN2_CUDA="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "flash_attn2/__init__.py" in names
    assert not [name for name in names if "_C" in name or name.endswith((".so", ".json"))]
