"""The device stage: normalised, erased and mixed in the order asked for, by the micro-batch's address alone."""

from dataclasses import replace

import numpy as np
import pytest
import timm.data.random_erasing as timm_erasing
import torch

import config
from common.rng import keyed_generator, keyed_torch_seed
from data.augment.device_stage import DeviceStage
from data.augment.mixup import Mixup, mix_images
from data.augment.random_erasing import RandomErasing, _erase_masked, erase
from data.loaders.batch import Batch
from tests.helpers.data_doubles import TimmRandom

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES, SIZE = 5, 32
OFF = Mixup(CLASSES, mixup=0, cutmix=0, smoothing=0)


def batch(count=8, boxes=(4, 6, 10, 12), slots=1):
    rng = np.random.RandomState(0)
    erased = torch.zeros(count, slots, 4, dtype=torch.int64)
    if boxes:
        erased[::2, 0] = torch.tensor(boxes)
    images = torch.from_numpy(rng.randint(0, 256, size=(count, 3, SIZE, SIZE), dtype=np.uint8))
    return Batch(images, torch.arange(count) % CLASSES, torch.arange(count), erased)


def stage(mixing=OFF, **options):
    return DeviceStage(mixing, MEAN, STD, seed=3, **options)


def normalised(images):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def test_evaluation_normalises_and_keeps_labels():
    given = batch()
    images, labels = stage().evaluate(given)
    assert torch.allclose(images, normalised(given.images), atol=2e-6)
    assert torch.equal(labels, given.labels)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_training_without_mixing_normalises_and_erases_the_boxes_only():
    given = batch()
    before = given.images.clone()
    images, targets = stage().train(given, update=2, micro=1, epoch=0)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(given.images, before)
    assert torch.equal(targets, torch.nn.functional.one_hot(given.labels, CLASSES).float())
    inside = torch.zeros(8, 1, SIZE, SIZE, dtype=torch.bool)
    inside[::2, :, 4:14, 6:18] = True
    changed = (images - normalised(given.images)).abs() > 1e-5
    assert torch.equal(changed, inside.expand_as(changed))


def test_erased_pixels_are_standard_normal():
    boxes = torch.tensor([2, 3, 28, 27]).expand(64, 1, 4)
    filled = erase(torch.full((64, 3, SIZE, SIZE), 9.0), boxes, "pixel", torch.Generator().manual_seed(0))
    noise = filled[:, :, 2:30, 3:30]
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert len(noise.unique()) > 0.95 * noise.numel()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_erase_modes_fill_boxes_with_zero_or_one_colour_each(layout):
    images = torch.full((3, 3, SIZE, SIZE), 9.0).to(memory_format=layout)
    boxes = torch.tensor([[0, 0, 5, 6], [20, 20, 4, 4]]).repeat(3, 1, 1)
    constant = erase(images.clone(), boxes, "const", torch.Generator())
    assert (constant[:, :, :5, :6] == 0).all()
    coloured = erase(images, boxes, "rand", torch.Generator().manual_seed(1))
    for top, left, height, width in boxes[0].tolist():
        colours = coloured[:, :, top : top + height, left : left + width]
        assert torch.equal(colours, colours[:, :, :1, :1].expand_as(colours))
    assert len(torch.cat([coloured[:, :, 0, 0], coloured[:, :, 20, 20]]).unique()) == 18
    for filled in (constant, coloured):
        assert (filled[:, :, 5:20] == 9).all()
        assert filled.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("prob", "count", "size"), [(1.0, 1, 224), (0.25, 1, 64), (1.0, 3, 96), (1.0, 1, 8)])
def test_boxes_are_timms_for_the_same_random_numbers(monkeypatch, prob, count, size):
    ours = RandomErasing(prob, count)
    timms = timm_erasing.RandomErasing(prob, mode="const", max_count=count, device="cpu")
    erased = 0
    for position in range(80):
        boxes = ours.draw(keyed_generator(0, "augment", 0, position), size)
        found = erase(torch.ones(1, 3, size, size), torch.from_numpy(boxes)[None], "const", torch.Generator())
        with monkeypatch.context() as patch:
            patch.setattr(timm_erasing, "random", TimmRandom(keyed_generator(0, "augment", 0, position)))
            wanted = timms(torch.ones(1, 3, size, size))
        assert torch.equal(found, wanted)
        erased += (wanted == 0).any().item()
    assert erased == 80 if prob == 1 else 0 < erased < 40


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("given", [[(0, 0, 5, 6), (20, 20, 4, 4)], [(3, 3, 9, 2), (4, 2, 3, 9)], [(0, 0, 0, 0)] * 2])
def test_erasing_by_box_equals_erasing_by_mask(mode, given):
    boxes = torch.tensor([given, given[::-1], [(0, 0, 0, 0), given[0]]])
    images = torch.full((3, SIZE, SIZE, 3), 9.0).permute(0, 3, 1, 2)
    by_box = erase(images.clone(), boxes, mode, torch.Generator().manual_seed(5))
    by_mask = _erase_masked(images.clone(), boxes, mode, torch.Generator().manual_seed(5))
    assert torch.equal(by_box, by_mask)
    assert by_box.is_contiguous(memory_format=torch.channels_last)
    assert by_mask.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("order", ["erase_then_mix", "mix_then_erase"])
