"""Cut and repaired network between two nodes, each a network namespace with a name and an address: the run continues."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.slurm_cluster import wait_for

# 20 epochs of 6 updates of 2 micro-batches; saved after every update.
OPTS = (
    *("MODEL.NAME", "test_vit", "TRAIN.EPOCHS", "20", "LOG.EVERY", "1", "EVAL.EVERY", "20"),
    *("CHECKPOINT.EVERY_UPDATES", "1", "DIST.TIMEOUT", "15"),
)
# In the namespace: set the host name, and let TCP give up within seconds, as recommended for clusters.
ENTER = 'hostname "$1"; sysctl -qw net.ipv4.tcp_retries2=5; shift; exec "$@"'


def ip(*argv):
    subprocess.run(["ip", *argv], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes():
    """Names of two network namespaces that are connected by a veth pair."""
    lacking = [name for name in ("ip", "unshare", "sysctl", "hostname") if not shutil.which(name)]
    if os.geteuid() or lacking:
        pytest.skip(f"network namespaces need root and iproute2; missing: {', '.join(lacking) or 'root'}")
    names = [f"retoken{os.getpid()}{letter}" for letter in "ab"]
    hosts = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{i} {name}\n" for i, name in enumerate(names, 1))
    folders = [Path("/etc/netns", name) for name in names]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for i, (name, folder) in enumerate(zip(names, folders, strict=True), 1):
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(hosts)
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def agents(nodes, small_cfg, tmp_path):
    """Processes of launch_scripts/elastic.sh on both nodes, and the files with their output."""
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    started, outputs = [], [tmp_path / f"{name}.txt" for name in nodes]
    for name, path in zip(nodes, outputs, strict=True):
        enter = ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", ENTER, "sh", name)
        command = ("launch_scripts/elastic.sh", "-n", "2:2", "-g", "1", "-a", nodes[0], str(small_cfg))
        rest = ("--output", str(tmp_path), "--opts", *OPTS)
        with path.open("w") as file:
            started.append(
                subprocess.Popen(
                    [*enter, *command, *rest],
                    cwd=ROOT,
                    env=env,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    yield started, outputs
    for name in nodes:  # the workers have their own sessions, and keep the namespace in use
        inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
        for pid in map(int, inside.split()):
            os.kill(pid, signal.SIGKILL)
    for agent in started:
        agent.wait()


def updates(run):
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [row["update"] for row in map(json.loads, lines) if row["kind"] == "train"]


@pytest.mark.slow
def test_cut_is_an_error_within_the_timeout_and_the_run_continues_after_the_repair(nodes, agents, tmp_path):
    (first, second), outputs = agents
    run = tmp_path / "small"

    def all_output():
        return "\n".join(f"== {path.name}\n{path.read_text()[-4000:]}" for path in outputs)

    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(updates(run)) >= 10, "update 10", 120)
        ip("-n", nodes[0], "link", "set", "cable", "down")
        since = time.monotonic()
        wait_for(lambda: any("lost the others" in path.read_text() for path in outputs), "an error", 60)
        print(f"error {time.monotonic() - since:.1f} s after the cut")
        repaired = time.monotonic()
        ip("-n", nodes[0], "link", "set", "cable", "up")
        done = len(updates(run))
        wait_for(lambda: len(updates(run)) > done + 2, "training", 120)
        print(f"training {time.monotonic() - repaired:.1f} s after the repair")
        wait_for(lambda: first.poll() is not None and second.poll() is not None, "the exit of both", 180)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{all_output()}") from error
    assert (first.returncode, second.returncode) == (0, 0), all_output()
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert len(starts) >= 2
    assert starts[-1]["update"] >= 9
    assert updates(run) == list(range(1, 121))
