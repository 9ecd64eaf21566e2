"""The three backbone families; importing this package registers them with timm."""

from . import groupmixformer, sgformer, stvit

__all__ = ["groupmixformer", "sgformer", "stvit"]
