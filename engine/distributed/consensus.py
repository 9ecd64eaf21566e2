"""What one process wants to do, all do at the same update: small numbers exchanged in the background."""

from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import TypeVar

import torch
import torch.distributed as dist

from engine.distributed.processes import Processes

T = TypeVar("T")


class Vote(IntEnum):
    """What a process wants of all; the largest wish of any is what happens."""

    GO_ON = 0
    STOP = 1  # save and stop: a signal came
    FAIL = 2  # stop with an error: checkpoints cannot be written


class Consensus:
    """Lets all processes learn of one another's wishes without waiting for one another, or for the device.

    Each poll sends this process's wish on its way, through gloo between the hosts, and returns the largest one of the poll
    before: what a process wishes in an update happens on all of them after the next. One process agrees with itself at once.
    """

    def __init__(self, processes: Processes, own: Callable[[], Vote]):
        self.processes, self.own = processes, own
        self._box = torch.zeros(1, dtype=torch.int64)
        self._sent: dist.Work | None = None

    def poll(self) -> Vote:
        """Return what all agreed on at the poll before; called by all processes equally often."""
        if self.processes.world == 1:
            return self.own()
        before = self._received()
        self._box.fill_(int(self.own()))
        self._sent = dist.all_reduce(self._box, dist.ReduceOp.MAX, group=self.processes.hosts, async_op=True)
        return before

    def agree(self) -> Vote:
        """Return what all agree on now; waits for all processes."""
        before = self.poll()
        return max(before, self._received()) if self.processes.world > 1 else before

    def watch(self, batches: Iterable[T], length: int, check: Callable[[Vote], None]) -> Iterator[T]:
        """Yield this process's `length` batches; `check` gets the result of a poll before each.

        Processes with fewer batches than others poll as often as those, so that all stop at the same one.
        """
        longest = self.processes.largest(length)
        yielded = 0
        for batch in batches:
            check(self.poll())
            yielded += 1
            yield batch
        for _ in range(longest - yielded):
            check(self.poll())

    def _received(self) -> Vote:
        if self._sent is None:
            return Vote.GO_ON
        self._sent.wait()
        self._sent = None
        return Vote(int(self._box))
