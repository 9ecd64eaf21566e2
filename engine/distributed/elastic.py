"""Elastic runs: torchrun starts all processes again when one or a node is lost or comes, with as many as there are then.

The global batch stays. A number of processes that it cannot be divided among trains on the largest number below that it can
be; the others stand by, ready for the next restart. An end that every restart would come to again closes the meeting.
"""

import os
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from engine.batch_plan import divisors

FINISHED, LEFT = "retoken/finished", "retoken/left"  # in the store of the main process
PATIENCE_S = 60.0  # for torchrun's restart once the main process is gone, and for processes that leave


class Elastic:
    """Which of the processes that torchrun started take part; made before they are joined."""

    def __init__(self, global_batch: int, micro_batch: int, environ: MutableMapping[str, str] = os.environ):
        self.environ = environ
        self.on = int(environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
        self.came = self.used = int(environ.get("WORLD_SIZE", 1))
        self.rank = int(environ.get("RANK", 0))
        if self.on and global_batch % micro_batch == 0:
            self.used = max(n for n in divisors(global_batch // micro_batch) if n <= self.came)
            environ["WORLD_SIZE"] = str(self.used)

    @property
    def idle(self) -> bool:
        """Whether this process stands by."""
        return self.rank >= self.used

    def notes(self, save_every: int) -> list[str]:
        """Return what a user should know of this start; `save_every` is in updates, 0 for the end of an epoch only."""
        found = []
        if self.used < self.came:
            found.append(
                f"{self.came} processes came, the global batch divides among {self.used}: {self.came - self.used} stand by "
                "until the next restart; lower TRAIN.MICRO_BATCH to use them, in another run"
            )
        if self.on and self.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            found.append(
                "torchrun --max_restarts without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: what dead processes left in its store "
                "can spoil restarts; set it, or use launch_scripts/elastic.sh"
            )
        if self.on and not save_every:
            found.append(
                "CHECKPOINT.EVERY_UPDATES=0: a restart goes back to the end of an epoch; set it to lose fewer updates"
            )
        return found

    def stand_by(self, stopped: Callable[[], bool]) -> None:
        """Wait until the run has finished, or `stopped` says that a signal came; torchrun ends the process at a restart."""
        store = self._store()
        while not stopped():
            try:
                store.wait([FINISHED], timedelta(seconds=1))
                store.add(LEFT, 1)
                return
            except dist.DistStoreError:
                continue
            except (
                dist.DistNetworkError
            ):  # the main process died: leaving in peace would keep this node out of the restart
                break
        deadline = time.monotonic() + PATIENCE_S
        while not stopped() and time.monotonic() < deadline:
            time.sleep(0.2)
        with suppress(dist.DistStoreError, dist.DistNetworkError):  # nobody waits for one that a signal stopped
            store.add(LEFT, 1)

    def finish(self) -> None:
        """Let those who stand by go; called by the main process, before it leaves, if the run ends in order."""
        if self.rank or self.used == self.came:
            return
        with suppress(dist.DistStoreError, dist.DistNetworkError):
            store = self._store()
            store.set(FINISHED, "1")
            deadline = time.monotonic() + PATIENCE_S
            while store.add(LEFT, 0) < self.came - self.used and time.monotonic() < deadline:
                time.sleep(0.05)

    def _store(self) -> dist.TCPStore:
        """Return a connection to the main process, which listens as soon as it has started."""
        address, port = self.environ["MASTER_ADDR"], int(self.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=30), wait_for_workers=False)


def give_up(environ: Mapping[str, str] = os.environ) -> None:
    """Let torchrun start nothing again, on any node: the run would come to the same end. Called before a process fails.

    $RETOKEN_MEETING, from launch_scripts/elastic.sh, says where the nodes meet; without it torchrun tries all its restarts.
    """
    address, _, port = environ.get("RETOKEN_MEETING", "").rpartition(":")
    run_id = environ.get("TORCHELASTIC_RUN_ID")
    if not (address and run_id):
        return
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

    with suppress(dist.DistStoreError, dist.DistNetworkError, RendezvousError):  # then the restarts are tried
        store = dist.TCPStore(
            address, int(port), is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False
        )
        backend = C10dRendezvousBackend(store, run_id)
        DynamicRendezvousHandler.from_backend(run_id, store, backend, 1, 1).set_closed()
