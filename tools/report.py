"""Write one HTML page about a run or several runs: metric curves, results, pictures, config, environment.

    python -m tools.report output/NAME                    writes output/NAME/report.html
    python -m tools.report output/A output/B --out page.html

The page is self-contained: it needs neither a server nor a network. The run may be running, interrupted or complete; run
the command again to update the page.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from common.atomic_files import write_text_atomically
from common.text import readable, readable_lines
from config.command_line import Parser
from tools.report_pictures import embed_picture
from tools.report_tables import (
    START_HEADER,
    changed_keys,
    differing_keys,
    evaluation_row,
    metadata,
    side_by_side,
    start_row,
)
from tools.run_comparison import ABSENT
from tools.run_info import HEADLINES, LOG_LINES, RunInfo, format_age, format_rounded_duration
from tools.run_tree import cell
from tools.terminal import say

MOST_PICTURES, MOST_STARTS, MOST_EVALS = 40, 200, 2000  # shown, the newest ones
PAGE = Path(__file__).parent / "page"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = report_parser()
    args = parser.parse_args(argv)
    try:
        paths = [Path(path) for path in args.runs]
        if len({path.resolve() for path in paths}) < len(paths):
            raise ValueError(f"{' '.join(args.runs)} names a run twice; name each once")
        runs = [RunInfo.read(path) for path in paths]
        out = Path(args.out) if args.out else default_page(paths)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            page = render(runs)
            write_text_atomically(out, page)
        except OSError as error:
            raise ValueError(f"{out} cannot be written ({error.strerror}); choose another file with --out") from error
    except ValueError as error:
        parser.fail(error)
    say(f"{out}  ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def report_parser() -> Parser:
    """Return the parser of this tool."""
    parser = Parser(
        "Write one self-contained HTML page about runs: metric curves, results, pictures, config, environment."
    )
    parser.prog = "python -m tools.report"
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="file to write (default: report.html in the run directory, or in the common folder of several)",
    )
    return parser


def default_page(paths: Sequence[Path]) -> Path:
    """Return the default path of the page of these runs."""
    if len(paths) == 1:
        return paths[0] / "report.html"
    return Path(os.path.relpath(os.path.commonpath([path.resolve().parent for path in paths]))) / "report.html"


def render(runs: Sequence[RunInfo]) -> str:
    """Return the HTML page about runs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        finalize=_printable,
    )
    names = _names(runs)
    contexts = [{**describe(run), "name": name} for run, name in zip(runs, names, strict=True)]
    data = [
        {"name": name, "updates_per_epoch": run.updates_per_epoch, "published": run.published, "last": run.last}
        | run.columns()
        for run, name in zip(runs, names, strict=True)
    ]
    return environment.get_template("page.html").render(
        title=names[0] if len(runs) == 1 else " · ".join(names),
        css=jinja2.filters.Markup((PAGE / "page.css").read_text(encoding="utf-8")),
        js=jinja2.filters.Markup((PAGE / "page.js").read_text(encoding="utf-8")),
        runs=contexts,
        names=names,
        comparison=side_by_side(runs) if len(runs) > 1 else [],
        differing=differing_keys(runs) if len(runs) > 1 else [],
        data=data,
        written=time.strftime("%Y-%m-%d %H:%M"),
        sources=", ".join(str(run.path) for run in runs),
    )


def _printable(value: Any) -> Any:
    """Return a value of the template with control characters escaped; HTML and line breaks stay."""
    return value if not isinstance(value, str) or isinstance(value, jinja2.filters.Markup) else readable_lines(value)


def describe(run: RunInfo) -> dict[str, Any]:
    """Return the template's variables for a run."""
    pictures = run.pictures()
    epochs = [folder for folder in pictures if folder]
    shown = [*pictures.get("", []), *(path for folder in epochs[-1:] for path in pictures[folder])][:MOST_PICTURES]
    older = f"{len(epochs) - 1} earlier sets are in {run.path / 'pictures'}." if len(epochs) > 1 else ""
    drawn = {path: embed_picture(path) for path in shown}
    damaged = [str(path) for path, found in drawn.items() if found is None]
    notes = [older, f"Not shown, damaged or too large: {', '.join(damaged)}." if damaged else ""]
    return {
        "status": run.status,
        "summary": summary(run),
        "progress": progress(run),
        "results": [result(run, which, found) for which, found in run.results()],
        "cards": cards(run),
        "pictures": [found for found in drawn.values() if found],
        "more_pictures": " ".join(note for note in notes if note),
        "warnings": run.warnings(),
        "bad_images": run.bad_images(),
        "diverged": run.diverged(),
        "start_header": START_HEADER,
        "starts": [start_row(start) for start in run.starts[-MOST_STARTS:]],
        "metadata": metadata(run),
        "changed": changed_keys(run),
        "config_text": run.config_text(),
        "checkpoints": run.files(),
        "evaluations": [evaluation_row(row) for _, row in sorted(run.run.evals.items(), reverse=True)[:MOST_EVALS]],
        "log": "\n".join(run.log[-LOG_LINES:]),
        "log_lines": LOG_LINES,
        "log_cut": len(run.log) > LOG_LINES,
    }


