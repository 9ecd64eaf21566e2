"""Top-1 and top-5 accuracy from exact counts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TopKCounts:
    """Numbers of correct predictions and of evaluated images; accuracies in percent."""

    correct1: int
    correct5: int
    images: int

    @property
    def top1(self) -> float:
        """Return the top-1 accuracy in percent."""
        return 100.0 * self.correct1 / self.images

    @property
    def top5(self) -> float:
        """Return the top-5 accuracy in percent."""
        return 100.0 * self.correct5 / self.images

    def __str__(self) -> str:
        return f"top-1 {self.top1:.3f} ({self.correct1}/{self.images})  top-5 {self.top5:.3f} ({self.correct5}/{self.images})"
