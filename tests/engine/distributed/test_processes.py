"""Launchers, rendezvous, collectives and their timeouts, and the errors that name missing or lost processes."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from engine.checkpoint.files import save_state
from engine.distributed.consensus import Consensus, Vote
from engine.distributed.launcher import LaunchInfo, find_launch
from engine.distributed.processes import init_processes, is_lost_connection
from tests.conftest import ROOT
from tests.engine.distributed.test_signals import start, wait_for
from tests.helpers.small_runs import PATIENCE_S

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
BATCH = {
    "SLURM_JOB_ID": "71234",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
SRUN = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("env", "launch_info"),
    [
        ({}, LaunchInfo(0, 1, 0, "plain python")),
        (
            BATCH,
            LaunchInfo(0, 1, 0, "plain python inside job 71234"),
        ),  # SLURM_NTASKS is that of the allocation: this is no step
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}, LaunchInfo(3, 8, 1, "torchrun", "a", 29500)),
        (TORCHRUN, LaunchInfo(3, 8, 1, "RANK and WORLD_SIZE", "a", 29500)),
        (SRUN | TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}, LaunchInfo(3, 8, 1, "torchrun", "a", 29500)),  # srun torchrun
        (SRUN, LaunchInfo(3, 4, 1, "srun, job 71234", "n1", 21234)),
        (SRUN | {"SLURM_STEP_NODELIST": "n2"}, LaunchInfo(3, 4, 1, "srun, job 71234", "n2", 21234)),
        (SRUN | {"MASTER_ADDR": "b", "MASTER_PORT": "1"}, LaunchInfo(3, 4, 1, "srun, job 71234", "b", 1)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, LaunchInfo(0, 1, 1, "srun, job 71234")),  # srun -n1
    ],
)
def test_launch_is_read_from_the_environment(env, launch_info):
    assert find_launch(env) == launch_info


def test_first_host_is_found_with_scontrol(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames n[07-09]" ] && printf "n07\\nn08\\nn09\\n"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert find_launch(SRUN | {"SLURM_JOB_NODELIST": "n[07-09]"}).address == "n07"
    with pytest.raises(ValueError, match=r"SLURM_JOB_NODELIST='n\[1-2\]'.*set MASTER_ADDR"):
        find_launch(SRUN | {"SLURM_JOB_NODELIST": "n[1-2]"})


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not: launch with torchrun"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8 must lie in 0 .. 7"),
        (TORCHRUN | {"RANK": "x"}, "RANK='x' must be a number"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is not set, but WORLD_SIZE=8"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT=None must be a number"),
    ],
)
def test_contradictory_environments_are_errors(env, text):
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        find_launch(env)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(code, envs, *more):
    """Run code in a process for each environment; return (status, output, errors) of each."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER"))
    }
    argv = (sys.executable, "-c", code, *more)
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(
            argv, cwd=ROOT, env=clean | {"OMP_NUM_THREADS": "1"} | env, stdout=pipe, stderr=pipe, text=True
        )
        for env in envs
    ]
    texts = [process.communicate(timeout=PATIENCE_S) for process in started]
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


RENDEZVOUS = """
import sys, torch
from engine.distributed.processes import init_processes, shut_down
try:
    p = init_processes("cpu", {timeout})
except ValueError as error:
    sys.exit(str(error))
print(p.rank, p.world, p.launcher, int(p.sum(torch.tensor(p.rank + 1))), p.largest(p.rank))
shut_down()
"""


def test_srun_tasks_connect_without_torchrun():
    shared = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "no-such-host"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    first, second = launch(RENDEZVOUS.format(timeout=60), ranks)
    assert first[:2] == (0, "0 2 srun, job 7 3 1\n"), first
    assert second[:2] == (0, "1 2 srun, job 7 3 1\n"), second


def test_missing_processes_are_named_by_all_others():
    shared = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [shared | {"RANK": i, "LOCAL_RANK": i} for i in ("0", "2")]
    for status, _, error in launch(RENDEZVOUS.format(timeout=6), ranks):
        assert status == 1
        assert "processes 1, 3 of 4 did not arrive at 127.0.0.1" in error
        assert "DIST.START_TIMEOUT=6 s" in error


