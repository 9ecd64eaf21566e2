"""Files of trained teacher models for tests of distillation."""

import timm
import torch

from engine.checkpoint.files import save_weights
from tests.helpers.small_models import scrambled


def store(path, name="test_efficientnet", metadata=None, seed=0, **arguments):
    """Write a model with arbitrary weights to a .pt or .safetensors file; return the model."""
    torch.manual_seed(seed)
    model = scrambled(timm.create_model(name, **{"num_classes": 3, **arguments}), seed).eval()
    if path.suffix == ".safetensors":
        save_weights(path, model.state_dict(), metadata or {})
    else:
        torch.save(model.state_dict(), path)
    return model
