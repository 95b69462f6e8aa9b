"""tools/fuzz_kernels.py: its draws, and that its bounds tell right results from wrong ones."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import fuzz_kernels
import pytest
import torch
from fuzz_kernels import BUCKETS, LAYOUTS, TILE_ROWS, Draw, draw
from numerics import rounded_result

ROOT = Path(__file__).resolve().parent.parent

CPU = torch.device("cpu")
DRAWS = [draw(0, index) for index in range(2000)]


def size(one: Draw) -> int:
    return one.batch * one.heads_q * one.seqlen_q * one.seqlen_k * one.head_dim


SMALL = [one for one in DRAWS if size(one) < 2e6]
USUAL = [one for one in DRAWS if 1e6 < size(one) < 5e6 and one.softmax_scale != 0.0]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small; on a busy machine the threads of an operation wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rounded(one: Draw, inputs, factor=1.0):
    """What a kernel may return: exact but for the roundings to the inputs' dtype."""
    return rounded_result(inputs, factor * one.scale, one.window, with_dlse=one.with_dlse)


# ---- draws ----


def test_a_draw_depends_on_seed_and_index_alone():
    assert draw(0, 1234) == DRAWS[1234]
    assert draw(1, 1234) != DRAWS[1234]
    first, again = (fuzz_kernels.make_inputs(SMALL[0], CPU) for _ in range(2))
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x, y)


