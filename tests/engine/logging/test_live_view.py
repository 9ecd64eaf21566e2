"""Live view: its content at each width, a clean terminal after it, and no trace of it in a file."""

import io
import math
import os
import pty
import re
import select
import signal
import sys
import termios
import time
from dataclasses import replace

import pytest
from rich.console import Console

from engine.logging.live_view import LiveView, TimeEstimator
from engine.logging.live_widgets import duration, sparkline
from engine.logging.log import Log
from engine.loop import StepMetrics
from tests.conftest import ROOT
from tests.helpers.small_runs import PATIENCE_S
from tools.terminal_recorder import RecordedScreen

STEP = StepMetrics(2, 250, 50, 2.3456, 2.4, 1.23, 9.1e-4, 2510.2, 0.25)
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def view(width, height=30, clock=None):
    """Return a view of epoch 3 of 10, update 50 of 100 at two seconds per update, with curves."""
    seconds = clock or [0.0]
    made = LiveView(
        Console(file=io.StringIO(), width=width, height=height, force_terminal=True), "run", lambda: seconds[0]
    )
    made.epoch, made.epochs, made.updates = 2, 10, 100
    made.timing.begin_epoch()
    for update in range(50):
        seconds[0] += 2
        made.losses.append(7 - update / 10)
        if update == 49:
            made.note_step(STEP)
        made.advance()
    made.note_result("raw", 60.0, 0)
    made.note_result("raw", 58.5, 1)
    made.note_result("ema", 61.25, 1)
    return made


def drawn(made):
    made.console.print(made)
    return ESCAPE.sub("", made.console.file.getvalue()).splitlines()


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
@pytest.mark.parametrize("soft_wrap", [False, True])
def test_view_fits_the_terminal(width, soft_wrap):
    made = view(width)
    made.console.soft_wrap = soft_wrap
    lines = drawn(made)
    assert max(map(len, lines)) <= min(width, 120)
    assert {len(line) for line in lines} == {min(width, 120)}


def test_view_shows_progress_and_metrics_of_a_run():
    text = "\n".join(drawn(view(80)))
    for expected in (
        *("epoch  3/10", "update  50/100", "2.3456", "epoch 2.4000", "lr 9.100e-04", "norm 1.23", "images/s 2,510"),
        *("waiting for data 25%", "58.500", "best 60.000 @1", "61.250", "best 61.250 @2", "1:40 left", "25:00 left"),
        *("running for 1:40", "memory "),
    ):
        assert expected in text, expected
    assert re.search("█▇*▆+▅+▄+▃+▂+▁+", text)


def test_view_omits_results_on_a_low_terminal():
    high, low = drawn(view(60, 30)), drawn(view(60, 12))
    assert len(low) <= 9 < len(high)
    assert "2.3456" in "".join(low)


def test_view_shows_an_evaluation_in_place_of_the_epoch():
    made = view(80)
    batches = made.track(range(4), 4, "evaluate ema")
    for _ in range(3):
        next(batches)
    text = "\n".join(drawn(made))
    assert "EMA batch 2/4" in text
    assert "update" not in text
    made.note_result("ema", 62.0, 2)
    assert made.evaluating is None
    made.stop()


def test_view_of_a_run_that_continues_with_an_evaluation():
    made = LiveView(Console(file=io.StringIO(), width=80, height=30, force_terminal=True), "run")
    assert list(made.track(range(2), 2, "evaluate raw")) == [0, 1]
    made.stop()
    assert "raw batch 2/2" in "\n".join(drawn(made))


def test_view_continues_the_curves_of_a_run():
    made = LiveView(Console(file=io.StringIO()), "run")
    made.replay(
        [
            {"kind": "train", "loss": 3.0},
            {"kind": "train", "loss": None},
            {"kind": "eval", "weights": "ema", "top1": 50.0, "epoch": 0},
        ]
    )
    assert made.losses[0] == 3.0
    assert math.isnan(made.losses[1])
    assert (made.results["ema"].best, made.results["ema"].best_epoch) == (50.0, 1)
    made.step = replace(STEP, loss=math.nan, skipped_in_run=7)
    text = "\n".join(drawn(made))
    assert "3.0000" in text
    assert "skipped 7" in text


def test_time_estimator_averages_updates_and_pauses():
    clock = [0.0]
    timing = TimeEstimator(lambda: clock[0])
    assert math.isnan(timing.remaining(10))
    timing.begin_epoch()
    clock[0] = 20.0
    timing.updates = 9
    timing.note_step()  # by the tenth update
    assert timing.remaining(100) == 200.0
    timing.end_epoch()
    clock[0] = 50.0
    timing.begin_epoch()
    assert timing.remaining(100, pauses=2) == 260.0
    timing.end_epoch()
    clock[0] = 60.0  # ten seconds of a pause of thirty are over
    assert timing.remaining(0, pauses=1) == 20.0


