"""Checks of the machine for tools.doctor: packages, GPUs, communication between processes, system limits."""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.version import Version
from yacs.config import CfgNode

from common.byte_size import format_bytes
from config.command_line import ROOT
from data.loaders.shared_memory import SHM
from data.loaders.workers import default_workers, processes_per_machine
from tools.doctor_findings import Finding, fail, ok, warn

PYTHON = (3, 11)
DALI, MATPLOTLIB = "nvidia-dali", "matplotlib"  # optional packages
TORCHRUN_PORT = 29500
SMALL_SHM = 2**30  # bytes; the default of containers is 64 MiB
FILES = 1024  # open files of a process besides those of its loader
FREE = 0.9  # least free part of a GPU's memory without other users


def packages(cfg: CfgNode | None) -> Iterator[Finding]:
    """Compare Python and the packages with requirements.txt."""
    version = platform.python_version()
    if sys.version_info < PYTHON:
        yield fail(
            "python", f"{version}, {'.'.join(map(str, PYTHON))} or newer is needed", "make a new environment with it"
        )
    else:
        yield ok("python", f"{version}, {sys.executable}")
    found, missing = [], []
    for requirement in requirements(ROOT / "requirements.txt"):
        try:
            have = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
            continue
        if Version(have) in requirement.specifier or requirement.specifier.contains(have, prereleases=True):
            found.append(f"{requirement.name} {have}")
        else:
            yield fail(
                "packages",
                f"{requirement.name} {have}, {requirement.specifier} is needed",
                f"pip install '{requirement}'",
            )
    yield ok("packages", ", ".join(found))
    for requirement in missing:
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        if requirement.name.startswith(DALI) and not (cfg and cfg.DATA.LOADER == "dali"):
            yield warn("packages", f"{requirement.name} is not installed: DATA.LOADER dali will not work", install)
        elif requirement.name == MATPLOTLIB:
            yield warn("packages", "matplotlib is not installed: no pictures of the models", install)
        else:
            yield fail("packages", f"{requirement.name} is not installed", install)
    yield _apex()


def requirements(path: Path) -> list[Requirement]:
    """Return the requirements of a file that apply to this system."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return [one for one in found if one.marker is None or one.marker.evaluate()]


def _apex() -> Finding:
    try:
        return ok("apex", f"{importlib.metadata.version('apex')}; nothing here uses it")
    except importlib.metadata.PackageNotFoundError:
        return ok("apex", "not installed; only OPTIM.BACKEND apex and MODEL.NORM_BACKEND apex would need it")


def gpus(cfg: CfgNode | None) -> Iterator[Finding]:
    """Check the GPUs: number, memory, bfloat16, driver, other users."""
    asked = cfg.DEVICE if cfg else "auto"
    driver = _driver()
    if not torch.cuda.is_available():
        if driver:
            built = torch.version.cuda
            why = (
                f"torch {torch.__version__} is built for CUDA {built}"
                if built
                else f"torch {torch.__version__} has no CUDA"
            )
            yield fail(
                "gpu",
                f"the driver {driver} is there, but torch sees no GPU: {why}",
                "install a torch for this driver, or update the driver; see CUDA_VISIBLE_DEVICES too",
            )
        elif asked == "cuda":
            yield fail("gpu", "DEVICE=cuda, and there is no GPU", "set DEVICE to auto, or ask for a node with GPUs")
        else:
            yield warn("gpu", "none: the CPU trains, which is for trying things out", "ask for a node with GPUs")
        return
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"{index}: {props.name}, {format_bytes(total)}, compute capability {props.major}.{props.minor}"
        if free < FREE * total:
            yield warn("gpu", f"{text}; only {format_bytes(free)} are free", "see nvidia-smi for who else is on it")
        else:
            yield ok("gpu", text)
    yield ok("driver", f"{driver or 'unknown'}, torch {torch.__version__} with CUDA {torch.version.cuda}")
    amp = cfg.TRAIN.AMP if cfg else "bf16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield ok("bf16", "supported")
    elif amp == "bf16":
        yield warn("bf16", "not in this GPU's hardware, TRAIN.AMP is bf16", "--amp fp16")
    else:
        yield ok("bf16", f"not in this GPU's hardware; TRAIN.AMP is {amp}")


def _driver() -> str:
    """Return the version of the NVIDIA driver, "" if there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n")[0].strip()


