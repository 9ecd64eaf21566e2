"""Widgets of the live view: progress bars, counts, times, labelled numbers, sparklines."""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import pairwise

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
DIM, VALUE, CURVE, GOOD, BAD = "dim", "bold", "cyan", "green", "red"  # styles


def cropped(console: Console, content: RenderableType, options: ConsoleOptions) -> Iterator[Segment]:
    """Render content to lines no wider than the options allow, also on a console that soft-wraps long lines."""
    lines = console.render_lines(content, options, pad=False)
    for number, line in enumerate(lines):
        yield from line
        if number < len(lines) - 1:
            yield Segment.line()


def bar(done: int, total: int) -> ProgressBar:
    """Return a progress bar that fills the available width."""
    return ProgressBar(total=max(total, 1), completed=done, complete_style=CURVE, finished_style=GOOD)


def count(label: str, done: int, total: int) -> Text:
    """Format a labelled count, padded to its final width."""
    return Text.assemble((f"{label} ", DIM), f"{done:>{len(str(total))}}", (f"/{total}", DIM))


def time_left(seconds: float) -> Text:
    """Format a remaining time; an ellipsis if it is not finite."""
    return Text.assemble(duration(max(seconds, 0.0)), (" left", DIM)) if math.isfinite(seconds) else Text("…", DIM)


def end_time(seconds: float) -> str:
    """Format the time of day that is so many seconds ahead, with the date unless that is today."""
    now = datetime.now()
    end = now + timedelta(seconds=max(seconds, 0.0))
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%a %d %b %H:%M}"


def duration(seconds: float) -> str:
    """Format a duration: 0:07, 1:02:03, 2d 03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def labelled(label: str, value: str, style: str = VALUE) -> Text:
    """Format a number with its label."""
    return Text.assemble((f"{label} ", DIM), (value, style))


def flow(items: Sequence[Text], width: int) -> Text:
    """Join items into lines of at most `width` columns."""
    text, column = Text(no_wrap=True, overflow="ellipsis"), 0
    for item in items:
        if column and column + 3 + cell_len(item.plain) > width:
            text.append("\n")
            column = 0
        elif column:
            text.append("   ")
            column += 3
        text.append_text(item)
        column += cell_len(item.plain)
    return text


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values as blocks, scaled from their minimum to their maximum; more than `width` are averaged over neighbours."""
    if len(values) > width:
        edges = [i * len(values) // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def shorten(text: str, width: int) -> str:
    """Shorten a text to `width` columns by an ellipsis in its middle."""
    return text if len(text) <= width else f"{text[: (width - 1) // 2]}…{text[-(width // 2) :]}"
