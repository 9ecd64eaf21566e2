"""Pictures of a run as they are embedded in the report's page: data URIs with captions."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

QUALITY = 88  # of pictures as JPEG, where that is smaller
SIDE = 1600  # pixels of a picture's longer side in the page
DATA_URI = "data:image/{};base64,{}"


def embed_picture(path: Path) -> dict[str, Any] | None:
    """Return a picture's data URI, caption and size: the file itself, or a JPEG where that is smaller; None if damaged."""
    stored = path.read_bytes()
    try:
        image = Image.open(io.BytesIO(stored)).convert("RGB")
    except (OSError, SyntaxError):  # which Pillow raises for a truncated PNG and for other files
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