def summary(run: RunInfo) -> str:
    """Return the model, data, batch size and recipe of a run in one line."""
    parameters, classes = (run.run.manifest.get(name) for name in ("parameters", "num_classes"))
    train, val = run.data.get("train"), run.data.get("val") or 0
    parts = [
        f"{cell(run.key('MODEL.NAME', ABSENT))}{f', {parameters / 1e6:.1f} million parameters' if parameters else ''}",
        f"{cell(run.key('DATA.IMG_SIZE', ABSENT))} pixels",
        f"{train:,} training and {val:,} validation images" if train is not None else "",
        f"{classes:,} classes" if classes is not None else "",
        f"batch {cell(run.key('TRAIN.GLOBAL_BATCH', ABSENT))}",
        f"recipe {cell(run.key('RECIPE.MODE', ABSENT))}",
    ]
    return ", ".join(part for part in parts if part)


def progress(run: RunInfo) -> dict[str, Any]:
    """Return the progress of a run: epochs, percentage, and a note with updates and the time left."""
    total = run.epochs * (run.updates_per_epoch or 0)
    percent = 100.0 if run.status == "complete" else min(100 * run.last / total, 100) if total else 0.0
    note = f"update {run.last:,}{f' of {total:,}' if total else ''}"
    if run.status == "running":
        note += f"; last row {format_age(run.written)}" if run.written else ""
        note += f"; about {format_rounded_duration(left)} of training left" if (left := run.left(total)) else ""
    return {
        "title": run.epochs_text(),
        "percent": f"{percent:.1f}",
        "note": note,
    }


def result(run: RunInfo, which: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the best evaluation of the raw or EMA weights as texts, with the difference to a published top-1."""
    row = run.run.evals[found["update"], which]
    published, (counts, top5) = run.published, evaluation_row(row)[4:6]
    difference = f"{row['top1'] - published:+.2f} to the published {published}" if published else ""
    return {
        "weights": HEADLINES[which],
        "headline": which == run.key("RECIPE.HEADLINE", "raw"),
        "top1": f"{row['top1']:.3f}",
        "note": f"{counts}, epoch {found['epoch']}; top-5 {top5}",
        "published": difference,
    }


def cards(run: RunInfo) -> list[dict[str, str]]:
    """Return the number cards at the top of the page besides the accuracies: loss, throughput, skips, starts."""
    found = []
    last = run.run.train[max(run.run.train)] if run.run.train else None
    if last:
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        found.append({"label": "training loss", "number": loss, "note": f"at update {last['update']:,}"})
    if rate := run.rate():
        share = last.get("data_share") if last else None
        waiting = "" if share is None else f"; waiting for data {100 * share:.0f}%"
        devices = dict.fromkeys(cell(start.get("device"), 60) for start in run.starts[-MOST_STARTS:])
        found.append(
            {"label": "images per second", "number": f"{rate:,.0f}", "note": f"median; {', '.join(devices)}{waiting}"}
        )
    if last and last.get("skipped_in_run"):
        note = f"not finite; {last.get('overflows_in_run') or 0} of them fp16 overflows"
        found.append({"label": "skipped updates", "number": f"{last['skipped_in_run']:,}", "note": note})
    began = run.first_start()
    if began:
        number = len(run.starts)
        note = f"began {began:%Y-%m-%d %H:%M}"
        found.append({"label": "starts", "number": str(number), "note": note})
    return found


def _names(runs: Sequence[RunInfo]) -> list[str]:
    """Return the runs' names, or their paths where names repeat."""
    names = [run.name for run in runs]
    return [readable(name) for name in (names if len(set(names)) == len(names) else [str(run.path) for run in runs])]


if __name__ == "__main__":
    sys.exit(main())
