"""Backbone families: GroupMixFormer, SG-Former and STViT. Importing this package registers them with timm."""

from . import groupmixformer, sgformer, stvit

__all__ = ["groupmixformer", "sgformer", "stvit"]
