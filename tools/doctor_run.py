"""Checks of a config for tools.doctor: the run directory's file system, the data, the model, memory and disk."""

import argparse
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

import config
from common.byte_size import format_bytes
from data.build import Data
from data.stores.split import open_split
from engine.batch_plan import accumulation_steps
from engine.checkpoint.async_saver import AsyncSaver
from engine.checkpoint.disk_space import SpaceNeed
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.processes import Processes
from engine.logging.log import Log
from engine.memory import Memory
from tools.doctor_findings import Finding, fail, ok, warn
from trainer.session import build_session
from trainer.summary import estimate_memory
from trainer.unused_options import unused_options

PROBE = 64 * 2**20  # bytes written to measure the speed of the disk
SLOW = 50e6  # bytes/s below which checkpoints take long; training goes on meanwhile
SKEW = 5.0  # tolerated seconds between this clock and the file system's
NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "ceph", "fuse", "beegfs", "9p")
IMAGES = 200  # validation images read to measure the speed
FULL = 0.9  # of the memory; the rest is for workspace and fragmentation
ROOM = 2.0  # free space, as a multiple of the bytes that the run writes, below which there is a warning


def storage(output: Path) -> Iterator[Finding]:
    """Check the folder of the run directories: file system, permission, locks, speed, clock."""
    candidates = output, *output.absolute().parents
    folder = next(path for path in candidates if os.path.exists(path))  # noqa: PTH110  Path raises without permission
    if not folder.is_dir():
        yield fail("output", f"{folder} is a file, no folder can be made there", "choose another folder with --output")
        return
    where = f"{folder} ({file_system(folder)})"
    try:
        probe = tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-")  # noqa: SIM115  closed below
    except OSError as error:
        yield fail("output", f"{where} cannot be written ({error.strerror})", "choose another folder with --output")
        return
    with probe:
        started = time.perf_counter()
        try:
            for _ in range(PROBE // 2**20):
                probe.write(bytes(2**20))
            probe.flush()
            os.fsync(probe.fileno())
        except OSError as error:
            yield fail(
                "output",
                f"{where}: {format_bytes(PROBE)} could not be written ({error.strerror})",
                "make room, or --output elsewhere",
            )
            return
        speed = PROBE / (time.perf_counter() - started)
        text = f"{where}, writes {speed / 1e6:.0f} MB/s"
        if speed < SLOW:
            yield warn("output", text, "checkpoints will be slow; a local disk or a parallel file system is better")
        else:
            yield ok("output", text)
        yield _locks(probe.fileno(), folder)
        skew = Path(probe.name).stat().st_mtime - time.time()
        if abs(skew) > SKEW:
            yield warn("clock", f"the file system's is {skew:+.0f} s off this machine's", "run an NTP service on both")


def _locks(file: int, folder: Path) -> Finding:
    """Check that the file system supports locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return warn(
            "locks",
            f"{folder} supports none ({error.strerror}): two processes could write one run directory",
            "start each run once",
        )
    return ok("locks", "work: a second start of a run is refused")


def file_system(folder: Path) -> str:
    """Return the type of a folder's file system; "unknown" without /proc/mounts."""
    mounts = Path("/proc/mounts")
    if not mounts.is_file():
        return "unknown"
    best, kind = "", "unknown"
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")
        if Path(folder).resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return f"{kind}, networked" if kind.split(".")[0] in NETWORK else kind


def run(cfg: CfgNode, world: int) -> Iterator[Finding]:
    """Build everything as train.py --dry-run does; check the batch, data, model, memory and disk."""
    try:
        factor = accumulation_steps(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, world)
    except ValueError as error:
        yield fail("batch", str(error), "lower --batch-size, or launch another number of processes (--processes)")
    else:
        parts = f"{cfg.TRAIN.MICRO_BATCH} images x {world} processes x {factor} accumulation"
        yield ok("batch", f"{cfg.TRAIN.GLOBAL_BATCH} = {parts}")
    if cfg.DATA.LOADER != "synthetic" and not cfg.DATA.PATH:
        yield warn("data", "DATA.PATH is not set: the images were not checked", "--data-path DIR")
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.DEVICE != "cpu" else "cpu")
    directory = RunDirectory(Path(cfg.OUTPUT) / config.run_name(cfg), cfg.CHECKPOINT.KEEP)
    log = Log(False)
    alone = _for_one_process(cfg)
    args = argparse.Namespace(dry_run=True, eval=False, resume=None)
    try:
        session = build_session(
            alone,
            args,
            Processes(0, 1, 0, device, "doctor"),
            run=directory,
            log=log,
            saver=AsyncSaver(directory, log, 1),
            interrupted=lambda: False,
        )
    except ValueError as error:
        yield fail("run", str(error), "train.py would stop with the same message")
        return
    if cfg.DATA.PATH or cfg.DATA.LOADER == "synthetic":
        yield from data(cfg, session.data)
    parameters = sum(p.numel() for p in session.state.model.parameters())
    yield ok("model", f"{cfg.MODEL.NAME}, {parameters:,} parameters")
    for text in unused_options(cfg, session.state.model, world):
        yield warn("config", f"no effect: {text}", "take it out of the config")
    memory = estimate_memory(cfg, session.state, session.precision)
    yield from _memory(cfg, memory, device)
    yield _disk(cfg, memory, directory.path)


