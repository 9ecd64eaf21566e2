"""Worker processes of loaders: they ignore the signals that make a run save and stop, and end with their parent.

Schedulers and terminals send those signals to every process of a run. A worker ended by one would end the loader, and with
it the run, before the checkpoint is written.
"""

import signal
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.process import BaseProcess


class _Popen(popen_fork.Popen):
    def terminate(self) -> None:
        """End the worker by SIGKILL, since it ignores SIGTERM."""
        self.kill()


class Worker(ForkProcess):
    """A forked process whose `terminate` is `kill`."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_fork.Popen:  # name used by multiprocessing
        return _Popen(process_obj)


class Workers(ForkContext):
    """Multiprocessing context of worker processes, for DataLoader."""

    Process = Worker


def ignore_signals(_: int) -> None:
    """Ignore SIGTERM, SIGUSR1 and SIGINT in a worker, for DataLoader's worker_init_fn."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
