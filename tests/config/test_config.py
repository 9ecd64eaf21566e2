"""The schema, YAML files, options and flags, and the messages of errors."""

import re
from pathlib import Path

import pytest

import config
from config import command_line
from config.merge import OF_ANY_LENGTH

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "_base_" not in p.parts)


def write(path: Path, text: str) -> str:
    path.write_text(text, errors="surrogateescape")
    return str(path)


def message(*args, **kwargs) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        config.load(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_config_loads_and_states_its_command(path):
    cfg = config.load(str(path))
    assert cfg.is_frozen()
    assert path.stem.split("_")[0] in cfg.MODEL.NAME or path.stem == "demo"
    assert str(path.relative_to(ROOT)) in path.read_text() or path.stem == "demo"


def test_every_key_has_a_comment():
    lines = (ROOT / "config/schema.py").read_text().splitlines()
    declared = [i for i, line in enumerate(lines) if re.match(r"_C\.[A-Z_.0-9]+ = (?!CfgNode)", line)]
    assert len(declared) == len(config.keys(config.defaults()))
    for i in declared:
        above = [lines[j] for j in range(i - 1, max(0, i - 8), -1)]
        block = next(line for line in above if not line.startswith("_C.") or "CfgNode()" in line)
        assert block.startswith("#"), f"no comment above {lines[i]}"


def test_every_ranged_and_chosen_key_exists():
    known = set(config.keys(config.defaults()))
    assert set(config.RANGES) | set(config.CHOICES) <= known


def test_numeric_keys_without_a_range_are_the_unbounded_ones():
    cfg = config.defaults()
    numbers = {k for k in config.keys(cfg) if type(config.get(cfg, k)) in (int, float, list) and k != "BASE"}
    free = numbers - set(config.RANGES)
    assert free == set()


def test_base_list_later_wins_and_file_wins_over_bases(tmp_path):
    write(tmp_path / "a.yaml", "TRAIN: {EPOCHS: 1, SEED: 1}\nTAG: a\nSCHEDULE: {WARMUP_EPOCHS: 0}\n")
    write(tmp_path / "b.yaml", "TRAIN: {EPOCHS: 2, SEED: 2}\n")
    cfg = config.load(write(tmp_path / "c.yaml", "BASE: [a.yaml, b.yaml]\nTRAIN: {SEED: 3}\n"))
    assert (cfg.TAG, cfg.TRAIN.EPOCHS, cfg.TRAIN.SEED) == ("a", 2, 3)
    assert config.load(str(tmp_path / "c.yaml"), ["TRAIN.SEED", "4"]).TRAIN.SEED == 4


def test_base_is_relative_to_its_file(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.yaml", "TAG: a\n")
    assert config.load(write(tmp_path / "sub" / "b.yaml", "BASE: ../a.yaml\n")).TAG == "a"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_dump_loads_back_to_the_same_config(path, tmp_path):
    cfg = config.load(str(path), ["OPTIM.LR", "3", "TAG", "007", "AUG.SCALE", "[0.1, 1]"])
    assert config.load(write(tmp_path / "dump.yaml", config.dump(cfg))) == cfg


def test_int_and_exponent_are_accepted_for_floats(tmp_path):
    cfg = config.load(write(tmp_path / "a.yaml", "OPTIM: {LR: 1e-3, WEIGHT_DECAY: 1, BETAS: [0, 0.9]}\n"))
    assert (cfg.OPTIM.LR, cfg.OPTIM.WEIGHT_DECAY, cfg.OPTIM.BETAS) == (1e-3, 1.0, [0.0, 0.9])
    assert isinstance(cfg.OPTIM.WEIGHT_DECAY, float)


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        (["TRAIN.EPOHCS", "3"], ["TRAIN.EPOHCS", "TRAIN.EPOCHS", "--opts"]),
        (["EPOCHS", "3"], ["unknown key EPOCHS", "TRAIN.EPOCHS"]),
        (["TRAIN", "3"], ["unknown key TRAIN "]),
        (["TRAIN.EPOCHS"], ["TRAIN.EPOCHS", "no value"]),
        (["TRAIN.EPOCHS", "3.5"], ["TRAIN.EPOCHS", "int", "3.5"]),
        (["TRAIN.EPOCHS", "true"], ["TRAIN.EPOCHS", "int", "True"]),
        (["LOG.TENSORBOARD", "1"], ["LOG.TENSORBOARD", "bool", "1"]),
        (["OPTIM.LR", "fast"], ["OPTIM.LR", "float", "fast"]),
        (["OPTIM.LR", "true"], ["OPTIM.LR", "float", "True"]),
        (["OPTIM.LR", "-1"], ["OPTIM.LR", "between 0", "-1"]),
        (["OPTIM.LR", "nan"], ["OPTIM.LR", "nan"]),
        (["OPTIM.BETAS", "0.9"], ["OPTIM.BETAS", "list of numbers, e.g."]),
        (["AUG.SCALE", "[0.9]"], ["AUG.SCALE", "list of 2"]),
        (["SCHEDULE.UNIT", "epoch", "SCHEDULE.WARMUP_EPOCHS", "0.5"], ["WARMUP_EPOCHS=0.5", "UNIT update"]),
        (["OPTIM.SCALE_BATCH", "512", "TRAIN.GLOBAL_BATCH", "4"], ["SCHEDULE.MIN_LR=1e-05", "OPTIM.LR=7.8125e-06"]),
        (["AUG.SCALE", "[1.0, 0.1]"], ["AUG.SCALE", "smallest"]),
        (["TRAIN.AMP", "fp32"], ["TRAIN.AMP", "bf16, fp16, off", "fp32"]),
        (["DATA.INTERPOLATION", "bicubc"], ["did you mean bicubic"]),
        (["TRAIN.EPOCHS=3", "TRAIN.SEED", "1"], ["write TRAIN.EPOCHS 3"]),
        (["OPTIM.NAME", "adamv"], ["OPTIM.NAME", "did you mean adam"]),
        (["DATA.MEAN", "[.nan, 0, 0]"], ["DATA.MEAN", "nan"]),
        (["DATA.STD", "[58, 57, 57]"], ["DATA.STD", "58"]),
        (["OPTIM.LR", "1e-6"], ["SCHEDULE.MIN_LR", "OPTIM.LR"]),
        (["SCHEDULE.SCALED", "true"], ["SCHEDULE.SCALED", "OPTIM.SCALE_BATCH"]),
        (["NAME", ".."], ["NAME"]),
        (["TRAIN.MICRO_BATCH", "1"], ["AUG.MIX_PROB"]),
        (["TRAIN.EPOCHS", "3"], ["SCHEDULE.WARMUP_EPOCHS=20", "TRAIN.EPOCHS=3"]),
        (["DATA.EVAL_RESIZE", "200"], ["DATA.EVAL_RESIZE=200", "224", "256"]),
        (["DATA.LOADER", "synthetic", "MODEL.NUM_CLASSES", "7"], ["7", "DATA.SYNTHETIC_CLASSES=1000"]),
        (["DATA.DALI_DEVICE", "cpu"], ["DATA.DALI_DEVICE=cpu has no effect", "set DATA.LOADER to dali"]),
        (["DATA.LOADER", "dali", "EVAL.MODE", "border"], ["EVAL.MODE=border", "set DATA.LOADER to torch"]),
        (["TAG", "a/b"], ["TAG", "a/b"]),
    ],
)
def test_error_names_key_value_and_remedy(opts, parts):
    text = message((), opts)
    for part in parts:
        assert part in text, text