def test_draws_cover_what_they_should():
    for low, high in zip((0, *BUCKETS), BUCKETS, strict=False):
        assert sum(low < one.head_dim <= high for one in DRAWS) > 100
    assert any(one.head_dim % 8 for one in DRAWS)
    assert any(one.head_dim > one.head_dim_v for one in DRAWS)
    assert any(one.head_dim < one.head_dim_v for one in DRAWS)
    lengths = {one.seqlen_q for one in DRAWS}
    assert lengths >= {0, 1, *(rows + i for rows in TILE_ROWS for i in (-1, 0, 1))}
    assert {one.seqlen_k for one in DRAWS} >= {0, 1}
    assert 2600 < max(lengths) <= fuzz_kernels.LONG_LENGTH + 1
    windows = {(left >= 0, right >= 0) for left, right in (one.window for one in DRAWS)}
    assert len(windows) == 4
    assert any(one.window == (-1, 0) and one.causal for one in DRAWS)
    assert any(one.causal and one.window[0] >= 0 for one in DRAWS)
    for name, values in (
        ("dtype", {"float16", "bfloat16"}),
        ("layout", set(LAYOUTS)),
        ("deterministic", {False, True}),
        ("with_dlse", {False, True}),
    ):
        assert {getattr(one, name) for one in DRAWS} == values
    assert {one.batch for one in DRAWS} >= {1, 2, 3}
    heads = [one.batch * one.heads_k for one in DRAWS if one.heads_q == one.heads_k]
    assert any(108 <= count <= 132 for count in heads) and max(heads) > 212
    groups = {one.heads_q // one.heads_k for one in DRAWS}
    assert {1, 2, 3, 8} <= groups
    assert any(one.heads_k == 1 < one.heads_q for one in DRAWS)
    scales = [one.softmax_scale for one in DRAWS]
    assert None in scales and 0.0 in scales and min(s for s in scales if s is not None) < 0


def test_problems_fit_in_memory():
    scores = [one.batch * one.heads_q * one.seqlen_q * one.seqlen_k for one in DRAWS]
    assert max(scores) <= fuzz_kernels.MOST_SCORES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    one = next(
        d
        for d in DRAWS
        if d.layout == layout
        and min(d.seqlen_q, d.seqlen_k, d.heads_k) > 1
        and (layout != "fused" or d.head_dim == d.head_dim_v)
    )
    inputs = fuzz_kernels.make_inputs(one, CPU)
    assert inputs.q.shape == (one.batch, one.seqlen_q, one.heads_q, one.head_dim)
    assert inputs.k.shape == (one.batch, one.seqlen_k, one.heads_k, one.head_dim)
    assert inputs.v.shape == (one.batch, one.seqlen_k, one.heads_k, one.head_dim_v)
    assert inputs.dout.shape == (one.batch, one.seqlen_q, one.heads_q, one.head_dim_v)
    assert all(x.isfinite().all() and x.is_leaf for x in inputs)
    assert inputs.v.is_contiguous() == (layout == "contiguous")


# ---- bounds ----


def test_the_cpu_path_passes(capsys):
    targets = fuzz_kernels.find_targets(CPU, None)
    for one in SMALL[:30]:
        ((_, ratios),) = fuzz_kernels.try_draw(one, targets, CPU)
        assert set(ratios) == {"out", "lse", "dq", "dk", "dv"}
        assert all(ratio <= 1 for ratio in ratios.values()), (one, ratios)


def test_right_results_pass_and_wrong_ones_do_not():
    """A scale that is off by 3 %, and one row of one result lost."""
    for number, one in enumerate(USUAL[:20]):
        inputs = fuzz_kernels.make_inputs(one, CPU)
        wanted = fuzz_kernels.expected(one, inputs)
        right = rounded(one, inputs)
        assert max(fuzz_kernels.error_ratios(right, wanted).values()) < 0.8
        wrong = rounded(one, inputs, factor=1.03)
        assert max(fuzz_kernels.error_ratios(wrong, wanted).values()) > 1
        # Of rows that see one key dq is zero.
        names = [name for name in ("out", "dq", "dk", "dv") if wanted[name][0][0, 0].any()]
        name = names[number % len(names)]
        reference = wanted[name][0]  # (b, h, s, d)
        row = int(reference[0, 0].norm(dim=-1).argmax())
        lost = getattr(right, name).clone()
        lost[0, row, 0] = 0
        ratios = fuzz_kernels.error_ratios(right._replace(**{name: lost}), wanted)
        assert [key for key, ratio in ratios.items() if not ratio <= 1] == [name], one


def test_rows_without_a_key_must_be_exactly_zero():
    one = next(one for one in SMALL if one.causal and one.seqlen_q > one.seqlen_k > 0)
    inputs = fuzz_kernels.make_inputs(one, CPU)
    wanted = fuzz_kernels.expected(one, inputs)
    right = rounded(one, inputs)
    assert right.lse[0, 0, 0] == float("-inf")
    for name, value in (("out", 1e-7), ("dq", 1e-7), ("lse", 0.0), ("out", float("nan"))):
        wrong = getattr(right, name).clone()
        wrong[0, 0, 0] = value
        ratio = fuzz_kernels.error_ratios(right._replace(**{name: wrong}), wanted)[name]
        assert not ratio <= 1, (name, value)


# ---- the command ----


def options(*arguments: str):
    return fuzz_kernels.parse(["--device", "cpu", *arguments])


def test_a_build_is_asked_for_what_it_has(monkeypatch):
    """A filtered build, on a GPU that runs both families."""
    rows = [
        {"family": family, "dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim_v}
        for family, dtype, head_dim, head_dim_v in (
            ("sm80", "float16", 64, 64),
            ("sm90", "bfloat16", 64, 64),
            ("sm90", "bfloat16", 128, 96),
        )
    ]
    monkeypatch.setattr(fuzz_kernels, "families_of_gpu", lambda: ["sm80", "sm90"])
    monkeypatch.setattr(fuzz_kernels, "list_kernels", lambda: rows)
    sm80, sm90 = fuzz_kernels.find_targets(torch.device("cuda"), None)
    assert (sm80.name, sm90.name) == ("sm80", "sm90")
    for dtype, head_dim, head_dim_v, served in (
        ("float16", 64, 64, (True, False)),
        ("float16", 65, 64, (False, False)),
        ("bfloat16", 128, 96, (False, True)),
        ("bfloat16", 128, 97, (False, False)),
        ("bfloat16", 129, 96, (False, False)),
    ):
        one = dataclasses.replace(DRAWS[0], dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v)
        assert (sm80.serves(one), sm90.serves(one)) == served
    (only,) = fuzz_kernels.find_targets(torch.device("cuda"), ["sm90"])
    assert only.name == "sm90"
    with pytest.raises(SystemExit, match="family: is 'sm70'"):
        fuzz_kernels.find_targets(torch.device("cuda"), ["sm70"])


def test_mismatches_name_the_draw(monkeypatch, capsys):
    index = next(one.index for one in SMALL if one.seqlen_q > 64 < one.seqlen_k)
    assert fuzz_kernels.fuzz(options("--only", str(index))) == 0
    assert "cpu: 1 draws; largest error of a row over its bound: out 0." in capsys.readouterr().out
    right = fuzz_kernels.run
    monkeypatch.setattr(
        fuzz_kernels, "run", lambda *a: (r := right(*a))._replace(dv=torch.zeros_like(r.dv))
    )
    assert fuzz_kernels.fuzz(options("--only", str(index))) == 1
    printed = capsys.readouterr().out
    assert f"again: --seed 0 --only {index} --family cpu" in printed
    assert "mismatch, cpu: largest error of a row over its bound: dv " in printed


def test_it_stops_in_time(monkeypatch):
    monkeypatch.setattr(fuzz_kernels, "try_draw", lambda *_: time.sleep(0.05) or ())
    begin = time.monotonic()
    assert fuzz_kernels.fuzz(options("--seconds", "0.3")) == 0
    assert time.monotonic() - begin < 10


def test_an_error_names_the_draw(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(fuzz_kernels, "run", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        fuzz_kernels.fuzz(options("--seed", "3", "--count", "1"))
    assert "an error, in Draw(seed=3, index=0, " in capsys.readouterr().err


def test_a_hang_ends_the_process_and_names_the_draw():
    code = "\n".join((
        "import sys, time",
        f"sys.path.insert(0, {str(ROOT / 'tools')!r})",
        "import fuzz_kernels",
        "fuzz_kernels.run = lambda *_: time.sleep(60)",
        "fuzz_kernels.fuzz(fuzz_kernels.parse(sys.argv[1:]))",
    ))  # fmt: skip
    arguments = ["--device", "cpu", "--count", "1", "--hang-seconds", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 3
    assert "hang of 1 s: Draw(seed=0, index=0, " in done.stderr
    assert "fuzz_kernels.py" in done.stderr  # the traceback
