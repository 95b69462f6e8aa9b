"""The order in which key blocks add to dQ in deterministic mode (csrc/core/turn_order.h)."""

import heapq
import random

import pytest

from flash_attn2 import ops

if ops.EXTENSION is None:
    pytest.skip("flash_attn2._C is not built", allow_module_level=True)

MASKS = {
    "full": lambda rng, sq, sk: (-1, -1),
    "causal": lambda rng, sq, sk: (-1, 0),
    "window": lambda rng, sq, sk: (rng.randrange(sk), rng.randrange(sq)),
    "left": lambda rng, sq, sk: (rng.randrange(sk), -1),
}


def draw_walks(rng: random.Random, mask: str) -> tuple[list, int]:
    """The walks of a random problem, and the size of its groups."""
    seqlen_q, seqlen_k, group = rng.randint(1, 2000), rng.randint(1, 2000), rng.randint(1, 20)
    left, right = MASKS[mask](rng, seqlen_q, seqlen_k)
    tile_m, tile_n = rng.choice((64, 128)), rng.choice((64, 128))
    walks = ops.EXTENSION.turn_order(
        seqlen_q, seqlen_k, left, right, tile_m, tile_n, group, head=rng.randrange(5), heads=5
    )
    return walks, group


def rounds_to_finish(walks: list, resident: int) -> int | None:
    """Rounds until every walk is done; None when nobody can go on.

    Walks start in their order, ``resident`` of them at a time, as on a GPU with that much room; in
    a round each takes one step if its turn has come.
    """
    counts, places, waiting, running = {}, [0] * len(walks), list(range(len(walks))), []
    rounds = 0
    while waiting or running:
        while waiting and len(running) < resident:
            running.append(waiting.pop(0))
        steps = [
            (key_block, walks[key_block][places[key_block]][0])
            for key_block in running
            if places[key_block] < len(walks[key_block])
            and counts.get(walks[key_block][places[key_block]][0], 0)
            == walks[key_block][places[key_block]][1]
        ]
        for key_block, query_block in steps:
            counts[query_block] = counts.get(query_block, 0) + 1
            places[key_block] += 1
        before = len(running)
        running = [n for n in running if places[n] < len(walks[n])]
        if not steps and len(running) == before:
            return None
        rounds += 1
    return rounds


@pytest.mark.parametrize("mask", MASKS)
def test_every_key_block_has_one_turn_at_each_query_block_it_visits(mask, seed):
    rng = random.Random(seed)
    for _ in range(200):
        walks, _ = draw_walks(rng, mask)
        turns = {}
        for walk in walks:
            assert len({query_block for query_block, _ in walk}) == len(walk)
            for query_block, turn in walk:
                turns.setdefault(query_block, []).append(turn)
        for taken in turns.values():
            assert sorted(taken) == list(range(len(taken)))


@pytest.mark.parametrize("mask", MASKS)
def test_walks_end_where_as_many_blocks_run_as_a_group_has(mask, seed):
    rng = random.Random(seed)
    for _ in range(100):
        walks, group = draw_walks(rng, mask)
        assert rounds_to_finish(walks, group) is not None


@pytest.mark.parametrize("left, right", [(-1, -1), (-1, 0), (512, 0)])
@pytest.mark.parametrize("tile_m", [64, 128])
def test_nobody_waits_where_all_run_side_by_side(left, right, tile_m):
    walks = ops.EXTENSION.turn_order(4096, 4096, left, right, tile_m, 128, 32)
    assert len(walks) == 32
    assert rounds_to_finish(walks, 32) <= max(map(len, walks)) + 1


