"""Loader processes and shared memory: defaults for small and large machines, and a /dev/shm that is too small."""

import os

import pytest

import config
from data import shared_memory
from data.build import build_data
from data.shared_memory import check_shared_memory, default_workers
from tests.data_doubles import write_folder

MIB = 2**20


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Set the cores of the machine, its training processes and the MiB free in /dev/shm."""

    class Status:
        f_frsize = 4096

    def of(cores=8, processes=1, free=64):
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        Status.f_bavail = free * MIB // 4096
        monkeypatch.setattr("os.statvfs", lambda path: Status)
        monkeypatch.setattr(shared_memory, "SHM", tmp_path)

    return of


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, 3), (8, 1, 7), (16, 1, 15), (128, 1, 16), (128, 8, 15), (64, 8, 7), (8, 8, 1), (4, 8, 1)],
)  # fmt: skip
def test_default_workers_share_the_cores_and_leave_one(machine, cores, processes, workers):
    machine(cores, processes)
    assert default_workers() == workers


def test_batches_that_fit_pass(machine):
    machine(free=64)
    check_shared_memory(workers=4, prefetch=2, batch_bytes=6 * MIB)  # 4 x 2 + 2 batches


def test_too_small_shared_memory_is_explained_before_workers_die(machine):
    machine(free=64)
    wanted = (
        r"64 MiB free, but DATA\.WORKERS=16 x DATA\.PREFETCH=4 batches of 18 MiB need 1\.2 GiB: .* bus error\. Enlarge it "
        r"\(docker run --shm-size=2g, or --ipc=host; .*\), or set fewer DATA\.WORKERS or DATA\.PREFETCH, or DATA\.WORKERS 0"
    )
    with pytest.raises(ValueError, match=wanted):
        check_shared_memory(workers=16, prefetch=4, batch_bytes=128 * 3 * 224**2)


def test_processes_of_a_machine_share_it(machine):
    machine(processes=8, free=64)
    with pytest.raises(ValueError, match=r"batches of 1 MiB x 8 processes need 80 MiB: .*or set DATA\.PREFETCH 3, or"):
        check_shared_memory(workers=2, prefetch=4, batch_bytes=MIB)


def test_no_workers_need_no_shared_memory(machine, tmp_path, monkeypatch):
    machine(free=0)
    check_shared_memory(workers=0, prefetch=4, batch_bytes=MIB)
    monkeypatch.setattr(shared_memory, "SHM", tmp_path / "missing")  # not every system has one
    check_shared_memory(workers=4, prefetch=4, batch_bytes=MIB)


def test_build_checks_the_larger_of_training_and_evaluation_batches(machine, tmp_path):
    write_folder(tmp_path, train={"cat": 8}, val={"cat": 1})
    opts = (
        "DATA.IMG_SIZE 32 DATA.EVAL_RESIZE 36 TRAIN.GLOBAL_BATCH 8 TRAIN.MICRO_BATCH 4 EVAL.BATCH 4096 DATA.WORKERS 2"
    )
    machine(free=64)
    with pytest.raises(ValueError, match="batches of 12 MiB need 120 MiB"):
        build_data(config.load(opts=[*opts.split(), "DATA.PATH", str(tmp_path)]), 0, 1, "cpu")


def test_real_shared_memory_is_read():
    if not shared_memory.SHM.is_dir():
        pytest.skip("this system has no /dev/shm")
    free = os.statvfs(shared_memory.SHM)
    with pytest.raises(ValueError, match="bus error"):
        check_shared_memory(1, 1, free.f_blocks * free.f_frsize)
