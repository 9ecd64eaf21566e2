"""Messages quoted in docs/troubleshooting.md are string constants of the program."""

import ast

from tests.helpers.documented import ROOT, read

PACKAGES = ("common", "config", "data", "engine", "models", "trainer")


def test_quoted_messages_are_those_of_the_program():
    program = program_strings()
    missing = []
    for block in read(ROOT / "docs/troubleshooting.md")[0]:
        if block.language == "text":
            pieces = [piece.strip() for line in block.lines for piece in line.split("…")]
            missing += [piece for piece in pieces if len(piece) > 3 and piece not in program]
    assert missing == []


def program_strings() -> str:
    """Return all string constants of the program, joined by NUL; formatted values separate the constants of an f-string."""
    strings = []
    for path in [*ROOT.glob("*.py"), *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return "\0".join(strings)
