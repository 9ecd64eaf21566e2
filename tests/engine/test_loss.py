"""Distillation: DeiT's formulas, input and state of the teacher, checks of its config and file."""

import math
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import config
import models  # noqa: F401  registers the families
from engine.build import build_loop, wrap_teacher
from engine.distributed.processes import Processes
from engine.loss import DistillationLoss, Teacher, hard_distance, soft_distance
from engine.precision import Precision
from models.build import build_teacher
from tests.helpers.small_models import SMALLEST, images, scrambled, shrunken
from tests.helpers.teachers import store

CPU = torch.device("cpu")
ALONE = Processes(0, 1, 0, CPU, "test")
HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLASSES = ["class 0", "class 1", "class 2"]


def logits(seed, *shape):
    return 3 * images(*shape, seed=seed, dtype=torch.float64)


def softmax(row, tau):
    exponents = [math.exp(v / tau) for v in row]
    return [e / sum(exponents) for e in exponents]


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distance_is_deits_formula(tau):
    student, teacher = logits(1, 4, 5), logits(2, 4, 5)
    total = 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(theirs, tau), softmax(mine, tau)
        total += sum(pi * (math.log(pi) - math.log(qi)) for pi, qi in zip(p, q, strict=True))
    assert soft_distance(student, teacher, tau).item() == pytest.approx(total * tau**2 / 20, rel=1e-12)
    assert soft_distance(teacher, teacher, tau) == 0


def test_hard_distance_is_cross_entropy_to_the_teachers_choice():
    student, teacher = logits(1, 4, 5), logits(2, 4, 5)
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    want = sum(-math.log(softmax(mine, 1)[max(range(5), key=theirs.__getitem__)]) for mine, theirs in rows) / 4
    assert hard_distance(student, teacher).item() == pytest.approx(want, rel=1e-12)


def linear(seed, size=4, classes=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes)).double()


def teacher_of(model, own=IMAGENET, size=None):
    return Teacher(model, *IMAGENET, *own, size)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_loss_weighs_targets_and_teacher(kind):
    model, x, targets = linear(0), images(4, 3, 4, 4, dtype=torch.float64), logits(3, 4, 5).softmax(1)
    outputs = logits(1, 4, 5).requires_grad_()
    loss = DistillationLoss(SoftTargetCrossEntropy(), teacher_of(model), kind, 0.3, 2.0)(outputs, targets, x)
    base = -(targets * outputs.log_softmax(1)).sum(1).mean()
    distance = {"soft": lambda: soft_distance(outputs, model(x), 2.0), "hard": lambda: hard_distance(outputs, model(x))}
    torch.testing.assert_close(loss, 0.7 * base + 0.3 * distance[kind]())
    loss.backward()
    assert outputs.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_logits_are_compared_in_float32():
    student, teacher = logits(1, 4, 5).bfloat16(), logits(2, 4, 5).bfloat16()
    assert soft_distance(student, teacher, 1.0).dtype == torch.float32
    assert torch.equal(soft_distance(student, teacher, 1.0), soft_distance(student.float(), teacher.float(), 1.0))


def test_teacher_stays_in_evaluation_mode_and_unchanged():
    model = timm.create_model("test_efficientnet", num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = teacher_of(model)
    criterion = DistillationLoss(SoftTargetCrossEntropy(), teacher, "soft", 0.5, 1.0).train()
    assert not any(m.training for m in teacher.modules())
    student = nn.Parameter(images(4, 3))
    criterion(student, torch.eye(3)[[0, 1, 2, 0]], images(4, 3, 32, 32)).backward()
    assert student.grad is not None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not teacher(images(4, 3, 32, 32).requires_grad_()).requires_grad


class Recorder(nn.Module):
    def forward(self, x):
        self.seen = x
        return x.mean((2, 3))


def test_teacher_sees_the_images_in_its_own_normalisation():
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in IMAGENET)
    x = (pixels - mean) / std
    recorder = Recorder()
    teacher_of(recorder, (HALF, HALF))(x)
    torch.testing.assert_close(recorder.seen, (pixels - 0.5) / 0.5)
    teacher_of(recorder)(x)
    assert recorder.seen is x


