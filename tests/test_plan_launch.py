"""How a plan launches its kernel: grid, heads that go together, workspace. Needs no GPU."""

import random

import pytest
from plans import (
    EXTENSION,
    GPUS,
    KERNELS,
    built,
    is_persistent,
    needs_extension,
    needs_sm80,
    needs_sm90,
    needs_whole_heads,
    plan_for,
    round_up,
)

pytestmark = needs_extension

# Grid ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen", [0, 1, 31, 32, 33, 127, 128, 129, 1000, 131072])
def test_forward_grid_is_row_blocks_of_all_query_heads(seqlen):
    plan = plan_for("forward", seqlen_q=seqlen, seqlen_k=77, batch=3, heads_q=6, heads_k=2)
    tiles = 3 * 6 * -(-seqlen // plan["tile_m"])
    blocks = -(-tiles // KERNELS[plan["kernel"]]["teams"])
    sm_count = GPUS["H200"]["sm_count"]
    assert plan["grid"] == (min(blocks, sm_count) if is_persistent(plan) else blocks)


@pytest.mark.parametrize("seqlen", [0, 1, 31, 32, 33, 127, 128, 129, 1000, 131072])
def test_backward_grid_is_column_blocks_of_all_kv_heads(seqlen):
    plan = plan_for("backward", seqlen_q=77, seqlen_k=seqlen, batch=3, heads_q=6, heads_k=2)
    cluster = KERNELS[plan["kernel"]]["cluster"]
    blocks = 3 * 2 * -(-seqlen // (plan["tile_n"] * cluster)) * cluster
    sm_count = GPUS["H200"]["sm_count"]
    assert plan["grid"] == (min(blocks, sm_count) if is_persistent(plan) else blocks)


@needs_sm80
def test_large_grids_are_counted_in_64_bits():
    plan = plan_for(
        "forward", batch=1, heads_q=64, heads_k=64, seqlen_q=2**30, seqlen_k=1, gpu="A100"
    )
    assert plan["grid"] == 64 * 2**30 // plan["tile_m"]


@pytest.mark.parametrize(
    "direction, seqlens, name",
    [
        ("forward", (2**30, 1), "seqlen_q"),
        ("backward", (2**30, 1), "seqlen_q"),
        ("backward", (1, 2**30), "seqlen_k"),
    ],
)
def test_a_grid_that_cuda_cannot_launch_is_an_error(direction, seqlens, name):
    with pytest.raises(ValueError, match=rf"^{name}: is {2**30}, .* at most 2147483647"):
        plan_for(direction, batch=1000, seqlen_q=seqlens[0], seqlen_k=seqlens[1])


# Heads that share the L2 cache --------------------------------------------------------------------


def group_for(seqlen_k, **sizes) -> int:
    """heads_per_group, causal, on an L4 (48 MiB of L2): a KV head takes 4 * seqlen_k * 64 bytes."""
    sizes = {"window_right": 0, **sizes}
    return plan_for("forward", seqlen_k=seqlen_k, head_dim=64, gpu="L4", **sizes)["heads_per_group"]


@needs_sm80
def test_heads_per_group_fills_half_of_the_cache():
    # 16384 keys: K and V of one head take 4 MiB, and 24 MiB hold 6 of them.
    assert group_for(16384, batch=2, heads_q=16, heads_k=16) == 6
    # With 32 columns of V it is 3 MiB a head.
    assert group_for(16384, batch=2, heads_q=16, heads_k=16, head_dim_v=32) == 8
    # Groups of 3 query heads that share a KV head stay together.
    assert group_for(32768, batch=2, heads_q=48, heads_k=16) == 9


@needs_sm80
def test_heads_per_group_is_about_16_where_more_fit():
    assert group_for(128, batch=2, heads_q=16, heads_k=4) == 16
    assert group_for(128, batch=2, heads_q=15, heads_k=5) == 18
    assert group_for(0, batch=2, heads_q=16, heads_k=4) == 16
    assert group_for(128, batch=1, heads_q=8, heads_k=4) == 8


@needs_sm80
def test_heads_per_group_is_one_without_a_mask():
    assert group_for(128, batch=2, heads_q=16, heads_k=4, window_right=-1) == 1
    assert group_for(1024, batch=2, heads_q=16, heads_k=4, window_left=64) == 1


def persistent_group(head_dim=64, **sizes) -> int:
    """heads_per_group of a persistent forward of 2 batches."""
    if head_dim not in built("forward", EXTENSION.build_info()["dtypes"][0]):
        pytest.skip(f"this build has no head dim {head_dim}")
    plan = plan_for("forward", head_dim=head_dim, batch=2, **sizes)
    if not is_persistent(plan):
        pytest.skip("no persistent kernel in this build")
    return plan["heads_per_group"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"seqlen_q": 131072, "seqlen_k": 131072},
        {"seqlen_q": 131072, "seqlen_k": 131072, "window_left": 4096, "window_right": 0},
        {"seqlen_q": 2048, "seqlen_k": 2048, "window_right": 0},
    ],
    ids=["no mask", "window", "few tiles"],
)
def test_a_persistent_grid_goes_head_by_head_where_that_comes_out_even(sizes):
    assert persistent_group(128, heads_q=64, heads_k=16, **sizes) == 1


def test_a_persistent_grid_takes_heads_of_many_tiles_in_groups_under_a_mask():
    sizes = {"seqlen_q": 4096, "seqlen_k": 4096, "heads_q": 64, "heads_k": 16}
    assert persistent_group(128, **sizes) == 1
    # A round of 132 tiles are 4 heads of 32, those of a KV head.
    assert persistent_group(128, window_right=0, **sizes) == 4


def test_a_persistent_grid_takes_about_16_heads_where_smaller_groups_are_less_even():
    sizes = {"seqlen_q": 8192, "seqlen_k": 8192, "heads_q": 20, "heads_k": 20}
    assert (
        persistent_group(64, window_right=0, **sizes) == 14
    )  # of 40, in groups of nearly one size


def test_a_persistent_grid_of_tall_tiles_takes_heads_together_under_a_mask():
    sizes = {"seqlen_q": 2048, "seqlen_k": 2048, "heads_q": 64, "heads_k": 16}
    assert persistent_group(64, **sizes) == 1
    assert persistent_group(64, window_right=0, **sizes) > 16


def test_a_persistent_grid_takes_all_heads_together_where_tiles_are_few():
    assert persistent_group(seqlen_q=512, seqlen_k=512, window_right=0, heads_q=16, heads_k=4) == 32


def share_of_time_used(plan, seqlen, query_heads, window_left=-1, tail=None):
    """Of the teams of a persistent grid on an H200, causal. A tile takes a step for each of its key
    blocks, and about one more to begin and to end. tail: heads of the last group, by default the
    plan's."""
    row = KERNELS[plan["kernel"]]
    teams = GPUS["H200"]["sm_count"] // row["cluster"] * row["teams"]
    rows = row["tile_m"] * row["cluster"]
    ends = range(seqlen, 0, -rows)  # longest tile first
    hidden = seqlen if window_left < 0 else window_left + rows
    steps = [1 + -(-end // row["tile_n"]) - max(end - hidden, 0) // row["tile_n"] for end in ends]

    heads, tail = plan["heads_per_group"], plan["tail_heads"] if tail is None else tail
    groups = [[n for n in steps for _ in range(heads)]] * ((query_heads - tail) // heads)
    if plan["groups_turn"]:  # each other one backwards, the last of them
        groups[-1::-2] = [group[::-1] for group in groups[-1::-2]]
    order = [n for group in groups for n in group] + [n for n in steps for _ in range(tail)]
    assert len(order) == query_heads * len(steps)
    times = [0] * teams
    for index, n in enumerate(order):
        round, place = divmod(index, teams)
        backwards = plan["rounds_turn"] and round % 2 == 1
        times[teams - 1 - place if backwards else place] += n
    return sum(times) / teams / max(times)


def masked_plan(head_dim, seqlen, batch, heads, window_left=-1):
    """A causal forward of as many KV heads on an H200."""
    if head_dim not in built("forward", EXTENSION.build_info()["dtypes"][0]):
        pytest.skip(f"this build has no head dim {head_dim}")
    sizes = {"seqlen_q": seqlen, "seqlen_k": seqlen, "heads_q": heads, "heads_k": heads}
    window = {"window_left": window_left, "window_right": 0}
    plan = plan_for("forward", head_dim=head_dim, batch=batch, **sizes, **window)
    if not is_persistent(plan):
        pytest.skip("no persistent kernel in this build")
    return plan


@pytest.mark.parametrize(
    "head_dim, seqlen, window_left",
    [(64, 512, -1), (128, 512, -1), (128, 1024, -1), (128, 2048, -1), (256, 1024, -1)]
    + [(256, 2048, -1), (128, 16384, 4095), (256, 8192, 4095)],
)
def test_the_last_heads_side_by_side_even_out_a_masked_persistent_grid(
    head_dim, seqlen, window_left
):
    """16 thousand tokens, hidden size 2048."""
    heads, batch = 2048 // head_dim, 16384 // seqlen
    plan = masked_plan(head_dim, seqlen, batch, heads, window_left)
    assert plan["heads_per_group"] == 1

    def share(tail):
        return share_of_time_used(plan, seqlen, heads * batch, window_left, tail)

    assert share(plan["tail_heads"]) > 0.985 > 0.975 > share(1)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen", [4096, 5000, 8192, 10000, 16384, 20000, 32768])
@pytest.mark.parametrize("heads", [24, 40, 96])
def test_groups_of_heads_even_out_a_masked_persistent_grid(head_dim, seqlen, heads):
    plan = masked_plan(head_dim, seqlen, 1, heads)
    assert share_of_time_used(plan, seqlen, heads) > 0.96
    if heads == 96:  # enough to choose from: those that stay in L2
        group = plan["heads_per_group"]
        assert group * 4 * seqlen * head_dim <= GPUS["H200"]["l2_bytes"]


@pytest.mark.parametrize(
    "sizes, groups",
    [
        ({"seqlen_k": 131072}, (1, 1)),  # no mask
        ({"seqlen_k": 131072, "window_right": 0}, (1, 1)),  # groups of one head
        ({"seqlen_k": 512, "seqlen_q": 512, "window_right": 0}, (40, 40)),  # few tiles
    ],
    ids=["no mask", "groups", "all"],
)
def test_the_tail_is_what_whole_groups_leave(sizes, groups):
    sizes = {"seqlen_q": 131072, "heads_q": 20, "heads_k": 20, "batch": 2, **sizes}
    plan = plan_for("forward", head_dim=EXTENSION.build_info()["head_dims"][0], **sizes)
    if not is_persistent(plan):
        pytest.skip("no persistent kernel in this build")
    assert (plan["heads_per_group"], plan["tail_heads"]) == groups


@pytest.mark.parametrize("batch, seqlen_q", [(0, 9999), (2000, 0)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_persistent_grid_of_nothing_has_no_groups(head_dim, batch, seqlen_q):
    sizes = {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": 9999, "window_left": 7}
    plan = plan_for("forward", head_dim=head_dim, **sizes)
    if not is_persistent(plan):
        pytest.skip("no persistent kernel in this build")
    assert (plan["grid"], plan["heads_per_group"], plan["groups_turn"]) == (0, 1, False)


@needs_sm80
def test_heads_per_group_is_one_kv_head_when_none_fits():
    assert group_for(2**24, batch=2, heads_q=16, heads_k=4) == 4
    assert group_for(2**24, batch=2, heads_q=4, heads_k=4) == 1


@needs_sm80
def test_heads_per_group_of_an_empty_batch_is_positive():
    assert group_for(128, batch=0, heads_q=16, heads_k=4) == 1


# Workspace ----------------------------------------------------------------------------------------


def test_forward_needs_no_workspace():
    assert plan_for("forward", deterministic=True)["workspace_bytes"] == 0


@needs_sm80
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seqlen_q", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("gpu", ["A100", "RTX4090"])
def test_backward_workspace(seqlen_q, deterministic, gpu):
    plan = plan_for(
        "backward",
        batch=3,
        heads_q=5,
        heads_k=1,
        seqlen_q=seqlen_q,
        seqlen_k=200,
        deterministic=deterministic,
        gpu=gpu,
    )
    row = KERNELS[plan["kernel"]]
    row_blocks = 3 * 5 * -(-seqlen_q // row["tile_m"])
    rows = row_blocks * row["tile_m"]
    expected = 2 * round_up(4 * rows, 256) + round_up(4 * rows * row["head_dim"], 256)
    if deterministic:
        expected += round_up(4 * row_blocks, 256) + 256
    assert plan["workspace_bytes"] == expected


@needs_sm90
@pytest.mark.parametrize("batch", [0, 1, 32, 1000])
@pytest.mark.parametrize("seqlen_k", [0, 1, 512, 16384])
@pytest.mark.parametrize("seqlen_q", [0, 1, 1000])
def test_backward_workspace_of_a_ring(seqlen_q, seqlen_k, batch):
    """sm90: dQ's sums of two rounds of thread blocks, and three counters for each KV head."""
    heads = {"heads_q": 6, "heads_k": 2}
    lengths = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    plan = plan_for("backward", batch=batch, head_dim=64, family="sm90", **heads, **lengths)
    row = KERNELS[plan["kernel"]]
    assert row["head_rows"] == 0
    kv_heads = batch * 2 * plan["head_parts"]
    lag = -(-GPUS["H200"]["sm_count"] // max(-(-seqlen_k // row["tile_n"]), 1)) + 1
    assert plan["dq_lag"] == min(lag, kv_heads)
    assert plan["dq_slots"] == min(2 * lag, kv_heads)
    rows_of_head = round_up(seqlen_q, row["tile_m"])
    rows = batch * 6 * rows_of_head
    sums = plan["dq_slots"] * 3 // plan["head_parts"] * rows_of_head
    parts = 2 * 2 * batch * seqlen_k * 2 * 64 * plan["head_parts"]  # dK and dV, two bytes each
    assert plan["workspace_bytes"] == (
        2 * round_up(4 * rows, 256)
        + round_up(4 * sums * row["head_dim"], 256)
        + 3 * round_up(4 * kv_heads, 256)
        + (round_up(parts // 2, 256) * 2 if plan["head_parts"] > 1 else 0)
    )


@needs_sm90
@pytest.mark.parametrize("head_dim, cluster", [(64, 1), (128, 1), (192, 2), (256, 2)])
def test_parts_of_dq_have_turns_of_their_own(head_dim, cluster):
    """sm90: counters for each query tile, one a thread block of the cluster, and the ticket."""
    lengths = {"batch": 3, "heads_q": 5, "heads_k": 1, "seqlen_q": 5000, "seqlen_k": 200}
    default, deterministic = (
        plan_for("backward", head_dim=head_dim, family="sm90", deterministic=turns, **lengths)
        for turns in (False, True)
    )
    row = KERNELS[default["kernel"]]
    assert row["cluster"] == cluster
    row_blocks = 3 * 5 * -(-5000 // row["tile_m"])
    difference = deterministic["workspace_bytes"] - default["workspace_bytes"]
    ticket = 0 if row["persistent"] else 256  # else it is there by default, too
    assert difference == round_up(4 * row_blocks * cluster, 256) + ticket


@needs_sm90
@pytest.mark.parametrize(
    "batch, seqlen, heads, mask, parts",
    [
        (1, 4096, (32, 1), {"window_right": 0}, 16),  # 32 thread blocks, the longest of 2048 steps
        (1, 4096, (32, 1), {}, 4),  # a round of 128 for 132 multiprocessors
        (1, 2048, (32, 8), {}, 1),  # the same without parts
        (1, 2048, (32, 8), {"window_right": 0}, 2),
        (1, 4096, (32, 8), {"window_right": 0}, 1),  # 256 thread blocks
        (1, 4096, (8, 8), {"window_right": 0}, 1),  # groups of one head
        (9, 4096, (32, 1), {}, 1),  # more than two rounds
        (0, 4096, (32, 1), {"window_right": 0}, 1),
        (1, 0, (32, 1), {"window_right": 0}, 1),
    ],
)
def test_groups_of_heads_are_divided_where_thread_blocks_are_few(batch, seqlen, heads, mask, parts):
    """sm90, d128 on an H200; dk and dv of the parts are in the workspace."""
    sizes = {"seqlen_q": seqlen, "seqlen_k": seqlen, "heads_q": heads[0], "heads_k": heads[1]}
    plan = plan_for("backward", batch=batch, head_dim=128, family="sm90", **sizes, **mask)
    assert plan["head_parts"] == parts
    blocks = batch * heads[1] * parts * -(-seqlen // KERNELS[plan["kernel"]]["tile_n"])
    assert plan["grid"] == min(blocks, GPUS["H200"]["sm_count"])
    gradients = 2 * 2 * batch * seqlen * heads[1] * parts * 128 if parts > 1 else 0
    sums = plan["dq_slots"] * heads[0] // (heads[1] * parts) * seqlen * 128 * 4
    counters = 2 * round_up(4 * batch * heads[1] * parts, 256)
    rows = 2 * round_up(4 * batch * heads[0] * seqlen, 256)
    ticket = 256
    assert plan["workspace_bytes"] == rows + sums + counters + ticket + gradients


@needs_sm80
def test_groups_of_heads_are_whole_on_older_gpus():
    sizes = {"seqlen_q": 4096, "seqlen_k": 4096, "heads_q": 32, "heads_k": 1}
    assert plan_for("backward", batch=1, gpu="A100", **sizes)["head_parts"] == 1


CAUSAL = {"window_right": 0}
NARROW, WIDE = ({"window_left": keys - 1, "window_right": 0} for keys in (1023, 1024))


@needs_sm90
@pytest.mark.parametrize(
    "head_dim, seqlen, mask, ring",
    [
        (64, 4096, {}, True),
        (64, 4097, {}, False),
        (64, 2047, {"deterministic": True}, False),
        (64, 2048, {"deterministic": True}, True),
        (128, 1023, {}, False),
        (128, 1024, {}, True),
        (128, 2047, {"deterministic": True}, False),
        (128, 2048, {"deterministic": True}, True),
        (64, 4096, CAUSAL, True),
        (128, 4095, CAUSAL, False),
        (128, 4096, CAUSAL, True),
        (128, 4096, NARROW, False),
        (128, 4096, WIDE, True),
        (128, 4095, WIDE, False),
        (256, 4096, {}, False),
    ],
)
def test_dq_is_converted_on_the_way_where_it_pays(head_dim, seqlen, mask, ring):
    lengths = {"seqlen_q": seqlen, "seqlen_k": seqlen}
    plan = plan_for("backward", batch=1000, head_dim=head_dim, family="sm90", **lengths, **mask)
    heads = 1000 * 8
    assert (plan["dq_slots"] < heads) == (plan["dq_lag"] < heads) == ring


@needs_sm90
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mask", [{}, CAUSAL, WIDE], ids=str)
@pytest.mark.parametrize("batch, seqlen", [(1, 512), (64, 512), (64, 1024), (8, 4096), (8, 16384)])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_heads_whose_delta_is_made_ahead(head_dim, batch, seqlen, mask, deterministic):
    """All but a round of thread blocks. A thread block makes that of a head whose thread blocks are
    all begun later: no neighbour of its own in the order of core/schedule.h."""
    lengths = {"seqlen_q": seqlen, "seqlen_k": seqlen, "heads_q": 8, "heads_k": 8}
    options = {"head_dim": head_dim, "deterministic": deterministic, "family": "sm90"}
    plan = plan_for("backward", batch=batch, **lengths, **options, **mask)
    row, heads = KERNELS[plan["kernel"]], 8 * batch
    if not row["delta_ahead"]:
        assert is_persistent(plan)
        assert plan["delta_lead"] == heads
        return
    at_a_time = GPUS["H200"]["sm_count"] // row["cluster"]
    key_blocks = -(-seqlen // (row["tile_n"] * row["cluster"]))
    least = max(-(-at_a_time // key_blocks) + 1, plan["heads_together"])
    assert plan["delta_lead"] == min(least, heads)


@needs_sm90
def test_who_is_waited_for_is_no_neighbour(seed):
    """A key block waits for heads that come a lead or a lag before its own: not for those that go
    side by side with it, in the order of core/schedule.h."""
    rng = random.Random(seed)
    for _ in range(500):
        plan = plan_for(
            "backward", batch=1000, heads_q=8, heads_k=rng.choice((1, 2, 8)),
            seqlen_q=rng.choice((1, 100, 1000, 10000)), seqlen_k=rng.choice((1, 100, 1000, 10000)),
            head_dim=rng.choice((64, 128, 192, 256)), window_left=rng.choice((-1, 300, 3000)),
            window_right=rng.choice((-1, 0)), deterministic=rng.random() < 0.7, family="sm90",
        )  # fmt: skip
        if KERNELS[plan["kernel"]]["head_rows"] > 0:
            continue
        neighbours = max(plan["heads_together"], plan["heads_in_reverse"])
        assert neighbours <= plan["delta_lead"]
        assert neighbours <= plan["dq_lag"]


@needs_whole_heads
@pytest.mark.parametrize("mask", [{}, CAUSAL, {"deterministic": True}], ids=str)
@pytest.mark.parametrize(
    "heads, lengths, whole",
    [
        (132, (512, 512), True),  # one for each multiprocessor
        (133, (512, 512), False),  # a second round, for one
        (264, (512, 512), True),
        (24, (512, 512), False),
        (24, (512, 128), True),  # no fewer thread blocks
        (264, (513, 512), False),
        (264, (512, 5000), True),
        (264, (0, 512), False),
        (264, (512, 0), False),
    ],
)
def test_whole_heads_where_they_pay(heads, lengths, whole, mask):
    problem = {"batch": 1, "seqlen_q": lengths[0], "seqlen_k": lengths[1], "heads_q": heads}
    options = {"direction": "backward", "head_dim": 64, "family": "sm90", **mask}
    plan = plan_for(**problem, heads_k=heads, **options)
    row = KERNELS[plan["kernel"]]
    assert (row["head_rows"] > 0) == whole
    if whole:
        assert plan["grid"] == min(heads, GPUS["H200"]["sm_count"])
        rows = heads * round_up(lengths[0], row["tile_m"])
        assert plan["workspace_bytes"] == 2 * round_up(4 * rows, 256)  # L and D
    grouped = plan_for(**problem, heads_k=1, **options)
    assert KERNELS[grouped["kernel"]]["head_rows"] == 0


@needs_whole_heads
def test_why_heads_are_not_taken_whole():
    options = {"direction": "backward", "head_dim": 64, "family": "sm90"}
    for problem, reason in (
        ({"batch": 1, "seqlen_q": 512, "seqlen_k": 512}, "too few of them at batch 1"),
        ({"batch": 99, "seqlen_q": 600, "seqlen_k": 512}, "1 to 512 queries"),
        ({"batch": 99, "seqlen_q": 90, "seqlen_k": 512, "heads_k": 2}, "8 and 2 heads"),
    ):
        plan = plan_for(**problem, **options)
        dtype = KERNELS[plan["kernel"]]["dtype"]
        (why,) = (
            entry["reason"]
            for entry in plan["refused"]
            if KERNELS[entry["kernel"]]["head_rows"] > 0
            and KERNELS[entry["kernel"]]["dtype"] == dtype
        )
        assert reason in why


@pytest.mark.parametrize("seqlen_k", [0, 128])
def test_the_pre_process_makes_all_delta_where_nobody_else_does(seqlen_k):
    """Without keys there are no thread blocks after it, and in sm80 none that would."""
    for family in sorted({row["family"] for row in KERNELS.values()}):
        lengths = {"seqlen_q": 64, "seqlen_k": seqlen_k, "batch": 1000}
        plan = plan_for("backward", head_dim=64, family=family, **lengths)
        ahead = KERNELS[plan["kernel"]]["delta_ahead"] and seqlen_k > 0
        assert (plan["delta_lead"] < 1000 * 8) == ahead


def test_workspace_has_the_columns_of_q():
    unequal = [row for row in KERNELS.values() if row["head_dim"] != row["head_dim_v"]]
    if not unequal:
        pytest.skip("no kernel of unequal head dims in this build")
    for row in unequal:
        d, dv = row["head_dim"], row["head_dim_v"]
        plan = plan_for("backward", row["dtype"], head_dim=d, head_dim_v=dv, seqlen_q=1024)
        ring, ticket = KERNELS[plan["kernel"]]["cluster"] == 1, is_persistent(plan)
        ahead = KERNELS[plan["kernel"]]["delta_ahead"]
        counters = 256 * (2 * ring + ticket + ahead)
        assert plan["workspace_bytes"] == 2 * 8 * 1024 * 4 * (d + 2) + counters


@needs_sm80
def test_workspace_is_counted_in_64_bits():
    sizes = {"batch": 1, "heads_q": 64, "heads_k": 64, "seqlen_q": 2**17, "seqlen_k": 2**17}
    plan = plan_for("backward", family="sm80", **sizes)
    bucket = KERNELS[plan["kernel"]]["head_dim"]
    assert plan["workspace_bytes"] == 64 * 2**17 * 4 * (bucket + 2) > 2**31
