"""A run that breaks off after its last update and is continued, without another update, stores the same state."""

import pytest
import torch

import train
from engine.checkpoint.files import load_state

SCHEDULES = {
    "update": (),
    "epoch": ("SCHEDULE.UNIT", "epoch", "SCHEDULE.WARMUP_EPOCHS", "1"),
    "delayed": ("SCHEDULE.DELAY", "2"),
    "cooldown": ("SCHEDULE.COOLDOWN_EPOCHS", "1", "TRAIN.EPOCHS", "1"),
    "layers": ("OPTIM.LAYER_DECAY", "0.7", "MODEL.NAME", "test_vit"),
}


class BrokenOffError(Exception):
    pass


def run(cfg, output, opts):
    argv = ["--cfg", str(cfg), "--output", str(output), "--opts", "EVAL.EVERY", "1", "TRAIN.EPOCHS", "2", *opts]
    assert train.main(argv) == 0
    return load_state(output / "small/checkpoints/update-00000012.pt")


def break_off(monkeypatch, where, cfg, output, opts):
    """Start a run that ends where a function is called for the last time, or at the first call if no update is left."""
    module, name = where.rsplit(".", 1)
    function = getattr(__import__(module, fromlist=[name]), name)

    def called(session, *args):
        if session.state.trained:
            raise BrokenOffError
        return function(session, *args)

    with monkeypatch.context() as patch:
        patch.setattr(where, called)
        with pytest.raises(BrokenOffError):
            run(cfg, output, opts)


BEFORE_RESULTS = ("trainer.epochs.evaluate_raw_and_ema",)
SEVERAL = (*BEFORE_RESULTS, "train.log_summary", "train.end_epoch")
AFTER_RESULTS = ("trainer.epochs.log_results", "train.finish_saving", "train.write_marker")


@pytest.mark.parametrize(
    ("schedule", "places"),
    [*((schedule, BEFORE_RESULTS) for schedule in SCHEDULES), ("update", SEVERAL), ("update", AFTER_RESULTS)],
    ids=(*SCHEDULES, "several", "results"),
)
def test_run_broken_off_after_its_last_update_stores_the_same(small_cfg, tmp_path, monkeypatch, places, schedule):
    whole = run(small_cfg, tmp_path / "whole", SCHEDULES[schedule])
    for place in places:
        if not (tmp_path / "broken/small/done").exists():
            break_off(monkeypatch, place, small_cfg, tmp_path / "broken", SCHEDULES[schedule])
    again = run(small_cfg, tmp_path / "broken", SCHEDULES[schedule])
    assert again["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    assert again["best"] == whole["best"]
    for part in ("model", "ema"):
        torch.testing.assert_close(again[part], whole[part], rtol=0, atol=0)
    assert (tmp_path / "broken/small/done").exists()
