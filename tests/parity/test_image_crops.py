"""Crops against those of the published system, byte for byte."""

import os
from pathlib import Path

import numpy as np
import pytest

from fusion_jax.data.image import load_image, static_hd_crops

MODELS = Path(os.environ.get("FUSION_GOLDENS", Path(__file__).parents[2] / ".." / "shared" / "goldens" / "models"))
FOLDER = MODELS.parent / "image"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no golden images in {FOLDER} (set FUSION_GOLDENS)")


def test_static_hd_crops():
    expected = np.load(FOLDER / "static_hd_384.npz")["crops"].transpose(0, 2, 3, 1)
    image = load_image(FOLDER / "source.png")
    np.testing.assert_array_equal(static_hd_crops(image, 384), expected)
    np.testing.assert_array_equal(static_hd_crops(image, 384, with_quadrants=False), expected[4:])