def test_memory_of_the_loaders_images_changes_nothing(order):
    given, mixing = batch(), Mixup(CLASSES)
    pixels = given.images.to(memory_format=torch.channels_last)  # as DALI makes them
    for update in range(4):
        wanted = stage(mixing, order=order).train(given, update, 0, 0)[0]
        found = stage(mixing, order=order).train(replace(given, images=pixels), update, 0, 0)[0]
        assert torch.equal(found, wanted)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("order", ["erase_then_mix", "mix_then_erase"])
def test_stage_equals_the_steps_written_out(order):
    given, mixing = batch(slots=2), Mixup(CLASSES)
    for update in range(6):
        mix = mixing.draw(keyed_generator(3, "mix", 1, update, 2), SIZE)
        mean, std = (torch.tensor([255.0 * v for v in values]).view(1, 3, 1, 1) for values in (MEAN, STD))
        images = given.images.float()
        if order == "mix_then_erase":
            images = mix_images(images, mix).round()
        images = (images - mean) / std
        noise = torch.Generator().manual_seed(keyed_torch_seed(3, "erase", 1, update, 2))
        noise = torch.randn(8, SIZE, SIZE, 3, generator=noise).permute(0, 3, 1, 2)
        inside = torch.zeros(8, 1, SIZE, SIZE, dtype=torch.bool)
        inside[::2, :, 4:14, 6:18] = True
        images = torch.where(inside, noise, images)
        if order == "erase_then_mix":
            images = mix_images(images, mix)
        assert torch.equal(stage(mixing, order=order).train(given, update, 2, 1)[0], images)


def test_switched_off_erasing_has_no_boxes():
    assert RandomErasing(prob=0.0, count=3).draw(keyed_generator(0, "augment", 0, 0), 32).shape == (0, 4)
    given = batch(boxes=None, slots=0)
    assert torch.allclose(stage().train(given, 0, 0, 0)[0], normalised(given.images), atol=2e-6)


def test_erase_then_mix_mixes_the_noise():
    given, mixing = batch(), Mixup(CLASSES, cutmix=0)
    erased, _ = stage().train(given, 4, 1, 2)
    mix = mixing.draw(keyed_generator(3, "mix", 2, 4, 1), SIZE)
    images, targets = stage(mixing).train(given, 4, 1, 2)
    assert torch.equal(images, mix_images(erased.clone(), mix))
    assert torch.equal(targets, mixing.targets(given.labels, mix.share))


def test_mix_then_erase_leaves_the_noise_alone_and_rounds_the_mixture():
    given, mixing = batch(), Mixup(CLASSES, cutmix=0)
    mix = mixing.draw(keyed_generator(3, "mix", 2, 4, 1), SIZE)
    noise, _ = stage().train(given, 4, 1, 2)
    images, targets = stage(mixing, order="mix_then_erase").train(given, 4, 1, 2)
    assert torch.equal(images[::2, :, 4:14, 6:18], noise[::2, :, 4:14, 6:18])
    mixture = mix_images(given.images.float(), mix).round()  # timm's FastCollateMixup stores it in uint8
    assert torch.allclose(images[1::2], normalised(mixture)[1::2], atol=2e-6)
    assert torch.equal(targets, mixing.targets(given.labels, mix.share))


@pytest.mark.parametrize("order", ["erase_then_mix", "mix_then_erase"])
def test_the_address_decides_everything(order):
    given, mixing = batch(), Mixup(CLASSES)
    first = stage(mixing, order=order)
    wanted = first.train(given, 7, 1, 2)
    other = stage(mixing, order=order)
    state = torch.get_rng_state()
    for address in [(6, 1, 2), (7, 0, 2), (7, 1, 1)]:
        differs = other.train(given, *address)
        assert not torch.equal(differs[0], wanted[0])
    again = other.train(given, 7, 1, 2)
    assert torch.equal(again[0], wanted[0])
    assert torch.equal(again[1], wanted[1])
    assert torch.equal(torch.get_rng_state(), state)  # torch's own stream belongs to the model
    reseeded = DeviceStage(mixing, MEAN, STD, seed=4, order=order)
    assert not torch.equal(reseeded.train(given, 7, 1, 2)[0], wanted[0])


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"AUG\.ERASE_MODE must be one of pixel, rand, const, got 'noise'"):
        config.load(opts=["AUG.ERASE_MODE", "noise"])
    with pytest.raises(ValueError, match=r"AUG\.ORDER must be one of erase_then_mix, mix_then_erase, got 'mix'"):
        config.load(opts=["AUG.ORDER", "mix"])


def test_batch_moves_as_a_whole():
    moved = batch().to("meta")
    assert {t.device.type for t in (moved.images, moved.labels, moved.indices, moved.erase)} == {"meta"}
    assert len(moved) == 8
    assert Batch(moved.images, moved.labels, moved.indices).to("meta").erase is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    on_device = stage(Mixup(CLASSES), device="cuda")
    given = batch().pin_memory().to("cuda", non_blocking=True)
    on_device.train(given, 0, 0, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for update in range(8):
            on_device.train(given, update, 0, 0)
        on_device.evaluate(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
