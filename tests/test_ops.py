"""torch.ops.flash_attn2: registrations, errors of the CPU path, loading of the extension."""

import importlib.machinery
import re
import subprocess
import sys

import pytest
import torch
from cases import HALF_DTYPES, Case, random_inputs
from torch.library import opcheck

from flash_attn2 import ops

forward = torch.ops.flash_attn2.forward.default
backward = torch.ops.flash_attn2.backward.default


def test_schemas():
    arguments = "float softmax_scale, int window_left=-1, int window_right=-1, "
    assert str(forward._schema) == (
        f"flash_attn2::forward(Tensor q, Tensor k, Tensor v, {arguments}"
        "bool deterministic=False) -> (Tensor out, Tensor lse)"
    )
    assert str(backward._schema) == (
        "flash_attn2::backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"Tensor? dlse, {arguments}bool deterministic=False) -> (Tensor dq, Tensor dk, Tensor dv)"
    )


def dtypes_of(device):
    return HALF_DTYPES if device == "cuda" else (torch.bfloat16, torch.float32, torch.float64)


OPCHECK_CASES = (
    Case(20, 20, head_dim=16),
    Case(9, 30, 4, 2, head_dim=16, mask="causal"),
    Case(30, 9, 4, 1, head_dim=24, mask="window"),
    Case(20, 30, 4, 2, head_dim=24, head_dim_v=16),
    Case(20, 30, 4, 2, head_dim=16, head_dim_v=40, mask="causal"),
    Case(0, 5, head_dim=16),
    Case(5, 0, head_dim=16),
)


@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck_forward(device, case):
    for dtype in dtypes_of(device):
        q, k, v, *_ = random_inputs(case, dtype, device)
        for inputs in ((q, k, v), tuple(x.detach() for x in (q, k, v))):
            # Sums of dq in any order would differ in the last bits.
            opcheck(forward, (*inputs, case.softmax_scale, *case.window, True))


@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck_backward(device, case):
    for dtype in dtypes_of(device):
        q, k, v, dout, dlse = (x.detach() for x in random_inputs(case, dtype, device))
        out, lse = forward(q, k, v, case.softmax_scale, *case.window)
        for gradient_of_lse in (dlse, None):
            args = (dout, q, k, v, out, lse, gradient_of_lse, case.softmax_scale, *case.window)
            opcheck(backward, (*args, True))


def test_opcheck_with_strided_inputs(device):
    for dtype in dtypes_of(device):
        qkv = torch.randn(2, 20, 3, 4, 16, dtype=dtype, device=device, requires_grad=True)
        opcheck(forward, (*qkv.unbind(2), 0.25, -1, 0, True))


def test_fake_results_have_the_real_ones_metadata(device):
    dtype = dtypes_of(device)[0]
    q = torch.randn(2, 4, 20, 16, dtype=dtype, device=device).transpose(1, 2)
    k = torch.randn(2, 30, 2, 16, dtype=dtype, device=device)
    v = torch.randn(2, 2, 30, 24, dtype=dtype, device=device).transpose(1, 2)
    out, lse = forward(q, k, v, 0.25)
    real = (out, lse, *backward(out, q, k, v, out, lse, None, 0.25))
    with torch._subclasses.FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in (q, k, v))
        out, lse = forward(q, k, v, 0.25)
        fake = (out, lse, *backward(out, q, k, v, out, lse, None, 0.25))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_meta_tensors():
    q = torch.empty(2, 20, 4, 16, device="meta", dtype=torch.bfloat16)
    out, lse = forward(q, q, q[..., :8], 0.25)
    assert out.shape == (2, 20, 4, 8) and lse.shape == (2, 4, 20) and lse.dtype == torch.float32


# Autograd -----------------------------------------------------------------------------------------


def test_no_graph_without_gradients(device):
    q = torch.randn(1, 5, 1, 8, dtype=torch.float16, device=device)
    assert forward(q, q, q, 1.0)[0].grad_fn is None
    q.requires_grad_()
    with torch.no_grad():
        assert forward(q, q, q, 1.0)[0].grad_fn is None
    with torch.inference_mode():
        assert forward(q, q, q, 1.0)[0].is_inference()


def test_only_some_inputs_need_gradients(device):
    q, k, v, dout, _ = random_inputs(Case(20, 30), torch.float16, device)
    full = torch.autograd.grad(forward(q, k, v, 0.125, -1, -1, True)[0], (q, k, v), dout)
    for i, x in enumerate((q, k, v)):
        args = [y if y is x else y.detach() for y in (q, k, v)]
        (got,) = torch.autograd.grad(forward(*args, 0.125, -1, -1, True)[0], x, dout)
        assert torch.equal(got, full[i])