def test_processes_that_cannot_connect_fail_with_the_variable_to_set():
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [shared | {"RANK": i, "LOCAL_RANK": i} for i in ("0", "1")]
    ranks[1]["GLOO_SOCKET_IFNAME"] = "nonsense"
    for (status, _, error), rank in zip(launch(RENDEZVOUS.format(timeout=5), ranks), (0, 1), strict=True):
        assert status == 1
        assert f"process {rank} of 2 met the others at 127.0.0.1" in error
        assert "could not connect to them within DIST.START_TIMEOUT=5 s" in error
        assert "GLOO_SOCKET_IFNAME" in error


def test_collectives_have_their_own_timeout_and_failures_end_a_process_at_once():
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first, second = launch(TIMEOUTS, [shared | {"RANK": i, "LOCAL_RANK": i} for i in ("0", "1")])
    assert first[:2] == (3, "True True\n"), first
    assert second[:2] == (1, ""), second
    assert "KeyError: 'a defect'" in second[2]


TIMEOUTS = """
import atexit, sys, time, torch
from engine.distributed.processes import exit_on_failure, init_processes, is_lost_connection
p = init_processes("cpu", 60, 2)
def times_out(collective):
    since = time.monotonic()
    try:
        collective()
    except RuntimeError as error:
        return is_lost_connection(error) and time.monotonic() - since < 30
if p.rank:
    time.sleep(6)
else:
    print(times_out(lambda: p.sum(torch.zeros(1))), times_out(lambda: p.largest(1)))
atexit.register(print, "orderly exit")
with exit_on_failure():
    if p.rank:
        raise KeyError("a defect")
    sys.exit(3)
"""


