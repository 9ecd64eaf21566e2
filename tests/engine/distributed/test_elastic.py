"""Elastic runs: after the loss of a worker or a node the run continues on the others and ends with the same result."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import train as train_script
from engine.checkpoint.async_saver import SavingError
from engine.checkpoint.files import load_state
from engine.distributed.elastic import Elastic
from engine.evaluate import NotFiniteError
from tests.conftest import ROOT
from tests.helpers.bounds import CONDITIONED, assert_same_but_for_order
from tests.helpers.slurm_cluster import wait_for
from tests.helpers.small_runs import PATIENCE_S

# 20 epochs of 4 updates of 12 images in 4 micro-batches; saved after every update.
OPTS = (
    *("MODEL.NAME", "test_vit", "TRAIN.EPOCHS", "20", "TRAIN.GLOBAL_BATCH", "12", "TRAIN.MICRO_BATCH", "3"),
    *(*CONDITIONED, "LOG.EVERY", "1", "EVAL.EVERY", "10", "CHECKPOINT.EVERY_UPDATES", "1"),
)
LAST = "checkpoints/update-00000080.pt"


@pytest.mark.parametrize(
    ("batch", "launched", "active"),
    [(12, 4, 4), (12, 3, 2), (12, 1, 1), (12, 9, 4), (1024 * 3, 24, 16), (1024 * 3, 1000, 512)],
)
def test_batch_is_divided_among_the_most_processes_that_fit(batch, launched, active):
    micro = 3
    idle = []
    for rank in range(launched):
        env = {"TORCHELASTIC_MAX_RESTARTS": "3", "WORLD_SIZE": str(launched), "RANK": str(rank)}
        elastic = Elastic(batch, micro, env)
        idle.append(elastic.idle)
        assert env["WORLD_SIZE"] == str(min(active, launched))
        assert any("stand by" in note for note in elastic.notes(1)) == (active < launched)
    assert idle == [rank >= active for rank in range(launched)]


def test_world_size_is_unchanged_without_restarts():
    env = {"TORCHELASTIC_MAX_RESTARTS": "0", "WORLD_SIZE": "3", "RANK": "2"}
    elastic = Elastic(12, 3, env)
    assert not elastic.idle
    assert env["WORLD_SIZE"] == "3"
    assert elastic.notes(0) == []


def test_restarts_without_the_needed_settings_are_warned_of():
    env = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    first, second = Elastic(12, 3, env).notes(0)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in first
    assert "CHECKPOINT.EVERY_UPDATES=0" in second


@pytest.mark.parametrize(
    ("argv", "ends_with", "message"),
    [
        (("--opts", "TRAIN.EPOCH", "2"), None, "did you mean TRAIN.EPOCHS"),
        (("--init", "no-such-file.safetensors"), None, "no-such-file.safetensors does not exist"),
        ((), SavingError("no room"), "stopped: no room"),
        ((), NotFiniteError("a loss of nan"), "stopped: a loss of nan"),
    ],
)
def test_message_is_printed_before_the_rendezvous_is_closed(
    small_cfg, tmp_path, monkeypatch, capsys, argv, ends_with, message
):
    """Torchrun kills the processes when it sees the closed rendezvous, on a busy machine before they can print."""
    printed = []

    def end(session):
        raise ends_with

    if ends_with:
        monkeypatch.setattr(train_script, "train", end)
    monkeypatch.setattr(train_script, "prevent_restarts", lambda: printed.append(capsys.readouterr().err))
    with pytest.raises(SystemExit):
        train_script.main(["--cfg", str(small_cfg), "--output", str(tmp_path), *argv])
    assert [message in text for text in printed] == [True]


@pytest.fixture(scope="module")
def uninterrupted(small_cfg, tmp_path_factory):
    """Run directory of the uninterrupted run on one process."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert train_script.main(["--cfg", str(small_cfg), "--output", str(output), "--opts", *OPTS]) == 0
    return output / "small"


