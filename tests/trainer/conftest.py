"""Runs, checkpoints and configs that the tests of train.py and eval.py share."""

import pytest
import torch

from tests.helpers.evaluations import TWELVE, checkpoint, draw, weights_of
from tests.helpers.small_runs import train


@pytest.fixture(scope="session")
def uninterrupted(small_cfg, tmp_path_factory):
    """The directory of an uninterrupted run; tests leave it unchanged."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert train(small_cfg, output) == 0
    return output / "small"


@pytest.fixture(scope="session")
def eval_cfg(tmp_path_factory):
    """A config with small evaluation batches and no mixed precision."""
    path = tmp_path_factory.mktemp("cfg") / "eval.yaml"
    path.write_text("TRAIN: {AMP: 'off'}\nEVAL: {BATCH: 4}\n")
    return path


@pytest.fixture(scope="session")
def twelve_classes(tmp_path_factory):
    """Number folders 0 .. 11 in the form of ImageNet-V2, and a checkpoint of twelve classes."""
    root = tmp_path_factory.mktemp("twelve")
    draw(root / "v2", {str(n): 1 + n % 3 + (n == 0) for n in range(12)})
    return root / "v2", checkpoint(root / "w.safetensors", TWELVE)


@pytest.fixture(scope="session")
def both_weights(tmp_path_factory):
    """A checkpoint of a run, with raw and EMA weights, of three classes."""
    path = tmp_path_factory.mktemp("both") / "update-00000001.pt"
    metadata = {"model": "test_efficientnet", "num_classes": 3, "classes": ["blue", "green", "red"], "seed": 4}
    torch.save({"format": 1, "model": weights_of(3, 0), "ema": weights_of(3, 1), "facts": metadata}, path)
    return path
