"""Torch files read without running code from them: an allow-list of what published checkpoints hold besides tensors.

Importing this module registers the list with torch, so that `timm.create_model(checkpoint_path=...)` reads the same files.
"""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Foreign:
    """Substitute for a class of a published file that is not needed (arguments, configs, paths).

    Its instances are OrderedDicts: torch's restricted unpickler builds and fills these, and nothing else but tensors.
    """

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Return an empty OrderedDict; the arguments are ignored."""
        return collections.OrderedDict()


# All that a checkpoint may hold besides tensors and plain values. None of it runs code from a file.
ALLOWED: list[Any] = [
    *((Foreign, name) for name in ("argparse.Namespace", "yacs.config.CfgNode", "collections.defaultdict")),
    *((Foreign, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "bool")),
    dict,  # the argument of defaultdict
]
torch.serialization.add_safe_globals(ALLOWED)


def read_torch(path: Path) -> Any:
    """Load a torch file with weights_only and the allow-list. Raises ValueError with the reason if that fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = _refused_globals(path)
        if refused:
            raise ValueError(
                f"{path} was not read: it would run or build {', '.join(refused)}, which no weights need"
            ) from error
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        first = next(iter(reason.strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{path} cannot be read, it is damaged or no torch file ({first[:160]}); use another one"
        ) from error


def _refused_globals(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or in the format before torch 1.6
        return []
