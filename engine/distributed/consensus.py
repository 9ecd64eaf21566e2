"""Consensus of all processes to stop or fail at the same update: votes exchanged in the background."""

from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import TypeVar

import torch
import torch.distributed as dist

from engine.distributed.processes import Processes

T = TypeVar("T")


class Vote(IntEnum):
    """Vote of one process; the largest vote of all processes decides."""

    GO_ON = 0
    STOP = 1  # save and stop: a signal was received
    FAIL = 2  # stop with an error: checkpoints cannot be written


class Consensus:
    """Exchange of votes between all processes, without waiting for one another or for the device.

    Each poll starts an all-reduce of this process's vote through gloo and returns the result of the poll before: a vote cast
    in one update takes effect on all processes after the next. With one process its vote takes effect at once.
    """

    def __init__(self, processes: Processes, own_vote: Callable[[], Vote]):
        self.processes, self.own_vote = processes, own_vote
        self._buffer = torch.zeros(1, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def poll(self) -> Vote:
        """Return the decision of the previous poll; must be called equally often by all processes."""
        if self.processes.world == 1:
            return self.own_vote()
        previous = self._receive()
        self._buffer.fill_(int(self.own_vote()))
        self._pending = dist.all_reduce(self._buffer, dist.ReduceOp.MAX, group=self.processes.host_group, async_op=True)
        return previous

    def agree(self) -> Vote:
        """Return the decision of the current votes; waits for all processes."""
        previous = self.poll()
        return max(previous, self._receive()) if self.processes.world > 1 else previous

    def watch(self, batches: Iterable[T], length: int, check: Callable[[Vote], None]) -> Iterator[T]:
        """Yield this process's `length` batches; call `check` with the result of a poll before each.

        Processes with fewer batches than others poll as often as those, so that all stop at the same batch.
        """
        longest = self.processes.largest(length)
        yielded = 0
        for batch in batches:
            check(self.poll())
            yielded += 1
            yield batch
        for _ in range(longest - yielded):
            check(self.poll())

    def _receive(self) -> Vote:
        """Wait for the exchange under way, if there is one; return its result."""
        if self._pending is None:
            return Vote.GO_ON
        self._pending.wait()
        self._pending = None
        return Vote(int(self._buffer))
