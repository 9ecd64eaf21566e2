"""Files that a reader of checkpoints must refuse."""

import pickle
from argparse import Namespace
from pathlib import Path

import torch

from engine.checkpoint.files import save_state


class Evil:
    """Makes a file named evil in the working directory when it is unpickled."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('evil').touch()",))


def damaged_file(path: Path, content: str) -> None:
    """Write a checkpoint that is evil, garbage, truncated, empty, or holds a namespace."""
    save_state(path, {"model": {"a": torch.zeros(999)}, "ema": None, "facts": {}})
    whole = path.read_bytes()
    if content == "evil":
        torch.save({"model": Evil(), "format": 1}, path)
    elif content == "namespace":
        torch.save({"format": 1, "args": Namespace(a=1)}, path)
    else:
        path.write_bytes({"garbage": pickle.dumps([1]), "truncated": whole[: len(whole) // 2], "empty": b""}[content])
