"""Candidates of the step benchmarks: our models, and the baselines that the command line names with --baseline."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.record import ROOT
from engine.build import prepare_model
from engine.distributed.processes import Processes
from engine.memory import kept_bytes
from engine.precision import DTYPES, Precision
from models.build import check_name, takes_img_size
from models.identify import on_meta
from models.inference.prepare import is_foldable, prepare_inference

BASELINES = ROOT / "oracle"  # folder for published code: on the path of baselines, ignored by git


@dataclass(frozen=True)
class Baseline:
    """A callable that builds the model that ours is compared with; `{model}` in its name stands for our model's name."""

    name: str
    module: str
    factory: str

    def build(self, model: str) -> nn.Module:
        """Build the baseline of a model. Raises ValueError if the callable returns something else than a model."""
        built = self.find(model)()
        if not isinstance(built, nn.Module):
            raise ValueError(f"--baseline {self.name}: {self.factory} gave {type(built).__name__}, not a model")
        return built

    def find(self, model: str) -> Callable[[], object]:
        """Return the callable. Raises ValueError if the module, or the name in it, does not exist."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--baseline {self.module}:{self.factory}: {error}; give a module that python can import from here or from "
                f"{BASELINES.name}/"
            ) from error
        name = self.factory.replace("{model}", model)
        make = getattr(module, name, None)
        if not callable(make):
            near = difflib.get_close_matches(name, [n for n in dir(module) if callable(getattr(module, n))], n=3)
            raise ValueError(f"--baseline {self.module} has no {name}; did you mean {' or '.join(near) or 'another'}?")
        return make


def parse_baseline(text: str) -> Baseline:
    """Parse [name=]module:factory. Raises ValueError."""
    name, equals, path = text.rpartition("=")
    module, colon, factory = path.partition(":")
    if not (module and colon and factory) or (equals and not name):
        raise ValueError(f"--baseline {text}: write [NAME=]MODULE:FACTORY, e.g. timm.models.resnet:resnet50")
    if str(BASELINES) not in sys.path:
        sys.path.append(str(BASELINES))
    return Baseline(name or factory.replace("{model}", "") or module, module, factory)


@dataclass(frozen=True)
class Ours:
    """A model of ours or timm's, looked up before baselines are imported, which may register the same names."""

    name: str
    make: Callable[..., nn.Module]
    takes_size: bool  # accepts img_size
    folds: bool  # models.inference.prepare supports it

    @classmethod
    def named(cls, name: str) -> "Ours":
        """Look up a model of ours or timm's. Raises ValueError naming the nearest if it is unknown."""
        check_name(name, "--models")
        make = timm.models.model_entrypoint(name)
        return cls(name=name, make=make, takes_size=takes_img_size(name), folds=is_foldable(on_meta(name)))

    def build(self, size: int, device: torch.device, **arguments: Any) -> nn.Module:
        """Build the model as train.py prepares it."""
        sized = {"img_size": size} if self.takes_size else {}
        return prepare_model(self.make(num_classes=1000, **sized, **arguments), Processes(0, 1, 0, device, ""))

    def build_folded(self, size: int, device: torch.device, precision: str) -> nn.Module:
        """Build the model as `eval.py --fold` prepares it."""
        return prepare_inference(self.build(size, device).eval(), DTYPES.get(precision))


def parse_models(text: str) -> list[Ours]:
    """Parse model names separated by commas. Raises ValueError."""
    return [Ours.named(name.strip()) for name in text.split(",") if name.strip()]


def parse_choices(flag: str, text: str, choices: Sequence[str]) -> list[str]:
    """Parse a subset of the choices, separated by commas. Raises ValueError."""
    chosen = [word.strip() for word in text.split(",") if word.strip()]
    for word in chosen:
        if word not in choices:
            near = difflib.get_close_matches(word, choices, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{flag} {word}: {hint}choose from {', '.join(choices)}")
    if not chosen:
        raise ValueError(f"{flag} is empty: choose from {', '.join(choices)}")
    return chosen


class ModelStep:
    """A step of a model on random images: inference, or forward, loss, backward and AdamW."""

    def __init__(self, model: nn.Module, call: Callable[[Tensor], Tensor], batch: int, size: int, precision: str):
        device = next(model.parameters()).device
        self.model, self.call = model, call
        self.precision = Precision("off" if precision == "fp32" else precision, device)
        generator = torch.Generator(device).manual_seed(0)
        images = torch.randn(batch, 3, size, size, generator=generator, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (batch,), generator=generator, device=device)
        self.optimizer: torch.optim.Optimizer | None = None

    def infer(self) -> None:
        """Run a forward pass without gradients."""
        with torch.inference_mode(), self.precision.autocast():
            self.call(self.images)

    def forward(self) -> Tensor:
        """Run a forward pass; return the loss."""
        with self.precision.autocast():
            return F.cross_entropy(self.call(self.images), self.labels)

    def train(self) -> None:
        """Run an update: forward and backward pass, AdamW."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        scaler = self.precision.scaler
        scaler.scale(self.forward()).backward()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def set_mode(self, mode: str) -> Callable[[], None]:
        """Set the model to a mode, train or infer; return the step of that mode."""
        self.model.train(mode == "train")
        return self.train if mode == "train" else self.infer

    def kept_bytes(self) -> int:
        """Return the bytes that a forward pass keeps for the backward pass, without weights."""
        aside = {t.untyped_storage()._cdata for t in (*self.model.parameters(), *self.model.buffers(), self.images)}
        return kept_bytes(self.forward, aside)
