"""The build: its settings, its messages, its logs and limits. Nothing here compiles the kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT / "tools", ROOT / "third_party"):
    sys.path.insert(0, str(folder))

import check_kernels  # noqa: E402
import fetch_cutlass  # noqa: E402
import nvcc_logged  # noqa: E402
from cuda_build import command, limits, ptxas, settings, sources, toolchain  # noqa: E402
from cuda_build.settings import BuildError, InstanceFilter  # noqa: E402

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


def test_sm90_sources_are_compiled_for_sm_90a_alone_and_with_all_wgmma_shapes():
    flags = ["nvcc", *settings.gencode_flags(["80", "90a"]), "-c"]
    other = [*flags, "/x/csrc/sm80/a.cu"]
    assert nvcc_logged.for_its_family(other) == other
    assert nvcc_logged.for_its_family([*flags, "/x/csrc/sm90/a.cu"]) == [
        "nvcc",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-c",
        "/x/csrc/sm90/a.cu",
        "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED=",
    ]


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


# --- CUTLASS --------------------------------------------------------------------------------------


@pytest.fixture
def cutlass_wheel(tmp_path):
    """A small wheel in the shape of nvidia-cutlass, and its pin."""
    wheel = tmp_path / "nvidia_cutlass-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("cutlass_library/source/include/cute/tensor.hpp", "// tensor\n")
        archive.writestr("cutlass_library/manifest.py", "")
    digest = fetch_cutlass.hashlib.sha256(wheel.read_bytes()).hexdigest()
    return wheel, fetch_cutlass.Pin("nvidia-cutlass==1.0", digest)


def test_cutlass_unpacks_the_include_folder_alone(tmp_path, cutlass_wheel):
    wheel, pin = cutlass_wheel
    target = tmp_path / "third_party" / "cutlass"
    include = fetch_cutlass.fetch(target, pin, wheel)
    assert include == target / "include"
    assert (include / "cute/tensor.hpp").read_text() == "// tensor\n"
    assert not list(target.rglob("manifest.py"))
    # What is there already is not downloaded again: the name of this pin exists nowhere.
    assert fetch_cutlass.fetch(target, pin) == include


def test_cutlass_refuses_a_damaged_wheel_and_keeps_what_was_there(tmp_path, cutlass_wheel):
    wheel, pin = cutlass_wheel
    target = tmp_path / "third_party" / "cutlass"
    fetch_cutlass.fetch(target, pin, wheel)
    with open(wheel, "ab") as file:
        file.write(b"x")
    with pytest.raises(fetch_cutlass.FetchError, match=f"pins {pin.sha256}"):
        fetch_cutlass.fetch(target, pin, wheel)
    assert (target / "include/cute/tensor.hpp").is_file()


def test_a_changed_pin_makes_the_old_headers_stale(tmp_path, cutlass_wheel):
    wheel, pin = cutlass_wheel
    fetch_cutlass.fetch(tmp_path / "cutlass", pin, wheel)
    assert fetch_cutlass.is_current(tmp_path / "cutlass", pin)
    assert not fetch_cutlass.is_current(
        tmp_path / "cutlass", fetch_cutlass.Pin(pin.requirement, "0" * 64)
    )


def test_the_pin_file_is_complete(tmp_path):
    assert fetch_cutlass.read_pin().requirement == "nvidia-cutlass==4.2.0.0"
    broken = tmp_path / "cutlass.txt"
    broken.write_text("nvidia-cutlass==4.2.0.0\n")
    with pytest.raises(fetch_cutlass.FetchError, match="sha256"):
        fetch_cutlass.read_pin(broken)


# --- ptxas logs, spills, budget -------------------------------------------------------------------

FORWARD = (
    "_ZN11flash_attn24sm8014forward_kernelINS0_13ForwardTraitsIN7cutlass10bfloat16_t"
    "ELi128ELi128ELi64ELi4ELb1EEEEEvNS_13ForwardParamsE"
)
BACKWARD = (
    "_ZN11flash_attn24sm8015backward_kernelINS0_14BackwardTraitsIN7cutlass6half_t"
    "ELi64ELi64ELi128ELi8EEEEEvNS_14BackwardParamsE"
)
PREPROCESS = (
    "_ZN11flash_attn226backward_preprocess_kernelIN7cutlass6half_tEEEvNS_14BackwardParamsEii"
)
LOG = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_80'
ptxas info    : Function properties for {FORWARD}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 254 registers, used 1 barriers, 480 bytes cmem[0]
ptxas info    : Compile time = 10.517 ms
warning: something else
ptxas info    : Compiling entry function '{BACKWARD}' for 'sm_90a'
ptxas info    : Function properties for {BACKWARD}
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compiling entry function '{PREPROCESS}' for 'sm_90a'
ptxas info    : Function properties for {PREPROCESS}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers
"""


def test_ptxas_log_is_read():
    forward, backward, preprocess = ptxas.parse_log(LOG)
    assert forward == ptxas.KernelResources("sm80_fwd_bf16_d128_128x64", FORWARD, "sm_80", 254)
    assert backward == ptxas.KernelResources(
        "sm80_bwd_fp16_d64_64x128", BACKWARD, "sm_90a", 255, spill_bytes=32, stack_bytes=16
    )
    assert (preprocess.name, preprocess.registers) == ("backward_preprocess_kernel<fp16>", 26)


