"""Config files that somebody made to do harm: of unbounded cost, or with values that no schema has. None is over 100 kB."""

import os
from pathlib import Path

NINE = ",".join(["x"] * 9)
BOMB = "\n".join([f"b0: &a0 [{NINE}]", *(f"b{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))])
LONG = "x" * 90_000
TEXTS: dict[str, str | bytes] = {
    "aliases multiply lists": f"TRAIN: {{EPOCHS: *a9}}\n{BOMB}\n".replace("TRAIN: {EPOCHS: *a9}\n", "", 1) + "TRAIN: {EPOCHS: *a9}\n",
    "aliases multiply text": f"TAG: &t {'x' * 4000}\nBASE: [{','.join(['*t'] * 5000)}]\n",
    "aliases multiply merged sections": "a: &a {k: 1}\n" + "\n".join(f"m{i}: &m{i} {{<<: [*a{', *m' + str(i - 1) if i else ''}, *a]}}" for i in range(500)),
    "an alias in its own section": "MODEL: &m {NAME: *m}\n",
    "an alias in its own list": "BASE: &b [*b]\n",
    "an alias of nothing": f"TAG: *{LONG}\n",
    "deep lists": "BASE: " + "[" * 40_000,
    "deep sections": "{a: " * 20_000,
    "deep blocks": "- " * 40_000,
    "deep keys": "? " * 40_000,
    "many values": "- 1\n" * 20_001,
    "a list as a key": "? [TRAIN]\n: 1\n",
    "a section as a key": "{{a: 1}: 2}\n",
    "a key given twice": "TAG: a\nTAG: b\n",
    "a nested key given twice": "TRAIN: {EPOCHS: 3, EPOCHS: 4}\n",
    "a long key": f"? {LONG}\n: 1\n",
    "a long value": f"TAG: {LONG}\n",
    "a long choice": f"TRAIN: {{AMP: {'x' * 4000}}}\n",
    "a long name": f"MODEL: {{NAME: {'x' * 4000}}}\n",
    "a long unknown key": f"? {'K' * 4000}\n: 1\n",
    "a long timeline": f"TIMELINE: {{MAGNITUDE: '{'0:1,' * 1000}'}}\n",
    "a long list": f"SCHEDULE: {{MILESTONES: [{','.join(map(str, range(2000)))}]}}\n",
    "Python objects": "TAG: !!python/object/apply:os.system ['touch pwned']\n",
    "a Python name": "TAG: !!python/name:os.system\n",
    "another tag": "TAG: !something x\n",
    "a set": "TRAIN: !!set {EPOCHS}\n",
    "bytes": "TAG: !!binary aGVsbG8=\n",
    "an integer without digits": "TRAIN: {EPOCHS: !!int ''}\n",
    "a boolean that is none": "TRAIN: {BENCHMARK: !!bool x}\n",
    "a float that is none": "OPTIM: {LR: !!float x}\n",
    "an integer of 5000 digits": f"TRAIN: {{EPOCHS: {'9' * 5000}}}\n",
    "an integer of 90000 hexadecimal digits": f"TRAIN: {{EPOCHS: 0x{'f' * 90_000}}}\n",
    "an integer of 60 digits": f"TRAIN: {{EPOCHS: {'9' * 60}}}\n",
    "a negative integer": "TRAIN: {EPOCHS: -9223372036854775809}\n",
    "infinity": "OPTIM: {LR: .inf}\n",
    "not a number": "OPTIM: {LR: .nan}\n",
    "not a number in a list": "DATA: {MEAN: [.nan, 0, 0]}\n",
    "an overflowing float": "OPTIM: {LR: 1e999999}\n",
    "a date": "TRAIN: {EPOCHS: 2024-01-01}\n",
    "a date of month 13": "TRAIN: {EPOCHS: 2024-13-99}\n",
    "null for a section": "TRAIN:\n",
    "null for a value": "TRAIN: {EPOCHS: }\n",
    "a number as the file": "3\n",
    "two documents": "TAG: a\n---\nTAG: b\n",
    "a directive": "%YAML 9.9\n---\nTAG: a\n",
    "NUL bytes": b"TAG: a\0b\n",
    "an escaped NUL": 'DATA: {PATH: "/tmp/\\0"}\n',
    "an escaped NUL in a base": 'BASE: "a\\0.yaml"\n',
    "half of a surrogate pair": 'DATA: {PATH: "\\ud800"}\n',
    "bytes that are not UTF-8": b"TAG: \xff\xfe\n",
    "UTF-16": "TAG: a\n".encode("utf-16"),
    "an executable": b"\x7fELF\x02\x01\x01" + bytes(4000),
    "a model of no name": "MODEL: {NAME: 'x y'}\nNAME: a\n",
    "a model in another folder": "MODEL: {NAME: ../../../etc/x}\n",
    "a name of two lines": 'NAME: "a\\nb"\n',
    "a tag that clears the screen": 'TAG: "\\x1b[2J"\n',
    "a name of a folder": "NAME: ../../etc\n",
    "a base that is itself": "BASE: own.yaml\n",
    "a base of 5000 characters": f"BASE: {'x' * 4000}\n",
    "a long base in no folder": f"BASE: nowhere/{'x' * 3900}.yaml\n",
    "a base that is a folder": "BASE: .\n",
    "a base that is a pipe": "BASE: pipe\n",
    "a base that is a device": "BASE: /dev/zero\n",
    "a base in a circle of links": "BASE: circle\n",
    "a base that doubles": "BASE: [double0.yaml, double0.yaml]\n",
    "many bases": f"BASE: [{','.join(['empty.yaml'] * 5000)}]\n",
    "a base that is a number": "BASE: [3]\n",
    "a program": "MODEL: {MODULE: pipe.py}\n",
    "sections that are lists": "RECIPE: [MODE]\nTRAIN: []\n",
    "a mode that is a list": "RECIPE: {MODE: [published]}\n",
    "an overlay that is a list": "PUBLISHED: [1]\n",
    "an overlay of wrong sections": "PUBLISHED: {TRAIN: 3}\n",
    "a merge of a number": "<<: 3\n",
}  # fmt: skip


def write_hostile_configs(folder: Path) -> dict[str, Path]:
    """Write the files, each into a folder of its own with what it refers to; return their paths by what is wrong with them."""
    found = {}
    for number, (name, text) in enumerate(TEXTS.items()):
        own = folder / f"{number:02d}"
        own.mkdir()
        found[name] = own / "own.yaml"
        found[name].write_bytes(text if isinstance(text, bytes) else text.encode())
        (own / "empty.yaml").write_text("")
        os.mkfifo(own / "pipe")
        os.mkfifo(own / "pipe.py")
        (own / "circle").symlink_to("circle")
        for i in range(40):
            (own / f"double{i}.yaml").write_text(f"BASE: [double{i + 1}.yaml, double{i + 1}.yaml]\n")
        (own / "double40.yaml").write_text("")
    found["a large file"] = folder / "large.yaml"
    with found["a large file"].open("wb") as file:
        file.truncate(2**33)  # of holes: it takes no space
    for name, make in (("a pipe", os.mkfifo), ("a folder", os.mkdir)):
        found[name] = folder / f"{name[2:]}.yaml"
        make(found[name])
    return found
