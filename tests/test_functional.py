"""flash_attn_func and its packed forms: the interface of flash-attn 2.8."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from cases import Case, random_inputs
from numerics import fp64_result, plain_attention, relative_error
from torch.utils.checkpoint import checkpoint

import flash_attn2
from flash_attn2 import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)

FUNCTIONS = {
    flash_attn_func: ("q", "k", "v"),
    flash_attn_kvpacked_func: ("q", "kv"),
    flash_attn_qkvpacked_func: ("qkv",),
}
DEFAULTS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def tensors_of(function, device, dtype=torch.float16, requires_grad=True):
    """(b, s, ..., h, d) arguments of a function, and q, k, v as views of them."""
    shapes = {"qkv": (2, 70, 3, 4, 32), "kv": (2, 70, 2, 4, 32)}
    args = [
        torch.randn(shapes.get(name, (2, 70, 4, 32)), dtype=dtype, device=device).requires_grad_(
            requires_grad
        )
        for name in FUNCTIONS[function]
    ]
    views = [x.unbind(2) if x.dim() == 5 else (x,) for x in args]
    return args, [view for group in views for view in group]


@every_function
def test_signature_is_flash_attns(function):
    parameters = inspect.signature(function).parameters
    assert tuple(parameters) == (*FUNCTIONS[function], *DEFAULTS)
    assert {n: p.default for n, p in parameters.items() if n in DEFAULTS} == DEFAULTS


def test_module_paths_that_programs_import():
    for function in FUNCTIONS:
        assert getattr(flash_attn_interface, function.__name__) is function
        assert getattr(flash_attn2, function.__name__) is function
    assert flash_attn2.nn.FlashSelfAttention.__module__.startswith("flash_attn2.nn")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flash_attn2.nothing  # noqa: B018


@every_function
def test_returns(function, device):
    args, _ = tensors_of(function, device)
    out = function(*args)
    assert out.shape == (2, 70, 4, 32) and out.dtype == torch.float16 and out.is_contiguous()
    again, lse, mask = function(*args, return_attn_probs=True)
    assert torch.equal(out, again)
    assert lse.shape == (2, 4, 70) and lse.dtype == torch.float32
    assert mask.shape == (0,) and mask.dtype == torch.float16


@every_function
@pytest.mark.parametrize(
    "arguments, scale, window",
    [
        ({}, 32**-0.5, (-1, -1)),
        ({"softmax_scale": 0.5}, 0.5, (-1, -1)),
        ({"causal": True}, 32**-0.5, (-1, 0)),
        ({"window_size": (9, 4)}, 32**-0.5, (9, 4)),
        ({"window_size": [9, -1], "deterministic": True}, 32**-0.5, (9, -1)),
        ({"window_size": torch.tensor([9, 4])}, 32**-0.5, (9, 4)),
        ({"window_size": (9, 4), "causal": True}, 32**-0.5, (9, 0)),
        ({"window_size": (-1, 100), "causal": True}, 32**-0.5, (-1, 0)),
        ({"window_size": (-5, 3)}, 32**-0.5, (-1, 3)),
    ],
    ids=str,
)
def test_arguments_reach_the_op(function, device, arguments, scale, window):
    args, views = tensors_of(function, device)
    out, lse, _ = function(*args, **arguments, return_attn_probs=True)
    expected, expected_lse = torch.ops.flash_attn2.forward(*views, scale, *window)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_a_right_window_beyond_the_keys_stays_a_window(device):
    """With more queries than keys, early rows stand before key 0 and see the window's keys only."""
    case = Case(300, 100, mask="right")
    q, k, v, *_ = random_inputs(case, torch.bfloat16, device)
    out = flash_attn_func(q, k, v, window_size=(-1, 150))
    ref, _ = plain_attention(*(x.double() for x in (q, k, v)), case.softmax_scale, (-1, 150))
    assert relative_error(out, ref) < 5e-3
    assert (out[:, :50] == 0).all()


