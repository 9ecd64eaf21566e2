"""Parts of the training loop: running statistics, precision, evaluation, loss scaling, logging."""

import io
import json
import re
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import config
import models  # noqa: F401  registers the families
from engine.batch_norm import RunningStatistics
from engine.batch_plan import BatchPlan
from engine.build import build_loop, build_state, prepare_model
from engine.default_generators import seed_default_generators
from engine.distributed.processes import Processes, init_processes
from engine.evaluate import Accuracy, evaluate
from engine.logging.log import Log
from engine.loop import StepMetrics
from engine.optim.ema import scalar_with_views
from engine.precision import Precision
from tests.helpers.bounds import ulps

CPU = torch.device("cpu")
ALONE = Processes(0, 1, 0, CPU, "test")


def test_gradients_have_the_memory_layout_of_their_weights():
    model = prepare_model(timm.create_model("groupmixformer_mobile", num_classes=3), ALONE)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    model(x).sum().backward()
    assert {n: p.stride() for n, p in model.named_parameters() if p.grad.stride() != p.stride()} == {}


@pytest.mark.parametrize("single", [True, False])
def test_average_moves_by_one_number_in_views_of_any_layout(single):
    torch.manual_seed(0)
    new = [torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), torch.randn(6, 2).t(), torch.randn(())]
    own = [torch.empty_like(t).normal_() for t in new]
    wanted = [a + 0.25 * (b - a) for a, b in zip(own, new, strict=True)]
    number, views = scalar_with_views(own, single)
    number.fill_(0.25)
    torch._foreach_lerp_(own, new, views)
    torch.testing.assert_close(own, wanted)
    assert [view.stride() == t.stride() for view, t in zip(views, own, strict=True)][:2] == [not single] * 2


def test_seed_depends_on_every_part_of_the_rng_key():
    draws = set()
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        seed_default_generators(*key)
        draws.add(torch.rand(()).item())
    assert len(draws) == 4
    torch.manual_seed(0)
    colliding = [(5,), (5, 0), (5, 0, 0), (2**32, 7, 3), (0, 1, 7, 3)]
    assert len({(seed_default_generators(*a), torch.initial_seed()) for a in colliding}) == len(colliding)
    seed_default_generators(0, 0, 0)
    first = torch.rand(3)
    seed_default_generators(0, 0, 0)
    assert torch.equal(first, torch.rand(3))


@pytest.mark.parametrize("in_use", [True, False])
def test_seed_reaches_cuda_where_it_is_in_use(monkeypatch, in_use):
    seeds = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    seed_default_generators(3, 1, 2)
    assert seeds == [torch.initial_seed()] * in_use