@pytest.fixture
def agents():
    """Function that starts launch_scripts/elastic.sh; kills the processes that still run at the end."""
    started = []

    def start(nodes, processes, port, output, log, *argv):
        command = ("launch_scripts/elastic.sh", "-n", nodes, "-g", str(processes), "-a", "localhost", "-p", str(port))
        env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            agent = subprocess.Popen(
                [*command, *map(str, argv), "--output", str(output), "--opts", *OPTS],
                cwd=ROOT,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        started.append(agent)
        return agent

    yield start
    for agent in started:
        if agent.poll() is None:
            kill_all(agent)


def workers(agent):
    """Return {rank: process number} of an agent's workers."""
    found = {}
    listed = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout
    for pid in map(int, listed.split()):
        try:
            rank = re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
        except OSError:
            continue
        if rank:
            found[int(rank[1])] = pid
    return found


def kill_all(agent):
    """Kill a node: the agent and its workers at once."""
    for pid in (agent.pid, *workers(agent).values()):
        os.kill(pid, signal.SIGKILL)
    agent.wait()


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def reached(run, update):
    metrics = run / "metrics.jsonl"
    return lambda: metrics.exists() and f'"update": {update},' in metrics.read_text()


def assert_same_to_round_off(a, b):
    x, y = load_state(a / LAST), load_state(b / LAST)
    for part in ("model", "ema"):
        assert_same_but_for_order(x[part], y[part])
    first, second = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b))
    assert [(row["kind"], row["update"]) for row in first] == [(row["kind"], row["update"]) for row in second]


@pytest.mark.slow
def test_run_continues_by_itself_after_a_worker_died(small_cfg, uninterrupted, tmp_path, agents):
    # Three processes for four micro-batches: two train, one stands by, and all exit with status 0 at the end.
    run, log = tmp_path / "small", tmp_path / "log.txt"
    agent = agents("1:1", 3, free_port(), tmp_path, log, small_cfg)
    wait_for(reached(run, 10), "update 10", PATIENCE_S)
    os.kill(workers(agent)[1], signal.SIGKILL)
    assert agent.wait(PATIENCE_S) == 0, log.read_text()
    assert "3 processes were launched, the global batch divides among 2: 1 stand by" in log.read_text()
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 2]
    assert starts[1]["update"] >= 9
    assert_same_to_round_off(uninterrupted, run)


@pytest.mark.slow
def test_run_continues_on_the_node_that_is_left(small_cfg, uninterrupted, tmp_path, agents):
    run, logs = tmp_path / "small", [tmp_path / "log0.txt", tmp_path / "log1.txt"]
    port = free_port()
    host = agents("1:2", 1, port, tmp_path, logs[0], small_cfg)
    wait_for(lambda: socket_is_open(port), "the rendezvous", PATIENCE_S)
    other = agents("1:2", 1, port, tmp_path, logs[1], small_cfg)
    wait_for(reached(run, 10), "update 10", PATIENCE_S)
    kill_all(other)
    assert host.wait(PATIENCE_S) == 0, logs[0].read_text()
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert [start["processes"] for start in starts][-2:] == [2, 1]
    assert_same_to_round_off(uninterrupted, run)


@pytest.mark.slow
def test_failure_that_restarts_would_repeat_is_final_on_all_nodes(small_cfg, tmp_path, agents):
    logs, port = [tmp_path / "log0.txt", tmp_path / "log1.txt"], free_port()
    started = []
    for path in logs:
        started.append(agents("2:2", 1, port, tmp_path, path, small_cfg, "--init", "no-such-file.safetensors"))
        wait_for(lambda: socket_is_open(port), "the rendezvous", PATIENCE_S)
    for agent, path in zip(started, logs, strict=True):
        assert agent.wait(PATIENCE_S) == 1, path.read_text()
        assert path.read_text().count("no-such-file.safetensors does not exist") <= 1
    output_of_all = "".join(path.read_text() for path in logs)
    assert "no-such-file.safetensors does not exist" in output_of_all
    assert "RendezvousClosedError" in output_of_all


def socket_is_open(port):
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0
