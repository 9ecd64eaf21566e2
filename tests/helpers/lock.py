"""Write constraints.txt, the versions that the tests passed with: python -m tests.helpers.lock (`make lock`)

It pins what requirements-dev.txt needs, directly or not, in the versions of this environment; nothing that tells machines
apart (paths, addresses of indexes, builds such as +cu130) is written. `make install LOCKED=1` installs these versions.
"""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
TOOLS = ("pip", "setuptools", "wheel")  # of the environment itself
HEADER = """\
# Versions that the tests passed with, on Linux x86-64 and Python {python}: make install LOCKED=1. Written by `make lock`.
"""


def read_requirements(path: Path) -> Iterator[Requirement]:
    """Yield the requirements of a file and of those that it includes."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            yield from read_requirements(path.parent / text[3:])
        elif text:
            yield Requirement(text)


def pins(requirements: Iterator[Requirement]) -> dict[str, str]:
    """Return the installed versions of packages and of what they need here, by canonical name. Raises PackageNotFoundError."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(requirement, "") for requirement in requirements]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({**default_environment(), "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in TOOLS:
            continue
        package = distribution(name)
        found[name] = Version(package.version).public
        for own in ("", *requirement.extras):
            if (name, own) not in seen:
                seen.add((name, own))
                queue += [(Requirement(text), own) for text in package.requires or ()]
    return dict(sorted(found.items()))


def main() -> int:
    """Write the file; return the exit status."""
    try:
        versions = pins(read_requirements(ROOT / "requirements-dev.txt"))
    except PackageNotFoundError as error:
        print(f"{error.name} is not installed; run make install first", file=sys.stderr)
        return 1
    python = re.match(r"\d+\.\d+", sys.version)
    assert python is not None
    lines = [f"{name}=={version}\n" for name, version in versions.items()]
    CONSTRAINTS.write_text(HEADER.format(python=python[0]) + "".join(lines), encoding="utf-8")
    print(f"{CONSTRAINTS.name}: {len(versions)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
