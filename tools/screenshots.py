"""Regenerate the pictures in docs/images: the live view, the report, attention maps; from the demo data set only.

    python -m tools.screenshots            (make screenshots)

Trains the demo, and two small models briefly, on a pseudo-terminal: ten minutes to an hour on two cores. Complete runs under
--work are used again. Needs a headless Chromium and matplotlib.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console

from config.command_line import Parser
from tools import report
from tools.browser import MISSING, find_browser, screenshot
from tools.demo import draw_dataset
from tools.run_info import RunInfo
from tools.terminal_recorder import record, screen_when

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, ROWS = 100, 24
LIMIT = 300_000  # bytes of an image in the repository
SHEET = 1400  # width in pixels of the attention maps' sheet
BRIEFLY = ("--opts", "TRAIN.EPOCHS", "3", "SCHEDULE.WARMUP_EPOCHS", "0.5")
RUNS: dict[str, tuple[str, ...]] = {  # run directory: arguments of train.py
    "demo": ("--cfg", "configs/demo.yaml"),
    "sgformer_small_64": ("--cfg", "configs/sgformer/small_64.yaml", *BRIEFLY),
    "stvit_small_64": ("--cfg", "configs/stvit/small_64.yaml", *BRIEFLY),
}
ATTENTION_MAPS = {"demo": "groupmixformer", "sgformer_small_64": "sgformer", "stvit_small_64": "stvit"}
PICTURE = "spiral"  # attention maps are of this class's most nearly square validation picture
SIZE = 224  # side in pixels of the models' input for them


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser("Regenerate the pictures in docs/images from the demo data set.")
    parser.prog = "python -m tools.screenshots"
    parser.add_argument(
        "--work",
        metavar="DIR",
        default="output/screenshots",
        help="folder for the data and the runs (output/screenshots)",
    )
    parser.add_argument("--out", metavar="DIR", default="docs/images", help="folder for the pictures (docs/images)")
    args = parser.parse_args(argv)
    work, out = Path(args.work), Path(args.out)
    try:
        if find_browser() is None:
            raise ValueError(MISSING)
        out.mkdir(parents=True, exist_ok=True)
        draw_dataset(work / "data")
        for name in RUNS:
            train(work, name)
        (out / "live.svg").write_text(
            draw_live_view(work / "demo.terminal", r"epoch +4/6.*update +(7|8|9)\d/125"), encoding="utf-8"
        )
        draw_reports(work, out)
        first = work / "stvit_small_64" / "pictures" / "first_batch.png"
        save_small(Image.open(first), out / "first_batch.png")
        for name, family in ATTENTION_MAPS.items():
            save_attention_maps(work, name, out / f"attention_maps_{family}.jpg")
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        parser.fail(error)
    for path in sorted(out.iterdir()):
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")
    return 0


def train(work: Path, name: str) -> None:
    """Train a run on a pseudo-terminal, unless it is complete."""
    if (work / name / "done").is_file() and (work / f"{name}.terminal").is_file():
        return
    shutil.rmtree(work / name, ignore_errors=True)
    Console().print(f"training {work / name} ...", markup=False)
    folders = ("--data-path", str(work / "data"), "--output", str(work))
    argv = [sys.executable, str(ROOT / "train.py"), *folders, *RUNS[name]]
    if record(argv, work / f"{name}.terminal", COLUMNS, ROWS, os.environ):
        raise ValueError(f"{' '.join(argv)} failed; its output is in {work / name}.terminal")


def draw_live_view(recorded: Path, moment: str) -> str:
    """Return an SVG of a recorded training at the moment when the screen's text matches a pattern."""
    pattern = re.compile(moment, re.S)
    found = screen_when(recorded.read_bytes().decode(), "╯", lambda text: bool(pattern.search(text)))
    return found.svg(COLUMNS, ROWS, "python train.py --cfg configs/demo.yaml --data-path output/demo-data")


def draw_reports(work: Path, out: Path) -> None:
    """Take screenshots of the report: one run on a desktop and on a telephone, two runs in the dark theme."""
    one, two = ([RunInfo.read(work / name) for name in names] for names in (["demo"], list(ATTENTION_MAPS)[1:]))
    for name, runs, width, height, theme in (
        ("report", one, 1280, 1560, "light"),
        ("report_two_runs", two, 1280, 1560, "dark"),
        ("report_phone", one, 500, 1100, "light"),
    ):
        page, shot = work / f"{name}.html", work / f"{name}.png"
        page.write_text(report.render(runs), encoding="utf-8")
        if messages := screenshot(page, shot, width, height, theme):
            raise ValueError(f"{page}: its scripts write to the console: {'; '.join(messages)}")
        save_small(Image.open(shot), out / f"{name}.png")


def save_attention_maps(work: Path, name: str, out: Path) -> None:
    """Draw the attention maps of a trained model for a validation picture."""
    photo, folder = (
        min((work / "data" / "val" / PICTURE).glob("*.jpg"), key=elongation),
        work / f"attention_maps_{name}",
    )
    weights = ("--checkpoint", str(work / name / "best_raw.safetensors"), "--size", str(SIZE))
    argv = [sys.executable, "-m", "tools.visualize", str(photo), *weights, "--out", str(folder)]
    subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    image = Image.open(folder / "sheet.png").convert("RGB")
    save_small(image.resize((SHEET, round(image.height * SHEET / image.width)), Image.Resampling.LANCZOS), out)


def elongation(path: Path) -> tuple[float, str]:
    """Return a picture's aspect ratio, longer to shorter side, and its name."""
    with Image.open(path) as image:
        return max(image.size) / min(image.size), path.name


def save_small(image: Image.Image, path: Path) -> None:
    """Write an image as a PNG of 256 colours or a JPEG. Raises ValueError if the file is larger than LIMIT."""
    image = image.convert("RGB")
    if path.suffix == ".png":
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    else:
        image.save(path, quality=85, optimize=True)
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {LIMIT:,}; draw it smaller")


if __name__ == "__main__":
    sys.exit(main())
