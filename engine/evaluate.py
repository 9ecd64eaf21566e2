"""Exact evaluation: every image counted once, at any number of processes."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed.processes import Processes
from engine.precision import Precision


class NotFiniteError(RuntimeError):
    """Raised after an evaluation whose logits or loss are not finite: its accuracy says nothing."""


@dataclass(frozen=True)
class TopKCounts:
    """Numbers of correct predictions and of evaluated images; accuracies in percent."""

    correct1: int
    correct5: int
    images: int

    @property
    def top1(self) -> float:
        """Return the top-1 accuracy in percent."""
        return 100.0 * self.correct1 / self.images

    @property
    def top5(self) -> float:
        """Return the top-5 accuracy in percent."""
        return 100.0 * self.correct5 / self.images

    def __str__(self) -> str:
        return f"top-1 {self.top1:.3f} ({self.correct1}/{self.images})  top-5 {self.top5:.3f} ({self.correct5}/{self.images})"


@dataclass(frozen=True)
class RealAccuracy(TopKCounts):
    """ReaL accuracy: counts over the images that have labels."""

    def __str__(self) -> str:
        return f"ReaL {super().__str__()}"


@dataclass(frozen=True)
class Accuracy(TopKCounts):
    """Counts and mean loss of an evaluation, and the seconds it took.

    The loss is nan if any image's logits are not finite; such an image counts as wrong.
    """

    loss: float
    seconds: float

    @property
    def finite(self) -> bool:
        """Return True if the loss, and so all logits, are finite."""
        return math.isfinite(self.loss)

    def __str__(self) -> str:
        return f"{super().__str__()}  loss {self.loss:.4f}  {self.images / self.seconds:.0f} images/s"


TOP = 5  # length of the ranking of an image; accuracy is counted for the first and for all of them

# Called with a loader's batch, the labels (B,), the logits float32 (B, classes) and the best classes (B, k), best first.
Observer = Callable[[Any, Tensor, Tensor, Tensor], None]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    prepare: Callable[[Any], tuple[Tensor, Tensor]],
    precision: Precision,
    processes: Processes,
    num_images: int,
    flip: bool = False,
    answers: Sequence[int] | None = None,
    observe: Observer | None = None,
) -> Accuracy:
    """Evaluate the model on this process's batches and add up over all processes.

    `prepare` turns a loader's batch into (images (B, 3, H, W), labels (B,)) on the device. `flip` averages the logits of
    each image and its mirror image. `answers` are the only classes that count as predictions: the others' logits become
    -inf, for the accuracies as for the loss. Raises RuntimeError if the images counted are not exactly `num_images`.
    """
    started = time.perf_counter()
    training = model.training
    model.eval()
    device = processes.device
    correct = torch.zeros(2, dtype=torch.int64, device=device)  # top-1, top-5
    seen = 0
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        images, labels = prepare(batch)
        logits = _logits(model, images, precision, flip)
        finite = logits.isfinite().all(1)  # (B,)
        if answers is not None:
            logits = restrict(logits, answers)
        ranked = logits.topk(min(TOP, logits.shape[1] if answers is None else len(answers))).indices  # (B, k)
        if observe:
            observe(batch, labels, logits, ranked)
        hits = (ranked == labels[:, None]) & finite[:, None]
        correct += torch.stack([hits[:, 0].sum(), hits.sum()])
        seen += len(labels)
        loss += torch.where(finite.all(), F.cross_entropy(logits, labels, reduction="sum"), math.nan)
    counted = torch.tensor([seen], dtype=torch.float64, device=device)  # float64 holds counts below 2^53 exactly
    sums = processes.sum(torch.cat([correct.double(), counted, loss[None]]))
    model.train(training)
    correct1, correct5, images_seen = (int(n) for n in sums[:3].tolist())
    if images_seen != num_images:
        raise RuntimeError(
            f"evaluation counted {images_seen} images of {num_images}; the loaders of the processes do not agree"
        )
    return Accuracy(correct1, correct5, images_seen, float(sums[3]) / images_seen, time.perf_counter() - started)


def describe_not_finite(which: str, result: Accuracy, source: str = "") -> str:
    """Return the message about an evaluation that is not finite."""
    return (
        f"the evaluation of the {which} weights{source} is not finite (loss {result.loss:g}): logits of the model are nan or "
        "inf, so its accuracy says nothing and is never the best"
    )


def restrict(logits: Tensor, answers: Sequence[int]) -> Tensor:
    """Return logits (B, classes) that are -inf outside the classes `answers`."""
    out = torch.full_like(logits, -torch.inf)
    out[:, answers] = logits[:, answers]
    return out


def _logits(model: nn.Module, images: Tensor, precision: Precision, flip: bool) -> Tensor:
    with precision.autocast():
        logits = model(images)
        mirrored = model(images.flip(-1)) if flip else None
    return logits.float() if mirrored is None else (logits.float() + mirrored.float()) / 2
