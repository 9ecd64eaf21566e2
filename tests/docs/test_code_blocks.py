"""Documented Python blocks run, YAML blocks load as configs, other blocks have a known language."""

from pathlib import Path

import config
from tests.helpers.documented import each_page, read


@each_page
def test_blocks_of_code_work(page, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    for block in read(page)[0]:
        location = f"{page}:{block.first}"
        if block.language == "python":
            code = compile(block.text, location, "exec")
            if not (block.needs or block.title):
                exec(code, {"__name__": "documented"})
        elif block.language == "yaml":
            file = Path(block.title or "page.yaml")
            file.write_text(block.text)
            config.load(str(file))
        else:
            assert block.language in ("bash", "text", "mermaid", "json"), (
                f"{location}: a block of {block.language or 'no language'}"
            )
