"""Handlers of signals that ask a run to save and stop. Imports no torch: they are installed before its import, which takes seconds."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType

PREEMPTED = os.EX_TEMPFAIL  # exit status 75: stopped early, the same command continues
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_S = 1.0  # Ctrl-C within this time is a repeat: torchrun forwards a terminal's Ctrl-C to its processes at once
ENDED = 130  # exit status after the second Ctrl-C, as in a shell


class PreemptedError(Exception):
    """Raised when all processes have agreed to save and stop."""


class StopSignals:
    """Record of the signals that ask the run to stop; the training loop reads `received` between updates.

    SIGTERM and SIGUSR1 are only recorded, however often they are received: launchers and schedulers both send them. So is Ctrl-C
    after `defer`; a second one, REPEAT_S or more later, ends the process at once. Python runs signal handlers in the main
    thread only after it returns from C++, where it may hang in a collective with a dead process: a thread counts Ctrl-C.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferring = False
        self._first_ctrl_c: float | None = None

    def listen(self) -> None:
        """Install the handlers; must be called in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # A loader's worker must not write its own signals to the pipe.
        os.register_at_fork(after_in_child=_reset_wakeup)
        threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()

    def defer(self) -> None:
        """Save and stop on Ctrl-C from now on; before, it raises KeyboardInterrupt as usual."""
        self.deferring = True

    def release(self) -> None:
        """Ignore further signals once everything is saved, so that they cannot change the exit status."""
        if self.deferring and signal.getsignal(signal.SIGTERM) == self._receive:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self.deferring:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)

    def _watch(self, reading: int) -> None:
        """End the process at the second Ctrl-C, even if the main thread hangs; runs in a thread."""
        while numbers := os.read(reading, 64):
            if signal.SIGINT in numbers:
                self._count_ctrl_c()

    def _count_ctrl_c(self) -> None:
        now = time.monotonic()
        if self._first_ctrl_c is None:
            self._first_ctrl_c = now
        elif now - self._first_ctrl_c >= REPEAT_S:
            os.write(
                2,
                b"interrupted twice: ended at once; the same command continues from the last checkpoint, if one is saved\n",
            )
            os._exit(ENDED)


def _reset_wakeup() -> None:
    with contextlib.suppress(ValueError):  # forked from another thread than the main one
        signal.set_wakeup_fd(-1)
