"""MkDocs hooks: README.md becomes the front page, CONTRIBUTING.md a page, and links may lead out of docs/.

For each link to a file of the repository, add a page that shows the file (Markdown rendered), so that the site is complete by itself.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}  # files of the repository, and their pages
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".toml": "toml"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Remove navigation entries without a page in this checkout, and add pages that have no entry."""
    config.nav = [kept for entry in config.nav or [] if (kept := _existing(entry))]
    named = str(config.nav)
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    if rest := [page for page in pages if f"'{page}'" not in named]:
        config.nav.append({"More": rest})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and a page for each linked file of the repository."""
    texts = {source: (ROOT / source).read_text(encoding="utf-8") for source in PAGES}
    texts |= {
        f"docs/{file.src_uri}": Path(file.abs_src_path or "").read_text(encoding="utf-8")
        for file in files.documentation_pages()
    }
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_rewritten(texts[source], source)))
    todo = [target for source, text in texts.items() for target in _targets(text, source)]
    for target in dict.fromkeys(todo):
        path = ROOT / target
        if target in PAGES or target.startswith("docs/") or not path.exists():
            continue
        files.append(File.generated(config, _page_of(target), content=_shown(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that lead out of docs/ to the pages generated for them."""
    if page.file.generated_by:
        return markdown
    return _rewritten(markdown, f"docs/{page.file.src_uri}")


def _existing(entry: Any) -> Any:
    if isinstance(entry, str):
        return entry if entry in PAGES.values() or (ROOT / "docs" / entry).is_file() else None
    if isinstance(entry, list):
        return [kept for inner in entry if (kept := _existing(inner))]
    return {title: kept for title, inner in entry.items() if (kept := _existing(inner))}


def _targets(text: str, source: str) -> list[str]:
    return [normpath(PurePosixPath(source).parent / found[1]) for found in LINK.finditer(text)]


def _page_of(target: str) -> str:
    """Return the page of a file of the repository, relative to docs/."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if (ROOT / target).is_dir():
        return f"repository/{target}/index.md"
    return f"repository/{target}" if target.endswith(".md") else f"repository/{target}.md"


def _rewritten(text: str, source: str) -> str:
    """Return a file's Markdown with links relative to its page."""
    here = PurePosixPath(_page_of(source)).parent

    def rewrite(found: re.Match[str]) -> str:
        target = normpath(PurePosixPath(source).parent / found[1])
        if not (ROOT / target).exists():
            return found[0]  # MkDocs reports it
        return f"]({relpath(_page_of(target), here)}{found[2] or ''})"

    return LINK.sub(rewrite, text)


def _shown(target: str) -> str:
    """Return the Markdown of a page that shows a file, or lists a folder's Markdown files."""
    path = ROOT / target
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.md"))
        return "\n".join([f"# {target}", "", *(f"- {name}" for name in names)])
    if path.suffix == ".md":
        return _rewritten(path.read_text(encoding="utf-8"), target)
    return f"---\nsearch:\n  exclude: true\n---\n\n# {target}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}````\n"