def communication() -> Iterator[Finding]:
    """Check collective communication with one process, the host name, and torchrun's port."""
    cuda = torch.cuda.is_available()
    for backend, device in (("nccl", "cuda"), ("gloo", "cpu")):
        if backend == "nccl" and not cuda:
            yield ok("nccl", "not needed without a GPU")
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                _all_reduce_alone(backend, device, folder)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            yield fail(
                backend,
                f"a sum over one process fails ({first[:160]})",
                "set NCCL_DEBUG=INFO, or GLOO_SOCKET_IFNAME to a network interface, and try again",
            )
        else:
            version = f" {'.'.join(map(str, torch.cuda.nccl.version()))}" if backend == "nccl" else ""
            yield ok(backend, f"works{version}")
    yield _host()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", TORCHRUN_PORT))
        except OSError:
            yield warn(
                "port",
                f"{TORCHRUN_PORT}, which torchrun takes, is in use: another run?",
                "torchrun --master_port ANOTHER for several nodes; one node needs nothing",
            )
        else:
            yield ok("port", f"{TORCHRUN_PORT} is free")


def _all_reduce_alone(backend: str, device: str, folder: str) -> None:
    """All-reduce a tensor over a world of one process. Raises RuntimeError if that fails."""
    if dist.is_initialized():
        return
    dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
    try:
        tensor = torch.ones(2, device=device)
        dist.all_reduce(tensor)
        if tensor.tolist() != [1, 1]:
            raise RuntimeError(f"the sum of ones over one process is {tensor.tolist()}")
    finally:
        dist.destroy_process_group()


def _host() -> Finding:
    """Check that the host name resolves."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return warn(
            "host",
            f"{name} does not resolve: several nodes would not find this one, gloo may not start",
            f"add '127.0.0.1 {name}' or its address to /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )
    return ok("host", f"{name} is {address}")


def limits(cfg: CfgNode | None) -> Iterator[Finding]:
    """Check cores, /dev/shm, open files and the clock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cfg.DATA.WORKERS if cfg and cfg.DATA.WORKERS >= 0 else default_workers()
    if workers * processes_per_machine() > 2 * cores:
        yield warn(
            "cores",
            f"{cores}, for {workers} loader processes x {processes_per_machine()} training processes",
            f"DATA.WORKERS {max(1, cores // processes_per_machine())}, or -1",
        )
    else:
        yield ok("cores", f"{cores}; {workers} loader processes for each training process")
    yield _shm()
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    prefetch = cfg.DATA.PREFETCH if cfg else 4
    need = FILES + 4 * workers * prefetch  # a batch takes four: three tensors and one more
    if files != resource.RLIM_INFINITY and files < need:
        raised = (
            f"ulimit -n {need}"
            if hard == resource.RLIM_INFINITY or hard >= need
            else f"raise the hard limit ({hard}) too"
        )
        yield warn(
            "ulimit -n",
            f"{files} open files, {workers} loader processes may take {need}",
            f"{raised} in the job script",
        )
    else:
        yield ok("ulimit -n", "no limit" if files == resource.RLIM_INFINITY else f"{files} open files")
    year = time.localtime().tm_year
    if year < 2025:
        yield warn(
            "clock",
            f"is set to {time.strftime('%Y-%m-%d %H:%M')}",
            "set it: logs, manifests and certificates depend on it",
        )
    else:
        yield ok("clock", time.strftime("%Y-%m-%d %H:%M %Z"))


def _shm() -> Finding:
    """Check the free space in /dev/shm; the need of a config's loader is checked when its data is built."""
    if not SHM.is_dir():
        return ok(str(SHM), "not there; loader processes hand over batches in files")
    status = os.statvfs(SHM)
    free = status.f_bavail * status.f_frsize
    if free < SMALL_SHM:
        return warn(
            str(SHM),
            f"{format_bytes(free)} free",
            "docker run --shm-size=8g or --ipc=host; Kubernetes: an emptyDir with medium Memory",
        )
    return ok(str(SHM), f"{format_bytes(free)} free")
