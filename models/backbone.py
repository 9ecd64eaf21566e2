"""Base of all families: four stages between a stem and a head, and timm's whole model interface.

A family builds its stem, stages and neck and passes them to `Backbone.__init__`. Names in every family: stem,
stages.{i}.downsample, stages.{i}.blocks.{j}, stages.{i}.norm, neck, head.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, TypedDict

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, register_notrace_function
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .entries import check_finite
from .published import Constant, Rule, from_published, is_published

STRIDES = (4, 8, 16, 32)


class Stage(nn.Module):
    """Downsampling, blocks, norm. A stage whose blocks pass on more than x overrides `forward`."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm or nn.Identity()
        self.checkpoint_blocks(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = self.run(block, x)
        return self.norm(x)

    def checkpoint_blocks(self, count: int) -> None:
        """Checkpoint the first `count` blocks: keep only their inputs; the backward pass runs them again."""
        for i, block in enumerate(self.blocks):
            block.grad_checkpointing = i < count  # type: ignore[assignment]

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """Call a block, under gradient checkpointing if it is on; running statistics are updated once in either case."""
        if not (block.grad_checkpointing and torch.is_grad_enabled()):
            return block(*inputs)
        if torch.compiler.is_compiling():
            return checkpoint(block, *inputs, use_reentrant=False)

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), _frozen_statistics(block)

        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


class HeadOptions(TypedDict, total=False):
    """Options of timm's that a family passes on to `Backbone.__init__`, which states their defaults."""

    num_classes: int
    drop_rate: float
    global_pool: str


