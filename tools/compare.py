"""Compare run directories: differences in config and manifest, and the first update at which the metrics differ.

    python -m tools.compare output/A output/B
    python -m tools.compare output/A output/B output/C --tolerance 1e-5 --markdown

The first run is compared with each of the others at the updates for which both have rows in metrics.jsonl. `loss` and
`grad_norm` are means since the preceding row, so they are compared only where the preceding rows are of the same update;
rates (images/s, waiting for data, seconds) are not compared. Two numbers are the same if they differ by no more than the
tolerance times the larger of them. Exit status: 0 if all are the same, 1 if runs differ, 2 if they cannot be compared.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config.command_line import Parser
from tools.run_comparison import ABSENT, Comparison, compare, format_number, read_run
from tools.tables import aligned_columns, markdown_table, terminal_table
from tools.terminal import Screen, say

JSON_KEYS = {
    "divergence": "parting",
    "summary": "verdict",
}  # keys that scripts read; the others are those of Comparison


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = compare_parser()
    args = parser.parse_args(argv)
    try:
        if len(args.runs) < 2:
            raise ValueError(f"{args.runs[0]} alone: name two or more run directories")
        if not 0 <= args.tolerance < math.inf:
            raise ValueError(f"--tolerance {args.tolerance}: give 0 or a small number, e.g. 1e-5")
        runs = [read_run(Path(path)) for path in args.runs]
        found = [compare(runs[0], run, args.tolerance) for run in runs[1:]]
    except ValueError as error:
        parser.fail(error)
    if args.json:
        tree = {"tolerance": args.tolerance, "comparisons": [as_json(comparison) for comparison in found]}
        print(json.dumps(tree, indent=2, allow_nan=False))
    else:
        show(found, args.markdown)
    return 0 if all(comparison.same for comparison in found) else 1


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values, under the keys of the JSON output."""
    return {JSON_KEYS.get(name, name): value for name, value in asdict(comparison).items()}


def compare_parser() -> Parser:
    """Return the parser of this tool."""
    parser = Parser("Compare runs: config, metrics, best results, and the first update at which they differ.")
    parser.prog = "python -m tools.compare"
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories; the first is compared with the others")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="TOL", help="relative difference that counts as none (0)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser


def show(found: Sequence[Comparison], markdown: bool) -> None:
    """Print comparisons: tables on a terminal, plain lines or Markdown elsewhere."""
    screen = Screen()
    for comparison in found:
        for title, header, rows in sections(comparison):
            if markdown:
                say(f"### {title}", "", *markdown_table(header, rows), "")
            elif screen.is_terminal:
                screen.print(terminal_table(header, rows, title))
            else:
                lines = aligned_columns([header, *rows] if any(header) else rows)
                say(title, *(f"  {line}" for line in lines))
        count = comparison.rows
        compared = (
            f"compared {count['train']} training rows and {count['eval']} evaluations, to update {comparison.through}"
        )
        for note in (compared, *comparison.notes):
            say(note, *[""] * markdown)
        summary = f"{comparison.a}, {comparison.b}: {comparison.summary}"
        if screen.is_terminal and not markdown:
            screen.print(summary, style="bold green" if comparison.same else "bold red", soft_wrap=True)
        elif markdown:
            say(f"**{summary}**", "")
        else:
            say(summary)


def sections(c: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the tables of a comparison as titles, headers and rows of cells."""
    name_a, name_b = Path(c.a).name, Path(c.b).name
    names = [c.a, c.b] if name_a == name_b else [name_a, name_b]
    found: list[tuple[str, list[str], list[list[str]]]] = []
    if c.config:
        found.append(("config", [""], [[line] for line in c.config]))
    if c.manifest:
        found.append(("manifest", ["", *names], [list(row) for row in c.manifest]))
    apart = [d for kind in ("train", "eval") for d in c.divergence[kind]]
    if c.largest_loss:
        apart.append(c.largest_loss)
    if apart:
        titles = ["first"] * (len(apart) - bool(c.largest_loss)) + ["largest of loss"] * bool(c.largest_loss)
        rows = [
            [
                title,
                f"update {d.update}",
                d.where,
                d.name,
                format_number(d.a),
                format_number(d.b),
                format_number(d.relative, 2),
            ]
            for title, d in zip(titles, apart, strict=True)
        ]
        found.append(("differences", ["", "", "row", "number", *names, "relative"], rows))
    rows = []
    for which, (a, b) in c.best.items():
        if a or b:
            rows.append([f"{which} top-1", *(f"{x['top1']:.3f} (epoch {x['epoch']})" if x else ABSENT for x in (a, b))])
    if rows:
        found.append(("best", ["", *names], rows))
    return found


if __name__ == "__main__":
    sys.exit(main())
