"""Colour operations of RandAugment: names and constants for both forms, color_cpu.py (one image) and color_batch.py.

An operation that maps each level of a channel to another level is a look-up in a table of 256 levels. The table of some
depends on the argument alone (posterize), that of others on the image (equalize). The remaining operations are filters.
"""

import numpy as np

# Pillow's weights of red, green and blue in grey, of 65536.
GREY_WEIGHTS = (19595, 38470, 7471)


def base_name(name: str) -> str:
    """Return an operation's name without timm's suffix "Increasing", which changes its argument only."""
    return name.removesuffix("Increasing")


def argument_table(name: str, argument: float) -> np.ndarray:
    """Return the table, uint8 (256,), of an operation whose table does not depend on the image."""
    levels = np.arange(256)
    if name == "Invert":
        table = 255 - levels
    elif name.startswith("Posterize"):
        bits = int(argument)
        table = levels & ~(2 ** (8 - bits) - 1) if bits > 0 else 0 * levels
    elif name.startswith("SolarizeAdd"):
        table = np.where(levels < 128, np.minimum(255, levels + argument), levels)
    elif name.startswith("Solarize"):
        table = np.where(levels < argument, levels, 255 - levels)
    else:  # Brightness: a blend with black
        table = (levels.astype(np.float32) * np.float32(argument)).clip(0, 255)
    return table.astype(np.uint8)
