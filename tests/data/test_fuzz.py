"""A few hundred changed files for each parser of data/: the errors of their kind only; tests/helpers/fuzz_data.py runs longer."""

import pytest

from tests.helpers.fuzz_data import fuzz, registry

NAMES = ["jpeg", "picture", "tar", "zip", "index", "mat", "classes", "real", "labels", "truth", "kit", "shard"]


def test_every_parser_is_named():
    assert list(registry()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_changed_files_give_no_other_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the file of a finding
    assert fuzz(name, 0.5, seed=7) > 0
