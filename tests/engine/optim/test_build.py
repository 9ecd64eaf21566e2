"""Optimisers built from the config: each one offered learns; betas and eps."""

import pytest
import torch

import config
from engine.optim.build import build_optimizer


@pytest.mark.parametrize("name", config.CHOICES["OPTIM.NAME"])
def test_every_optimiser_offered_learns(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = build_optimizer(config.load((), ["OPTIM.NAME", name, "OPTIM.LR", "0.01"]), model)
    x = torch.randn(64, 4)
    losses = []
    for _ in range(100):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_optimiser_keeps_its_own_betas_and_eps_unless_they_are_set():
    layer = torch.nn.Linear(2, 2)
    own = build_optimizer(config.load((), ["OPTIM.NAME", "adopt"]), layer).param_groups[0]
    assert (own["betas"], own["eps"]) == ((0.9, 0.9999), 1e-6)
    given = ["OPTIM.NAME", "adopt", "OPTIM.BETAS", "[0.8, 0.9]", "OPTIM.EPS", "1e-3"]
    changed = build_optimizer(config.load((), given), layer).param_groups[0]
    assert (changed["betas"], changed["eps"]) == ((0.8, 0.9), 1e-3)
    with pytest.raises(ValueError, match=r"OPTIM.BETAS=\[0.8, 0.9\]: adan has 3"):
        build_optimizer(config.load((), ["OPTIM.NAME", "adan", "OPTIM.BETAS", "[0.8, 0.9]"]), layer)
