"""The launch scripts check their arguments and start what they print."""

import subprocess

import pytest

from .conftest import ROOT

SCRIPT = "launch_scripts/torchrun.sh"


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, *argv], cwd=ROOT, capture_output=True, text=True)


def test_help_is_printed():
    done = run("--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ((), "no CONFIG"),
        (("nothing.yaml",), "nothing.yaml does not exist"),
        (("-g", "many", "configs/demo.yaml"), "not a number: many"),
        (("-n", "2", "configs/demo.yaml"), "-a ADDRESS"),
        (("-n", "2", "-r", "2", "-a", "host", "configs/demo.yaml"), "-r 2 must be below -n 2"),
        (("--nodes", "configs/demo.yaml"), "unknown option"),
    ],
)
def test_wrong_arguments_are_named(argv, hint):
    done = run(*argv)
    assert done.returncode == 2
    assert hint in done.stderr


@pytest.mark.slow
def test_two_processes_train(small_cfg, tmp_path):
    done = run("-g", "2", str(small_cfg), "--output", str(tmp_path), "--opts", "TRAIN.EPOCHS", "1")
    assert done.returncode == 0, done.stderr
    assert "--nproc_per_node 2" in done.stdout
    assert "processes  2 (torchrun)" in done.stdout
    assert "done: best" in done.stdout
