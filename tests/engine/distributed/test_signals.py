"""Signals to running processes: the run saves at the next update and exits; the same command continues it to the same result."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import train as train_script
from engine.checkpoint.files import load_state, read_metadata
from engine.distributed.consensus import Consensus, Vote
from engine.distributed.processes import Processes
from engine.distributed.signals import StopSignals
from engine.logging.log import Log
from tests.conftest import ROOT
from tests.helpers.small_runs import PATIENCE_S, rows, run_here

LAST = "checkpoints/update-00000018.pt"


def start(cfg, output, *opts, processes=0, env=None, **how):
    """Start train.py from the command line, with one thread."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    argv = [sys.executable, *launcher, "train.py", "--cfg", cfg, "--output", output, "--opts", *opts]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK"))}
    env = clean | {"OMP_NUM_THREADS": "1"} | (env or {})
    pipe = subprocess.PIPE
    return subprocess.Popen([str(a) for a in argv], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, **how)


def wait_for(condition, process, seconds=PATIENCE_S):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def assert_same_run(a, b):
    x, y = load_state(a / LAST), load_state(b / LAST)
    torch.testing.assert_close([x[k] for k in ("model", "ema")], [y[k] for k in ("model", "ema")], rtol=0, atol=0)
    assert x["best"] == y["best"]
    assert rows(a) == rows(b)
    for which, entry in x["best"].items():
        metadata = read_metadata(a / f"best_{which}.safetensors")
        assert {key: metadata[key] for key in entry} == entry


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(small_cfg, tmp_path_factory, one_thread):
    """Run directory of an uninterrupted run."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert run_here(small_cfg, output) == 0
    assert (output / "small/done").exists()
    return output / "small"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_run_continues_to_the_same_result(small_cfg, uninterrupted, tmp_path, one_thread, number):
    run = tmp_path / "small"
    process = start(small_cfg, tmp_path, "LOG.EVERY", "1", "DATA.WORKERS", "1", start_new_session=True)
    wait_for(
        lambda: (run / "metrics.jsonl").exists() and '"update": 2,' in (run / "metrics.jsonl").read_text(), process
    )
    os.killpg(process.pid, number)  # the loader's workers receive it too, as from a terminal or from SLURM
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == os.EX_TEMPFAIL, out + err
    assert number.name in (run / "preempted").read_text()
    assert f"stopped by {number.name} after update" in out
    assert err == ""
    state = load_state(max((run / "checkpoints").iterdir()))
    assert 2 <= state["update"] < 18
    assert run_here(small_cfg, tmp_path) == 0
    assert not (run / "preempted").exists()
    assert (run / "done").exists()
    x, y = load_state(run / LAST), load_state(uninterrupted / LAST)
    torch.testing.assert_close([x["model"], x["ema"]], [y["model"], y["ema"]], rtol=0, atol=0)


def test_two_processes_stop_at_the_same_update_after_a_signal_to_one(small_cfg, tmp_path):
    run = tmp_path / "small"
    opts = ("LOG.EVERY", "1", "TRAIN.EPOCHS", "50")
    process = start(small_cfg, tmp_path, *opts, processes=2)
    wait_for(
        lambda: (run / "metrics.jsonl").exists() and '"update": 2,' in (run / "metrics.jsonl").read_text(), process
    )
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGUSR1)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, out + err  # the status of torchrun; the marker shows the preemption
    assert "stopped by" in out
    assert (run / "preempted").exists()
    assert not (run / "done").exists()


@pytest.mark.parametrize("end", ["kill", "error"])
def test_loader_workers_end_with_their_parent(small_cfg, pictures, tmp_path, end):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    if end == "error":
        (data / "val/red/004.jpg").write_bytes(b"<html>")
    opts = ("LOG.EVERY", "1", "DATA.WORKERS", "2", "DATA.PATH", data, "TRAIN.EPOCHS", "30")
    process = start(small_cfg, tmp_path, *opts, start_new_session=True)
    if end == "kill":
        metrics = tmp_path / "small/metrics.jsonl"
        wait_for(lambda: metrics.exists() and '"update": 2,' in metrics.read_text(), process)
        process.kill()
    assert process.wait(PATIENCE_S) == (-signal.SIGKILL if end == "kill" else 1)
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
        assert time.monotonic() < deadline, "workers are still running"
        time.sleep(0.1)
    process.communicate()


def test_only_a_second_ctrl_c_that_is_no_repeat_ends_the_process(monkeypatch):
    now, ended = [100.0], []
    monkeypatch.setattr("engine.distributed.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("engine.distributed.signals.os._exit", ended.append)
    stop_signals = StopSignals()
    with pytest.raises(KeyboardInterrupt):
        stop_signals._receive(signal.SIGINT, None)
    assert stop_signals.received is None
    stop_signals.defer()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        stop_signals._receive(number, None)
    assert stop_signals.received is signal.SIGTERM
    for _ in range(2):
        stop_signals._count_ctrl_c()
    assert ended == []  # torchrun forwards a terminal's Ctrl-C at once
    now[0] += 2
    stop_signals._count_ctrl_c()
    assert ended == [130]


# The main thread never returns from C, as in a collective with a dead process; a forked worker receives signals, too.
STUCK = """
import ctypes, os, signal, sys, time
from engine.distributed.signals import StopSignals
stop_signals = StopSignals()
stop_signals.listen()
stop_signals.defer()
worker = os.fork()
if not worker:
    while True:
        time.sleep(1)
