"""The order in which key blocks add to dQ in deterministic mode (csrc/core/turn_order.h)."""

import heapq
import random

import pytest
from plans import EXTENSION, RANDOM_WINDOWS, needs_extension

pytestmark = needs_extension


def draw_problem(rng: random.Random, mask: str) -> dict:
    """Arguments of ``turn_order`` for a random problem."""
    seqlen_q, seqlen_k = rng.randint(1, 2000), rng.randint(1, 2000)
    left, right = RANDOM_WINDOWS[mask](rng, seqlen_q, seqlen_k)
    heads = rng.randint(1, 8)
    return {
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "window_left": left,
        "window_right": right,
        "tile_m": rng.choice((64, 128)),
        "tile_n": rng.choice((64, 128)),
        "group": rng.randint(1, 20),
        "heads": heads,
        "tail_heads": rng.randint(0, heads),
    }


def is_masked(problem: dict) -> bool:
    """As the plan has it, for which a window beyond the ends is none."""
    return (
        0 <= problem["window_left"] < problem["seqlen_k"] - 1
        or 0 <= problem["window_right"] < problem["seqlen_q"] - 1
    )


def grid_of_walks(problem: dict, heads_together: int, heads_in_reverse: int) -> list:
    """The walks of all heads' key blocks, as their thread blocks start: ((head, query block), turn)
    for every step."""
    walks = [
        [
            [((head, query_block), turn) for query_block, turn in walk]
            for walk in EXTENSION.turn_order(**problem, head=head)
        ]
        for head in range(problem["heads"])
    ]
    order = EXTENSION.backward_order(
        len(walks[0]), problem["heads"], problem["tail_heads"], heads_together, heads_in_reverse
    )
    return [walks[head][block] for block, head in order]


def time_to_finish(
    walks: list, resident: int, latency: float | None, overhead: float = 0.0
) -> float | None:
    """Steps until every walk is done, as on a GPU with room for ``resident`` at a time, which start
    in their order; None when nobody can go on.

    A step takes 1, and ends when the key block has added to dQ, which it may ``latency`` after the
    one whose turn was before (None: at any time). A walk takes ``overhead`` more.
    """
    added, waiting = {}, {}  # by (tile, turn): when it was added; who waits for that turn
    places, starting, events, end = [0] * len(walks), iter(range(len(walks))), [], 0.0

    def start_next(now: float) -> None:
        for n in starting:
            if walks[n]:
                heapq.heappush(events, (now + overhead + 1, n))
                return

    for _ in range(resident):
        start_next(0.0)
    while events:
        now, n = heapq.heappop(events)
        tile, turn = walks[n][places[n]]
        if latency is not None and turn > 0:
            before = added.get((tile, turn - 1))
            if before is None:
                waiting[tile, turn] = n
                continue
            if before + latency > now:
                heapq.heappush(events, (before + latency, n))
                continue
        added[tile, turn] = now
        if (tile, turn + 1) in waiting:
            heapq.heappush(events, (now, waiting.pop((tile, turn + 1))))
        places[n] += 1
        if places[n] < len(walks[n]):
            heapq.heappush(events, (now + 1, n))
        else:
            end = now
            start_next(now)
    return None if waiting else end


@pytest.mark.parametrize("mask", RANDOM_WINDOWS)
def test_every_key_block_has_one_turn_at_each_query_block_it_visits(mask, seed):
    rng = random.Random(seed)
    for _ in range(200):
        problem = draw_problem(rng, mask)
        turns = {}
        for walk in EXTENSION.turn_order(**problem, head=rng.randrange(problem["heads"])):
            assert len({query_block for query_block, _ in walk}) == len(walk)
            for query_block, turn in walk:
                turns.setdefault(query_block, []).append(turn)
        for taken in turns.values():
            assert sorted(taken) == list(range(len(taken)))


@pytest.mark.parametrize("mask", RANDOM_WINDOWS)
def test_all_walks_end(mask, seed):
    """Under a mask or where all heads go side by side with any room, else with that of a group."""
    rng = random.Random(seed)
    for _ in range(30):
        problem = draw_problem(rng, mask)
        together = rng.randint(1, max(problem["tail_heads"], 1))
        in_order = is_masked(problem) or problem["tail_heads"] == problem["heads"]
        resident = rng.randint(1, 20) if in_order else problem["group"]
        in_reverse = rng.randint(1, problem["heads"]) if is_masked(problem) else 0
        walks = grid_of_walks(problem, together, in_reverse)
        assert time_to_finish(walks, resident, 0.5) is not None