class Backbone(nn.Module):
    """Four-stage image classifier with timm's model interface.

    The stem maps images (B, in_chans, H, W) to activations, which have any layout that `to_nchw` views as (B, C, H, W); the
    neck maps (B, C, H, W) to the same layout. dims are the channels of the stages, num_features those of the neck.
    """

    published: ClassVar[Sequence[Rule]] = ()  # names of the family's published checkpoints
    published_constants: ClassVar[Sequence[Constant]] = ()  # entries of theirs that belong to no parameter
    resizable: ClassVar[Sequence[str]] = ()  # entries that `fit_entry` resizes
    default_cfg: dict[str, Any]  # timm's, set by `build_variant`
    # Options of torch.compile on CUDA. Maps stay (B, H, W, C), as the families are written; and a kernel may join more reads and
    # operations than by default, so that normalised float32 maps are computed where they are used, not written to memory.
    inductor_options: ClassVar[Mapping[str, Any]] = {
        "layout_optimization": False,
        "comprehensive_padding": False,  # padded strides are copied again before operators and products
        "realize_reads_threshold": 12,
        "realize_opcount_threshold": 200,
    }
    foldable: ClassVar[bool] = False  # True admits exactly this class to models/inference/prepare.py

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        neck: nn.Module,
        dims: Sequence[int],
        num_features: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        if not len(stages) == len(dims) == len(STRIDES):
            raise ValueError(
                f"{type(self).__name__} has {len(stages)} stages and {len(dims)} dims; a Backbone has {len(STRIDES)} of each"
            )
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = self.head_hidden_size = num_features
        self.feature_info = [
            {"num_chs": dim, "num_chs_norm": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, STRIDES, strict=True))
        ]
        self.feature_info[-1]["num_chs_norm"] = num_features
        self.stem, self.stages, self.neck = stem, nn.ModuleList(stages), neck
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(num_classes, global_pool)
        self.apply(self.init_module)

    # Hooks of a family.

    def to_nchw(self, x: Tensor) -> Tensor:
        """View a stage's output as (B, C, H, W). Default: from (B, H, W, C)."""
        return x.permute(0, 3, 1, 2)

    def init_module(self, module: nn.Module) -> None:
        """Initialise one module. Default: linear layers; all others keep PyTorch's initialisation."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def fit_entry(self, name: str, tensor: Tensor) -> Tensor:
        """Adapt a checkpoint's tensor to this model's size, e.g. a position embedding. Default: return it unchanged."""
        return tensor

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters of two or more dimensions without weight decay: none, as in the published recipes."""
        return set()

    # The forward pass.

    def forward_features(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.neck(self.to_nchw(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = x.mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the final features and the feature maps of chosen stages.

        indices: the last n stages if int, all if None. norm: pass the last stage's map through the neck. stop_early: run no
        stage after the last chosen one; the features are then that stage's map.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: choose NCHW or NHWC")
        check_images(x, self.in_chans)
        taken, last = feature_take_indices(len(self.stages), indices)
        stages = list(self.stages)[: last + 1] if stop_early else list(self.stages)
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in taken:
                maps.append(self.to_nchw(x))
        x = self.to_nchw(x)
        if len(stages) == len(self.stages):
            x = self.neck(x)
            if norm and len(stages) - 1 in taken:
                maps[-1] = x
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        return maps if intermediates_only else (x, maps)

    # The rest of timm's model interface.

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; 0 classes for none."""
        self._set_head(num_classes, self.global_pool if global_pool is None else global_pool)
        self.head.apply(self.init_module)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the modules after the last chosen stage; return the indices of the chosen ones."""
        taken, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.neck = nn.Identity()
            self.num_features = self.head_hidden_size = int(str(self.feature_info[last]["num_chs"]))
        if prune_head or prune_norm or shortened:
            self.reset_classifier(0, "")
        return taken

    def set_grad_checkpointing(self, enable: bool = True, blocks: int | None = None) -> None:
        """Checkpoint the first `blocks` blocks (None: all): the backward pass runs them again, their activations are not kept."""
        left = 10**9 if blocks is None else blocks
        for stage in self._stages():
            stage.checkpoint_blocks(max(left, 0) if enable else 0)
            left -= len(stage.blocks)

    def set_drop_path_rate(self, rate: float) -> None:
        """Set drop path to rise linearly from 0 to `rate` over all blocks, as at construction."""
        blocks = [block for stage in self._stages() for block in stage.blocks]
        for block, p in zip(blocks, _linear_rates(rate, len(blocks)), strict=True):
            for module in block.modules():
                if isinstance(module, DropPath):
                    module.drop_prob = p

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter names by layer, for layer decay: stem, stages (coarse) or blocks, the rest."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        previous = (99999,)  # timm's marker for "in the previous layer"
        blocks = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.norm", previous),
        ]
        return {"stem": r"^stem", "blocks": blocks, "neck": [(r"^neck", previous)]}

    # Internals.

    def _stages(self) -> Iterator[Stage]:
        return (stage for stage in self.stages if isinstance(stage, Stage))

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool={global_pool!r} is not supported: choose 'avg', or '' for the map itself")
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: give a positive number, or 0 for no classifier")
        if num_classes and not global_pool:
            raise ValueError(
                f"global_pool='' has no logits: give num_classes=0 instead of {num_classes}, or pool 'avg'"
            )
        self.num_classes, self.global_pool = num_classes, global_pool
        like = next(self.stem.parameters())
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}
        check_finite(own, f"the state to be loaded into {type(self).__name__}")  # also for timm's create_model
        fitted = checkpoint_filter_fn(own, self, strict=args[1])
        for name in own:
            del state_dict[prefix + name]
        state_dict.update((prefix + name, tensor) for name, tensor in fitted.items())
        super()._load_from_state_dict(state_dict, prefix, *args)


def checkpoint_filter_fn(tensors: Mapping[str, Tensor], model: Backbone, strict: bool = True) -> dict[str, Tensor]:
    """Rename published entries to ours, and fit sizes. `load_state_dict` calls it by itself."""
    if is_published(model, tensors):
        return from_published(model, tensors, strict)
    return {name: model.fit_entry(name, tensor) for name, tensor in tensors.items()}


@register_notrace_function
def check_images(x: Tensor, in_chans: int) -> None:
    """Raise ValueError unless x is a non-empty batch of images (B, in_chans, H, W)."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must have shape (B, {in_chans}, H, W), not {tuple(x.shape)}")
    if x.shape[0] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"images of shape {tuple(x.shape)}: batch, height and width must be at least 1")


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Suspend updates of BatchNorm's running statistics, for the repeated forward pass of gradient checkpointing."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the drop path rates of each stage's blocks, rising linearly from 0 to `rate` over all blocks."""
    rates = iter(_linear_rates(rate, sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]


def _linear_rates(rate: float, depth: int) -> list[float]:
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def default_cfg(first_conv: str, **changes: Any) -> dict[str, Any]:
    """Return timm's pretrained_cfg of a family: ImageNet at 224, no weights to download."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
        **changes,
    }


def build_variant(family: Callable[..., Backbone], name: str, pretrained: bool, **arguments: Any) -> nn.Module:
    """Build a registered variant as timm does: defaults, weights, features_only."""
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        family, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=features, **arguments
    )


def register_variant(
    family: Callable[..., Backbone],
) -> Callable[[Callable[[], dict[str, Any]]], Callable[..., nn.Module]]:
    """Register a variant with timm under the name of the decorated function, which returns its arguments of `family`."""

    def register(variant: Callable[[], dict[str, Any]]) -> Callable[..., nn.Module]:
        @functools.wraps(variant)
        def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            return build_variant(family, variant.__name__, pretrained, **{**variant(), **kwargs})

        return register_model(build)

    return register
