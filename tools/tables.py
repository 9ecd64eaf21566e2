"""Tables of text: aligned columns, Markdown, and rich tables for a terminal."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from common.text import readable


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = False) -> list[str]:
    """Return the lines of a Markdown table; `numeric` aligns all columns but the first at the right."""
    rule = ["---", *["---:" if numeric else "---"] * (len(header) - 1)]
    lines = [[readable(cell).replace("|", "\\|") for cell in cells] for cells in (header, rule, *rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def aligned_columns(rows: Sequence[Sequence[str]], numeric: bool = False) -> list[str]:
    """Return rows as lines of columns, two spaces apart; `numeric` aligns all columns but the first at the right."""
    rows = [[readable(cell) for cell in cells] for cells in rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if numeric and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in rows
    ]


def terminal_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, numeric: bool = False
) -> Table:
    """Return rows as a table for a terminal, without a header where all its cells are empty.

    `numeric` aligns all columns but the first, which is never broken, at the right; otherwise long cells are folded.
    """
    table = Table(title=title and Text(readable(title)), title_justify="left", show_header=any(header))
    for i, name in enumerate(header):
        if numeric:
            table.add_column(name, justify="right" if i else "left", no_wrap=not i)
        else:
            table.add_column(name, overflow="fold")
    for cells in rows:
        table.add_row(*(Text(readable(cell)) for cell in cells))
    return table
