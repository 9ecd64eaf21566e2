"""Exact evaluation: every image counted once, at any number of processes."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.accuracy import TopKCounts
from engine.distributed.processes import Processes
from engine.precision import Precision


@dataclass(frozen=True)
class Accuracy(TopKCounts):
    """Counts and mean loss of an evaluation, and the seconds it took."""

    loss: float
    seconds: float

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
        if answers is not None:
            logits = restrict(logits, answers)
        ranked = logits.topk(min(TOP, logits.shape[1] if answers is None else len(answers))).indices  # (B, k)
        if observe:
            observe(batch, labels, logits, ranked)
        hits = ranked == labels[:, None]
        correct += torch.stack([hits[:, 0].sum(), hits.sum()])
        seen += len(labels)
        loss += F.cross_entropy(logits, labels, reduction="sum")
    counted = torch.tensor([seen], dtype=torch.float64, device=device)  # float64 holds counts below 2^53 exactly
    sums = processes.sum(torch.cat([correct.double(), counted, loss[None]]))
    model.train(training)
    correct1, correct5, images_seen = (int(n) for n in sums[:3].tolist())
    if images_seen != num_images:
        raise RuntimeError(
            f"evaluation counted {images_seen} images of {num_images}; the loaders of the processes do not agree"
        )
    return Accuracy(correct1, correct5, images_seen, float(sums[3]) / images_seen, time.perf_counter() - started)


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
