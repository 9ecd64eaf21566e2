"""A few hundred changed files for each parser of data/: the errors of their kind only; python -m tests.helpers.fuzz runs longer."""

import pytest

from tests.helpers.fuzz import fuzz
from tests.helpers.fuzz_data import data_targets

NAMES = ["jpeg", "picture", "tar", "zip", "index", "mat", "classes", "real", "labels", "truth", "kit", "shard"]


@pytest.fixture(scope="module")
def targets():
    return data_targets()


def test_every_parser_is_named(targets):
    assert list(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_changed_files_give_no_other_error(name, targets, tmp_path):
    count, findings = fuzz(targets[name], 0.5, 7, tmp_path)
    assert findings == []
    assert count > 0