@every_function
def test_gradients_of_packed_tensors(function, device):
    args, views = tensors_of(function, device)
    dout = torch.randn(2, 70, 4, 32, dtype=torch.float16, device=device)
    grads = torch.autograd.grad(function(*args, causal=True), args, dout)
    leaves = [x.detach().contiguous().requires_grad_() for x in views]
    expected = torch.autograd.grad(flash_attn_func(*leaves, causal=True), leaves, dout)
    flat = [part for g in grads for part in (g.unbind(2) if g.dim() == 5 else (g,))]
    for got, want in zip(flat, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    "head_dim, head_dim_v",
    [(1, 1), (7, 7), (20, 20), (33, 33), (100, 100), (255, 255)]
    + [(192, 128), (33, 50), (64, 20), (20, 64), (255, 1)],
)
def test_any_head_dim(device, head_dim, head_dim_v):
    """The default scale and the results are those of the head dims that were given."""
    case = Case(60, 90, 4, 2, head_dim=head_dim, head_dim_v=head_dim_v)
    inputs = random_inputs(case, torch.float16, device)
    q, k, v, dout, dlse = inputs
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == dout.shape
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    ref = fp64_result(inputs, head_dim**-0.5)
    for name, x, expected in zip(ref._fields, (out, lse, *grads), ref, strict=True):
        assert relative_error(x, expected) < 3e-3, name


def test_strided_last_dimension(device):
    shape = (2, 32, 3, 50)  # (b, d, h, s)
    q, k, v = (torch.randn(shape, dtype=torch.float16, device=device) for _ in "qkv")
    views = [x.permute(0, 3, 2, 1).requires_grad_() for x in (q, k, v)]
    assert views[0].stride(3) != 1
    out = flash_attn_func(*views, causal=True)
    expected = flash_attn_func(*(x.contiguous() for x in views), causal=True)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in views)


# Not implemented, and wrong -----------------------------------------------------------------------


@every_function
@pytest.mark.parametrize(
    "argument, value, text",
    [
        ("dropout_p", 0.1, "dropout_p: is 0.1"),
        ("softcap", 30.0, "softcap: is 30.0"),
        ("alibi_slopes", torch.ones(4), r"alibi_slopes: is a tensor of shape \(4,\)"),
    ],
)
def test_not_implemented_arguments_are_named(function, argument, value, text):
    args, _ = tensors_of(function, "cpu")
    with pytest.raises(NotImplementedError, match=text):
        function(*args, **{argument: value})


@pytest.mark.parametrize(
    "function, args, text",
    [
        (flash_attn_func, ((2, 3, 4), (2, 3, 4, 8), (2, 3, 4, 8)), r"q: shape is \(2, 3, 4\)"),
        (flash_attn_func, ((2, 3, 4, 8), (), (2, 3, 4, 8)), r"k: shape is \(\)"),
        (flash_attn_kvpacked_func, ((2, 3, 4, 8), (2, 3, 3, 4, 8)), r"kv: shape is \(2, 3, 3"),
        (flash_attn_qkvpacked_func, ((2, 3, 2, 4, 8),), r"qkv: shape is \(2, 3, 2, 4, 8\)"),
        (flash_attn_qkvpacked_func, ((2, 3, 4, 8),), r"qkv: shape is \(2, 3, 4, 8\)"),
    ],
)
def test_wrong_shapes_are_named(function, args, text, device):
    with pytest.raises(RuntimeError, match=text):
        function(*(torch.randn(shape, dtype=torch.float16, device=device) for shape in args))


def test_head_dim_zero_is_named(device):
    x = torch.empty(1, 4, 2, 8, device=device, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="q: head_dim is 0"):
        flash_attn_func(x[..., :0], x[..., :0], x)
    with pytest.raises(RuntimeError, match="v: head_dim is 0"):
        flash_attn_func(x, x, x[..., :0])


def test_wrong_window(device):
    args, _ = tensors_of(flash_attn_func, device)
    with pytest.raises(RuntimeError, match="window_size: has 3 elements, it must have 2"):
        flash_attn_func(*args, window_size=(1, 2, 3))