def test_unknown_key_in_file_names_file_and_nearest(tmp_path):
    path = write(tmp_path / "a.yaml", "OPTIM: {LEARNING_RATE: 1}\n")
    assert "OPTIM.LEARNING_RATE" in message(path)
    assert path in message(path)
    assert "is a section" in message(write(tmp_path / "b.yaml", "TRAIN: 3\n"))
    assert "did you mean MODEL? " in message(write(tmp_path / "c.yaml", "MODLE: {NAME: resnet18}\n"))
    assert "did you mean TRAIN.EPOCHS? " in message(write(tmp_path / "d.yaml", "EPOCHS: 3\n"))


def test_unquoted_yaml_words_are_explained(tmp_path):
    assert "quotes" in message(write(tmp_path / "a.yaml", "TRAIN: {AMP: off}\n"))


def test_folder_as_config_is_named(tmp_path):
    assert "is a folder" in message(str(tmp_path))


def test_missing_file_and_missing_base_are_named(tmp_path):
    write(tmp_path / "tiny_224.yaml", "")
    assert "tiny_224.yaml" in message(str(tmp_path / "tiny_242.yaml"))
    assert "named by BASE in" in message(write(tmp_path / "a.yaml", "BASE: nothing.yaml\n"))


def test_circular_base_is_refused(tmp_path):
    write(tmp_path / "a.yaml", "BASE: b.yaml\n")
    assert "includes itself" in message(write(tmp_path / "b.yaml", "BASE: a.yaml\n"))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "x", "BASE: 3", "BASE: [3]", "TRAIN: {}\nTRAIN: {}", "TAG: \udcff"])
