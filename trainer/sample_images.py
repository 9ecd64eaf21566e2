"""The pictures of a run: its first batch as the model gets it, and what the model makes of a few validation images.

Part of train.py. The main process draws them; the log keeps them as PNGs in the run directory and beside the curves.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from data.augment.device_stage import DeviceStage
from data.loaders.batch import Batch
from engine.logging.log import Log
from engine.loop import Loop
from engine.precision import Precision
from engine.state import TrainState
from models.attention_maps import attention_maps, has_maps
from models.backbone import Backbone

SHOWN = 4  # validation images
FIRST, COLUMNS = 16, 8  # images of the first batch, and of a row of them
SIDE = 160, 224  # smallest and largest side of an image of the first batch, as drawn
GAP, TEXT = 8, 13  # pixels
UNFIT = re.compile(r"[^\w-]+")  # for a file's name
CAPTION = 2 * (TEXT + 3)


@dataclass
class SampleImages:
    """What is drawn when; on other processes than the main one nothing is."""

    every: int  # epochs; 0 draws nothing
    evaluated_every: int  # epochs
    stage: DeviceStage
    classes: Sequence[str]
    smoothing: float  # of the training targets
    log: Log
    shown: list[Batch] = field(default_factory=list)  # a validation image each
    quiet: bool = False  # whether it was said why there are no pictures

    @property
    def _on(self) -> bool:
        return bool(self.every and self.log.main)

    def catch_first_batch(self, loop: Loop, state: TrainState) -> None:
        """Draw the run's first micro-batch when it comes by; a run that is further has drawn it."""
        if not self._on or state.update:
            return

        def draw(images: Tensor, targets: Tensor, update: int) -> None:
            loop.on_batch = None
            with self._surviving("the first batch"):
                self.log.picture("first_batch", self.first_batch(images, targets), update)

        loop.on_batch = draw

    def first_batch(self, images: Tensor, targets: Tensor) -> Image.Image:
        """Draw normalised images with the classes and shares that their targets name."""
        names = [self._shares(target) for target in targets[:FIRST].cpu()]
        return grid(as_pictures(images[:FIRST], self.stage), names)

    def watch(self, batches: Iterable[Batch], images: int) -> Iterator[Batch]:
        """Yield the batches of an evaluation of `images` images; keep some, from all over it, the first time."""
        wanted = {(2 * k + 1) * images // (2 * SHOWN) for k in range(SHOWN)} if self._on and not self.shown else set()
        seen = 0
        for batch in batches:
            yield batch
            for i in sorted(place - seen for place in wanted if seen <= place < seen + len(batch)):
                pixels, labels, indices = (t[i : i + 1].clone() for t in (batch.images, batch.labels, batch.indices))
                self.shown.append(Batch(pixels, labels, indices))
            seen += len(batch)

    def is_due(self, epoch: int, last: bool) -> bool:
        """Say whether the evaluation after `epoch` (from 1) draws: the first after each multiple of `every`, and the last."""
        if not (self._on and self.shown):
            return False
        return last or epoch // self.every > (epoch - self.evaluated_every) // self.every

    def draw(self, model: nn.Module, precision: Precision, epoch: int, update: int) -> None:
        """Draw what the model makes of the validation images, and show it with `epoch` (from 1)."""
        with self._surviving("what the model sees"):
            for name, picture in self._pictures(model, precision):
                self.log.picture(f"epoch_{epoch:04d}/{name}", picture, update)

    def _pictures(self, model: nn.Module, precision: Precision) -> list[tuple[str, Image.Image]]:
        if not has_maps(model):
            return []
        if find_spec("matplotlib") is None:
            if not self.quiet:
                self.quiet = True
                self.log.warning(
                    "pictures of the model need matplotlib: pip install matplotlib; or set LOG.PICTURES_EVERY to 0"
                )
            return []
        training = model.training
        model.eval()
        try:
            return pictures_of(model, self.shown, self.stage, precision, self.classes)
        finally:
            model.train(training)

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Let a failure, a full GPU say, cost a picture and not the run."""
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            why = " ".join(str(error).split())[:200]
            self.log.warning(f"{what} cannot be drawn ({type(error).__name__}: {why}); going on without")

    def _shares(self, target: Tensor) -> str:
        """Write a soft target as its classes and their shares, the smoothing undone."""
        shares = (target - self.smoothing / len(target)) / (1 - self.smoothing)
        best = shares.topk(min(2, len(shares)))
        found = [(self.classes[i], share) for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        if found[0][1] > 0.995:
            return found[0][0]
        return "\n".join(f"{100 * share:.0f}% {name}" for name, share in found if share > 0.005)


def pictures_of(
    model: Backbone, shown: Sequence[Batch], stage: DeviceStage, precision: Precision, classes: Sequence[str]
) -> list[tuple[str, Image.Image]]:
    """Return a sheet, with a name, of what a model in evaluation mode looks at in each image."""
    from trainer.figures.figure import as_pixels, sheet
    from trainer.figures.panels import original, panels
    from trainer.figures.photograph import Photograph

    device = stage.device
    batch = Batch(
        torch.cat([one.images.to(device) for one in shown]),
        torch.cat([one.labels.to(device) for one in shown]),
        torch.cat([one.indices.to(device) for one in shown]),
    )
    images, labels = stage.evaluate(batch)
    with precision.autocast():
        logits, maps = attention_maps(model, images)
    answers = logits.float().softmax(1).max(1)
    found = []
    for i in range(len(batch)):
        image = batch.images[i].permute(1, 2, 0).cpu().numpy()
        side, label, answer = image.shape[0], classes[int(labels[i])], classes[int(answers.indices[i])]
        photo = Photograph(image, (0, 0, side, side), side, label)
        row = [original(photo), *(panel for one in maps for panel in panels(one, i, photo))]
        caption = f"{label}: {answer} {100 * float(answers.values[i]):.1f} %"
        found.append((f"{i + 1}_{UNFIT.sub('_', label)}", Image.fromarray(as_pixels(sheet([row], [caption])))))
    return found


def as_pictures(images: Tensor, stage: DeviceStage) -> list[Image.Image]:
    """Return normalised images (B, 3, H, W) as pictures."""
    levels = (images.float() * stage.std + stage.mean).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def grid(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Draw images of one size in rows, each with one or two lines below it."""
    side = min(max(images[0].width, SIDE[0]), SIDE[1])
    columns = min(COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    across, down = side + GAP, side + CAPTION + GAP
    sheet = Image.new("RGB", (columns * across + GAP, rows * down + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = GAP + i % columns * across, GAP + i // columns * down
        sheet.paste(
            image.resize((side, side), Image.Resampling.BICUBIC if side < image.width else Image.Resampling.NEAREST),
            (x, y),
        )
        for j, line in enumerate(caption.splitlines()[:2]):
            draw.text((x, y + side + 2 + j * (TEXT + 2)), cut(line, font, side), "black", font)
    return sheet


def cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten a text to what fits into so many pixels."""
    while text and font.getlength(text) > width:
        text = f"{text.removesuffix('…')[:-1]}…"
    return text
