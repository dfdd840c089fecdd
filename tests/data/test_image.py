"""Images from good and bad files, and the layout of crops."""

import numpy as np
import pytest
from PIL import Image

from fusion_jax.data import image as image_module
from fusion_jax.data.image import load_image, static_hd_crops
from fusion_jax.errors import BadRecord


def reason(path, **kwargs):
    with pytest.raises(BadRecord) as e:
        load_image(path, **kwargs)
    return e.value


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode).save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (5, 3))
    assert (np.asarray(image) == 255).all()


def test_exif_rotation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (5, 3)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (5, 3)


def test_bad_files(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    for name in ("a.jpg", "a.png"):
        Image.fromarray(noise).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert reason(tmp_path / name).reason == "corrupt_image"
    (tmp_path / "b.jpg").write_text("<html>not found</html>")
    assert reason(tmp_path / "b.jpg").reason == "corrupt_image"
    error = reason(tmp_path / "none.jpg", where="d.json, record 4")
    assert error.reason == "missing_image"
    assert error.where == "d.json, record 4"
    assert "none.jpg" in str(error)
    assert reason(tmp_path).reason == "missing_image"
    assert reason("a\0b").reason == "missing_image"
    Image.fromarray(noise).save(tmp_path / "c.png")
    monkeypatch.setattr(image_module, "MAX_PIXELS", 40 * 50 - 1)
    assert reason(tmp_path / "c.png").reason == "image_too_large"
    monkeypatch.setattr(image_module, "MAX_PIXELS", 40 * 50)
    assert load_image(tmp_path / "c.png").size == (50, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow refuses what is twice its own limit
    assert reason(tmp_path / "c.png").reason == "image_too_large"


def test_crops_are_the_quadrants_and_then_the_whole():
    pixels = np.zeros((60, 100, 3), np.uint8)  # not square: both sides are scaled on their own
    pixels[:30, :50], pixels[:30, 50:], pixels[30:, :50], pixels[30:, 50:] = 10, 20, 30, 40
    crops = static_hd_crops(Image.fromarray(pixels), 16)
    assert crops.shape == (5, 16, 16, 3)
    assert crops.dtype == np.uint8
    for crop, value in zip(crops, (10, 20, 30, 40)):
        assert (crop[4:12, 4:12] == value).all()
    assert [crops[4, r, c, 0] for r in (2, 13) for c in (2, 13)] == [10, 20, 30, 40]


def test_whole_image_alone():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (33, 47, 3), np.uint8))
    whole = static_hd_crops(image, 16, with_quadrants=False)
    assert whole.shape == (1, 16, 16, 3)
    assert whole.flags.writeable
    assert (whole[0] == static_hd_crops(image, 16)[4]).all()
