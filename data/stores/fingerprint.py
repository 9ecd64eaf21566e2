"""Fingerprint of a data set: counts and hashes that are equal for the same images, whatever store holds them."""

import hashlib
from typing import Any

import numpy as np

from data.stores.names import encode


def class_fingerprint(classes: list[str], **labels: np.ndarray) -> dict[str, Any]:
    """Return the number of classes and of each split's images, and hashes of the class names and of the images per class.

    `labels` holds the labels of each split, int64 (n,), by the name of the split.
    """
    found: dict[str, Any] = {"classes": len(classes), "classes_sha256": _sha256(encode("\n".join(classes)))}
    for split, own in labels.items():
        counts = np.bincount(own, minlength=len(classes))
        found[split] = len(own)
        found[f"{split}_per_class_sha256"] = _sha256(" ".join(map(str, counts)).encode())
    return found


def storage_fingerprint(order: np.ndarray) -> dict[str, Any]:
    """Return a hash of the storage order of the training images, int64 (n,), which a block shuffle depends on."""
    return {"train_storage_sha256": _sha256(order.tobytes())}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