def test_file_that_is_no_mapping_is_refused(tmp_path, text):
    assert "a.yaml" in message(write(tmp_path / "a.yaml", text))


def test_flags_set_their_keys():
    argv = "--cfg configs/demo.yaml --data-path D --batch-size 16 --output O --tag T --init I --amp off --seed 7"
    cfg = command_line.resolve(command_line.train_parser().parse_args(argv.split()), command_line.TRAIN_FLAGS)
    assert (cfg.DATA.PATH, cfg.TRAIN.MICRO_BATCH, cfg.OUTPUT, cfg.TAG) == ("D", 16, "O", "T")
    assert (cfg.MODEL.INIT, cfg.TRAIN.AMP, cfg.TRAIN.SEED) == ("I", "off", 7)
    assert config.run_name(cfg) == "demo-T"


def test_opts_given_twice_add_up():
    argv = "--cfg configs/demo.yaml --opts TRAIN.SEED 1 --opts TRAIN.EPOCHS 9 --batch-size x"
    args = command_line.train_parser().parse_args(argv.split())
    assert args.opts == ["TRAIN.SEED", "1", "TRAIN.EPOCHS", "9"]
    with pytest.raises(ValueError, match=r"TRAIN\.MICRO_BATCH in --batch-size must be int"):
        command_line.resolve(args, command_line.TRAIN_FLAGS)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [(["--bach-size", "3"], "--batch-size"), (["--data", "x"], "--data-path"), (["--lr=1"], "--"), (["x"], "--opts")],
)
def test_unknown_flag_is_an_error_with_a_suggestion(argv, hint, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.train_parser().parse_args(["--cfg", "a", *argv])
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


def test_flag_and_opts_for_one_key_are_refused():
    args = command_line.train_parser().parse_args(
        ["--cfg", "configs/demo.yaml", "--seed", "1", "--opts", "TRAIN.SEED", "2"]
    )
    with pytest.raises(ValueError, match="same key"):
        command_line.resolve(args, command_line.TRAIN_FLAGS)


def test_run_name_follows_model_and_size():
    assert (
        config.run_name(config.load(str(ROOT / "configs/groupmixformer/mobile_64.yaml"))) == "groupmixformer_mobile_64"
    )


def test_unexpected_error_is_shown_with_its_traceback(capsys):
    parser = command_line.train_parser()
    raised = lambda: config.load((), ["TRAIN", "3"])  # noqa: E731
    for broken, shown in ((raised, False), (lambda: int("x"), True), (lambda: Path("a").relative_to("b"), True)):
        try:
            broken()
        except ValueError as error:
            with pytest.raises(SystemExit):
                parser.fail(error)
        assert ("Traceback" in capsys.readouterr().err) == shown


def test_list_of_any_length_is_replaced_by_one_of_another_length(tmp_path):
    file = write(tmp_path / "a.yaml", "OPTIM: {BETAS: [0.9, 0.99]}\nSCHEDULE: {MILESTONES: [30, 60]}\n")
    cfg = config.load(file, ["OPTIM.BETAS", "[]", "SCHEDULE.MILESTONES", "[1, 2, 3]"])
    assert (cfg.OPTIM.BETAS, cfg.SCHEDULE.MILESTONES) == ([], [1.0, 2.0, 3.0])
    empty = {key for key in config.keys(config.defaults()) if config.get(config.defaults(), key) == []}
    assert empty == set(OF_ANY_LENGTH)
