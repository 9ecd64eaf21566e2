"""Predictions of a model for every image of a data set, the same at any number of processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.distributed.processes import Processes
from engine.evaluate import TOP

Columns = dict[str, Sequence[Any] | np.ndarray]


@dataclass(frozen=True)
class Predictions:
    """Labels and ranked predictions of n images, by index; k predictions each, best first."""

    labels: np.ndarray  # int64 (n,)
    ranked: np.ndarray  # int64 (n, k), classes
    probabilities: np.ndarray  # float32 (n, k)

    def per_class(self, classes: Sequence[str]) -> Columns:
        """Return a table of the classes that have images: counts, and accuracies in percent."""
        hits = self.ranked == self.labels[:, None]
        images, correct1, correct5 = (
            np.bincount(self.labels[chosen], minlength=len(classes))
            for chosen in (slice(None), hits[:, 0], hits.any(1))
        )
        held = np.flatnonzero(images)
        images, correct1, correct5 = images[held], correct1[held], correct5[held]
        return {
            "class": held,
            "name": [classes[label] for label in held.tolist()],
            "images": images,
            "correct1": correct1,
            "correct5": correct5,
            "top1": np.round(100.0 * correct1 / images, 4),
            "top5": np.round(100.0 * correct5 / images, 4),
        }

    def per_image(self, name: Callable[[int], str]) -> Columns:
        """Return a table of the images; `name` maps an image index to its file."""
        numbers = range(self.ranked.shape[1])
        return {
            "file": [name(index) for index in range(len(self.labels))],
            "label": self.labels,
            **{f"class{k + 1}": self.ranked[:, k] for k in numbers},
            **{f"probability{k + 1}": self.probabilities[:, k] for k in numbers},
            "correct": (self.ranked[:, 0] == self.labels).astype(np.int64),
        }


class Collector:
    """Collector of the predictions of `evaluate`, as its observer on each process."""

    def __init__(self, num_images: int, num_answers: int, processes: Processes):
        """`num_answers` is the number of classes that may be predicted."""
        k = min(TOP, num_answers)
        self.processes = processes
        # Times seen, label, ranked classes.
        self._table = torch.zeros(num_images, 2 + k, dtype=torch.int64, device=processes.device)
        self._probabilities = torch.zeros(num_images, k, device=processes.device)

    def observe(self, batch: Any, labels: Tensor, logits: Tensor, ranked: Tensor) -> None:
        """Store the predictions of a batch for the images `batch.indices`."""
        rows = batch.indices.to(labels.device)
        self._table[:, 0].index_add_(0, rows, torch.ones_like(rows))
        self._table[rows, 1], self._table[rows, 2:] = labels, ranked
        self._probabilities[rows] = logits.softmax(1).gather(1, ranked)

    def gather(self) -> Predictions:
        """Return the predictions of all images, on every process. Raises RuntimeError unless each image was seen exactly once."""
        table = self.processes.sum(self._table).cpu().numpy()  # each row is nonzero on one process only
        probabilities = self.processes.sum(self._probabilities).cpu().numpy()
        wrong = np.flatnonzero(table[:, 0] != 1)
        if len(wrong):
            raise RuntimeError(
                f"{len(wrong)} of {len(table)} images were not evaluated exactly once, the first of them {wrong[0]}, "
                f"{table[wrong[0], 0]} times; the loaders of the processes do not agree"
            )
        return Predictions(table[:, 1], table[:, 2:], probabilities)
