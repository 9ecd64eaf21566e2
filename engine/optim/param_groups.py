"""Parameter groups of an optimiser: weight decay by kind of parameter, learning rate by layer (layer decay)."""

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Divide a model's parameters into groups with their own `weight_decay` and, under layer decay, `lr_scale`.

    Biases, one-dimensional parameters and those that the model's `no_weight_decay()` names do not decay. A `layer_decay`
    below 1 scales the learning rate of each layer by that factor relative to the layer after it.
    """
    excluded: set[str] = getattr(model, "no_weight_decay", set)()
    if layer_decay < 1:
        return param_groups_layer_decay(model, weight_decay, excluded, layer_decay=layer_decay)
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=excluded)
