"""Line up run directories: what differed between the runs, and where their numbers part.

    python -m tools.compare output/A output/B
    python -m tools.compare output/A output/B output/C --tolerance 1e-5 --markdown

The first run is compared with each of the others at the updates that both have rows of in metrics.jsonl. `loss` and
`grad_norm` are means since the row before, so they are compared where that row, too, is of the same update; rates (images/s,
waiting for data, seconds) are not compared. Numbers are the same if they differ by no more than the tolerance times the
larger of them. The exit status is 0 if all are, 1 if runs part, 2 if they cannot be compared.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from config.command_line import Parser
from tools.run_comparison import ABSENT, Comparison, compare, number, read_run


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
        tree = {"tolerance": args.tolerance, "comparisons": [asdict(comparison) for comparison in found]}
        print(json.dumps(tree, indent=2, allow_nan=False))
    else:
        show(found, args.markdown)
    return 0 if all(comparison.same for comparison in found) else 1


def compare_parser() -> Parser:
    """Return the parser of this tool."""
    parser = Parser("Compare runs: settings, rows of metrics.jsonl, best results, and the update at which they part.")
    parser.prog = "python -m tools.compare"
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories; the first is compared with the others")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="TOL", help="relative difference that counts as none (0)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--markdown", action="store_true", help="print tables of Markdown")
    return parser


def show(found: Sequence[Comparison], markdown: bool) -> None:
    """Print comparisons: tables on a terminal, plain lines or Markdown elsewhere."""
    screen = Console(highlight=False)
    for comparison in found:
        for title, header, rows in sections(comparison):
            if markdown:
                print("\n".join(_as_markdown(title, header, rows)), end="\n\n")
            elif screen.is_terminal:
                table = Table(title=title, title_justify="left", show_header=any(header))
                for column in header:
                    table.add_column(column, overflow="fold")
                for cells in rows:
                    table.add_row(*map(Text, cells))
                screen.print(table)
            else:
                print("\n".join([title, *_as_columns([header, *rows] if any(header) else rows)]))
        count = comparison.rows
        compared = (
            f"compared {count['train']} training rows and {count['eval']} evaluations, to update {comparison.through}"
        )
        for note in (compared, *comparison.notes):
            print(note + "\n" * markdown)
        verdict = f"{comparison.a}, {comparison.b}: {comparison.verdict}"
        if screen.is_terminal and not markdown:
            screen.print(verdict, style="bold green" if comparison.same else "bold red", markup=False, soft_wrap=True)
        else:
            print(f"**{verdict}**\n" if markdown else verdict)


def sections(c: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return what there is to show as titles, headers and rows of cells."""
    name_a, name_b = Path(c.a).name, Path(c.b).name
    names = [c.a, c.b] if name_a == name_b else [name_a, name_b]
    found: list[tuple[str, list[str], list[list[str]]]] = []
    if c.config:
        found.append(("config", [""], [[line] for line in c.config]))
    if c.manifest:
        found.append(("manifest", ["", *names], [list(row) for row in c.manifest]))
    apart = [d for kind in ("train", "eval") for d in c.parting[kind]]
    if c.largest_loss:
        apart.append(c.largest_loss)
    if apart:
        titles = ["first"] * (len(apart) - bool(c.largest_loss)) + ["largest of loss"] * bool(c.largest_loss)
        rows = [
            [title, f"update {d.update}", d.where, d.name, number(d.a), number(d.b), number(d.relative, 2)]
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


def _as_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]


def _as_markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *(list(cells) for cells in rows)]
    return [
        f"### {title}",
        "",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines),
    ]


if __name__ == "__main__":
    sys.exit(main())
