"""Trackers, which show a run's scalars and pictures: TensorBoard, Weights & Biases."""

import os
import re
import stat
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.atomic_files import write_text_atomically
from common.regular_files import check_kind, read_regular
from common.text import readable, shorten

CHARTS = {  # scalars that the tab "Custom scalars" of TensorBoard draws into one chart
    "top-1": ("eval_raw/top1", "eval_ema/top1"),
    "top-5": ("eval_raw/top5", "eval_ema/top5"),
    "loss": ("train/loss", "eval_raw/loss", "eval_ema/loss"),
}
RUN_ID = re.compile(r"[\w-]{1,128}", re.ASCII)
WANDB_ID = "wandb_id"  # file of a run directory with the id of its Weights & Biases run


class Tracker(Protocol):
    """Interface of a tracker; `update` is the number of updates done in the run."""

    name: str

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Log scalars by names such as train/loss."""

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        """Log a picture, uint8 (H, W, 3)."""

    def text(self, name: str, text: str, update: int) -> None:
        """Log a preformatted text of several lines."""

    def close(self) -> None:
        """Flush and close the tracker."""


class TensorBoardTracker:
    """TensorBoard event files in the run directory; events of earlier starts after `update` are not shown."""

    def __init__(self, folder: Path, update: int):
        from torch.utils.tensorboard import SummaryWriter

        self.name = "tensorboard"
        own = folder / "tensorboard"
        if not check_kind(own, stat.S_IFDIR):
            own.mkdir(exist_ok=True)
        self._folder = None if _is_valid(str(own)) else os.open(own, os.O_RDONLY)
        path = str(own) if self._folder is None else f"/proc/self/fd/{self._folder}"
        self._writer = SummaryWriter(path, purge_step=update + 1)
        charts = {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in CHARTS.items()}
        self._writer.add_custom_scalars({"raw and EMA": charts})

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Log scalars."""
        for name, value in values.items():
            self._writer.add_scalar(readable(name), value, update)

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        """Log a picture."""
        self._writer.add_image(readable(name), pixels, update, dataformats="HWC")

    def text(self, name: str, text: str, update: int) -> None:
        """Log a text, indented so that Markdown shows it as it is."""
        self._writer.add_text(name, "".join(f"    {readable(line)}\n" for line in text.split("\n")), update)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None


def _is_valid(path: str) -> bool:
    """Return True for a path in valid Unicode; TensorBoard refuses others, in which bytes are not UTF-8."""
    return path == readable(path)


class WandbTracker:
    """A run of Weights & Biases, continued by every start on the same run directory.

    Raises ValueError if wandb cannot start. Curves are drawn over `update`, not over wandb's own step, which cannot decrease
    when the run goes back to a checkpoint.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]):
        check_wandb(project)
        import wandb

        self.name, self._wandb, id_file = "wandb", wandb, folder / WANDB_ID
        run_id = read_run_id(id_file)
        try:
            self._run = wandb.init(
                project=project,
                name=readable(folder.name),
                dir=str(folder),
                id=run_id,
                resume="allow",
                config=dict(config),
            )
        except Exception as error:  # wandb's exceptions have no common base: no login, no network, no such project
            raise ValueError(
                f"LOG.WANDB={shorten(project)}: wandb does not start ({type(error).__name__}: {error}); log in with `wandb login`, "
                "set WANDB_MODE=offline, or LOG.WANDB to ''"
            ) from error
        if run_id is None:
            write_text_atomically(id_file, f"{self._run.id}\n")
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Log scalars."""
        self._run.log({**values, "update": update})

    def picture(self, name: str, pixels: np.ndarray, update: int) -> None:
        """Log a picture."""
        self._run.log({name: self._wandb.Image(pixels), "update": update})

    def text(self, name: str, text: str, update: int) -> None:
        """Ignore the text: it is the config, which wandb.init has received."""

    def close(self) -> None:
        """Finish the run, waiting until everything is uploaded."""
        self._run.finish()


def read_run_id(path: Path) -> str | None:
    """Return the id of a run in its file, None without the file. Raises ValueError if the file holds no id."""
    if not check_kind(path):
        return None
    text = read_regular(path, 1000).decode("utf-8", "replace").strip()
    if not RUN_ID.fullmatch(text):
        raise ValueError(f"{path} holds {text[:40]!a}, which is no id of a Weights & Biases run; remove it")
    return text


def check_wandb(project: str) -> None:
    """Raise ValueError if a project of Weights & Biases is configured but its package is missing."""
    if project and "wandb" not in sys.modules and find_spec("wandb") is None:
        raise ValueError(
            f"LOG.WANDB={shorten(project)} needs the package wandb: pip install wandb; or set LOG.WANDB to '' to do without"
        )
