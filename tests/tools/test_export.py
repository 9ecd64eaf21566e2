"""tools.export: files that other programs read, compared with the model before they are left behind."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from data.augment.transforms import EvalTransform
from models.weights import load_weights
from tests.conftest import ROOT, run_python
from tests.helpers.small_models import images, scrambled, shrunken
from tools import export
from tools.classifier import Classifier
from tools.export import DifferenceError, compare, main

# Warnings of torch's own code while it exports and loads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]
NAME, SIZE = "groupmixformer_mobile", 64


@pytest.fixture
def classifier(monkeypatch):
    """A small model in place of the checkpoint that the command is given."""
    model = scrambled(shrunken(NAME, depths=(1, 1, 1, 1), num_classes=3, img_size=SIZE)).eval()
    names = ["n01440764", "n02106662", "cat"]
    loaded = Classifier(NAME, model, EvalTransform(SIZE, 72), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), names, ["tench", "German shepherd", "cat"], {"top1": 12.5, "num_classes": 3}, "best_raw.safetensors")  # fmt: skip
    monkeypatch.setattr(export, "load_from_args", lambda *_: loaded)
    return loaded


def answers(classifier, batch=2):
    x = images(batch, 3, SIZE, SIZE)
    with torch.no_grad():
        return x, classifier.model(x)


def test_onnx_takes_any_batch_and_knows_its_classes(classifier, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install -r requirements-dev.txt")
    import onnxruntime

    path = tmp_path / "model.onnx"
    assert main(["x", "--format", "onnx", "--out", str(path), "--fold"]) == 0
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        x, want = answers(classifier, batch)
        (got,) = session.run(["logits"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["names"]) == ["tench", "German shepherd", "cat"]
    assert json.loads(about["evaluation"])["resize"] == 72
    text = capsys.readouterr().out
    assert "batch of 1: largest difference" in text
    assert "batch of 3: largest difference" in text
    assert "folded 23 x BatchNorm, 12 x depthwise kernel: largest difference in float64" in text


def test_program_is_read_without_this_repository(classifier, tmp_path):
    path = tmp_path / "model.pt2"
    assert main(["x", "--format", "torch", "--out", str(path), "--fold"]) == 0
    extra = {"retoken.json": ""}
    program = torch.export.load(path, extra_files=extra)
    x, want = answers(classifier)
    torch.testing.assert_close(program.module()(x).detach(), want, rtol=1e-3, atol=1e-4)
    assert json.loads(extra["retoken.json"])["mean"] == [0.5, 0.4, 0.3]


def test_folder_is_a_timm_model_with_its_crop_and_labels(classifier, tmp_path):
    folder = tmp_path / "model"
    assert main(["x", "--format", "timm", "--out", str(folder)]) == 0
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x, want = answers(classifier)
    assert torch.equal(model(x), want)
    found = resolve_model_data_config(model)
    assert found["input_size"] == (3, SIZE, SIZE)
    assert (tuple(found["mean"]), tuple(found["std"])) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert found["crop_pct"] == pytest.approx(SIZE / 72)
    assert found["crop_mode"] == "center"
    about = json.loads((folder / "config.json").read_text())
    assert about["label_names"] == classifier.classes
    assert about["label_descriptions"]["n01440764"] == "tench"
    text = (folder / "README.md").read_text()
    assert "12.500 %" in text
    assert "    import models, timm\n" in text
    assert "must be on `PYTHONPATH`" in text


HUB = """
import sys
import timm, torch
{imports}
model = timm.create_model("hf-hub:me/model", pretrained=True).eval()
torch.save(model(torch.load("images.pt")), "logits.pt")
"""


@pytest.mark.parametrize("kind", ["retoken", "timm"])
def test_uploaded_folder_is_loaded_from_the_hub_by_timm(kind, classifier, tmp_path, monkeypatch):
    """The hub is the cache that huggingface_hub keeps of it, laid out by hand."""
    if kind == "timm":
        torch.manual_seed(0)
        other = timm.create_model("test_efficientnet", num_classes=3).eval()
        classifier = replace(classifier, name="test_efficientnet", model=other)
        monkeypatch.setattr(export, "load_from_args", lambda *_: classifier)
    repository = tmp_path / "home/hub/models--me--model"
    folder = repository / "snapshots" / ("0" * 40)
    folder.parent.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    assert main(["x", "--format", "timm", "--out", str(folder)]) == 0
    x, want = answers(classifier)
    torch.save(x, tmp_path / "images.pt")
    code = HUB.format(imports=f"sys.path.insert(0, {str(ROOT)!r}); import models" if kind == "retoken" else "")
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want, rtol=1e-4, atol=1e-5)


def test_usage_of_a_timm_model_imports_only_timm(classifier, tmp_path, monkeypatch, capsys):
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    other = replace(classifier, name="test_efficientnet", model=model)
    monkeypatch.setattr(export, "load_from_args", lambda *_: other)
    assert main(["x", "--format", "timm", "--out", str(tmp_path / "model")]) == 0
    texts = capsys.readouterr().out, (tmp_path / "model/README.md").read_text()
    assert all("import timm" in text for text in texts)
    assert not any("import models" in text for text in texts)


NET = """
from timm.models import generate_default_cfgs, register_model
from torch import nn
from models.backbone import Backbone, Stage, build_variant, default_cfg

class Net(Backbone):
    def __init__(self, num_classes=1000, in_chans=3, drop_rate=0.0, drop_path_rate=0.0, global_pool="avg"):
        stages = [Stage(nn.Identity() if i == 0 else nn.Conv2d(4, 4, 2, 2), [nn.Identity()]) for i in range(4)]
        stem, neck, dims = nn.Conv2d(in_chans, 4, 4, 4), nn.BatchNorm2d(4), (4, 4, 4, 4)
        super().__init__(stem, stages, neck, dims, 4, num_classes, in_chans, drop_rate, global_pool)

    def to_nchw(self, x):
        return x

