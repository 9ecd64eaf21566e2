"""python -m tools.loader_parity: differences of two loaders, exit status, accuracy of a checkpoint."""

import pytest
import torch

from data.loaders.batch import Batch
from models.build import build_model
from tests.helpers.data_doubles import write_folder
from tools import loader_parity as tool

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    return write_folder(root, train={"blue": 9, "green": 9, "red": 9}, val={"blue": 3, "green": 2, "red": 2})


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def run(capsys, cfg, folder, *argv):
    status = tool.main(["--cfg", str(cfg), "--data-path", str(folder), *map(str, argv)])
    out, _ = capsys.readouterr()
    return status, [line for line in out.splitlines() if any(c.isalnum() for c in line)]


def test_parity_of_the_loaders_is_reported(capsys, small_cfg, folder):
    status, lines = run(capsys, small_cfg, folder)
    assert status == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    rows = {row[0]: row[1:] for row in cells}
    assert set(rows) == {"evaluation", "training, crop and flip", "training, RandAugment"}
    assert rows["evaluation"][0] == "7"
    assert rows["training, RandAugment"][0] == "24"
    assert all(row[1] == "the same" for row in rows.values())
    assert 0 < float(rows["evaluation"][2]) < 0.2
    assert 0 < float(rows["training, crop and flip"][2]) < 0.2


def test_parity_of_a_checkpoint_is_reported(capsys, small_cfg, folder, tmp_path):
    model = build_model(tool.config.load(str(small_cfg)), 3)
    file = tmp_path / "weights.pt"
    torch.save({"model": model.state_dict()}, file)
    status, lines = run(capsys, small_cfg, folder, "--checkpoint", file, "--batches", 1)
    assert status == 0
    found = [line.split(maxsplit=1) for line in lines if line.startswith(("torch", "dali"))]
    assert [name for name, _ in found] == ["torch", "dali"]
    assert all("7 images" in line for _, line in found)
    assert any(line.startswith("difference: top-1 ") for line in lines)


def test_parity_fails_for_loaders_that_differ(capsys, small_cfg, folder, monkeypatch):
    from data.loaders import dali_loader

    monkeypatch.setattr(dali_loader, "_recorded", flipped(dali_loader._recorded))
    status, lines = run(capsys, small_cfg, folder, "--batches", 2)
    assert status == 1
    assert not any("DIFFER" in line for line in lines)


def flipped(recorded):
    """Have every image flipped that should not be, and the other way round."""

    def run_flipped(batches, in_flight):
        for batch in recorded(batches, in_flight):
            batch.flips[:] = ~batch.flips
            yield batch

    return run_flipped


def test_parity_counts_other_labels_and_lost_images():
    images, numbers = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(2)
    differences = tool.Differences("x")
    differences.add(Batch(images, numbers, numbers), Batch(images + 3, numbers, numbers))
    assert (differences.mean, differences.largest, differences.above, differences.same) == (3.0, 3, 96, True)
    differences.add(Batch(images, numbers, numbers), Batch(images, numbers + 1, numbers))
    assert not differences.same
    differences = tool.Differences("x")
    differences.add(Batch(images, numbers, numbers), Batch(images[:1], numbers[:1], numbers[:1]))
    assert not differences.same


def test_keys_of_dali_in_the_config_are_for_dali(capsys, small_cfg, folder, tmp_path):
    cfg = tmp_path / "dali.yaml"
    text = small_cfg.read_text()
    assert "DATA: {" in text
    cfg.write_text(text.replace("DATA: {", "DATA: {LOADER: dali, DALI_DEVICE: cpu, "))
    status, _ = run(capsys, cfg, folder, "--batches", 1)
    assert status == 0


def test_odd_number_of_opts_is_the_usual_error(small_cfg, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--cfg", str(small_cfg), "--data-path", str(folder), "--opts", "EVAL.BATCH"])
    assert stopped.value.code == 2
    assert "--opts" in capsys.readouterr().err


def test_parity_without_data_is_an_error(small_cfg, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--cfg", str(small_cfg), "--data-path", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert "DATA.PATH" in capsys.readouterr().err
