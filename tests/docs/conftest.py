"""Fixtures for the tests of the documentation."""

import pytest

from tests.helpers.documented_workspace import build_workspace, link_checkout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Folder with links to the checkout's files, and the pages' files."""
    return link_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def workspace(checkout):
    """Checkout with data and finished runs: see Workspace."""
    return build_workspace(checkout)
