"""Drawing of the demo data set's pictures: an object of one of ten classes on a background, with lighting and noise.

Colours, sizes, positions, angles, background, light, shadow, blur and noise have the same distribution in every class, so
that only shape or texture separates them. All randomness comes from the random generator that is passed in.
"""

import colorsys
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

# r, a: polar coordinates of the object's own frame, its outline at about r = 1; u, v: the same, Cartesian.
Array = np.ndarray
Rng = np.random.RandomState
# Masks, 1 inside, 0 outside: the part of the object in its first colour, and the whole object (paint <= body).
Form = tuple[Array, Array]

MEAN_AREA = 174_000.0  # with the spreads below about 470 x 400 pixels in the mean, as ImageNet's


def draw(name: str, rng: Rng) -> Image.Image:
    """Draw a picture of the class `name`."""
    width, height = _size(rng)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)  # (H, 1), (W,)
    ground, ink, second = _colours(rng)
    picture = _background(rng, x, y, ground)
    _strokes(rng, picture, x, y, count=rng.randint(3, 8))
    _object(rng, picture, x, y, form=FORMS[name], ink=ink, second=second)
    _strokes(rng, picture, x, y, count=rng.randint(0, 3), thin=True)
    picture *= _light(rng, x, y)
    return _camera(rng, picture)


def _size(rng: Rng) -> tuple[int, int]:
    area = MEAN_AREA * math.exp(rng.uniform(-0.5, 0.6))
    aspect = math.exp(rng.uniform(math.log(0.8), math.log(1.7)))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def _colours(rng: Rng) -> tuple[Array, Array, Array]:
    """Return the background, object and second object colours; the object's differs from both others in brightness."""
    dark, bright = rng.uniform(0.15, 0.4), rng.uniform(0.65, 0.95)
    values = (dark, bright) if rng.random_sample() < 0.5 else (bright, dark)
    ground, ink = (_colour(rng, value) for value in values)
    second = _colour(rng, values[0] + 0.15 * rng.uniform(-1, 1))
    return ground, ink, second


def _colour(rng: Rng, value: float) -> Array:
    return np.array(
        colorsys.hsv_to_rgb(rng.random_sample(), rng.uniform(0.1, 0.75), min(max(value, 0.0), 1.0)), np.float32
    )


def _smooth_noise(rng: Rng, shape: tuple[int, ...], cells: int) -> Array:
    """Return noise of about -1 .. 1 with a wavelength of 1 / cells of the picture."""
    grid = Image.fromarray(rng.randint(0, 256, size=(cells, cells), dtype=np.uint8))
    noise = grid.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(noise, dtype=np.float32) / 127.5 - 1


def _background(rng: Rng, x: Array, y: Array, colour: Array) -> Array:
    """Return a background with a colour gradient and noise of several scales: (3, H, W) of 0 .. 1."""
    angle = rng.uniform(0, 2 * math.pi)
    along = (x * math.cos(angle) + y * math.sin(angle)) / max(len(x), len(y))
    shade = 0.25 * rng.uniform(0, 1) * (along - along.mean())
    for cells in (rng.randint(3, 7), rng.randint(8, 20), rng.randint(40, 90)):
        shade += rng.uniform(0.01, 0.06) * _smooth_noise(rng, along.shape, cells)
    tint = 0.12 * rng.uniform(-1, 1, size=3).astype(np.float32)
    hue = _smooth_noise(rng, along.shape, 3)
    return np.stack([colour[c] + tint[c] * hue + shade for c in range(3)])


def _strokes(rng: Rng, picture: Array, x: Array, y: Array, count: int, thin: bool = False) -> None:
    """Paint curved brush strokes as distractors, in place."""
    height, width = len(y), len(x)
    short = min(height, width)
    for _ in range(count):
        length = short * rng.uniform(0.1, 0.3)
        thick = short * (0.008 if thin else rng.uniform(0.01, 0.035))
        bend, angle = rng.uniform(-0.8, 0.8) / length, rng.uniform(0, 2 * math.pi)
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        colour = _colour(rng, rng.uniform(0.1, 0.95))
        rows, columns = _window(cx, cy, length + 2 * thick, (height, width))
        dx, dy = x[columns] - cx, y[rows] - cy
        u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
        v = v - bend * u * u
        taper = thick * np.sqrt(np.clip(1 - (u / length) ** 2, 0, 1))
        _blend(picture[:, rows, columns], _inside(np.abs(v) - taper, 1.0), colour)