default_cfgs = generate_default_cfgs({"net_for_export": default_cfg("stem")})

@register_model
def net_for_export(pretrained=False, **kwargs):
    return build_variant(Net, "net_for_export", pretrained, **kwargs)
"""


def test_custom_model_is_predicted_and_exported_with_its_file(small_cfg, pictures, tmp_path):
    """In processes of their own: none knows what another one registered."""
    (tmp_path / "net.py").write_text(NET)
    module = ["--module", str(tmp_path / "net.py")]
    opts = ("MODEL.MODULE", module[1], "MODEL.NAME", "net_for_export", "MODEL.DROP_PATH_RATE", "0", "TRAIN.EPOCHS", "1")
    run_python("train.py", "--cfg", str(small_cfg), "--output", str(tmp_path), "--opts", *opts)
    weights = str(tmp_path / "small/best_raw.safetensors")
    photograph = str(next((pictures / "val").rglob("*.jpg")))
    without = run_python("-m", "tools.predict", weights, photograph, check=False)
    assert without.returncode == 2
    assert "holds a net_for_export, which neither Retoken nor timm knows; name the file" in without.stderr
    assert "green" in run_python("-m", "tools.predict", weights, photograph, *module).stdout
    folder = tmp_path / "folder"
    done = run_python("-m", "tools.export", weights, "--format", "timm", "--out", str(folder), *module)
    assert "import net, timm; timm.create_model" in done.stdout
    assert "by the file `net.py`" in (folder / "README.md").read_text()


def test_published_file_has_the_authors_names(tmp_path, monkeypatch):
    model = scrambled(timm.create_model(NAME, num_classes=3)).eval()
    loaded = Classifier(NAME, model, EvalTransform(SIZE, 72), (0.5,) * 3, (0.2,) * 3, ["a", "b", "c"], ["a", "b", "c"], {}, "x")  # fmt: skip
    monkeypatch.setattr(export, "load_from_args", lambda *_: loaded)
    path = tmp_path / "theirs.pth"
    assert main(["x", "--format", "published", "--out", str(path)]) == 0
    weights = torch.load(path, weights_only=True)["model"]
    assert torch.equal(weights["conv_stem.proj1.weight"], model.state_dict()["stem.conv1.weight"])
    assert "stem.conv1.weight" not in weights
    assert load_weights(path)[1]["layout"] == "plain"


def test_file_that_computes_something_else_is_not_left_behind(classifier, tmp_path, monkeypatch, capsys):
    def wrong(classifier, model, path):
        path.write_bytes(b"wrong")
        return lambda x: model(x) * 1.001

    monkeypatch.setattr(export, "write_program", wrong)
    with pytest.raises(SystemExit) as stop:
        main(["x", "--format", "torch", "--out", str(tmp_path / "m.pt2")])
    assert stop.value.code == 1
    assert "computes something else" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

    def wrong_folder(classifier, folder):
        folder.mkdir()
        return lambda x: classifier.model(x) + 1

    monkeypatch.setattr(export, "write_timm", wrong_folder)
    with pytest.raises(SystemExit):
        main(["x", "--format", "timm", "--out", str(tmp_path / "m")])
    assert not list(tmp_path.iterdir())


def test_answer_that_is_not_a_number_is_a_difference(classifier):
    with pytest.raises(DifferenceError):
        compare(classifier.model, lambda x: classifier.model(x) * torch.nan, SIZE, 1.0)


def test_fold_that_changes_the_function_is_refused(classifier, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "fold", spoil)
    with pytest.raises(SystemExit) as stop:
        main(["x", "--format", "torch", "--out", str(tmp_path / "m.pt2"), "--fold"])
    assert stop.value.code == 1
    assert "the folded model differs" in capsys.readouterr().err


def spoil(model):
    model.head.weight.data.mul_(1.01)
    return {"head": 1}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--format", "onnx", "--out", "{tmp}/m.pth"], "writes a .onnx file; name it"),
        (["--format", "onnx", "--out", "{tmp}/no/m.onnx"], "there is no folder"),
        (["--format", "timm", "--out", "{tmp}"], "give a new or an empty folder"),
        (["--format", "timm", "--out", "{tmp}/m", "--fold"], "--fold changes the weights"),
        (["--format", "torch", "--out", "{tmp}/m.pt2", "--opset", "18"], "--opset has no effect"),
        (["--format", "onx", "--out", "{tmp}/m.onnx"], "invalid choice"),
    ],
)
def test_mistake_is_an_error_with_a_hint(argv, message, classifier, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["x", *(text.replace("{tmp}", str(tmp_path)) for text in argv)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_package_is_an_error_with_its_install_line(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run pip install onnx onnxscript onnxruntime"):
        export.check_packages("onnx")


def test_model_of_timm_has_no_published_names_and_is_not_folded(classifier, tmp_path, monkeypatch, capsys):
    other = replace(classifier, name="test_efficientnet", model=timm.create_model("test_efficientnet").eval())
    monkeypatch.setattr(export, "load_from_args", lambda *_: other)
    for more, message in (
        (["published", "p.pth"], "has no published names"),
        (["torch", "p.pt2", "--fold"], "does not declare `foldable = True`"),
    ):
        kind, name, *flags = more
        with pytest.raises(SystemExit):
            main(["x", "--format", kind, "--out", str(tmp_path / name), *flags])
        assert message in capsys.readouterr().err
