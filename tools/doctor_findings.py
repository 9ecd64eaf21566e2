"""What the doctor finds: how bad it is, and what to do about it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LEVELS = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """One thing that was examined."""

    level: str  # ok, warn: it may cost time or accuracy, fail: the run would not start or would not survive
    subject: str
    text: str
    remedy: str = ""


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warn(subject: str, text: str, remedy: str) -> Finding:
    return Finding("warn", subject, text, remedy)


def fail(subject: str, text: str, remedy: str) -> Finding:
    return Finding("fail", subject, text, remedy)


def guarded(subject: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield findings; an examination that breaks off is a finding itself and does not end the others."""
    try:
        yield from findings
    except Exception as error:  # whatever a driver or a file system comes up with
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        yield warn(subject, f"could not be examined ({type(error).__name__}: {reason[:200]})", "try it by hand")
