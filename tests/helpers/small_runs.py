"""Runs of train.py in the test's own process, and what a run wrote."""

import json

import train as train_script


def run_here(cfg, output, *opts) -> int:
    """Train; return the exit status."""
    return train_script.main(["--cfg", str(cfg), "--output", str(output), "--opts", *map(str, opts)])


def rows(run):
    """Return the metrics of a run, without what depends on the time."""
    timed = ("images_per_s", "data_share", "seconds")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in timed} for row in found]
