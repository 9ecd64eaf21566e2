"""Kill -9 at random moments of training, evaluation and checkpointing: the continued run equals the uninterrupted one.

A few seeds in the suite; `pytest -m faults` runs 50.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.files import load_state
from tests.conftest import ROOT
from tests.helpers.fault_server import PHASES

pytestmark = [pytest.mark.faults, pytest.mark.slow]

FEW, ALL = 8, 50


def number_of_seeds(config):
    return ALL if config.option.markexpr == "faults" else FEW


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(number_of_seeds(metafunc.config)))


@pytest.fixture(scope="module")
def killed(request, small_cfg, tmp_path_factory):
    """Folder with the runs of fault_server.py."""
    folder = tmp_path_factory.mktemp("faults")
    config = folder / "config.yaml"
    config.write_text(
        small_cfg.read_text().replace("test_efficientnet", "test_vit").replace("EVERY: 4,", "EVERY: 1,")
        + "CHECKPOINT: {EVERY_UPDATES: 2}\n"
    )
    command = (sys.executable, "-m", "tests.helpers.fault_server", config, folder, str(number_of_seeds(request.config)))
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def rows(run):
    timed = ("images_per_s", "data_share", "seconds")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in timed} for row in found]


def test_uninterrupted_run_has_a_row_for_every_update(killed):
    updates = [row["update"] for row in rows(killed / "whole/small") if row["kind"] == "train"]
    assert updates == list(range(1, 19))


def test_kills_come_in_every_phase(killed):
    kills = json.loads((killed / "kills.json").read_text())
    assert set(Counter(phase for seed in kills.values() for phase in seed)) == set(PHASES)


def test_no_update_is_lost_or_repeated(killed, seed):
    assert rows(killed / str(seed) / "small") == rows(killed / "whole/small")


def test_state_ends_bitwise_the_same(killed, seed):
    a, b = (load_state(killed / name / "small/checkpoints/update-00000018.pt") for name in ("whole", str(seed)))
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert a["best"] == b["best"]


def test_best_weights_are_kept(killed, seed):
    for which in ("raw", "ema"):
        a, b = (load_file(killed / name / f"small/best_{which}.safetensors") for name in ("whole", str(seed)))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_directory_holds_the_same_files_and_nothing_temporary(killed, seed):
    a, b = ({str(p.relative_to(run)) for p in run.rglob("*")} for run in (killed / "whole", killed / str(seed)))
    assert a == b
