"""RandAugment on tensors: Pillow's pixels bit for bit for every operation and level, in both forms."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.pillow_rand_augment import apply
from common.rng import keyed_generator
from data.augment.op_groups import pack
from data.augment.rand_augment import RandAugment, augment
from data.augment.rand_augment_policy import INCREASING_OPS, PUBLISHED_OPS, Op, argument, draw_ops, parse_policy
from tests.helpers.data_doubles import picture

FILL = (124, 116, 104)
SIZE = 40
NAMES = sorted({*INCREASING_OPS, *PUBLISHED_OPS})
AFFINE = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def pictures(size):
    """Return square images: smooth colours with grain, noise, one colour, two colours, a ramp."""
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
    """Return the operation at whole levels and two between them, in both directions and resamplings."""
    modes = ("bilinear", "bicubic") if name in AFFINE else ("bicubic",)
    levels = [*range(11), 4.321, 9.37]
    return [Op(name, argument(name, level, negate), mode) for level in levels for negate in (0, 1) for mode in modes]


def one_by_one(image, ops):
    """Run each operation on the image alone."""
    return [augment(image, [op], FILL) for op in ops]


def grouped(image, ops, device="cpu"):
    """Run each operation on a copy of the image, in one batch."""
    batch = image.expand(len(ops), -1, -1, -1).to(device)
    return RandAugment(FILL, device).grouped(batch, [[op] for op in ops]).cpu()


def grouped_on_gpu(image, ops):
    return grouped(image, ops, "cuda")


FORMS = [one_by_one, grouped, pytest.param(grouped_on_gpu, marks=GPU)]


def assert_pillows_pixels(form, image, ops):
    for found, op in zip(form(image, ops), ops, strict=True):
        assert torch.equal(found, by_pillow(image, [op])), op


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_operation_has_pillows_pixels(name, form):
    for image in map(tensor, pictures(SIZE)):
        assert_pillows_pixels(form, image, all_levels(name))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("degrees", [90.0, -90.0, 180.0, 360.0])
def test_right_angles_have_pillows_pixels(degrees, form):
    for image in map(tensor, pictures(SIZE)):
        assert_pillows_pixels(form, image, [Op("Rotate", degrees, "bicubic")])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 3, 16, 18, 97])
def test_small_and_odd_sizes_have_pillows_pixels(size, form):
    """Images of few pixels: equalize has fewer levels, interpolation fewer neighbours."""
    names = [name for name in NAMES if size > 2 or name[:5] != "Sharp"]
    for image in map(tensor, pictures(size)):
        assert_pillows_pixels(form, image, [Op(name, argument(name, 9.0, size % 2 > 0), "bicubic") for name in names])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8", "rand-m10-n2-p1-inc1"])
def test_batch_of_a_policy_has_pillows_pixels(policy, interpolation, device):
    rng = np.random.RandomState(3)
    images = torch.stack([tensor(picture(rng, 64, 64)) for _ in range(24)])
    policy = parse_policy(policy)
    ops = [draw_ops(policy, keyed_generator(0, "augment", 0, row), interpolation) for row in range(len(images))]
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


def test_no_operations_change_nothing():
    images = torch.stack([tensor(image) for image in pictures(8)])
    run = RandAugment(FILL)
    for found in (run(images, [()] * 5), run.grouped(images, [()] * 5)):
        assert torch.equal(found, images)


def test_operations_are_packed_into_few_groups():
    """A layer has at most 9 groups: all look-ups, two filters, three combinations of axes in each resampling."""
    policy = parse_policy("rand-m9-mstd0.5-inc1-n2")
    packed = pack([draw_ops(policy, keyed_generator(0, "augment", 0, row), "random") for row in range(256)], 224)
    assert len({group.kind for group in packed.groups}) == 1 + 2 + 6
    assert len(packed.groups) <= 2 * 9
    assert packed.numbers.shape == (len(packed.images), 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_synchronises_with_a_gpu():
    policy = parse_policy("rand-m9-mstd0.5-inc1")
    ops = [draw_ops(policy, keyed_generator(0, "augment", 0, row), "random") for row in range(64)]
    images, run = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, device="cuda"), RandAugment(FILL, "cuda")
    run(images, ops)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(images, ops)
    finally:
        torch.cuda.set_sync_debug_mode("default")
