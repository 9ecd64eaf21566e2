"""Signals that ask a run to save and stop. Imports no torch: the handlers stand before it is loaded, which takes seconds."""

import os
import signal
import time
from types import FrameType

PREEMPTED = os.EX_TEMPFAIL  # 75: stopped early, the same command continues
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
APART = 1.0  # seconds; torchrun repeats a terminal's Ctrl-C to its processes at once, a person takes longer


class PreemptedError(Exception):
    """All processes have agreed to save and stop."""


class Interruption:
    """Remembers that a signal asked the run to stop; whoever trains looks at it between updates.

    SIGTERM and SIGUSR1 are only remembered, however often they come: launchers and schedulers both send them. So is Ctrl-C
    once something can be lost (`defer`); another one, a second or more later, ends the process at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferring = False
        self._first_ctrl_c: float | None = None

    def listen(self) -> None:
        """Take over the signals; in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def defer(self) -> None:
        """Answer Ctrl-C by saving from now on; before, it raises KeyboardInterrupt as ever."""
        self.deferring = True

    def release(self) -> None:
        """Ignore what still comes, so that it cannot change the exit status: everything is saved."""
        if self.deferring and signal.getsignal(signal.SIGTERM) == self._receive:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if not self.deferring:
                raise KeyboardInterrupt
            if self._first_ctrl_c is None:
                self._first_ctrl_c = time.monotonic()
            elif time.monotonic() - self._first_ctrl_c >= APART:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
        self.received = self.received or signal.Signals(number)
