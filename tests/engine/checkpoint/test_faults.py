"""Kill -9 at random moments, up to five in a run: the continued run equals the uninterrupted one.

The moments lie in training, evaluation, writing, in the summary of a start, after the last update, and where `done` is written.
The suite runs a few seeds, always the same; `pytest -m faults` draws 50 new ones each time. It prints the first of them, with
which FAULTS_SEED=<first> pytest -m faults repeats the run.
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.files import load_state
from tests.conftest import ROOT
from tests.helpers.fault_server import PHASES

pytestmark = [pytest.mark.faults, pytest.mark.slow]

FEW, ALL = 6, 50


@cache
def seeds_of(expression):
    """Return the seeds of a run of pytest with `-m expression`, the same in all workers of pytest-xdist."""
    every_night = expression == "faults"
    drawn = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**6) if every_night else 0
    first = int(os.environ.get("FAULTS_SEED", drawn))
    return range(first, first + (ALL if every_night else FEW))


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", seeds_of(metafunc.config.option.markexpr))


@pytest.fixture(scope="module")
def killed(request, small_cfg, tmp_path_factory):
    """Folder with the runs of fault_server.py."""
    folder = tmp_path_factory.mktemp("faults")
    config = folder / "config.yaml"
    config.write_text(
        small_cfg.read_text().replace("test_efficientnet", "test_vit").replace("EVERY: 4,", "EVERY: 1,")
        + "CHECKPOINT: {EVERY_UPDATES: 2}\n"
    )
    seeds = seeds_of(request.config.option.markexpr)
    again = f"FAULTS_SEED={seeds[0]} runs these {len(seeds)} seeds again"
    if reporter := request.config.pluginmanager.get_plugin("terminalreporter"):
        reporter.write_line(f"\n{again}")
    command = [sys.executable, "-m", "tests.helpers.fault_server", config, folder, str(seeds[0]), str(len(seeds))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{again}\n{done.stdout}{done.stderr}"
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
    assert list(a) == list(b)
    for part in a:
        torch.testing.assert_close(comparable(a[part]), comparable(b[part]), rtol=0, atol=0)


def comparable(tree):
    """Replace what assert_close does not compare, such as texts and None, by its repr."""
    if isinstance(tree, dict):
        return {key: comparable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [comparable(value) for value in tree]
    return tree if isinstance(tree, torch.Tensor | float) else list(repr(tree).encode())


def test_best_weights_are_kept(killed, seed):
    for which in ("raw", "ema"):
        a, b = (load_file(killed / name / f"small/best_{which}.safetensors") for name in ("whole", str(seed)))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_directory_holds_the_same_files_and_nothing_temporary(killed, seed):
    a, b = ({str(p.relative_to(run)) for p in run.rglob("*")} for run in (killed / "whole", killed / str(seed)))
    assert a == b