@pytest.mark.parametrize(("head_dim_v", "name"), [(128, "d192_v128"), (192, "d192")])
def test_names_of_sm90_kernels_have_the_head_dim_of_v_and_the_cluster(head_dim_v, name):
    namespace, element = "_ZN11flash_attn24sm90", "IN7cutlass6half_tELi192E"
    for cluster, blocks in ((1, ""), (2, "_x2")):
        traits = f"13ForwardTraits{element}Li128ELi112ELi{head_dim_v}ELi{cluster}EEEEEv"
        forward = ptxas.row_name(f"{namespace}14forward_kernelINS0_{traits}")
        assert forward == f"sm90_fwd_fp16_{name}_128x112{blocks}"
    split = "LNS0_13ConsumerSplitE1E"
    backward = (
        f"15backward_kernelINS0_14BackwardTraits{element}Li64ELi64E{split}Li{head_dim_v}EEEEEv"
    )
    assert ptxas.row_name(namespace + backward) == f"sm90_bwd_fp16_{name}_64x64"


def test_names_with_substitutions_and_without_a_kernel():
    # S1_13 is a substitution followed by a name of 13 letters, not by a number 1.
    assert ptxas.identifiers("_ZN3fooINS1_13ForwardTraitsILi64EEEE") == ["foo", "ForwardTraits"]
    assert ptxas.row_name("_Z4fillPfi") == "_Z4fillPfi"


def test_resources_survive_the_file(tmp_path):
    log = tmp_path / "a.o.ptxas"
    log.write_text(LOG)
    entries = ptxas.read_logs([log])
    assert [entry.arch for entry in entries] == ["sm_80", "sm_90a", "sm_90a"]
    path = tmp_path / "package" / ptxas.RESOURCE_FILE
    ptxas.write_resources(path, entries)
    assert ptxas.read_resources(path) == entries
    row = json.loads(path.read_text())["entries"][0]
    assert set(row) == {"name", "entry", "arch", "registers", "spill_bytes", "stack_bytes"}


def entries_of(spill=0):
    name = "sm80_fwd_bf16_d128_128x64"
    return [ptxas.KernelResources(name, FORWARD, arch, 254, spill) for arch in ("sm_80", "sm_90a")]


def test_budget_passes_and_fails():
    budget = {"entries_per_arch": 1, "spills": {}}
    assert check_kernels.problems(entries_of(), budget) == []
    grown = check_kernels.problems(entries_of() * 2, budget)
    assert len(grown) == 2 and "sm_80 has 2 kernel entries, the budget is 1" in grown[0]
    assert check_kernels.problems([], budget) == ["the build lists no kernel entry at all"]


def test_spills_need_a_place_on_the_list_and_a_reason():
    def found(spills):
        return check_kernels.problems(entries_of(8), {"entries_per_arch": 9, "spills": spills})

    name = "sm80_fwd_bf16_d128_128x64"
    assert [name in problem and "8 bytes" in problem for problem in found({})] == [True, True]
    assert found({name: {"max_bytes": 8, "reason": "outside the loop"}}) == []
    assert len(found({name: {"max_bytes": 4, "reason": "outside the loop"}})) == 2
    assert found({name: {"max_bytes": 8, "reason": " "}}) == [
        f"{name} is allowed to spill without a reason"
    ]


def test_the_recorded_budget_is_well_formed():
    budget = json.loads((ROOT / "tools/kernel_budget.json").read_text())
    assert budget["entries_per_arch"] > 0
    for allowance in budget["spills"].values():
        assert allowance["max_bytes"] > 0 and allowance["reason"].strip()


def test_nvcc_wrapper_keeps_the_log_and_passes_on_the_rest(tmp_path):
    log = tmp_path / "log"
    log.write_text(LOG)
    compiler = tmp_path / "nvcc"
    compiler.write_text(f'#!/bin/sh\ncat {log} >&2\n[ "$1" != fail ]\n')
    compiler.chmod(0o755)
    wrapper = [sys.executable, str(ROOT / "tools/nvcc_logged.py"), str(compiler)]

    def run(*arguments):
        command = [*wrapper, *arguments, "-o", str(tmp_path / "a.o")]
        return subprocess.run(command, capture_output=True, text=True)

    good = run("pass")
    assert (good.returncode, good.stderr) == (0, "warning: something else\n")
    assert (tmp_path / "a.o.ptxas").read_text() == LOG
    bad = run("fail")
    assert (bad.returncode, bad.stderr) == (1, LOG)


# --- the extension, where it is built -------------------------------------------------------------


def test_every_registered_kernel_has_its_resources():
    _C = pytest.importorskip("flash_attn2._C", reason="the CUDA extension is not built here")
    path = Path(_C.__file__).with_name(ptxas.RESOURCE_FILE)
    entries = ptxas.read_resources(path)
    archs = {f"sm_{arch}" for arch in _C.build_info()["archs"]}
    assert {entry.arch for entry in entries} == archs
    for row in _C.list_kernels():
        found = [entry for entry in entries if entry.name == row["name"]]
        expected = {"sm_90a"} if row["family"] == "sm90" else archs
        assert {entry.arch for entry in found} == expected, row["name"]
        for entry in found:
            assert 0 < entry.registers * row["threads"] <= 65536, entry.name


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
