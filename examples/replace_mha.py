"""Put flash_attn2 into an existing torch.nn.TransformerEncoder, and time a training step.

python examples/replace_mha.py [--seqlen 2048] [--layers 4] ...

The model is swapped in place by one call; the answers before and after are compared. On a GPU the
model is bf16 and the kernels run; on the CPU it is fp32 and the tiled reference in PyTorch runs,
which is there to be read and tested, not to be fast.
"""

import argparse
import copy
import time

import torch
from torch import nn

from flash_attn2.nn import replace_mha


def step_seconds(model: nn.Module, src: torch.Tensor, repeats: int) -> float:
    """The median time of a forward and a backward."""
    times = []
    for _ in range(repeats + 2):  # the first two warm up
        if src.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(src).float().square().mean().backward()
        if src.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def main(argv: list[str] | None = None) -> float:
    """Returns the relative difference of the two models' outputs."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024 if on_gpu else 128)
    parser.add_argument("--seqlen", type=int, default=4096 if on_gpu else 256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    layer = nn.TransformerEncoderLayer(args.hidden, args.heads, dropout=0.0, batch_first=True)
    before = nn.TransformerEncoder(layer, args.layers).to(args.device, dtype)
    after = replace_mha(copy.deepcopy(before))
    src = torch.randn(args.batch, args.seqlen, args.hidden, device=args.device, dtype=dtype)

    with torch.enable_grad():  # with gradients, so that torch's fused inference layer is off
        expected, actual = before(src).detach().double(), after(src).detach().double()
    difference = float((actual - expected).norm() / expected.norm())
    print(f"relative difference of the outputs: {difference:.1e} ({dtype})")
    for name, model in (("torch.nn.MultiheadAttention", before), ("flash_attn2.nn", after)):
        milliseconds = 1e3 * step_seconds(model, src, args.repeats)
        print(f"{name:>28}: {milliseconds:8.2f} ms, forward and backward")
    return difference


if __name__ == "__main__":
    main()
