"""Small forward and backward calls of every kernel row that this GPU takes, for compute-sanitizer.

`make sanitize` runs it under memcheck, and sm80 under racecheck. It also compares with the CPU
path, so that a sanitizer that skips the kernels cannot pass. Arguments: the kernel families
(default: all).
"""

import sys

import torch

from flash_attn2 import flash_attn_func
from flash_attn2.introspection import build_info, forced_family, list_kernels


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double().cpu() - reference).norm() / reference.norm()).item()


def run(dtype: torch.dtype, d: int, dv: int, causal: bool, deterministic: bool) -> float:
    """Largest relative error of out, dq, dk, dv of one problem with odd lengths and GQA."""
    shapes = ((1, 131, 4, d), (1, 197, 2, d), (1, 197, 2, dv), (1, 131, 4, dv))
    *inputs, dout = (torch.randn(shape, dtype=dtype) for shape in shapes)

    def attend(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs)
        out = flash_attn_func(q, k, v, causal=causal, deterministic=deterministic)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(device, dtype))]

    pairs = zip(attend("cuda", dtype), attend("cpu", torch.float64), strict=True)
    return max(relative_error(x, reference) for x, reference in pairs)


def main() -> None:
    for family in sys.argv[1:] or sorted({row["family"] for row in list_kernels()}):
        if family == "sm90" and torch.cuda.get_device_capability() != (9, 0):
            continue
        with forced_family(family):
            check_family(family)


def check_family(family: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for d, dv in build_info()["head_dim_pairs"]:
            for causal, deterministic in ((False, False), (True, False), (True, True)):
                error = run(dtype, d, dv, causal, deterministic)
                case = f"{dtype} d{d} v{dv} causal={causal} deterministic={deterministic}"
                print(f"{family} {case}: {error:.2e}")
                if not error < 1e-2:
                    raise SystemExit("wrong result")


if __name__ == "__main__":
    main()
