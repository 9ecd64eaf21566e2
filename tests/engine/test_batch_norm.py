"""BatchNorm: running statistics of an update, under gradient checkpointing too, and SyncBatchNorm."""

import copy
from dataclasses import replace
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from engine.batch_norm import RunningStatistics
from engine.build import prepare_model
from engine.distributed.processes import Processes
from tests.helpers.small_loop import ALONE, everything, small_loop

CPU = torch.device("cpu")


def test_running_statistics_move_once_by_the_mean_over_micro_batches():
    norm, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    pieces = [torch.randn(5, 3) + i for i in range(4)]
    statistics = RunningStatistics(norm, 4, ALONE)
    statistics.begin()
    for piece in pieces:
        norm(piece)
        statistics.after_forward()
        statistics.after_backward()
    statistics.end(torch.tensor(True))
    mean = torch.stack([p.mean(0) for p in pieces]).mean(0)
    var = torch.stack([p.var(0) for p in pieces]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var)
    assert norm.num_batches_tracked == 1
    one = RunningStatistics(plain, 1, ALONE)
    one.begin()
    plain(pieces[0])
    one.after_forward()
    one.after_backward()
    one.end(torch.tensor(True))
    torch.testing.assert_close(plain.running_mean, 0.1 * pieces[0].mean(0))


def test_sync_batch_norm_keeps_fused_activations():
    model = timm.create_model("test_efficientnet", num_classes=3)
    processes = Processes(0, 2, 0, torch.device("cuda", 0), "test")
    with mock.patch.object(nn.Module, "to", lambda self, *_, **__: self):
        prepared = prepare_model(copy.deepcopy(model), processes, sync_batch_norm=True)
    kinds = {type(m) for m in prepared.modules()}
    assert any(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    assert not any(issubclass(kind, nn.BatchNorm2d) for kind in kinds)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(prepared.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match="SYNC_BN"):
        prepare_model(model, replace(processes, device=CPU), sync_batch_norm=True)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_checkpointed_model_of_timm_is_equal_to_the_plain_one(accumulation):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", num_classes=3, drop_path_rate=0.3)
        if checkpointed:
            model.set_grad_checkpointing(True)
        state, loop, statistics = small_loop(accumulation, "sgd", model=model)
        for update in range(2):
            x = torch.randn(8 // accumulation, 3, 32, 32, generator=torch.Generator().manual_seed(update))
            y = F.one_hot(torch.arange(len(x)) % 3, 3).float()
            loop._train_update(state, iter([(x, y)] * accumulation), statistics)
        found.append(everything(state))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_models_with_frozen_or_no_batch_norm_train_on():
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    statistics = RunningStatistics(model, 1, ALONE)
    statistics.begin()
    statistics.end(torch.tensor(False))
    assert not statistics.active
