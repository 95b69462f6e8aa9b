"""The forward kernels: accuracy beside torch's FLASH_ATTENTION backend, and every tile edge.

test_attention.py runs what is common to both devices; here are the tests that need a GPU.
"""

import pytest
import torch
from cases import (
    EDGE_LENGTHS,
    HALF_DTYPES,
    HEAD_DIM_PAIRS,
    HEAD_DIMS,
    KEY_EDGE_LENGTHS,
    UNEQUAL_BUCKETS,
    YARDSTICK_HEAD_DIMS,
    Case,
    random_inputs,
)
from numerics import (
    amid_nan,
    assert_lse_near,
    assert_near,
    plain_attention,
    poisoned,
    relative_error,
    rounded_result,
    torch_flash,
)

pytestmark = pytest.mark.gpu

YARDSTICK_LENGTHS = ((1024, 1024), (512, 1200), (1200, 512), (512, 2500))


def run_forward(inputs, case):
    with torch.no_grad(), poisoned(inputs.q.device):
        return torch.ops.flash_attn2.forward(*inputs[:3], case.softmax_scale, *case.window)


def fp64_forward(inputs, case):
    with torch.no_grad():
        q, k, v = (x.double() for x in inputs[:3])
        return plain_attention(q, k, v, case.softmax_scale, case.window)


def check(case, dtype):
    inputs = random_inputs(case, dtype, "cuda")
    out, lse = run_forward(inputs, case)
    ref, ref_lse = fp64_forward(inputs, case)
    rounded = rounded_result(inputs, case.softmax_scale, case.window)
    assert_near(out, ref, rounded.out, f"{case}: out")
    assert_lse_near(lse, ref_lse)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("lengths", YARDSTICK_LENGTHS, ids=str)
@pytest.mark.parametrize("head_dims", YARDSTICK_HEAD_DIMS, ids=str)
def test_error_is_at_most_1_05_of_torch_flash(head_dims, lengths, mask, dtype):
    d, dv = head_dims
    case = Case(*lengths, 8, 8, head_dim=d, head_dim_v=dv, mask=mask)
    inputs = random_inputs(case, dtype, "cuda")
    out, lse = run_forward(inputs, case)
    peer, _ = torch_flash(*inputs[:3], case.softmax_scale, causal=mask == "causal")
    ref, ref_lse = fp64_forward(inputs, case)
    ours, theirs = relative_error(out, ref), relative_error(peer, ref)
    assert ours <= 1.05 * theirs, f"out: error {ours:.4g}, torch's {theirs:.4g}"
    assert_lse_near(lse, ref_lse)


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("seqlen_q", EDGE_LENGTHS)
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (256, 256), *UNEQUAL_BUCKETS], ids=str)
def test_lengths(head_dims, seqlen_q, mask):
    d, dv = head_dims
    for seqlen_k in KEY_EDGE_LENGTHS:
        case = Case(seqlen_q, seqlen_k, head_dim=d, head_dim_v=dv, mask=mask).with_enough_rows()
        check(case, torch.bfloat16)


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("seqlen_q", [1, 100, 129, 256, 257, 400, 2200])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_lengths_with_many_keys(head_dim, seqlen_q, mask):
    """Some kernels serve up to 2048 keys, some take pairs of query tiles where there is no mask."""
    for seqlen_k in (2047, 2048, 2049, 2200):
        case = Case(seqlen_q, seqlen_k, head_dim=head_dim, mask=mask).with_enough_rows()
        check(case, torch.bfloat16)


@pytest.mark.parametrize("mask", ["full", "causal", "diagonal", "window"])
@pytest.mark.parametrize("lengths", [(1024, 1), (700, 100), (1024, 230), (768, 2100)], ids=str)
@pytest.mark.parametrize("head_dims", YARDSTICK_HEAD_DIMS, ids=str)
def test_several_tiles_of_a_thread_block(head_dims, lengths, mask):
    """Each begins beside the end of the one before, also where it has one block of keys or none."""
    d, dv = head_dims
    case = Case(*lengths, 8, 4, head_dim=d, head_dim_v=dv, mask=mask, batch=6)
    check(case, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 16, 24, 32, 88, 104, 136, 200, 248])
def test_head_dims(head_dim, dtype):
    """Also those between the buckets, whose last columns a kernel has to leave alone."""
    for mask in ("full", "causal"):
        case = Case(200, 300, 4, 2, head_dim=head_dim, mask=mask)
        check(case, dtype)


@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("pair", HEAD_DIM_PAIRS, ids=str)
def test_head_dim_of_v(pair, dtype, heads):
    for mask in ("full", "causal", "window"):
        case = Case(300, 500, *heads, head_dim=pair[0], head_dim_v=pair[1], mask=mask)
        check(case, dtype)


