"""Every wrong argument raises before any launch; the error names the argument, value and limit.

The CPU half shows the same mistakes on CPU tensors. After each error on a GPU, a good call shows
that the CUDA context lives.
"""

from dataclasses import dataclass, field

import pytest
import torch

from flash_attn2 import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    ops,  # noqa: F401 (registers torch.ops.flash_attn2)
)

FORWARD = torch.ops.flash_attn2.forward
BACKWARD = torch.ops.flash_attn2.backward
SCALE = 0.125
BATCH, SEQLEN_Q, SEQLEN_K, HEADS_Q, HEADS_K, HEAD_DIM = 2, 12, 20, 6, 2, 64
Q_SHAPE = (BATCH, SEQLEN_Q, HEADS_Q, HEAD_DIM)
K_SHAPE = (BATCH, SEQLEN_K, HEADS_K, HEAD_DIM)
LSE_SHAPE = (BATCH, HEADS_Q, SEQLEN_Q)


def good_inputs(device: str) -> dict:
    """Arguments of the backward, of which q, k, v are the forward's."""

    def normal(shape, dtype=torch.bfloat16):
        return torch.randn(shape, device=device).to(dtype)

    return {
        "dout": normal(Q_SHAPE),
        "q": normal(Q_SHAPE),
        "k": normal(K_SHAPE),
        "v": normal(K_SHAPE),
        "out": normal(Q_SHAPE),
        "lse": normal(LSE_SHAPE, torch.float32),
        "dlse": normal(LSE_SHAPE, torch.float32),
    }


def call_forward(inputs: dict):
    return FORWARD(inputs["q"], inputs["k"], inputs["v"], SCALE)


def call_backward(inputs: dict):
    return BACKWARD(*inputs.values(), SCALE)


def call_function(inputs: dict):
    return flash_attn_func(inputs["q"], inputs["k"], inputs["v"])


CALLS = {"forward": call_forward, "backward": call_backward, "flash_attn_func": call_function}


def assert_good_call_works(device: str) -> None:
    inputs = good_inputs(device)
    out = call_function({name: x.requires_grad_() for name, x in inputs.items()})
    out.sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    for x in (out, inputs["q"].grad, inputs["k"].grad, inputs["v"].grad):
        assert x.isfinite().all()


@dataclass
class Mistake:
    """Arguments to replace (shapes and dtypes, or a function of the good tensor), and the error."""

    message: str
    replace: dict
    on: tuple = ("cpu", "cuda")
    calls: tuple = ("forward", "backward", "flash_attn_func")
    messages: dict = field(default_factory=dict)  # per call, where it is worded differently


def cast(dtype):
    return lambda x: x.to(dtype)


def shaped(*shape):
    return lambda x: torch.zeros(shape, dtype=x.dtype, device=x.device)


