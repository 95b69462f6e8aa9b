"""The op on both devices: sizes, masks, groups, strides, special values, against fp64.

On a CPU this is the tiled reference behind the dispatcher and autograd; on a GPU, the kernels.
"""

import math

import pytest
import torch
from cases import (
    EDGE_LENGTHS,
    GROUPS,
    HALF_DTYPES,
    HEAD_DIM_PAIRS,
    HEAD_DIMS,
    MASKS,
    Case,
    random_inputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_result, fp64_result, relative_error, run_op

dtypes = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)


def check(case: Case, dtype: torch.dtype, device: str, *, with_dlse: bool = True) -> None:
    case = case.with_enough_rows()
    inputs = random_inputs(case, dtype, device)
    got = run_op(inputs, case.softmax_scale, case.window, with_dlse=with_dlse)
    try:
        assert_result(got, inputs, case, with_dlse=with_dlse)
    except AssertionError as error:
        raise AssertionError(f"{case} {dtype} {device}: {error}") from None


@dtypes
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(device, dtype, head_dim, mask):
    check(Case(200, 184, head_dim=head_dim, mask=mask), dtype, device)


@dtypes
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("pair", HEAD_DIM_PAIRS, ids=str)
def test_head_dim_of_v(device, dtype, pair, mask):
    d, dv = pair
    check(Case(200, 184, 4, 2, head_dim=d, head_dim_v=dv, mask=mask), dtype, device)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlen_q", (1, 64, 65, 128, 129, 257))
def test_lengths_around_tile_edges(device, seqlen_q, mask):
    for seqlen_k in EDGE_LENGTHS:
        check(Case(seqlen_q, seqlen_k, batch=1, mask=mask), torch.bfloat16, device)


@dtypes
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_grouped_heads(device, dtype, heads, mask):
    check(Case(140, 300, *heads, mask=mask), dtype, device)


