"""Print the run directory of train.py with the same arguments; for scripts, does not import torch.

python -m tools.run_dir --cfg configs/stvit/small_224.yaml --tag second
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import config
from common.text import escape_controls
from config import command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line.train_parser()
    parser.description = "Print the run directory of train.py with the same arguments."
    args = parser.parse_args(argv)
    try:
        cfg = command_line.resolve(args, command_line.TRAIN_FLAGS)
        path = str(Path(cfg.OUTPUT) / config.run_name(cfg))
        if escape_controls(path) != path:
            raise ValueError(
                f"the run directory {path} has control characters in its name; choose another OUTPUT, NAME and TAG"
            )
    except ValueError as error:
        parser.fail(error)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
