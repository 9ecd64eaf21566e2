"""Links and file names in the documentation lead to existing files."""

import re

import pytest

from tests.helpers.documented import INLINE, ROOT, anchors, each_page, links, read

FOLDERS = "benchmarks|common|config|configs|data|docs|engine|launch_scripts|models|tests|tools|trainer"
LAYOUT_PAGES = ("docs/architecture.md", "CONTRIBUTING.md")  # every path on them is checked, folders included


@each_page
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading; there are {sorted(anchors(file))}"


@each_page
def test_files_that_are_named_exist(page):
    text = re.sub(r"```text.*?```", "", page.read_text(), flags=re.DOTALL)  # these hold files of other projects
    named = re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w./-]+\.(?:py|sh|sbatch|yaml|md))\b", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", LAYOUT_PAGES)
def test_paths_of_the_layout_exist(page):
    """Check every inline path, a file or a folder; `<family>` and `*` stand for any name."""
    codes = [code for _, line in read(ROOT / page)[1] for code in INLINE.findall(line)]
    paths = [code for code in codes if re.fullmatch(rf"(?:{FOLDERS})/[\w./*<>-]*", code)]
    assert len(paths) > 10
    assert [path for path in paths if not list(ROOT.glob(re.sub("<[^>]+>", "*", path)))] == []