@pytest.mark.parametrize(("mode", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_sets_the_format_of_matmuls(mode, dtype):
    precision = Precision(mode, CPU)
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert precision.scaler.is_enabled() == (mode == "fp16")


def loop_of(opts, model, micro=4, world=1):
    cfg = config.load((), ["TRAIN.GLOBAL_BATCH", "8", "TRAIN.MICRO_BATCH", str(micro), "TRAIN.AMP", "off", *opts])
    precision = Precision(cfg.TRAIN.AMP, CPU)
    plan = BatchPlan(8, micro, 0, world, 5, cfg.TRAIN.EPOCHS)
    loop = build_loop(cfg, model, lambda batch, update, micro, epoch: batch, precision, ALONE)
    return build_state(cfg, model, plan, precision), loop


def data_of(count, micro, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    return [(x[i : i + micro], F.one_hot(y[i : i + micro], 3).float()) for i in range(0, count, micro)]


@pytest.mark.parametrize("clip", ["0", "0.1"])
def test_epoch_equals_plain_pytorch(clip):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    plain = nn.Linear(6, 3)
    plain.load_state_dict(model.state_dict())
    ema = {k: v.clone() for k, v in plain.state_dict().items()}
    state, loop = loop_of(["TRAIN.CLIP_GRAD", clip, "EMA.DECAY", "0.9", "OPTIM.LR", "0.01"], model)
    steps = []
    loop.train_epoch(state, data_of(40, 4), steps.append, lambda: None)

    decay, rest = {"params": [plain.weight], "weight_decay": 0.05}, {"params": [plain.bias], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([rest, decay], lr=0.01)
    losses = []
    for update, (x, y) in enumerate(data_of(40, 8)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-6 + update * (0.01 - 1e-6) / 100
        loss = SoftTargetCrossEntropy()(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        if float(clip):
            nn.utils.clip_grad_norm_(plain.parameters(), float(clip))
        optimizer.step()
        losses.append(loss.item())
        for name, value in plain.state_dict().items():
            ema[name] = 0.9 * ema[name] + 0.1 * value
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dict(state.ema.module.state_dict()), ema, rtol=1e-5, atol=1e-7)
    assert state.update == 5
    assert steps[-1].epoch_loss == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_fp16_scaler_skips_an_overflowing_update_and_lowers_the_scale():
    model = nn.Linear(6, 3)
    state, loop = loop_of(["TRAIN.AMP", "fp16"], model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [(x * 1e30, y) for x, y in data_of(40, 4)]
    scale = state.scaler.get_scale()
    loop._train_update(state, iter(batches), RunningStatistics(model, 2, ALONE))
    assert state.scaler.get_scale() < scale
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_step_metrics_cover_the_updates_since_the_last_logging_step():
    state, loop = loop_of([], nn.Linear(6, 3))
    steps = []
    replace(loop, log_every=2).train_epoch(state, data_of(40, 4), steps.append, lambda: None)
    assert [s.update_in_epoch for s in steps] == [2, 4, 5]
    total = 2 * steps[0].loss + 2 * steps[1].loss + steps[2].loss
    assert steps[2].epoch_loss == pytest.approx(total / 5)


def test_evaluation_counts_and_averages():
    logits = torch.randn(10, 7)
    labels = torch.arange(10) % 7
    batches = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]
    result = evaluate(nn.Identity(), batches, lambda b: b, Precision("off", CPU), ALONE, 10)
    assert result.correct1 == (logits.argmax(1) == labels).sum()
    assert result.correct5 == sum(int(y in row.topk(5).indices) for row, y in zip(logits, labels, strict=True))
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=ulps(10))


def test_evaluation_is_safe_for_fewer_than_five_classes():
    batches = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
    assert evaluate(nn.Identity(), batches, lambda b: b, Precision("off", CPU), ALONE, 4).top5 == 100.0


def test_evaluation_that_misses_an_image_is_an_error():
    batches = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(RuntimeError, match="4 images of 5"):
        evaluate(nn.Identity(), batches, lambda b: b, Precision("off", CPU), ALONE, 5)


STEP = StepMetrics(0, 10, 10, 2.0, 2.1, 1.0, 1e-3, 100.0, 0.05)


def test_log_drops_rows_of_updates_that_will_be_repeated(tmp_path):
    for position in (0, 10):
        log = Log(main=True)
        log.console = Console(file=io.StringIO())
        log.open(tmp_path, position, tensorboard=False)
        for update in (position + 5, position + 10, position + 15):
            log.step(replace(STEP, update=update), 3, 20)
        log.metrics.write('{"kind": "tr')
        log.close()
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(r)["update"] for r in rows[:-1]] == [5, 10, 15, 20, 25]


def test_log_writes_plain_lines_to_a_file_and_a_view_to_a_terminal(tmp_path):
    for terminal in (False, True):
        log, out = Log(main=True), io.StringIO()
        log.console = Console(file=out, force_terminal=terminal, width=150, highlight=False)
        log.open(tmp_path, 0, tensorboard=False)
        log.begin_epoch(0, 3, 0, 20)
        log.step(STEP, 3, 20)
        log.advance()
        log.end_epoch()
        log.result("raw", Accuracy(1, 2, 4, 1.0, 1.0), 0, 10, True)
        log.close()
        assert ("update 10/20" in out.getvalue()) != terminal
        assert "top-1 25.000 (1/4)" in out.getvalue()
        assert ("\x1b" in out.getvalue()) == terminal


def test_log_writes_tensorboard_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(main=True)
    log.console = Console(file=io.StringIO())
    log.open(tmp_path, 0, tensorboard=True)
    log.step(STEP, 3, 20)
    log.result("ema", Accuracy(1, 2, 4, 1.0, 1.0), 0, 10, True)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 2.0
    assert events.Scalars("eval_ema/top1")[0].value == 25.0
    (layout,) = events.Tensors("custom_scalars__config__")
    drawn = set(re.findall(rb"\^(\w+/\w+)\$", layout.tensor_proto.string_val[0]))
    assert drawn == {
        f"eval_{which}/{what}".encode() for which in ("raw", "ema") for what in ("top1", "top5", "loss")
    } | {b"train/loss"}
    assert {b"train/loss", b"eval_ema/top1", b"eval_ema/top5", b"eval_ema/loss"} == drawn & {
        tag.encode() for tag in events.Tags()["scalars"]
    }


def test_other_processes_are_silent(tmp_path, capsys):
    log = Log(main=False)
    log.open(tmp_path, 0, tensorboard=True)
    log.info("x")
    log.step(STEP, 3, 20)
    log.result("raw", Accuracy(1, 2, 4, 1.0, 1.0), 0, 10, True)
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_missing_cuda_is_named():
    with pytest.raises(ValueError, match="DEVICE=cuda"):
        init_processes("cuda")