@pytest.mark.parametrize("pair", [(72, 72), (72, 40), (168, 104), (40, 104)], ids=str)
def test_neighbours_of_a_padded_head_dim_are_not_read(pair):
    """The columns on either side of q, k and v in their memory are NaN."""
    case = Case(150, 150, head_dim=pair[0], head_dim_v=pair[1])
    inputs = random_inputs(case, torch.float16, "cuda")
    q, k, v = (amid_nan(x) for x in inputs[:3])
    inputs = inputs._replace(q=q, k=k, v=v)
    out, lse = run_forward(inputs, case)
    ref, ref_lse = fp64_forward(inputs, case)
    assert relative_error(out, ref) < 1e-3
    assert_lse_near(lse, ref_lse)


def test_rows_beyond_the_sequence_are_not_read():
    """Lengths cut out of a longer buffer, whose other rows are NaN."""
    case = Case(70, 100)
    buffers = [torch.full((2, 300, 2, 64), torch.nan, device="cuda").half() for _ in "qkv"]
    views = [x[:, :n] for x, n in zip(buffers, (70, 100, 100), strict=True)]
    for x in views:
        x.copy_(torch.randn_like(x))
    inputs = random_inputs(case, torch.float16, "cuda")._replace(q=views[0], k=views[1], v=views[2])
    out, lse = run_forward(inputs, case)
    ref, ref_lse = fp64_forward(inputs, case)
    assert relative_error(out, ref) < 1e-3
    assert_lse_near(lse, ref_lse)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_long_sequence(mask):
    """Many blocks: the running maximum and sum are rescaled 16k / 64 times."""
    case = Case(500, 16_384, 1, 1, head_dim=128, batch=1, mask=mask)
    inputs = random_inputs(case, torch.bfloat16, "cuda")
    with torch.no_grad():
        inputs.k.mul_(torch.linspace(0.1, 2, 16_384, device="cuda")[:, None, None])
    out, lse = run_forward(inputs, case)
    ref, ref_lse = fp64_forward(inputs, case)
    rounded = rounded_result(inputs, case.softmax_scale, case.window)
    assert_near(out, ref, rounded.out, "out")
    assert_lse_near(lse, ref_lse)


@pytest.mark.parametrize("lengths", [(8192, 8192), (8193, 8400), (8900, 8200)], ids=str)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_long_causal_lengths(head_dim, lengths):
    """From 8192 on pairs of thread blocks share the rows of a tile."""
    check(Case(*lengths, 2, 1, head_dim=head_dim, batch=1, mask="causal"), torch.bfloat16)


# The keys from one on have scores below 0, the last blocks or the first, or they all have.
@pytest.mark.parametrize("negative", [slice(500, None), slice(0, 500), slice(None)], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("head_dims", YARDSTICK_HEAD_DIMS, ids=str)
def test_scores_below_zero(head_dims, mask, negative):
    """Maxima of scores of which one has no sign are taken as integers."""
    d, dv = head_dims
    case = Case(300, 1000, head_dim=d, head_dim_v=dv, mask=mask)
    inputs = random_inputs(case, torch.bfloat16, "cuda")
    with torch.no_grad():
        inputs.q.abs_()
        inputs.k.abs_().mul_(torch.linspace(0.1, 2, 1000, device="cuda")[:, None, None])
        inputs.k[:, negative].neg_()
    out, lse = run_forward(inputs, case)
    ref, ref_lse = fp64_forward(inputs, case)
    rounded = rounded_result(inputs, case.softmax_scale, case.window)
    assert_near(out, ref, rounded.out, "out")
    assert_lse_near(lse, ref_lse)


@pytest.mark.parametrize("head_dims", YARDSTICK_HEAD_DIMS, ids=str)
def test_nan_of_a_key_stays_with_the_rows_that_see_it(head_dims):
    d, dv = head_dims
    case = Case(1000, 1000, head_dim=d, head_dim_v=dv, mask="causal")
    inputs = random_inputs(case, torch.bfloat16, "cuda")
    ref, _ = fp64_forward(inputs, case)
    with torch.no_grad():
        inputs.k[:, 700] = torch.nan
    out, lse = run_forward(inputs, case)
    assert out[:, 700:].isnan().all() and lse[:, :, 700:].isnan().all()
    assert relative_error(out[:, :700], ref[:, :700]) < 1e-2


def test_many_heads_and_batches():
    """batch * heads past 65535, the limit of a grid's second and third dimension."""
    case = Case(17, 19, 1024, 256, head_dim=32, batch=70)
    inputs = random_inputs(case, torch.float16, "cuda")
    out, lse = run_forward(inputs, case)
    ref, ref_lse = fp64_forward(inputs, case)
    assert relative_error(out, ref) < 1e-3
    assert_lse_near(lse, ref_lse)
