"""torch.compile around a run's models: what it is told, where its results are kept, and what a person hears of it."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

# The words of TRAIN.COMPILE, as torch.compile takes them. max-autotune alone would record CUDA graphs, too.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "reduce-overhead": {"mode": "reduce-overhead"},
}
FORMS = 6  # of a graph for one image size: training, evaluation, a last smaller batch, each with a few guards to spare


class Compilation:
    """Compiles models in place: their names, states and copies stay those of plain modules."""

    def __init__(self, mode: str, sizes: int = 1):
        """`mode` is a word of MODES, `sizes` the number of image sizes in the run: each is compiled by itself."""
        self.mode = mode
        self.folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_folder())))
        self._began: float | None = None
        self._done = False
        # Random numbers as without torch.compile: the same masks at the same address in the run.
        torch._inductor.config.fallback_random = True
        limit = max(torch._dynamo.config.recompile_limit, FORMS * (sizes + 1))
        torch._dynamo.config.recompile_limit = limit

    def apply(self, models: Iterable[nn.Module]) -> None:
        """Compile what calling each model runs, once for every shape that comes; equal models share the code."""
        for model in models:
            model.compile(dynamic=False, **MODES[self.mode])

    def begin(self, say: Callable[[str], None]) -> None:
        """Say, before the first update, what it will wait for."""
        if not self._done and self._began is None:
            self._began = time.perf_counter()
            say(
                f"compiling the model (TRAIN.COMPILE {self.mode}): the first update takes minutes, less if {self.folder} knows it"
            )

    def after_update(self, say: Callable[[str], None]) -> None:
        """Say, after the first update, how long it took."""
        if self._began is not None:
            say(
                f"compiled: the first update took {time.perf_counter() - self._began:.0f} s; so will the first evaluation"
            )
            self._began, self._done = None, True


def default_folder() -> Path:
    """Return where compiled code is kept unless TORCHINDUCTOR_CACHE_DIR says otherwise: not in /tmp, as torch would."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "retoken" / "inductor"


class VaryingDropPath(DropPath):
    """timm's DropPath whose rate is a tensor, so that compiled code need not be made anew when the rate changes.

    Its masks are drawn in another way than timm's: with the same rate, not the same samples.
    """

    rate: Tensor

    def __init__(self, like: DropPath, device: torch.device):
        nn.Module.__init__(self)
        self.scale_by_keep = like.scale_by_keep
        self.register_buffer("rate", torch.tensor(like.drop_prob, device=device), persistent=False)
        self._number = like.drop_prob

    @property
    def drop_prob(self) -> float:
        """The share of the samples that is dropped."""
        return self._number

    @drop_prob.setter
    def drop_prob(self, number: float) -> None:
        self._number = number
        self.rate.fill_(number)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.rate
        mask = torch.bernoulli(keep.expand(len(x)))  # (B,)
        if self.scale_by_keep:
            mask = mask / keep
        return x * mask.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def vary_drop_path(model: nn.Module) -> None:
    """Let the drop path rates of a model change without compiling it anew."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is DropPath:
                device = next(model.parameters()).device
                setattr(parent, name, VaryingDropPath(child, device).train(child.training))
