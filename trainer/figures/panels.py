"""Panels of a figure: one attention map drawn over one photograph."""

from dataclasses import dataclass, field

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap

from models.attention_maps import AttentionMap
from trainer.figures.photograph import Photograph

SEQUENTIAL, SIGNED = "viridis", "PuOr_r"  # both legible to the colour-blind, the first also in grey
STRENGTH = 0.4, 0.75  # of the lowest and highest colour over the grey photograph
FADE = 0.65  # blending towards white outside the part that the model sees
TOP = 99.5  # percentile of the values at which colours end: with the maximum single tokens would darken all others
LEVELS = 256  # of a colour map
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
KINDS = {
    "significance": "significance of each token",
    "keys": "key weight, 1 is even",
    "attention": "attention, 1 is even",
}
SIGNED_LABEL = "weight of each token"  # weights do not sum to 1, so there is no even one
TITLES = {"keys": "key weight"}


@dataclass(frozen=True)
class Scale:
    """Colour scale of a map."""

    colours: Colormap
    low: float
    high: float
    label: str
    beyond: str = "neither"  # ends with values beyond them: neither, min, max, both


@dataclass(frozen=True)
class Panel:
    """Picture of a photograph's size, and the lines, frame, mark and legend drawn over it."""

    name: str  # for a file
    stage: int  # counted from 1; 0 for the photograph
    title: str
    pixels: np.ndarray  # uint8 (H, W, 3)
    lines: np.ndarray = field(default_factory=lambda: np.zeros((0, 2, 2)))  # ends in pixels
    scale: Scale | None = None
    legend: tuple[tuple[str, tuple[float, ...]], ...] = ()  # text and colour
    mark: tuple[float, float] | None = None  # the query's pixel
    seen: tuple[int, int, int, int] = (0, 0, 0, 0)


def original(photo: Photograph, mark: tuple[float, float] | None = None) -> Panel:
    """Return the photograph itself, faded where the model does not see it."""
    return Panel("photograph", 0, "photograph", _faded(photo), mark=mark, seen=photo.seen)


def panels(
    found: AttentionMap, index: int, photo: Photograph, mark: tuple[float, float] | None = None, smooth: bool = False
) -> list[Panel]:
    """Return the panels of a map of image `index` of the batch: two for a map of regions, one for other maps."""
    reading = found.reading
    values = reading.values[index].cpu().numpy()
    where = f"stage {found.stage}, block {found.block}"
    if reading.kind == "merged":
        assert reading.level is not None
        return _merged(found, values, reading.level[index].cpu().numpy(), photo, where)
    if reading.kind == "super tokens":
        return _super_tokens(found, values, photo, where)
    part = f", {reading.part}" if reading.part else ""
    received = "received " if reading.kind == "attention" and mark is None else ""
    title = f"{where}: {received}{TITLES.get(reading.kind, reading.kind)}{part}"
    values = values.astype(np.float32)
    scale = _scale(values, SIGNED_LABEL if reading.signed else KINDS[reading.kind], reading.signed)
    enlarged = photo.enlarge(values, found.patch, smooth)
    return [
        Panel(found.name, found.stage, title, _over(photo, enlarged, scale), scale=scale, mark=mark, seen=photo.seen)
    ]


def _scale(values: np.ndarray, label: str, signed: bool) -> Scale:
    top = float(np.percentile(np.abs(values) if signed else values, TOP))
    if signed:
        top = max(top, 1e-12)
        beyond = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(
            (bool(values.min() < -top), bool(values.max() > top)), "neither"
        )
        return Scale(colormaps[SIGNED], -top, top, label, beyond)
    low = float(values.min())
    return Scale(colormaps[SEQUENTIAL], low, max(top, low + 1e-12), label, "max" if values.max() > top else "neither")


def _over(photo: Photograph, enlarged: np.ndarray, scale: Scale) -> np.ndarray:
    """Blend a map's colours with the grey photograph."""
    pixels, window = _faded(photo), photo.window()
    levels = np.linspace(0, 1, LEVELS)
    far = np.abs(2 * levels - 1) if scale.low < 0 else levels  # distance from the neutral value
    share = np.clip((enlarged - np.float32(scale.low)) / np.float32(scale.high - scale.low), 0, 1)
    numbers = np.round((LEVELS - 1) * share).astype(np.uint8)
    pixels[window] = _blend(photo.pixels[window], numbers, scale.colours(levels)[:, :3], far)
    return pixels


