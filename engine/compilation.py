"""torch.compile of a run's models: options, cache folder of compiled code, and log lines about the wait."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch._dynamo.exc import TorchDynamoException

# Arguments of torch.compile by TRAIN.COMPILE. Its own max-autotune would record CUDA graphs, too.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "reduce-overhead": {"mode": "reduce-overhead"},
}
GRAPHS_PER_SIZE = 6  # for one image size: training, evaluation, a smaller last batch, and spare ones for changed guards


class Compilation:
    """Compilation of models in place: their names, states and copies stay those of plain modules."""

    def __init__(self, mode: str, sizes: int = 1, tuned: bool = False):
        """`mode` is a key of MODES, `sizes` the number of image sizes in the run: each is compiled separately.

        tuned: pass on the options that a model asks for (`inductor_options`), which are meant for CUDA.
        """
        self.mode, self.tuned = mode, tuned
        self.failure: str | None = None
        self._warned = False
        self._models: list[nn.Module] = []
        self.folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_folder())))
        self._started_at: float | None = None
        self._done = False
        # Random numbers as without torch.compile: the same masks for the same RNG key.
        torch._inductor.config.fallback_random = True
        limit = max(torch._dynamo.config.recompile_limit, GRAPHS_PER_SIZE * (sizes + 1))
        torch._dynamo.config.recompile_limit = limit
        # Backward passes are compiled with the forward pass, so that a failure of either is one of the call.
        torch._functorch.config.force_non_lazy_backward_lowering = True

    def apply(self, models: Iterable[nn.Module]) -> None:
        """Compile the call of each model, once for every input shape; equal models share the code.

        Where the compilation fails, all models run uncompiled from then on.
        """
        self._models = list(models)
        for model in self._models:
            model.compile(dynamic=False, **compile_arguments(model, self.mode, self.tuned))
            assert model._compiled_call_impl is not None
            model._compiled_call_impl = self._or_plain(model, model._compiled_call_impl)

    def _or_plain(self, model: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call of the compiled model which calls it uncompiled once the compilation has failed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            while self.failure is None:
                try:
                    return compiled(*args, **kwargs)
                except TorchDynamoException as error:
                    self._fail(error)
            return model._call_impl(*args, **kwargs)

        return call

    def _fail(self, error: TorchDynamoException) -> None:
        """Prepare the next attempt, or take all models back to uncompiled calls."""
        options = torch._dynamo.config
        if torch.distributed.is_initialized() and options.optimize_ddp:
            options.optimize_ddp = False  # older ones cannot split graphs with autograd functions by bucket
            return
        lines = str(error).strip().splitlines() or [""]
        self.failure = f"{type(error).__name__}: {lines[0][:200]}"
        for model in self._models:
            model._compiled_call_impl = None

    def begin(self, log_info: Callable[[str], None]) -> None:
        """Log before the first update that it includes the compilation."""
        if not self._done and self._started_at is None:
            self._started_at = time.perf_counter()
            log_info(
                f"compiling the model (TRAIN.COMPILE {self.mode}): the first update takes minutes, less if {self.folder} "
                "holds the compiled code"
            )

    def after_update(self, log_info: Callable[[str], None], log_warning: Callable[[str], None]) -> None:
        """Log after the first update how long it took; warn once if the models run uncompiled."""
        if self.failure and not self._warned:
            log_warning(
                f"torch.compile failed, the model runs uncompiled ({self.failure}); TRAIN.COMPILE off starts without trying"
            )
            self._warned = True
        if self._started_at is not None:
            seconds = time.perf_counter() - self._started_at
            if not self.failure:
                log_info(f"compiled: the first update took {seconds:.0f} s; so will the first evaluation")
            self._started_at, self._done = None, True


def compile_arguments(model: nn.Module, mode: str, tuned: bool) -> dict[str, Any]:
    """Return the arguments of torch.compile for a model: those of the mode, `tuned` with the options that the model asks for."""
    arguments = MODES[mode]
    own = dict(getattr(model, "inductor_options", {})) if tuned else {}
    if not own:
        return arguments
    of_mode = arguments.get("mode")  # torch.compile takes a mode or options
    return {"options": {**(torch._inductor.list_mode_options(of_mode) if of_mode else {}), **own}}


def default_folder() -> Path:
    """Return the cache folder of compiled code if TORCHINDUCTOR_CACHE_DIR is not set: in ~/.cache, not in /tmp as torch's."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "retoken" / "inductor"
