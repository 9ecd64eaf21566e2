"""Look up published holes of the packages in constraints.txt with pip-audit, as a part of `make lint`: python -m tests.helpers.audit

Without pip-audit, without a network, or where the index has no such data, a line says so and the exit status is 0: only a hole
for which there is a newer version fails.
"""

import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROBE = "https://pypi.org/pypi/pip/json"
PROBE_S, LIMIT_S = 3.0, 20.0


def main() -> int:
    """Print the holes, or the reason that none were looked up; return the exit status."""
    try:
        found = look_up()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"audit: skipped: {error}")
        return 0
    checked = [package for package in found["dependencies"] if "vulns" in package]
    if not checked:
        print("audit: skipped: the package index has no data on holes")
        return 0
    status = 0
    for package in checked:
        for hole in package["vulns"]:
            mended = ", ".join(hole["fix_versions"])
            status |= bool(mended)
            print(
                f"audit: {package['name']} {package['version']}: {hole['id']}, mended in {mended or 'no version yet'}"
            )
    print(f"audit: {len(checked)} of {len(found['dependencies'])} packages of constraints.txt looked up")
    if status:
        print("audit: raise their floors in requirements*.txt, install, run the tests, then make lock")
    return status


def look_up() -> dict[str, Any]:
    """Return pip-audit's JSON. Raises OSError or SubprocessError without an answer in time, ValueError for another one."""
    if importlib.util.find_spec("pip_audit") is None:
        raise ValueError("pip-audit is not installed (pip install pip-audit)")
    try:
        urllib.request.urlopen(PROBE, timeout=PROBE_S).close()
    except urllib.error.URLError as error:
        raise OSError(f"no network ({error.reason})") from error
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps"]
    options = ["--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "5"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=LIMIT_S)
    if not done.stdout.strip():
        raise ValueError((done.stderr.strip().splitlines() or ["pip-audit printed nothing"])[-1][:200])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    sys.exit(main())
