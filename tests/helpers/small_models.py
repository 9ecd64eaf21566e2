"""Every registered Retoken model, cut down to a few blocks so that a test costs little."""

import timm
import torch

from models.registry import retoken_models

NAMES = retoken_models()
SMALLEST = [name for name in ("groupmixformer_mobile", "sgformer_small", "stvit_small") if name in NAMES]


def shrunken(name, seed=0, **arguments):
    """Build a model of the named widths, shallower; by default for ten classes and 64 pixels."""
    torch.manual_seed(seed)
    depths = (2, 2, 2, 2) if name in SMALLEST else (2, 1, 1, 1)
    return timm.create_model(name, **{"depths": depths, "num_classes": 10, "img_size": 64, **arguments})


def images(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scrambled(model, seed=2):
    """Give a model's weights and statistics arbitrary values, so that no layer is an identity or zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.add_(0.2 * noise if name.endswith("running_var") else 0.2 * noise - 0.1)
    return model
