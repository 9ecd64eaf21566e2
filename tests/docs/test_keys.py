"""Config keys and flags named in the documentation exist."""

import re

import config
from config import command_line
from config.merge import keys
from tests.helpers.documented import ROOT, each_page, fragments, read


@each_page
def test_keys_exist(page):
    known = set(keys(config.defaults()))
    faults: list[str] = []
    for words in fragments(page):
        if len(words) == 1:
            faults += [word for word in words if word not in known]
        else:
            config.load(str(ROOT / "configs/stvit/small_224.yaml"), words)
    sections = {key.split(".")[0] for key in known if "." in key}
    for number, line in read(page)[1]:
        # The first column of docs/migrating.md holds the keys of other trainers.
        text = line.split("|", 2)[-1] if page.name == "migrating.md" and line.startswith("|") else line
        for name in re.findall(r"`([A-Z]+\.[A-Z_0-9]+)", text):
            if name.split(".")[0] in sections and name not in known:
                faults.append(f"line {number}: {name}")
    assert not faults, faults


def test_flags_named_here_beside_those_of_others_exist():
    parsers = (command_line.train_parser(), command_line.eval_parser())
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    rows = [line.split("|") for _, line in read(ROOT / "docs/migrating.md")[1] if line.startswith("| `")]
    named = {flag for row in rows for flag in re.findall(r"`(--[\w-]+)", row[2])}
    assert len(rows) > 100
    assert named - known == set()