def test_teacher_of_one_size_gets_resized_images():
    x, recorder = images(2, 3, 8, 8), Recorder()
    teacher_of(recorder, size=(6, 4))(x)
    assert torch.equal(recorder.seen, F.interpolate(x, (6, 4), mode="bicubic", antialias=True))
    teacher_of(recorder, size=(8, 8))(x)
    assert recorder.seen is x


def test_second_output_of_a_student_takes_the_teacher():
    model, x, targets = linear(0), images(4, 3, 4, 4, dtype=torch.float64), logits(3, 4, 5).softmax(1)
    first, second = logits(1, 4, 5), logits(2, 4, 5)
    loss = DistillationLoss(SoftTargetCrossEntropy(), teacher_of(model), "hard", 0.25, 1.0)((first, second), targets, x)
    want = 0.75 * SoftTargetCrossEntropy()(first, targets) + 0.25 * hard_distance(second, model(x))
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("name", SMALLEST)
def test_gradient_of_every_family_is_that_of_the_formula(name, kind):
    model, x, targets = linear(0, 32, 10), images(2, 3, 32, 32, dtype=torch.float64), torch.eye(10).double()[:2]
    student = scrambled(shrunken(name)).double().eval()
    gradients = []
    for alpha in (0.0, 1.0, 0.5):
        loss = DistillationLoss(SoftTargetCrossEntropy(), teacher_of(model), kind, alpha, 1.0)(student(x), targets, x)
        gradients.append(torch.autograd.grad(loss, list(student.parameters())))
    for base, distance, both in zip(*gradients, strict=True):
        torch.testing.assert_close(both, (base + distance) / 2)
    assert sum(g.abs().sum() for g in gradients[1]) > 0


def test_student_with_a_distillation_token_returns_both_outputs_in_training_only():
    student = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32, depth=1, embed_dim=24)
    cfg = config.load(
        (), ["TRAIN.AMP", "off", "DISTILL.TYPE", "hard", "DISTILL.TEACHER", "x", "DISTILL.TEACHER_WEIGHTS", "y"]
    )
    arguments = (cfg, student, lambda *batch: batch, Precision("off", CPU), ALONE)
    targets, x = torch.eye(3)[:2], images(2, 3, 32, 32)
    build_loop(*arguments)
    assert torch.is_tensor(student(x))
    loop = build_loop(*arguments, teacher_of(linear(0, 32, 3).float()))
    first, second = student(x)
    loop.criterion((first, second), targets, x).backward()
    assert student.head.weight.grad.abs().sum() > 0
    assert student.head_dist.weight.grad.abs().sum() > 0
    torch.testing.assert_close(student.eval()(x), (first + second) / 2)


# From a config to a teacher.


def cfg_for(path, teacher="test_efficientnet", *more):
    opts = [
        "DATA.IMG_SIZE",
        32,
        "DISTILL.TYPE",
        "soft",
        "DISTILL.TEACHER",
        teacher,
        "DISTILL.TEACHER_WEIGHTS",
        path,
        *more,
    ]
    return config.load((), [str(o) for o in opts])


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", *SMALLEST])
def test_any_model_teaches_from_a_file(tmp_path, name):
    stored = store(tmp_path / "t.pt", name)
    cfg = cfg_for(tmp_path / "t.pt", name)
    model, description = build_teacher(cfg, CLASSES)
    teacher, x = wrap_teacher(cfg, model, ALONE), images(2, 3, 32, 32)
    assert "t.pt" in description
    seen = x
    if name == "test_vit":  # 160 pixels, normalised to -1..1
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
        seen = F.interpolate((x * std + mean - 0.5) / 0.5, (160, 160), mode="bicubic", antialias=True)
        assert "160 x 160" in teacher.describe()
    torch.testing.assert_close(teacher(x), stored(seen), rtol=1e-4, atol=1e-4)


