"""Runs of train.py and eval.py in the test's own process, and comparison of their files."""

import json
from functools import partial

import pytest
import torch

import eval as eval_script
import train as train_script
from engine.checkpoint.files import load_state
from tests.helpers.bounds import assert_same_but_for_order

assert_bitwise = partial(torch.testing.assert_close, rtol=0, atol=0)
PATIENCE_S = 600  # for processes that hang; on a busy machine one may take a minute to start
LAST = "checkpoints/update-00000018.pt"  # of a run of small_cfg


def run_here(cfg, output, *opts) -> int:
    """Train; return the exit status."""
    return train_script.main(["--cfg", str(cfg), "--output", str(output), "--opts", *map(str, opts)])


def rows(run):
    """Return the rows of a run's metrics.jsonl, without measured times."""
    timed = ("images_per_s", "data_share", "seconds")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in timed} for row in found]


def train(cfg, output, *more) -> int:
    """Train with flags; return the exit status."""
    return train_script.main(["--cfg", str(cfg), "--output", str(output), *map(str, more)])


def evaluate(cfg, checkpoint, *more) -> int:
    """Evaluate a checkpoint with flags; return the exit status."""
    return eval_script.main(["--cfg", str(cfg), "--checkpoint", str(checkpoint), *map(str, more)])


def fails(call, capsys, status=2) -> str:
    """Check that a call exits with the status; return its stderr."""
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == status
    return capsys.readouterr().err


def assert_same_state(a, b, exact=True, best=True):
    """Check that two checkpoint files hold the same state: bitwise, or but for the order of sums where `exact` is false."""
    a, b = load_state(a), load_state(b)
    assert a["update"] == b["update"]
    if exact:
        assert a["best"] == b["best"] or not best
        assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for part in ("model", "ema") if a["ema"] else ("model",):
        (assert_bitwise if exact else assert_same_but_for_order)(a[part], b[part])
    if exact:
        assert_bitwise(a["optimizer"]["state"], b["optimizer"]["state"])
