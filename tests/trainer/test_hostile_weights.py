"""Hostile files of weights through every command that reads them: no crash, no traceback, bounded time and memory."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers import hostile_states
from tests.helpers.hostile_weights import harmless_files, hostile_files, odd_files
from tests.helpers.weights_entry_points import CFG, train

TOOLS, SCRIPTS, RESUMING = ("predict", "convert", "export", "visualize"), ("eval", "init", "teacher"), ("resume", "run")
WITHOUT_MAPS_OR_NAMES = ("convert", "export", "visualize")  # refuse the good file: its model is none of ours
SECONDS, MIB = 30, 200
HOSTILE, OTHERS = hostile_files(), odd_files() | harmless_files()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of all files, and their names: hostile, others."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, content in (HOSTILE | OTHERS).items():
        (folder / name.replace("/", "_")).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def good_state(tmp_path_factory, pictures):
    """A checkpoint in the middle of a run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(CFG.format(pictures=pictures))
    assert train(folder) == 0
    return folder / "output/small/checkpoints/update-00000006.pt"


def run(commands, pictures, tmp_path, files):
    """Return the rows of every command and file."""
    argv = ["-m", "tests.helpers.weights_entry_points", ",".join(commands), pictures, tmp_path, *files]
    env = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=env, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (rows[-1:], done.stderr[-2000:])
    assert len(rows) == len(commands) * len(files)
    return rows


def check(rows, must_fail):
    """Check that each row is a success or an error of one sentence, an error where the file is in `must_fail`."""
    for row in rows:
        assert row["status"] in (0, 2), row
        assert "Traceback" not in row["stderr"], row
        assert row["seconds"] < SECONDS, row
        assert row["mib"] < MIB, row
        assert "memory" not in row["stderr"], row
        assert len(row["stderr"]) < 2000, row
        if row["status"] or row["file"] in must_fail:
            assert row["status"] == 2, row
            name = row["file"].rpartition("/")[2] if row["command"] != "run" else "update-00000002.pt"
            assert any(text in row["stderr"] for text in (name, "--model", "hostile_net has no")), row
            assert "\x1b" not in row["stderr"], row


def some(names, part, parts):
    return list(names)[part::parts]


@pytest.mark.parametrize("commands", [TOOLS, SCRIPTS, RESUMING], ids="-".join)
def test_hostile_weights_are_refused_in_a_sentence(commands, pictures, tmp_path, files, good_state):
    number = (TOOLS, SCRIPTS, RESUMING).index(commands)
    chosen = [files / name.replace("/", "_") for name in some(HOSTILE, number, 5) + some(OTHERS, number, 5)]
    first = good_state if commands is RESUMING else files / "good.safetensors"
    rows = run(commands, pictures, tmp_path, [first, *chosen])
    for row in rows[: len(commands)]:
        assert row["status"] == (2 if row["command"] in WITHOUT_MAPS_OR_NAMES else 0), row
    check(rows, {str(files / name) for name in HOSTILE})
    assert sum(row["status"] == 2 for row in rows) > 45 * len(commands)


@pytest.mark.slow
@pytest.mark.parametrize("command", [*TOOLS, *SCRIPTS, *RESUMING])
def test_every_hostile_file_through_every_command(command, pictures, tmp_path, files, good_state):
    first = good_state if command in RESUMING else files / "good.safetensors"
    rows = run([command], pictures, tmp_path, [first, *sorted(files.iterdir())])
    check(rows, {str(files / name) for name in HOSTILE})


def test_hostile_states_are_refused_or_continued(pictures, tmp_path, good_state):
    paths = hostile_states.write_states(good_state, tmp_path)[::5]
    rows = run(["resume"], pictures, tmp_path, [good_state, *paths])
    assert rows[0]["status"] == 0
    check(rows, set())
    assert sum(row["status"] == 2 for row in rows) > 50


def test_moments_of_another_shape_are_refused(pictures, tmp_path, good_state):
    """Fused kernels on the CPU check no shapes: they would write beyond smaller moments."""
    paths = [p for p in hostile_states.write_states(good_state, tmp_path) if "'state' 0 'exp_avg" in p.name]
    rows = run(["continue"], pictures, tmp_path, [good_state, *paths])
    assert [row["status"] for row in rows] == [0] + [2] * 10
    assert all("does not fit" in row["stderr"] or "none of a checkpoint" in row["stderr"] for row in rows[1:])


@pytest.mark.slow
def test_hostile_states_that_are_continued_train_on(pictures, tmp_path, good_state):
    check(
        run(["continue"], pictures, tmp_path, [good_state, *hostile_states.write_states(good_state, tmp_path)]), set()
    )
