"""States of optimisers that somebody else stored: accepted as every optimiser writes them, refused where they do not fit."""

import copy

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from config.validate import CHOICES
from engine.optim.stored_moments import check_moments
from engine.state import optimizer_name

WRONG = (
    "text",
    [1],
    {},
    1 << 60,
    -1,
    float("nan"),
    torch.zeros(7),
    torch.zeros(4, 3, 3, 4),
    torch.zeros(4, 20, 20, dtype=torch.int64),
)


def trained(name, momentum=0.9):
    """Return an optimiser after two updates, of parameters of several shapes, some large enough to be factored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 20), nn.Linear(20, 20))
    optimizer = create_optimizer_v2(model, name, lr=0.01, weight_decay=0.01, momentum=momentum)
    for _ in range(2):
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
    return optimizer


def step_or_refuse(optimizer, state):
    """Return True if a state is refused; else the next update must not fail."""
    fresh = copy.deepcopy(optimizer)
    try:
        check_moments(fresh, optimizer_name(fresh), state["state"])
    except ValueError:
        return True
    fresh.load_state_dict(state)
    fresh.step()
    return False


@pytest.mark.parametrize(
    ("name", "momentum"),
    [*((name, 0.9) for name in CHOICES["OPTIM.NAME"]), ("rmsproptf", 0.0), ("madgrad", 0.0), ("momentum", 0.0)],
)
def test_state_that_an_optimiser_writes_is_accepted(name, momentum):
    optimizer = trained(name, momentum)
    assert not step_or_refuse(optimizer, copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("name", CHOICES["OPTIM.NAME"])
def test_hostile_states_are_refused_before_an_update(name):
    optimizer = trained(name)
    good = optimizer.state_dict()
    refused = 0
    for index, entry in good["state"].items():
        for key in entry:
            for value in (*WRONG, "missing"):
                state = copy.deepcopy(good)
                if isinstance(value, str) and value == "missing":
                    del state["state"][index][key]
                else:
                    state["state"][index][key] = value
                refused += step_or_refuse(optimizer, state)
    assert refused >= 9 * sum(map(len, good["state"].values())) - 10 * len(good["state"])
    with pytest.raises(ValueError, match="for parameter 99 that does not fit"):
        check_moments(optimizer, optimizer_name(optimizer), {99: good["state"][0]})