def test_gradients_of_gradients_raise(device):
    q, k, v, *_ = random_inputs(Case(20, 30), torch.float16, device)
    out, _ = forward(q, k, v, 0.125)
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    assert dq.shape == q.shape
    with pytest.raises(RuntimeError, match="flash_attn2::backward has no derivative"):
        dq.float().sum().backward()


# Errors of the CPU path ---------------------------------------------------------------------------


def _q(**changes):
    sizes = {"b": 2, "s": 5, "h": 4, "d": 8, **changes}
    return torch.randn(sizes["b"], sizes["s"], sizes["h"], sizes["d"])


WRONG_INPUTS = {
    "q: has 3 dimensions, it must have 4": lambda: (_q()[0], _q(), _q()),
    "k: has 3 dimensions, it must have 4": lambda: (_q(), _q()[0], _q()),
    "v: has 5 dimensions, it must have 4": lambda: (_q(), _q(), _q()[..., None]),
    "q: dtype is torch.int64, it must be a floating": lambda: (_q().long(), _q(), _q()),
    "k: dtype is torch.float16, it must be q's torch.float32": lambda: (_q(), _q().half(), _q()),
    "k: has 3 heads, which does not divide q's 4": lambda: (_q(), _q(h=3), _q(h=3)),
    "k: has 8 heads, which does not divide q's 4": lambda: (_q(), _q(h=8), _q(h=8)),
    "k: heads is 0, it must be at least 1": lambda: (_q(), _q(h=0), _q(h=0)),
    "q: head_dim is 0, it must be at least 1": lambda: (_q(d=0), _q(d=0), _q(d=0)),
    "k: head_dim is 16, it must be q's 8": lambda: (_q(), _q(d=16), _q()),
    "v: batch is 3, it must be q's 2": lambda: (_q(), _q(), _q(b=3)),
    "v: seqlen is 5, it must be k's 7": lambda: (_q(), _q(s=7), _q()),
    "v: heads is 2, it must be k's 4": lambda: (_q(), _q(), _q(h=2)),
    "v: head_dim is 0, it must be at least 1": lambda: (_q(), _q(), _q(d=0)),
    "k: the last dimension has stride 2": lambda: (_q(), _q(d=16)[..., ::2], _q()),
}


@pytest.mark.parametrize("text", WRONG_INPUTS)
def test_wrong_inputs_are_named(text):
    with pytest.raises(RuntimeError, match=re.escape(text)):
        forward(*WRONG_INPUTS[text](), 1.0)


@pytest.mark.parametrize(
    "name, change, text",
    [
        ("dout", lambda x: x[:, :3], r"dout: shape is \(2, 3, 4, 8\), it must be \(2, 5, 4, 8\)"),
        ("out", lambda x: x.double(), "out: dtype is torch.float64, it must be torch.float32"),
        ("lse", lambda x: x.transpose(1, 2), r"lse: shape is \(2, 5, 4\), it must be \(2, 4, 5\)"),
        ("dlse", lambda x: x.half(), "dlse: dtype is torch.float16, it must be torch.float32"),
    ],
)
def test_wrong_inputs_of_the_backward_are_named(name, change, text):
    q, k, v = _q(), _q(), _q()
    out, lse = forward(q, k, v, 1.0)
    args = {"dout": out, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": lse}
    args[name] = change(args[name])
    with pytest.raises(RuntimeError, match=text):
        backward(**args, softmax_scale=1.0)


# The extension ------------------------------------------------------------------------------------


def test_without_the_extension_cuda_calls_say_what_to_type():
    if ops.EXTENSION is not None:
        pytest.skip("flash_attn2._C is built")
    for op in (forward, backward):
        kernel = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA")
        assert kernel
    with pytest.raises(RuntimeError, match="without its CUDA extension(.|\n)*pip install"):
        ops._no_cuda()


def test_an_extension_that_does_not_load_says_why(tmp_path, monkeypatch):
    path = tmp_path / "_C.so"
    path.write_bytes(b"no library")
    loader = importlib.machinery.ExtensionFileLoader("flash_attn2._C", str(path))
    spec = importlib.machinery.ModuleSpec("flash_attn2._C", loader, origin=str(path))
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: spec)

    def import_module(name):
        return loader.create_module(spec)

    monkeypatch.setattr(ops.importlib, "import_module", import_module)
    with pytest.raises(ImportError, match=r"_C\.so does not load: .*(.|\n)*pip install") as raised:
        ops.load_extension()
    assert isinstance(raised.value.__cause__, ImportError)


def test_import_is_quick_and_quiet():
    """The package brings in nothing that torch does not, and prints nothing."""
    code = (
        "import sys, torch; before = set(sys.modules); import flash_attn2;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "assert not new & {'einops', 'tabulate', 'matplotlib', 'triton', 'tqdm'}, new"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stdout == "" and run.stderr == "", run.stderr
