"""Config files made to do harm: each is refused, soon, in little memory, with a short message that names the file or key."""

import math
import re
import subprocess
import sys
import time

import pytest
import yaml

import config
from common.text import LONGEST, cut, shorten
from config.lookup import config_differences, get
from config.yaml_reader import parse_yaml
from tests.conftest import ROOT
from tests.helpers.hostile_configs import TEXTS, write_hostile_configs

LONGEST_MESSAGE = 2000


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return write_hostile_configs(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("name", [*TEXTS, "a large file", "a pipe", "a folder"])
def test_hostile_config_is_refused_with_a_short_message(hostile, name, monkeypatch):
    monkeypatch.chdir(hostile[name].parent)
    if name in ("a model of no name", "a program"):  # refused when the model is built
        config.load(str(hostile[name]))
        return
    with pytest.raises(ValueError, match=r".") as caught:
        config.load(str(hostile[name]))
    text = str(caught.value)
    assert len(text) < LONGEST_MESSAGE
    assert "own.yaml" in text or str(hostile[name]) in text or re.search(r"[A-Z]{3,}", text), text
    assert not list(hostile[name].parent.glob("pwned"))


def test_hostile_configs_are_small():
    assert max(len(text) for text in TEXTS.values()) < 100_000


ALL = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))
import config
slow = []
for file in sys.argv[1:]:
    since = time.process_time()
    try:
        config.load(file)
    except ValueError:
        pass
    if time.process_time() - since > 5:
        slow.append(file)
print(slow)
"""


def test_hostile_configs_take_little_memory_and_time(hostile):
    argv = [sys.executable, "-c", ALL, *map(str, hostile.values())]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


WRONG = [None, True, -1, 10**60, 1.5, math.nan, "", "x", "x" * 5000, [None] * 3, ["x"] * 2000, {"a": 1}]


@pytest.mark.parametrize("key", config.keys(config.defaults()))
def test_wrong_value_of_any_key_is_a_value_error(tmp_path, key):
    file = tmp_path / "a.yaml"
    accepted = 0
    for value in WRONG:
        tree = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        file.write_text(yaml.safe_dump(tree))
        message = ""
        try:
            found = config.load(str(file))
        except ValueError as error:
            message = str(error)
        assert len(message) < LONGEST_MESSAGE
        if not message:
            accepted += 1
            assert key == "BASE" or type(get(found, key)) is type(get(config.defaults(), key))
    assert accepted < 6


@pytest.mark.parametrize(
    "text", ["[" * 9999, "9" * 9999, "2024-13-01", "!!int ''", "? [a]\n: 1", "x" * 2**19, '"\\ud800"', "\0"]
)
def test_hostile_option_is_a_value_error(text):
    for key in ("TRAIN.EPOCHS", "OPTIM.LR", "OPTIM.BETAS", "LOG.TENSORBOARD"):
        with pytest.raises(ValueError, match=key) as caught:
            config.load((), [key, text])
        assert len(str(caught.value)) < LONGEST_MESSAGE


def test_values_that_configs_hold_are_read_as_before():
    text = "a: &a {i: 3, f: 1.5, e: 1e-3, t: true, n: null, s: x, o: off, l: [1, 2]}\nb: *a\nc: {<<: *a, i: 4}\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("d: 2024-01-01") == {"d": "2024-01-01"}  # a date is a text here: TAG takes it
    assert parse_yaml("x: ''") == {"x": ""}
    assert parse_yaml("") is None


def test_base_named_by_several_files_is_no_circle(tmp_path):
    (tmp_path / "base.yaml").write_text("TAG: a\n")
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text("BASE: base.yaml\n")
    (tmp_path / "both.yaml").write_text("BASE: [one.yaml, two.yaml]\n")
    assert config.load(str(tmp_path / "both.yaml")).TAG == "a"


class Endless:
    def __repr__(self):
        return "x" * 10**6


NESTED = [0]
for _ in range(60):
    NESTED = [NESTED] * 9


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, [1] * 10**6, {i: i for i in range(10**5)}, 10**6000, [10**6000], Endless(), NESTED, b"x" * 10**6],
    ids=range(8),
)
def test_long_values_are_shortened_in_little_time(value):
    since = time.process_time()
    assert len(shorten(value)) < LONGEST + 30
    assert time.process_time() - since < 1


@pytest.mark.parametrize("value", ["x", "it's", "\x1b\n", 3, 1.5, None, [1, 2], (1,), {"a": [1]}, True, "猫" * 200])
def test_short_values_are_shown_whole(value):
    assert shorten(value) == repr(value)


def test_cut_keeps_both_ends():
    assert cut("a" * 400 + "b" * 400, 90) == "a" * 60 + " ... " + "b" * 30
    assert cut("ab", 2) == "ab"


def test_differences_of_hostile_trees_are_short():
    old, new = {1: "x" * 10**6, "a": NESTED}, {1: "y" * 10**6, "a": 3}
    assert all(len(line) < 1000 for line in config_differences(old, new, ()))


RAW = re.compile(r"\{[^{}]*!r\}")


@pytest.mark.parametrize("package", ["common", "config", "data", "engine", "trainer", "tools"])
def test_values_in_messages_are_shortened(package):
    """`{value!r}` has no bound; common.text.shorten has. Models receive values that the config has bounded."""
    found = [
        f"{path.name}: {raw}"
        for path in (ROOT / package).rglob("*.py")
        for raw in RAW.findall(path.read_text())
        if "[:" not in raw
    ]
    assert found == (["rng.py: {purpose!r}"] if package == "common" else [])  # one of our own words
