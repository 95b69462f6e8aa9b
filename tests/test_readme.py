"""The measured section of README.md is what the committed results give."""

import json

import pytest
from benchmark_samples import OURS, synthetic_results

from benchmarks import cases, readme, report
from benchmarks.__main__ import main
from benchmarks.cases import UsageError

README = report.ROOT / "README.md"


def results_folder(folder, *names):
    """Copies of the committed files."""
    for name in names:
        (folder / f"{name}.json").write_text((report.RESULTS / f"{name}.json").read_text())
    return folder


def test_the_readme_is_what_the_results_give():
    page = README.read_text()
    assert readme.updated(page, report.RESULTS, "benchmarks/results") == page, (
        "run `python -m benchmarks readme`"
    )


def test_the_command_writes_between_the_comments(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{readme.BEGIN}\nold\n{readme.END}\n\nafter\n")
    results = tmp_path / "results"
    results.mkdir()
    results_folder(results, "memory")
    for _ in range(2):  # a second time changes nothing
        assert main(["readme", "--page", str(page), "--results", str(results)]) == 0
        text = page.read_text()
        assert text.startswith(f"before\n\n{readme.BEGIN}\n\n|  | ours | torch FLASH |")
        assert text.endswith(f"|\n\n{readme.END}\n\nafter\n")
        assert "old" not in text and "`results/` |" in text
        assert len(text.splitlines()) == 11


@pytest.mark.parametrize("page", ["", readme.BEGIN, readme.END])
def test_a_page_without_the_comments_is_refused(page, tmp_path):
    with pytest.raises(UsageError, match="readme: there are no lines"):
        readme.updated(page, tmp_path, "x")


def test_files_that_are_not_there_are_left_out(tmp_path):
    assert readme.section(tmp_path, "x") == ""
    text = readme.section(results_folder(tmp_path, "overhead", "accuracy"), "x")
    assert [line.rpartition("| ")[2] for line in text.splitlines()[2:]] == [
        f"{readme.source(report.load(tmp_path / f'{name}.json'))} |"
        for name in ("accuracy", "overhead")
    ]
    assert "![" not in text


def test_speed_tables(tmp_path):
    results = synthetic_results(cases.grid([64], [512, 1024]))
    results["arguments"] = {"dtype": "bf16", "tokens": 16384, "hidden": 2048}
    results["name"] = "attention"
    lost = next(row for row in results["rows"] if row["causal"] and row["provider"] == OURS)
    for key in ("ms", "tflops"):
        del lost[key]
    (tmp_path / "attention.json").write_text(json.dumps(results))
    (tmp_path / "attention-backward-eager.png").touch()
    (tmp_path / "attention-both-eager.png").touch()  # of another run
    blocks = readme.section(tmp_path, "x").split("\n\n")
    assert "0123456` with changes" in blocks[0]
    assert blocks[1] == "**sm80 forward**, TFLOP/s (ratio to FLASH); geometric mean 1.10:"
    assert blocks[2].splitlines() == [
        "|  | 512 | 1k |",
        "| --- | --- | --- |",
        "| d64 full | 69 (1.10) | 137 (1.10) |",
        "| d64 causal | - | 69 (1.10) |",
    ]
    assert blocks[3].startswith("**sm80 backward**")
    assert blocks[5:] == ["![backward](x/attention-backward-eager.png)"]


def test_figures_compare_what_all_have_measured(tmp_path):
    results = synthetic_results(cases.grid([64], [512, 1024], [False]))
    results["rows"] = results["rows"][:-1]  # the peer lacks one cell of the backward
    (line,) = readme.FIGURES["attention-graph"](results)
    assert line[0].startswith("CUDA-graph replays of the grid, forward / backward")
    forward = (results["rows"][0]["tflops"] * results["rows"][4]["tflops"]) ** 0.5
    backward = results["rows"][1]["tflops"]
    assert line[1] == f"sm80 {forward:.0f} / {backward:.0f}"
    assert line[2] == f"{forward / 1.1:.0f} / {backward / 1.1:.0f}"


def test_flash_attention_3_is_named_with_its_speeds():
    results = synthetic_results(cases.grid([64], [512], [False]))
    for row in results["rows"]:
        if row["provider"] != OURS:
            row["provider"] = readme.FA3
    (line,) = readme.fa3_lines(results)
    forward, backward = (row["tflops"] for row in results["rows"] if row["provider"] == OURS)
    assert line[0].endswith(f"(FlashAttention-3: {forward / 1.1:.0f} / {backward / 1.1:.0f})")
    assert line[1:4] == [f"sm80 {forward:.0f} / {backward:.0f}", "", ""]


def test_a_failed_measurement_is_shown():
    environment = {"device": "GPU", "commit": None, "dirty": None}
    results = {"name": "training", "environment": environment, "rows": [
        {"model": "355M", "seqlen": 2048, "provider": "flash_attn2[sm90]", "tflops": 512.4},
        {"model": "355M", "seqlen": 8192, "provider": "flash_attn2[sm90]", "error": "no memory"},
    ]}  # fmt: skip
    assert readme.training_lines(results) == [
        ["training step of a 355M GPT, length 2k / 8k, TFLOP/s", "sm90 512 / -", "", "",
         "`training.json`: GPU, `?`"],
    ]  # fmt: skip
