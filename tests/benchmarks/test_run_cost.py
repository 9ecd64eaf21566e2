"""The arithmetic of benchmarks/run_cost.py, and its table in docs/reproducing.md."""

import pytest

import config
from benchmarks.run_cost import FLOORS, ROOT, cost, format_hours, main, recipes
from models.build import retoken_models
from tests.helpers.documented import commands

PAGE = ROOT / "docs/reproducing.md"


def test_hours_are_those_computed_by_hand():
    c = cost(config.load(str(ROOT / "configs/stvit/small_224.yaml")))
    assert c.training == 300 * 1251 * 1024
    assert c.evaluation == 300 * 50_000 * 2  # raw and EMA
    assert c.hours == pytest.approx((c.training / 8100 + c.evaluation / 25400) / 3600)
    larger = cost(config.load(str(ROOT / "configs/stvit/small_384.yaml")))
    assert larger.training == 30 * 2502 * 512
    assert larger.floor == pytest.approx(8100 * 4.34 / 14.08)


def test_published_mode_trains_sgformer_longer():
    path = str(ROOT / "configs/sgformer/small_224.yaml")
    assert cost(config.load(path, ["RECIPE.MODE", "published"])).training == 310 * 1251 * 1024


def test_every_recipe_and_model_has_a_floor():
    assert len(recipes()) == 2 * len(FLOORS)
    assert set(FLOORS) == set(retoken_models())
    with pytest.raises(ValueError, match="there are floors at 224 and 384"):
        cost(config.load(str(ROOT / "configs/demo.yaml")))


def test_durations_are_written_in_hours_or_days():
    assert [format_hours(hours) for hours in (0.7, 47.9, 48)] == ["0.7 h", "47.9 h", "2.0 d"]


def test_documented_table_is_what_the_program_prints(capsys):
    assert main(["--markdown"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(recipes())
    page = PAGE.read_text().splitlines()
    assert [line for line in (printed[0], *printed[2:]) if line not in page] == []


def test_measured_rate_replaces_the_floor(capsys):
    path = str(ROOT / "configs/stvit/small_224.yaml")
    assert main(["--cfg", path, "--images-per-s", "8100", "--gpus", "2", "--markdown"]) == 0
    cells = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert (cells[3], cells[4], cells[5]) == ("14", "14", "6.8 h")


def test_impossible_share_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--share", "1.5"])
    assert "no run is faster than the floor" in capsys.readouterr().err


@pytest.mark.parametrize("path", recipes(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_has_its_commands_for_1_8_and_16_gpus(path):
    name = str(path.relative_to(ROOT))
    own = [command.words for command in commands(PAGE) if name in command.words and "IMAGENET" in command.words]
    programs = {words[0] for words in own if "eval.py" not in words and "--dry-run" not in words}
    assert programs == {"python", "launch_scripts/torchrun.sh", "sbatch"}
