"""MODEL.MODULE: custom models from files and modules outside the repository."""

import json

import pytest
import timm
from torch import nn

import config
import train as train_script
from models.backbone import Backbone
from models.build import build_model
from models.custom_model import import_models
from tools.compare import main as compare

NET = """
from timm.models import register_model
from torch import nn

@register_model
def {name}(pretrained=False, num_classes=1000, width={width}, **kwargs):
    return nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
"""


def write(path, name, width=4):
    path.write_text(NET.format(name=name, width=width))
    return str(path)


def build(module, name):
    return build_model(config.load((), ["MODEL.MODULE", module, "MODEL.NAME", name]), 7)


def test_file_is_imported_once_and_its_models_are_named(tmp_path):
    file = write(tmp_path / "net.py", "own_once")
    assert import_models(file) == (str(tmp_path / "net.py"), ["own_once"])
    assert import_models(file) == (str(tmp_path / "net.py"), ["own_once"])
    assert build(file, "own_once")[-1].out_features == 7


def test_files_of_one_name_in_two_folders_are_two(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        assert import_models(write(tmp_path / folder / "net.py", f"own_{folder}"))[1] == [f"own_{folder}"]


def test_module_is_found_on_the_path_of_python(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    write(tmp_path / "own_package/net.py", "own_packaged")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_models("own_package.net")[1] == ["own_packaged"]
    assert build("own_package.net", "own_packaged")[-1].out_features == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", r"ModuleNotFoundError: No module named 'no_such_module' \(net\.py, line 1\)"),
        ("\ndef f(:\n", r"SyntaxError: .*\(net\.py, line 2\)"),
        ("x = 1", "registers no model"),
        (NET.format(name="resnet18", width=4), r"Overwriting resnet18 in registry.*\(net\.py, line 5\)"),
    ],
)
def test_file_that_is_no_model_is_refused_with_the_reason(tmp_path, text, message):
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(ValueError, match=rf"MODEL\.MODULE='.*net\.py'.*{message}"):
        import_models(str(tmp_path / "net.py"))
    assert timm.models.model_entrypoint("resnet18").__module__ == "timm.models.resnet"


def test_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be imported: FileNotFoundError: .*nothing\.py does not exist$"):
        import_models(str(tmp_path / "nothing.py"))


def test_key_that_is_neither_file_nor_module_is_refused():
    with pytest.raises(ValueError, match=r"MODEL\.MODULE='mine/net' is neither a file, mine/net\.py, nor a module"):
        config.load((), ["MODEL.MODULE", "mine/net"])


def test_manifest_notes_the_file_and_compare_shows_a_difference(tmp_path, small_cfg, capsys):
    for run, width in (("first", 4), ("second", 5)):
        file = write(tmp_path / f"{run}.py", f"own_{run}", width)
        own = [
            "MODEL.MODULE",
            file,
            "MODEL.NAME",
            f"own_{run}",
            "MODEL.DROP_PATH_RATE",
            "0",
            "TRAIN.EPOCHS",
            "1",
            "NAME",
            run,
        ]
        assert train_script.main(["--cfg", str(small_cfg), "--output", str(tmp_path), "--opts", *own]) == 0
        (start,) = json.loads((tmp_path / run / "manifest.json").read_text())["starts"]
        assert start["model_file"] == file
        assert len(start["model_file_sha256"]) == 64
    capsys.readouterr()
    assert compare([str(tmp_path / "first"), str(tmp_path / "second")]) == 1
    assert "model_file_sha256" in capsys.readouterr().out


BROKEN = """
from timm.models import register_model

@register_model
def {name}(pretrained=False, num_classes=1000, **kwargs):
    first, second = [1]
"""


def test_mistake_in_a_file_is_shown_where_it_is(tmp_path, small_cfg, capsys):
    file = tmp_path / "net.py"
    file.write_text(BROKEN.format(name="own_broken"))
    opts = ["MODEL.MODULE", str(file), "MODEL.NAME", "own_broken", "MODEL.DROP_PATH_RATE", "0"]
    with pytest.raises(SystemExit):
        train_script.main(["--cfg", str(small_cfg), "--output", str(tmp_path), "--dry-run", "--opts", *opts])
    printed = capsys.readouterr().err
    assert "first, second = [1]" in printed
    assert printed.endswith("not enough values to unpack (expected 2, got 1)\n")


def test_backbone_of_other_than_four_stages_is_refused():
    with pytest.raises(ValueError, match=r"Backbone has 1 stages and 2 dims; a Backbone has 4 of each"):
        Backbone(nn.Identity(), [nn.Identity()], nn.Identity(), (8, 8), 8)
