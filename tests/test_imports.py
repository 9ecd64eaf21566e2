"""The import rule: models/, data/ and engine/ never import each other, share common/ and meet in trainer/ and the entry points."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = {"train", "eval", "tools", "benchmarks"}
HOUSE = {"common", "config", "models", "data", "engine", "trainer", *ENTRY_POINTS}
ALLOWED = {  # what a package may import besides itself
    "common": set(),
    "config": {"common"},
    "models": {"common"},
    "data": {"common"},
    "engine": {"common"},
    "trainer": {"common", "config", "models", "data", "engine"},
}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))
COMMON_LINES = 300


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
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] != "models"
            if isinstance(node, ast.ImportFrom) and node.level:  # build.py needs common/
                assert (node.module or "").split(".")[-1] != "build"
                assert "build" not in [alias.name for alias in node.names]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_build_files_read_the_config(path):
    if path.relative_to(ROOT).parts[0] in ("models", "data", "engine", "common") and path.name != "build.py":
        assert "yacs" not in imported(path)
        assert "cfg." not in path.read_text().replace("default_cfg.", "").replace("pretrained_cfg.", "")


def test_config_needs_no_torch():
    paths = [*(ROOT / "config").glob("*.py"), ROOT / "common/__init__.py", ROOT / "common/timeline.py"]
    assert "torch" not in set().union(*map(imported, paths))


def test_common_stays_small():
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "common").glob("*.py")) <= COMMON_LINES


def test_root_holds_the_two_entry_points_only():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["eval.py", "train.py"]
