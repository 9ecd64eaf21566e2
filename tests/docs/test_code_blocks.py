"""Documented Python blocks run, YAML blocks load as configs, other blocks have a known language.

Each Python block runs in an interpreter of its own: what a test has imported before must not make it work.
"""

import subprocess
import sys
from pathlib import Path

import config
from tests.helpers.documented import each_page, read


@each_page
def test_blocks_of_code_work(page, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    for block in read(page)[0]:
        location = f"{page}:{block.first}"
        if block.language == "python":
            compile(block.text, location, "exec")
            if not (block.needs or block.title):
                done = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True)
                assert done.returncode == 0, f"{location}: {done.stderr}"
        elif block.language == "yaml":
            file = Path(block.title or "page.yaml")
            file.write_text(block.text)
            config.load(str(file))
        else:
            assert block.language in ("bash", "text", "mermaid", "json"), (
                f"{location}: a block of {block.language or 'no language'}"
            )