def _object(rng: Rng, picture: Array, x: Array, y: Array, *, form: Callable, ink: Array, second: Array) -> None:
    """Paint the object with its shadow, in place."""
    height, width = len(y), len(x)
    radius = min(height, width) * rng.uniform(0.24, 0.44)
    cx, cy = (side / 2 + rng.uniform(-1, 1) * max(0.0, side / 2 - 0.95 * radius) for side in (width, height))
    angle, squeeze = rng.uniform(0, 2 * math.pi), math.exp(rng.uniform(-0.12, 0.12))
    rows, columns = _window(cx, cy, 1.5 * radius, (height, width))
    dx, dy = (x[columns] - cx) / radius, (y[rows] - cy) / radius
    u = (dx * math.cos(angle) + dy * math.sin(angle)) * squeeze
    v = (dy * math.cos(angle) - dx * math.sin(angle)) / squeeze
    paint, body = form(rng, u, v, 1 / radius)
    view = picture[:, rows, columns]
    _shadow(rng, view, body, radius)
    grain = 1 + rng.uniform(0.02, 0.1) * _smooth_noise(rng, u.shape, rng.randint(6, 30)) + rng.uniform(-0.15, 0.15) * dy
    if paint is not body:
        _blend(view, body, second, grain)
    _blend(view, paint, ink, grain)


def _shadow(rng: Rng, view: Array, body: Array, radius: float) -> None:
    mask = Image.fromarray((body * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(radius * rng.uniform(0.05, 0.15)))
    shift = tuple(int(part) for part in radius * rng.uniform(-0.12, 0.12, size=2))
    view *= 1 - rng.uniform(0.2, 0.5) * np.roll(np.asarray(mask, dtype=np.float32) / 255, shift, (0, 1))


def _light(rng: Rng, x: Array, y: Array) -> Array:
    """Return the brightness of each pixel (H, W): lit from one side, darker towards the corners."""
    height, width = len(y), len(x)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.35)
    u, v = x / width - 0.5, y / height - 0.5
    side = 1 + strength * (u * math.cos(angle) + v * math.sin(angle))
    return rng.uniform(0.75, 1.15) * side * (1 - rng.uniform(0, 0.6) * (u * u + v * v))


def _camera(rng: Rng, picture: Array) -> Image.Image:
    """Add sensor noise, round to 8 bits, blur a little."""
    noise = rng.randint(0, 256, size=picture.shape, dtype=np.uint8).view(np.int8)
    picture *= 255
    picture += np.multiply(noise, rng.uniform(0.02, 0.16), dtype=np.float32)
    levels = np.clip(picture, 0, 255, out=picture).astype(np.uint8)
    image = Image.merge("RGB", [Image.fromarray(channel) for channel in levels])
    return image.filter(ImageFilter.BoxBlur(rng.uniform(0.1, 0.8)))


def _window(cx: float, cy: float, reach: float, shape: tuple[int, ...]) -> tuple[slice, slice]:
    (top, bottom), (left, right) = (
        (min(max(int(c - reach), 0), side - 2), max(min(int(c + reach), side), 2))
        for c, side in zip((cy, cx), shape, strict=True)
    )
    return slice(top, max(bottom, top + 2)), slice(left, max(right, left + 2))


def _blend(view: Array, mask: Array, colour: Array, grain: Array | float = 1.0) -> None:
    for channel, value in zip(view, colour, strict=True):
        channel += mask * (value * grain - channel)


