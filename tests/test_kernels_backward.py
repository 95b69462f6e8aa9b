"""The backward kernels: accuracy beside torch's FLASH_ATTENTION backend, and every tile edge.

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
    MASKS,
    UNEQUAL_BUCKETS,
    YARDSTICK_HEAD_DIMS,
    Case,
    random_inputs,
)
from numerics import amid_nan, assert_result, fp64_result, relative_error, run_op, torch_flash
from plans import KERNELS, needs_whole_heads

import flash_attn2
from flash_attn2.introspection import families_of_gpu, forced_family

pytestmark = pytest.mark.gpu

YARDSTICK_LENGTHS = ((1024, 1024), (512, 1200), (1200, 512))


def check(case: Case, dtype: torch.dtype, **arguments) -> None:
    inputs = random_inputs(case, dtype, "cuda")
    got = run_op(inputs, case.softmax_scale, case.window, **arguments)
    try:
        assert_result(got, inputs, case)
    except AssertionError as error:
        raise AssertionError(f"{case} {dtype} {arguments}: {error}") from None


@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("lengths", YARDSTICK_LENGTHS, ids=str)
@pytest.mark.parametrize("head_dims", YARDSTICK_HEAD_DIMS, ids=str)
def test_error_is_at_most_1_05_of_torch_flash(head_dims, lengths, mask, dtype, deterministic):
    d, dv = head_dims
    case = Case(*lengths, 8, 8, head_dim=d, head_dim_v=dv, mask=mask)
    inputs = random_inputs(case, dtype, "cuda")
    got = run_op(
        inputs, case.softmax_scale, case.window, with_dlse=False, deterministic=deterministic
    )
    q, k, v, dout, _ = inputs
    peer, _ = torch_flash(q, k, v, case.softmax_scale, causal=mask == "causal")
    peer_grads = torch.autograd.grad(peer, (q, k, v), dout)
    ref = fp64_result(inputs, case.softmax_scale, case.window, with_dlse=False)
    for name, theirs in zip(("dq", "dk", "dv"), peer_grads, strict=True):
        expected = getattr(ref, name)
        ours, peers = relative_error(getattr(got, name), expected), relative_error(theirs, expected)
        assert ours <= 1.05 * peers, f"{name}: error {ours:.4g}, torch's {peers:.4g}"


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("seqlen_q", EDGE_LENGTHS)
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (256, 256), *UNEQUAL_BUCKETS], ids=str)
def test_lengths(head_dims, seqlen_q, mask):
    d, dv = head_dims
    for seqlen_k in KEY_EDGE_LENGTHS:
        case = Case(seqlen_q, seqlen_k, head_dim=d, head_dim_v=dv, mask=mask).with_enough_rows()
        check(case, torch.bfloat16, deterministic=seqlen_k % 2 == 0)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 16, 24, 32, 88, 104, 136, 200, 248])
def test_head_dims(head_dim, dtype):
    """Also those between the buckets, whose last columns a kernel has to leave alone."""
    for mask in ("full", "causal"):
        check(Case(200, 300, 4, 2, head_dim=head_dim, mask=mask), dtype)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1), (12, 4), (71, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 192, 256])  # shared among warpgroups in different ways
def test_groups_of_heads(head_dim, heads, deterministic, dtype):
    for mask in ("full", "causal"):
        case = Case(300, 500, *heads, head_dim=head_dim, mask=mask)
        check(case, dtype, deterministic=deterministic)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("head_dims", YARDSTICK_HEAD_DIMS, ids=str)
def test_whole_groups_of_heads(head_dims, mask):
    """So many KV heads that one thread block works for all query heads of the group: see head_parts
    in csrc/plan/plan.cpp, which divides the groups of the other tests.
    """
    d, dv = head_dims
    case = Case(130, 500, 6, 2, head_dim=d, head_dim_v=dv, mask=mask, batch=67)
    check(case, torch.bfloat16)


@pytest.mark.parametrize("mask, batch", [("causal", 2), ("full", 8)])
@pytest.mark.parametrize("head_dims", YARDSTICK_HEAD_DIMS, ids=str)
def test_deterministic_over_100_runs(head_dims, mask, batch):
    """Ten column blocks and more add to each row of dq; the order must not show.

    Those of 16 KV heads fill a GPU more than once, so that the order of the full mask differs
    between heads that start in one round and heads that start in two (csrc/core/turn_order.h).
    Those of 4 do not: groups are in parts.
    """
    d, dv = head_dims
    case = Case(1300, 1400, 8, 2, head_dim=d, head_dim_v=dv, mask=mask, batch=batch)
    inputs = random_inputs(case, torch.bfloat16, "cuda")
    q, k, v, dout, dlse = (x.detach() for x in inputs)
    out, lse = torch.ops.flash_attn2.forward(q, k, v, case.softmax_scale, *case.window)

    def run(deterministic):
        return torch.ops.flash_attn2.backward(
            dout, q, k, v, out, lse, dlse, case.softmax_scale, *case.window, deterministic
        )

    first = run(True)
    check(case, torch.bfloat16, deterministic=True)
    for _ in range(100):
        assert all(torch.equal(x, y) for x, y in zip(run(True), first, strict=True))
    _, dk, dv = run(False)
    for _ in range(20):
        _, dk_again, dv_again = run(False)
        assert torch.equal(dk, dk_again) and torch.equal(dv, dv_again)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 192, 256])
def test_deterministic_where_heads_go_side_by_side(head_dim, mask):
    """1600 key blocks or more, twelve rounds on 132 multiprocessors: see heads_in_turn and
    heads_in_reverse in csrc/plan/plan.cpp. At head dim 256 without a mask they still go one after
    the other.
    """
    case = Case(500, 500, 4, 2, head_dim=head_dim, batch=200, mask=mask)
    inputs = random_inputs(case, torch.bfloat16, "cuda")
    first = run_op(inputs, case.softmax_scale, case.window, deterministic=True)
    assert_result(first, inputs, case)
    for _ in range(20):
        again = run_op(inputs, case.softmax_scale, case.window, deterministic=True)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("pair", HEAD_DIM_PAIRS, ids=str)
def test_head_dim_of_v(pair, dtype, deterministic, heads):
    for mask in ("full", "causal", "window"):
        case = Case(300, 500, *heads, head_dim=pair[0], head_dim_v=pair[1], mask=mask)
        check(case, dtype, deterministic=deterministic)


@pytest.mark.parametrize("pair", [(72, 72), (72, 40), (168, 104), (40, 104)], ids=str)
def test_neighbours_of_a_padded_head_dim_are_not_read(pair):
    """The columns on either side of q, k, v and dout in their memory are NaN."""
    case = Case(150, 150, head_dim=pair[0], head_dim_v=pair[1])
    inputs = random_inputs(case, torch.float16, "cuda")
    q, k, v = (amid_nan(x).requires_grad_() for x in inputs[:3])
    inputs = inputs._replace(q=q, k=k, v=v, dout=amid_nan(inputs.dout))
    assert_result(run_op(inputs, case.softmax_scale), inputs, case)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_long_sequence(mask):
    case = Case(8192, 900, 1, 1, head_dim=128, batch=1, mask=mask)
    check(case, torch.bfloat16)
    check(Case(900, 8192, 1, 1, head_dim=128, batch=1, mask=mask), torch.bfloat16)


# Clusters have no shared memory for them.
HEAD_DIMS_WITH_SLOTS = [dims for dims in YARDSTICK_HEAD_DIMS if dims[0] < 192]


@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("head_dims", HEAD_DIMS_WITH_SLOTS, ids=str)
def test_more_heads_than_dq_has_slots(head_dims, dtype, deterministic):
    """The slots of dQ's accumulator are taken by several KV heads, one after the other: 266 at most
    by 320, on 132 multiprocessors, and 136 by 160. Under the mask some thread blocks add nothing.
    For the lengths see ring_pays in csrc/plan/plan.cpp.
    """
    d, dv = head_dims
    for mask, lengths, batch in (("full", (2060, 100), 160), ("causal", (4100, 390), 80)):
        case = Case(*lengths, 4, 2, head_dim=d, head_dim_v=dv, batch=batch, mask=mask)
        check(case, dtype, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize("head_dims", HEAD_DIMS_WITH_SLOTS, ids=str)
def test_more_heads_than_dq_has_slots_under_a_window(head_dims, deterministic):
    """64 KV heads of ten key blocks each; 30 slots, 60 in deterministic mode."""
    d, dv = head_dims
    case = Case(4100, 1200, 2, 2, head_dim=d, head_dim_v=dv, batch=32, mask="wide window")
    check(case, torch.bfloat16, deterministic=deterministic)


# Those whose thread blocks do not stay.
HEAD_DIMS_WITH_DELTA_AHEAD = [
    dims for dims in YARDSTICK_HEAD_DIMS if dims == (64, 64) or dims[0] > 128
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("head_dims", HEAD_DIMS_WITH_DELTA_AHEAD, ids=str)
def test_more_heads_than_the_pre_process_takes(head_dims, mask, deterministic):
    """D of later heads is made by the way: of 200 KV heads the pre-process takes 133 at most."""
    d, dv = head_dims
    for lengths in ((300, 270), (65, 600), (700, 100)):
        case = Case(*lengths, 4, 2, head_dim=d, head_dim_v=dv, batch=100, mask=mask)
        check(case, torch.bfloat16, deterministic=deterministic)


# (queries, keys) of heads that thread blocks of 132 multiprocessors take whole.
WHOLE_HEAD_LENGTHS = [
    *((rows, 128) for rows in (1, 63, 64, 65, 129, 511, 512)),
    *((64, keys) for keys in (1, 63, 64, 65, 127, 129, 256, 257, 700)),
    *((rows, rows) for rows in (127, 192, 197, 256, 257, 320, 512)),
    (512, 77),
    (100, 512),
    (300, 1100),
]


@needs_whole_heads
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", WHOLE_HEAD_LENGTHS, ids=str)
def test_whole_heads(lengths, mask):
    """132 heads have a multiprocessor each, of 256 most take two."""
    for batch, dtype in ((33, torch.bfloat16), (64, torch.float16)):
        case = Case(*lengths, 4, 4, head_dim=64, batch=batch, mask=mask)
        plan = flash_attn2.plan("backward", batch, *lengths, 4, 4, 64, family="sm90")
        assert KERNELS[plan["kernel"]]["head_rows"] > 0
        check(case, dtype)


@pytest.mark.parametrize("head_dims", [(8, 8), (40, 64), (64, 24), (56, 56)], ids=str)
def test_head_dims_of_whole_heads(head_dims):
    d, dv = head_dims
    check(Case(190, 210, 4, 4, head_dim=d, head_dim_v=dv, batch=64), torch.bfloat16)


@needs_whole_heads
def test_whole_heads_are_the_same_over_100_runs():
    """With and without `deterministic`: a thread block sums all of a head's dQ in one order."""
    if "sm90" not in families_of_gpu():
        pytest.skip("no GPU that takes whole heads")
    inputs = random_inputs(Case(500, 400, 4, 4, head_dim=64, batch=64), torch.bfloat16, "cuda")
    with forced_family("sm90"):
        first = run_op(inputs, 0.125, (-1, 0))
        for run in range(100):
            again = run_op(inputs, 0.125, (-1, 0), deterministic=run % 2 == 1)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_heads_than_dq_has_slots_without_queries(head_dim):
    shapes = ((300, rows, 4, head_dim) for rows in (0, 70, 70))
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.float16) for shape in shapes)
    k.requires_grad_(), v.requires_grad_()
    out = flash_attn2.flash_attn_func(q, k, v)
    grads = torch.autograd.grad(out.sum(), (k, v))
    torch.cuda.synchronize()
    assert all(torch.count_nonzero(x) == 0 for x in grads)


@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize("head_dims", YARDSTICK_HEAD_DIMS, ids=str)
def test_key_blocks_that_no_query_sees_among_others(head_dims, deterministic):
    """Thread blocks that take one key block after the other have some of both kinds."""
    d, dv = head_dims
    case = Case(70, 900, 4, 4, head_dim=d, head_dim_v=dv, batch=60, mask="window")
    assert case.window[0] < 900 - 70 - 2 * 128
    check(case, torch.bfloat16, deterministic=deterministic)


def test_many_heads_and_batches():
    """batch * heads past 65535, the limit of a grid's second and third dimension."""
    check(Case(17, 19, 1024, 256, head_dim=32, batch=70), torch.float16)
