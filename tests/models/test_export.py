"""The models outside eager PyTorch: compiled, exported, in ONNX, in other memory formats and precisions."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.bounds import DEPTH, TERMS, ulps
from tests.helpers.small_models import SMALLEST, images, scrambled, shrunken

# Warnings of torch 2.11's own code while it compiles, exports and loads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]
SHAPE = (50, 70)  # no stride divides it: all that pads is in the graph
BATCH = ({0: torch.export.Dim.DYNAMIC},)


def small(name, **arguments):
    """Build a model with one block a stage, two where SG-Former has a second kind: every operation, traced quickly."""
    return shrunken(name, depths=(2 if name.startswith("sgformer") else 1, 1, 1, 1), **arguments)


def assert_same(got, want, bound):
    assert (got - want).norm() <= bound * want.norm()


def trained_eager_and_compiled(name, precision):
    """Return for each the logits and the gradients of all parameters, and their names."""
    torch._dynamo.reset()
    model, x = small(name).train(), images(2, 3, 64, 64)
    outputs = []
    for net in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        with precision:
            logits = net(x)
        F.cross_entropy(logits.float(), torch.tensor([1, 2])).backward()
        outputs.append([logits.detach().float(), *(p.grad for p in model.parameters())])
    return ["logits", *(key for key, _ in model.named_parameters())], outputs


@pytest.mark.parametrize("name", SMALLEST)
def test_compiled_training_is_one_graph_that_equals_eager(name):
    names, outputs = trained_eager_and_compiled(name, nullcontext())
    largest = max(grad.norm() for grad in outputs[0][1:])
    for key, want, got in zip(names, *outputs, strict=True):
        assert (got - want).norm() <= 1e-3 * max(want.norm(), 0.01 * largest), key


@pytest.mark.parametrize("name", SMALLEST)
def test_compiled_training_under_autocast_equals_eager(name):
    _, outputs = trained_eager_and_compiled(name, torch.autocast("cpu", torch.bfloat16))
    joined = [[logits, torch.cat([grad.flatten() for grad in grads])] for logits, *grads in outputs]
    for want, got in zip(*joined, strict=True):
        assert (got - want).norm() <= 0.1 * want.norm()


@pytest.mark.parametrize("name", SMALLEST)
def test_exported_program_survives_a_file_and_takes_any_batch(name, tmp_path):
    model = scrambled(small(name, img_size=SHAPE)).eval()
    program = torch.export.export(model, (images(2, 3, *SHAPE),), dynamic_shapes=BATCH)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (2, 3):
        x = images(batch, 3, *SHAPE)
        with torch.no_grad():
            assert_same(loaded(x), model(x), 1e-5)


@pytest.mark.parametrize("name", SMALLEST)
def test_onnx_file_agrees_with_pytorch(name, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install -r requirements-dev.txt")
    import onnxruntime

    model, path = scrambled(small(name, img_size=SHAPE)).eval(), tmp_path / "model.onnx"
    bound = (
        0.02 if name.startswith("sgformer") else DEPTH * ulps(TERMS)
    )  # near-ties of significance may change places in float32
    torch.onnx.export(
        model, (images(2, 3, *SHAPE),), dynamo=True, verbose=False, external_data=False, dynamic_shapes=BATCH
    ).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (2, 3):
        x = images(batch, 3, *SHAPE)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert_same(torch.from_numpy(logits), model(x), bound)


@pytest.mark.parametrize("name", SMALLEST)
def test_channels_last_gives_the_same_gradients(name):
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = small(name).double().train().to(memory_format=memory_format)
        x = images(2, 3, 64, 64, dtype=torch.float64).to(memory_format=memory_format)
        F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    first, last = gradients
    largest = max(g.abs().max().item() for g in first.values())
    for key, want in first.items():
        torch.testing.assert_close(last[key], want, rtol=1e-8, atol=1e-11 * largest, msg=key)


@pytest.mark.parametrize("scale", [1, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SMALLEST)
def test_half_precision_is_finite_and_near_float32(name, dtype, scale):
    model, x = small(name).eval(), scale * images(2, 3, *SHAPE)
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", dtype):
            got = model(x).float()
    assert got.isfinite().all()
    assert_same(got, want, 0.1)


@pytest.mark.parametrize("name", SMALLEST)
def test_empty_batch_is_refused_in_eager_and_compiled(name):
    torch._dynamo.reset()
    model, nothing = small(name).eval(), torch.zeros(0, 3, 64, 64)
    for net in (model, torch.compile(model, backend="eager")):
        with pytest.raises(Exception, match="must be at least 1"):
            net(nothing)
