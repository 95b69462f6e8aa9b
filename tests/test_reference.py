"""flash_attn2.reference: tiles of every shape against plain fp64 attention."""

import math

import pytest
import torch
from cases import GROUPS, HEAD_DIM_PAIRS, MASKS, Case, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import Result, assert_result, hidden_pairs, poisoned
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn2 import reference


def run_reference(inputs, case, **blocks) -> Result:
    q, k, v, dout, dlse = (x.detach() for x in inputs)
    with poisoned(q.device):
        out, lse = reference.forward(q, k, v, case.softmax_scale, *case.window, **blocks)
        before = lse.clone()
        grads = reference.backward(
            dout, q, k, v, out, lse, case.softmax_scale, *case.window, dlse=dlse, **blocks
        )
    assert torch.equal(lse, before)
    return Result(out, lse, *grads)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(37, 37), (21, 64), (50, 19), (1, 30), (30, 1)], ids=str)
@pytest.mark.parametrize("blocks", [(16, 8), (8, 32), (64, 64)], ids=str)
def test_tiles(lengths, mask, blocks):
    case = Case(*lengths, heads_q=4, head_dim=24, mask=mask)
    inputs = random_inputs(case, torch.float64, "cpu")
    got = run_reference(inputs, case, block_q=blocks[0], block_k=blocks[1])
    assert_result(got, inputs, case)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("pair", [*HEAD_DIM_PAIRS, (1, 5), (7, 3)], ids=str)
def test_head_dim_of_v(pair, mask):
    case = Case(37, 50, 6, 2, head_dim=pair[0], head_dim_v=pair[1], mask=mask)
    inputs = random_inputs(case, torch.float64, "cpu")
    assert_result(run_reference(inputs, case, block_q=16, block_k=8), inputs, case)


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_default_blocks(dtype, heads, mask):
    case = Case(300, 270, *heads, head_dim=33, mask=mask)
    inputs = random_inputs(case, dtype, "cpu")
    assert_result(run_reference(inputs, case), inputs, case)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_visited_tiles_are_those_with_a_visible_pair(data):
    """Both loop orders visit each tile that has a visible pair, no other, and mask it rightly."""
    length, block = st.integers(0, 60), st.sampled_from((1, 4, 7, 16))
    window = (data.draw(st.integers(-1, 70)), data.draw(st.integers(-1, 70)))
    sizes = (data.draw(length), data.draw(length))
    tiling = reference._Tiling(*sizes, *window, data.draw(block), data.draw(block))
    hidden = hidden_pairs(*sizes, window, "cpu")
    visible = {
        (q, k)
        for q in tiling.q_blocks()
        for k in tiling.k_blocks()
        if not hidden[slice(*q), slice(*k)].all()
    }
    assert {(q, k) for q in tiling.q_blocks() for k in tiling.k_blocks_of(*q)} == visible
    assert {(q, k) for k in tiling.k_blocks() for q in tiling.q_blocks_of(*k)} == visible
    for q, k in visible:
        mask, expected = tiling.hidden(*q, *k), hidden[slice(*q), slice(*k)]
        assert (mask is None) == (not expected.any())
        assert mask is None or torch.equal(mask, expected)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_no_tensor_is_quadratic(mask):
    case = Case(4096, 4096, 1, 1, head_dim=8, batch=1, mask=mask)
    inputs = random_inputs(case, torch.float32, "cpu")
    with LargestTensor() as largest:
        run_reference(inputs, case, block_q=128, block_k=64)
    assert largest.elements == max(inputs.q.numel(), 128 * 64)


def test_large_length_with_a_window():
    """200k tokens: their scores would take 160 GB, and take no time where the window skips them."""
    case = Case(200_000, 200_000, 1, 1, head_dim=8, batch=1)
    inputs = random_inputs(case, torch.float32, "cpu")
    q, k, v, dout, dlse = (x.detach() for x in inputs)
    out, lse = reference.forward(q, k, v, 1.0, 15, 0)
    dq, *_ = reference.backward(dout, q, k, v, out, lse, 1.0, 15, 0, dlse=dlse)
    # The last rows depend on the last keys alone.
    tail = [x[:, -n:] for x, n in zip((q, k, v, dout), (16, 31, 31, 16), strict=True)]
    out_tail, lse_tail = reference.forward(*tail[:3], 1.0, 15, 0)
    dq_tail, *_ = reference.backward(
        tail[3], *tail[:3], out_tail, lse_tail, 1.0, 15, 0, dlse=dlse[..., -16:]
    )
    torch.testing.assert_close(out[:, -16:], out_tail)
    torch.testing.assert_close(lse[..., -16:], lse_tail)
    torch.testing.assert_close(dq[:, -16:], dq_tail)


@pytest.mark.gpu
def test_on_a_gpu():
    """The algorithm is plain PyTorch: as an oracle it runs where the kernels do."""
    case = Case(300, 280, 4, 2, head_dim=48, mask="window")
    inputs = random_inputs(case, torch.float64, "cuda")
    assert_result(run_reference(inputs, case), inputs, case)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(scale):
    class Scaled(Case):
        softmax_scale = scale

    case = Scaled(40, 50, head_dim=16, mask="causal")
    inputs = random_inputs(case, torch.float64, "cpu")
    assert_result(run_reference(inputs, case, block_q=16, block_k=16), inputs, case)


def test_large_scores_do_not_overflow():
    case = Case(40, 50, head_dim=16)
    inputs = random_inputs(case, torch.float64, "cpu")
    q = (inputs.q.detach() * 500).requires_grad_()  # exp(710) is more than fp64 holds
    got = run_reference(inputs._replace(q=q), case, block_q=16, block_k=8)
    assert all(x.isfinite().all() for x in got)
    assert_result(got, inputs._replace(q=q), case)


def test_row_whose_scores_are_all_minus_infinity_counts_as_a_row_without_keys():
    q, k, v = torch.ones(1, 3, 1, 4), torch.ones(1, 5, 1, 4), torch.randn(1, 5, 1, 4)
    q[:, 1] = -math.inf
    out, lse = reference.forward(q, k, v, 1.0)
    assert (out[:, 1] == 0).all() and lse[0, 0, 1] == -math.inf
    torch.testing.assert_close(out[:, 0], v.mean(1))
    dq, dk, dv = reference.backward(torch.ones_like(q), q, k, v, out, lse, 1.0)
    # The two other rows spread their gradient over five equal keys.
    torch.testing.assert_close(dv, torch.full_like(v, 2 / 5))
