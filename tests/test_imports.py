"""The import rule: models/, data/ and engine/ never import each other, share common/ and meet in trainer/ and the entry points."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = {"train", "eval", "tools", "benchmarks"}
HOUSE = {"common", "config", "models", "data", "engine", "trainer", "tests", "docs", *ENTRY_POINTS}
ALLOWED = {  # packages that a package may import besides itself
    "common": set(),
    "config": {"common"},
    "models": {"common"},  # only in models/build.py: see below
    "data": {"common"},
    "engine": {"common"},
    "trainer": {"common", "config", "models", "data", "engine"},
    "tools": HOUSE - {"tests", "docs", "benchmarks"},
    "benchmarks": HOUSE - {"tests", "docs"},
}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))
COMMON_LINES, FILE_LINES, FUNCTION_LINES, ENTRY_LINES = 300, 350, 60, 200


def imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports, its own package for relative imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = path.relative_to(ROOT).parts[0]
            names.add(own if node.level else (node.module or "").split(".")[0])
    return names


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_package_imports_no_other_package(path):
    own = path.relative_to(ROOT).parts[0]
    assert imported(path) & HOUSE <= ALLOWED[own] | {own}


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[len(ROOT.parts)] == "models"], ids=name_of)
def test_models_import_relatively_so_that_the_folder_can_be_installed_alone(path):
    if path.name != "build.py":
        assert imported(path) & HOUSE <= {"models"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level or (node.module or "").split(".")[0] != "models"
                assert not (node.level and (node.module or "").split(".")[-1] == "build"), "build.py is left out there"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_build_files_read_the_config(path):
    if path.relative_to(ROOT).parts[0] in ("models", "data", "engine", "common") and path.name != "build.py":
        assert "yacs" not in imported(path)
        assert "cfg." not in path.read_text().replace("default_cfg.", "").replace("pretrained_cfg.", "")


def test_config_needs_no_torch():
    code = "import sys, config, config.command_line; print(sorted({'torch', 'numpy', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_common_stays_small():
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "common").glob("*.py")) <= COMMON_LINES


def test_root_holds_the_two_entry_points_only():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["eval.py", "train.py"]


@pytest.mark.parametrize(
    "path",
    sorted(
        p
        for p in ROOT.rglob("*.py")
        if not p.relative_to(ROOT).parts[0].startswith((".", "output", "oracle", "scratch"))
    ),
    ids=name_of,
)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (ENTRY_LINES if path.parent == ROOT else FILE_LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, node.name
