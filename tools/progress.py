"""Progress of a long command: a bar on a terminal, ten lines elsewhere."""

from collections.abc import Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def with_progress(
    items: Iterator[T],
    total: int,
    console: Console,
    *,
    title: str,
    done: str,
    transient: bool = False,
    fewest: int = 0,
) -> Iterator[T]:
    """Pass items on and show progress on the console: a bar with `title`, or lines where it is no terminal.

    `done` is the text of a line, with the fields `count` and `total`; there are none for fewer than `fewest` items.
    """
    if console.is_terminal:
        yield from track(items, title, total, console=console, transient=transient)
        return
    for count, item in enumerate(items, 1):
        if total >= fewest and count * 10 // total > (count - 1) * 10 // total:
            console.print(done.format(count=count, total=total))
        yield item
