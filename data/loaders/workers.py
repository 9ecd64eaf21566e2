"""The processes that loaders start: they outlive the signals that ask a run to save and stop, and end with their parent.

Schedulers and terminals send those signals to every process of a run. A worker that died of one would take the loader, and
with it the run, down before the checkpoint is written.
"""

import signal
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.process import BaseProcess


class _Popen(popen_fork.Popen):
    def terminate(self) -> None:
        """End the worker as the parent wishes, by the signal that it cannot ignore."""
        self.kill()


class Worker(ForkProcess):
    """A forked process whose `terminate` is `kill`."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_fork.Popen:  # the name that multiprocessing calls
        return _Popen(process_obj)


class Workers(ForkContext):
    """What DataLoader takes as multiprocessing_context."""

    Process = Worker


def ignore_signals(_: int) -> None:
    """Leave the signals to the parent; DataLoader's worker_init_fn."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
