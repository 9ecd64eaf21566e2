"""Findings of tools.doctor: severity, subject, text and remedy."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LEVELS = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    level: str  # ok; warn: may cost time or accuracy; fail: the run would not start or would end early
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
    """Yield findings; an exception of a check becomes a warning, so that the other checks go on."""
    try:
        yield from findings
    except Exception as error:  # drivers and file systems raise many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        yield warn(subject, f"could not be examined ({type(error).__name__}: {reason[:200]})", "try it by hand")
