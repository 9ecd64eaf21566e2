"""The documentation builds as a site that is complete by itself."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.documented import PAGES, ROOT


def test_site_is_complete_and_needs_no_network(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material not installed: pip install mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)  # also 404.html, and the files that pages link to
    for file in pages:
        assert not re.search(r'<(script|img|link)[^>]+(src|href)="https?:', file.read_text()), file