def test_file_of_a_run_gives_size_and_normalisation_of_the_teacher(tmp_path):
    metadata = {"mean": [0.4, 0.5, 0.6], "std": HALF, "img_size": 48, "classes": CLASSES, "model": "test_vit"}
    stored = store(tmp_path / "t.safetensors", "test_vit", metadata, img_size=48)
    cfg = cfg_for(tmp_path / "t.safetensors", "test_vit", "DATA.MEAN", "[0.4, 0.5, 0.6]", "DATA.STD", list(HALF))
    model, _ = build_teacher(cfg, CLASSES)
    teacher, x = wrap_teacher(cfg, model, ALONE), images(2, 3, 48, 48)
    assert not teacher.renormalises
    assert teacher.own_size == (48, 48)
    # The teacher's convolutions may take another memory format, and so another order of sums; a wrong size or normalisation
    # would change the images by more than 0.1.
    torch.testing.assert_close(teacher(x), stored(x), rtol=1e-4, atol=1e-4)


def test_teacher_construction_leaves_random_generators_unchanged(tmp_path):
    store(tmp_path / "t.pt")
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    build_teacher(cfg_for(tmp_path / "t.pt"), CLASSES)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_digest_differs_between_teachers(tmp_path):
    digests = {teacher_of(store(tmp_path / "t.pt", seed=seed)).digest for seed in (0, 0, 1)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        ({"TEACHER": "resnet18"}, ["DISTILL.TEACHER='resnet18'", "DISTILL.TYPE", "soft or hard"]),
        ({"TEACHER_WEIGHTS": "a.pt"}, ["DISTILL.TEACHER_WEIGHTS='a.pt'", "DISTILL.TYPE"]),
        ({"TYPE": "soft"}, ["DISTILL.TYPE=soft", "DISTILL.TEACHER,"]),
        ({"TYPE": "hard", "TEACHER": "resnet18"}, ["DISTILL.TEACHER_WEIGHTS", "teach nothing", "pretrained"]),
        ({"TYPE": "sof"}, ["did you mean soft"]),
        ({"ALPHA": 1.5}, ["DISTILL.ALPHA", "between 0 and 1"]),
        ({"TAU": 0}, ["DISTILL.TAU"]),
        ({"TYPE": "hard", "TEACHER": "a", "TEACHER_WEIGHTS": "b", "TAU": 2}, ["DISTILL.TAU=2", "no effect"]),
    ],
)
def test_wrong_settings_are_refused(opts, parts):
    with pytest.raises(ValueError, match="DISTILL") as caught:
        config.load((), [str(v) for key, value in opts.items() for v in (f"DISTILL.{key}", value)])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("teacher", "source", "parts"),
    [
        ("test_eficientnet", "t.pt", ["DISTILL.TEACHER='test_eficientnet'", "test_efficientnet"]),
        ("test_efficientnet", "nothing.pt", ["DISTILL.TEACHER_WEIGHTS", "nothing.pt"]),
        ("resnet18", "t.pt", ["t.pt does not fit ResNet", "DISTILL.TEACHER is resnet18"]),
        ("test_efficientnet", "ten.pt", ["ten.pt knows 10 classes, the data has 3", "MODEL.NUM_CLASSES"]),
        ("test_efficientnet", "order.safetensors", ["another order", "class 1 first", "DATA.CLASS_INDEX"]),
        ("test_efficientnet", "pretrained", ["1000 classes, the data has 3", "MODEL.NUM_CLASSES"]),
    ],
)
def test_unsuitable_teachers_are_refused(tmp_path, teacher, source, parts):
    store(tmp_path / "t.pt")
    store(tmp_path / "ten.pt", num_classes=10)
    store(tmp_path / "order.safetensors", metadata={"classes": CLASSES[1:] + CLASSES[:1]})
    path = source if source == "pretrained" else tmp_path / source
    with pytest.raises(ValueError, match="DISTILL") as caught:
        build_teacher(cfg_for(path, teacher), CLASSES)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_pretrained_weights_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"TEACHER_WEIGHTS=pretrained: stvit_small has none.*name a file"):
        build_teacher(cfg_for("pretrained", "stvit_small"), [str(i) for i in range(1000)])


def test_teacher_of_other_classes_is_reported(tmp_path):
    store(tmp_path / "t.safetensors", metadata={"classes": ["cat", "dog", "owl"]})
    assert "other classes" in build_teacher(cfg_for(tmp_path / "t.safetensors"), CLASSES)[1]
