"""Parser of the documentation: the fenced and indented blocks of a page, the shell commands in them, the links.

A fenced block has a language. An indented block, like a fenced one of the language bash, holds shell commands only. In prose and
tables, inline `code` that starts like a command counts as one. A comment before a block states what its commands need:

    <!-- needs: 8 GPUs -->
"""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(`{3,})\s*([\w-]*)(.*)")
NEEDS = re.compile(r"<!-- needs: (.+?) -->")
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
COMMAND = re.compile(r"([A-Z_]+=\S+ )*(python|torchrun|make|pytest|sbatch|\$EVAL|launch_scripts/\S+)\s+\S")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"#{1,6} (.+)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@dataclass
class Block:
    """Code block of a page, starting at line `first`."""

    first: int
    language: str
    title: str = ""
    needs: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


@dataclass(frozen=True)
class Command:
    """Command split as by the shell, variables substituted. `whole`: from a block or a $VARIABLE, not mentioned in passing."""

    line: int
    words: tuple[str, ...]
    needs: str = ""
    whole: bool = True

    def __str__(self) -> str:
        return f"line {self.line}: {shlex.join(self.words)}"


def read(page: Path) -> tuple[list[Block], list[tuple[int, str]]]:
    """Return the blocks of a page, and all other lines with their numbers."""
    blocks: list[Block] = []
    prose: list[tuple[int, str]] = []
    needs, fence, in_list = "", "", False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if fence:
            if line.strip() == fence:
                fence = ""
            else:
                blocks[-1].lines.append(line)
        elif found := FENCE.match(line.strip()):
            title = re.search(r'title="(.+?)"', found[3])
            blocks.append(Block(number + 1, found[2], title[1] if title else "", needs))
            fence, needs = found[1], ""
        elif found := NEEDS.fullmatch(line.strip()):
            needs = found[1]
        elif line.startswith("    ") and not in_list:
            if not (blocks and number == blocks[-1].first + len(blocks[-1].lines)):
                blocks.append(Block(number, "bash", needs=needs))
                needs = ""
            blocks[-1].lines.append(line[4:])
        else:
            assert not (line.startswith("    ") and COMMAND.match(line.strip())), (
                f"{page}:{number}: move it out of the list"
            )
            if line.strip() and not line.startswith(" "):
                in_list = bool(re.match(r"([-*]|\d+\.) ", line))
            prose.append((number, line))
    assert not fence, f"{page}: a block is not closed"
    return blocks, prose


def commands(page: Path) -> list[Command]:
    """Return all commands of a page, in order."""
    blocks, prose = read(page)
    variables: dict[str, str] = {}
    found = [command for block in blocks if block.language == "bash" for command in _of_block(block, variables)]
    for number, line in prose:
        codes = [code for code in INLINE.findall(line.replace(r"\|", "|")) if COMMAND.match(code)]
        found += [
            Command(number, words, whole=code.startswith("$")) for code in codes for words in _split(code, variables)
        ]
    return sorted(found, key=lambda command: command.line)


def fragments(page: Path) -> list[list[str]]:
    """Return the keys and values of each `--opts KEY VALUE` in prose; also of a key without a value."""
    codes = [code for _, line in read(page)[1] for code in INLINE.findall(line)]
    return [shlex.split(code)[1:] for code in codes if code.startswith("--opts ")]


def links(page: Path) -> list[str]:
    """Return the targets of the links in prose that point to files, with their anchors."""
    found = [target for _, line in read(page)[1] for target in LINK.findall(INLINE.sub("", line))]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs form them."""
    headings = [found[1] for _, line in read(page)[1] if (found := HEADING.match(line))]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def _of_block(block: Block, variables: dict[str, str]) -> list[Command]:
    found: list[Command] = []
    joined, start = "", block.first
    for number, line in enumerate(block.lines, block.first):
        start = start if joined else number
        joined += line.removesuffix("\\") + " "
        if not line.endswith("\\"):
            found += [Command(start, words, block.needs) for words in _split(joined, variables)]
            joined = ""
    return found


def _split(text: str, variables: dict[str, str]) -> list[tuple[str, ...]]:
    """Split a line into simple commands; store assignments in `variables` and substitute the known ones."""
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    simple: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|"):
            simple.append([])
        else:
            simple[-1].append(word)
    for words in simple:
        while words and (words[0] == "export" or ASSIGNMENT.fullmatch(words[0])):
            if assigned := ASSIGNMENT.fullmatch(words.pop(0)):
                variables[assigned[1]] = assigned[2]
    return [tuple(words) for words in simple if words]