def strided(x):
    """The same values with a stride of 2 in the last dimension."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def long_without_memory(x):
    return x[:, :1].expand(-1, 2**31, -1, -1)


MISTAKES = {
    # dtype
    "integer q": Mistake(r"^q: dtype is torch.int32, .* must be", {"q": cast(torch.int32)}),
    "fp32 on CUDA": Mistake(
        r"^q: dtype is torch.float32, on CUDA it must be torch.float16 or torch.bfloat16",
        {name: cast(torch.float32) for name in ("q", "k", "v")},
        on=("cuda",),
    ),
    "fp64 on CUDA": Mistake(
        r"^q: dtype is torch.float64, on CUDA it must be torch.float16 or torch.bfloat16",
        {name: cast(torch.float64) for name in ("q", "k", "v")},
        on=("cuda",),
    ),
    "dtype of k": Mistake(
        r"^k: dtype is torch.float16, it must be q's torch.bfloat16", {"k": cast(torch.float16)}
    ),
    "dtype of v": Mistake(
        r"^v: dtype is torch.float16, it must be q's torch.bfloat16", {"v": cast(torch.float16)}
    ),
    # rank
    "rank of q": Mistake(
        r"^q: has 3 dimensions, it must have 4",
        {"q": lambda x: x[0]},
        messages={"flash_attn_func": r"^q: shape is \(12, 6, 64\), it must be \(batch"},
    ),
    "rank of k": Mistake(
        r"^k: has 5 dimensions, it must have 4",
        {"k": lambda x: x[None]},
        messages={"flash_attn_func": r"^k: shape is \(1, 2, 20, 2, 64\), it must be \(batch"},
    ),
    "rank of v": Mistake(
        r"^v: has 1 dimensions, it must have 4",
        {"v": lambda x: x.flatten()},
        messages={"flash_attn_func": r"^v: shape is \(5120,\), it must be \(batch"},
    ),
    # sizes that do not agree
    "batch of k": Mistake(r"^k: batch is 3, it must be q's 2", {"k": shaped(3, *K_SHAPE[1:])}),
    "batch of v": Mistake(r"^v: batch is 3, it must be q's 2", {"v": shaped(3, *K_SHAPE[1:])}),
    "length of v": Mistake(
        r"^v: seqlen is 21, it must be k's 20", {"v": shaped(BATCH, 21, HEADS_K, HEAD_DIM)}
    ),
    "heads of v": Mistake(
        r"^v: heads is 3, it must be k's 2", {"v": shaped(BATCH, SEQLEN_K, 3, HEAD_DIM)}
    ),
    # heads
    "heads that do not divide": Mistake(
        r"^k: has 4 heads, which does not divide q's 6 heads",
        {name: shaped(BATCH, SEQLEN_K, 4, HEAD_DIM) for name in ("k", "v")},
    ),
    "more KV heads than query heads": Mistake(
        r"^k: has 12 heads, which does not divide q's 6 heads",
        {name: shaped(BATCH, SEQLEN_K, 12, HEAD_DIM) for name in ("k", "v")},
    ),
    "no query head": Mistake(
        r"^q: heads is 0, it must be at least 1", {"q": shaped(BATCH, SEQLEN_Q, 0, HEAD_DIM)}
    ),
    "no KV head": Mistake(
        r"^k: heads is 0, it must be at least 1",
        {name: shaped(BATCH, SEQLEN_K, 0, HEAD_DIM) for name in ("k", "v")},
    ),
    # head dim
    "head_dim of k": Mistake(
        r"^k: head_dim is 32, it must be q's 64", {"k": shaped(*K_SHAPE[:3], 32)}
    ),
    "head_dim 0": Mistake(
        r"^q: head_dim is 0, it must be (at least 1|a positive multiple of 8)",
        {name: lambda x: x[..., :0] for name in ("q", "k", "v")},
    ),
    "head_dim 0 of v": Mistake(
        r"^v: head_dim is 0, it must be (at least 1|a positive multiple of 8)",
        {"v": lambda x: x[..., :0]},
    ),
    "head_dim above 256": Mistake(
        r"^q: head_dim is 264, the limit is 256",
        {name: lambda x: x[..., :1].repeat(1, 1, 1, 264) for name in ("q", "k", "v")},
        on=("cuda",),
    ),
    "odd head_dim above 256": Mistake(
        r"^q: head_dim is 257, the limit is 256",
        {name: lambda x: x[..., :1].repeat(1, 1, 1, 257) for name in ("q", "k", "v")},
        on=("cuda",),
    ),
    "head_dim of v above 256": Mistake(
        r"^v: head_dim is 264, the limit is 256", {"v": shaped(*K_SHAPE[:3], 264)}, on=("cuda",)
    ),
    "odd head_dim of v above 256": Mistake(
        r"^v: head_dim is 257, the limit is 256", {"v": shaped(*K_SHAPE[:3], 257)}, on=("cuda",)
    ),
    "head_dim no multiple of 8": Mistake(
        r"^q: head_dim is 60, it must be a positive multiple of 8",
        {name: lambda x: x[..., :60].contiguous() for name in ("q", "k", "v")},
        on=("cuda",),
        calls=("forward", "backward"),
    ),
    "head_dim of v no multiple of 8": Mistake(
        r"^v: head_dim is 60, it must be a positive multiple of 8",
        {"v": lambda x: x[..., :60].contiguous()},
        on=("cuda",),
        calls=("forward", "backward"),
    ),
    # strides
    "last dimension of q strided": Mistake(
        r"^q: the last dimension has stride 2, it must be 1",
        {"q": strided},
        calls=("forward", "backward"),
    ),
    "last dimension of k strided": Mistake(
        r"^k: the last dimension has stride 2, it must be 1",
        {"k": strided},
        calls=("forward", "backward"),
    ),
    "last dimension of v strided": Mistake(
        r"^v: the last dimension has stride 2, it must be 1",
        {"v": strided},
        calls=("forward", "backward"),
    ),
    # devices
    "q on the CPU": Mistake(
        r"^k: device is cuda:0, it must be q's cpu",
        {"q": lambda x: x.cpu()},
        on=("cuda",),
        calls=("forward", "backward"),
    ),
    "k on the CPU": Mistake(
        r"^k: device is cpu, it must be q's cuda:0", {"k": lambda x: x.cpu()}, on=("cuda",)
    ),
    "v on the CPU": Mistake(
        r"^v: device is cpu, it must be q's cuda:0", {"v": lambda x: x.cpu()}, on=("cuda",)
    ),
    "q, k, v on the CPU, dout not": Mistake(
        r"^q: device is cpu, it must be a CUDA device",
        {name: lambda x: x.cpu() for name in ("q", "k", "v")},
        on=("cuda",),
        calls=("backward",),
    ),
    # sizes beyond an int
    "length beyond an int": Mistake(
        r"^seqlen_q: is 2147483648, it must be .* at most 2147483647",
        {"q": long_without_memory},
        on=("cuda",),
        calls=("forward", "flash_attn_func"),
    ),
    "KV length beyond an int": Mistake(
        r"^seqlen_k: is 2147483648, it must be .* at most 2147483647",
        {"k": long_without_memory, "v": long_without_memory},
        on=("cuda",),
        calls=("forward", "flash_attn_func"),
    ),
    "more heads than an int": Mistake(
        r"^batch \* heads_q: is 4294967296, it must be .* at most 2147483647",
        {name: lambda x: x[:1, :, :1].expand(2**16, -1, 2**16, -1) for name in ("q", "k", "v")},
        on=("cuda",),
        calls=("forward", "flash_attn_func"),
    ),
    # what only the backward takes
    "shape of dout": Mistake(
        r"^dout: shape is \(2, 12, 6, 32\), it must be \(2, 12, 6, 64\)",
        {"dout": shaped(*Q_SHAPE[:3], 32)},
        calls=("backward",),
    ),
    "dout and out of q's head_dim, not v's": Mistake(
        r"^dout: shape is \(2, 12, 6, 64\), it must be \(2, 12, 6, 32\)",
        {"v": shaped(*K_SHAPE[:3], 32)},
        calls=("backward",),
    ),
    "rank of dout": Mistake(
        r"^dout: shape is \(12, 6, 64\), it must be \(2, 12, 6, 64\)",
        {"dout": lambda x: x[0]},
        calls=("backward",),
    ),
    "dtype of dout": Mistake(
        r"^dout: dtype is torch.float32, it must be .*torch.bfloat16",
        {"dout": cast(torch.float32)},
        calls=("backward",),
    ),
    "device of dout": Mistake(
        r"^dout: device is cpu, it must be q's cuda:0",
        {"dout": lambda x: x.cpu()},
        on=("cuda",),
        calls=("backward",),
    ),
    "shape of out": Mistake(
        r"^out: shape is \(2, 13, 6, 64\), it must be \(2, 12, 6, 64\)",
        {"out": shaped(BATCH, 13, HEADS_Q, HEAD_DIM)},
        calls=("backward",),
    ),
    "dtype of out": Mistake(
        r"^out: dtype is torch.float16, it must be .*torch.bfloat16",
        {"out": cast(torch.float16)},
        calls=("backward",),
    ),
    "shape of lse": Mistake(
        r"^lse: shape is \(2, 12, 6\), it must be \(2, 6, 12\)",
        {"lse": lambda x: x.mT},
        calls=("backward",),
    ),
    "dtype of lse": Mistake(
        r"^lse: dtype is torch.bfloat16, it must be torch.float32",
        {"lse": cast(torch.bfloat16)},
        calls=("backward",),
    ),
    "shape of dlse": Mistake(
        r"^dlse: shape is \(2, 6\), it must be \(2, 6, 12\)",
        {"dlse": lambda x: x[..., 0]},
        calls=("backward",),
    ),
    "dtype of dlse": Mistake(
        r"^dlse: dtype is torch.float64, it must be torch.float32",
        {"dlse": cast(torch.float64)},
        calls=("backward",),
    ),
}

ALL = [
    pytest.param(
        name,
        call,
        device,
        id=f"{name}-{call}-{device}",
        marks=[pytest.mark.gpu] * (device == "cuda"),
    )
    for name, mistake in MISTAKES.items()
    for call in mistake.calls
    for device in mistake.on
]


@pytest.mark.parametrize("name, call, device", ALL)
def test_mistake(name, call, device):
    mistake = MISTAKES[name]
    inputs = good_inputs(device)
    for argument, change in mistake.replace.items():
        inputs[argument] = change(inputs[argument])
    with pytest.raises(RuntimeError, match=mistake.messages.get(call, mistake.message)):
        CALLS[call](inputs)
    assert_good_call_works(device)


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_functions_take_a_strided_last_dimension(device, argument):
    inputs = good_inputs(device)
    expected = call_function(inputs)
    inputs[argument] = strided(inputs[argument])
    assert inputs[argument].stride(-1) == 2
    assert torch.equal(call_function(inputs), expected)


@pytest.mark.parametrize(
    "shape", [(2, 12, 6, 64), (2, 12, 2, 6, 64), (2, 12, 4, 6, 64), (12, 3, 6, 64)], ids=str
)
def test_shape_of_qkv(device, shape):
    qkv = torch.zeros(shape, device=device, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"^qkv: shape is .*, it must be \(batch, seqlen, 3"):
        flash_attn_qkvpacked_func(qkv)
    assert_good_call_works(device)


@pytest.mark.parametrize("shape", [(2, 12, 2, 64), (2, 12, 3, 2, 64), (12, 2, 2, 64)], ids=str)
def test_shape_of_kv(device, shape):
    q, kv = (torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in (Q_SHAPE, shape))
    with pytest.raises(RuntimeError, match=r"^kv: shape is .*, it must be \(batch, seqlen, 2"):
        flash_attn_kvpacked_func(q, kv)
    assert_good_call_works(device)


def test_second_derivative(device):
    """First gradients with create_graph are served; differentiating them is refused."""
    inputs = {name: x.requires_grad_() for name, x in good_inputs(device).items()}
    (dq,) = torch.autograd.grad(call_function(inputs).sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attn2::backward has no derivative"):
        dq.sum().backward()
    assert_good_call_works(device)


@pytest.mark.gpu
def test_forward_mode_differentiation():
    """On CUDA a tangent has no formula, and dropping it would be a wrong answer."""
    inputs = good_inputs("cuda")
    with torch.autograd.forward_ad.dual_level():
        inputs["q"] = torch.autograd.forward_ad.make_dual(inputs["q"], inputs["dout"])
        with pytest.raises(NotImplementedError, match="forward: forward-mode"):
            call_forward(inputs)
    assert_good_call_works("cuda")
