"""Published top-1 accuracies on ImageNet-1k, from the authors' papers and repositories."""

TOP1: dict[tuple[str, int], float] = {  # model, image size: top-1 in percent
    ("sgformer_small", 224): 83.2,
    ("sgformer_medium", 224): 84.1,
    ("sgformer_base", 224): 84.7,
    ("groupmixformer_mobile", 224): 79.6,
    ("groupmixformer_tiny", 224): 82.6,
    ("groupmixformer_small", 224): 83.4,
    ("groupmixformer_base", 224): 84.7,
    ("groupmixformer_large", 224): 85.0,
    ("groupmixformer_large", 384): 86.2,
    ("stvit_small", 224): 83.6,
    ("stvit_base", 224): 84.8,
    ("stvit_large", 224): 85.3,
    ("stvit_small", 384): 85.0,
    ("stvit_base", 384): 86.0,
    ("stvit_large", 384): 86.4,
}


def published_top1(model: str, size: int) -> float | None:
    """Return the published top-1 of a model at an image size, None if none was published."""
    return TOP1.get((model, size))
