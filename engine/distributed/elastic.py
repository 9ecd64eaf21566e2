"""Elastic runs: torchrun restarts all processes with the number that is left when a process or node is lost or joins.

The global batch stays the same. If it cannot be divided among the launched processes, the largest smaller number that divides
it trains; the others stand by until the next restart. A failure that every restart would repeat closes torchrun's rendezvous.
"""

import os
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from engine.batch_plan import divisors

FINISHED, LEFT = "retoken/finished", "retoken/left"  # keys in the store of the main process
WAIT_S = 60.0  # for torchrun's restart after the main process has died, and for idle processes to leave


class Elastic:
    """Choice of the launched processes that take part in training; made before the process group is initialised.

    Sets WORLD_SIZE in `environ` to the number of those that take part.
    """

    def __init__(self, global_batch: int, micro_batch: int, environ: MutableMapping[str, str] = os.environ):
        self.environ = environ
        self.restarts = int(environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
        self.launched = self.active = int(environ.get("WORLD_SIZE", 1))
        self.rank = int(environ.get("RANK", 0))
        if self.restarts and global_batch % micro_batch == 0:
            self.active = max(n for n in divisors(global_batch // micro_batch) if n <= self.launched)
            environ["WORLD_SIZE"] = str(self.active)

    @property
    def idle(self) -> bool:
        """Return True if this process stands by until the next restart."""
        return self.rank >= self.active

    def notes(self, save_every: int) -> list[str]:
        """Return the warnings of this start; `save_every` is in updates, 0 for the end of an epoch only."""
        notes = []
        if self.active < self.launched:
            notes.append(
                f"{self.launched} processes were launched, the global batch divides among {self.active}: "
                f"{self.launched - self.active} stand by until the next restart; lower TRAIN.MICRO_BATCH to use them, in another run"
            )
        if self.restarts and self.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            notes.append(
                "torchrun --max_restarts without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: what dead processes left in its store "
                "can spoil restarts; set it, or use launch_scripts/elastic.sh"
            )
        if self.restarts and not save_every:
            notes.append(
                "CHECKPOINT.EVERY_UPDATES=0: a restart goes back to the end of an epoch; set it to lose fewer updates"
            )
        return notes

    def stand_by(self, stopped: Callable[[], bool]) -> None:
        """Wait until the run has finished or `stopped` returns True; torchrun ends the process at a restart."""
        store = self._store()
        while not stopped():
            try:
                store.wait([FINISHED], timedelta(seconds=1))
                store.add(LEFT, 1)
                return
            except dist.DistStoreError:
                continue
            except dist.DistNetworkError:
                # The main process died: exit status 0 would exclude this node from the restart.
                break
        deadline = time.monotonic() + WAIT_S
        while not stopped() and time.monotonic() < deadline:
            time.sleep(0.2)
        with suppress(dist.DistStoreError, dist.DistNetworkError):  # after a signal nobody waits for this process
            store.add(LEFT, 1)

    def finish(self) -> None:
        """Release the idle processes; called on every process after a normal end, acts on the main one."""
        if self.rank or self.active == self.launched:
            return
        with suppress(dist.DistStoreError, dist.DistNetworkError):
            store = self._store()
            store.set(FINISHED, "1")
            deadline = time.monotonic() + WAIT_S
            while store.add(LEFT, 0) < self.launched - self.active and time.monotonic() < deadline:
                time.sleep(0.05)

    def _store(self) -> dist.TCPStore:
        """Connect to the store of the main process, waiting until it has started."""
        address, port = self.environ["MASTER_ADDR"], int(self.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=30), wait_for_workers=False)


def prevent_restarts(environ: Mapping[str, str] = os.environ) -> None:
    """Close torchrun's rendezvous, so that no node restarts a run that would fail again. Called before a process fails.

    Its message must have been printed: torchrun may kill the processes as soon as the rendezvous is closed.
    $RETOKEN_MEETING, from launch_scripts/elastic.sh, is the address of the rendezvous; without it torchrun tries all restarts.
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