@pytest.mark.gpu
def test_head_dim_above_the_limit_names_the_callers_value():
    q = torch.randn(1, 8, 1, 257, dtype=torch.float16, device="cuda")
    with pytest.raises(RuntimeError, match="q: head_dim is 257, the limit is 256"):
        flash_attn_func(q, q, q)
    with pytest.raises(RuntimeError, match="v: head_dim is 257, the limit is 256"):
        flash_attn_func(q[..., :64], q[..., :64], q)
    # Padded, both would be 40.
    with pytest.raises(RuntimeError, match="k: head_dim is 34, it must be q's 33"):
        flash_attn_func(q[..., :33], q[..., :34], q[..., :33])


# With the rest of PyTorch -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    args, _ = tensors_of(flash_attn_func, device, torch.float32)
    with torch.autocast(device, dtype):
        out, lse, _ = flash_attn_func(*args, causal=True, return_attn_probs=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected = flash_attn_func(*(x.detach().to(dtype) for x in args), causal=True)
    assert torch.equal(out, expected)
    out.float().square().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in args)


def test_autocast_casts_mixed_dtypes_but_not_fp64():
    q, k = torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="k: dtype is torch.bfloat16, it must be q's"):
        flash_attn_func(q, k, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attn_func(q, k, k).dtype == torch.bfloat16
        assert flash_attn_func(*(q.double(),) * 3).dtype == torch.float64


@pytest.mark.parametrize("autocast", [False, True])
def test_non_reentrant_checkpointing(device, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    x = torch.randn(2, 40, 64, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(64, 3 * 64, device=device, dtype=dtype, requires_grad=True)

    def block(x):
        qkv = F.linear(x, weight.t()).view(2, 40, 3, 4, 16)
        return x + flash_attn_qkvpacked_func(qkv, causal=True).flatten(2)

    def gradients(run):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = run(x).float().square().sum()
        return torch.autograd.grad(loss, (x, weight))

    expected = gradients(lambda x: block(block(x)))
    got = gradients(
        lambda x: checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False)
    )
    for a, b in zip(got, expected, strict=True):
        # dq is summed in any order on a GPU.
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize("head_dim_v", [3, 1, 5])
def test_gradcheck_of_out_and_lse(head_dim_v):
    case = Case(5, 7, 4, 2, head_dim=3, head_dim_v=head_dim_v)
    q, k, v, *_ = random_inputs(case, torch.float64, "cpu")
    for arguments in ({}, {"causal": True}, {"window_size": (2, 1), "softmax_scale": -0.8}):
        assert torch.autograd.gradcheck(
            lambda *args, kw=arguments: flash_attn_func(*args, **kw, return_attn_probs=True)[:2],
            (q, k, v),
        )


def test_merging_two_halves_by_their_lse(device):
    """What the differentiable LSE is for: attention over two sets of keys, joined afterwards."""
    case = Case(60, 100, 4, 4, head_dim=32)
    inputs = random_inputs(case, torch.bfloat16, device)
    q, k, v, dout, _ = inputs
    halves = [
        flash_attn_func(q, k[:, part], v[:, part], return_attn_probs=True)
        for part in (slice(0, 30), slice(30, 100))
    ]
    weights = torch.stack([lse for _, lse, _ in halves]).softmax(0).transpose(2, 3)[..., None]
    out = sum(w * o.float() for w, (o, _, _) in zip(weights, halves, strict=True))
    grads = torch.autograd.grad(out, (q, k, v), dout.float())
    ref = fp64_result(inputs, case.softmax_scale, with_dlse=False)
    for name, x, expected in zip(
        ("out", "dq", "dk", "dv"), (out, *grads), (ref.out, *ref[2:]), strict=True
    ):
        assert relative_error(x, expected) < 1e-2, name


def test_lse_of_a_row_without_keys_is_minus_infinity(device):
    q, k, v, *_ = random_inputs(Case(8, 3), torch.float16, device)
    _, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (lse[..., :5] == -math.inf).all() and lse[..., 5:].isfinite().all()
