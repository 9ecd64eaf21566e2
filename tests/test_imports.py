"""The import rule: models/, data/ and engine/ never import each other, and only build files read the config."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "data", "engine")
ENTRY = {
    *(
        "train",
        "eval",
        "arguments",
        "config",
        "config_files",
        "config_limits",
        "session",
        "report",
        "resume",
        "divergence",
        "gallery",
    ),
    *("pictures", "tools", "benchmarks"),
}
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.parent.name if node.level else (node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_package_imports_no_other_package(path):
    own = path.relative_to(ROOT).parts[0]
    assert imported(path) & ({*PACKAGES, *ENTRY} - {own}) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_only_build_files_read_the_config(path):
    if path.name != "build.py":
        assert "yacs" not in imported(path)
        assert "cfg." not in path.read_text().replace("default_cfg.", "").replace("pretrained_cfg.", "")


def test_pictures_need_models_only():
    for path in (ROOT / "pictures").glob("*.py"):
        assert imported(path) & ({*PACKAGES, *ENTRY} - {"models", "pictures"}) == set()


def test_config_needs_no_torch():
    names = ("config.py", "config_files.py", "config_limits.py", "arguments.py", "timeline.py")
    assert "torch" not in set().union(*(imported(ROOT / name) for name in names))
