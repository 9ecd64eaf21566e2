"""MODEL.MODULE: custom models from files and modules outside the repository."""

import contextlib
import json
from pathlib import Path

import pytest
import timm
from torch import nn

import config
import eval as eval_script
import train as train_script
from models.backbone import Backbone
from models.build import build_model
from models.custom_model import describe_module, digest, import_models
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


SPY = """
print("the program runs")
"""


def named_by(tmp_path, small_cfg, marker):
    """Write a program, and a config that names it in a folder with the marker file of a run directory; return both."""
    folder = tmp_path / "received"
    folder.mkdir()
    program = Path(write(folder / "net.py", "own_received"))
    program.write_text(SPY + program.read_text())
    if marker == "PUBLISHED":
        text = config.dump(config.load(str(small_cfg), ["MODEL.MODULE", str(program), "MODEL.NAME", "own_received"]))
    else:
        text = f"BASE: {small_cfg}\nMODEL: {{MODULE: {program}, NAME: own_received, DROP_PATH_RATE: 0}}\n"
        (folder / marker).write_text("")
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml", program


@pytest.mark.parametrize("marker", ["manifest.json", "metrics.jsonl", "best_raw.safetensors", "PUBLISHED"])
def test_program_named_by_a_run_directory_runs_only_if_the_command_names_it(tmp_path, small_cfg, marker):
    received, program = named_by(tmp_path, small_cfg, marker)
    own = tmp_path / "own.yaml"
    own.write_text(f"BASE: {received}\n")
    for file in (received, own):
        with pytest.raises(ValueError, match=rf"MODEL\.MODULE='{program}' in {received}: .* --opts MODEL\.MODULE FILE"):
            config.load(str(file))
        for given in (str(program), ""):
            assert given == config.load(str(file), ["MODEL.MODULE", given]).MODEL.MODULE
        assert str(program) == config.load(str(file), run_code=False).MODEL.MODULE
    own.write_text(f"BASE: {received}\nMODEL: {{MODULE: mine/net.py}}\n")
    assert config.load(str(own)).MODEL.MODULE == "mine/net.py"


def test_refused_program_does_not_run_and_an_accepted_one_is_announced_before(tmp_path, small_cfg, capsys):
    received, program = named_by(tmp_path, small_cfg, "manifest.json")
    evaluate = ["--checkpoint", str(tmp_path / "none.pt")]
    for script, more in ((train_script, ["--dry-run"]), (eval_script, evaluate)):
        argv = ["--cfg", str(received), *more]
        with pytest.raises(SystemExit):
            script.main(argv)
        shown = capsys.readouterr()
        assert "names a program, which would run with your rights" in shown.err
        assert "the program runs" not in shown.out
        with contextlib.suppress(SystemExit):
            script.main([*argv, "--opts", "MODEL.MODULE", str(program)])
        announced = shown = capsys.readouterr().out
        assert f"MODEL.MODULE: running {program} (SHA-256 {digest(str(program))})" in " ".join(shown.split())
        if script is train_script:
            assert announced.index("MODEL.MODULE: running") < announced.index("the program runs")


def test_description_of_a_module_imports_nothing(tmp_path, monkeypatch):
    package = tmp_path / "spied_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemError")
    monkeypatch.syspath_prepend(tmp_path)
    assert describe_module("spied_package.net") == f"the module spied_package.net of {package / '__init__.py'}"
    assert describe_module("no_such_package.net") == "the module no_such_package.net"
    assert describe_module("__main__").startswith("the module __main__")
    assert describe_module(str(tmp_path / "none.py")) == str(tmp_path / "none.py")
