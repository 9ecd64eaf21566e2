"""Sample images of a run: schedule, contents, and no effect on training."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.device_stage import DeviceStage
from data.augment.mixup import Mixup
from data.loaders.batch import Batch
from engine.logging.log import Log
from engine.precision import Precision
from tests.helpers.small_models import shrunken
from tests.helpers.small_runs import run_here
from trainer.sample_images import COLUMNS, GAP, SIDE, SampleImages, denormalise, grid

CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "cat/dog", "eel"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFF = Precision("off", CPU)


class RecordingLog:
    """A log that keeps pictures and warnings in memory."""

    main = True

    def __init__(self):
        self.pictures, self.lines = {}, []

    def picture(self, name, image, update):
        self.pictures[name] = image, update

    def warning(self, text):
        self.lines.append(text)


def sample_images(every=2, evaluated_every=1, smoothing=0.1, mixing=None):
    stage = DeviceStage(mixing or Mixup(4, 0, 0, smoothing=smoothing), MEAN, STD, seed=0)
    return SampleImages(every, evaluated_every, stage, CLASSES, smoothing, RecordingLog())


def batch(first, count, size=32):
    indices = torch.arange(first, first + count)
    images = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(first)).byte()
    return Batch(images, indices % 4, indices)


def test_denormalised_images_are_the_pixels_of_the_batch():
    found, one = sample_images(), batch(0, 3)
    images, _ = found.stage.evaluate(one)
    for picture, image in zip(denormalise(images, found.stage), one.images, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())


def test_targets_are_described_by_classes_and_percentages():
    found = sample_images(smoothing=0.2)
    mixing = found.stage.mixing
    shares = mixing.targets(torch.tensor([0, 1, 1, 3]), 0.7)
    assert [found._describe_target(target) for target in shares] == [
        *("70% ant\n30% eel", "bee", "bee", "70% eel\n30% ant"),
    ]


def test_first_batch_is_drawn_once_and_not_changed():
    found = sample_images(mixing=Mixup(4, mixup=0.8, cutmix=0, prob=1.0))
    loop, state = SimpleNamespace(on_batch=None), SimpleNamespace(update=0)
    found.draw_first_batch(loop, state)
    images, targets = found.stage.train(batch(0, 10), 0, 0, 0)
    before = images.clone(), targets.clone()
    loop.on_batch(images, targets, 0)
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])
    assert loop.on_batch is None
    picture, update = found.log.pictures["first_batch"]
    assert update == 0
    assert picture.width == COLUMNS * (SIDE[0] + GAP) + GAP
    found.draw_first_batch(loop, SimpleNamespace(update=1))
    assert loop.on_batch is None


def test_grid_draws_each_image_at_its_position():
    colours = [(10 * i, 255 - 10 * i, 40) for i in range(COLUMNS + 1)]
    sheet = grid([Image.new("RGB", (200, 200), c) for c in colours], ["a very long class name " * 4] * len(colours))
    middle = GAP + 100
    assert [sheet.getpixel((middle + i * (200 + GAP), middle)) for i in range(COLUMNS)] == colours[:COLUMNS]
    assert sheet.getpixel((middle, sheet.height - 100)) == colours[COLUMNS]
    gaps = np.asarray(sheet)[:, [i * (200 + GAP) + 1 for i in range(COLUMNS + 1)]]
    assert (gaps == 255).all()  # nothing runs over, the captions neither


@pytest.mark.parametrize("sizes", [[40], [16, 16, 8], [1] * 40, [2, 1]])
def test_samples_are_evenly_spaced_over_the_evaluation(sizes):
    found, first, batches = sample_images(), 0, []
    for size in sizes:
        batches.append(batch(first, size))
        first += size
    assert list(map(id, found.keep(batches, first))) == list(map(id, batches))
    kept = [int(one.indices) for one in found.samples]
    assert kept == ([5, 15, 25, 35] if first == 40 else [0, 1, 2])
    for one, index in zip(found.samples, kept, strict=True):
        whole = next(b for b in batches if index in b.indices)
        assert torch.equal(one.images[0], whole.images[index - int(whole.indices[0])])
    list(found.keep(batches, first))
    assert len(found.samples) == len(kept)


@pytest.mark.parametrize(
    ("every", "evaluated_every", "drawn"),
    [(10, 1, [10, 20, 25]), (10, 3, [12, 21, 25]), (1, 5, [5, 10, 15, 20, 25]), (0, 1, []), (100, 2, [25])],
)
def test_drawings_are_due_at_the_evaluation_after_each_multiple_and_the_last(every, evaluated_every, drawn):
    found = sample_images(every, evaluated_every)
    list(found.keep([batch(0, 4)], 4))
    evaluated = [epoch for epoch in range(1, 26) if epoch % evaluated_every == 0 or epoch == 25]
    assert [epoch for epoch in evaluated if found.is_due(epoch, epoch == 25)] == drawn


@pytest.mark.parametrize("name", ["sgformer_small", "groupmixformer_mobile", "stvit_small"])
def test_each_family_draws_its_attention_maps(name, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install matplotlib: attention maps are drawn with it")
    monkeypatch.setattr("trainer.sample_images.SAMPLES", 1)
    found, model = sample_images(), shrunken(name, num_classes=4).train()
    list(found.keep([batch(0, 8, 64)], 8))
    random, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    found.draw(model, OFF, 2, 20)
    assert found.log.lines == []
    assert list(found.log.pictures) == ["epoch_0002/1_ant"]
    for picture, update in found.log.pictures.values():
        assert update == 20
        assert np.asarray(picture).std() > 10
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_model_without_attention_maps_draws_nothing_and_warns_of_nothing():
    found = sample_images()
    list(found.keep([batch(0, 4)], 4))
    found.draw(torch.nn.Linear(2, 2), OFF, 2, 20)
    assert (found.log.pictures, found.log.lines) == ({}, [])


def test_missing_matplotlib_is_warned_of_once(monkeypatch):
    monkeypatch.setattr("trainer.sample_images.find_spec", lambda name: None)
    found = sample_images()
    list(found.keep([batch(0, 4)], 4))
    for epoch in (2, 4):
        found.draw(shrunken("stvit_small", num_classes=4), OFF, epoch, 20)
    assert found.log.pictures == {}
    assert len(found.log.lines) == 1
    assert "pip install matplotlib" in found.log.lines[0]


def test_failed_drawing_is_a_warning_and_does_not_end_the_run(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("trainer.sample_images.draw_attention_maps", fail)
    monkeypatch.setattr("trainer.sample_images.find_spec", lambda name: name)
    found, model = sample_images(), shrunken("stvit_small", num_classes=4).train()
    list(found.keep([batch(0, 4)], 4))
    found.draw(model, OFF, 2, 20)
    assert "cannot be drawn (OutOfMemoryError: CUDA out of memory)" in found.log.lines[0]
    assert model.training


def test_run_writes_sample_images_to_its_directory_and_tensorboard(small_cfg, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_here(small_cfg, tmp_path, "TRAIN.EPOCHS", 1, "LOG.TENSORBOARD", True) == 0
    run = tmp_path / "small"
    assert [str(path.relative_to(run)) for path in (run / "pictures").rglob("*.png")] == ["pictures/first_batch.png"]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (shown,) = events.Images("pictures/first_batch")
    with Image.open(run / "pictures" / "first_batch.png") as kept:
        assert (shown.width, shown.height) == kept.size
    (text,) = events.Tensors("config/text_summary")
    config = json.loads(text.tensor_proto.string_val[0])
    assert config["MODEL"]["NAME"] == "test_efficientnet"


def test_sample_images_can_be_turned_off(small_cfg, tmp_path):
    assert run_here(small_cfg, tmp_path, "TRAIN.EPOCHS", 1, "LOG.PICTURES_EVERY", 0) == 0
    assert not (tmp_path / "small" / "pictures").exists()


def test_log_on_other_processes_writes_no_pictures(tmp_path):
    log = Log(main=False)
    log.open(tmp_path, 0, tensorboard=False)
    log.picture("first_batch", Image.new("RGB", (4, 4)), 0)
    assert not list(tmp_path.iterdir())