def _blend(pixels: np.ndarray, numbers: np.ndarray, colours: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Blend grey pixels with colours (n, 3), 0 to 1, chosen by number; the strength of each rises with its share (n,)."""
    strength = (STRENGTH[0] + (STRENGTH[1] - STRENGTH[0]) * share)[:, None]
    kept, added = (1 - strength).astype(np.float32), (strength * 255 * colours).astype(np.float32)
    return np.round(kept[numbers] * (pixels @ GREY)[..., None] + added[numbers]).astype(np.uint8)


def _merged(found: AttentionMap, values: np.ndarray, level: np.ndarray, photo: Photograph, where: str) -> list[Panel]:
    lengths = sorted(np.unique(level).tolist(), reverse=True)
    colours = colormaps[SEQUENTIAL](np.linspace(0.0, 1.0, max(len(lengths), 2)))[: len(lengths), :3]
    enlarged = photo.enlarge(np.searchsorted(-np.array(lengths), -level), found.patch)
    pixels, window = _faded(photo), photo.window()
    pixels[window] = _blend(photo.pixels[window], enlarged, colours, np.full(len(colours), 0.5))
    counts = [(level == length).sum() for length in lengths]
    legend = tuple(
        (f"{length} tokens become 1" if length > 1 else "kept as they are", tuple(colour))
        for length, colour, count in zip(lengths, colours, counts, strict=True)
        if count
    )
    merged = len(np.unique(values))
    return [
        Panel(
            found.name,
            found.stage,
            f"{where}: {values.size} tokens merged into {merged}",
            pixels,
            boundaries(level, photo, found.patch),
            legend=legend,
            seen=photo.seen,
        ),
        Panel(
            f"{found.name}_means",
            found.stage,
            f"{where}: mean colour of each merged token",
            _mean_colours(photo, photo.enlarge(values, found.patch)),
            seen=photo.seen,
        ),
    ]


def _super_tokens(found: AttentionMap, values: np.ndarray, photo: Photograph, where: str) -> list[Panel]:
    lines = boundaries(values, photo, found.patch)
    count = len(np.unique(values))
    means = _mean_colours(photo, photo.enlarge(values, found.patch))
    return [
        Panel(found.name, found.stage, f"{where}: {count} super tokens", _faded(photo), lines, seen=photo.seen),
        Panel(
            f"{found.name}_means",
            found.stage,
            f"{where}: mean colour of each super token",
            means,
            lines,
            seen=photo.seen,
        ),
    ]


def _mean_colours(photo: Photograph, enlarged: np.ndarray) -> np.ndarray:
    """Fill each region with the mean colour of its pixels."""
    pixels, window = _faded(photo), photo.window()
    flat = enlarged.ravel()
    counts = np.maximum(np.bincount(flat), 1)
    channels = [np.bincount(flat, photo.pixels[window][..., c].ravel()) / counts for c in range(3)]
    pixels[window] = np.round(np.stack(channels, 1))[enlarged].astype(np.uint8)
    return pixels


def boundaries(regions: np.ndarray, photo: Photograph, patch: int) -> np.ndarray:
    """Return the lines (n, 2, 2) between regions (h, w), as straight pieces in pixels of the photograph."""
    lines = [*_edges(regions), *(line[:, ::-1] for line in _edges(regions.T))]
    ends = np.array(lines, dtype=float).reshape(-1, 2, 2)
    return photo.from_tokens(ends, patch)


def _edges(regions: np.ndarray) -> list[np.ndarray]:
    """Return the vertical lines between columns, ends as x and y in tokens, neighbouring ones joined."""
    found = []
    for x in range(1, regions.shape[1]):
        differs = np.flatnonzero(np.diff(np.r_[False, regions[:, x - 1] != regions[:, x], False]))
        found += [np.array([[x, start], [x, end]]) for start, end in differs.reshape(-1, 2)]
    return found


def _faded(photo: Photograph) -> np.ndarray:
    """Return a copy of the photograph, faded where the model does not see it."""
    levels = np.round((1 - FADE) * np.arange(256) + FADE * 255).astype(np.uint8)
    faded, window = levels[photo.pixels], photo.window()
    faded[window] = photo.pixels[window]
    return faded
