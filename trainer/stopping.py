"""The end of a start: saving the last state, the exit status, and the marker files `done` and `preempted` in the run directory."""

from pathlib import Path

from engine.distributed.consensus import Vote
from engine.distributed.signals import PREEMPTED, StopSignals
from trainer.epochs import save
from trainer.session import Session


def finish_saving(s: Session) -> None:
    """Wait for the last write of the checkpoint. Raises SavingError on all processes if it failed."""
    if not s.saver.finish():
        s.saver.give_up()
    if s.consensus.agree() is Vote.FAIL:
        raise s.saver.saving_error()


def stop_early(s: Session, signals: StopSignals) -> int:
    """Save the state after a stop signal, write the marker `preempted` and return the exit status.

    The status is PREEMPTED, except 0 under torchrun, which would end the other processes and turn any other status into 1:
    there only the marker tells of the preemption.
    """
    s.log.end_epoch()
    if s.state.update:
        save(s)
    finish_saving(s)  # or raises: with the marker the job would be restarted for ever, without progress
    if s.processes.main:
        why = signals.received.name if signals.received else "a signal to another process"
        write_marker(s, s.run.preempted, f"by {why} after update {s.state.update}")
        s.log.info(f"stopped by {why} after update {s.state.update}; the same command continues")
    s.consensus.agree()  # no process ends before the marker is written
    signals.release()
    return 0 if s.processes.launcher == "torchrun" else PREEMPTED


def write_marker(s: Session, marker: Path, text: str) -> None:
    """Write the marker `preempted` or `done`, or warn that it cannot be written."""
    try:
        s.run.write_marker(marker, text)
    except OSError as error:
        s.log.warning(f"{marker} cannot be written ({error.strerror}): job scripts that look for it will not find it")


def describe_position(s: Session | None) -> str:
    """Return the position of the run as text, for an error; the session is None while it is built."""
    if s is None:
        return "while it was built"
    if s.state.between_epochs:
        return f"in the evaluation after update {s.state.update}"
    return f"in update {s.state.update + 1}"
