"""Sample images of a run: its first training batch, and attention maps of a few validation images.

The main process draws them; the log writes them as PNGs into the run directory and to the trackers.
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

from common.text import readable
from data.augment.device_stage import DeviceStage
from data.loaders.batch import Batch
from engine.logging.log import Log
from engine.loop import Loop
from engine.precision import Precision
from engine.state import TrainState
from models.attention_maps import attention_maps, has_maps
from models.backbone import Backbone

SAMPLES = 4  # validation images
FIRST, COLUMNS = 16, 8  # images drawn of the first batch, and in a row
SIDE = 160, 224  # smallest and largest side of an image in the drawing of the first batch, pixels
GAP, TEXT = 8, 13  # pixels
LABEL = 60  # characters of a class's name in a file name
NOT_IN_FILE_NAMES = re.compile(r"[^\w-]+")
CAPTION = 2 * (TEXT + 3)


@dataclass
class SampleImages:
    """Schedule and drawing of the sample images; only the main process draws."""

    every: int  # epochs; 0 draws nothing
    evaluated_every: int  # epochs
    stage: DeviceStage
    classes: Sequence[str]
    smoothing: float  # label smoothing of the training targets
    log: Log
    samples: list[Batch] = field(default_factory=list)  # one validation image each
    warned: bool = False  # that matplotlib is missing

    @property
    def _is_on(self) -> bool:
        return bool(self.every and self.log.main)

    def draw_first_batch(self, loop: Loop, state: TrainState) -> None:
        """Let the loop draw the run's first micro-batch; does nothing for a run past its first update."""
        if not self._is_on or state.update:
            return

        def draw(images: Tensor, targets: Tensor, update: int) -> None:
            loop.on_batch = None
            with self._warning_on_failure("the first batch"):
                self.log.picture("first_batch", self.first_batch(images, targets), update)

        loop.on_batch = draw

    def first_batch(self, images: Tensor, targets: Tensor) -> Image.Image:
        """Draw normalised images (B, 3, H, W) with the classes of their soft targets (B, classes)."""
        captions = [self._describe_target(target) for target in targets[:FIRST].cpu()]
        return grid(denormalise(images[:FIRST], self.stage), captions)

    def keep(self, batches: Iterable[Batch], images: int) -> Iterator[Batch]:
        """Yield the batches of an evaluation of `images` images; the first time keep evenly spaced ones as samples."""
        positions: set[int] = set()
        if self._is_on and not self.samples:
            positions = {(2 * k + 1) * images // (2 * SAMPLES) for k in range(SAMPLES)}
        first = 0  # position of the batch's first image
        for batch in batches:
            yield batch
            for i in sorted(position - first for position in positions if first <= position < first + len(batch)):
                pixels, labels, indices = (t[i : i + 1].clone() for t in (batch.images, batch.labels, batch.indices))
                self.samples.append(Batch(pixels, labels, indices))
            first += len(batch)

    def is_due(self, epoch: int, last: bool) -> bool:
        """Return True if the evaluation after `epoch` (from 1) draws: the first after each multiple of `every`, and the last."""
        if not (self._is_on and self.samples):
            return False
        return last or epoch // self.every > (epoch - self.evaluated_every) // self.every

    def draw(self, model: nn.Module, precision: Precision, epoch: int, update: int) -> None:
        """Draw the model's attention maps of the samples, named by `epoch` (from 1)."""
        with self._warning_on_failure("attention maps"):
            for name, picture in self._draw_maps(model, precision):
                self.log.picture(f"epoch_{epoch:04d}/{name}", picture, update)

    def _draw_maps(self, model: nn.Module, precision: Precision) -> list[tuple[str, Image.Image]]:
        """Return named drawings, none for a model without attention maps or where matplotlib is missing."""
        if not has_maps(model):
            return []
        if find_spec("matplotlib") is None:
            if not self.warned:
                self.warned = True
                self.log.warning(
                    "attention maps need matplotlib: pip install matplotlib; or set LOG.PICTURES_EVERY to 0"
                )
            return []
        training = model.training
        model.eval()
        try:
            return draw_attention_maps(model, self.samples, self.stage, precision, self.classes)
        finally:
            model.train(training)

    @contextmanager
    def _warning_on_failure(self, what: str) -> Iterator[None]:
        """Turn a failure, such as a full GPU, into a warning, so that it does not end the run."""
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            self.log.warning(f"{what} cannot be drawn ({type(error).__name__}: {reason}); training goes on without")

    def _describe_target(self, target: Tensor) -> str:
        """Return the classes of a soft target, with their weights in percent where there are two; label smoothing is undone."""
        weights = (target - self.smoothing / len(target)) / (1 - self.smoothing)
        top = weights.topk(min(2, len(weights)))
        mixed = [(self.classes[i], weight) for weight, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        if mixed[0][1] > 0.995:
            return readable(mixed[0][0])
        return "\n".join(f"{100 * weight:.0f}% {readable(name)}" for name, weight in mixed if weight > 0.005)


def draw_attention_maps(
    model: Backbone, samples: Sequence[Batch], stage: DeviceStage, precision: Precision, classes: Sequence[str]
) -> list[tuple[str, Image.Image]]:
    """Return a named figure of the attention maps for each sample; the model must be in evaluation mode."""
    from trainer.figures.figure import as_pixels, sheet
    from trainer.figures.panels import original, panels
    from trainer.figures.photograph import Photograph

    device = stage.device
    batch = Batch(
        torch.cat([one.images.to(device) for one in samples]),
        torch.cat([one.labels.to(device) for one in samples]),
        torch.cat([one.indices.to(device) for one in samples]),
    )
    images, labels = stage.evaluate(batch)
    with precision.autocast():
        logits, maps = attention_maps(model, images)
    predictions = logits.float().softmax(1).max(1)
    figures = []
    for i in range(len(batch)):
        image = batch.images[i].permute(1, 2, 0).cpu().numpy()
        side, label, predicted = image.shape[0], classes[int(labels[i])], classes[int(predictions.indices[i])]
        photo = Photograph(image, (0, 0, side, side), side, label)
        row = [original(photo), *(panel for one in maps for panel in panels(one, i, photo))]
        caption = f"{label}: {predicted} {100 * float(predictions.values[i]):.1f} %"
        figures.append(
            (
                f"{i + 1}_{NOT_IN_FILE_NAMES.sub('_', label)[:LABEL]}",
                Image.fromarray(as_pixels(sheet([row], [caption]))),
            )
        )
    return figures


def denormalise(images: Tensor, stage: DeviceStage) -> list[Image.Image]:
    """Return normalised images (B, 3, H, W) as 8-bit RGB images."""
    levels = (images.float() * stage.std + stage.mean).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def grid(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Draw images of one size in rows, each with a caption of one or two lines below it."""
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
        for j, line in enumerate(caption.split("\n")[:2]):
            draw.text((x, y + side + 2 + j * (TEXT + 2)), shorten(line, font, side), "black", font)
    return sheet


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten a text, with an ellipsis, to fit into `width` pixels."""
    text = text[:width]  # a character is wider than a pixel
    while text and font.getlength(text) > width:
        text = f"{text.removesuffix('…')[:-1]}…"
    return text
