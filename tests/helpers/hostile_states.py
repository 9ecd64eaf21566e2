"""Checkpoints of a run with one entry changed and a true checksum, as somebody else might hand them on."""

import copy
import sys
from pathlib import Path

import torch

from engine.checkpoint.files import load_state, save_state

WRONG = (None, 5, -1, 1 << 70, float("nan"), "text", [], {}, [1], {"a": 1}, torch.zeros(2), torch.zeros(2, 6, 3))


def changes(state):
    """Return changed values of entries by a name; keys are paths in the state."""
    first = next(iter(state["model"]))
    found = {(key,): WRONG for key in state}
    found["model", first] = (5, torch.zeros(2), torch.zeros(4, 3, 8, 8, dtype=torch.complex64), torch.zeros(0))
    found["ema", first] = (None, torch.zeros(1 << 10))
    found["facts", "classes"] = WRONG
    found["facts", "data"] = WRONG
    found["facts", "num_classes"] = (10**6, "3", -1)
    found["best", "raw"] = (*WRONG, {"correct1": 1})
    found["best", "\x1b[2J"] = ({},)
    for key in ("correct1", "update", "epoch", "top1"):
        found["best", "raw", key] = ("a", None, torch.zeros(2), 1 << 80)
    found["optimizer", "state"] = WRONG
    found["optimizer", "param_groups"] = (*WRONG, [{}], [{"params": 5}])
    for key in ("params", "lr", "betas", "weight_decay", "foreach", "amsgrad", "maximize", "\x1b"):
        found["optimizer", "param_groups", 0, key] = ("a", [], {}, [[1], [2]], 1 << 70)
    for key in state["optimizer"]["state"][0]:
        found["optimizer", "state", 0, key] = (None, "a", torch.zeros(7), torch.zeros(4, 3, 8, 9), [1])
    found["optimizer", "state", "a"] = ({},)
    found["optimizer", "state", 0] = ({}, {"a": torch.zeros(1)}, torch.zeros(2))
    found["scaler", "scale"] = ("a", -1.0)
    return found


def hostile_states(good):
    """Return changed states by name; those without one of the entries are among them."""
    state = load_state(good)
    found = {f"without {key}": {k: v for k, v in state.items() if k != key} for key in state}
    for path, values in changes(state).items():
        for number, value in enumerate(values):
            changed = copy.deepcopy(state)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            found[f"{' '.join(map(ascii, path))} {number}"] = changed
    return found


def write_states(good, folder):
    """Write the changed states of a checkpoint; return their paths."""
    paths = []
    for number, (name, state) in enumerate(hostile_states(Path(good)).items()):
        paths.append(Path(folder, f"{number:03d} {name.replace('/', '_')}.pt"))
        save_state(paths[-1], {k: v for k, v in state.items() if k != "format"} | {"format": state.get("format", 2)})
    return paths


if __name__ == "__main__":
    write_states(*sys.argv[1:])
