"""The page about runs: complete, self-contained, well-formed, and without a complaint in a real browser."""

import html.parser
import json
import re
from pathlib import Path

import pytest
import yaml

import config
from engine.checkpoint.run_directory import RunDirectory
from tests.helpers.small_runs import run_here
from tools import report
from tools.browser import MISSING, document, find_browser, screenshot
from tools.published_results import TOP1
from tools.run_info import RunInfo

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "img", "input", "br", "hr"}


@pytest.fixture(scope="module")
def trained(small_cfg, tmp_path_factory):
    """A complete run."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_here(small_cfg, folder, "LOG.EVERY", 1) == 0
    return folder / "small"


def made_up(folder, updates=20, lr=1e-3, **data):
    """Write a run directory of the third epoch with every kind of warning; return it."""
    folder.mkdir()
    cfg = config.defaults()
    cfg.MODEL.NAME, cfg.NAME, cfg.TRAIN.EPOCHS, cfg.OPTIM.LR = "stvit_small", "</script><b>evil</b>", 5, lr
    (folder / "config.yaml").write_text(config.dump(cfg))
    start = {"time": "2026-11-01T10:00:00+0000", "update": 0, "device": "NVIDIA H200", "packages": {"torch": "2.15.0"}}
    manifest = {"model": "stvit_small", "num_classes": 1000, "parameters": 25_500_000, "data": data, "starts": [start]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows = []
    for update in range(1, updates + 1):
        train = {"kind": "train", "epoch": (update - 1) // 8, "update": update, "update_in_epoch": (update - 1) % 8 + 1}
        loss = None if update == 7 else 7.0 / update
        rates = {"lr": lr, "grad_norm": 1.5, "images_per_s": 2000.0 + update, "data_share": 0.01}
        rows.append({**train, "loss": loss, **rates, "skipped_in_run": 3, "overflows_in_run": 1})
        if update % 8 == 0:
            counts = {"correct1": 30_000 + update, "correct5": 40_000, "images": 50_000, "loss": 1.25}
            shares = {"top1": counts["correct1"] / 500, "top5": 80.0}
            which = {"kind": "eval", "weights": "raw", "epoch": update // 8 - 1, "update": update}
            rows.append({**which, **counts, **shares, "best": True})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "log.txt").write_text(
        "10:00:01 warning: the model waits for data 12% of the time\n10:00:02 epoch 1/5\n"
        "10:00:03 warning: the model waits for data 55% of the time\n10:00:04 warning: <i>odd</i> name\n"
    )
    bad = {"path": "train/n01440764/x.JPEG", "reason": "cannot be decoded", "replaced_by": "y", "index": 3}
    (folder / "bad_images.jsonl").write_text(json.dumps(bad) + "\n" + '{"path": "cut o')
    return folder


IMAGENET = {"classes": 1000, "train": 1_281_167, "val": 50_000}


class Checker(html.parser.HTMLParser):
    """HTML parser that fails where tags do not nest, and keeps addresses and ids."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href", "action", "srcset", "data") if name in found]
        self.ids += [found["id"]] if "id" in found else []

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing, {self.getpos()}"
        assert self.open.pop() == tag, self.getpos()


def written(*runs):
    """Return the page about runs after checks that tags nest and that it loads nothing from elsewhere."""
    page = report.render([RunInfo.read(run) for run in runs])
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert [address for address in checker.addresses if not address.startswith("data:")] == []
    outside = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'<]*", re.sub(r"data:[^\"]+", "", page)))
    assert outside <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    return page


