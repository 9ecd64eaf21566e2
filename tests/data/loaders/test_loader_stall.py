"""Hint in the log that the model waits for data: once an epoch, with remedies."""

import pytest

from engine.logging.log import Log
from engine.loop import StepMetrics


def hints(log, capsys, *steps):
    for epoch, share in steps:
        log.step(StepMetrics(epoch, 1, 1, 1.0, 1.0, 1.0, 1e-3, 100.0, share), 3, 10)
    return [line for line in capsys.readouterr().out.splitlines() if "the model waits for data" in line]


def test_waiting_for_data_is_logged_once_an_epoch_with_the_remedies(capsys):
    found = hints(
        Log(main=True), capsys, (0, 0.9), (0, 0.35), (0, 0.4), (1, 0.05), (1, 0.1), (1, 0.5), (2, 0.0), (2, 0.101)
    )
    assert [line.split("waits for data ")[1].split(" of")[0] for line in found] == ["35%", "50%", "10%"]
    for remedy in ("DATA.WORKERS", "DATA.PREFETCH", "DATA.LOADER dali", "tars", "docs/data.md"):
        assert remedy in found[0]


@pytest.mark.parametrize("steps", [[(0, 1.0)], [(0, 0.5), (0, 0.1), (1, 0.02)]])
def test_starting_workers_and_short_waits_give_no_hint(steps, capsys):
    assert hints(Log(main=True), capsys, *steps) == []


def test_other_processes_log_nothing(capsys):
    assert hints(Log(main=False), capsys, (0, 0.5), (0, 0.5)) == []


def test_dali_is_not_suggested_where_it_is_used(capsys):
    (found,) = hints(Log(main=True, dali=True), capsys, (0, 0.9), (0, 0.35))
    assert "raise DATA.WORKERS or DATA.PREFETCH, or on slow storage" in found
    assert "dali" not in found
