"""Distillation as in DeiT (Touvron et al. 2021, section 4): what a trained model answers is a second target."""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Teacher(nn.Module):
    """A trained model that only answers: frozen, in evaluation mode whatever it is told, shown images as it knows them.

    Images come normalised by `mean` and `std` and are turned to the model's own; those of another size than `own_size`
    (height, width) are resized to it, None takes every size.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        own_mean: Sequence[float],
        own_std: Sequence[float],
        own_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.own_size = own_size
        self.renormalises = (*mean, *std) != (*own_mean, *own_std)
        before, after = (torch.tensor([m, s], dtype=torch.float64) for m, s in ((mean, std), (own_mean, own_std)))
        device = next((p.device for p in model.parameters()), None)
        scale, shift = before[1] / after[1], (before[0] - after[0]) / after[1]  # (3,)
        self.scale, self.shift = (t.view(1, -1, 1, 1).to(device) for t in (scale, shift))

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images (B, 3, H, W) as the student sees them, mixed and erased."""
        if self.renormalises:
            images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        if self.own_size and images.shape[-2:] != self.own_size:
            images = F.interpolate(images, self.own_size, mode="bicubic", antialias=True)
        return self.model(images)

    def describe(self) -> str:
        """Say what is done to the images."""
        size = f"of {self.own_size[0]} x {self.own_size[1]} pixels" if self.own_size else "of any size"
        return (
            f"it takes images {size}, {'normalised in its own way' if self.renormalises else 'normalised as they are'}"
        )

    @cached_property
    def digest(self) -> str:
        """A hash of the weights and statistics, which tells one teacher from another."""
        found = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()[:16]


class DistillationLoss(nn.Module):
    """(1 - alpha) times the loss on the targets plus alpha times the distance from the teacher, soft or hard.

    A student with one head has both on its logits. The outputs of a student with a distillation token are a pair: the
    first takes the targets, the second the teacher.
    """

    def __init__(self, base: nn.Module, teacher: Teacher, kind: str, alpha: float, tau: float):
        super().__init__()
        self.base, self.teacher, self.kind, self.alpha, self.tau = base, teacher, kind, alpha, tau

    def forward(self, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, images: Tensor) -> Tensor:
        """Return the loss of the student's outputs for soft targets (B, classes) and the images they answer to."""
        on_targets, on_teacher = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        taught = self.teacher(images)
        distance = (
            soft_distance(on_teacher, taught, self.tau) if self.kind == "soft" else hard_distance(on_teacher, taught)
        )
        return (1 - self.alpha) * self.base(on_targets, targets) + self.alpha * distance


def soft_distance(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Return tau^2 times the Kullback-Leibler divergence from the teacher's distribution at temperature tau.

    It is the mean over images and classes, as in DeiT's code, not the sum over classes.
    """
    mine, theirs = (F.log_softmax(_wide(logits) / tau, dim=1) for logits in (student, teacher))
    return F.kl_div(mine, theirs, reduction="sum", log_target=True) * tau**2 / mine.numel()


def hard_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross entropy to the teacher's most probable class."""
    return F.cross_entropy(_wide(student), teacher.argmax(dim=1))


def _wide(logits: Tensor) -> Tensor:
    """Return half-precision logits in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