@pytest.mark.parametrize("key_blocks", [5, 52, 100, 205])
def test_nobody_waits_where_the_heads_follow_each_other_in_rounds(key_blocks):
    """Without a mask, and with room for a number of key blocks that the heads' do not divide."""
    heads, resident, query_blocks = 20, 132, 256
    walks = []
    for head in range(heads):
        order = ops.EXTENSION.turn_order(
            query_blocks * 64, key_blocks * 80, -1, -1, 64, 80, resident, head=head, heads=heads
        )
        walks += [[((head, block), turn) for block, turn in walk] for walk in order]
    rounds = -(-heads * key_blocks // resident)
    assert rounds_to_finish(walks, resident) <= rounds * query_blocks + rounds


@pytest.mark.parametrize("mask", MASKS)
def test_walks_end_where_the_last_heads_go_side_by_side(mask, seed):
    rng = random.Random(seed)
    for _ in range(20):
        seqlen_q, seqlen_k = rng.randint(1, 1000), rng.randint(1, 1000)
        left, right = MASKS[mask](rng, seqlen_q, seqlen_k)
        resident, heads = rng.randint(1, 20), rng.randint(1, 8)
        key_blocks = -(-seqlen_k // 64)
        tail_heads = min(-(-resident // key_blocks) + 1, heads)
        orders = [
            ops.EXTENSION.turn_order(
                seqlen_q, seqlen_k, left, right, 64, 64, resident, head, heads, tail_heads
            )
            for head in range(heads)
        ]
        walks = [
            [((head, query_block), turn) for query_block, turn in orders[head][block]]
            for block, head in ops.EXTENSION.backward_order(key_blocks, heads, tail_heads)
        ]
        assert rounds_to_finish(walks, resident) is not None


def test_every_key_block_of_every_head_has_a_thread_block(seed):
    rng = random.Random(seed)
    for _ in range(200):
        key_blocks, heads = rng.randint(1, 20), rng.randint(1, 20)
        tail = rng.randint(0, heads)
        order = ops.EXTENSION.backward_order(key_blocks, heads, tail)
        one_by_one = [(block, head) for head in range(heads - tail) for block in range(key_blocks)]
        side_by_side = [
            (block, head) for block in range(key_blocks) for head in range(heads - tail, heads)
        ]
        assert order == one_by_one + side_by_side


def busiest_over_mean(lengths: list, multiprocessors: int) -> float:
    """Of a grid whose thread blocks start in order, each where one ended first."""
    ends = [0.0] * multiprocessors
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends) * multiprocessors / sum(lengths)


@pytest.mark.parametrize("seqlen", [1024, 2048, 4096, 8192])
def test_a_causal_grid_ends_at_the_same_time_everywhere(seqlen):
    """16 thousand tokens, hidden size 2048, head_dim 128, on an H200."""
    heads, multiprocessors = 16, 132
    plan = ops.EXTENSION.plan(
        "backward", 16384 // seqlen, seqlen, seqlen, heads, heads, 128, 128, window_right=0
    )
    if plan["kernel"] is None:
        pytest.skip("no kernel for head_dim 128 in this build")
    tile_m, tile_n = plan["tile_m"], plan["tile_n"]
    key_blocks, heads = -(-seqlen // tile_n), heads * 16384 // seqlen

    def measure(tail_heads):
        order = ops.EXTENSION.backward_order(key_blocks, heads, tail_heads)
        lengths = [(seqlen - block * tile_n) // tile_m + 3 for block, _ in order]
        return busiest_over_mean(lengths, multiprocessors)

    assert measure(plan["tail_heads"]) < 1.03 < 1.05 < measure(0)


def test_the_plan_lets_the_heads_of_the_last_round_go_side_by_side():
    def tail_heads(batch, seqlen, left, right):
        plan = ops.EXTENSION.plan(
            "backward",
            batch,
            seqlen,
            seqlen,
            4,
            4,
            128,
            128,
            window_left=left,
            window_right=right,
        )
        if plan["kernel"] is None:
            pytest.skip("no kernel for head_dim 128 in this build")
        assert plan["tail_heads"] <= plan["dq_lag"]  # see plan_heads
        key_blocks = -(-seqlen // plan["tile_n"])
        return plan["tail_heads"], min(-(-132 // key_blocks) + 1, 4 * batch)

    for batch, seqlen in ((1, 128), (16, 1024), (2, 4096), (8, 4096), (1, 2**20)):
        got, expected = tail_heads(batch, seqlen, -1, 0)
        assert got == expected
        assert tail_heads(batch, seqlen, -1, -1)[0] == 0
        assert tail_heads(batch, seqlen, 100, 0)[0] == 0


def test_the_plan_makes_groups_that_run_side_by_side():
    def plan(seqlen_q, seqlen_k, deterministic=True):
        found = ops.EXTENSION.plan(
            "backward", 1, seqlen_q, seqlen_k, 4, 4, 128, 128, deterministic=deterministic
        )
        if found["kernel"] is None:
            pytest.skip("no kernel for head_dim 128 in this build")
        return found

    few = plan(512, 1024)
    assert few["turn_group"] == 132  # an H200's multiprocessors
    assert not few["turns_alternate"]
    many = plan(512, 2**20)
    assert many["turn_group"] == 132
    assert many["turns_alternate"]
    assert plan(2**30, 2**20)["turn_group"] == (2**31 - 1) // (2**30 // 64)  # their product fits
    assert plan(512, 1024, deterministic=False)["turn_group"] == 1
