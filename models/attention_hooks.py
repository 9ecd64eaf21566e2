"""What a model looks at: maps of its attentions from one forward pass.

    logits, maps = look(model, images)                       received attention, merged tokens, super tokens
    logits, maps = look(model, images, at=(0.4, 0.6))        the attention of the query there

Hooks keep what goes into the attentions and change nothing; they are gone when `look` returns.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attention_maps import AttentionReading, read
from .backbone import STRIDES, Backbone
from .sgformer_attention import SelfGuidedAttention

Position = tuple[int, int]  # stage and block, counted from 1
Place = tuple[float, float]  # in the images: from the left and from the top, 0 to 1


@dataclass(frozen=True)
class AttentionMap:
    """One map of one block, for each image of a batch: values as in `Reading`, a token being patch×patch pixels."""

    stage: int  # counted from 1, as in the papers
    block: int
    reading: AttentionReading
    patch: int

    @property
    def name(self) -> str:
        """What to call a file of it."""
        parts = (f"stage{self.stage}_block{self.block}", self.reading.kind, self.reading.part)
        return "_".join(part.replace(" ", "_").replace("×", "x") for part in parts if part)


def attention_maps(
    model: nn.Module, images: Tensor, at: Place | None = None, blocks: Collection[Position] | None = None
) -> tuple[Tensor, list[AttentionMap]]:
    """Return the logits of normalised images (B, 3, H, W), and the maps of the chosen blocks in order.

    at: a query's place in the images, from left and top, 0 to 1. blocks: stages and blocks counted from 1, by default
    `last_blocks`. Raises ValueError for a model that has no such maps or is in training mode, a block that it lacks or a
    place outside.
    """
    if not has_maps(model):
        raise ValueError(f"{type(model).__name__} has no maps to show: SG-Former, GroupMixFormer and STViT have")
    if model.training:
        raise ValueError("a model in training mode would show maps of another forward pass; call model.eval() first")
    if at is not None and not all(0 <= value <= 1 for value in at):
        raise ValueError(f"the place {at} lies outside the picture; give fractions of its sides, from 0 to 1")
    chosen = check_blocks(model, last_blocks(model) if blocks is None else blocks)
    taken: dict[Position, tuple[Tensor, Tensor | None]] = {}
    hooks = [_listen(model, position, taken) for position in chosen]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # hooks would have code compiled anew
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for position in chosen:
            patch = STRIDES[position[0] - 1]
            token = None if at is None else _token(at, images.shape[2], images.shape[3], patch)
            maps += [AttentionMap(*position, reading, patch) for reading in _read(model, position, taken, token)]
    return logits, maps


def has_maps(model: nn.Module) -> TypeGuard[Backbone]:
    """Say whether `look` can show a model: one whose blocks all have an attention that `read` knows."""
    if not isinstance(model, Backbone):
        return False
    attentions = [getattr(block, "attn", None) for stage in model.stages for block in getattr(stage, "blocks", ())]
    return bool(attentions) and all(read.dispatch(type(one)) is not read.dispatch(object) for one in attentions)


def all_blocks(model: Backbone) -> list[Position]:
    """List all blocks of a model."""
    return [(i, j) for i, stage in enumerate(model.stages, 1) for j in range(1, 1 + len(stage.blocks))]  # type: ignore[arg-type]


def last_blocks(model: Backbone) -> list[Position]:
    """List the last block of each stage, and the one that made its significance map if it is guided by one."""
    found = []
    for i, stage in enumerate(model.stages, 1):
        last = len(stage.blocks)  # type: ignore[arg-type]
        guided = [j for j, block in enumerate(stage.blocks, 1) if isinstance(block.attn, SelfGuidedAttention)]  # type: ignore[arg-type]
        found += [(i, guided[-1] - 1), (i, guided[-1])] if guided else [(i, last)]
    return found


def check_blocks(model: Backbone, blocks: Collection[Position]) -> list[Position]:
    """Return the blocks in order, each once; ValueError for one that the model lacks."""
    known = all_blocks(model)
    for position in blocks:
        if position not in known:
            depths = ", ".join(str(len(stage.blocks)) for stage in model.stages)  # type: ignore[arg-type]
            raise ValueError(
                f"there is no block {position[0]}.{position[1]}; both are counted from 1, and the stages have {depths} blocks"
            )
    return [position for position in known if position in blocks]


def _listen(model: Backbone, position: Position, taken: dict[Position, Any]) -> RemovableHandle:
    """Have an attention leave in `taken` what goes into it: x, and the significance if there is one."""

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        taken[position] = inputs[0].detach(), (inputs[1] if len(inputs) > 1 else None)

    return _attention(model, position).register_forward_hook(keep)


def _read(
    model: Backbone,
    position: Position,
    taken: dict[Position, tuple[Tensor, Tensor | None]],
    token: tuple[int, int] | None,
) -> Iterator[AttentionReading]:
    attention = _attention(model, position)
    x, significance = taken[position]
    return read(attention, x.to(next(attention.parameters()).dtype), significance, token)


def _token(at: Place, height: int, width: int, patch: int) -> tuple[int, int]:
    """Return row and column of the token that a place of the images lies in."""
    return min(int(at[1] * height), height - 1) // patch, min(int(at[0] * width), width - 1) // patch


def _attention(model: Backbone, position: Position) -> nn.Module:
    stage, block = position
    return model.stages[stage - 1].blocks[block - 1].attn  # type: ignore[union-attr, index]