def _inside(distance: Array, pixel: float) -> Array:
    """Convert a signed distance, negative inside, to coverage 0 .. 1 with an edge of one pixel."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def _disc(rng: Rng, u: Array, v: Array, pixel: float) -> Form:
    mask = _inside(np.hypot(u, v) - 0.9, pixel)
    return mask, mask


def _ring(rng: Rng, u: Array, v: Array, pixel: float) -> Form:
    mask = _inside(np.abs(np.hypot(u, v) - 0.75) - rng.uniform(0.1, 0.22), pixel)
    return mask, mask


def _triangle(rng: Rng, u: Array, v: Array, pixel: float) -> Form:
    sides = [u * math.cos(a) + v * math.sin(a) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    mask = _inside(np.maximum.reduce(sides) - 0.52, pixel)
    return mask, mask


def _square(rng: Rng, u: Array, v: Array, pixel: float) -> Form:
    mask = _inside(np.maximum(np.abs(u), np.abs(v)) - 0.75, pixel)
    return mask, mask


def _star(rng: Rng, u: Array, v: Array, pixel: float) -> Form:
    sector, inner = math.pi / 5, rng.uniform(0.4, 0.5)
    r, a = np.hypot(u, v), np.abs((np.arctan2(v, u) + sector) % (2 * sector) - sector)
    run, rise = inner * math.cos(sector) - 1, inner * math.sin(sector)  # from the tip (1, 0) to the inner corner
    distance = ((r * np.cos(a) - 1) * rise - r * np.sin(a) * run) / math.hypot(run, rise)
    mask = _inside(distance, pixel)
    return mask, mask


def _cross(rng: Rng, u: Array, v: Array, pixel: float) -> Form:
    half, u, v = rng.uniform(0.18, 0.28), np.abs(u), np.abs(v)
    mask = _inside(np.minimum(np.maximum(u - 0.92, v - half), np.maximum(u - half, v - 0.92)), pixel)
    return mask, mask


def _patch(rng: Rng, u: Array, v: Array, pixel: float) -> Array:
    """Return the mask of an irregular round patch, the outline of the texture classes."""
    a, outline = np.arctan2(v, u), np.full_like(u, 0.92)
    for waves in (2, 3, 5):
        outline += rng.uniform(0, 0.06) * np.cos(waves * a + rng.uniform(0, 2 * math.pi))
    return _inside(np.hypot(u, v) - outline, pixel)


def _stripes(rng: Rng, u: Array, v: Array, pixel: float) -> Form:
    body, period = _patch(rng, u, v, pixel), rng.uniform(0.28, 0.5)
    distance = np.abs((u + rng.uniform(0, 1)) % period - period / 2) - period / 4
    return body * _inside(distance, pixel), body


def _checker(rng: Rng, u: Array, v: Array, pixel: float) -> Form:
    body, period = _patch(rng, u, v, pixel), rng.uniform(0.55, 0.8)
    u, v = ((part + rng.uniform(0, 1)) % period - period / 2 for part in (u, v))
    u, v = (np.abs(part) - period / 4 for part in (u, v))  # negative in every other row or column
    return body * _inside(np.maximum(u, v) * np.where(np.minimum(u, v) < 0, 1, -1), pixel), body


def _dots(rng: Rng, u: Array, v: Array, pixel: float) -> Form:
    body, period = _patch(rng, u, v, pixel), rng.uniform(0.34, 0.5)
    row = np.floor(v / period)
    u, v = (u + row % 2 * period / 2) % period - period / 2, v % period - period / 2
    return body * _inside(np.hypot(u, v) - period * rng.uniform(0.26, 0.34), pixel), body


def _spiral(rng: Rng, u: Array, v: Array, pixel: float) -> Form:
    r, turn = np.hypot(u, v), np.arctan2(v, u) / (2 * math.pi)
    if rng.random_sample() < 0.5:
        turn = -turn
    gap = rng.uniform(0.3, 0.4)  # from one turn to the next
    distance = np.abs((r - turn * gap) % gap - gap / 2) - gap * rng.uniform(0.2, 0.28)
    mask = _inside(np.maximum(distance, r - 0.95), pixel)
    return mask, mask


FORMS: dict[str, Callable[[Rng, Array, Array, float], Form]] = {
    "disc": _disc,
    "ring": _ring,
    "triangle": _triangle,
    "square": _square,
    "star": _star,
    "cross": _cross,
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "spiral": _spiral,
}
