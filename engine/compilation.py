"""torch.compile of a run's models: options, cache folder of compiled code, and log lines about the wait."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Arguments of torch.compile by TRAIN.COMPILE. Its own max-autotune would record CUDA graphs, too.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "reduce-overhead": {"mode": "reduce-overhead"},
}
GRAPHS_PER_SIZE = 6  # for one image size: training, evaluation, a smaller last batch, and spare ones for changed guards


class Compilation:
    """Compilation of models in place: their names, states and copies stay those of plain modules."""

    def __init__(self, mode: str, sizes: int = 1):
        """`mode` is a key of MODES, `sizes` the number of image sizes in the run: each is compiled separately."""
        self.mode = mode
        self.folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_folder())))
        self._started_at: float | None = None
        self._done = False
        # Random numbers as without torch.compile: the same masks for the same RNG key.
        torch._inductor.config.fallback_random = True
        limit = max(torch._dynamo.config.recompile_limit, GRAPHS_PER_SIZE * (sizes + 1))
        torch._dynamo.config.recompile_limit = limit

    def apply(self, models: Iterable[nn.Module]) -> None:
        """Compile the call of each model, once for every input shape; equal models share the code."""
        for model in models:
            model.compile(dynamic=False, **MODES[self.mode])

    def begin(self, log_info: Callable[[str], None]) -> None:
        """Log before the first update that it includes the compilation."""
        if not self._done and self._started_at is None:
            self._started_at = time.perf_counter()
            log_info(
                f"compiling the model (TRAIN.COMPILE {self.mode}): the first update takes minutes, less if {self.folder} "
                "holds the compiled code"
            )

    def after_update(self, log_info: Callable[[str], None]) -> None:
        """Log after the first update how long it took."""
        if self._started_at is not None:
            seconds = time.perf_counter() - self._started_at
            log_info(f"compiled: the first update took {seconds:.0f} s; so will the first evaluation")
            self._started_at, self._done = None, True


def default_folder() -> Path:
    """Return the cache folder of compiled code if TORCHINDUCTOR_CACHE_DIR is not set: in ~/.cache, not in /tmp as torch's."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "retoken" / "inductor"
