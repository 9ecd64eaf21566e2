"""Requirements and constraints.txt agree; make installs what they say; the audit fails only for holes that can be mended."""

import json
import re
import subprocess
import urllib.error
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from tests.helpers import audit
from tests.helpers.lock import CONSTRAINTS, TOOLS, pins, read_requirements

REQUIREMENTS = list(read_requirements(ROOT / "requirements-dev.txt"))
PINS = dict(re.fullmatch(r"(\S+)==(\S+)", line).groups() for line in CONSTRAINTS.read_text().splitlines()[1:])


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_constraint_satisfies_the_requirement(requirement):
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_requirements_have_floors():
    without = {r.name for r in REQUIREMENTS if not any(part.operator in (">=", "==") for part in r.specifier)}
    assert without == {"types-PyYAML"}  # stubs, not run


def test_constraints_name_no_machine():
    assert list(PINS) == sorted(PINS)
    assert all(canonicalize_name(name) == name and re.fullmatch(r"[\w.]+", version) for name, version in PINS.items())
    assert not set(TOOLS) & set(PINS)


def test_constraints_hold_all_that_the_packages_need():
    for name, version in PINS.items():
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if package.version.partition("+")[0] != version:
            continue  # another version may need other packages
        for needed in map(Requirement, package.requires or ()):
            own = canonicalize_name(needed.name)
            if own not in TOOLS and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
                assert needed.specifier.contains(PINS[own], prereleases=True), (name, str(needed))


def test_pins_follow_extras_and_markers():
    found = pins(iter([Requirement("pytest; python_version < '3'"), Requirement("jinja2[i18n]")]))
    assert {"jinja2", "markupsafe", "babel"} <= set(found)
    assert "pytest" not in found
    with pytest.raises(PackageNotFoundError):
        pins(iter([Requirement("no-such-package")]))


def plan(tmp_path, *more):
    argv = ["make", "--dry-run", "install", f"VENV={tmp_path / 'env'}", *more]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_installs_locked_versions_if_asked(tmp_path):
    assert "-c constraints.txt" not in plan(tmp_path)
    assert "-r requirements-dev.txt -c constraints.txt" in plan(tmp_path, "LOCKED=1")
    (tmp_path / "env/bin").mkdir(parents=True)
    for name in ("bin/python", ".retoken-installed"):
        (tmp_path / "env" / name).touch()
    assert "pip install" not in plan(tmp_path)
    assert "-c constraints.txt" in plan(tmp_path, "LOCKED=1")  # of an environment with other versions


FOUND = {"dependencies": [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "x"}], "fixes": []}
HOLE = {"id": "CVE-1", "fix_versions": ["2"]}


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Return a function that lets pip-audit print a text, and be found online."""
    monkeypatch.setattr(audit.urllib.request, "urlopen", lambda *args, **kwargs: open("/dev/null"))  # noqa: PTH123, SIM115
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pip_audit.py").write_text("")

    def set_answer(text, status=0):
        (tmp_path / "pip_audit.py").write_text(f"import sys\nprint({text!r}, end='')\nsys.exit({status})\n")

    return set_answer


@pytest.mark.parametrize(
    ("holes", "status", "said"),
    [
        ([], 0, "1 of 2 packages"),
        ([HOLE], 1, "a 1: CVE-1, mended in 2"),
        ([HOLE | {"fix_versions": []}], 0, "mended in no version yet"),
    ],
)
def test_audit_fails_for_holes_that_a_newer_version_mends(answer, capsys, holes, status, said):
    found = json.loads(json.dumps(FOUND))
    found["dependencies"][0]["vulns"] = holes
    answer(json.dumps(found), 1 if holes else 0)
    assert audit.main() == status
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "printed nothing"),
        ("no JSON", "skipped"),
        (json.dumps({"dependencies": [{"name": "b", "skip_reason": "x"}]}), "has no data"),
    ],
)
def test_audit_without_data_is_skipped_with_a_reason(answer, capsys, text, said):
    answer(text, 1)
    assert audit.main() == 0
    assert said in capsys.readouterr().out


def test_audit_without_network_or_in_too_long_a_time_is_skipped(answer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audit, "LIMIT_S", 0.5)
    (tmp_path / "pip_audit.py").write_text("import time\ntime.sleep(60)\n")
    assert audit.main() == 0
    assert "timed out" in capsys.readouterr().out

    def fail(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(audit.urllib.request, "urlopen", fail)
    assert audit.main() == 0
    assert "audit: skipped: no network (Name or service not known)" in capsys.readouterr().out


def test_audit_without_pip_audit_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: None)
    assert audit.main() == 0
    assert capsys.readouterr().out == "audit: skipped: pip-audit is not installed (pip install pip-audit)\n"
