"""Workspace in which documented commands run: the checkout's files, small data, and two finished runs."""

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import train as train_script
from tests.conftest import draw_folder
from tests.helpers.documented import PAGES, ROOT, read

SMALL = ("MODEL.NAME=test_efficientnet", "DATA.IMG_SIZE=32", "DATA.EVAL_RESIZE=36")
SHORT = (
    *("TRAIN.EPOCHS=1", "TRAIN.GLOBAL_BATCH=4", "TRAIN.MICRO_BATCH=2", "TRAIN.AMP=off", "DEVICE=cpu", "DATA.WORKERS=0"),
    *("SCHEDULE.WARMUP_EPOCHS=0", "SCHEDULE.MIN_LR=0", "EVAL.BATCH=4", "LOG.TENSORBOARD=false"),
)
WORDNET_IDS = ("n01440764", "n01443537", "n01484850")  # ImageNet's first classes


@dataclass
class Workspace:
    """Folder with the checkout's files, the pages' files, data, and a finished run."""

    path: Path
    substitutes: dict[str, str]  # placeholder in the documentation -> existing path
    run: Path
    dry_runs: set[tuple[str, ...]] = field(default_factory=set)  # already done, not repeated

    def substitute(self, word: str) -> str:
        """Return the existing path for a placeholder in a documented command, other words unchanged."""
        if word in self.substitutes:
            return self.substitutes[word]
        if re.search(r"best_(raw|ema)\.safetensors$", word) and not Path(word).exists():
            return str(self.run / Path(word).name)
        return str(max(self.run.glob("checkpoints/*"))) if "/update-" in word else word

    def new_output(self) -> str:
        """Return a value of OUTPUT that no command has used."""
        return str(self.path / f"runs/{sum(1 for _ in self.path.glob('runs/*'))}")


def link_checkout(path: Path) -> Path:
    """Fill a folder with links to the checkout's files, and with the titled blocks of all pages as files."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("output", "mine"):
            (path / entry.name).symlink_to(entry)
    for page in PAGES:
        for block in read(page)[0]:
            if block.title:
                (path / block.title).parent.mkdir(exist_ok=True)
                (path / block.title).write_text(block.text)
    return path


def build_workspace(path: Path) -> Workspace:
    """Draw data into a linked checkout, train two small runs, and return the workspace."""
    data = rename_as_imagenet(draw_folder(path / "photographs", 4, 2))
    (path / "real.json").write_text(json.dumps([[i // 2] for i in range(6)]))
    rows = [f"{file},{file.parent.name},{file.parent.parent.name}" for file in sorted(data.rglob("*.JPEG"))]
    (path / "TABLE.csv").write_text("\n".join(["file,label,split", *rows]))
    small = ["--cfg", "configs/demo.yaml", "--data-path", str(data), "--opts", *options(SMALL + SHORT), "NAME"]
    with contextlib.chdir(path):
        for name in ("finished", "second"):
            assert train_script.main([*small, name]) == 0
    runs = {name: f"output/{run}" for name, run in (("RUN_A", "finished"), ("RUN_B", "second"))}
    runs |= {"output/A": "output/finished", "output/B": "output/second", "output/C": "output/second"}
    sets = {f"imagenet{name}": str(data / "val") for name in ("-a", "-r", "-sketch", "v2-matched-frequency-format-val")}
    weights = {"FILE": str(path / "output/finished/best_raw.safetensors"), "CONFIG": "configs/demo.yaml"}
    folders = dict.fromkeys(("DIR", "IMAGENET", "PATH", "imagenet"), str(data))
    return Workspace(path, folders | sets | runs | weights, path / "output/finished")


def rename_as_imagenet(data: Path) -> Path:
    """Give classes and validation images names like ImageNet's."""
    for number, folder in enumerate(sorted((data / "train").iterdir())):
        for split in ("train", "val"):
            (data / split / folder.name).rename(data / split / WORDNET_IDS[number])
    for number, file in enumerate(sorted((data / "val").rglob("*.jpg")), 1):
        file.rename(file.parent / f"ILSVRC2012_val_{number:08d}.JPEG")
    for file in (data / "train").rglob("*.jpg"):
        file.rename(file.with_suffix(".JPEG"))
    return data


def shortened(argv: list[str], cfg: str, *more: str) -> list[str]:
    """Insert the keys of a small run before the documented ones, and those of a short run after them."""
    at = argv.index("--opts") if "--opts" in argv else len(argv)
    small = () if cfg.startswith("mine/") else SMALL
    return [*argv[:at], "--opts", *options(small), *argv[at + 1 :], *options(SHORT), *more]


def options(pairs: tuple[str, ...]) -> list[str]:
    """Turn KEY=VALUE pairs into the words after --opts."""
    return [word for pair in pairs for word in pair.split("=")]
