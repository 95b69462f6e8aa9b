"""What ptxas says of every kernel: its log, and the limits on spills and on their number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import check_kernels
import pytest
from cuda_build import ptxas

ROOT = Path(__file__).resolve().parents[1]

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
        split = f"LNS0_13ConsumerSplitE1ELi{head_dim_v}ELi{cluster}E"
        backward = f"15backward_kernelINS0_14BackwardTraits{element}Li64ELi64E{split}EEEEv"
        assert ptxas.row_name(namespace + backward) == f"sm90_bwd_fp16_{name}_64x64{blocks}"


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


def test_every_registered_kernel_has_its_resources():
    _C = pytest.importorskip("flash_attn2._C", reason="the CUDA extension is not built here")
    path = Path(_C.__file__).with_name(ptxas.RESOURCE_FILE)
    entries = ptxas.read_resources(path)
    archs = {f"sm_{arch}" for arch in _C.build_info()["archs"]}
    # The sm80 forward's code for Hopper comes from another architecture's (tools/nvcc_logged.py).
    shared = any(arch.startswith("sm_8") for arch in archs)
    sm80_forward = {"sm_90" if shared and arch == "sm_90a" else arch for arch in archs}
    assert {entry.arch for entry in entries} == archs | sm80_forward
    seen = set()
    for row in _C.list_kernels():
        found = [entry for entry in entries if entry.name == row["name"]]
        expected = {"sm_90a"} if row["family"] == "sm90" else archs
        if (row["family"], row["direction"]) == ("sm80", "forward"):
            expected = sm80_forward
        kind = (row["family"], row["direction"], row["dtype"], row["head_dim"])
        if kind in seen and kind[:2] == ("sm80", "backward"):  # for less shared memory
            expected = archs - {"sm_90a"}
        seen.add(kind)
        assert {entry.arch for entry in found} == expected, row["name"]
        for entry in found:
            assert 0 < entry.registers * row["threads"] <= 65536, entry.name
