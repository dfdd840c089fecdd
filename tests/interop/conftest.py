"""Folders that several tests of imports read."""

import pytest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a vision tower, `vision`, and a language model of each kind of `helpers.backbones`."""
    from helpers import backbones

    return backbones.write_folders(tmp_path_factory.mktemp("backbones"))