def test_durations_and_sparklines_are_short():
    assert [duration(s) for s in (7.4, 62, 3723, 200000)] == ["0:07", "1:02", "1:02:03", "2d 07:33"]
    assert sparkline([1, 2, 3], 10) == "▁▅█"
    assert sparkline(list(range(1000)), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0], 4) == "▁▁"
    assert sparkline([], 4) == ""


def test_log_lines_scroll_above_the_view_and_closing_removes_it(tmp_path):
    log, out = Log(main=True), io.StringIO()
    log.console = Console(file=out, force_terminal=True, width=80, height=30, highlight=False)
    log.open(tmp_path, 0, tensorboard=False)
    log.begin_epoch(0, 3, 0, 20)
    log.step(replace(STEP, epoch=0, update=10, update_in_epoch=10), 3, 20)
    log.view._live.refresh()
    log.info("a line")
    log.close()
    shown = screen(out.getvalue())
    assert shown == ["a line"]
    hidden, shown_again = out.getvalue().index("\x1b[?25l"), out.getvalue().index("\x1b[?25h")
    assert hidden < shown_again < out.getvalue().index("a line")  # not only at the end, which a killed run never sees
    assert "update 10/20" in (tmp_path / "log.txt").read_text()


def screen(output):
    """Return the lines that a terminal shows after the output."""
    shown = RecordedScreen()
    shown.feed(output)
    return [line for line in shown.plain if line]


def test_folded_lines_are_cleared_when_a_terminal_becomes_narrower():
    made = view(100)
    made.console.file.truncate(0)
    made.start()
    made.console.width = 50  # each of the lines lies on two now
    height, before = made._live._live_render.last_render_height, len(made.console.file.getvalue())
    made._live.refresh()
    ups = made.console.file.getvalue()[before:].count("\x1b[1A")
    made.stop()
    assert ups == height + height - 1


def run_in_terminal(cfg, output, *opts):
    """Train on a terminal of 80 columns, press Ctrl-C in the second epoch; return the exit status and the output."""
    argv = [sys.executable, "train.py", "--cfg", str(cfg), "--output", str(output), "--opts", "EVAL.BATCH", "1", *opts]
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | {"TERM": "xterm-256color"}
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        settings = termios.tcgetattr(0)
        # At Ctrl-C a terminal discards output that has not been read, and writes ^C wherever the program is: parts of drawings
        # and of control codes would be missing if the reader is slow.
        settings[3] = settings[3] & ~termios.ECHO | termios.NOFLSH
        termios.tcsetattr(0, termios.TCSANOW, settings)
        os.execve(sys.executable, argv, env | {"COLUMNS": "80", "LINES": "30"})
    written, pressed = b"", False
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            written += piece
        if not pressed and b"epoch 2  raw" in written:
            pressed = True
            os.write(terminal, b"\x03")
    else:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.decode()


@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_ctrl_c_leaves_a_clean_terminal(small_cfg, tmp_path):
    status, written = run_in_terminal(small_cfg, tmp_path, "TRAIN.EPOCHS", "50", "LOG.EVERY", "1")
    assert status == 75, written
    assert "╭─ small" in ESCAPE.sub("", written)
    shown = screen(written)
    assert "the same command continues" in shown[-1]
    assert not [line for line in shown if "╭" in line or "│" in line or "╰" in line]
    assert written.count("\x1b[?25l") <= written.count("\x1b[?25h")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_worker_writes_to_the_terminal_itself(monkeypatch):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    made = view(80)
    made.start()
    assert sys.stderr is not err
    child = os.fork()
    if child == 0:
        os._exit(0 if (sys.stdout, sys.stderr) == (out, err) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    made.stop()
    assert (sys.stdout, sys.stderr) == (out, err)


def test_view_writes_nothing_to_a_file(tmp_path, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take a file for a terminal
    log = Log(main=True)
    log.open(tmp_path, 0, tensorboard=False)
    log.begin_epoch(0, 3, 0, 20)
    log.step(replace(STEP, epoch=0, update_in_epoch=10), 3, 20)
    assert list(log.track(range(3), 3, "evaluate raw")) == [0, 1, 2]
    log.close()
    (line,) = out.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d epoch 1/3  update 10/20  loss 2\.3456  lr 9\.100e-04  .*", line)
    assert "\x1b" not in out.getvalue()