def _for_one_process(cfg: CfgNode) -> CfgNode:
    """Return the config with a micro-batch that divides among one process; the real one is checked separately."""
    alone = cfg.clone()
    alone.defrost()
    alone.TRAIN.MICRO_BATCH = next(
        n for n in range(min(cfg.TRAIN.MICRO_BATCH, cfg.TRAIN.GLOBAL_BATCH), 0, -1) if cfg.TRAIN.GLOBAL_BATCH % n == 0
    )
    alone.freeze()
    return alone


def data(cfg: CfgNode, found: Data) -> Iterator[Finding]:
    """Report the data that was found, and measure the speed of reading it."""
    train = f"{found.fingerprint['train']:,} training and {found.val.num_images:,} validation images"
    yield ok("data", f"{train} of {len(found.classes):,} classes; {found.origin}")
    for note in found.notes:
        yield warn("data", note, "see docs/data.md")
    if cfg.DATA.LOADER == "synthetic":
        return
    source = open_split(cfg.DATA.PATH, "val", cfg.DATA.VAL_LABELS, None).source(found.classes, must_hold_all=False)
    picked = np.unique(np.linspace(0, len(source) - 1, min(len(source), IMAGES)).astype(np.int64))
    started, size = time.perf_counter(), 0
    for index in picked:
        try:
            size += len(source.read(int(index)))
        except OSError as error:
            yield fail(
                "data",
                f"{source.name(int(index))} cannot be read ({error.strerror})",
                "python -m tools.index verifies all",
            )
            return
    seconds = time.perf_counter() - started
    yield ok(
        "reading",
        f"{len(picked) / seconds:,.0f} images/s, {size / seconds / 1e6:.0f} MB/s by one process, one at a time, in "
        f"{file_system(Path(cfg.DATA.PATH))}",
    )


def _memory(cfg: CfgNode, memory: Memory, device: torch.device) -> Iterator[Finding]:
    """Compare the estimated memory of training with that of the device."""
    text = f"about {format_bytes(memory.total)} a process for {cfg.TRAIN.MICRO_BATCH} images (estimated)"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory.total > total:
        share = max(
            1, int(cfg.TRAIN.MICRO_BATCH * (total - memory.total + memory.activations) / memory.activations * 0.9)
        )
        yield fail(
            "memory",
            f"{text}; there are {format_bytes(total)}",
            f"--batch-size {share} or less: the global batch stays",
        )
    elif memory.total > FULL * total:
        yield warn(
            "memory", f"{text}; there are {format_bytes(total)}", "a smaller --batch-size leaves room for workspace"
        )
    else:
        yield ok("memory", f"{text}; there are {format_bytes(total)}")


def _disk(cfg: CfgNode, memory: Memory, path: Path) -> Finding:
    """Compare the free space with the size of a run directory: checkpoints, one being written, best weights."""
    kinds = 2 if cfg.EMA.DECAY else 1
    need = SpaceNeed(checkpoint=memory.stored, weights=memory.weights, keep=cfg.CHECKPOINT.KEEP, kinds=kinds).total
    folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    text = f"{format_bytes(free)} free in {folder}, the run writes about {format_bytes(need)} (CHECKPOINT.KEEP {cfg.CHECKPOINT.KEEP})"
    if free < need:
        return fail("disk", text, "make room, lower CHECKPOINT.KEEP, or --output elsewhere")
    if free < ROOM * need:
        return warn("disk", text, "logs, TensorBoard and other runs need space too")
    return ok("disk", text)
