"""tools.compare: the first update at which runs differ, metrics that are not compared, the printed result."""

import io
import json

import pytest
import yaml

import train as train_script
from tools import compare
from tools.compare import main
from tools.terminal import Screen

START = {
    "commit": "a" * 40,
    "changed_files": 0,
    "processes": 1,
    "device": "cpu",
    "packages": {"torch": "2.11.0", "timm": "1.0.31"},
}
CONFIG = {"OPTIM": {"LR": 0.001}, "AUG": {"SCALE": [0.08, 1.0]}, "TAG": ""}


def train_row(update, loss=2.0, **changes):
    numbers = {"loss": loss, "epoch_loss": loss + 0.1, "grad_norm": 1.5, "lr": 1e-3}
    rates = {"images_per_s": 100.0 + update, "data_share": 0.1}
    place = {"kind": "train", "epoch": (update - 1) // 10, "update": update, "update_in_epoch": (update - 1) % 10 + 1}
    return place | numbers | rates | changes


def eval_row(update, weights="raw", top1=50.0, **changes):
    place = {"kind": "eval", "weights": weights, "epoch": update // 10 - 1, "update": update}
    numbers = {"top1": top1, "top5": 90.0, "loss": 1.0, "correct1": int(2 * top1), "correct5": 180, "images": 200}
    return place | numbers | {"best": True, "seconds": 3.0 + update} | changes


def rows(every=5, until=20, loss=lambda update: 3 - update / 20):
    found = []
    for update in range(every, until + 1, every):
        found.append(train_row(update, loss(update)))
        if update % 10 == 0:
            found += [eval_row(update, which, 40 + update) for which in ("raw", "ema")]
    return found


def write(path, lines, config=CONFIG, start=START, **metadata):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = {"model": "m", "seed": 0, "data": {"train": 48, "classes": 3}, **metadata, "starts": [START | start]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def a(tmp_path):
    return write(tmp_path / "runs/a", rows())


def run(capsys, *argv):
    status = main([str(v) for v in argv])
    return status, capsys.readouterr().out


def changed(lines, update, kind, **numbers):
    return [row | numbers if (row["update"], row["kind"]) == (update, kind) else row for row in lines]


def test_same_numbers_are_identical_whatever_the_rates(a, tmp_path, capsys):
    other = [row | {key: 7.0 for key in ("images_per_s", "data_share", "seconds") if key in row} for row in rows()]
    status, out = run(capsys, a, write(tmp_path / "b", other))
    assert status == 0
    assert "identical through update 20" in out.splitlines()[-1]
    assert "compared 4 training rows and 4 evaluations, to update 20" in out
    assert "config" not in out


def test_runs_part_at_the_first_training_row_that_differs(a, tmp_path, capsys):
    other = changed(changed(rows(), 15, "train", loss=2.0, lr=2e-3), 20, "train", loss=9.0)
    status, out = run(capsys, a, write(tmp_path / "b", other))
    assert status == 1
    assert out.splitlines()[-1].endswith("b: part at update 15: loss 2.25 vs 2; the same through update 10")
    cells = [line.split() for line in out.splitlines()]
    assert ["first", "update", "15", "train", "loss", "2.25", "2", "0.11"] in cells
    assert ["first", "update", "15", "train", "lr", "0.001", "0.002", "0.5"] in cells
    assert ["largest", "of", "loss", "update", "20", "train", "loss", "2", "9", "0.78"] in cells


def test_smallest_difference_counts_and_is_printed(a, tmp_path, capsys):
    status, out = run(capsys, a, write(tmp_path / "b", changed(rows(), 5, "train", loss=2.7500000000000004)))
    assert status == 1
    assert "part at update 5: loss 2.75 vs 2.7500000000000004" in out


def test_evaluation_alone_can_part(a, tmp_path, capsys):
    status, out = run(capsys, a, write(tmp_path / "b", changed(rows(), 20, "eval", top1=61.0, correct1=122)))
    assert status == 1
    assert "part at update 20: eval raw top1 60 vs 61; the same through update 15" in out
    assert "raw top-1  60.000 (epoch 2)  61.000 (epoch 2)" in out


def test_training_row_comes_before_the_evaluation_of_the_same_update(a, tmp_path, capsys):
    other = changed(changed(rows(), 10, "train", grad_norm=1.6), 10, "eval", loss=0.5)
    assert "part at update 10: grad_norm 1.5 vs 1.6" in run(capsys, a, write(tmp_path / "b", other))[1]


@pytest.mark.parametrize(("tolerance", "status"), [("1e-2", 0), ("1e-4", 1)])
def test_tolerance_is_relative(a, tmp_path, capsys, tolerance, status):
    b = write(tmp_path / "b", changed(rows(), 10, "train", lr=1.001e-3))
    found, out = run(capsys, a, b, "--tolerance", tolerance)
    assert found == status
    assert ("within 0.01 throughout, to update 20; the largest difference is 0.001" in out) == (status == 0)


def test_loss_that_is_not_finite_parts_from_one_that_is(a, tmp_path, capsys):
    b = write(tmp_path / "b", changed(rows(), 10, "train", loss=None))
    status, out = run(capsys, a, b, "--tolerance", "0.9")
    assert status == 1
    assert "part at update 10: loss 2.5 vs -" in out
    assert run(capsys, b, b)[0] == 0


def test_runs_of_other_length_are_compared_as_far_as_both_go(a, tmp_path, capsys):
    status, out = run(capsys, a, write(tmp_path / "b", rows(until=15)))
    assert status == 0
    assert "identical through update 15" in out
    assert "goes to update 20" in out
    assert "other intervals" not in out


def test_rows_at_other_intervals_are_compared_where_they_mean_the_same(a, tmp_path, capsys):
    b = write(tmp_path / "b", [row | ({"loss": 9.0} if row["kind"] == "train" else {}) for row in rows(every=10)])
    status, out = run(capsys, a, b)
    assert status == 0  # loss is the mean since the row before, of other updates; epoch_loss agrees
    assert "rows at other intervals: 2 updates in common, loss and grad_norm compared at 0 of them" in out
    status, out = run(capsys, a, write(tmp_path / "c", changed(rows(every=10), 20, "train", epoch_loss=9.0)))
    assert status == 1
    assert "part at update 20: epoch_loss 2.1 vs 9" in out


def test_epoch_loss_of_epochs_of_other_length_is_not_compared(a, tmp_path, capsys):
    other = [row | {"update_in_epoch": 1, "epoch": row["update"], "epoch_loss": 9.0} for row in rows()]
    assert run(capsys, a, write(tmp_path / "b", other))[0] == 0


def test_settings_and_facts_that_differ_are_listed(a, tmp_path, capsys):
    config = CONFIG | {"OPTIM": {"LR": 0.1}}
    start = {"commit": "b" * 40, "changed_files": 2, "device": "H200", "packages": {"torch": "2.12.0"}}
    b = write(tmp_path / "b", rows(), config, start, seed=1, data={"train": 50, "classes": 3})
    out = run(capsys, a, b)[1]
    assert "OPTIM.LR: 0.001 -> 0.1" in out
    assert "SCALE" not in out
    found = {line.split("  ")[1].strip() for line in out.splitlines() if line.startswith("  ")}
    assert {"commit", "device", "torch", "timm", "seed", "data.train"} <= found
    assert not {"data.classes", "processes", "model"} & found
    assert "bbbbbbbbbb + 2 changed files" in out


def test_starts_of_a_continued_run_are_listed_in_order(a, tmp_path, capsys):
    b = write(tmp_path / "b", rows())
    manifest = json.loads((tmp_path / "b/manifest.json").read_text())
    manifest["starts"] += [START | {"processes": 8}, START | {"processes": 8}]
    (tmp_path / "b/manifest.json").write_text(json.dumps(manifest))
    assert ["processes", "1", "1", "then", "8"] in [line.split() for line in run(capsys, a, b)[1].splitlines()]


def test_best_is_the_first_of_the_highest(tmp_path, capsys):
    lines = [eval_row(update, top1=top1) for update, top1 in ((10, 50.0), (20, 70.0), (30, 70.0), (40, 60.0))]
    a = write(tmp_path / "a", lines)
    assert "raw top-1  70.000 (epoch 2)  50.000 (epoch 1)" in run(capsys, a, write(tmp_path / "b", lines[:1]))[1]


def test_every_run_is_compared_with_the_first(a, tmp_path, capsys):
    b, c = write(tmp_path / "b", rows()), write(tmp_path / "c", changed(rows(), 5, "train", lr=0.5))
    status, out = run(capsys, a, b, c)
    assert status == 1
    summaries = [line for line in out.splitlines() if line.startswith(a)]
    assert [("identical" in v, "part at update 5" in v) for v in summaries] == [(True, False), (False, True)]


def test_json_holds_the_whole_comparison(a, tmp_path, capsys):
    b = write(tmp_path / "b", changed(rows(), 15, "train", loss=None))
    status, out = run(capsys, a, b, "--json")
    assert status == 1
    (found,) = json.loads(out)["comparisons"]
    assert (found["same"], found["through"], found["rows"]) == (False, 20, {"train": 4, "eval": 4})
    first = {"update": 15, "where": "train", "name": "loss", "a": 2.25, "b": None, "relative": None}
    assert found["parting"] == {"train": [first], "eval": []}
    assert found["best"]["ema"][1] == {"top1": 60, "epoch": 2, "update": 20}


def test_markdown_is_tables(a, tmp_path, capsys):
    out = run(capsys, a, write(tmp_path / "b", rows(), CONFIG | {"TAG": "x|y"}), "--markdown")[1]
    assert "### best\n\n|  | a | b |\n| --- | --- | --- |\n| raw top-1 | 60.000 (epoch 2) |" in out
    assert "TAG: '' -> 'x\\|y'" in out
    assert "**" in out.splitlines()[-2]


def test_terminal_gets_tables_and_colour(a, tmp_path, capsys, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(compare, "Screen", lambda **k: Screen(file=screen, force_terminal=True, width=120, **k))
    assert main([a, write(tmp_path / "b", rows(), CONFIG | {"TAG": "[bold]"})]) == 0
    assert "━" in screen.getvalue()
    assert "[bold]" in screen.getvalue()


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main([str(v) for v in argv])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_compared_is_a_message_with_near_names(a, tmp_path, capsys):
    text = fails(capsys, a, tmp_path / "runs/aa")
    assert "runs/aa does not exist" in text
    assert f"runs near it: {a}" in text
    (tmp_path / "runs/empty").mkdir()
    assert "holds no metrics.jsonl" in fails(capsys, a, tmp_path / "runs/empty")
    (tmp_path / "runs/empty/metrics.jsonl").touch()
    text = fails(capsys, a, tmp_path / "runs/empty")
    assert "no rows yet" in text
    assert a in text
    assert "no common update (5, 10, 15, ... 20; 7)" in fails(capsys, a, write(tmp_path / "b", [train_row(7)]))
    assert "alone" in fails(capsys, a)
    assert "--tolerance -1.0" in fails(capsys, a, a, "--tolerance", "-1")
    assert "did you mean --tolerance" in fails(capsys, a, a, "--tolerence", "1")


def test_row_cut_off_by_a_crash_is_left_out_but_a_damaged_one_is_an_error(a, tmp_path, capsys):
    path = tmp_path / "b/metrics.jsonl"
    b = write(tmp_path / "b", rows(until=10))
    path.write_text(path.read_text() + '{"kind": "tra')
    assert run(capsys, a, b)[0] == 0
    path.write_text('{"kind": "tra\n' + path.read_text())
    assert "line 1 is no row" in fails(capsys, a, b)


def test_directories_of_train_are_compared(tmp_path, capsys):
    cfg = tmp_path / "small.yaml"
    cfg.write_text("""
NAME: small
DEVICE: cpu
MODEL: {NAME: test_efficientnet}
DATA: {LOADER: synthetic, IMG_SIZE: 32, SYNTHETIC_TRAIN: 16, SYNTHETIC_VAL: 4, SYNTHETIC_CLASSES: 3}
TRAIN: {EPOCHS: 2, GLOBAL_BATCH: 8, MICRO_BATCH: 8, AMP: "off"}
SCHEDULE: {WARMUP_EPOCHS: 0}
LOG: {EVERY: 1, TENSORBOARD: false}
""")
    for tag, opts in (("a", []), ("b", ["LOG.EVERY", "2"]), ("c", ["OPTIM.LR", "1e-2"])):
        argv = ["--cfg", str(cfg), "--output", str(tmp_path / "out"), "--tag", tag, "--opts", *opts]
        assert train_script.main(argv) == 0
    capsys.readouterr()
    a, b, c = (tmp_path / f"out/small-{tag}" for tag in "abc")
    status, out = run(capsys, a, b)
    assert status == 0
    assert "LOG.EVERY: 1 -> 2" in out
    assert "identical through update 4" in out
    status, out = run(capsys, a, c)
    assert status == 1
    assert "part at update 1: lr 0.001 vs 0.01" in out
