"""Where a run's numbers and pictures can be looked at: TensorBoard, Weights & Biases."""

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.atomic_files import write_atomically

TOGETHER = {  # what TensorBoard's "Custom scalars" draw into one chart
    "top-1": ("eval_raw/top1", "eval_ema/top1"),
    "top-5": ("eval_raw/top5", "eval_ema/top5"),
    "loss": ("train/loss", "eval_raw/loss", "eval_ema/loss"),
}
WANDB_ID = "wandb_id"  # file of a run directory: which run of Weights & Biases it is


class Tracker(Protocol):
    """What takes numbers and pictures; `update` counts updates done in the run."""

    name: str

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Take numbers, by names such as train/loss."""

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        """Take a picture, uint8 (H, W, 3)."""

    def text(self, name: str, text: str, update: int) -> None:
        """Take a text as it is, several lines long."""

    def close(self) -> None:
        """Write out what is not written yet."""


class TensorBoardTracker:
    """Event files in the run directory; what an earlier start wrote behind `update` is not shown."""

    def __init__(self, folder: Path, update: int):
        from torch.utils.tensorboard import SummaryWriter

        self.name = "tensorboard"
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1)
        charts = {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in TOGETHER.items()}
        self._writer.add_custom_scalars({"raw and EMA": charts})

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Take numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, update)

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        """Take a picture."""
        self._writer.add_image(name, pixels, update, dataformats="HWC")

    def text(self, name: str, text: str, update: int) -> None:
        """Take a text; indented, as Markdown leaves it alone."""
        self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), update)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases; the same one however often the run directory is continued.

    Raises ValueError if it cannot start. Curves are drawn over `update`, not over wandb's own step, which cannot go back to a
    checkpoint.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]):
        check_wandb(project)
        import wandb

        self.name, self._wandb, stored = "wandb", wandb, folder / WANDB_ID
        known = stored.read_text().strip() if stored.is_file() else None
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                dir=str(folder),
                id=known,
                resume="allow",
                config=dict(config),
            )
        except Exception as error:  # wandb's own kinds, without a common one: no login, no network, no such project
            raise ValueError(
                f"LOG.WANDB={project!r}: wandb does not start ({type(error).__name__}: {error}); log in with `wandb login`, "
                "set WANDB_MODE=offline, or LOG.WANDB to ''"
            ) from error
        if known is None:
            write_atomically(stored, lambda file: _write(file, f"{self._run.id}\n"))
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Take numbers."""
        self._run.log({**values, "update": update})

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        """Take a picture."""
        self._run.log({name: self._wandb.Image(pixels), "update": update})

    def text(self, name: str, text: str, update: int) -> None:
        """Take nothing: the only text is the config, which the run has from its start."""

    def close(self) -> None:
        """Wait until everything is handed over."""
        self._run.finish()


def check_wandb(project: str) -> None:
    """Raise ValueError if a project of Weights & Biases is named and its package is missing."""
    if project and "wandb" not in sys.modules and find_spec("wandb") is None:
        raise ValueError(
            f"LOG.WANDB={project!r} needs the package wandb: pip install wandb; or set LOG.WANDB to '' to do without"
        )


def _write(file: Path, text: str) -> None:
    file.write_text(text)
