"""A family in one file, the one of docs/extending.md: folded, fused and drawn by what its classes declare."""

import ast
import copy
import re

import pytest
import timm
import torch
from torch import nn

from models.attention_maps import all_blocks, attention_maps, has_maps
from models.custom_model import import_models
from models.inference.fold import fold
from models.inference.prepare import OneDnnConv, OneDnnLinear, is_foldable, prepare_inference
from tests.helpers.documented import ROOT, read
from tests.helpers.small_models import images, scrambled

NAME = "poolnet_for_folding"
SHARED = (
    "attention_maps",
    "backbone",
    "identify",
    "layers",
    "published",
    "weights",
    "inference/fold",
    "inference/prepare",
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
FAMILIES = re.compile(r"^(from|import) .*\b(groupmixformer|sgformer|sgformer_attention|stvit)\b", re.MULTILINE)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Register the model of the page under another name than tests/docs/test_commands.py."""
    (text,) = (block.text for block in read(ROOT / "docs/extending.md")[0] if block.title == "mine/poolnet.py")
    file = tmp_path_factory.mktemp("family") / "poolnet.py"
    file.write_text(text.replace("poolnet_tiny", NAME))
    import_models(str(file))


@pytest.fixture
def model(family):
    torch.manual_seed(0)
    model = scrambled(timm.create_model(NAME, num_classes=10)).eval()
    for key, statistic in model.named_buffers():
        if key.endswith("running_var"):
            statistic.abs_().add_(0.5)
    return model


@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_folded_model_is_the_same_function(model, size):
    model, x = model.double(), images(2, 3, *size, dtype=torch.float64)
    folded = copy.deepcopy(model)
    assert fold(folded) == {"softmax scale": 5, "BatchNorm": 3 + 1}
    assert fold(folded) == {}
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-11)


def test_prepared_model_is_the_same_function_and_fused(model):
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double())
        got = prepare_inference(model)(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(module, nn.Linear | nn.GELU | nn.BatchNorm2d) for module in model.modules())
    fused = [module.activation for module in model.modules() if isinstance(module, OneDnnLinear | OneDnnConv)]
    assert sorted(fused) == ["gelu"] * (3 + 5) + ["none"] * (4 * 5 + 1)


def test_attention_maps_are_those_of_the_family(model):
    model, x = model.double(), images(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
    assert has_maps(model)
    for at in (None, (0.4, 0.6)):
        logits, maps = attention_maps(model, x, at, all_blocks(model))
        assert torch.equal(logits, want)
        assert [found.name for found in maps][:2] == ["stage1_block1_attention", "stage2_block1_attention"]
        for found in maps:
            values = found.reading.values
            assert values.shape == (2, 64 // found.patch, 64 // found.patch)
            torch.testing.assert_close(values.mean((1, 2)), torch.ones(2, dtype=torch.float64))


def test_subclass_is_not_foldable_unless_it_declares_it(model):
    class Changed(type(model)):
        def __init__(self):
            nn.Module.__init__(self)

    class Declared(Changed):
        foldable = True

    assert is_foldable(model)
    assert not is_foldable(Changed())
    assert is_foldable(Declared())


@pytest.mark.parametrize(
    "path", ["eval.py", *(f"models/{name}.py" for name in SHARED), "tools/export.py", "tools/visualize.py"]
)
def test_shared_module_names_no_family_in_its_messages(path):
    messages = [
        node.value
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    docstrings = {
        ast.get_docstring(node, clean=False)
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, DOCUMENTED)
    }
    assert not [
        text for text in messages if text not in docstrings and re.search("SG-?Former|GroupMixFormer|STViT", text)
    ]


@pytest.mark.parametrize("name", SHARED)
def test_shared_module_imports_no_family(name):
    assert not FAMILIES.search((ROOT / f"models/{name}.py").read_text())
    assert FAMILIES.search((ROOT / "models/__init__.py").read_text())
