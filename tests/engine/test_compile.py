"""TRAIN.COMPILE: the same numbers and names, no recompilation when rates change, and the log lines about it."""

import copy
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch._dynamo.utils import counters

import config
import train as train_script
from engine import compilation
from engine.batch_plan import BatchPlan
from engine.build import build_compilation, build_plan, build_state, prepare_model
from engine.checkpoint.files import load_state
from engine.compilation import Compilation, compile_arguments
from engine.default_generators import seed_default_generators
from engine.distributed.processes import Processes
from engine.drop_path import VaryingDropPath
from engine.precision import Precision
from models.backbone import Stage
from tests.helpers.small_models import SMALLEST, images, scrambled, shrunken

CPU = torch.device("cpu")
ALONE = Processes(0, 1, 0, CPU, "test")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    folder = Path(tempfile.gettempdir()) / f"retoken_tests_{os.getuid()}"  # kept: the C++ compiler takes long
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """Run everything of torch.compile but the generation of machine code, which takes minutes for a model."""
    monkeypatch.setitem(compilation.MODES, "default", {"backend": "aot_eager_decomp_partition"})


@pytest.fixture
def captured(monkeypatch):
    """Run only the capture of graphs, which decides what is recompiled."""
    monkeypatch.setitem(compilation.MODES, "default", {"backend": "eager"})