@pytest.mark.parametrize("left, right", [(-1, -1), (-1, 0), (512, 0)])
@pytest.mark.parametrize("tile_m", [64, 128])
def test_nobody_waits_where_all_run_side_by_side(left, right, tile_m):
    problem = {
        "seqlen_q": 4096,
        "seqlen_k": 4096,
        "window_left": left,
        "window_right": right,
        "tile_m": tile_m,
        "tile_n": 128,
        "group": 32,
        "heads": 1,
        "tail_heads": 0,
    }
    walks = grid_of_walks(problem, 1, int(is_masked(problem)))
    assert len(walks) == 32
    assert time_to_finish(walks, 32, 0.9) == max(map(len, walks))


@pytest.mark.parametrize("key_blocks", [5, 52, 100, 205])
def test_nobody_waits_where_the_heads_follow_each_other_in_rounds(key_blocks):
    """Without a mask, and with room for a number of key blocks that the heads' do not divide."""
    heads, resident, query_blocks = 20, 132, 256
    problem = {
        "seqlen_q": query_blocks * 64,
        "seqlen_k": key_blocks * 80,
        "window_left": -1,
        "window_right": -1,
        "tile_m": 64,
        "tile_n": 80,
        "group": resident,
        "heads": heads,
        "tail_heads": 0,
    }
    rounds = -(-heads * key_blocks // resident)
    walks = grid_of_walks(problem, 1, 0)
    assert time_to_finish(walks, resident, 0.9) <= rounds * query_blocks + rounds


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("right", [-1, 0])
@pytest.mark.parametrize("seqlen", [512, 1024, 2048, 4096])
def test_turns_take_hardly_any_time(head_dim, right, seqlen):
    """16 thousand tokens, hidden size 2048, on an H200, against the default order without turns."""
    heads = 2048 // head_dim
    arguments = ("backward", 16384 // seqlen, seqlen, seqlen, heads, heads, head_dim, head_dim)
    plans = [
        EXTENSION.plan(*arguments, window_right=right, deterministic=deterministic, family="sm90")
        for deterministic in (False, True)
    ]
    if plans[0]["kernel"] is None:
        pytest.skip(f"no sm90 kernel for head_dim {head_dim} in this build")
    (cluster,) = {
        row["cluster"] for row in EXTENSION.list_kernels() if row["name"] == plans[0]["kernel"]
    }
    default, deterministic = (
        grid_of_walks(
            {
                "seqlen_q": seqlen,
                "seqlen_k": seqlen,
                "window_left": -1,
                "window_right": right,
                "tile_m": plan["tile_m"],
                "tile_n": plan["tile_n"] * cluster,
                "group": plan["turn_group"],
                "heads": heads * 16384 // seqlen,
                "tail_heads": plan["tail_heads"],
            },
            plan["heads_together"],
            plan["heads_in_reverse"],
        )
        for plan in plans
    )
    resident = 132 // cluster
    assert time_to_finish(deterministic, resident, 0.85, overhead=2) < 1.05 * time_to_finish(
        default, resident, None, overhead=2
    )


def test_every_key_block_of_every_head_has_a_thread_block(seed):
    rng = random.Random(seed)
    for _ in range(200):
        key_blocks, heads = rng.randint(1, 20), rng.randint(1, 20)
        tail = rng.randint(0, heads)
        together = rng.randint(1, max(tail, 1))
        in_reverse = rng.choice((0, rng.randint(1, heads)))

        def side_by_side(begin, end, together, blocks):
            return [
                (block, head)
                for first in range(begin, end, together)
                for block in blocks
                for head in range(first, min(first + together, end))
            ]

        blocks, first_of_tail = range(key_blocks), heads - tail
        before = blocks[::-1] if in_reverse else blocks
        order = EXTENSION.backward_order(key_blocks, heads, tail, together, in_reverse)
        assert order == [
            *side_by_side(0, first_of_tail, in_reverse or 1, before),
            *side_by_side(first_of_tail, heads, together, blocks),
        ]


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
    plan = EXTENSION.plan(
        "backward", 16384 // seqlen, seqlen, seqlen, heads, heads, 128, 128, window_right=0
    )
    if plan["kernel"] is None:
        pytest.skip("no kernel for head_dim 128 in this build")
    tile_m, tile_n = plan["tile_m"], plan["tile_n"]
    key_blocks, heads = -(-seqlen // tile_n), heads * 16384 // seqlen

    def measure(tail_heads):
        order = EXTENSION.backward_order(key_blocks, heads, tail_heads, max(tail_heads, 1), 0)
        lengths = [(seqlen - block * tile_n) // tile_m + 3 for block, _ in order]
        return busiest_over_mean(lengths, multiprocessors)

    assert measure(plan["tail_heads"]) < 1.03 < 1.05 < measure(0)


def test_the_plan_lets_the_heads_of_the_last_round_go_side_by_side():
    def tail_heads(batch, seqlen, left, right):
        plan = EXTENSION.plan(
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


def plan_in_turn(batch, seqlen_q, seqlen_k, head_dim, **options):
    found = EXTENSION.plan(
        "backward", batch, seqlen_q, seqlen_k, 4, 4, head_dim, head_dim, family="sm90", **options
    )
    if found["kernel"] is None:
        pytest.skip(f"no sm90 kernel for head_dim {head_dim} in this build")
    return found


def test_the_plan_makes_groups_that_run_side_by_side():
    def group(seqlen_q, seqlen_k, deterministic=True):
        return plan_in_turn(1, seqlen_q, seqlen_k, 128, deterministic=deterministic)["turn_group"]

    assert group(512, 1024) == 132  # an H200's multiprocessors
    assert group(512, 2**20) == 132
    assert group(2**30, 2**20) == (2**31 - 1) // (2**30 // 64)  # their product fits
    assert group(512, 1024, deterministic=False) == 1


def test_the_plan_lets_heads_go_side_by_side_where_rounds_are_many():
    def plan(batch, **options):
        options = {"deterministic": True} | options
        found = plan_in_turn(batch, 1024, 1024, 64, **options)
        return found["tail_heads"], found["heads_together"], found["dq_lag"], found["dq_slots"]

    # 8 key blocks of 128, which take 8 steps each and 2 more: 33 heads start in 20 steps.
    few, many = 12 * 132 // 32, 12 * 132 // 32 + 1
    assert plan(few)[:2] == (0, 1)
    assert plan(many)[:2] == (4 * many, 33)
    assert plan(many, deterministic=False)[:2] == (0, 1)
    rows = plan_in_turn(64, 2048, 2048, 64, deterministic=True)  # 16 key blocks of 16 + 2 steps
    assert (rows["heads_together"], rows["dq_lag"], rows["dq_slots"]) == (19, 38, 76)
    # Under a mask the longest key block starts last, and ends two rounds later.
    assert plan(many, window_right=0)[:2] == (18, 18)
    assert plan_in_turn(8, 4096, 4096, 64, window_right=0, deterministic=True)["dq_lag"] == 12
    assert plan_in_turn(8, 4096, 4096, 64, window_right=0)["dq_lag"] == 6
    # Key blocks of 128 are two query blocks of 64 apart as they are; but L2 holds no 32K rows.
    assert plan_in_turn(64, 4096, 4096, 128, deterministic=True)["tail_heads"] == 0
    long = plan_in_turn(8, 32768, 32768, 128, deterministic=True)
    assert (long["tail_heads"], long["heads_together"]) == (32, 1)


def test_only_sm90_starts_with_the_last_key_block():
    def heads(seqlen=512, **options):
        return plan_in_turn(1, seqlen, seqlen, 64, **options)["heads_in_reverse"]

    assert heads(deterministic=True, window_right=0) == 132 // 4
    assert heads(deterministic=True, window_left=100) == 132 // 4
    assert heads(6144, deterministic=True, window_right=0) == 132 // 48
    assert heads(2**20, deterministic=True, window_right=0) == 1
    grouped = EXTENSION.plan(
        "backward", 64, 512, 512, 8, 2, 64, 64, window_right=0, deterministic=True, family="sm90"
    )
    assert grouped["heads_in_reverse"] == 132 // (4 * 4)
    assert heads(window_right=0) == 0
    assert heads(deterministic=True) == 0
    sm80 = EXTENSION.plan(
        "backward", 1, 512, 512, 4, 4, 64, 64, window_right=0, deterministic=True, family="sm80"
    )
    assert sm80["heads_in_reverse"] == 0
