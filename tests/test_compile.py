"""torch.compile without graph breaks, with dynamic shapes, and torch.export."""

import shutil

import pytest
import torch
from cases import Case, random_inputs

from flash_attn2 import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class CountGraphs:
    """A backend that runs aot_eager and counts how often it is asked to compile."""

    def __init__(self):
        self.count = 0

    def __call__(self, module, example_inputs):
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, example_inputs)


def half(device):
    return torch.float16 if device == "cuda" else torch.bfloat16


def compare(function, compiled, args, dout):
    """Results and gradients of a compiled function against the eager one's."""
    results = [
        (out := f(*args), *torch.autograd.grad(out, args, dout)) for f in (function, compiled)
    ]
    for expected, got in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        tolerance = 2e-2 * expected.abs().max().item()  # a rounding or two of the dtype
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=tolerance)


@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window_size": (7, 3)}], ids=str)
def test_one_graph_serves_all_lengths(device, arguments):
    def function(q, k, v):
        return flash_attn_func(q * 2, k, v, **arguments, deterministic=True) + 1

    backend = CountGraphs()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch, seqlen_q, seqlen_k in ((2, 20, 20), (3, 33, 50), (5, 64, 9)):
        case = Case(seqlen_q, seqlen_k, 4, 2, head_dim=16, batch=batch)
        q, k, v, dout, _ = random_inputs(case, half(device), device)
        compare(function, compiled, (q, k, v), dout)
    # One each for seqlen_q == seqlen_k, which a compiler may take as given, and for the others.
    assert backend.count <= 2


@pytest.mark.parametrize("pair", [(16, 8), (20, 36)], ids=str)
def test_head_dim_of_v(device, pair):
    def function(q, k, v):
        return flash_attn_func(q, k * 2, v, causal=True, deterministic=True).flatten(2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    case = Case(20, 33, 4, 2, head_dim=pair[0], head_dim_v=pair[1])
    q, k, v, dout, _ = random_inputs(case, half(device), device)
    compare(function, compiled, (q, k, v), dout.flatten(2))


def test_every_function_traces(device):
    def function(qkv, q, kv):
        with torch.autocast(device, half(device)):
            x, lse, _ = flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
            y = flash_attn_kvpacked_func(q, kv, window_size=(9, 0), softmax_scale=0.3)
        return x.float() * lse.transpose(1, 2)[..., None] + y

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    shapes = ((2, 30, 3, 4, 20), (2, 30, 4, 20), (2, 50, 2, 2, 20))
    args = tuple(torch.randn(s, device=device, requires_grad=True) for s in shapes)
    compare(function, compiled, args, torch.randn(2, 30, 4, 20, device=device))


@needs_compiler
def test_inductor(device):
    def function(x, weight):
        qkv = (x @ weight).view(*x.shape[:2], 3, 4, 16)
        out = flash_attn_qkvpacked_func(qkv, causal=True, deterministic=True)
        return torch.nn.functional.gelu(out.flatten(2)) + x

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    weight = (torch.randn(64, 192, device=device) / 8).to(half(device)).requires_grad_()
    for batch, length in ((2, 40), (3, 70)):
        x = torch.randn(batch, length, 64, device=device, dtype=half(device), requires_grad=True)
        compare(function, compiled, (x, weight), torch.randn_like(x))


@needs_compiler
def test_inductor_keeps_the_last_dimension_contiguous(device):
    """A transposed intermediate: its layout is the compiler's choice, the op needs stride 1."""

    def function(x):
        y = (x.transpose(1, 3) * 2).sin()
        return flash_attn_func(y, y, y)

    x = torch.randn(2, 16, 4, 30, device=device, dtype=half(device), requires_grad=True)
    compiled = torch.compile(function, fullgraph=True)
    compare(function, compiled, (x,), torch.randn_like(function(x)))


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, 2, 16))
        return flash_attn_qkvpacked_func(qkv, causal=True).flatten(2)


def test_export_with_a_dynamic_length(device):
    model = Attention().to(device, half(device)).requires_grad_(False)
    x = torch.randn(2, 40, 32, device=device, dtype=half(device))
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: length}})
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.flash_attn2.forward.default in targets
    for size in (40, 77):
        y = torch.randn(2, size, 32, device=device, dtype=half(device))
        assert torch.equal(program.module()(y), model(y))


def test_export_decomposes_to_a_training_graph_free_of_python():
    """The op stays one node after decomposition, so that a runtime sees it whole."""
    program = torch.export.export(Attention(), (torch.randn(2, 10, 32),))
    nodes = [n for n in program.run_decompositions().graph.nodes if n.op == "call_function"]
    assert sum("flash_attn2" in str(n.target) for n in nodes) == 1
