"""The host's plan for every GPU it knows: which kernel, and why not the others.

Needs the compiled extension, but no GPU.
"""

import os
import re
import subprocess
import sys

import pytest
from plans import (
    DIRECTIONS,
    EXTENSION,
    GPUS,
    KERNELS,
    SERVED_GPUS,
    built,
    needs_extension,
    needs_sm80,
    needs_sm90,
    plan_for,
)

import flash_attn2
from flash_attn2.introspection import forced_family

pytestmark = needs_extension

REASONS = (
    r"is a (forward|backward) kernel",
    r"is for (float16|bfloat16), the inputs are (float16|bfloat16)",
    r"serves head_dim(_v)? <= \d+, the inputs have \d+",
    r"needs sm_\d+, \w+ is sm_\d+",
    r"runs up to sm_\d+, \w+ is sm_\d+",
    r"is of family sm\d+, asked for is sm\d+",
    r"needs \d+ bytes of shared memory, \w+ gives a block \d+",
    r"serves seqlen_k <= \d+( without a mask)?, the inputs have \d+",
    r"takes no mask but one of one bound, from \d+ queries and keys on",
    r"takes \d+ tiles of a head at a time, the inputs have \d+",
    r"fits, but \w+ has smaller head_dim buckets \(\d+ \+ \d+ < \d+ \+ \d+\)",
    r"fits, but \w+ (has a smaller head_dim bucket|is of a newer family|is preferred) \(.+\)",
)


# Choice of a kernel -------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", SERVED_GPUS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_gpu_and_head_dim_has_a_kernel_that_fits(gpu, direction, dtype):
    buckets = built(direction, dtype)
    for head_dim in range(8, 257, 8):
        plan = plan_for(direction, dtype, head_dim=head_dim, gpu=gpu) if buckets else None
        if not buckets or head_dim > buckets[-1]:
            continue
        assert plan["kernel"] is not None, f"head_dim {head_dim}: {plan['refused']}"
        row = KERNELS[plan["kernel"]]
        assert (row["direction"], row["dtype"]) == (direction, dtype)
        assert row["head_dim"] == min(bucket for bucket in buckets if bucket >= head_dim)
        assert plan["smem_bytes"] == row["smem_bytes"] <= GPUS[gpu]["smem_per_block_optin"]
        for key in ("family", "tile_m", "tile_n", "threads"):
            assert plan[key] == row[key]


# (head dim of Q and K, of V): the buckets that serve it on Hopper, and those elsewhere.
PAIRS = {
    (192, 128): ((192, 128), (192, 192)),
    (168, 104): ((192, 128), (192, 192)),
    (192, 136): ((192, 192), (192, 192)),
    (64, 128): ((64, 128), (128, 128)),
    (40, 72): ((64, 128), (96, 96)),  # 64 + 128 = 96 + 96: the fewer columns of Q
    (128, 64): ((128, 128), (128, 128)),
    (72, 40): ((96, 96), (96, 96)),
    (256, 8): ((256, 256), (256, 256)),
    (8, 256): ((256, 256), (256, 256)),
}


