"""Loader processes and shared memory: defaults for small and large machines, and the error for a small /dev/shm."""

import os
from unittest import mock

import pytest

import config
from data.build import build_data
from data.loaders import shared_memory
from data.loaders import workers as loader_workers
from data.loaders.shared_memory import check_memory, check_shared_memory
from data.loaders.workers import default_workers
from tests.helpers.data_doubles import write_folder

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
        monkeypatch.setattr(loader_workers, "CGROUPS", tmp_path)

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
    check_shared_memory(workers=4, prefetch=2, batch_bytes=6 * MIB, batches=99)  # 4 x 2 + 2 batches
    check_shared_memory(workers=16, prefetch=8, batch_bytes=6 * MIB, batches=10)  # there are no more
    check_shared_memory(workers=16, prefetch=2, batch_bytes=6 * MIB, batches=99, readers=4)


def test_too_small_shared_memory_is_explained_before_workers_die(machine):
    machine(free=64)
    wanted = (
        r"64 MiB free, but DATA\.WORKERS=16 x DATA\.PREFETCH=4 batches of 18 MiB need 1\.2 GiB: .* bus error\. Enlarge it "
        r"\(docker run --shm-size=2g, or --ipc=host; Kubernetes: an emptyDir with medium Memory at /dev/shm\), or set fewer DATA\.WORKERS or DATA\.PREFETCH, or DATA\.WORKERS 0"
    )
    with pytest.raises(ValueError, match=wanted):
        check_shared_memory(workers=16, prefetch=4, batch_bytes=128 * 3 * 224**2, batches=99)


def test_processes_of_a_machine_share_it(machine):
    machine(processes=8, free=64)
    with pytest.raises(ValueError, match=r"batches of 1 MiB x 8 processes need 80 MiB: .*or set DATA\.PREFETCH 3, or"):
        check_shared_memory(workers=2, prefetch=4, batch_bytes=MIB, batches=99)


def test_no_workers_need_no_shared_memory(machine, tmp_path, monkeypatch):
    machine(free=0)
    check_shared_memory(workers=0, prefetch=4, batch_bytes=MIB, batches=99)
    monkeypatch.setattr(shared_memory, "SHM", tmp_path / "missing")  # not every system has one
    check_shared_memory(workers=4, prefetch=4, batch_bytes=MIB, batches=99)


OPTS = "DATA.IMG_SIZE 32 DATA.EVAL_RESIZE 36 TRAIN.GLOBAL_BATCH 8 TRAIN.MICRO_BATCH 4 EVAL.BATCH 4 DATA.WORKERS 2"


@pytest.mark.parametrize(
    ("counts", "opts", "wanted"),
    [
        ((8, 40), "DATA.IMG_SIZE 1024 DATA.EVAL_RESIZE 1024", "batches of 12 MiB need 120 MiB"),  # 2 x 4 + 2 of val
        ((48, 4), "DATA.IMG_SIZE 1024 DATA.EVAL_RESIZE 1024", "batches of 12 MiB need 120 MiB"),
        ((48, 4), "TIMELINE.IMG_SIZE 0:32,9:1024", "batches of 12 MiB need 120 MiB"),
        ((8, 4), "DATA.IMG_SIZE 1024 DATA.EVAL_RESIZE 1024", None),  # two batches, and one
        ((48, 40), "DATA.IMG_SIZE 1024 DATA.EVAL_RESIZE 1024 DATA.WORKERS 0", None),
    ],
)
def test_build_checks_training_and_evaluation_batches(machine, tmp_path, counts, opts, wanted):
    write_folder(tmp_path, train=dict.fromkeys(("cat", "dog"), counts[0] // 2), val={"cat": counts[1]})
    machine(free=64)
    cfg = config.load(opts=[*OPTS.split(), *opts.split(), "DATA.PATH", str(tmp_path)])
    if wanted is None:
        build_data(cfg, 0, 1, "cpu")
        return
    with pytest.raises(ValueError, match=wanted):
        build_data(cfg, 0, 1, "cpu")


def test_dali_needs_room_for_files_and_a_quarter_of_the_processes(machine, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")
    write_folder(tmp_path, train={"cat": 40, "dog": 40}, val={"cat": 2, "dog": 2})
    opts = "DATA.LOADER dali DATA.IMG_SIZE 1024 DATA.EVAL_RESIZE 1024 DATA.WORKERS 8"
    cfg = config.load(opts=[*OPTS.split(), *opts.split(), "DATA.PATH", str(tmp_path)])
    machine(free=1)
    build_data(cfg, 0, 1, "cpu")  # 2 x 4 + 2 batches of 4 files of a few kB
    for path in tmp_path.glob("train/*/*.jpg"):
        path.write_bytes(path.read_bytes() + bytes(MIB // 4))
    wanted = r"DATA\.WORKERS=8 \(2 of them processes that read\) x DATA\.PREFETCH=4 batches of 1 MiB need 10 MiB"
    with pytest.raises(ValueError, match=wanted):
        build_data(cfg, 0, 1, "cpu")


@pytest.mark.parametrize(
    ("files", "workers"),
    [
        ({"cpu.max": "600000 100000"}, 5),
        ({"cpu.max": "max 100000"}, 15),
        ({"cpu.max": "50000 100000"}, 1),
        ({"job/step/cpu.max": "max 100000", "job/cpu.max": "300000 100000"}, 3),  # of a group above its own
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu,cpuacct/job/cpu.cfs_quota_us": "800000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 7),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 15),
        ({"cpu.max": "garbage"}, 15),
        ({}, 15),
    ],
)
def test_default_workers_keep_to_a_quota(machine, monkeypatch, tmp_path, files, workers):
    machine(cores=16)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text("5:cpu,cpuacct:/job\n1:name=systemd:/x\n0::/job/step\n")
    monkeypatch.setattr(loader_workers, "OWN_CGROUP", tmp_path / "own")
    assert default_workers() == workers


def test_real_shared_memory_is_read():
    if not shared_memory.SHM.is_dir():
        pytest.skip("this system has no /dev/shm")
    free = os.statvfs(shared_memory.SHM)
    with pytest.raises(ValueError, match="bus error"):
        check_shared_memory(1, 1, free.f_blocks * free.f_frsize, 9)


def test_batch_larger_than_the_machines_memory_is_refused():
    check_memory("EVAL.BATCH", 64, 384)
    for batch, size, count in ((1 << 20, 8192, 1), (1 << 30, 224, 1), (4096, 8192, 4)):
        with pytest.raises(
            ValueError, match=rf"EVAL\.BATCH={batch} with DATA\.IMG_SIZE={size}: .* the machine has .* lower one"
        ):
            check_memory("EVAL.BATCH", batch, size, count)


@pytest.mark.parametrize("loader", ["torch", "synthetic"])
def test_training_batch_larger_than_memory_is_refused_before_it_is_made(loader, pictures):
    sizes = ["DATA.IMG_SIZE", "8192", "DATA.EVAL_RESIZE", "8192", "TRAIN.GLOBAL_BATCH", "9", "TRAIN.MICRO_BATCH", "9"]
    cfg = config.load((), ["DATA.LOADER", loader, "DATA.PATH", str(pictures), *sizes])
    with (
        mock.patch("os.sysconf", lambda name: 4096 if "SIZE" in name else 1000),
        pytest.raises(ValueError, match="MICRO_BATCH=9"),
    ):
        build_data(cfg, 0, 1, "cpu")
