"""Signals that ask a run to save and stop. Imports no torch: the handlers stand before it is loaded, which takes seconds."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType

PREEMPTED = os.EX_TEMPFAIL  # 75: stopped early, the same command continues
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
APART = 1.0  # seconds; torchrun repeats a terminal's Ctrl-C to its processes at once, a person takes longer
ENDED = 130  # exit status after the second Ctrl-C, as a shell has it


class PreemptedError(Exception):
    """All processes have agreed to save and stop."""


class StopSignals:
    """Remembers that a signal asked the run to stop; whoever trains looks at it between updates.

    SIGTERM and SIGUSR1 are only remembered, however often they come: launchers and schedulers both send them. So is Ctrl-C
    once something can be lost (`defer`); another one, a second or more later, ends the process at once. Python's handlers wait
    until the main thread is back from C++, which may hang in an exchange with a process that is gone: a thread counts Ctrl-C.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferring = False
        self._first_ctrl_c: float | None = None

    def listen(self) -> None:
        """Take over the signals; in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_wakeup)  # a loader's worker must not tell of its own signals
        threading.Thread(target=self._watch, args=(told,), name="signals", daemon=True).start()

    def defer(self) -> None:
        """Answer Ctrl-C by saving from now on; before, it raises KeyboardInterrupt as ever."""
        self.deferring = True

    def release(self) -> None:
        """Ignore what still comes, so that it cannot change the exit status: everything is saved."""
        if self.deferring and signal.getsignal(signal.SIGTERM) == self._receive:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self.deferring:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)

    def _watch(self, told: int) -> None:
        """End the process at the second Ctrl-C, whatever the main thread does; in a thread."""
        while numbers := os.read(told, 64):
            if signal.SIGINT in numbers:
                self._count_ctrl_c()

    def _count_ctrl_c(self) -> None:
        now = time.monotonic()
        if self._first_ctrl_c is None:
            self._first_ctrl_c = now
        elif now - self._first_ctrl_c >= APART:
            os.write(2, b"interrupted twice: ended at once; the same command continues from the last checkpoint\n")
            os._exit(ENDED)


def _forget_wakeup() -> None:
    with contextlib.suppress(ValueError):  # forked from another thread than the main one
        signal.set_wakeup_fd(-1)
