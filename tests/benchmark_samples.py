"""Providers, arguments and figures for the tests of benchmarks/."""

import torch

from benchmarks import attention, cases, report, timing
from benchmarks.providers import Provider

CPU = torch.device("cpu")
OURS = "flash_attn2[sm80]"
TINY = [
    "--device", "cpu", "--head-dims", "16", "--seqlens", "32", "64", "--tokens", "64",
    "--hidden", "32", "--dtype", "fp32", "--rounds", "2", "--iters", "3",
]  # fmt: skip


def dense_provider(name="dense", key="dense"):
    return Provider(key, name, cases.dense_attention)


def broken_provider():
    def call(q, k, v, causal):
        raise RuntimeError("no kernel for this\nand a second line")

    return Provider("broken", "broken", call)


def wrong_provider():
    return Provider("wrong", "wrong", lambda q, k, v, causal: 1.1 * v + 0 * (q + k))


PEERS = {
    "device": "a GPU", "date": "2026-01-01",
    "ceilings": {"gemm_bf16_8192_tflops": 800, "gemm_bf16_16384_tflops": 700, "copy_tb_s": 4.0},
    "dense_tflops_fwd_bwd": [
        {"d": 64, "causal": False, "s": 512, "cudnn": [200, 100], "fa3": [300, 80]},
        {"d": 64, "causal": True, "s": 512, "cudnn": [200, 100]},
    ],
}  # fmt: skip


def synthetic_results(grid=None, peer_ms=1.1, our_passes=(1.0, 1.0), peer_passes=None):
    """An ``attention`` results file in which every cell takes the same time."""
    peer_passes = peer_passes or (peer_ms, peer_ms)
    rows = []
    for case in grid or cases.grid():
        for name, times in ((OURS, our_passes), ("torch[flash]", peer_passes)):
            for direction in ("forward", "backward"):
                cell = attention.Cell(name, case, direction, "eager")
                for ms in times:
                    cell.add_pass(timing.Runner(name, (), samples=[ms] * 3))
                rows.append(cell.row())
    environment = report.environment(CPU, "0123456789abcdef-dirty")
    return {"name": "synthetic", "kind": "attention", "environment": environment, "rows": rows}
