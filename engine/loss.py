"""Training loss: cross entropy to soft targets, and distillation from a teacher as in DeiT (Touvron et al. 2021, section 4)."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

Criterion = Callable[[Any, Tensor, Tensor], Tensor]  # (model outputs, soft targets (B, classes), images) -> loss


def make_criterion(teacher: "Teacher | None", kind: str, alpha: float, tau: float) -> Criterion:
    """Return the soft-target cross entropy, combined with distillation if there is a teacher; the rest as in DistillationLoss."""
    base = SoftTargetCrossEntropy()
    if teacher is None:
        return lambda outputs, targets, images: base(outputs, targets)
    return DistillationLoss(base, teacher, kind, alpha, tau)


class Teacher(nn.Module):
    """A frozen trained model, always in evaluation mode, with conversion of the student's images to its own input format.

    Images arrive normalised by `mean` and `std` and are renormalised to the model's `own_mean` and `own_std`; images of
    another size than `own_size` (height, width) are resized to it, None accepts every size.
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
        """Return the logits of the student's images (B, 3, H, W), which are mixed and erased."""
        if self.renormalises:
            images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        if self.own_size and images.shape[-2:] != self.own_size:
            images = F.interpolate(images, self.own_size, mode="bicubic", antialias=True)
        return self.model(images)

    def describe(self) -> str:
        """Describe the conversion of the images."""
        size = f"of {self.own_size[0]} x {self.own_size[1]} pixels" if self.own_size else "of any size"
        return (
            f"it takes images {size}, {'normalised in its own way' if self.renormalises else 'normalised as they are'}"
        )

    @cached_property
    def digest(self) -> str:
        """Return a hash of the weights and buffers, which identifies the teacher."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


class DistillationLoss(nn.Module):
    """(1 - alpha) times the loss on the targets plus alpha times the distance from the teacher, `kind` soft or hard.

    Both terms use the logits of a student with one head. A student with a distillation token returns a pair of logits: the
    first is compared with the targets, the second with the teacher.
    """

    def __init__(self, base: nn.Module, teacher: Teacher, kind: str, alpha: float, tau: float):
        super().__init__()
        self.base, self.teacher, self.kind, self.alpha, self.tau = base, teacher, kind, alpha, tau

    def forward(self, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, images: Tensor) -> Tensor:
        """Return the loss of the student's outputs for soft targets (B, classes) and the images they were computed from."""
        on_targets, on_teacher = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        logits = self.teacher(images)
        distance = (
            soft_distance(on_teacher, logits, self.tau) if self.kind == "soft" else hard_distance(on_teacher, logits)
        )
        return (1 - self.alpha) * self.base(on_targets, targets) + self.alpha * distance


def soft_distance(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Return tau^2 times the Kullback-Leibler divergence from the teacher's distribution at temperature tau.

    It is the mean over images and classes, as in DeiT's code, not the sum over classes.
    """
    log_p_student, log_p_teacher = (F.log_softmax(_float32(logits) / tau, dim=1) for logits in (student, teacher))
    divergence = F.kl_div(log_p_student, log_p_teacher, reduction="sum", log_target=True)
    return divergence * tau**2 / log_p_student.numel()


def hard_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross entropy to the teacher's most probable class."""
    return F.cross_entropy(_float32(student), teacher.argmax(dim=1))


def _float32(logits: Tensor) -> Tensor:
    """Return half-precision logits in float32, others unchanged."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
