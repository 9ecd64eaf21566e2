"""Fixtures shared by the suite: a small picture folder, and runs of the entry points in this or in several processes."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin make a shared machine crawl

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.register_assert_rewrite("tests.helpers")  # before any of them is imported

ROOT = Path(__file__).parent.parent
CLASSES = ("blue", "green", "red")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))  # fewer where OMP_NUM_THREADS says so


def draw_folder(root: Path, train: int, val: int) -> Path:
    """Draw `train` and `val` JPEGs a class: noise with a tint that tells the class."""
    rng = np.random.RandomState(0)
    for split, count in (("train", train), ("val", val)):
        for index, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 120, (36 + i % 5, 40, 3))
                pixels[..., 2 - index] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes with 16 training and 5 validation images each."""
    return draw_folder(tmp_path_factory.mktemp("pictures"), 16, 5)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a test out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def small_cfg(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A config of 3 epochs of 6 updates of 8 images that a CPU runs in seconds."""
    path = tmp_path_factory.mktemp("cfg") / "small.yaml"
    path.write_text(f"""
NAME: small
DEVICE: cpu
MODEL: {{NAME: test_efficientnet, DROP_PATH_RATE: 0.2}}
DATA: {{PATH: {pictures}, IMG_SIZE: 32, EVAL_RESIZE: 36, WORKERS: 0}}
TRAIN: {{EPOCHS: 3, GLOBAL_BATCH: 8, MICRO_BATCH: 4, AMP: "off", CLIP_GRAD: 5.0}}
OPTIM: {{LR: 1e-3}}
SCHEDULE: {{WARMUP_EPOCHS: 0.5}}
EMA: {{DECAY: 0.9}}
EVAL: {{BATCH: 4}}
LOG: {{EVERY: 4, TENSORBOARD: false}}
""")
    return path


def run_python(*argv: str, processes: int = 0, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script of the repository; with `processes` under torchrun, each with one thread."""
    launcher = [sys.executable]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"COLUMNS": "200"}
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([*launcher, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """Return run_python."""
    return run_python
