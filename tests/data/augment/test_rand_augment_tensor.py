"""RandAugment on tensors: Pillow's pixels to the bit for every operation and level, one at a time and by groups."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.rng import keyed_generator
from data.augment.rand_augment import INCREASING_OPS, PUBLISHED_OPS, Op, apply, argument, draw, parse_policy
from data.augment.rand_augment_tensor import RandAugment, augment, pack
from tests.helpers.data_doubles import picture

FILL = (124, 116, 104)
SIZE = 40
NAMES = sorted({*INCREASING_OPS, *PUBLISHED_OPS})
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def pictures(size):
    """A photograph, noise, one colour, two colours, a ramp."""
    rng = np.random.RandomState(0)
    ramp = np.broadcast_to(np.arange(size)[:, None, None] * 5 % 256, (size, size, 3)).astype(np.uint8)
    noise = rng.randint(0, 256, (size, size, 3), dtype=np.uint8)
    flat, two = np.full_like(noise, 255), rng.randint(0, 2, noise.shape).astype(np.uint8) * 17 + 3
    return [np.asarray(picture(rng, size, size)), noise, flat, two, ramp]


def tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def by_pillow(image, ops):
    pillow = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    return tensor(apply(pillow, ops, FILL))


def all_levels(name):
    """Every operation that a level can give, whole levels and two between them."""
    modes = ("bilinear", "bicubic") if name in GEOMETRIC else ("bicubic",)
    levels = [*range(11), 4.321, 9.37]
    return [Op(name, argument(name, level, negate), mode) for level in levels for negate in (0, 1) for mode in modes]


@pytest.mark.parametrize("name", NAMES)
def test_augmented_image_is_pillows(name):
    for image in map(tensor, pictures(SIZE)):
        for op in all_levels(name):
            assert torch.equal(augment(image, [op], FILL), by_pillow(image, [op])), op


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_augmented_groups_are_pillows(name, device):
    ops = all_levels(name)
    for image in map(tensor, pictures(SIZE)):
        batch = image.expand(len(ops), -1, -1, -1).to(device)
        found = RandAugment(FILL, device).grouped(batch, [[op] for op in ops]).cpu()
        for got, op in zip(found, ops, strict=True):
            assert torch.equal(got, by_pillow(image, [op])), op


@pytest.mark.parametrize("degrees", [90.0, -90.0, 180.0, 360.0])
def test_augmented_right_angles_are_pillows(degrees):
    for image in map(tensor, pictures(SIZE)):
        op = Op("Rotate", degrees, "bicubic")
        found = RandAugment(FILL).grouped(image.unsqueeze(0), [[op]])[0]
        assert torch.equal(found, by_pillow(image, [op]))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 18, 97])
def test_augmented_small_and_odd_sizes_are_pillows(size):
    """Where pixels are few, equalize runs out of levels and interpolation out of neighbours."""
    for image in map(tensor, pictures(size)):
        ops = [
            Op(name, argument(name, 9.0, size % 2 > 0), "bicubic") for name in NAMES if size > 2 or name[:5] != "Sharp"
        ]
        grouped = RandAugment(FILL).grouped(image.expand(len(ops), -1, -1, -1), [[op] for op in ops])
        for got, op in zip(grouped, ops, strict=True):
            wanted = by_pillow(image, [op])
            assert torch.equal(got, wanted), op
            assert torch.equal(augment(image, [op], FILL), wanted), op


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8", "rand-m10-n2-p1-inc1"])
def test_augmented_batch_of_a_policy_is_pillows(policy, interpolation, device):
    rng = np.random.RandomState(3)
    images = torch.stack([tensor(picture(rng, 64, 64)) for _ in range(24)])
    policy = parse_policy(policy)
    ops = [draw(policy, keyed_generator(0, "augment", 0, row), interpolation) for row in range(len(images))]
    wanted = torch.stack([by_pillow(image, own) for image, own in zip(images, ops, strict=True)])
    given = images.to(device)
    run = RandAugment(FILL, device)
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = given.to(memory_format=layout)
        for found in (run(laid, ops), run.grouped(laid, ops)):
            assert torch.equal(found.cpu(), wanted)
            assert found.device == laid.device
        assert torch.equal(laid.cpu(), images)
    assert (wanted != images).flatten(1).any(1).sum() > 10


def test_augment_without_operations_changes_nothing():
    images = torch.stack([tensor(image) for image in pictures(8)])
    run = RandAugment(FILL)
    for found in (run(images, [()] * 5), run.grouped(images, [()] * 5)):
        assert torch.equal(found, images)


def test_augment_packs_few_groups():
    """One pass for each kind in a layer: the look-ups together, two filters, three directions in each resampling."""
    policy = parse_policy("rand-m9-mstd0.5-inc1-n2")
    packed = pack([draw(policy, keyed_generator(0, "augment", 0, row), "random") for row in range(256)], 224)
    assert len({group.kind for group in packed.groups}) == 1 + 2 + 6
    assert len(packed.groups) <= 2 * 9
    assert packed.numbers.shape == (len(packed.images), 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_augment_waits_for_nothing_on_a_gpu():
    policy = parse_policy("rand-m9-mstd0.5-inc1")
    ops = [draw(policy, keyed_generator(0, "augment", 0, row), "random") for row in range(64)]
    images, run = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, device="cuda"), RandAugment(FILL, "cuda")
    run(images, ops)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(images, ops)
    finally:
        torch.cuda.set_sync_debug_mode("default")