lock = ctypes.create_string_buffer(128)
print(worker, flush=True)
for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


def test_second_ctrl_c_ends_a_process_that_hangs_in_c_and_a_second_sigterm_does_not():
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", STUCK], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    worker = int(process.stdout.readline())
    try:
        for number in (signal.SIGINT, signal.SIGTERM, None, signal.SIGTERM):
            time.sleep(1.1) if number is None else process.send_signal(number)
        for _ in range(2):  # signals to the worker do not count
            os.kill(worker, signal.SIGINT)
            time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        os.kill(worker, signal.SIGKILL)
        process.kill()
        _, error = process.communicate()
    assert "interrupted twice: ended at once" in error


@pytest.mark.parametrize("call", [0, 5])  # of the raw weights; of the EMA weights
def test_signal_during_evaluation_repeats_it_and_keeps_the_best(
    small_cfg, uninterrupted, tmp_path, one_thread, monkeypatch, call
):
    polls, epochs = [], []

    def begin_epoch(self, epoch, *args):
        epochs.append(epoch)
        return whole_begin_epoch(self, epoch, *args)

    whole_begin_epoch = Log.begin_epoch

    def poll(self):  # sends the signal before a batch of the second evaluation
        if epochs and epochs[-1] == 1:
            polls.append(1)
            if len(polls) == 6 + call + 1:  # the epoch's updates come first
                train_script.INTERRUPTION.received = signal.SIGTERM
        return self.own_vote()

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "INTERRUPTION", StopSignals())
        patch.setattr(Consensus, "poll", poll)
        patch.setattr(Log, "begin_epoch", begin_epoch)
        assert run_here(small_cfg, tmp_path) == os.EX_TEMPFAIL
    state = load_state(tmp_path / "small/checkpoints/update-00000012.pt")
    assert (state["update"], state["closed"]) == (12, 6)
    assert state["best"]["raw"]["update"] == 6
    with monkeypatch.context() as patch:
        patch.setattr(train_script, "INTERRUPTION", StopSignals())
        assert run_here(small_cfg, tmp_path) == 0
    assert_same_run(tmp_path / "small", uninterrupted)


def test_signal_before_the_first_update_writes_the_marker_and_no_checkpoint(small_cfg, tmp_path, monkeypatch):
    stop_signals = StopSignals()
    stop_signals.received = signal.SIGUSR1
    monkeypatch.setattr(train_script, "INTERRUPTION", stop_signals)
    assert run_here(small_cfg, tmp_path) == os.EX_TEMPFAIL
    assert (tmp_path / "small/preempted").exists()
    assert not list(tmp_path.glob("small/checkpoints/*"))


def test_vote_of_a_single_process_decides_at_every_batch():
    consensus = Consensus(Processes(0, 1, 0, torch.device("cpu"), "test"), lambda: Vote.STOP)
    assert consensus.poll() is Vote.STOP
    assert consensus.agree() is Vote.STOP
    seen = []
    assert list(consensus.watch("abc", 3, seen.append)) == ["a", "b", "c"]
    assert seen == [Vote.STOP] * 3
