"""Command-line tools: python -m tools.<name> --help."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow down a busy machine
