"""Independence of the world size: batches bitwise, weights to round-off, also across a kill."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import config
import train as train_script
from data.build import build_data
from engine.checkpoint.files import load_state
from tests.conftest import ROOT
from tests.helpers.bounds import CONDITIONED, DEPTH, TERMS, assert_same_but_for_order, ulps
from tests.helpers.small_runs import PATIENCE_S, rows

# Five epochs of 4 updates of 12 images in 4 micro-batches.
OPTS = (
    *("MODEL.NAME", "test_vit", "TRAIN.EPOCHS", "5", "TRAIN.GLOBAL_BATCH", "12", "TRAIN.MICRO_BATCH", "3"),
    *(*CONDITIONED, "LOG.EVERY", "1"),
)
UPDATES = 20
LAST = f"small/checkpoints/update-{UPDATES:08d}.pt"


def batches(cfg, world, epoch, first_update=0):
    """Return {(update, micro-batch): (images, targets, indices)} of an epoch, as produced by `world` processes."""
    found = {}
    for rank in range(world):
        data = build_data(cfg, rank, world, "cpu")
        numbers = [
            (update, j)
            for update in range(first_update, data.train.updates_per_epoch)
            for j in range(rank, data.sampler.micro_batches_per_update, world)
        ]
        for (update, j), batch in zip(numbers, data.train.epoch(epoch, first_update), strict=True):
            indices = batch.indices.clone()
            found[update, j] = (*data.stage.train(batch, 4 * epoch + update, j, epoch), indices)
    return found


@pytest.mark.parametrize("repeats", ["1", "3"])
@pytest.mark.parametrize("world", [2, 4])
def test_batches_are_bitwise_the_same_at_every_world_size(small_cfg, world, repeats):
    cfg = config.load(str(small_cfg), [*OPTS, "AUG.REPEATS", repeats])
    one = batches(cfg, 1, epoch=2)
    assert len(one) == 16
    others = batches(cfg, world, epoch=2)
    for key, expected in one.items():
        for a, b in zip(others[key], expected, strict=True):
            assert torch.equal(a, b), key


def test_batches_after_a_resume_with_another_world_size_are_the_same(small_cfg):
    cfg = config.load(str(small_cfg), list(OPTS))
    whole, rest = batches(cfg, 4, epoch=1), batches(cfg, 2, epoch=1, first_update=3)
    assert {update for update, _ in rest} == {3}
    for key, made in rest.items():
        assert all(torch.equal(a, b) for a, b in zip(made, whole[key], strict=True))


@pytest.fixture(scope="module")
def one(small_cfg, tmp_path_factory):
    """Output of the run of one process with accumulation 4, without a launcher; one thread, as torchrun sets for each process."""
    output, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(1)
    assert train_script.main(["--cfg", str(small_cfg), "--output", str(output), "--opts", *OPTS]) == 0
    torch.set_num_threads(threads)
    return output


def assert_same_to_round_off(a, b):
    x, y = load_state(a / LAST), load_state(b / LAST)
    for part in ("model", "ema"):
        assert_same_but_for_order(x[part], y[part])
    first, second = rows(a / "small"), rows(b / "small")
    assert [(r["kind"], r["update"]) for r in first] == [(r["kind"], r["update"]) for r in second]
    for r, s in zip(first, second, strict=True):
        assert r["loss"] == pytest.approx(s["loss"], rel=DEPTH * ulps(TERMS))
        assert r.get("lr") == s.get("lr")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_weights_are_the_same_on_any_number_of_processes(small_cfg, one, tmp_path, run_script, processes):
    argv = ("train.py", "--cfg", str(small_cfg), "--output", str(tmp_path), "--opts", *OPTS)
    run_script(*argv, processes=processes)
    assert_same_to_round_off(one, tmp_path)


@pytest.mark.slow
def test_torchrun_with_one_process_is_the_run_without_a_launcher(small_cfg, one, tmp_path, run_script):
    run_script("train.py", "--cfg", str(small_cfg), "--output", str(tmp_path), "--opts", *OPTS, processes=1)
    a, b = load_state(one / LAST), load_state(tmp_path / LAST)
    for part in ("model", "ema"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert rows(one / "small") == rows(tmp_path / "small")


def kill_after(update, argv, metrics, processes):
    """Start a run under torchrun and kill all its processes with SIGKILL after an update."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    started = subprocess.Popen(
        [*launcher, *argv], cwd=ROOT, env=env, stdout=quiet, stderr=quiet, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (metrics.exists() and f'"update": {update},' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()
    for pid in (started.pid, *map(int, workers)):  # the launcher first: it would terminate the others
        os.kill(pid, signal.SIGKILL)
    started.wait()


@pytest.mark.slow
def test_run_killed_on_two_processes_continues_with_one(small_cfg, one, tmp_path):
    argv = (
        "train.py",
        "--cfg",
        str(small_cfg),
        "--output",
        str(tmp_path),
        "--opts",
        *OPTS,
        "CHECKPOINT.EVERY_UPDATES",
        "1",
    )
    kill_after(7, argv, tmp_path / "small/metrics.jsonl", processes=2)
    latest = load_state(max((tmp_path / "small/checkpoints").glob("update-*.pt")))
    assert 6 <= latest["update"] < UPDATES
    assert train_script.main(list(argv[1:])) == 0
    assert_same_to_round_off(one, tmp_path)
