"""pictures and tools.visualize: maps lie where the model saw them, at the photograph's own resolution."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -r requirements.txt")

from data.augment.transforms import EvalTransform
from models.attention_maps import AttentionMap, AttentionReading
from tools import visualize
from tools.visualize import main, parse_point
from trainer.figures.figure import arrange_in_lines, as_pixels, save, sheet, single
from trainer.figures.panels import Panel, boundaries, original, panels
from trainer.figures.photograph import Photograph


def photo(height=60, width=100, crop=32, resize=40, mode="center"):
    pixels = np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Photograph.framed(pixels, *EvalTransform(crop, resize, mode=mode).geometry(height, width), "p.jpg")


def region(values, kind="super tokens", patch=16, **more):
    return AttentionMap(1, 1, AttentionReading(kind, torch.tensor(values)[None], **more), patch)


def test_box_is_what_the_evaluation_crop_takes():
    found = photo()  # 60 x 100 to 40 x 66, cropped at 4, 17
    np.testing.assert_allclose(found.box, (17 * 100 / 66, 4 * 1.5, 49 * 100 / 66, 36 * 1.5))
    assert found.seen == (26, 6, 74, 54)
    assert found.fractions(50, 30) == pytest.approx((0.5, 0.5), abs=0.01)
    with pytest.raises(ValueError, match=r"p.jpg: the model does not see pixel 10,30; it sees x from 26 to 73"):
        found.fractions(10, 30)


def test_border_sticks_out_of_the_photograph():
    found = photo(mode="border", crop=40)
    assert found.box[1] < 0 < found.box[0] + 1
    assert found.seen[1] == 0
    assert found.seen[3] == 60
    enlarged = found.enlarge(np.arange(4, dtype=np.float32).reshape(2, 2), 20)
    assert enlarged.shape == (60, 100)
    assert enlarged[0, 0] == 0
    assert enlarged[-1, -1] == 3


def test_map_is_laid_token_by_token():
    found = Photograph(np.zeros((8, 12, 3), np.uint8), (2, 0, 10, 8), 16)
    enlarged = found.enlarge(np.array([[1, 2], [3, 4]]), 8)
    np.testing.assert_array_equal(enlarged, np.repeat(np.repeat([[1, 2], [3, 4]], 4, 0), 4, 1))
    cut = Photograph(np.zeros((8, 12, 3), np.uint8), (2, 0, 10, 8), 12)  # the second token is half outside
    np.testing.assert_array_equal(cut.enlarge(np.array([[1, 2], [3, 4]]), 8)[0], [1] * 5 + [2] * 3)
    smooth = found.enlarge(np.array([[0.0, 1.0]], dtype=np.float32).repeat(2, 0), 8, smooth=True)
    assert 0 < smooth[0, 3] < smooth[0, 4] < 1.01


def test_boundaries_are_the_edges_between_regions_joined():
    found = Photograph(np.zeros((30, 30, 3), np.uint8), (0, 0, 30, 30), 30)
    lines = boundaries(np.array([[0, 0, 1], [0, 0, 1], [2, 2, 2]]), found, 10)
    assert sorted(map(str, lines.tolist())) == ["[[0.0, 20.0], [30.0, 20.0]]", "[[20.0, 0.0], [20.0, 20.0]]"]


def test_regions_have_their_mean_colour_and_the_rest_fades():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:4], pixels[:, 4:6], pixels[:2, 4:6] = 100, 50, 150
    found = Photograph(pixels, (2, 0, 6, 4), 4)
    lines, means = panels(region([[5, 9], [5, 9]], patch=2), 0, found)
    np.testing.assert_array_equal(lines.pixels[:, 2:6], pixels[:, 2:6])
    assert (means.pixels[:, 2:4] == 100).all()
    assert (means.pixels[:, 4:6] == 100).all()
    assert (lines.pixels[:, :2] == 166).all()
    assert lines.title == "stage 1, block 1: 2 super tokens"


def test_strongest_token_gets_the_strongest_colour():
    found = Photograph(np.full((4, 4, 3), 128, np.uint8), (0, 0, 4, 4), 4)
    (panel,) = panels(region([[0.0, 0.2], [0.3, 9.0]], "attention", 2), 0, found)
    assert (panel.pixels[3, 3] == np.round(0.25 * 128 + 0.75 * 255 * np.array(panel.scale.colours(1.0)[:3]))).all()
    assert panel.title.endswith("received attention")
    (signed,) = panels(region([[-1.0, 0.5], [0.1, 0.2]], "attention", 2, signed=True), 0, found, mark=(1, 1))
    assert signed.scale.low == -signed.scale.high
    assert (signed.scale.label, panel.scale.label) == ("weight of each token", "attention, 1 is even")


def test_merged_tokens_have_a_legend_of_run_lengths():
    numbers, level = torch.tensor([[0, 0], [1, 2]]), torch.tensor([[[2, 2], [1, 1]]])
    merged, _ = panels(region(numbers.tolist(), "merged", 8, level=level), 0, photo(32, 32, 16, 16))
    assert merged.title == "stage 1, block 1: 4 tokens merged into 3"
    assert [text for text, _ in merged.legend] == ["2 tokens become 1", "kept as they are"]


def test_picture_has_the_resolution_of_the_photograph(tmp_path):
    found = photo(300, 1000, 224, 256)
    save(single(original(found)), tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        drawn = np.asarray(image.convert("RGB")).astype(int)
    assert drawn.shape[1] == 1060  # margins of 0.12 inches at 250 pixels an inch
    left = 30
    rows = [
        row
        for row in range(drawn.shape[0] - 300)
        if np.abs(drawn[row + 150, left + 400 : left + 600] - found.pixels[150, 400:600]).max() < 3
    ]
    assert len(rows) == 1  # pixel by pixel


def test_tall_photograph_keeps_its_pixels():
    found = photo(2000, 1000, 224, 256)
    drawn = as_pixels(single(original(found))).astype(int)
    assert drawn.shape[0] > 2000
    rows = [
        r for r in range(drawn.shape[0] - 2000) if np.abs(drawn[r + 100, 430:630] - _faded_row(found, 100)).max() < 3
    ]
    assert len(rows) == 1  # pixel by pixel


def _faded_row(found, row):
    return 0.35 * found.pixels[row, 400:600] + 0.65 * 255


def test_lines_end_where_the_model_sees_no_more():
    pixels = np.zeros((10, 10, 3), np.uint8)
    found = Photograph(pixels, (2.4, 2.4, 7.4, 7.4), 4)  # seen from 2 to 7: the lines reach beyond
    lines, _ = panels(region([[1, 2], [3, 4]], patch=2), 0, found)
    with_lines, without = (as_pixels(single(panel)) for panel in (lines, original(found)))
    seen = slice(30 + 200, 30 + 700)  # at 100 pixels a pixel
    changed = np.flatnonzero((with_lines[100:-30] != without[100:-30]).any((0, 2)))
    assert seen.start - 2 <= changed.min()
    assert changed.max() <= seen.stop + 2


def test_caption_fits_the_figure():
    found = original(photo())
    for caption in ("cat", "a breed of dog with a long name and many commas, 99.9 %  ·  groupmixformer_mobile, 224 px"):
        drawn = as_pixels(single(found, caption))[:75]  # 0.3 inches at 250 pixels an inch
        columns = np.flatnonzero((drawn < 128).any((0, 2)))
        assert 25 <= columns.min() <= 40
        assert columns.max() <= drawn.shape[1] - 25


def test_label_of_a_scale_keeps_clear_of_its_arrow():
    values = [[-1.0] * 40 + [-9.0], [0.5] * 41]
    (panel,) = panels(region(values, "attention", 2, signed=True), 0, photo())
    assert panel.scale.beyond == "min"
    figure = single(panel)
    axes = figure.axes[-1]
    arrow = min(patch.get_window_extent().x0 for patch in axes.patches)
    assert max(text.get_window_extent().x1 for text in axes.texts) < arrow - 0.03 * axes.get_window_extent().width


@pytest.mark.parametrize(
    ("stages", "lines"),
    [
        ("1112223334", ["111", "222", "3334"]),  # SG-Former
        ("11122234", ["111", "222", "34"]),  # STViT
        ("1111222233334444", ["1111", "2222", "3333", "4444"]),  # GroupMixFormer
        ("1234", ["1234"]),
        ("12", ["12"]),
        ("111111111222", ["111", "111", "111", "222"]),  # all blocks: lines do not grow
        ("", []),
    ],
)
def test_sheet_breaks_lines_so_that_little_stays_empty(stages, lines):
    one = np.zeros((1, 1, 3), np.uint8)
    found = arrange_in_lines([Panel("", int(stage), "", one) for stage in stages])
    assert ["".join(str(panel.stage) for panel in line) for line in found] == lines


def test_same_figure_gives_the_same_bytes(tmp_path):
    for kind in ("png", "svg", "pdf"):
        for name in ("a", "b"):
            save(sheet([[original(photo())]], ["caption"]), tmp_path / f"{name}.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert as_pixels(single(original(photo()))).dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "shown"),
    [("stvit_small", "super_tokens"), ("sgformer_small", "merged"), ("groupmixformer_mobile", "keys_7x7_group")],
)
def test_command_draws_each_family(name, shown, tmp_path, pictures, monkeypatch, capsys):
    from tests.helpers.small_models import shrunken

    small = shrunken(name, depths=(2, 1, 1, 1), num_classes=1000)
    monkeypatch.setattr("tools.classifier._build", lambda *_: small)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    files = [str(pictures / "val/red/000.jpg"), str(tmp_path / "broken.jpg")]
    assert (
        main(["--model", name, "--size", "64", *files, "--out", str(tmp_path / "out"), "--blocks", "1.1", "1.2"]) == 0
    )
    assert (tmp_path / "out/000" / f"stage1_block2_{shown}.png").is_file()
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "out/sheet.png")
    assert "broken.jpg cannot be decoded" in printed.err
    assert (
        main(
            [
                "--model",
                name,
                "--size",
                "64",
                files[0],
                "--out",
                str(tmp_path / "q"),
                "--at",
                "50%,50%",
                "--format",
                "svg",
            ]
        )
        == 0
    )
    assert len(list((tmp_path / "q/000").glob("*attention*.svg"))) >= 4


def test_point_is_in_pixels_or_percentages():
    assert parse_point("310,24.5") == (310, 24.5, False)
    assert parse_point("40%, 60%") == (0.4, 0.6, True)
    for wrong in ("3", "1,2,3", "a,b", "40%,60"):
        with pytest.raises(ValueError, match="310,240"):
            parse_point(wrong)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "stvit_smal"], "did you mean stvit_small"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth does not exist"),
        ([], "--model NAME for random weights"),
        (["--model", "test_efficientnet"], "has no maps"),
        (["--model", "groupmixformer_mobile", "--blocks", "5.1"], "there is no block 5.1"),
        (["--model", "groupmixformer_mobile", "--blocks", "first"], "give stage.block"),
        (["--model", "groupmixformer_mobile", "--at", "1000,1000"], "does not see pixel"),
    ],
)
def test_mistake_is_an_error_with_a_hint(argv, message, pictures, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(pictures / "val/red/000.jpg"), "--out", str(tmp_path), "--size", "32", *argv])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_target_that_is_a_file_is_refused_before_any_work(pictures, tmp_path, capsys):
    file = tmp_path / "taken"
    file.touch()
    for out in (file, file / "below"):
        with pytest.raises(SystemExit):
            main([str(pictures / "val/red/000.jpg"), "--out", str(out), "--model", "stvit_small"])
        assert capsys.readouterr().err == f"python -m tools.visualize: --out {out}: {file} is a file; name a folder\n"


def test_no_readable_image_is_reported(tmp_path, monkeypatch, capsys):
    from tests.helpers.small_models import shrunken

    monkeypatch.setattr("tools.classifier._build", lambda *_: shrunken("stvit_small", num_classes=1000))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert main([str(tmp_path / "broken.jpg"), "--out", str(tmp_path / "out"), "--model", "stvit_small"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "none of the images can be read" in printed.err


def test_missing_matplotlib_is_an_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        visualize.check_matplotlib()
