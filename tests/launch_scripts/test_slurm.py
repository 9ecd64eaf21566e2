"""Batch scripts on a real SLURM: interrupted jobs are requeued, and the run ends with the result of an uninterrupted one."""

import json
import os
import stat
import sys
from itertools import pairwise

import pytest
import torch

from engine.checkpoint.files import load_state
from tests.conftest import ROOT
from tests.helpers.slurm_cluster import SlurmCluster, missing, wait_for
from tests.helpers.small_runs import rows
from tests.launch_scripts.test_launch_scripts import documented

pytestmark = pytest.mark.slurm

# 20 epochs of 6 updates on two processes; saved every 5 updates.
OPTS = ("TRAIN.EPOCHS", "20", "EVAL.EVERY", "5", "LOG.EVERY", "1", "CHECKPOINT.EVERY_UPDATES", "5")
LAST = "checkpoints/update-00000120.pt"

# Replaces python where only the script is tested: records its arguments; the first start waits for a signal.
FAKE_PYTHON = """#!{python}
import os, pathlib, signal, sys, time
run = pathlib.Path("{run}")
if sys.argv[2] == "tools.run_dir":
    sys.exit(print(run))
def save(*_):
    (run / "preempted").touch()
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
start, rank, env = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ["SLURM_PROCID"], os.environ
with (run / f"starts-{{rank}}").open("a") as file:
    print(f"start {{start}} of", *sys.argv, "at", env["MASTER_ADDR"] + ":" + env.get("MASTER_PORT", ""), file=file)
(run / f"up-{{rank}}").touch()
if (run / "fail").exists():
    while rank == "0" and len(list(run.glob("up-*"))) < int(env["SLURM_STEP_NUM_TASKS"]):
        time.sleep(0.01)
    sys.exit(3 if rank == "0" else 0)
if start == "0":
    time.sleep(100)
(run / "done").touch()
"""


@pytest.fixture(scope="module")
def slurm():
    lacking = missing()
    if lacking:
        text = f"SLURM not installed: apt-get install slurm-wlm munge; missing: {', '.join(lacking)}"
        assert not os.environ.get("REQUIRE_SLURM"), text
        pytest.skip(text)
    with SlurmCluster() as cluster:
        yield cluster


def make_fake(folder):
    """Create a replacement of the interpreter; return it and the run directory that it reports."""
    run = folder / "run"
    run.mkdir()
    python = folder / "python"
    python.write_text(FAKE_PYTHON.format(python=sys.executable, run=run))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python, run


@pytest.fixture
def fake(tmp_path):
    """Replacement of the interpreter and its run directory (make_fake)."""
    return make_fake(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def limited(slurm, tmp_path_factory):
    """Job that receives the warning before its time limit; it runs while the other tests do."""
    folder = tmp_path_factory.mktemp("limited")
    python, run = make_fake(folder)
    early = ("--time=1", "--signal=USR1@58")
    argv = ("launch_scripts/slurm.sbatch", "configs/demo.yaml")
    return submit(slurm, folder / "job.out", *argv, python=python, options=early), folder / "job.out", run


def submit(slurm, output, *argv, python=sys.executable, options=()):
    """Submit a script of the project from the repository, as in docs/clusters.md."""
    env = {"MASTER_ADDR": "127.0.0.1", "PYTHON": str(python), "OMP_NUM_THREADS": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
    options_of_all = ("--chdir", str(ROOT), "--output", str(output))
    return slurm.submit(*options_of_all, "-N", "2", *options, *map(str, argv), **env)


def explain(slurm, output, run):
    """Return the output of the job and its nodes, and the logs of SLURM, for the message of a failed test."""
    files = [output, *sorted(run.glob("logs/*/*"))]
    return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files if file.exists()) + slurm.logs()


def wait_for_end(slurm, job, output, run, expected="COMPLETED", seconds=240):
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: slurm.state(job) in ends, f"the end of the job\n{explain(slurm, output, run)}", seconds)
    assert slurm.state(job) == expected, explain(slurm, output, run)


def wait_for_start(slurm, job, restarts, ready):
    def started():
        return int(slurm.job_field(job, "Restarts")) == restarts and slurm.state(job) == "RUNNING" and ready()

    wait_for(started, f"start {restarts} of the job", 60)