@dtypes
@pytest.mark.parametrize("seqlens", [(300, 300), (130, 400), (400, 130)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(device, dtype, seqlens, mask):
    check(Case(*seqlens, heads_q=4, mask=mask), dtype, device)


def test_without_a_gradient_of_the_lse(device):
    for mask in ("full", "causal"):
        check(Case(130, 200, heads_q=4, mask=mask), torch.float16, device, with_dlse=False)


def test_gradient_of_the_lse_alone(device):
    case = Case(130, 200, heads_q=4, mask="causal")
    inputs = random_inputs(case, torch.float16, device)
    q, k, v, dout, dlse = inputs
    _, lse = torch.ops.flash_attn2.forward(q, k, v, case.softmax_scale, *case.window)
    got = torch.autograd.grad(lse, (q, k, v), dlse)
    ref = fp64_result(inputs._replace(dout=torch.zeros_like(dout)), case.softmax_scale, case.window)
    for x, expected in zip(got[:2], ref[2:4], strict=True):
        assert (x.double() - expected).norm() < 2e-3 * expected.norm()
    assert (got[2] == 0).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_shapes(device, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    heads_k = data.draw(st.integers(1, 3), "heads_k")
    case = Case(
        data.draw(st.integers(1, 300), "seqlen_q"),
        data.draw(st.integers(1, 300), "seqlen_k"),
        heads_k * data.draw(st.integers(1, 4), "group"),
        heads_k,
        8 * data.draw(st.integers(2, 32), "head_dim / 8"),
        data.draw(st.integers(1, 3), "batch"),
        data.draw(st.sampled_from(sorted(MASKS)), "mask"),
        8 * data.draw(st.integers(1, 32), "head_dim_v / 8"),
    )
    check(case, data.draw(st.sampled_from(HALF_DTYPES), "dtype"), device)


# Memory layouts -----------------------------------------------------------------------------------


def _fused_projection(case, dtype, device):
    """q, k, v as views of one (b, s, 3, h, d) tensor."""
    qkv = torch.randn(
        case.batch, case.seqlen_q, 3, case.heads_q, case.head_dim, dtype=dtype, device=device
    )
    return qkv.unbind(2)


def _heads_first(case, dtype, device):
    """(b, h, s, d) in memory."""
    shape = (case.batch, case.heads_q, case.seqlen_q, case.head_dim)
    return [torch.randn(shape, dtype=dtype, device=device).transpose(1, 2) for _ in "qkv"]


def _length_first(case, dtype, device):
    """(s, b, h, d) in memory."""
    shape = (case.seqlen_q, case.batch, case.heads_q, case.head_dim)
    return [torch.randn(shape, dtype=dtype, device=device).transpose(0, 1) for _ in "qkv"]


def _broadcast(case, dtype, device):
    """One batch element and one head in memory, the others have stride 0."""
    shape = (case.batch, case.seqlen_q, case.heads_q, case.head_dim)
    row = (1, case.seqlen_q, 1, case.head_dim)
    return [torch.randn(row, dtype=dtype, device=device).expand(shape) for _ in "qkv"]


def _odd_offset(case, dtype, device):
    """Rows that start at no multiple of 16 bytes."""
    shape = (case.batch, case.seqlen_q, case.heads_q, case.head_dim + 3)
    return [torch.randn(shape, dtype=dtype, device=device)[..., 1:-2] for _ in "qkv"]


LAYOUTS = (_fused_projection, _heads_first, _length_first, _broadcast, _odd_offset)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__[1:])
def test_strides(device, dtype, layout):
    case = Case(150, 150, 3, 3, mask="causal")
    q, k, v = (x.detach().requires_grad_() for x in layout(case, dtype, device))
    inputs = random_inputs(case, dtype, device)._replace(q=q, k=k, v=v)
    assert q.stride() == layout(case, dtype, device)[0].stride()
    assert_result(run_op(inputs, case.softmax_scale, case.window), inputs, case)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__[1:])
def test_strides_of_the_output_gradient(device, layout):
    case = Case(150, 150, 3, 3, mask="causal")
    inputs = random_inputs(case, torch.bfloat16, device)
    inputs = inputs._replace(dout=layout(case, torch.bfloat16, device)[0])
    assert_result(run_op(inputs, case.softmax_scale, case.window), inputs, case)


def test_gradient_of_a_sum(device):
    """Its gradient is one number with strides of 0, in the last dimension, too."""
    case = Case(100, 100)
    inputs = random_inputs(case, torch.bfloat16, device)
    q, k, v, *_ = inputs
    out, lse = torch.ops.flash_attn2.forward(q, k, v, case.softmax_scale)
    dq, dk, dv = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    ones = inputs._replace(dout=torch.ones_like(out), dlse=torch.ones_like(lse))
    ref = fp64_result(ones, case.softmax_scale)
    for x, expected in zip((dq, dk, dv), ref[2:], strict=True):
        assert (x.double() - expected).norm() < 1e-2 * expected.norm()


def test_results_do_not_share_memory_with_inputs(device):
    q, k, v, *_ = (x.detach() for x in random_inputs(Case(64, 64), torch.float16, device))
    before = [x.clone() for x in (q, k, v)]
    out, _ = torch.ops.flash_attn2.forward(q, k, v, 0.125)
    out.zero_()
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


# Empty things -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("sizes", [(0, 2, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)], ids=str)
def test_zero_sizes(device, sizes, mask):
    batch, seqlen_q, seqlen_k = sizes
    case = Case(seqlen_q, seqlen_k, heads_q=4, batch=batch, mask=mask)
    inputs = random_inputs(case, torch.float16, device)
    got = run_op(inputs, case.softmax_scale, case.window)
    for x, like in zip((got.out, *got[2:]), (inputs.q, *inputs[:3]), strict=True):
        assert x.shape == like.shape and x.dtype == like.dtype
        assert (x == 0).all()
    assert got.lse.shape == (batch, 4, seqlen_q)
    assert (got.lse == -math.inf).all()


@dtypes
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_rows_without_keys(device, dtype, mask):
    case = Case(300, 90, heads_q=4, mask=mask)
    inputs = random_inputs(case, dtype, device)
    got = run_op(inputs, case.softmax_scale, case.window)
    rows = 300 - 90 - case.window[1]  # before the first row that sees key 0
    assert (got.out[:, :rows] == 0).all() and (got.dq[:, :rows] == 0).all()
    assert (got.lse[..., :rows] == -math.inf).all()
    assert got.lse[..., rows:].isfinite().all()
    assert_result(got, inputs, case)


def test_any_gradient_of_the_lse_of_a_row_without_keys(device):
    """Whatever a caller's formula sends back for -inf, such a row leaves all gradients alone."""
    case = Case(100, 40, mask="causal")
    inputs = random_inputs(case, torch.bfloat16, device)
    dlse = inputs.dlse.clone()
    dlse[..., :60] = math.nan
    got = run_op(inputs._replace(dlse=dlse), case.softmax_scale, case.window)
    assert_result(got, inputs, case)


# Infinities and NaN -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_propagate(device, where, value):
    """Every element is finite exactly where plain attention's is (full attention)."""
    case = Case(150, 140, 4, 2)
    inputs = random_inputs(case, torch.bfloat16, device)
    with torch.no_grad():
        getattr(inputs, where)[1, 77, 1, 3] = value
    got = run_op(inputs, case.softmax_scale, case.window)
    ref = fp64_result(inputs, case.softmax_scale, case.window)
    for name, x, expected in zip(got._fields, got, ref, strict=True):
        assert torch.equal(x.isfinite(), expected.isfinite()), name
    assert not got.out.isfinite().all() and got.out[0].isfinite().all()


@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_reaches_the_rows_that_see_it(device, where):
    """Causal: rows from the key's position on, and none that is more than a tile before it."""
    case = Case(700, 700, 1, 1, batch=1, mask="causal")
    inputs = random_inputs(case, torch.bfloat16, device)
    with torch.no_grad():
        getattr(inputs, where)[0, 600, 0, 5] = math.nan
    out = run_op(inputs, case.softmax_scale, case.window).out[0, :, 0, 5]
    assert out[600:].isnan().all()
    assert out[: 600 - 256].isfinite().all()


def test_scores_beyond_the_range_of_exp(device):
    case = Case(130, 140)
    inputs = random_inputs(case, torch.bfloat16, device)
    with torch.no_grad():
        inputs.q.mul_(200)
    got = run_op(inputs, case.softmax_scale)
    assert got.lse.abs().max() > 300
    ref = fp64_result(inputs, case.softmax_scale)
    assert all(x.isfinite().all() for x in got)
    assert (got.out.double() - ref.out).norm() < 1e-2 * ref.out.norm()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_negative_and_zero_scale(device, scale):
    inputs = random_inputs(Case(130, 140), torch.bfloat16, device)
    got, ref = run_op(inputs, scale), fp64_result(inputs, scale)
    assert relative_error(got.out, ref.out) < 5e-3
    assert relative_error(got.lse, ref.lse) < 1e-5
    assert relative_error(got.dv, ref.dv) < 5e-3
    assert relative_error(got.dq, ref.dq) < 1e-2


# Reproducible -------------------------------------------------------------------------------------


def test_deterministic_is_bitwise_the_same(device):
    case = Case(400, 500, 8, 2, mask="causal")
    inputs = random_inputs(case, torch.bfloat16, device)

    def run():
        return run_op(inputs, case.softmax_scale, case.window, deterministic=True)

    first = run()
    for _ in range(99 if device == "cuda" else 2):
        assert all(torch.equal(x, y) for x, y in zip(run(), first, strict=True))


def test_all_but_dq_are_bitwise_the_same_in_any_mode(device):
    case = Case(700, 800, 8, 2, mask="causal")
    inputs = random_inputs(case, torch.bfloat16, device)
    first = run_op(inputs, case.softmax_scale, case.window)
    for _ in range(19 if device == "cuda" else 2):
        again = run_op(inputs, case.softmax_scale, case.window)
        for name in ("out", "lse", "dk", "dv"):
            assert torch.equal(getattr(again, name), getattr(first, name)), name
