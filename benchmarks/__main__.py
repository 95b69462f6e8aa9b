"""The command line: ``python -m benchmarks <command>``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import accuracy, attention, floor, memory, overhead, readme, report, training
from .cases import UsageError

MEASUREMENTS = {
    "attention": attention,
    "overhead": overhead,
    "accuracy": accuracy,
    "memory": memory,
    "training": training,
}


def add_common_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """What every measuring command takes."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--name", default=name, help="name of the results file")
    parser.add_argument("--output-dir", type=Path, default=report.RESULTS)
    parser.add_argument("--commit", help="commit measured, where there is no git repository; "
                        "append -dirty if files differ from it")  # fmt: skip


def summarize(args: argparse.Namespace) -> int:
    """Prints results as Markdown; with --check, 1 when the speed goal is missed."""
    misses = []
    texts = []
    for path in args.results:
        results = report.load(path)
        texts.append(f"## {results['name']}\n\n{report.markdown(results, args.baseline)}")
        if args.peers and results["kind"] == "attention":
            texts.append(floor.floor_markdown(results, report.load(args.peers), args.matrix_tflops))
        if args.check and results["kind"] == "attention":
            misses += report.speed_gate(results, args.baseline, args.mean)
    text = "\n\n".join(texts) + "\n"
    if args.output:
        args.output.write_text(text)
    else:
        print(text)
    for miss in misses:
        print(f"missed: {miss}", file=sys.stderr)
    return 1 if misses else 0


def plot(args: argparse.Namespace) -> int:
    """Writes the plots of an attention results file."""
    from .plot import plot_results

    for path in plot_results(report.load(args.results), args.output_dir, args.format):
        print(path)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in MEASUREMENTS.items():
        text = module.__doc__.partition(": ")[2].strip()
        command = commands.add_parser(name, help=text, description=text)
        module.add_arguments(command)
        add_common_arguments(command, name)
        command.set_defaults(handler=module.run)
    command = commands.add_parser("summarize", help="results files as Markdown tables")
    command.add_argument("results", nargs="+", type=Path)
    command.add_argument("--baseline", default=report.BASELINE)
    command.add_argument("--output", type=Path, help="file to write instead of standard output")
    command.add_argument("--check", action="store_true",
                         help="exit 1 when a cell is slower than the baseline beyond the spread, "
                         "or a geometric mean is below --mean")  # fmt: skip
    command.add_argument("--mean", type=float, default=1.05)
    command.add_argument("--peers", type=Path, metavar="FILE",
                         help="peers and ceilings of another run: adds tables of sm90's distance "
                         "from the floor and from FA3 (benchmarks/floor.py)")  # fmt: skip
    command.add_argument("--matrix-tflops", type=float, metavar="RATE",
                         help="of the floor (default: the fastest product in --peers)")  # fmt: skip
    command.set_defaults(handler=summarize)
    command = commands.add_parser("plot", help="bar plots of attention results")
    command.add_argument("results", type=Path)
    command.add_argument("--output-dir", type=Path, default=report.RESULTS)
    command.add_argument("--format", choices=("png", "svg"), default="png")
    command.set_defaults(handler=plot)
    command = commands.add_parser("readme", help="rewrite the measured section of README.md")
    command.add_argument("--page", type=Path, default=report.ROOT / "README.md")
    command.add_argument("--results", type=Path, default=report.RESULTS, help="a folder")
    command.set_defaults(handler=readme.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the exit code. A wrong argument prints one line and gives 2."""
    args = make_parser().parse_args(argv)
    try:
        return args.handler(args)
    except (UsageError, FileNotFoundError) as error:
        print(f"benchmarks {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
