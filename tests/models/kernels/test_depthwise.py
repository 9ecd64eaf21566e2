"""The depthwise kernel: under Triton's interpreter, compiled without and with a GPU, and the key that switches it on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from benchmarks import kernels
from config import load
from models.build import build_model
from models.kernels.switch import use_kernels, uses_kernels
from models.layers import GeluDepthwiseConv
from tests.helpers.small_models import images, scrambled, shrunken

ROOT = Path(__file__).parents[3]
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which the CUDA builds of PyTorch bring"
)
ORDERS = pytest.mark.parametrize("before", [True, False], ids=["gelu_before", "gelu_after"])


def run(*argv, **environment):
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@TRITON
@pytest.mark.slow
def test_kernel_equals_plain_under_the_interpreter():
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    printed = run("-m", "pytest", *options, "tests/helpers/interpreted_depthwise_kernel.py", TRITON_INTERPRET="1")
    assert "passed" in printed
    assert "skipped" not in printed


KERNELS = {
    "mix_before_bf16": ("mix", "bf16", {"BEFORE": True, "AFTER": False, "SLOPE": False, "LIFT": True}),
    "mix_slope_fp16": ("mix", "fp16", {"BEFORE": False, "AFTER": False, "SLOPE": True, "LIFT": True}),
    "unmix_before_bf16": ("unmix", "bf16", {"BEFORE": True, "LIFT": True}),
    "unmix_after_bf16": ("unmix", "bf16", {"BEFORE": False, "LIFT": True}),
    "unmix_before_fp64": ("unmix", "fp64", {"BEFORE": True, "LIFT": False}),
}


@TRITON
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", KERNELS)
def test_kernel_compiles_for_a_gpu_that_is_not_there(case, capability):
    if not (Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("needs Triton's own ptxas, which only its builds for NVIDIA have")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.kernels import depthwise_triton
    from models.kernels.depthwise import BACKWARD, FORWARD

    name, kind, mode = KERNELS[case]
    kernel, tile = getattr(depthwise_triton, name), {"mix": FORWARD, "unmix": BACKWARD}[name]
    wide = "fp64" if kind == "fp64" else "fp32"
    constants = {**mode, "ROWS": 3, "P": tile.strips, "COLUMNS": tile.columns, "CHANNELS": tile.channels}
    constants["WIDE"] = triton.language.float64 if wide == "fp64" else triton.language.float32
    pointers = {
        **dict.fromkeys(("x", "gradient", "out"), kind),
        "weight": "fp32",
        "bias": "fp32",
        "shift": "fp32",
        "sums": wide,
    }
    signature = {
        argument: "constexpr" if argument in constants else f"*{pointers[argument]}" if argument in pointers else "i32"
        for argument in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": tile.warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    assert ".local" not in compiled.asm["ptx"]  # nothing lies in memory that could lie in registers


def test_kernels_of_a_run_on_the_cpu_are_refused(monkeypatch):
    cfg = load((), ["MODEL.NAME", "stvit_small", "MODEL.KERNELS", "triton", "DEVICE", "cpu"])
    with pytest.raises(
        ValueError, match=r"MODEL\.KERNELS=triton runs on CUDA devices; DEVICE=cpu.*set MODEL\.KERNELS to off"
    ):
        build_model(cfg, 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"DEVICE=auto is the CPU here"):
        build_model(load((), ["MODEL.NAME", "stvit_small", "MODEL.KERNELS", "triton"]), 10)
    with pytest.raises(
        ValueError, match=r"MODEL\.KERNELS must be one of auto, off, triton, got 'tritn'; did you mean triton"
    ):
        load((), ["MODEL.KERNELS", "tritn"])


@TRITON
def test_kernels_reach_the_model_or_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    opts = ["MODEL.KERNELS", "triton", "DATA.IMG_SIZE", "64", "DATA.EVAL_RESIZE", "64", "MODEL.NAME"]
    for name, count in (("stvit_small", 20), ("sgformer_small", 23)):
        layers = [m for m in build_model(load((), [*opts, name]), 10).modules() if isinstance(m, GeluDepthwiseConv)]
        assert [layer.kernel is None for layer in layers] == [False] * count
    for name in ("groupmixformer_mobile", "resnet18"):
        with pytest.raises(ValueError, match=r"MODEL\.KERNELS=triton: no layer of this model .*; set it to off"):
            build_model(load((), [*opts, name]), 10)


@TRITON
@pytest.mark.parametrize(
    ("name", "capability", "device", "count"),
    [
        ("stvit_small", (9, 0), "auto", 20),
        ("sgformer_small", (8, 0), "cuda", 23),
        ("stvit_small", (7, 5), "auto", 0),
        ("stvit_small", (9, 0), "cpu", 0),
        ("groupmixformer_mobile", (9, 0), "auto", 0),
        ("resnet18", (9, 0), "auto", 0),
    ],
)
def test_auto_takes_kernels_where_they_move_less(monkeypatch, name, capability, device, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    cfg = load((), ["DEVICE", device, "DATA.IMG_SIZE", "64", "DATA.EVAL_RESIZE", "64", "MODEL.NAME", name])
    assert cfg.MODEL.KERNELS == "auto"
    assert uses_kernels(build_model(cfg, 10)) == count


@TRITON
@pytest.mark.parametrize("name", ["sgformer_small", "stvit_small"])
def test_kernels_leave_the_cpu_and_the_parameters_as_they_are(name):
    model, x = scrambled(shrunken(name, depths=(1, 1, 1, 1))).eval(), images(1, 3, 64, 64)
    entries = {key: (tensor.shape, tensor.stride()) for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        want = model(x)
        use_kernels(model)
        assert torch.equal(model(x), want)
    assert {key: (tensor.shape, tensor.stride()) for key, tensor in model.state_dict().items()} == entries


def test_kernels_are_not_needed_where_triton_is_missing():
    program = """
