"""Write one HTML page about a run, or about several side by side: curves, results, pictures, config, environment.

    python -m tools.report output/NAME                    writes output/NAME/report.html
    python -m tools.report output/A output/B --out page.html

The page holds everything it shows and opens without a server and without a network. A run may be running, interrupted or
complete; write the page again to see what is new.
"""

import base64
import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

import config
from common.atomic_files import write_atomically
from config.command_line import Parser
from tools.run_comparison import ABSENT, manifest_differences
from tools.run_info import HEADLINES, LOG_LINES, RunInfo, ago, lasting

PAGE = Path(__file__).parent / "page"
QUALITY = 88  # of pictures as JPEG, where that is smaller
SIDE = 1600  # pixels of a picture's longer side in the page
LISTED = 12  # entries of a list
DATA_URI = "data:image/{};base64,{}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = report_parser()
    args = parser.parse_args(argv)
    try:
        paths = [Path(path) for path in args.runs]
        if len({path.resolve() for path in paths}) < len(paths):
            raise ValueError(f"{' '.join(args.runs)} names a run twice; name each once")
        runs = [RunInfo.read(path) for path in paths]
        out = Path(args.out) if args.out else place(paths)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, lambda file: _write(file, render(runs)))
        except OSError as error:
            raise ValueError(f"{out} cannot be written ({error.strerror}); choose another file with --out") from error
    except ValueError as error:
        parser.fail(error)
    print(f"{out}  ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def report_parser() -> Parser:
    """Return the parser of this tool."""
    parser = Parser("Write one self-contained HTML page about runs: curves, results, pictures, config, environment.")
    parser.prog = "python -m tools.report"
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page (default: report.html in the run directory, or in the folder of several)",
    )
    return parser


def place(paths: Sequence[Path]) -> Path:
    """Return where the page of these runs goes by default."""
    if len(paths) == 1:
        return paths[0] / "report.html"
    return Path(os.path.relpath(os.path.commonpath([path.resolve().parent for path in paths]))) / "report.html"


def render(runs: Sequence[RunInfo]) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
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
        css=jinja2.filters.Markup((PAGE / "page.css").read_text()),
        js=jinja2.filters.Markup((PAGE / "page.js").read_text()),
        runs=contexts,
        names=names,
        comparison=compare(runs) if len(runs) > 1 else [],
        differing=differing_keys(runs) if len(runs) > 1 else [],
        data=data,
        written=time.strftime("%Y-%m-%d %H:%M"),
        sources=", ".join(str(run.path) for run in runs),
    )


def describe(run: RunInfo) -> dict[str, Any]:
    """Return what the page says of a run, as the template wants it."""
    pictures = run.pictures()
    epochs = [folder for folder in pictures if folder]
    shown = [*pictures.get("", []), *(path for folder in epochs[-1:] for path in pictures[folder])]
    older = f"{len(epochs) - 1} earlier sets lie in {run.path / 'pictures'}." if len(epochs) > 1 else ""
    drawn = {path: picture(path) for path in shown}
    damaged = [str(path) for path, found in drawn.items() if found is None]
    notes = [older, f"Damaged: {', '.join(damaged)}." if damaged else ""]
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
        "start_header": ["started", "at update", "processes", "device", "torch", "commit", "command"],
        "starts": [start_row(start) for start in run.starts],
        "facts": metadata(run),
        "changed": changed_keys(run),
        "config_text": run.config_text(),
        "checkpoints": run.files(),
        "evaluations": [evaluation_row(row) for _, row in sorted(run.run.evals.items(), reverse=True)],
        "log": "\n".join(run.log[-LOG_LINES:]),
        "log_lines": LOG_LINES,
        "log_cut": len(run.log) > LOG_LINES,
    }


def summary(run: RunInfo) -> str:
    """Say in a line what was trained on what."""
    data, parameters = run.run.manifest.get("data", {}), run.run.manifest.get("parameters")
    parts = [
        f"{run.key('MODEL.NAME', ABSENT)}{f', {parameters / 1e6:.1f} million parameters' if parameters else ''}",
        f"{run.key('DATA.IMG_SIZE', ABSENT)} pixels",
        f"{data['train']:,} training and {data.get('val', 0):,} validation images" if "train" in data else "",
        f"{run.run.manifest['num_classes']:,} classes" if "num_classes" in run.run.manifest else "",
        f"batch {run.key('TRAIN.GLOBAL_BATCH', ABSENT)}",
        f"recipe {run.key('RECIPE.MODE', ABSENT)}",
    ]
    return ", ".join(part for part in parts if part)