@pytest.mark.parametrize("gpu", ["H200", "A100", "RTX4090"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_buckets_of_unequal_head_dims(pair, direction, gpu):
    buckets = PAIRS[pair][gpu != "H200"]
    if buckets not in EXTENSION.build_info()["head_dim_pairs"]:
        pytest.skip("these buckets are not in this build")
    row = KERNELS[plan_for(direction, head_dim=pair[0], head_dim_v=pair[1], gpu=gpu)["kernel"]]
    assert (row["head_dim"], row["head_dim_v"]) == buckets


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_refusals_name_the_head_dims(direction):
    unequal = [row for row in KERNELS.values() if row["head_dim"] != row["head_dim_v"]]
    if not unequal:
        pytest.skip("no kernel of unequal head dims in this build")
    for row in unequal:
        d, dv = row["head_dim"], row["head_dim_v"]
        # So few keys that rows for short sequences serve, too.
        plan = plan_for(direction, row["dtype"], head_dim=d, head_dim_v=dv, seqlen_k=100)
        for entry in plan["refused"]:
            other, reason = KERNELS[entry["kernel"]], entry["reason"]
            if (other["direction"], other["dtype"]) != (direction, row["dtype"]):
                continue
            if other["head_dim"] < d:
                assert reason == f"serves head_dim <= {other['head_dim']}, the inputs have {d}"
            elif other["head_dim_v"] < dv:
                assert reason == f"serves head_dim_v <= {other['head_dim_v']}, the inputs have {dv}"
            elif other["family"] == "sm90":
                sums = f"({d} + {dv} < {other['head_dim']} + {other['head_dim_v']})"
                assert reason.endswith(f"{plan['kernel']} has smaller head_dim buckets {sums}")


def test_an_unfiltered_build_serves_every_head_dim_up_to_256():
    info = flash_attn2.build_info()
    if len(info["head_dims"]) < 5 or len(info["dtypes"]) < 2:
        pytest.skip(f"built with a filter: {info['head_dims']}, {info['dtypes']}")
    for direction in DIRECTIONS:
        for dtype in info["dtypes"]:
            assert built(direction, dtype) == [64, 96, 128, 192, 256]
    if "90a" in info["archs"]:
        assert {(64, 128), (192, 128)} <= set(info["head_dim_pairs"])


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_other_kernel_is_refused_with_a_reason(gpu, direction):
    plan = plan_for(direction, gpu=gpu)
    refused = {entry["kernel"]: entry["reason"] for entry in plan["refused"]}
    assert len(refused) == len(plan["refused"])
    assert set(refused) == set(KERNELS) - {plan["kernel"]}
    for kernel, reason in refused.items():
        assert any(re.fullmatch(known, reason) for known in REASONS), f"{kernel}: {reason}"


@pytest.mark.parametrize("gpu", GPUS)
def test_reasons_are_true(gpu):
    limit = GPUS[gpu]["smem_per_block_optin"]
    for direction in DIRECTIONS:
        plan = plan_for(direction, gpu=gpu)
        for entry in plan["refused"]:
            row, reason = KERNELS[entry["kernel"]], entry["reason"]
            assert ("kernel" in reason) == (row["direction"] != direction)
            if "shared memory" in reason:
                assert row["smem_bytes"] > limit
                assert f"needs {row['smem_bytes']} bytes" in reason and str(limit) in reason
            if "fits" in reason:
                assert row["smem_bytes"] <= limit and plan["kernel"] in reason


@needs_sm80
def test_small_shared_memory_changes_the_kernel():
    everywhere = [row for row in KERNELS.values() if row["family"] == "sm80"]
    large = max(everywhere, key=lambda row: row["smem_bytes"])
    small_gpu = min(GPUS.values(), key=lambda gpu: gpu["smem_per_block_optin"])
    if large["smem_bytes"] <= small_gpu["smem_per_block_optin"]:
        pytest.skip("every kernel of this build fits on every GPU")
    plan = plan_for(
        large["direction"], large["dtype"], head_dim=large["head_dim"], gpu=small_gpu["name"]
    )
    assert plan["kernel"] not in (None, large["name"])
    reasons = {entry["kernel"]: entry["reason"] for entry in plan["refused"]}
    assert "shared memory" in reasons[large["name"]]


def test_head_dim_above_every_bucket_has_no_kernel():
    dtype = EXTENSION.build_info()["dtypes"][0]
    largest = built("forward", dtype)[-1]
    if largest == 256:
        pytest.skip("this build serves every head_dim up to 256")
    plan = plan_for(head_dim=largest + 1)
    assert plan["kernel"] is None and plan["tile_m"] is None and plan["grid"] == 0
    assert len(plan["refused"]) == len(KERNELS)
    assert any(f"the inputs have {largest + 1}" in entry["reason"] for entry in plan["refused"])


def test_description_names_the_kernel():
    for direction in DIRECTIONS:
        plan = plan_for(direction)
        assert plan["description"].startswith(f"{plan['kernel']}: grid {plan['grid']}, ")


# Families -----------------------------------------------------------------------------------------


@needs_sm90
@pytest.mark.parametrize("gpu", SERVED_GPUS)
def test_hopper_kernels_serve_hopper_and_nothing_else(gpu):
    plan = plan_for("forward", gpu=gpu)
    arch = GPUS[gpu]["arch"]
    assert plan["family"] == ("sm90" if arch == 90 else "sm80")
    for entry in plan["refused"]:
        row, reason = KERNELS[entry["kernel"]], entry["reason"]
        if row["family"] == "sm90" and "needs sm_90" in reason:
            assert arch < 90
        if "runs up to sm_90" in reason:
            assert row["family"] == "sm90" and arch > 90
        if "is of a newer family (sm90 before sm80)" in reason:
            assert row["family"] == "sm80" and arch == 90


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_a_family_can_be_asked_for(family):
    plan = plan_for("forward", family=family)
    reasons = {entry["kernel"]: entry["reason"] for entry in plan["refused"]}
    if plan["kernel"] is not None:
        assert plan["family"] == family
    for row in KERNELS.values():
        if row["family"] != family and row["name"] in reasons and row["direction"] == "forward":
            assert "fits" not in reasons[row["name"]]


def test_an_unknown_family_is_an_error():
    with pytest.raises(ValueError, match=r"^family: is 'sm70', it must be 'sm80' or 'sm90'"):
        plan_for("forward", family="sm70")


@needs_sm80
def test_a_family_can_be_forced_for_a_while():
    extension_family = plan_for("forward")["family"]
    with forced_family("sm80"):
        assert plan_for("forward")["family"] == "sm80"
        with forced_family(""):
            assert plan_for("forward")["family"] == extension_family
        assert plan_for("forward")["family"] == "sm80"
    assert plan_for("forward")["family"] == extension_family
    with pytest.raises(ValueError, match="^family: is 'sm70'"), forced_family("sm70"):
        pass


@needs_sm80
def test_the_environment_names_a_family():
    code = "import flash_attn2; print(flash_attn2.plan('forward', 1, 9, 9, 1, 1, {})['family'])"
    head_dim = built("forward", EXTENSION.build_info()["dtypes"][0])[-1]
    dtype = f"{head_dim}, dtype='{EXTENSION.build_info()['dtypes'][0]}'"

    def run(family):
        environ = {**os.environ, "FLASH_ATTN2_FAMILY": family}
        return subprocess.run(
            [sys.executable, "-c", code.format(dtype)], env=environ, capture_output=True, text=True
        )

    assert run("sm80").stdout.strip() == "sm80"
    assert "FLASH_ATTN2_FAMILY: is 'hopper', it must be 'sm80' or 'sm90'" in run("hopper").stderr


# Lengths and clusters -----------------------------------------------------------------------------

SHORT = [row for row in KERNELS.values() if row["max_keys"] < 2**31 - 1]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("row", SHORT, ids=lambda row: row["name"])
def test_tiles_for_short_sequences_serve_no_longer_ones(row, masked):
    def plan(seqlen_k):
        sizes = {"seqlen_q": 9, "seqlen_k": seqlen_k, "head_dim": row["head_dim"]}
        return plan_for(row["direction"], row["dtype"], **sizes, window_right=0 if masked else -1)

    most, mask = row["max_keys"], ""
    if not masked:
        most, mask = row["max_unmasked_keys"], " without a mask"
    for seqlen_k in (0, 1, most):
        assert plan(seqlen_k)["kernel"] == row["name"]
    longer = plan(most + 1)
    assert KERNELS[longer["kernel"]]["head_dim"] == row["head_dim"]
    reasons = {entry["kernel"]: entry["reason"] for entry in longer["refused"]}
    assert reasons[row["name"]] == f"serves seqlen_k <= {most}{mask}, the inputs have {most + 1}"


TEAMS = [row for row in KERNELS.values() if row["teams"] > 1]


@pytest.mark.parametrize("row", TEAMS, ids=lambda row: row["name"])
def test_a_grid_of_teams_has_a_tile_for_each(row):
    for tiles, grid in ((1, 1), (2, 1), (3, 2), (1000, 132)):  # an H200's multiprocessors
        sizes = {"seqlen_q": row["tile_m"], "seqlen_k": 64, "head_dim": row["head_dim"]}
        plan = plan_for(row["direction"], row["dtype"], **sizes, batch=tiles, heads_q=1, heads_k=1)
        assert (plan["kernel"], plan["grid"]) == (row["name"], grid)


CLUSTERS = [row for row in KERNELS.values() if row["cluster"] > 1 and row["direction"] == "forward"]


@pytest.mark.parametrize("row", CLUSTERS, ids=lambda row: row["name"])
def test_clusters_take_whole_groups_of_tiles_or_a_long_causal_mask(row):
    def plan(tiles, **other):
        sizes = {"seqlen_q": tiles * row["tile_m"] - 1, "seqlen_k": 7777, **other}
        return plan_for(row["direction"], row["dtype"], head_dim=row["head_dim"], **sizes)

    def reason(plan):
        return {entry["kernel"]: entry["reason"] for entry in plan["refused"]}[row["name"]]

    cluster = row["cluster"]
    for tiles in (cluster, 2 * cluster, 50 * cluster):
        assert plan(tiles)["kernel"] == row["name"]
        assert plan(tiles)["grid"] % cluster == 0
    for tiles in (1, cluster + 1, 50 * cluster - 1):
        assert KERNELS[plan(tiles)["kernel"]]["cluster"] == 1
        expected = f"takes {cluster} tiles of a head at a time, the inputs have {tiles}"
        assert reason(plan(tiles)) == expected
    no_mask = "takes no mask but one of one bound, from 8192 queries and keys on"
    causal, window = {"window_right": 0}, {"window_left": 9, "window_right": 9}
    for sizes in ({"seqlen_q": 8192}, {"seqlen_k": 8192}, {"seqlen_q": 9999, "seqlen_k": 9999}):
        long = min(sizes.get("seqlen_q", 0), sizes.get("seqlen_k", 7777)) >= 8192
        chosen = KERNELS[plan(2 * cluster, **causal, **sizes)["kernel"]]["cluster"]
        assert chosen == (cluster if long else 1)
        assert reason(plan(2 * cluster, **window, **sizes)) == no_mask
    assert reason(plan(2 * cluster, **causal)) == no_mask
    tiles = -(-9999 // (row["tile_m"] * cluster))
    blocks = plan(0, batch=1, heads_q=1, heads_k=1, seqlen_q=9999, seqlen_k=9999, **causal)["grid"]
    assert blocks == tiles * cluster


@pytest.mark.parametrize("mask", [{}, {"window_right": 0}, {"window_left": 9}])
def test_backward_clusters_take_any_mask_and_any_number_of_tiles(mask):
    rows = [
        row for row in KERNELS.values() if row["cluster"] > 1 and row["direction"] == "backward"
    ]
    if not rows:
        pytest.skip("no backward of clusters in this build")
    for row in rows:
        keys = row["tile_n"] * row["cluster"]
        longest = min(row["max_keys"], 99 * keys)
        for seqlen_k in (longest - keys + 1, longest):
            head_dims = {"head_dim": row["head_dim"], "head_dim_v": row["head_dim_v"]}
            plan = plan_for("backward", row["dtype"], seqlen_k=seqlen_k, **head_dims, **mask)
            assert plan["kernel"] == row["name"]
            assert plan["grid"] % (-(-seqlen_k // keys) * row["cluster"]) == 0


@needs_sm90
@pytest.mark.parametrize("gpu", [name for name, gpu in GPUS.items() if gpu["arch"] == 90])
def test_a_grid_of_clusters_has_no_more_blocks_than_the_gpu(gpu):
    for row in CLUSTERS:
        sizes = {"seqlen_q": 256 * row["tile_m"], "seqlen_k": 7777, "head_dim": row["head_dim"]}
        grid = plan_for(row["direction"], row["dtype"], gpu=gpu, **sizes)["grid"]
        assert 0 <= GPUS[gpu]["sm_count"] - grid < row["cluster"] and grid % row["cluster"] == 0


# Window -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window, seqlens, expected",
    [
        ((-1, 0), (100, 200), (-1, 0)),  # causal
        ((-7, -9), (100, 200), (-1, -1)),
        ((198, 98), (100, 200), (198, 98)),  # each hides one key of one query
        ((199, 99), (100, 200), (-1, -1)),  # they hide nothing
        ((2**62, 2**62), (100, 200), (-1, -1)),
        ((3, 0), (1, 200), (3, -1)),  # one query sees the keys up to the last, its own
        ((0, 150), (200, 100), (0, 150)),  # a right window beyond seqlen_k still hides keys
    ],
)
def test_window_that_hides_nothing_is_none(window, seqlens, expected):
    plan = plan_for(
        seqlen_q=seqlens[0], seqlen_k=seqlens[1], window_left=window[0], window_right=window[1]
    )
    assert (plan["window_left"], plan["window_right"]) == expected


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"direction": "up"}, r"^direction: is 'up', it must be 'forward' or 'backward'"),
        ({"dtype": "float32"}, r"^dtype: is 'float32', it must be 'float16' or 'bfloat16'"),
        ({"gpu": "T4"}, r"^gpu: is 'T4', it must be one of .*A100.*H200.*RTX5090"),
        ({"batch": -1}, r"^batch: is -1, it must be at least 0"),
        ({"batch": 2**31}, r"^batch: is 2147483648, .* at most 2147483647"),
        ({"seqlen_q": 2**31}, r"^seqlen_q: is 2147483648, .* at most 2147483647"),
        ({"seqlen_k": -5}, r"^seqlen_k: is -5, it must be at least 0"),
        (
            {"seqlen_q": 2**30, "seqlen_k": 2**30},
            r"^seqlen_q \+ seqlen_k: is 2147483648, .* at most 2147482623",
        ),
        (
            {"batch": 2**20, "heads_q": 4096, "heads_k": 1},
            r"^batch \* heads_q: is 4294967296, .* at most 2147483647",
        ),
        ({"heads_q": 0}, r"^heads_q: is 0, it must be at least 1"),
        ({"heads_k": 0}, r"^heads_k: is 0, it must be at least 1"),
        ({"heads_q": 8, "heads_k": 3}, r"^heads_q: is 8, it must be a multiple of heads_k, .* 3"),
        ({"head_dim": 0}, r"^head_dim: is 0, it must be at least 1 and at most 256"),
        ({"head_dim": 257}, r"^head_dim: is 257, it must be at least 1 and at most 256"),
        ({"head_dim_v": 0}, r"^head_dim_v: is 0, it must be at least 1 and at most 256"),
        ({"head_dim_v": 257}, r"^head_dim_v: is 257, it must be at least 1 and at most 256"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(wrong, message):
    problem = {
        "direction": "forward",
        "batch": 1,
        "seqlen_q": 10,
        "seqlen_k": 10,
        "heads_q": 8,
        "heads_k": 8,
        "head_dim": 64,
    }
    with pytest.raises(ValueError, match=message):
        flash_attn2.plan(**{**problem, **wrong})


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "rtx-4090", "RTX_4090"])
def test_gpu_names_are_found_in_any_spelling(name):
    assert plan_for(gpu=name) == plan_for(gpu="RTX4090")


# Build and GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [35, 70, 75])
def test_gpu_older_than_sm_80(arch):
    message = EXTENSION.why_unusable(arch, "80;90a")
    assert re.fullmatch(rf"q: its device \S+ is sm_{arch}, it must be sm_80 or newer", message)


@pytest.mark.parametrize(
    "archs, runs, fails",
    [
        # Machine code runs on its major version; the newest plain one is there as PTX, too.
        ("80", (80, 86, 89, 90, 100, 120), ()),
        ("80;90a", (80, 86, 89, 90, 100, 120), ()),
        ("90a", (90, 100, 120), (80, 86, 89)),
        ("90", (90, 100, 120), (80, 86, 89)),
        ("86", (86, 89, 90, 120), (80,)),
        ("100f, 120", (100, 103, 120, 121), (80, 90)),
        ("100a;103a", (100, 103, 110, 120), (90,)),
    ],
)
def test_architectures_that_a_build_runs_on(archs, runs, fails):
    for arch in runs:
        assert EXTENSION.why_unusable(arch, archs) == ""
    for arch in fails:
        message = EXTENSION.why_unusable(arch, archs)
        assert f"is sm_{arch}, it must be one that this build has code for: {archs}" in message
        assert f"FLASH_ATTN2_ARCHS={arch}" in message


def test_build_info_and_kernels_agree():
    info = flash_attn2.build_info()
    assert set(info) >= {"version", "archs", "cuda", "cutlass", "torch", "head_dims", "dtypes"}
    assert info["head_dims"] == sorted({row["head_dim"] for row in KERNELS.values()})
    pairs = {(row["head_dim"], row["head_dim_v"]) for row in KERNELS.values()}
    assert info["head_dim_pairs"] == sorted(pairs)
    assert info["dtypes"] == sorted({row["dtype"] for row in KERNELS.values()})
    assert info["archs"] and all(re.fullmatch(r"\d+[af]?", arch) for arch in info["archs"])
    assert re.fullmatch(r"\d+\.\d+", info["cuda"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["cutlass"])


def test_kernel_names_say_what_they_are():
    assert len(KERNELS) == len(EXTENSION.list_kernels())
    short = {"forward": "fwd", "backward": "bwd", "float16": "fp16", "bfloat16": "bf16"}
    for name, row in KERNELS.items():
        value = f"_v{row['head_dim_v']}" if row["head_dim_v"] != row["head_dim"] else ""
        cluster = f"_x{row['cluster']}" if row["cluster"] > 1 else ""
        assert name == (
            f"{row['family']}_{short[row['direction']]}_{short[row['dtype']]}_d{row['head_dim']}"
            f"{value}_{row['tile_m']}x{row['tile_n']}{cluster}"
        )
        assert row["threads"] % 32 == 0 and row["smem_bytes"] > 0
