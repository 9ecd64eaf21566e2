"""Print the directory of the run that train.py makes or continues with the same arguments; for scripts, and without torch.

python -m tools.run_dir --cfg configs/stvit/small_224.yaml --tag second
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import arguments
import config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = arguments.train_parser()
    args = parser.parse_args(argv)
    try:
        cfg = arguments.resolve(args, arguments.TRAIN_FLAGS)
    except ValueError as error:
        parser.fail(error)
    print(Path(cfg.OUTPUT) / config.run_name(cfg))
    return 0


if __name__ == "__main__":
    sys.exit(main())