def test_missing_first_process_and_unknown_address_are_named(monkeypatch):
    for key, value in (TORCHRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(
        ValueError, match=r"process 0 did not arrive at 127\.0\.0\.1:\d+ within DIST\.START_TIMEOUT=1 s"
    ):
        init_processes("cpu", 1.0)
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(ValueError, match=r"MASTER_ADDR=no-such-host\.invalid cannot be resolved"):
        init_processes("cpu", 1.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ValueError, match="process 0 cannot serve at MASTER_ADDR:MASTER_PORT=127"):
            init_processes("cpu", 1.0)


WATCH = """
import os, torch
from engine.distributed.processes import init_processes, shut_down
from engine.distributed.consensus import Consensus, Vote
p = init_processes("cpu", 60)
votes = []
consensus = Consensus(p, lambda: Vote.STOP if p.rank == 1 and len(votes) >= 2 else Vote.GO_ON)
def check(vote):
    votes.append(vote)
    if vote is Vote.STOP:
        raise StopIteration
seen = []
try:
    for batch in consensus.watch(range(3 + 4 * p.rank), 3 + 4 * p.rank, check):
        seen.append(batch)
except (StopIteration, RuntimeError):
    pass
print(len(votes), int(votes[-1]), seen, int(consensus.agree()))
shut_down()
"""


def test_vote_of_one_process_takes_effect_on_all_at_the_same_poll():
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first, second = launch(WATCH, [shared | {"RANK": i, "LOCAL_RANK": i} for i in ("0", "1")])
    assert first[:2] == (0, "4 1 [0, 1, 2] 1\n"), first  # its three batches, then polls only
    assert second[:2] == (0, "4 1 [0, 1, 2] 1\n"), second


LOAD = """
import sys, torch
from pathlib import Path
from engine.checkpoint import files
from engine.distributed.processes import init_processes, shut_down
from engine.checkpoint import async_saver
from engine.checkpoint.async_saver import load_on_all
p = init_processes("cpu", 60)
sums = []
whole = files._compute_checksum
files._compute_checksum = lambda *args: sums.append(1) or whole(*args)
for name in ("whole", "damaged"):
    try:
        print(load_on_all(Path(sys.argv[1], name), p)["n"], len(sums))
    except ValueError as error:
        print(type(error).__name__, len(sums))
print(p.on_main(lambda: p.rank))
async_saver.VISIBLE_S = 0.5
try:
    print(load_on_all(Path("absent"), p, {"n": 8} if p.main else None)["n"])
except ValueError as error:
    print(error)
try:
    print(load_on_all(Path(sys.argv[1], "whole" if p.main else "older"), p)["n"])
except ValueError as error:
    print(error)
shut_down()
"""


ABSENT = (
    "checkpoint absent does not exist; process 0 has read it: its folder must lie on a file system that all nodes share"
)


def test_checkpoint_is_verified_by_the_main_process_for_all(tmp_path):
    for name in ("whole", "damaged", "older"):
        save_state(tmp_path / name, {"model": {}, "n": 6 if name == "older" else 7})
    content = bytearray((tmp_path / "damaged").read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first, second = launch(LOAD, [shared | {"RANK": i, "LOCAL_RANK": i} for i in ("0", "1")], str(tmp_path))
    assert first[:2] == (0, "7 1\nDamagedError 2\n0\n8\n7\n"), first
    other = f"{tmp_path / 'older'} has another checksum here{ABSENT[len('checkpoint absent does not exist') :]}"
    assert second[:2] == (0, f"7 0\nDamagedError 0\n0\n{ABSENT}\n{other}\n"), second


def test_errors_of_collectives_are_distinguished_from_others():
    assert is_lost_connection(dist.DistBackendError("x"))
    assert is_lost_connection(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not is_lost_connection(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_loss_of_a_process_is_reported_with_rank_and_position(small_cfg, tmp_path, number):
    run = tmp_path / "small"
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    opts = ("LOG.EVERY", "1", "TRAIN.EPOCHS", "300", "EVAL.EVERY", "300", "DIST.TIMEOUT", "4")
    ranks = [start(small_cfg, tmp_path, *opts, env=shared | {"RANK": i, "LOCAL_RANK": i}) for i in ("0", "1")]
    try:
        wait_for(
            lambda: (run / "metrics.jsonl").exists() and '"update": 3,' in (run / "metrics.jsonl").read_text(), ranks[0]
        )
        ranks[1].send_signal(number)
        out, err = ranks[0].communicate(timeout=PATIENCE_S)
        assert ranks[0].returncode == 1, out + err
        assert "stopped: process 0: lost the others in update" in err
        assert ("imed out" in err) == (number == signal.SIGSTOP)
        assert "the same command continues" in err
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_one_process_runs_without_a_process_group(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(key, raising=False)
    processes = init_processes("cpu")
    assert (processes.world, processes.launcher.startswith("plain python")) == (1, True)
    assert Consensus(processes, lambda: Vote.GO_ON).agree() is Vote.GO_ON
    assert processes.largest(3) == 3
    assert processes.sum(torch.tensor(2)) == 2


INTERRUPTED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with SIGINT ignored
import eval as script
def wait(cfg, args, processes):
    print("evaluating", flush=True)
    time.sleep(60)
script.evaluate_checkpoint = wait
sys.exit(script.main(["--cfg", "configs/demo.yaml", "--checkpoint", "none", "--opts", "DEVICE", "cpu"]))
"""


@pytest.mark.parametrize("world", [1, 2])
def test_ctrl_c_ends_an_evaluation_without_a_traceback(world):
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    envs = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)] if world > 1 else [{}]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1"
    }
    argv, pipe = (sys.executable, "-c", INTERRUPTED), subprocess.PIPE
    started = [subprocess.Popen(argv, cwd=ROOT, env=clean | env, stdout=pipe, stderr=pipe, text=True) for env in envs]
    try:
        for process in started:
            assert process.stdout.readline() == "evaluating\n"
        for process in started:
            process.send_signal(signal.SIGINT)
        errors = [process.communicate(timeout=PATIENCE_S)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
    assert [process.returncode for process in started] == [130] * world
    assert errors == ["interrupted\n", ""][:world]
