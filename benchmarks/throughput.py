"""Measure images/s of our models over batch sizes, precisions, compiled or not.

    python benchmarks/throughput.py --models stvit_small --batches 1,32,256 --precision fp32,bf16 --compile

The step and the columns are those of step.py; candidates of one batch size take turns. Results go to benchmarks/results/.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from benchmarks import record
from benchmarks.baselines import parse_choices, parse_models
from benchmarks.record import Row
from benchmarks.step import COLUMNS, MODES, PRECISIONS, Bench, check, make_parser, measure, metadata

BATCHED: record.Columns = {"batch": lambda row: str(row["batch"]), **COLUMNS}
RATIO = ("ratio", "its lowest .. highest")  # to the eager model: left out without a compiled or a folded one
SHOWN = ("batch", "model", "step", "contender", "images/s", "memory", "share")


def parse_batches(text: str) -> list[int]:
    """Parse batch sizes separated by commas. Raises ValueError."""
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--batches {text}: give numbers with commas between, e.g. 1,32,256") from None
    if min(sizes) < 1:
        raise ValueError(f"--batches {text}: every batch needs at least 1 image")
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = make_parser("Measure images/s of models over batch sizes.")
    parser.add_argument("--batches", default="1,8,32", metavar="N,M", help="batch sizes (default 1,8,32)")
    parser.add_argument("--compile", action="store_const", const="ours", help="also measure compiled models")
    args, console = parser.parse_args(argv), record.console()
    rows: list[Row] = []
    try:
        device = check(args)
        models = parse_models(args.models)
        batches = parse_batches(args.batches)
        modes = parse_choices("--modes", args.modes, MODES)
        precisions = parse_choices("--precision", args.precision, PRECISIONS)
        bench = Bench(args, (), device, console)
        for batch in batches:
            args.batch = batch
            rows += measure(bench, models, modes, precisions)
    except ValueError as error:
        parser.fail(error)
    rows.sort(key=lambda row: [model.name for model in models].index(row["model"]))
    compared = any(row["contender"] != "ours" for row in rows)
    shown = (*SHOWN, "ratio") if compared else SHOWN
    console.print(record.table({title: BATCHED[title] for title in shown}, rows))
    found = {**metadata("benchmarks/throughput.py", argv, bench), "images": f"of {args.size} x {args.size}"}
    columns = {title: cell for title, cell in BATCHED.items() if compared or args.append or title not in RATIO}
    out = args.out or record.default_out("throughput")
    page = record.write(out, "Throughput", columns=columns, found=found, rows=rows, append=args.append)
    console.print(f"written to {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
