"""Digest the results of short trainings, for comparing two versions of the code number for number.

    python -m tests.helpers.behaviour OUT.json
    python -m tests.helpers.behaviour NEW.json --compare OLD.json

Trains one model of each family on drawn pictures with one CPU thread in float32, continues a copy of each run from a checkpoint in
the middle of an epoch, evaluates it, and writes a digest of everything that came of it: batches, weights, optimizer state, metrics,
results, names and shapes. The exit status is 1 if a digest differs from that in OLD.json. Equality is to be expected on one kind of
CPU with the same packages only; the file says which those were.
"""

import os

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "AVX2",  # the same instructions, and with them the same rounding, on newer CPUs too
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
os.environ.update(ONE_THREAD)  # before torch

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from tests.helpers.digests import ROOT, TIMED, digest_batches, digest_run, masked, sha

TRAIN, EVALUATE, COMPARE = ["train.py"], ["eval.py"], ["-m", "tools.compare"]  # the commands
CLASSES, TRAIN_IMAGES, VAL_IMAGES = ("ant", "bee", "cat", "dog"), 12, 5  # images of each class
MIDDLE = 4  # the update of a checkpoint inside the second epoch

SHARED: dict[str, Any] = {
    "DEVICE": "cpu",
    "MODEL": {"DROP_PATH_RATE": 0.2},
    "DATA": {"IMG_SIZE": 32, "EVAL_RESIZE": 40, "WORKERS": 0},
    "AUG": {"ERASE_PROB": 0.5},
    "TRAIN": {"EPOCHS": 2, "GLOBAL_BATCH": 16, "MICRO_BATCH": 16, "AMP": "off", "SEED": 3, "CLIP_GRAD": 5.0},
    "SCHEDULE": {"WARMUP_EPOCHS": 0.5},
    "EMA": {"DECAY": 0.9},
    "EVAL": {"BATCH": 8},
    "CHECKPOINT": {"EVERY_UPDATES": MIDDLE, "KEEP": 9},
    "LOG": {"EVERY": 1, "TENSORBOARD": False, "PICTURES_EVERY": 0},
}
RUNS: dict[str, dict[str, Any]] = {
    "sgformer": {
        "MODEL": {"NAME": "sgformer_small"},
        "DATA": {"INTERPOLATION": "random"},
        "AUG": {"ORDER": "mix_then_erase", "ERASE_COUNT": 2, "ERASE_MODE": "rand"},
        "RECIPE": {"HEADLINE": "ema"},
        "OPTIM": {"LAYER_DECAY": 0.75},
        "SCHEDULE": {"UNIT": "epoch", "WARMUP_EPOCHS": 1},
    },
    "groupmixformer": {
        "MODEL": {"NAME": "groupmixformer_mobile", "DROP_RATE": 0.1},
        "TRAIN": {"MICRO_BATCH": 8},
        "EVAL": {"FLIP": True, "MODE": "border"},
        "LOG": {"TENSORBOARD": True, "PICTURES_EVERY": 1},
    },
    "stvit": {
        "MODEL": {"NAME": "stvit_small"},
        "AUG": {"REPEATS": 3, "MIX_PROB": 0.7},
        "OPTIM": {"LR": 5e-4, "SCALE_BATCH": 512},
        "SCHEDULE": {"SCALED": True, "DELAY": 1},
    },
    "timelines": {
        "MODEL": {"NAME": "test_efficientnet", "DROP_PATH_RATE": 0.0},
        "AUG": {"ERASE_MODE": "const", "LABEL_SMOOTHING": 0.0},
        "TRAIN": {"EPOCHS": 3, "MICRO_BATCH": 8},
        "OPTIM": {"NAME": "sgd", "LR": 0.01},
        "SCHEDULE": {"NAME": "step", "DECAY_EPOCHS": 1.0},
        "TIMELINE": {
            "DROP_PATH_RATE": "0:0.1 -> 2:0.3",
            "EMA_DECAY": "0:0.5, 1:0.9",
            "MAGNITUDE": "0:3 -> 2:9",
            "MIX_PROB": "0:1, 2:0",
            "IMG_SIZE": "0:32 -> 2:64",
        },
        "DISTILL": {"TYPE": "soft", "TEACHER": "groupmixformer_mobile"},
    },
}


def load_config(file: Path) -> Any:
    """Return the config of a YAML file: with the next two, all that is imported from the project."""
    import config

    return config.load(str(file))


def dump_config(cfg: Any) -> str:
    """Return a config as YAML."""
    import config

    return config.dump(cfg)


def load_data(cfg: Any) -> Any:
    """Return the data of a training run, with `train`, `val` and `stage`."""
    from data.build import build_data

    return build_data(cfg, 0, 1, "cpu")


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Return trees of settings laid over each other."""
    found: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            found[key] = merged(found.get(key, {}), value) if isinstance(value, Mapping) else value
    return found


def draw_pictures(folder: Path) -> None:
    """Draw the classes' images in folders, in several sizes and modes, and put all of them into archives as well."""
    rng = np.random.RandomState(5)
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = 70 + 9 * (i % 4), 100 - 11 * (i % 5)
                rows, columns = np.mgrid[:height, :width]
                wave = 60 * np.sin((rows * (label + 1) + columns * (i + 1)) / 12.0)
                pixels = 128 + wave[..., None] + rng.randint(-40, 40, (height, width, 3))
                pixels[..., label % 3] += 25
                picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                if i % 6 == 5:
                    picture = picture.convert("L")
                picture.save(folder / split / name / f"{i:02d}.jpg", quality=85 + i % 10)
        (folder / "tars").mkdir(exist_ok=True)
        with tarfile.open(folder / "tars" / f"{split}.tar", "w") as tar:
            for file in sorted((folder / split).rglob("*.jpg")):
                tar.add(file, str(file.relative_to(folder / split)))


