"""build_info, list_kernels, plan and `python -m flash_attn2`, with a stand-in for the extension."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import flash_attn2
from flash_attn2 import introspection, ops

ROW = {
    "name": "sm80_fwd_bf16_d64_128x64",
    "family": "sm80",
    "direction": "forward",
    "dtype": "bfloat16",
    "head_dim": 64,
    "head_dim_v": 64,
    "tile_m": 128,
    "tile_n": 64,
    "threads": 128,
    "smem_bytes": 32768,
}


@pytest.fixture
def extension(monkeypatch, tmp_path):
    """A stand-in for flash_attn2._C with one kernel, which the build compiled twice."""
    calls = []
    stand_in = SimpleNamespace(
        build_info=lambda: {"version": "old", "archs": ["80", "90a"]},
        list_kernels=lambda: [dict(ROW), {**ROW, "name": "another"}],
        plan=lambda *args: calls.append(args) or {"kernel": ROW["name"]},
        calls=calls,
    )
    entry = {"name": ROW["name"], "entry": "_Z1k", "spill_bytes": 0, "stack_bytes": 8}
    resources = tmp_path / "_kernel_resources.json"
    entries = [
        {**entry, "arch": "sm_80", "registers": 200},
        {**entry, "arch": "sm_90a", "registers": 168, "spill_bytes": 4},
    ]
    resources.write_text(json.dumps({"entries": entries}))
    monkeypatch.setattr(ops, "EXTENSION", stand_in)
    monkeypatch.setattr(introspection, "_RESOURCES", resources)
    return stand_in


def test_build_info_has_the_packages_version(extension):
    assert flash_attn2.build_info() == {
        "version": flash_attn2.__version__,
        "archs": ["80", "90a"],
    }


def test_list_kernels_adds_the_builds_resources(extension):
    first, second = flash_attn2.list_kernels()
    assert {k: first[k] for k in ROW} == ROW
    assert (first["registers"], first["spill_bytes"], first["stack_bytes"]) == (200, 4, 8)
    assert [r["arch"] for r in first["resources"]] == ["sm_80", "sm_90a"]
    assert second["registers"] is None and second["resources"] == []


def test_list_kernels_without_a_log_of_the_build(extension, monkeypatch, tmp_path):
    monkeypatch.setattr(introspection, "_RESOURCES", tmp_path / "none.json")
    assert flash_attn2.list_kernels()[0]["registers"] is None


def test_plan_passes_its_arguments_in_order(extension):
    assert flash_attn2.plan("backward", 1, 2, 3, 8, 4, 64, gpu="A100")["kernel"] == ROW["name"]
    flash_attn2.plan("forward", 1, 2, 3, 8, 4, 64, "float16", 5, 0, True, family="sm80")
    flash_attn2.plan("forward", 1, 2, 3, 8, 4, 192, head_dim_v=128)
    assert extension.calls == [
        ("backward", 1, 2, 3, 8, 4, 64, 64, "bfloat16", -1, -1, False, "A100", ""),
        ("forward", 1, 2, 3, 8, 4, 64, 64, "float16", 5, 0, True, "H200", "sm80"),
        ("forward", 1, 2, 3, 8, 4, 192, 128, "bfloat16", -1, -1, False, "H200", ""),
    ]


def test_table(extension, capsys):
    from flash_attn2 import __main__

    __main__.main()
    text = capsys.readouterr().out
    assert "80, 90a" in text and flash_attn2.__version__ in text
    row = next(line for line in text.splitlines() if line.startswith(ROW["name"]))
    sizes = ["64", "64", "128", "64", "128", "32768", "200", "4"]
    assert row.split()[1:] == ["forward", "bfloat16", *sizes]


def test_hopper_kernels_are_for_hopper_alone(extension, monkeypatch):
    rows = [ROW, {**ROW, "family": "sm90"}]
    monkeypatch.setattr(extension, "list_kernels", lambda: rows)
    for capability, families in (((9, 0), ["sm80", "sm90"]), ((10, 0), ["sm80"])):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, c=capability: c)
        assert introspection.families_of_gpu() == families


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(ops, "EXTENSION", None)
    for call in (
        flash_attn2.build_info,
        flash_attn2.list_kernels,
        introspection.families_of_gpu,
        lambda: flash_attn2.plan("forward", 1, 1, 1, 1, 1, 64),
    ):
        with pytest.raises(RuntimeError, match="without its CUDA extension(.|\n)*pip install"):
            call()


def test_command_line_runs():
    run = subprocess.run(
        [sys.executable, "-m", "flash_attn2"], capture_output=True, text=True, check=True
    )
    assert flash_attn2.__version__ in run.stdout
    assert ("archs" in run.stdout) == (ops.EXTENSION is not None)


@pytest.mark.skipif(ops.EXTENSION is None, reason="flash_attn2._C is not built")
def test_the_built_extension():
    info = flash_attn2.build_info()
    assert set(info) >= {"version", "archs", "cuda", "cutlass", "torch", "head_dims", "dtypes"}
    kernels = flash_attn2.list_kernels()
    assert {row["direction"] for row in kernels} == {"forward", "backward"}
    assert len({row["name"] for row in kernels}) == len(kernels)
    assert set(ROW) <= set(kernels[0])
