"""Running sums of losses and gradient norms: means over processes, named fields, stored form."""

import math
from dataclasses import replace

import torch

from engine.running_sums import RunningSums, Sums, from_format_1
from tests.helpers.small_loop import ALONE, small_loop


def test_sums_are_averaged_where_the_processes_exchange_and_stay_where_they_are():
    state, _, _ = small_loop(1)  # as between two epochs: continued from a file, nothing on the device yet
    state.sums.tensor += 3
    assert state.sums.mean(replace(ALONE, device=torch.device("meta"))).device.type == "meta"
    state.sums.mean(ALONE).zero_()
    assert (state.sums.tensor.device.type, int(state.sums.tensor[0, 0])) == ("cpu", 3)


def test_sums_have_named_fields_and_leave_out_what_is_not_finite():
    sums = RunningSums()
    for loss, norm, skipped in ((1.0, 3.0, False), (2.0, math.inf, True), (math.nan, math.nan, True)):
        sums.add(torch.tensor(loss), torch.tensor(norm), torch.tensor(skipped))
    assert sums.read(ALONE) == (Sums(3.0, 2.0, 3.0, 1.0, 3.0, 2.0),) * 2
    sums.begin_logging()
    since_epoch, since_logging = sums.read(ALONE)
    assert (since_epoch.mean_loss, since_epoch.mean_grad_norm) == (1.5, 3.0)
    assert since_logging == Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert math.isnan(since_logging.mean_loss)
    assert since_logging.mean_grad_norm == math.inf
    sums.begin_epoch()
    assert not sums.tensor.any()


def test_sums_of_format_1_continue():
    stored = torch.tensor([[5.0, 7.0, 2.0, 3.0], [1.0, 4.0, 1.0, 1.0]], dtype=torch.float64)
    found = RunningSums(from_format_1(stored)).read(ALONE)
    assert found == (Sums(5.0, 3.0, 7.0, 2.0, 3.0, 0.0), Sums(1.0, 1.0, 4.0, 1.0, 1.0, 0.0))