def progress(run: RunInfo) -> dict[str, Any]:
    """Say how far the run is."""
    each = run.updates_per_epoch
    total = run.epochs * each if each else 0
    epoch = run.last / each if each else 0.0
    percent = 100.0 if run.status == "complete" else min(100 * run.last / total, 100) if total else 0.0
    note = f"update {run.last:,}{f' of {total:,}' if total else ''}"
    if run.status == "running":
        note += f"; last row {ago(run.written)}" if run.written else ""
        note += f"; about {lasting(left)} of training left" if (left := run.left(total)) else ""
    return {
        "title": f"{epoch:.{0 if epoch == int(epoch) else 1}f} / {run.epochs}",
        "percent": f"{percent:.1f}",
        "note": note,
    }


def result(run: RunInfo, which: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the best evaluation of the raw or EMA weights, beside the published figure if there is one."""
    row = run.run.evals[found["update"], which]
    published = run.published
    difference = f"{row['top1'] - published:+.2f} to the published {published}" if published else ""
    return {
        "weights": HEADLINES[which],
        "headline": which == run.key("RECIPE.HEADLINE", "raw"),
        "top1": f"{row['top1']:.3f}",
        "note": f"{row['correct1']:,} of {row['images']:,}, epoch {found['epoch']}; top-5 {row['top5']:.3f}",
        "published": difference,
    }


def cards(run: RunInfo) -> list[dict[str, str]]:
    """Return the numbers at the top of the page that are no accuracies."""
    found = []
    last = run.run.train[max(run.run.train)] if run.run.train else None
    if last:
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        found.append({"label": "training loss", "number": loss, "note": f"at update {last['update']:,}"})
    if rate := run.rate():
        waiting = f"; waiting for data {100 * last['data_share']:.0f}%" if last else ""
        devices = dict.fromkeys(str(start.get("device")) for start in run.starts)
        found.append(
            {"label": "images per second", "number": f"{rate:,.0f}", "note": f"median; {', '.join(devices)}{waiting}"}
        )
    if last and last.get("skipped_in_run"):
        note = f"not finite; {last['overflows_in_run']} of them fp16 overflows"
        found.append({"label": "skipped updates", "number": f"{last['skipped_in_run']:,}", "note": note})
    began = run.first_start()
    if began:
        number = len(run.starts)
        note = f"began {began:%Y-%m-%d %H:%M}"
        found.append({"label": "starts", "number": str(number), "note": note})
    return found


def start_row(start: Mapping[str, Any]) -> list[str]:
    """Return a start of the run as cells."""
    commit, changed = str(start.get("commit") or "unknown")[:10], start.get("changed_files")
    return [
        str(start.get("time", ABSENT)).replace("T", " ")[:19],
        f"{start.get('update', 0):,}",
        str(start.get("processes", ABSENT)),
        str(start.get("device", ABSENT)),
        str(start.get("packages", {}).get("torch", ABSENT)),
        f"{commit} + {changed} changed files" if changed else commit,
        " ".join(map(str, start.get("command", []))),
    ]


def metadata(run: RunInfo) -> list[tuple[str, str]]:
    """List what the manifest says of the run and of its last start."""
    found: dict[str, Any] = {}
    for name, value in run.run.manifest.items():
        if isinstance(value, Mapping):
            found |= {f"{name}: {key}": entry for key, entry in value.items()}
        elif name != "starts":
            found[name] = value
    for name, value in (run.starts[-1] if run.starts else {}).items():
        if name == "packages":
            found[name] = ", ".join(f"{package} {version}" for package, version in value.items())
        elif name not in ("config", "command", "time", "update"):
            found[name] = value
    return [(name.replace("_", " "), _counted(name, _brief(value))) for name, value in found.items()]


def evaluation_row(row: Mapping[str, Any]) -> list[str]:
    """Return an evaluation as cells."""
    counts = f"{row['correct1']:,} of {row['images']:,}"
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    top1 = f"{row['top1']:.3f}{' best' if row.get('best') else ''}"
    which = HEADLINES.get(row["weights"], row["weights"])
    seconds = f"{row['seconds']:.1f}" if "seconds" in row else ABSENT
    return [str(row["epoch"] + 1), f"{row['update']:,}", which, top1, counts, f"{row['top5']:.3f}", loss, seconds]


def changed_keys(run: RunInfo) -> list[tuple[str, str, str]]:
    """List the config keys that differ from their defaults: key, value, default; a key that is gone has none."""
    defaults = config.defaults()
    known = set(config.keys(defaults))
    found = []
    for name, value in _flat(run.config).items():
        default = config.get(defaults, name) if name in known else ABSENT
        if value != default and not (name == "PUBLISHED" or name.startswith("PUBLISHED.")):
            found.append((name, _value(value), _value(default)))
    return found


def compare(runs: Sequence[RunInfo]) -> list[tuple[str, list[str]]]:
    """Return the table of runs side by side, as rows of a name and a value for each run."""
    rows: list[tuple[str, list[str]]] = [
        ("status", [run.status for run in runs]),
        ("model", [str(run.key("MODEL.NAME", ABSENT)) for run in runs]),
        ("epochs", [progress(run)["title"] for run in runs]),
    ]
    for which, label in HEADLINES.items():
        found = [next((best for name, best in run.results() if name == which), None) for run in runs]
        if any(found):
            best = [f"{one['top1']:.3f} (epoch {one['epoch']})" if one else ABSENT for one in found]
            rows.append((f"best top-1, {label} weights", best))
    if any(run.published for run in runs):
        rows.append(("published top-1", [str(run.published or ABSENT) for run in runs]))
    rates = [run.rate() for run in runs]
    rows.append(("images per second, median", [f"{rate:,.0f}" if rate else ABSENT for rate in rates]))
    for other in range(1, len(runs)):
        for name, first, value in manifest_differences(runs[0].run.manifest, runs[other].run.manifest):
            row = next((values for known, values in rows if known == name), None)
            if row is None:
                row = [_counted(name, first)] * len(runs)
                rows.append((name, row))
            row[other] = _counted(name, value)
    return rows


def differing_keys(runs: Sequence[RunInfo]) -> list[list[str]]:
    """List the config keys in which runs differ: the key, then each run's value."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [[key, *(_value(one.get(key, ABSENT)) for one in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def picture(path: Path) -> dict[str, Any] | None:
    """Return a picture with its data in the page: as it is, or as a JPEG where that is smaller; None if it is damaged."""
    stored = path.read_bytes()
    try:
        image = Image.open(io.BytesIO(stored)).convert("RGB")
    except (OSError, SyntaxError):  # Pillow's words for a PNG that ends early, or is none
        return None
    small = max(image.size) <= SIDE
    image.thumbnail((SIDE, SIDE))
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=QUALITY, subsampling=0)
    kind, found = ("png", stored) if small and len(stored) <= packed.tell() else ("jpeg", packed.getvalue())
    epoch = path.parent.name.removeprefix("epoch_")
    after = f", after epoch {int(epoch)}" if epoch.isdecimal() else ""
    number, _, label = path.stem.partition("_")
    title = (
        f"What the model makes of an image of the class {label}"
        if number.isdecimal()
        else "The first batch, as the model gets it"
    )
    return {
        "uri": DATA_URI.format(kind, base64.b64encode(found).decode()),
        "caption": f"{title}{after}",
        "width": image.width,
        "height": image.height,
        "large": not number.isdecimal(),
    }


def _names(runs: Sequence[RunInfo]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _value(value: Any) -> str:
    return repr(value) if value == "" else str(value)


def _counted(name: str, text: str) -> str:
    """Write a large count so that it can be read; a seed is none."""
    return f"{int(text):,}" if text.isdecimal() and len(text) > 3 and name != "seed" else text


def _brief(value: Any) -> str:
    if not isinstance(value, list):
        return ABSENT if value is None else str(value)
    return ", ".join(map(str, value[:LISTED])) + (f", ... ({len(value):,})" if len(value) > LISTED else "")


def _write(file: Path, text: str) -> None:
    file.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
