"""Output of the tools on a terminal: names that hold control characters, or rich's markup, cannot steer it or forge lines."""

from typing import Any

from rich.console import Console
from rich.text import Text

from common.text import readable


class Screen(Console):
    """Console without markup and highlighting; each text is a line, its control characters escaped."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts, also `Text`, as `readable` returns them, and other renderables as they are."""
        super().print(*map(_safe, objects), **{"markup": False, **options})


def _safe(shown: Any) -> Any:
    if isinstance(shown, str):
        return readable(shown)
    if isinstance(shown, Text):
        safe = readable(shown.plain)
        return shown if safe == shown.plain else Text(safe, shown.style)
    return shown


def say(*lines: str) -> None:
    """Print lines to stdout, as `readable` returns them."""
    for line in lines:
        print(readable(line))