def reached(run, update):
    metrics = run / "metrics.jsonl"
    return lambda: metrics.exists() and f'"update": {update},' in metrics.read_text()


@pytest.fixture(scope="module")
def uninterrupted(small_cfg, tmp_path_factory, run_script):
    """Run directory of the uninterrupted run on two processes of one machine."""
    output = tmp_path_factory.mktemp("uninterrupted")
    run_script("train.py", "--cfg", str(small_cfg), "--output", str(output), "--opts", *OPTS, processes=2)
    return output / "small"


@pytest.mark.slow
def test_run_that_is_requeued_twice_equals_the_uninterrupted_one(slurm, small_cfg, uninterrupted, tmp_path):
    run, output = tmp_path / "small", tmp_path / "job.out"
    argv = ("launch_scripts/slurm.sbatch", small_cfg, "--output", tmp_path, "--opts", *OPTS)
    job = submit(slurm, output, *argv)
    try:
        wait_for(reached(run, 12), "update 12", 120)
        slurm.run("scancel", "--signal=USR1", job)  # what SLURM sends before the time limit
        wait_for(lambda: slurm.job_field(job, "Restarts") == "1", "the requeue after USR1", 60)
        wait_for(reached(run, 50), "update 50", 120)
        slurm.run("scontrol", "requeue", job)  # as an administrator or a preempting partition does
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{explain(slurm, output, run)}") from error
    wait_for_end(slurm, job, output, run)
    assert_equals_the_uninterrupted_run(slurm, job, uninterrupted, run, requeues=2)


@pytest.mark.slow
def test_run_without_torchrun_is_requeued_and_equals_the_uninterrupted_one(slurm, small_cfg, uninterrupted, tmp_path):
    run, output = tmp_path / "small", tmp_path / "job.out"
    argv = ("launch_scripts/slurm_srun.sbatch", small_cfg, "--output", tmp_path, "--opts", *OPTS)
    job = submit(slurm, output, *argv)
    try:
        wait_for(reached(run, 12), "update 12", 120)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{explain(slurm, output, run)}") from error
    slurm.run("scancel", "--signal=USR1", job)
    wait_for_end(slurm, job, output, run)
    assert_equals_the_uninterrupted_run(slurm, job, uninterrupted, run, requeues=1)


def assert_equals_the_uninterrupted_run(slurm, job, uninterrupted, run, requeues):
    assert slurm.job_field(job, "Restarts") == str(requeues)
    starts = [start["update"] for start in json.loads((run / "manifest.json").read_text())["starts"]]
    assert starts == sorted(set(starts))
    assert len(starts) == 1 + requeues
    assert_same_run(uninterrupted, run)
    assert {path.name for path in (run / "logs").iterdir()} == {f"{job}-{start}" for start in range(1 + requeues)}
    assert (run / "done").is_file()
    assert not (run / "preempted").exists()


def assert_same_run(a, b):
    x, y = load_state(a / LAST), load_state(b / LAST)
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(x[part], y[part], rtol=0, atol=0)
    assert x["best"] == y["best"]
    assert rows(a) == rows(b)


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_srun.sbatch"])
def test_job_that_is_cancelled_stays_cancelled(slurm, fake, tmp_path, script):
    python, run = fake
    output = tmp_path / "job.out"
    job = submit(slurm, output, f"launch_scripts/{script}", "configs/demo.yaml", python=python)
    wait_for((run / "up-1").exists, "the second task", 30)
    slurm.run("scancel", job)
    wait_for_end(slurm, job, output, run, "CANCELLED", 60)
    assert (run / "preempted").exists()  # saved before it ended
    assert slurm.job_field(job, "Restarts") == "0"


def test_failure_fails_the_job_without_a_requeue(slurm, fake, tmp_path):
    python, run = fake
    (run / "fail").touch()
    output = tmp_path / "job.out"
    job = submit(slurm, output, "launch_scripts/slurm.sbatch", "configs/demo.yaml", python=python)
    wait_for_end(slurm, job, output, run, "FAILED", 60)
    assert slurm.job_field(job, "ExitCode") == "3:0"
    assert slurm.job_field(job, "Restarts") == "0"


