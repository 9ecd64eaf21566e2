"""Pictures of a run as they are embedded in the report's page: data URIs with captions."""

import base64
import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from common.regular_files import read_regular

QUALITY = 88  # of pictures as JPEG, where that is smaller
SIDE = 1600  # pixels of a picture's longer side in the page
MOST_BYTES = 20 * 2**20  # of a file; those that the trainer writes have at most 2 MB
MOST_PIXELS = 20_000_000  # decoded; the trainer's have some 5 million at most
DATA_URI = "data:image/{};base64,{}"


def embed_picture(path: Path) -> dict[str, Any] | None:
    """Return a picture's data URI, caption and size: the file itself, or a JPEG where that is smaller.

    None for a picture that is damaged, no PNG, or larger than those of the trainer.
    """
    try:
        stored = read_regular(path, MOST_BYTES)
        image = _decode(stored)
    except Exception:  # Pillow raises errors of many kinds for damaged files
        return None
    if image is None:
        return None
    small = max(image.size) <= SIDE
    image.thumbnail((SIDE, SIDE))
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=QUALITY, subsampling=0)
    kind, found = ("png", stored) if small and len(stored) <= packed.tell() else ("jpeg", packed.getvalue())
    epoch = path.parent.name.removeprefix("epoch_")
    after = f", after epoch {int(epoch)}" if epoch.isdecimal() else ""
    number, _, label = path.stem.partition("_")
    title = (
        f"Attention maps and prediction for an image of the class {label}"
        if number.isdecimal()
        else "The first batch, as it enters the model"
    )
    return {
        "uri": DATA_URI.format(kind, base64.b64encode(found).decode()),
        "caption": f"{title}{after}",
        "width": image.width,
        "height": image.height,
        "large": not number.isdecimal(),
    }


def _decode(stored: bytes) -> Image.Image | None:
    """Return a PNG as an RGB image; None for one with too many pixels, before any is decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(stored), formats=["PNG"])
    return image.convert("RGB") if image.width * image.height <= MOST_PIXELS else None
