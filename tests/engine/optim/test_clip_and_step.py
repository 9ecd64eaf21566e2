"""Clipping and the guarded step: updates with a loss or gradient that is not finite leave everything unchanged."""

import copy

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy

from tests.helpers.bounds import ulps
from tests.helpers.small_loop import ALONE, batches, everything, small_loop

SMOOTH = 1e-3  # AdamW's EPS
BAD = {
    "loss": lambda loss: loss * float("nan"),
    "loss only": lambda loss: loss + float("inf"),  # its gradient is finite
    "gradient only": lambda loss: loss + 0 * (loss - loss.detach()).sqrt(),  # 0 * inf
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw for-loop", "adamw foreach", "adamw fused", "momentum", "lamb", "lion"])
def test_skipped_update_leaves_everything_as_it_was(optimizer, accumulation, bad):
    state, loop, statistics = small_loop(accumulation, optimizer)
    sampler, good = batches(8 // accumulation), loop.criterion
    for _ in range(2):
        loop._train_update(state, sampler, statistics)
    before = everything(state)
    calls = []

    def criterion(outputs, targets, images):  # spoils the last micro-batch of the update
        calls.append(1)
        loss = good(outputs, targets, images)
        return BAD[bad](loss) if len(calls) == accumulation else loss

    loop.criterion = criterion
    loop._train_update(state, sampler, statistics)
    torch.testing.assert_close(everything(state), before, rtol=0, atol=0)
    assert state.skips.tensor.tolist() == [1, 1, 0]
    assert state.update == 3
    loop.criterion = good
    loop._train_update(state, sampler, statistics)
    assert state.skips.tensor.tolist() == [0, 1, 0]
    after = everything(state)
    assert not torch.equal(after[0]["0.weight"], before[0]["0.weight"])
    assert after[0]["1.num_batches_tracked"] == 3
    assert all(t.isfinite().all() for t in after[1].values())


def test_good_updates_are_those_of_plain_pytorch():
    state, loop, statistics = small_loop(1)
    model, ema, start = (
        copy.deepcopy(state.model).train(),
        copy.deepcopy(state.ema),
        state.model[0].weight.detach().clone(),
    )
    groups = [{"params": [dict(model.named_parameters())[n] for n in names], "weight_decay": w} for names, w in GROUPS]
    # The gradient of 0.bias, before a BatchNorm, is zero but for rounding: with EPS 1e-8 AdamW would make steps of LR of it.
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=SMOOTH)
    lr_sum = 0.0
    for group in state.optimizer.param_groups:
        group["eps"] = SMOOTH
    for _, (x, y) in zip(range(4), batches(8), strict=False):
        state.schedule.set(state.update)
        for group in optimizer.param_groups:
            group["lr"] = state.optimizer.param_groups[0]["lr"]
        lr_sum += optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        SoftTargetCrossEntropy()(model(x), y).backward()
        optimizer.step()
        ema.update(model)
        loop._train_update(state, iter([(x, y)]), statistics)
    # Another implementation of AdamW, and products whose sums of at most 8 terms of size 1 MKL orders by CPU and by address:
    # AdamW makes LR / EPS of their round-off, and an ulp of the weight is added in each of 4 updates.
    near = {"rtol": ulps(4), "atol": lr_sum / SMOOTH * ulps(8)}
    for ours, plain in ((state.model, model), (state.ema.module, ema.module)):
        torch.testing.assert_close(dict(ours.named_parameters()), dict(plain.named_parameters()), **near)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()), rtol=ulps(8), atol=ulps(8))
    assert (state.model[0].weight - start).abs().max() > 100 * near["atol"]


GROUPS = ((("0.bias", "1.weight", "1.bias", "3.bias"), 0.0), (("0.weight", "3.weight"), 0.05))


def test_overflow_of_the_loss_scale_is_not_counted():
    state, loop, statistics = small_loop(2, amp="fp16")
    before, good = everything(state), loop.criterion
    loop.criterion = lambda *args: 1e4 * good(*args)
    sampler = batches(4)
    scales = [state.scaler.get_scale()]
    while state.skips.overflows < 3:
        loop._train_update(state, sampler, statistics)
        scales.append(state.scaler.get_scale())
    assert state.skips.tensor.tolist() == [0, 0, 3]
    assert scales == [65536.0, 32768.0, 16384.0, 8192.0]
    torch.testing.assert_close(everything(state)[:2], before[:2], rtol=0, atol=0)
    loop.criterion = lambda *args: good(*args) * float("nan")
    loop._train_update(state, sampler, statistics)
    assert state.skips.tensor.tolist() == [1, 1, 3]
    loop.criterion = lambda *args: BAD["gradient only"](good(*args))  # the scale falls to 1, then it is no overflow
    for _ in range(14):
        loop._train_update(state, sampler, statistics)
    assert state.scaler.get_scale() < 1
    assert state.skips.consecutive > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_update_on_cuda_is_skipped_without_waiting_for_the_device(amp):
    state, loop, statistics = small_loop(2, amp=amp, device="cuda")
    sampler, good = batches(4, "cuda"), loop.criterion
    loop._train_update(state, sampler, statistics)
    before = everything(state)
    prepared = iter([next(sampler) for _ in range(2)])
    loop.criterion = lambda *args: good(*args) * float("nan")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop._train_update(state, prepared, statistics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(everything(state), before, rtol=0, atol=0)
    assert state.skips.tensor.tolist() == [1, 1, 0]


def test_state_continues_with_another_implementation_of_the_optimiser():
    fused, loop, statistics = small_loop(1, "adamw fused")
    loop._train_update(fused, batches(8), statistics)
    plain, loop, statistics = small_loop(1, "adamw for-loop")
    plain.load_state_dict(fused.state_dict(ALONE) | {"format": 2}, "c.pt")
    assert {group["fused"] for group in plain.optimizer.param_groups} == {False}
    loop._train_update(plain, batches(8), statistics)
    back, loop, statistics = small_loop(1, "adamw fused")
    back.load_state_dict(plain.state_dict(ALONE) | {"format": 2}, "c.pt")
    assert {group["fused"] for group in back.optimizer.param_groups} == {True}
    loop._train_update(back, batches(8), statistics)
    assert {int(s["step"]) for s in back.optimizer.state.values()} == {3}