def test_staging_runs_once_on_each_node_before_training(slurm, fake, tmp_path):
    python, run = fake
    (run / "fail").touch()
    output = tmp_path / "job.out"
    stage = f"test ! -e {run}/up-0 && touch {run}/staged-$SLURMD_NODENAME"
    argv = ("launch_scripts/slurm_srun.sbatch", "-s", stage, "configs/demo.yaml")
    job = submit(slurm, output, *argv, python=python)
    wait_for_end(slurm, job, output, run, "FAILED", 60)
    assert {path.name for path in run.glob("staged-*")} == {"staged-node1", "staged-node2"}
    assert len(list(run.glob("up-*"))) == 2
    for path in run.glob("up-*"):
        path.unlink()
    job = submit(slurm, output, *argv[:2], "false", *argv[3:], python=python)
    wait_for_end(slurm, job, output, run, "FAILED", 60)
    assert "staging failed" in output.read_text()
    assert not list(run.glob("up-*"))


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_warning_while_data_are_staged_requeues_the_job(slurm, fake, tmp_path, number):
    python, run = fake
    (run / "fail").touch()
    output = tmp_path / "job.out"
    stage = f"test -e {run}/staging-$SLURMD_NODENAME || {{ touch {run}/staging-$SLURMD_NODENAME; sleep 60; }}"
    job = submit(slurm, output, "launch_scripts/slurm.sbatch", "-s", stage, "configs/demo.yaml", python=python)
    wait_for(lambda: len(list(run.glob("staging-*"))) == 2, "the staging on both nodes", 30)
    steps = () if number == "USR1" else (f"{job}.0",)  # as preemption with a grace time does
    slurm.run("scancel", f"--signal={number}", *(steps or (job,)))
    wait_for_end(slurm, job, output, run, "FAILED", 60)
    assert slurm.job_field(job, "Restarts") == "1"
    assert "interrupted while it staged its data" in output.read_text()
    assert "start 1 of" in (run / "starts-0").read_text()


# Options for a cluster, reduced to the two nodes of the tests.
SMALLER = {"-N": "2", "--gpus-per-node": "2", "--ntasks-per-node": "2", "--cpus-per-task": "1"}


@pytest.mark.parametrize("line", documented("sbatch"), ids=lambda line: next(w for w in line if "launch" in w)[15:])
def test_documented_command_uses_every_gpu_of_its_nodes(slurm, fake, tmp_path, line):
    python, run = fake
    (run / "fail").touch()
    output, script = tmp_path / "job.out", next(i for i, word in enumerate(line) if "launch_scripts" in word)
    options = [SMALLER.get(before, word) for before, word in pairwise(line[:script])]
    arguments = ["true" if word.startswith("launch_scripts/stage.sh") else word for word in line[script:]]
    job = submit(slurm, output, *arguments, python=python, options=options)
    wait_for_end(slurm, job, output, run, "FAILED", 60)
    starts = [path.read_text() for path in run.glob("starts-*")]
    if "srun" in line[script]:
        assert len(starts) == 4
    else:
        assert len(starts) == 2
        assert all("--nnodes 2 --nproc_per_node 2 " in start for start in starts)
    assert all("--data-path" in start for start in starts)


def test_two_jobs_on_one_node_use_different_ports(slurm, fake, tmp_path):
    python, run = fake
    output = tmp_path / "job.out"
    one_core = ("-N", "1", "--nodelist", "node1")
    argv = ("launch_scripts/slurm_srun.sbatch", "configs/demo.yaml")
    jobs = [submit(slurm, output, *argv, python=python, options=one_core) for _ in range(2)]
    starts = run / "starts-0"
    wait_for(lambda: starts.exists() and len(starts.read_text().splitlines()) == 2, "two starts", 30)
    assert all(slurm.state(job) == "RUNNING" for job in jobs)
    ports = {line.rpartition(":")[2] for line in starts.read_text().splitlines()}
    assert {int(port) % 10000 for port in ports} == {int(job) % 10000 for job in jobs}
    slurm.run("scancel", *jobs)
    for job in jobs:
        wait_for_end(slurm, job, output, run, "CANCELLED", 60)


def test_warning_before_the_time_limit_requeues_the_job(slurm, limited):
    job, output, run = limited
    wait_for_end(slurm, job, output, run, seconds=120)
    assert slurm.job_field(job, "Restarts") == "1"
    assert "goes back into the queue" in output.read_text()
    first, second = (run / "starts-0").read_text().splitlines()
    assert f"--rdzv_id {job}-0 " in first
    assert f"--rdzv_id {job}-1 " in second
