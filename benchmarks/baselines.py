"""What is measured against what: our models, as they are and compiled, and opponents named on the command line."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.record import ROOT
from engine.build import prepare_model
from engine.distributed.processes import Processes
from engine.memory import kept_bytes
from engine.precision import DTYPES, Precision
from models.build import check_name, is_retoken, takes_img_size
from models.inference.prepare import prepare_inference

OPPONENTS = ROOT / "oracle"  # for other people's code: on the path, ignored by git


@dataclass(frozen=True)
class Baseline:
    """A callable that builds a model; `{model}` in its name stands for the model it is measured against."""

    name: str
    module: str
    factory: str

    def build(self, model: str) -> nn.Module:
        """Build the opponent of a model. Raises ValueError if what is named gives none."""
        built = self.find(model)()
        if not isinstance(built, nn.Module):
            raise ValueError(f"--opponent {self.name}: {self.factory} gave {type(built).__name__}, not a model")
        return built

    def find(self, model: str) -> Callable[[], object]:
        """Return the callable. Raises ValueError if there is no such module or name in it."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--opponent {self.module}:{self.factory}: {error}; give a module that python can import from here or from "
                f"{OPPONENTS.name}/"
            ) from error
        name = self.factory.replace("{model}", model)
        make = getattr(module, name, None)
        if not callable(make):
            near = difflib.get_close_matches(name, [n for n in dir(module) if callable(getattr(module, n))], n=3)
            raise ValueError(f"--opponent {self.module} has no {name}; did you mean {' or '.join(near) or 'another'}?")
        return make


def parse_baseline(text: str) -> Baseline:
    """Read [name=]module:factory. Raises ValueError."""
    name, equals, path = text.rpartition("=")
    module, colon, factory = path.partition(":")
    if not (module and colon and factory) or (equals and not name):
        raise ValueError(f"--opponent {text}: write [NAME=]MODULE:FACTORY, e.g. timm.models.resnet:resnet50")
    if str(OPPONENTS) not in sys.path:
        sys.path.append(str(OPPONENTS))
    return Baseline(name or factory.replace("{model}", "") or module, module, factory)


@dataclass(frozen=True)
class Ours:
    """A model by its name; found before opponents are imported, as some register under the same names."""

    name: str
    make: Callable[..., nn.Module]
    takes_size: bool
    folds: bool  # models.inference.prepare knows it

    @classmethod
    def named(cls, name: str) -> "Ours":
        """Find a model of ours or timm's. Raises ValueError naming the nearest if it is unknown."""
        check_name(name, "--models")
        return cls(name, timm.models.model_entrypoint(name), takes_img_size(name), is_retoken(name))

    def build(self, size: int, device: torch.device) -> nn.Module:
        """Build it as train.py prepares it."""
        sized = {"img_size": size} if self.takes_size else {}
        return prepare_model(self.make(num_classes=1000, **sized), Processes(0, 1, 0, device, ""))

    def build_folded(self, size: int, device: torch.device, precision: str) -> nn.Module:
        """Build it as `eval.py --fold` prepares it."""
        return prepare_inference(self.build(size, device).eval(), DTYPES.get(precision))


def parse_models(text: str) -> list[Ours]:
    """Read names with commas between. Raises ValueError."""
    return [Ours.named(name.strip()) for name in text.split(",") if name.strip()]


def parse_choices(flag: str, text: str, choices: Sequence[str]) -> list[str]:
    """Read some of the choices with commas between. Raises ValueError."""
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
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, size, size, generator=generator)
        self.images = images.to(device, memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (batch,), generator=generator).to(device)
        self.optimizer: torch.optim.Optimizer | None = None

    def infer(self) -> None:
        with torch.inference_mode(), self.precision.autocast():
            self.call(self.images)

    def forward(self) -> Tensor:
        """Return the loss."""
        with self.precision.autocast():
            return F.cross_entropy(self.call(self.images), self.labels)

    def train(self) -> None:
        """Do an update."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        scaler = self.precision.scaler
        scaler.scale(self.forward()).backward()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def of(self, mode: str) -> Callable[[], None]:
        """Return the step of a mode, train or infer, the model set to it."""
        self.model.train(mode == "train")
        return self.train if mode == "train" else self.infer

    def kept_bytes(self) -> int:
        """Return the bytes that a forward pass keeps for the backward pass, weights aside."""
        aside = {t.untyped_storage()._cdata for t in (*self.model.parameters(), *self.model.buffers(), self.images)}
        return kept_bytes(self.forward, aside)