class Small(nn.Module):
    """A block with BatchNorm, drop path and a product of tensors in low precision and float32 under autocast."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.drop = DropPath(rate)

    def set_drop_path_rate(self, rate):
        self.drop.drop_prob = rate

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        y = (y + self.drop(y)).flatten(2)
        weights = y.float().softmax(-1)
        return self.out(torch.bmm(y, weights.to(y.dtype).transpose(1, 2)).mean(2))


def passes(model, x, autocast, seed=0):
    """Return output, gradients and buffers of one training pass."""
    model.train().zero_grad()
    seed_default_generators(seed, 1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x).float()
    y.square().mean().backward()
    return [y.detach(), {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training_is_equal_to_eager(autocast):
    torch.manual_seed(0)
    plain = Small()
    compiled = copy.deepcopy(plain)
    Compilation("default").apply([compiled])
    x = images(16, 3, 6, 6)
    close = {"rtol": 2e-2, "atol": 2e-3} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    for seed in range(3):  # with drop path: the masks are the same
        torch.testing.assert_close(passes(compiled, x, autocast, seed), passes(plain, x, autocast, seed), **close)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_blocks_under_checkpointing_are_equal_to_plain_ones(traced):
    torch.manual_seed(0)
    plain = Stage(nn.Identity(), [Residual(), Residual()])
    compiled = copy.deepcopy(plain)
    compiled.checkpoint_blocks(2)
    Compilation("default").apply([compiled])
    for seed in range(3):  # masks of drop path and dropout are those of the first pass
        found = [passes(model, images(32, 8), False, seed) for model in (compiled, plain)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


class Residual(nn.Module):
    """A block with everything that a recomputation could change: BatchNorm, dropout, drop path."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop, self.path = (
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.3),
            DropPath(0.5),
        )

    def forward(self, x):
        return x + self.path(self.drop(self.norm(self.linear(x)).relu()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", SMALLEST)
def test_families_traced_under_autocast_are_equal_to_eager(name, traced):
    plain = scrambled(shrunken(name, depths=(1, 1, 1, 1)))
    compiled = copy.deepcopy(plain)
    Compilation("default").apply([compiled])
    x = images(2, 3, 64, 64)
    outputs = [passes(model, x, True)[0] for model in (compiled, plain)]
    torch.testing.assert_close(*outputs, rtol=5e-2, atol=5e-2)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def run(model, *opts):
    """Return the state of a run of this config, its models compiled."""
    cfg = config.load((), ["TRAIN.COMPILE", "default", "EMA.DECAY", "0.9", "TRAIN.AMP", "off", *opts])
    model = prepare_model(model, ALONE)
    plan = BatchPlan(1024, 128, 0, 1, 10, 300)
    compiling = build_compilation(cfg, model, plan, CPU)
    state = build_state(cfg, model, plan, Precision("off", CPU))
    compiling.apply(state.weights().values())
    return state


def test_changing_drop_path_and_averaged_weights_are_not_recompiled(captured):
    state = run(Small(), "TIMELINE.DROP_PATH_RATE", "0:0 -> 300:0.5")
    x, rates = images(64, 3, 6, 6), []
    for epoch in range(0, 300, 30):
        state.schedule.begin_epoch(epoch)
        state.model.train()(x)
        rates.append(state.model.drop.drop_prob)
    assert rates == pytest.approx([0.05 * i for i in range(10)])
    assert counters["stats"]["unique_graphs"] == 1
    with torch.inference_mode():
        for model in state.weights().values():
            model.eval()(x)
    assert counters["stats"]["unique_graphs"] == 2
    assert not any("_orig_mod" in name or "rate" in name for name in state.model.state_dict())


def test_image_sizes_are_compiled_once_each(captured):
    sizes = [8 + 2 * i for i in range(12)]  # more than torch.compile's own limit
    line = ", ".join(f"{10 * i}:{160 + 32 * i}" for i in range(12))
    state = run(Small(0.0), "TIMELINE.IMG_SIZE", line)
    for size in (*sizes, *sizes):
        state.model.train()(images(2, 3, size, size))
    assert counters["stats"]["unique_graphs"] == len(sizes)


def test_varying_drop_path_drops_at_its_rate_and_keeps_the_mean():
    layer = VaryingDropPath(DropPath(0.1), CPU).train()
    layer.drop_prob = 0.4
    torch.manual_seed(0)
    y = layer(torch.ones(20000, 2, 3))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert (y[:, 0, 0] == 0).float().mean() == pytest.approx(0.4, abs=0.02)
    assert (y == y[:, :1, :1]).all()
    assert layer.eval()(y) is y


def test_log_lines_and_cache_folder_of_compilation(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = []
    own = Compilation("max-autotune")
    assert own.folder == tmp_path / "retoken" / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own.folder)
    for _ in range(2):
        own.begin(lines.append)
        own.after_update(lines.append, lines.append)
        own.after_update(lines.append, lines.append)
    assert [text.split(":")[0] for text in lines] == ["compiling the model (TRAIN.COMPILE max-autotune)", "compiled"]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert str(Compilation("default").folder) == "elsewhere"


def test_failed_compilation_warns_once_and_runs_uncompiled(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setitem(compilation.MODES, "default", {"backend": backend})
    torch.manual_seed(0)
    plain = Small()
    models, lines, x = [copy.deepcopy(plain), copy.deepcopy(plain)], [], images(4, 3, 6, 6)
    own = Compilation("default")
    own.apply(models)
    for _ in range(2):
        torch.testing.assert_close(passes(models[0], x, False), passes(plain, x, False), rtol=0, atol=0)
        own.after_update(lines.append, lambda text: lines.append(f"warning: {text}"))
    assert len(lines) == 1
    assert lines[0].startswith("warning: torch.compile failed, the model runs uncompiled (BackendCompilerFailed")
    assert [model._compiled_call_impl for model in models] == [None, None]


def test_graphs_are_not_split_by_bucket_where_that_fails(monkeypatch):
    def backend(graph, inputs):
        if torch._dynamo.config.optimize_ddp:
            raise NotImplementedError("found a higher order op in the graph")
        return graph.forward

    monkeypatch.setitem(compilation.MODES, "default", {"backend": backend})
    own, model = Compilation("default"), Small()
    own.apply([model])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):
            model(images(4, 3, 6, 6))
            assert not torch._dynamo.config.optimize_ddp
    finally:
        torch.distributed.destroy_process_group()
    assert own.failure is None
    assert counters["stats"]["unique_graphs"] >= 1


def test_auto_compiles_our_families_on_cuda_with_their_options():
    cfg = config.load((), ["TRAIN.AMP", "off"])
    assert cfg.TRAIN.COMPILE == "auto"
    plan, family = build_plan(cfg, ALONE, 10), shrunken("stvit_small", depths=(1, 1, 1, 1))
    for model, device, expected in ((family, "cuda", "default"), (family, "cpu", None), (Small(), "cuda", None)):
        compiling = build_compilation(cfg, model, plan, torch.device(device))
        assert (compiling and compiling.mode) == expected
    for mode, more in (("default", {}), ("max-autotune", {"max_autotune": True})):
        options = compile_arguments(family, mode, True)["options"]
        assert options == {**more, **options, **family.inductor_options}
        assert options["layout_optimization"] is False
        torch._inductor.config.patch(options)  # names that Inductor knows
        assert "options" not in compile_arguments(family, mode, False)


@pytest.mark.parametrize(
    ("opts", "device", "parts"),
    [
        ((), "cpu", "CUDA graphs; set it to default on the CPU"),
        (("TRAIN.GLOBAL_BATCH", "256"), "cuda", "accumulation 2; .* TRAIN.MICRO_BATCH to 256"),
        (("EVAL.FLIP", "true"), "cuda", "does not go with EVAL.FLIP"),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_work(opts, device, parts):
    def build():
        cfg = config.load((), ["TRAIN.COMPILE", "reduce-overhead", *opts])
        build_compilation(cfg, Small(), build_plan(cfg, ALONE, 10), torch.device(device))

    with pytest.raises(ValueError, match=parts):
        build()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", SMALLEST)
def test_compiled_updates_on_cuda_are_equal_to_eager(name, mode):
    plain = scrambled(shrunken(name, depths=(1, 1, 1, 1))).cuda().to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(plain)
    Compilation(mode).apply([compiled])
    optimizers = [torch.optim.SGD(model.parameters(), 1e-3) for model in (plain, compiled)]
    for update in range(5):  # graphs are recorded in the second and replayed from the third
        x = images(8, 3, 64, 64, seed=update).cuda()
        losses = []
        for model, optimizer in zip((plain, compiled), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            loss = model.train()(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_a_compiled_model_is_copied_and_pickled_as_a_plain_one(captured):
    state = run(Small())
    again = copy.deepcopy(state.model)
    assert again._compiled_call_impl is None
    with mock.patch.object(nn.Module, "compile", side_effect=AssertionError):
        again(images(2, 3, 6, 6))


def test_run_with_compiled_models_is_equal_and_logs_the_compilation(small_cfg, tmp_path, captured, capsys):
    stored = []
    for mode in ("off", "default"):
        opts = ("--opts", "TRAIN.EPOCHS", "1", "TRAIN.COMPILE", mode)
        assert train_script.main(["--cfg", str(small_cfg), "--output", str(tmp_path / mode), *opts]) == 0
        stored.append(load_state(tmp_path / mode / "small/checkpoints/update-00000006.pt"))
        out = capsys.readouterr().out
        assert out.count("compiling the model (TRAIN.COMPILE default)") == (mode == "default")
        assert out.count("compiled: the first update took") == (mode == "default")
    assert counters["stats"]["unique_graphs"] >= 2
    for part in ("model", "ema"):
        torch.testing.assert_close(stored[1][part], stored[0][part], rtol=0, atol=0)
