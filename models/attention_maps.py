"""Attention maps of a model from one forward pass.

    logits, maps = attention_maps(model, images)                       received attention, merged tokens, super tokens
    logits, maps = attention_maps(model, images, at=(0.4, 0.6))        the attention of the query there

Forward hooks keep the inputs of the attentions and change nothing; they are removed before `attention_maps` returns. Each
attention of a family computes its maps anew from these inputs, in a method of its own:

    def attention_maps(self, x, significance, at) -> Iterator[AttentionReading]

x (B, H, W, C) is the input; significance the second one, None where it takes one only. `at` is row and column of the query,
whose attention is asked for; None asks for the mean over all queries: the attention that each token receives. Attention is
stated in multiples of an even one: 1 everywhere is a query that attends to all tokens alike.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .backbone import STRIDES, Backbone

# B batch, H W grid, N = H*W tokens, K heads, D head channels, M reduced tokens
Token = tuple[int, int]  # row and column of a token
BlockIndex = tuple[int, int]  # stage and block, counted from 1
Point = tuple[float, float]  # of an image: fractions of its width from the left and of its height from the top, 0 to 1


@dataclass(frozen=True)
class AttentionReading:
    """One map of an attention: values (B, H, W) of a quantity, or the number of the region that each token lies in."""

    kind: str  # significance, merged, super tokens, attention, keys
    values: Tensor
    part: str = ""  # of the heads or channels, where there are several
    level: Tensor | None = None  # (B, H, W) of regions: the planned number of tokens of each token's region
    signed: bool = False  # values may be negative


@dataclass(frozen=True)
class AttentionMap:
    """One map of one block, for each image of a batch: values as in `AttentionReading`, a token being patch×patch pixels."""

    stage: int  # counted from 1, as in the papers
    block: int
    reading: AttentionReading
    patch: int

    @property
    def name(self) -> str:
        """Name for files and TensorBoard, e.g. stage1_block2_attention."""
        parts = (f"stage{self.stage}_block{self.block}", self.reading.kind, self.reading.part)
        return "_".join(part.replace(" ", "_").replace("×", "x") for part in parts if part)


@runtime_checkable
class MappedAttention(Protocol):
    """Attention that computes its own maps, as the module docstring states."""

    def attention_maps(self, x: Tensor, significance: Any, at: Token | None) -> Iterator[AttentionReading]: ...


def attention_maps(
    model: nn.Module, images: Tensor, at: Point | None = None, blocks: Collection[BlockIndex] | None = None
) -> tuple[Tensor, list[AttentionMap]]:
    """Return the logits of normalised images (B, 3, H, W), and the maps of the chosen blocks in order.

    at: the point of the images that the query lies at. blocks: stages and blocks counted from 1, by default `last_blocks`.
    Raises ValueError for a model that has no attention maps or is in training mode, a block that it lacks or a point outside.
    """
    if not has_maps(model):
        raise ValueError(
            f"{type(model).__name__} has no maps to show: not all of its blocks have an attention with `attention_maps`"
        )
    if model.training:
        raise ValueError("a model in training mode would show maps of another forward pass; call model.eval() first")
    if at is not None and not all(0 <= value <= 1 for value in at):
        raise ValueError(f"the point {at} lies outside the picture; give fractions of its sides, from 0 to 1")
    chosen = check_blocks(model, last_blocks(model) if blocks is None else blocks)
    inputs: dict[BlockIndex, tuple[Tensor, Tensor | None]] = {}
    hooks = [_keep_inputs(model, block, inputs) for block in chosen]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # hooks would have code compiled anew
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for block in chosen:
            patch = STRIDES[block[0] - 1]
            token = None if at is None else _token(at, images.shape[2], images.shape[3], patch)
            maps += [AttentionMap(*block, reading, patch) for reading in _readings(model, block, inputs, token)]
    return logits, maps


def has_maps(model: nn.Module) -> TypeGuard[Backbone]:
    """Return True for a model whose blocks all have an attention, `attn`, that computes its maps."""
    if not isinstance(model, Backbone):
        return False
    attentions = [getattr(block, "attn", None) for stage in model.stages for block in getattr(stage, "blocks", ())]
    return bool(attentions) and all(isinstance(attention, MappedAttention) for attention in attentions)


def all_blocks(model: Backbone) -> list[BlockIndex]:
    """List all blocks of a model."""
    return [(i, j) for i, stage in enumerate(model.stages, 1) for j in range(1, 1 + len(stage.blocks))]  # type: ignore[arg-type]


def last_blocks(model: Backbone) -> list[BlockIndex]:
    """List the last block of each stage; of a stage with `guided` attentions the last of these and the block before it."""
    found = []
    for i, stage in enumerate(model.stages, 1):
        last = len(stage.blocks)  # type: ignore[arg-type]
        guided = [j for j, block in enumerate(stage.blocks, 1) if getattr(block.attn, "guided", False)]  # type: ignore[arg-type]
        found += [(i, guided[-1] - 1), (i, guided[-1])] if guided else [(i, last)]
    return found


def check_blocks(model: Backbone, blocks: Collection[BlockIndex]) -> list[BlockIndex]:
    """Return the blocks in order, each once. Raises ValueError for one that the model lacks."""
    known = all_blocks(model)
    for block in blocks:
        if block not in known:
            depths = ", ".join(str(len(stage.blocks)) for stage in model.stages)  # type: ignore[arg-type]
            raise ValueError(
                f"there is no block {block[0]}.{block[1]}; both are counted from 1, and the stages have {depths} blocks"
            )
    return [block for block in known if block in blocks]


def softmax_probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Return the probabilities of scaled dot-product attention: (B, K, N, D), (B, K, M, D) -> (B, K, N, M)."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1)


def attention_to_tokens(p: Tensor, x: Tensor, at: Token | None) -> Tensor:
    """Return the map (B, H, W) of p (B, N, N), probabilities among the tokens of x (B, H, W, C): a query's, or their mean."""
    _, H, W, _ = x.shape
    row = p.mean(1) if at is None else p[:, at[0] * W + at[1]]
    return H * W * row.view(-1, H, W)


def _keep_inputs(
    model: Backbone, block: BlockIndex, kept: dict[BlockIndex, tuple[Tensor, Tensor | None]]
) -> RemovableHandle:
    """Register a hook that keeps the inputs of a block's attention: x, and the significance if there is one."""

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept[block] = inputs[0].detach(), (inputs[1] if len(inputs) > 1 else None)

    return _attention(model, block).register_forward_hook(keep)


def _readings(
    model: Backbone, block: BlockIndex, inputs: dict[BlockIndex, tuple[Tensor, Tensor | None]], token: Token | None
) -> Iterator[AttentionReading]:
    attention = _attention(model, block)
    assert isinstance(attention, MappedAttention)
    x, significance = inputs[block]
    return attention.attention_maps(x.to(next(attention.parameters()).dtype), significance, token)


def _token(at: Point, height: int, width: int, patch: int) -> Token:
    """Return row and column of the token that covers a point of the images."""
    return min(int(at[1] * height), height - 1) // patch, min(int(at[0] * width), width - 1) // patch


def _attention(model: Backbone, block: BlockIndex) -> nn.Module:
    return model.stages[block[0] - 1].blocks[block[1] - 1].attn  # type: ignore[union-attr, index]
