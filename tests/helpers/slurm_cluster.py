"""Real SLURM cluster of two nodes on this machine: loopback only, without systemd, cgroups or accounting; starts in a second."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "sinfo")
SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/m/s,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=15
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1000 Gres=gpu:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=1000 Gres=gpu:2
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def missing() -> list[str]:
    """Return the programs of SLURM and munge that this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=SEARCH_PATH)]


def wait_for(condition: Callable[[], object], expected: str, seconds: float) -> None:
    """Wait until the condition holds. Raises TimeoutError naming what was expected."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {expected}")
        time.sleep(0.02)


class SlurmCluster:
    """Daemons munged, slurmctld and two slurmd as children of this process; a context manager."""

    def __init__(self):
        self.folder = Path(
            tempfile.mkdtemp(prefix="slurm", dir="/tmp")
        )  # the path of a socket is limited to 108 characters
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env = inherited | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH_PATH}
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self):
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if len(self.daemons) > 1:
            self.run("scancel", "--state=PENDING,RUNNING", "--user", str(os.getuid()), check=False)
            with contextlib.suppress(TimeoutError):
                wait_for(lambda: not self.run("squeue", "--noheader", check=False), "an empty queue", 30)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *argv: str, check: bool = True, **env: str) -> str:
        """Run a command of SLURM; return its output."""
        done = subprocess.run(argv, env=self.env | env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *argv: str, **env: str) -> str:
        """Submit a batch job; return its number."""
        return self.run("sbatch", "--parsable", *argv, **env)

    def state(self, job: str) -> str:
        """Return the state of a job, such as COMPLETED, PENDING or RUNNING."""
        return self.job_field(job, "JobState")

    def job_field(self, job: str, key: str) -> str:
        """Return a field of `scontrol show job`."""
        pairs = (word.partition("=") for word in self.run("scontrol", "show", "job", job).split())
        return next(value for name, _, value in pairs if name == key)

    def logs(self) -> str:
        """Return the last lines of the daemons' logs, for the message of a failed test."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def _configure(self):
        sockets = [socket.socket() for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
        (self.folder / "m").mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        for node in ("node1", "node2"):
            (self.folder / f"spool.{node}").mkdir()
        values = {"host": socket.gethostname().split(".")[0], "user": pwd.getpwuid(os.getuid()).pw_name}
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**values, ports=ports, folder=self.folder))
        numbers = tuple(map(int, self.run("slurmctld", "-V").split()[1].split(".")[:2]))
        cgroup = "CgroupPlugin=disabled\n" if numbers >= (23, 11) else "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"
        (self.folder / "cgroup.conf").write_text(cgroup)
        gpus = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # stand-ins: any device file works
        (self.folder / "gres.conf").write_text(gpus)
        key = self.folder / "m/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _start(self):
        munge = self.folder / "m"
        self._daemon(
            *("munged", "-F", "--force", f"--socket={munge}/s", f"--key-file={munge}/key"),
            *(f"--log-file={munge}/log", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"),
        )
        wait_for((munge / "s").exists, "munged", 10)
        self._daemon("slurmctld", "-D", "-c", "-i")
        self._daemon("slurmd", "-D", "-N", "node1")
        self._daemon("slurmd", "-D", "-N", "node2")
        idle = ("sinfo", "--noheader", "--Node", "--format=%T")
        try:
            wait_for(lambda: self.run(*idle, check=False).split() == ["idle", "idle"], "two idle nodes", 30)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{self.logs()}") from error

    def _daemon(self, *argv: str):
        quiet = subprocess.DEVNULL
        program = shutil.which(argv[0], path=SEARCH_PATH)
        self.daemons.append(
            subprocess.Popen([program, *argv[1:]], env=self.env, stdin=quiet, stdout=quiet, stderr=quiet)
        )