import sys
import models
assert "models.kernels.depthwise" not in sys.modules
sys.modules["triton"] = None
import timm, torch
from models.kernels.switch import use_kernels, uses_kernels
for name in ("sgformer_small", "stvit_small"):
    model = timm.create_model(name, depths=(1, 1, 1, 1), img_size=32).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).isfinite().all()
    try:
        use_kernels(model)
    except ValueError as error:
        print(error)
"""
    assert run("-c", program).count("Triton is missing") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--models sgformer_small", "no CUDA device"),
        ("--models groupmixformer_mobile", "--models groupmixformer_mobile: no layer of it has a Triton kernel"),
    ],
)
@TRITON
def test_kernel_benchmark_that_cannot_run_names_the_reason(monkeypatch, capsys, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "group" in options:
        monkeypatch.setattr("models.kernels.depthwise.DEVICE", "cpu")
    assert kernels.main(options.split()) == 2
    assert message in " ".join(capsys.readouterr().out.split())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    """Check on a GPU the properties that the interpreter does not cover."""

    def layer(self, C, before):
        torch.manual_seed(0)
        return scrambled(GeluDepthwiseConv(C, before)).cuda()

    def with_gradients(self, conv, x, cotangent):
        x = x.detach().requires_grad_()
        y = conv(x)
        return y, *torch.autograd.grad(y, (x, *conv.parameters()), cotangent.to(y.dtype))

    @ORDERS
    @pytest.mark.parametrize("shape", [(3, 56, 56, 72), (2, 7, 7, 256), (2, 33, 9, 6)], ids=str)
    @pytest.mark.parametrize(
        ("dtype", "bound"),
        [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
        ids=str,
    )
    def test_kernel_equals_plain(self, dtype, bound, shape, before):
        conv = self.layer(shape[3], before).to(dtype)
        x, cotangent = (images(*shape, seed=seed).to("cuda", dtype) for seed in (1, 3))
        use_kernels(conv)
        got = self.with_gradients(conv, x, cotangent)
        assert all(torch.equal(a, b) for a, b in zip(got, self.with_gradients(conv, x, cotangent), strict=True))
        conv.kernel = None
        want = self.with_gradients(conv.double(), x.double(), cotangent.double())
        for a, b in zip(got, want, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= bound * b.norm()

    @ORDERS
    def test_kernel_compiles_into_one_graph(self, before):
        torch._dynamo.reset()
        conv, x = self.layer(64, before), images(2, 14, 14, 64).cuda()
        use_kernels(conv)
        compiled = torch.compile(conv, fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16):
            pair = [self.with_gradients(f, x, x) for f in (conv, compiled)]
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))

    @pytest.mark.parametrize("name", ["sgformer_small", "stvit_small"])
    def test_model_with_kernels_equals_without(self, name):
        model = scrambled(timm.create_model(name, num_classes=10, img_size=64)).cuda().double().train()
        x, outputs = images(4, 3, 64, 64, dtype=torch.float64).cuda(), []
        for switch in (lambda model: None, use_kernels):
            switch(model)
            model.zero_grad()
            logits = model(x)
            F.cross_entropy(logits, torch.tensor([1, 2, 3, 4], device="cuda")).backward()
            outputs.append([logits.detach(), *(p.grad for p in model.parameters())])
        largest = max(grad.norm() for grad in outputs[0][1:])
        for want, got in zip(*outputs, strict=True):
            assert (got - want).norm() <= 1e-9 * max(want.norm(), 0.01 * largest)
