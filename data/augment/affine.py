"""Affine operations of RandAugment: names and matrices for both forms, affine_cpu.py (one image) and affine_batch.py."""

import math

# The axes along which an operation moves pixels.
AXES = {"Rotate": "xy", "ShearX": "x", "TranslateXRel": "x", "ShearY": "y", "TranslateYRel": "y"}


def matrix(name: str, argument: float, size: int) -> tuple[float, ...]:
    """Return Pillow's six affine coefficients, from output pixels to input coordinates, for a size x size image."""
    if name == "Rotate":
        angle = -math.radians(argument % 360.0)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        centre = size / 2
        return cos, sin, cos * -centre + sin * -centre + centre, -sin, cos, -sin * -centre + cos * -centre + centre
    return {
        "ShearX": (1.0, argument, 0.0, 0.0, 1.0, 0.0),
        "ShearY": (1.0, 0.0, 0.0, argument, 1.0, 0.0),
        "TranslateXRel": (1.0, 0.0, argument * size, 0.0, 1.0, 0.0),
        "TranslateYRel": (1.0, 0.0, 0.0, 0.0, 1.0, argument * size),
    }[name]