def command(argv: Sequence[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a command of the project; raise RuntimeError with its output if it fails."""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"COLUMNS": "200", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stdout}{done.stderr}")
    return done


def evaluate(run: Path, cfg: Path, folder: Path) -> dict[str, Any]:
    """Return the output of eval.py for a run's last checkpoint, and for its best weights with --fold."""
    last = max((run / "checkpoints").iterdir())
    tables = {
        flag: folder / f"{flag}.{end}" for flag, end in (("json", "json"), ("per-class", "csv"), ("predictions", "csv"))
    }
    flags = [str(part) for flag, path in tables.items() for part in (f"--{flag}", path)]
    asked = [*EVALUATE, "--cfg", str(cfg), "--checkpoint"]
    found = {"both": masked(command([*asked, str(last), "--weights", "both", *flags], folder).stdout, folder)}
    summary = json.loads(tables["json"].read_text())
    for numbers in summary["results"].values():
        for key in TIMED:
            numbers.pop(key, None)
    found["json"] = masked(json.dumps(summary, sort_keys=True), folder)
    for flag in ("per-class", "predictions"):
        for which in ("raw", "ema"):
            table = tables[flag].with_stem(f"{flag}_{which}")
            found[f"{flag}/{which}"] = sha(masked(table.read_text(), folder))
    best = run / "best_ema.safetensors"
    found["folded"] = masked(command([*asked, str(best), "--fold"], folder).stdout, folder)
    return found


def cut(run: Path, target: Path) -> None:
    """Copy a run directory as it was after the checkpoint in the middle: without later ones, marks and best weights."""
    shutil.copytree(run, target)
    for file in (target / "checkpoints").iterdir():
        if file.stem > f"update-{MIDDLE:08d}":
            file.unlink()
    for file in (*target.glob("best_*"), target / "done"):
        file.unlink()


def digest_family(name: str, folder: Path, teacher: Path) -> dict[str, Any]:
    """Train, train again from the middle, evaluate, compare; return the digests of it all."""
    settings = merged(
        SHARED, RUNS[name], {"NAME": name, "OUTPUT": str(folder), "DATA": {"PATH": str(folder / "pictures")}}
    )
    if "DISTILL" in settings:
        settings["DISTILL"]["TEACHER_WEIGHTS"] = str(teacher)
    cfg = folder / f"{name}.yaml"
    cfg.write_text(yaml.safe_dump(settings))
    found: dict[str, Any] = {
        f"data/{key}": value for key, value in digest_batches(load_data(load_config(cfg)), (0, 1)).items()
    }
    if name == "timelines":
        found["dry run"] = masked(command([*TRAIN, "--cfg", str(cfg), "--dry-run"], folder).stdout, folder)
    command([*TRAIN, "--cfg", str(cfg)], folder)
    whole, continued = folder / name, folder / f"{name}-continued"
    found |= {f"run/{key}": value for key, value in digest_run(whole, folder).items()}
    cut(whole, continued)
    command([*TRAIN, "--cfg", str(cfg), "--tag", "continued"], folder)
    found |= {f"continued/{key}": value for key, value in digest_run(continued, folder, MIDDLE + 1).items()}
    if name != "timelines":
        found["compare"] = masked(command([*COMPARE, str(whole), str(continued)], folder).stdout, folder)
        found |= {f"eval/{key}": value for key, value in evaluate(whole, cfg, folder).items()}
    if name == "groupmixformer":
        shutil.copy(whole / "best_raw.safetensors", teacher)
    shutil.rmtree(whole)
    shutil.rmtree(continued)
    return found


def digest_archives(folder: Path) -> dict[str, str]:
    """Return digests of the batches from archives in a block shuffle, made by worker processes."""
    data = {"PATH": str(folder / "pictures" / "tars"), "BLOCK_SHUFFLE": 4, "WORKERS": 2}
    cfg = folder / "archives.yaml"
    cfg.write_text(yaml.safe_dump(merged(SHARED, {"DATA": data})))
    return digest_batches(load_data(load_config(cfg)), (0,))


def measure() -> dict[str, Any]:
    """Return all digests, and what they depend on besides the code."""
    packages = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy", "pillow")}
    found: dict[str, Any] = {"environment": {"python": platform.python_version(), **packages}}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        draw_pictures(folder / "pictures")
        for path in sorted((ROOT / "configs").rglob("*.yaml")):
            if path.parent.name != "_base_":
                found[f"config/{path.relative_to(ROOT)}"] = sha(dump_config(load_config(path)))
        found |= {f"archives/{key}": value for key, value in digest_archives(folder).items()}
        for family in RUNS:
            digests = digest_family(family, folder, folder / "teacher.safetensors")
            found |= {f"{family}/{key}": value for key, value in digests.items()}
            print(f"{family}: {len(digests)} digests", flush=True)
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the keys whose values are not the same, with both values."""
    keys = dict.fromkeys((*old, *new))
    return [
        f"{key}:\n  - {old.get(key, 'absent')}\n  + {new.get(key, 'absent')}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Digest what short trainings do.")
    parser.add_argument("out", type=Path, metavar="OUT.json", help="file to write the digests to")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="file with the digests to compare with")
    args = parser.parse_args(argv)
    found = measure()
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    if not args.compare:
        return 0
    apart = differences(json.loads(args.compare.read_text()), json.loads(args.out.read_text()))
    print("\n".join(apart) or f"all {len(found)} digests are the same")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
