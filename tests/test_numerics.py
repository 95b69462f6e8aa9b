"""The tests' own tools: a measure that cannot fail would make every other test worthless."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import Case, random_inputs
from numerics import (
    _poison_cuda_allocator,
    assert_near,
    fp64_result,
    hidden_pairs,
    plain_attention,
    poisoned,
    relative_error,
    rounded_result,
)


def test_relative_error():
    ref = torch.tensor([3.0, 4.0])
    assert relative_error(ref, ref) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), ref) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([3.0, math.nan]), ref))
    assert relative_error(torch.ones(2), torch.zeros(2)) == pytest.approx(math.sqrt(2))
    assert relative_error(torch.empty(0), torch.empty(0)) == 0


def test_assert_near_refuses_nan_and_large_errors():
    ref = torch.randn(100, dtype=torch.float64)
    assert_near(ref.float(), ref, None, "x")
    for wrong in (ref * math.nan, ref * 1.001):
        with pytest.raises(AssertionError, match="x: error"):
            assert_near(wrong.float(), ref, None, "x")
    rounded = ref.bfloat16()
    assert_near(rounded, ref, rounded, "x")
    with pytest.raises(AssertionError, match="x: error"):
        assert_near((ref * 1.05).bfloat16(), ref, rounded, "x")


def test_poisoned_memory_is_nan(device):
    like = torch.ones(1000, device=device)
    with poisoned(like.device):
        assert torch.empty_like(like).isnan().all()
        assert like.new_empty(33, dtype=torch.bfloat16).isnan().all()
        # A workspace of bytes that is read as fp32 is NaN, too.
        workspace = torch.empty(64, dtype=torch.uint8, device=device)
        assert workspace.view(torch.float32).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("elements", [10, 1000, 100_000, 1_000_000, 10_000_000])
def test_poisoned_allocator(elements):
    """What C++ takes from the allocator itself, without the fill of torch.empty."""
    stale = torch.ones(elements, device="cuda")
    del stale
    _poison_cuda_allocator(torch.device("cuda", 0))
    assert torch.empty(elements, device="cuda").isnan().all()


def test_hidden_pairs_written_out():
    x = True
    assert hidden_pairs(2, 4, (-1, 0), "cpu").tolist() == [[0, 0, 0, x], [0, 0, 0, 0]]
    assert hidden_pairs(3, 2, (-1, 0), "cpu").tolist() == [[x, x], [0, x], [0, 0]]
    assert hidden_pairs(3, 3, (1, 0), "cpu").tolist() == [[0, x, x], [0, 0, x], [x, 0, 0]]
    assert hidden_pairs(3, 3, (0, 1), "cpu").tolist() == [[0, 0, x], [x, 0, 0], [x, x, 0]]


@pytest.mark.parametrize("head_dim_v", [64, 24])
def test_plain_attention_is_torchs(head_dim_v):
    case = Case(9, 9, heads_q=4, head_dim_v=head_dim_v)
    q, k, v, *_ = random_inputs(case, torch.float64, "cpu")
    out, lse = plain_attention(q, k, v, 0.3, (-1, 0))
    args = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*args, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    # Row 0 sees key 0 alone.
    first = 0.3 * (q[:, 0] * k[:, 0].repeat_interleave(2, 1)).sum(-1)
    torch.testing.assert_close(lse[:, :, 0], first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_rounded_result_has_the_error_of_its_dtype(dtype, mask):
    case = Case(200, 150, heads_q=4, mask=mask, head_dim_v=40)
    inputs = random_inputs(case, dtype, "cpu")
    exact = fp64_result(inputs, case.softmax_scale, case.window)
    rounded = rounded_result(inputs, case.softmax_scale, case.window)
    eps = torch.finfo(dtype).eps
    for name, x, ref in zip(exact._fields, rounded, exact, strict=True):
        if name != "lse":
            assert eps / 8 < relative_error(x, ref) < eps, name
