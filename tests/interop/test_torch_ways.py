"""The exported model as people use it, with the packages of the test environment;
`tests/soak/soak_transformers.py` does so under several versions of transformers, with accelerate and peft."""

import functools
import tempfile
import warnings
from pathlib import Path

import pytest
from helpers import fixtures

exported_model = pytest.importorskip("helpers.exported_model", reason="the exported model needs torch and transformers")
import ways  # noqa: E402


@functools.cache
def plain() -> ways.Plain:
    """A model of two sets of latents whose head is its embedding."""
    config = fixtures.tiny(**{"llm.tied_head": True, "latent_counts": (4, 9, 1)})
    folder = tempfile.mkdtemp(dir=exported_model.MODULES.name)
    exported_model.export(Path(folder), config, fixtures.params(config))
    return ways.Plain(folder)


@pytest.mark.parametrize("way", [*ways.GENERATION, *ways.LOADING, *ways.TRAINING], ids=lambda way: way.__name__)
def test_way(way):
    with warnings.catch_warnings():
        # What a later release takes away is not used: transformers announces it so.
        warnings.simplefilter("error", FutureWarning)
        way(plain())
