"""Backbone families: GroupMixFormer, SG-Former and STViT. Importing this package registers them with timm, and what
published checkpoints hold with torch's reader (unpickling.py).
"""

from . import groupmixformer, sgformer, stvit, unpickling

__all__ = ["groupmixformer", "sgformer", "stvit", "unpickling"]