def numbers(page):
    """Return the data of the curves."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_page_holds_all_numbers(trained):
    page = written(trained)
    (data,) = numbers(page)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    counted = 0
    for row in rows:
        columns = data["train"] if row["kind"] == "train" else data["evals"][row["weights"]]
        place = columns["update"].index(row["update"])
        for name in row.keys() - {"kind", "weights"}:
            assert columns[name][place] == row[name]
            counted += 1
    assert counted == sum(len(values) for values in data["train"].values()) + sum(
        len(values) for columns in data["evals"].values() for values in columns.values()
    )
    assert data["updates_per_epoch"] == 6


def test_page_lists_config_and_environment(trained):
    page = written(trained)
    metadata = RunInfo.read(trained)
    best = max(row["top1"] for row in metadata.run.evals.values() if row["weights"] == "raw")
    for expected in (
        *(">complete<", "3 / 3", f"{best:.3f}", "update 18 of 18", "blue, green, red", "test_efficientnet"),
        *("TRAIN.GLOBAL_BATCH", "data:image/png;base64,", "The first batch", "log.txt", "best_ema.safetensors"),
    ):
        assert expected in page, expected
    assert metadata.starts[0]["packages"]["torch"] in page


def test_page_shows_a_run_in_which_things_went_wrong(tmp_path):
    run = made_up(tmp_path / "run", **IMAGENET)
    (run / "diverged.json").write_text(json.dumps({"error": "10 updates in a row", "went_back_to": "update-8.pt"}))
    page = written(run)
    for expected in (
        *("stopped", "2.5 / 5", "update 20 of 40", "n01440764/x.JPEG", "cannot be decoded", "10 updates in a row"),
        *(
            "2 kinds of warning",
            "55% of the time",
            "&lt;i&gt;odd&lt;/i&gt;",
            "skipped updates",
            "went back to update-8.pt",
        ),
        *("60.032", "30,016 of 50,000", "-23.57 to the published 83.6"),
    ):
        assert expected in page, expected
    assert "12% of the time: " not in page
    assert "<b>evil</b>" not in page
    assert numbers(page)[0]["published"] == 83.6
    assert numbers(page)[0]["train"]["loss"][6] is None


def test_other_data_have_no_published_figure(tmp_path):
    assert RunInfo.read(made_up(tmp_path / "run", **IMAGENET | {"train": 5000})).published is None
    assert RunInfo.read(made_up(tmp_path / "other", **IMAGENET, synthetic=True)).published is None


def test_published_figures_are_those_of_the_recipes():
    stated = {}
    for path in (ROOT / "configs").glob("*/*_[0-9]*.yaml"):
        if found := re.search(r"^# Published top-1 (\d+\.\d+)", path.read_text(), re.M):
            model, size = f"{path.parent.name}_{path.stem}".rsplit("_", 1)
            stated[model, int(size)] = float(found[1])
    assert stated == TOP1


def test_status_follows_the_run(tmp_path):
    run = made_up(tmp_path / "run")
    assert RunInfo.read(run).status == "stopped"
    (run / "preempted").touch()
    assert RunInfo.read(run).status == "interrupted"
    training = RunDirectory(run, keep=1)
    training.lock()
    assert RunInfo.read(run).status == "running"
    assert re.search(r"update 20 of 40; last row \d+ seconds ago; about 10 seconds of training left", written(run))
    training.unlock()
    assert RunInfo.read(run).status == "interrupted"
    (run / "done").touch()
    assert RunInfo.read(run).status == "complete"


@pytest.mark.parametrize("metrics", [None, "", '{"kind": "tr'])
def test_a_run_that_has_just_begun_has_a_page(tmp_path, metrics):
    run = made_up(tmp_path / "run", **IMAGENET)
    (run / "metrics.jsonl").unlink()
    if metrics is not None:
        (run / "metrics.jsonl").write_text(metrics)
    page = written(run)
    assert "0 / 5" in page
    assert "update 0 of" in page


def test_damaged_picture_is_named_and_the_others_are_shown(tmp_path, trained):
    run = made_up(tmp_path / "run")
    (run / "pictures").mkdir()
    whole = (trained / "pictures" / "first_batch.png").read_bytes()
    for name, content in (("first_batch", whole), ("1_cut", whole[:500]), ("2_empty", b"")):
        (run / "pictures" / f"{name}.png").write_bytes(content)
    page = written(run)
    assert page.count("<figure") == 1
    assert f"Not shown, damaged or too large: {run}/pictures/1_cut.png, {run}/pictures/2_empty.png." in page


@pytest.mark.parametrize(
    "row", ['{"kind": "eval", "update": 4, "epoch": 0, "weights": "raw"}', '{"kind": "train", "update": 4}']
)
def test_a_row_that_lacks_its_numbers_is_named(tmp_path, row, capsys):
    run = made_up(tmp_path / "run")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([rows[0], row, *rows[1:]]))
    with pytest.raises(SystemExit):
        report.main([str(run)])
    assert "metrics.jsonl, line 2 is no row of metrics" in capsys.readouterr().err


def test_large_counts_can_be_read(tmp_path):
    page = written(made_up(tmp_path / "run", **IMAGENET))
    assert '<td class="break">25,500,000</td>' in page
    assert '<td class="break">1,281,167</td>' in page


def test_runs_are_shown_side_by_side(tmp_path, trained):
    runs = [made_up(tmp_path / "a"), made_up(tmp_path / "b", updates=24, lr=5e-4), trained]
    page = written(*runs)
    assert [run["name"] for run in numbers(page)] == ["a", "b", "small"]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "OPTIM.LR 0.001 0.0005 0.001" in text
    assert "epochs 2.5 / 5 3 / 5 3 / 3" in text
    assert "best top-1, EMA weights - - " in text
    rows = yaml.safe_load((trained / "config.yaml").read_text())
    assert f"TRAIN.GLOBAL_BATCH 1024 1024 {rows['TRAIN']['GLOBAL_BATCH']}" in text


def test_printed_path_is_the_written_file(tmp_path, capsys, monkeypatch):
    runs = [made_up(tmp_path / "a"), made_up(tmp_path / "b")]
    assert report.main([str(runs[0])]) == 0
    assert report.main([str(run) for run in runs]) == 0
    assert report.main([str(runs[0]), "--out", str(tmp_path / "deep" / "page.html")]) == 0
    for path in (runs[0] / "report.html", tmp_path / "report.html", tmp_path / "deep" / "page.html"):
        assert path.read_text().startswith("<!doctype html>"), path
    assert capsys.readouterr().out.count("MB)") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run directory nowhere does not exist"),
        (["."], "holds no metrics.jsonl, it is no run directory"),
        (["a", "./a"], "names a run twice"),
        (["a", "--out", "a/config.yaml/page.html"], "cannot be written"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    made_up(tmp_path / "a")
    with pytest.raises(SystemExit) as ended:
        report.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not find_browser(), reason=MISSING)
def test_browser_draws_the_page_without_complaint(tmp_path, trained):
    from PIL import Image

    page, shot = tmp_path / "page.html", tmp_path / "page.png"
    runs = [trained, made_up(tmp_path / "b", **IMAGENET)]
    for shown, theme, width, ground in (
        (runs[:1], "light", 1280, 246),
        (runs[:1], "dark", 390, 18),
        (runs, "light", 1280, 246),
    ):
        page.write_text(report.render([RunInfo.read(run) for run in shown]))
        assert screenshot(page, shot, width, 1400, theme) == []
        with Image.open(shot) as image:
            assert image.size == (width, 1400)
            assert image.convert("RGB").getpixel((2, 2))[0] == ground
    drawn = document(page)
    assert len(re.findall(r'<section class="card chart', drawn)) == 7
    assert len(re.findall(r'<p class="none" hidden="">not (?:evaluated|logged) yet', drawn)) == 7
    assert len(re.findall(r'<path d="M[\d.]+ [\d.]+L', drawn)) >= 7
    assert "published 83.6" in drawn


@pytest.mark.skipif(not find_browser(), reason=MISSING)
def test_browser_shows_notes_for_missing_parts(tmp_path):
    run, page = made_up(tmp_path / "run"), tmp_path / "page.html"
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    for metrics, missing in ((first, ["evaluated"] * 2), ("", ["evaluated", "logged", "evaluated", *["logged"] * 4])):
        (run / "metrics.jsonl").write_text(metrics)
        page.write_text(report.render([RunInfo.read(run)]))
        assert screenshot(page, tmp_path / "page.png", 1280, 1400) == []
        assert re.findall(r'<p class="none">not (\w+) yet', document(page)) == missing


@pytest.mark.skipif(not find_browser(), reason=MISSING)
def test_browser_test_sees_an_error_of_a_script(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>nothing.there()</script>")
    (message,) = screenshot(page, tmp_path / "page.png", 300, 200)
    assert "nothing is not defined" in message
