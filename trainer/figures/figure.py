"""Figures of panels: a single one at the photograph's resolution, or a contact sheet of many."""

from collections.abc import Sequence
from itertools import groupby
from math import ceil, inf
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from common.text import readable
from trainer.figures.panels import Panel

FORMATS = ("png", "pdf", "svg")
WIDTH = 4.0  # of a panel, inches
STRIP = 0.5  # below a panel, for its scale, inches
HEAD = 0.3  # above it, for its title
MARGIN = 0.12
CAPTION = 10  # points; less where it would not fit
SHEET_PIXELS = 480  # width of a panel on a sheet
SMALL = 1000  # pixels; a narrower photograph is enlarged by a whole factor, for lines and text to be fine
COLUMNS = 4  # at most so many panels beside the photograph
TALL = 1.5  # height by width of a panel on a sheet, at most
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a name with $ is no formula
    "svg.fonttype": "none",  # text stays text
    "pdf.fonttype": 42,
    "axes.linewidth": 0.5,
}


def single(panel: Panel, caption: str = "") -> Figure:
    """Return a figure of one panel; in a PNG a pixel of the photograph is one pixel, of a small photograph k×k."""
    width = panel.pixels.shape[1]
    return _grid([[panel]], [caption], width * max(1, ceil(SMALL / width)) / WIDTH, inf)


def sheet(rows: Sequence[Sequence[Panel]], captions: Sequence[str]) -> Figure:
    """Return a contact sheet: for each photograph a caption, the photograph, and beside it the panels, stage by stage."""
    lines: list[list[Panel | None]] = []
    heads: list[str] = []
    for panels, caption in zip(rows, captions, strict=True):
        first = [next((panel for panel in panels if not panel.stage), None)]
        beside = arrange_in_lines([panel for panel in panels if panel.stage]) or [[]]
        lines += [[*(first if not i else [None]), *line] for i, line in enumerate(beside)]
        heads += [caption, *[""] * (len(beside) - 1)]
    return _grid(lines, heads, SHEET_PIXELS / WIDTH, TALL)


def arrange_in_lines(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Arrange panels in lines, with the number of columns that leaves the fewest cells empty; stages that fit whole share a line."""
    stages = [list(group) for _, group in groupby(panels, lambda panel: panel.stage)]
    found = []
    for columns in range(min(3, len(panels)), COLUMNS + 1):
        lines: list[list[Panel]] = []
        ragged = 0  # stages of several lines that do not fill them
        for stage in stages:
            pieces = [stage[i : i + columns] for i in range(0, len(stage), max(columns, 1))]
            if lines and len(lines[-1]) + len(pieces[0]) <= columns and len(pieces) == 1:
                lines[-1] += pieces.pop(0)
            lines += pieces
            ragged += len(pieces) > 1 and len(pieces[-1]) < columns
        found.append((columns * len(lines) - len(panels) + ragged, len(lines), lines))
    return min(found, key=lambda one: one[:2])[2]


def _grid(lines: Sequence[Sequence[Panel | None]], captions: Sequence[str], dpi: float, tall: float) -> Figure:
    """Draw panels line by line, with captions above the lines; panels are at most `tall` times as high as wide."""
    columns = max(len(line) for line in lines)
    heads = [HEAD if caption else 0.0 for caption in captions]
    sizes = [_sizes([panel for panel in line if panel], tall) for line in lines]
    total = sum(heads) + sum(HEAD + height + strip for height, strip in sizes)
    with mpl.rc_context(STYLE):
        figure = Figure((columns * (WIDTH + MARGIN) + MARGIN, total), dpi=dpi)
        FigureCanvasAgg(figure)
        across, down = figure.get_size_inches()
        y = total
        for line, caption, head, (height, strip) in zip(lines, captions, heads, sizes, strict=True):
            if caption:
                text = figure.text(MARGIN / across, (y - 0.22) / down, readable(caption), weight="bold", size=CAPTION)
                room = (across - 2 * MARGIN) * dpi / text.get_window_extent().width
                text.set_fontsize(CAPTION * min(1.0, 0.95 * room))  # hinted letters do not shrink evenly
            y -= head + HEAD + height
            for i, panel in enumerate(line):
                if panel is None:
                    continue
                x = MARGIN + i * (WIDTH + MARGIN)
                draw(figure.add_axes((x / across, y / down, WIDTH / across, height / down)), panel)
                if panel.scale:
                    area = (x + 0.42 * WIDTH) / across, (y - 0.14) / down, 0.4 * WIDTH / across, 0.08 / down
                    _scale(figure, figure.add_axes(area), panel)
            y -= strip
        return figure


def _sizes(line: Sequence[Panel], tall: float) -> tuple[float, float]:
    """Return the height in inches of a line of panels, and of the strip below them."""
    height = WIDTH * min(max(panel.pixels.shape[0] / panel.pixels.shape[1] for panel in line), tall)
    return height, STRIP if any(panel.scale or panel.legend for panel in line) else MARGIN


def draw(axes: Axes, panel: Panel) -> None:
    """Draw a panel's pixels, lines, frame, mark, title and legend."""
    height, width = panel.pixels.shape[:2]
    axes.imshow(panel.pixels, extent=(0, width, height, 0), interpolation="auto", aspect="equal")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(readable(panel.title), size=9, pad=4)
    for side in axes.spines.values():
        side.set_visible(False)
    left, top, right, bottom = panel.seen
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, linewidth=0.6, edgecolor="0.2")
    axes.add_patch(frame)
    if len(panel.lines):
        for colour, thickness in (("black", 1.0), ("white", 0.5)):
            lines = LineCollection(list(panel.lines), colors=colour, linewidths=thickness, capstyle="projecting")
            axes.add_collection(lines, autolim=False)
            lines.set_clip_path(frame)  # afterwards: the axes set their own
    if panel.mark:
        around = [patheffects.withStroke(linewidth=3.5, foreground="black")]
        axes.plot(*panel.mark, "+", color="white", markersize=11, markeredgewidth=1.6, path_effects=around)
    if panel.legend:
        handles = [Patch(facecolor=colour, label=text) for text, colour in panel.legend]
        axes.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.005),
            ncols=len(handles),
            frameon=False,
            fontsize=7.5,
            handlelength=1.0,
            handletextpad=0.5,
            columnspacing=1.2,
        )


def _scale(figure: Figure, axes: Axes, panel: Panel) -> None:
    scale = panel.scale
    assert scale is not None
    mappable = ScalarMappable(Normalize(scale.low, scale.high), scale.colours)
    bar = figure.colorbar(mappable, cax=axes, orientation="horizontal", extend=scale.beyond, extendfrac=0.04)
    bar.outline.set_linewidth(0.4)
    bar.locator = MaxNLocator(3)
    bar.update_ticks()
    bar.ax.tick_params(labelsize=7, length=2, width=0.4, pad=1.5)
    left = -0.1 if scale.beyond in ("min", "both") else -0.05  # left of the arrow
    axes.text(left, 0.5, scale.label, transform=axes.transAxes, ha="right", va="center", size=7)


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's suffix, reproducibly to the byte."""
    dates = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with mpl.rc_context({**STYLE, "svg.hashsalt": "retoken"}):
        figure.savefig(path, metadata=dates[path.suffix])


def as_pixels(figure: Figure) -> np.ndarray:
    """Return a figure as uint8 (H, W, 3), e.g. for TensorBoard."""
    with mpl.rc_context(STYLE):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
