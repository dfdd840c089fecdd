"""Images from good and bad files, and the layout of crops."""

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from fusion_jax.benchmarking.input_pipeline import page, photo
from fusion_jax.data import decoding, resample
from fusion_jax.data import image as image_module
from fusion_jax.data.image import load_image, read_crops, read_resized, read_size, static_hd_crops
from fusion_jax.errors import BadRecord, UserError


def reason(path, **kwargs):
    with pytest.raises(BadRecord) as e:
        load_image(path, **kwargs)
    return e.value


def refusal(data):
    with pytest.raises(BadRecord) as e:
        load_image(data, "here")
    assert e.value.where == "here"
    return e.value.reason


def encode(image, form, **kwargs):
    file = io.BytesIO()
    image.save(file, form, **kwargs)
    return file.getvalue()


def png(width, height, bits, kind, rows=b""):
    """A PNG file from its rows of bytes; kind 0 grey, 2 colour, 4 grey with alpha, 6 colour with alpha."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    start, body, end = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + start + body + end


@pytest.fixture
def picture():
    """A colourful smooth image, so that lossy formats keep it nearly as it is."""
    y, x = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([4 * x, 5 * y, 255 - 2 * x - 2 * y], -1).astype(np.uint8))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "GIF", "JPEG2000", "AVIF", "MPO"])
def test_every_format(tmp_path, form, picture):
    (tmp_path / "a").write_bytes(encode(picture, form))
    image = load_image(tmp_path / "a")
    assert (image.mode, image.size) == ("RGB", (64, 48))
    exact = form in ("PNG", "BMP", "TIFF", "PPM")
    limit = 0 if exact else 8
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture)).mean() <= limit
    published = Image.open(tmp_path / "a").convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(published))
    np.testing.assert_array_equal(np.asarray(load_image((tmp_path / "a").read_bytes(), "")), np.asarray(published))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode).save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (5, 3))
    assert (np.asarray(image) == 255).all()


def test_cmyk_jpeg_is_inverted_as_adobe_writes_it():
    cyan, black = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95), (0, 0, 0, 255)
    assert b"Adobe" in cyan[:40]
    assert np.abs(np.asarray(load_image(cyan, "")).astype(int) - (0, 255, 255)).max() < 4
    assert np.asarray(load_image(encode(Image.new("CMYK", (16, 16), black), "JPEG"), "")).max() < 4


def test_transparency_is_left_out(picture):
    clear = picture.copy()
    clear.putalpha(0)
    for form in ("PNG", "TIFF"):
        np.testing.assert_array_equal(np.asarray(load_image(encode(clear, form), "")), np.asarray(picture))
    lossless = encode(clear, "WEBP", lossless=True, exact=True)
    np.testing.assert_array_equal(np.asarray(load_image(lossless, "")), np.asarray(picture))
    palette = picture.quantize(16)
    colours = np.asarray(palette.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of transparency that convert("RGB") loses
        for transparency in (3, bytes([0, 128, 255, 7])):
            for form in ("PNG", "GIF") if isinstance(transparency, int) else ("PNG",):
                image = load_image(encode(palette, form, transparency=transparency), "")
                np.testing.assert_array_equal(np.asarray(image), colours)
        keyed = encode(picture, "PNG", transparency=(0, 0, 255))
        np.testing.assert_array_equal(np.asarray(load_image(keyed, "")), np.asarray(picture))


def test_first_of_several_pictures(picture):
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        second = Image.new("RGB", picture.size, (255, 0, 0))
        data = encode(picture, form, save_all=True, append_images=[second])
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert np.abs(np.asarray(load_image(data, "")).astype(int) - np.asarray(picture)).mean() < 8


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 255, 256, 32768], [40000, 65279, 65280, 65535]], np.uint16)
    for form in ("PNG", "TIFF", "PPM", "JPEG2000"):
        pixels = np.asarray(load_image(encode(Image.fromarray(values), form), ""))
        assert pixels.shape == (2, 4, 3)
        for channel in range(3):
            np.testing.assert_array_equal(pixels[..., channel], values >> 8)
    swapped = encode(Image.frombytes("I;16B", (4, 2), values.astype(">u2").tobytes()), "TIFF")
    np.testing.assert_array_equal(np.asarray(load_image(swapped, ""))[..., 1], values >> 8)
    # Colour and alpha of 16 bits: Pillow itself takes the upper 8.
    colour = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 255, 256, 65535, 40000, 511, 512))
    np.testing.assert_array_equal(np.asarray(load_image(colour, "")), [[[0, 1, 255], [156, 1, 2]]])
    alpha = png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 255, 0, 40000, 65535))
    np.testing.assert_array_equal(np.asarray(load_image(alpha, "")), [[[0] * 3, [156] * 3]])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO", "TIFF"])
def test_exif_rotation_is_applied_to_tiff_alone(tmp_path, form, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture, form, exif=exif)
    image = load_image(data)
    assert image.size == read_size(data) == ((48, 64) if form == "TIFF" else (64, 48))
    if form in ("PNG", "TIFF"):
        expected = picture.transpose(Image.Transpose.ROTATE_270) if form == "TIFF" else picture
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "GIF", "JPEG2000", "AVIF", "MPO"])
def test_size_without_decoding(tmp_path, form, picture):
    data = encode(picture, form)
    (tmp_path / "a").write_bytes(data)
    assert read_size(data) == read_size(tmp_path / "a") == load_image(data).size


def test_size_needs_the_header_alone(tmp_path):
    data = png(9, 7, 8, 2)
    (tmp_path / "a.png").write_bytes(data[:50])
    assert read_size(data) == read_size(tmp_path / "a.png") == (9, 7)
    assert reason(tmp_path / "a.png").reason == "corrupt_image"


def test_size_is_refused_as_the_image_is(tmp_path, monkeypatch):
    def both(image):
        errors = []
        for read in (load_image, read_size):
            with pytest.raises(BadRecord) as e:
                read(image, "here")
            errors.append((e.value.reason, e.value.where, str(e.value)))
        assert errors[0] == errors[1]
        return errors[0][0]

    for data in (b"", b"<html>", b"GIF89a", png(0, 5, 8, 2), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        assert both(data) == "corrupt_image"
    for width, height in ((9000, 9000), (30_000, 30_000), (1, 70_000)):
        assert both(png(width, height, 8, 2)) == "image_too_large"
    assert both(tmp_path / "none.png") == both(tmp_path) == both("a\0b") == "missing_image"
    (tmp_path / "a.png").write_bytes(png(3, 2, 8, 2, b"\0" * 20))
    assert read_size(tmp_path / "a.png") == load_image(tmp_path / "a.png").size == (3, 2)
    monkeypatch.setattr(decoding, "MAX_BYTES", (tmp_path / "a.png").stat().st_size - 1)
    assert both(tmp_path / "a.png") == both((tmp_path / "a.png").read_bytes()) == "image_too_large"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_truncated_files(form):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    data = encode(noise, form)
    load_image(data, "here")
    for keep in (len(data) // 2, len(data) - 40, 20, 1):
        assert refusal(data[:keep]) == "corrupt_image"


def test_progressive_jpeg_and_its_truncation():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    data = encode(noise, "JPEG", progressive=True)
    assert load_image(data, "").size == (50, 40)
    assert refusal(data[: len(data) // 2]) == "corrupt_image"


def test_what_is_no_image():
    for data in (
        b"",
        b"\0" * 1000,
        b"<html>not found</html>",
        b"%PDF-1.4 ",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBP",
    ):
        assert refusal(data) == "corrupt_image"
    with pytest.raises(BadRecord, match="no image of a known format"):
        load_image(b"<html>", "here")
    broken = bytearray(png(50, 40, 8, 2, b"\0" * 151 * 40))
    broken[-20] ^= 1  # within the pixels, whose checksum is then wrong
    assert refusal(bytes(broken)) == "corrupt_image"


def test_postscript_is_not_run():
    assert Image.open(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")).format == "EPS"
    assert refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n") == "corrupt_image"


def test_bad_files(tmp_path):
    (tmp_path / "b.jpg").write_text("<html>not found</html>")
    assert reason(tmp_path / "b.jpg").reason == "corrupt_image"
    assert "b.jpg" in str(reason(tmp_path / "b.jpg", where="d.json, record 4"))
    error = reason(tmp_path / "none.jpg", where="d.json, record 4")
    assert error.reason == "missing_image"
    assert error.where == "d.json, record 4"
    assert "none.jpg" in str(error)
    assert reason(tmp_path).reason == "missing_image"
    assert reason("a\0b").reason == "missing_image"


def test_sizes_are_refused_before_decoding(monkeypatch):
    for width, height in ((0, 5), (5, 0)):
        assert refusal(png(width, height, 8, 2)) == "corrupt_image"
    # None of these holds pixels: had they been decoded, the reason would be another one.
    for width, height in ((9000, 9000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (1, 70_000), (70_000, 1)):
        assert refusal(png(width, height, 8, 2)) == "image_too_large"
    gif = bytearray(encode(Image.new("L", (4, 4)), "GIF"))
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    assert refusal(bytes(gif)) == "image_too_large"
    jpeg = bytearray(encode(Image.new("L", (4, 4)), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    assert refusal(bytes(jpeg)) == "image_too_large"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # between one and two times Pillow's own limit it only warns
        assert refusal(png(10_000, 10_000, 8, 2)) == "image_too_large"
    assert refusal(png(8000, 8000, 8, 2)) == "corrupt_image"  # allowed, but empty


def test_limits_include_their_value(tmp_path, monkeypatch):
    Image.new("RGB", (50, 40)).save(tmp_path / "c.png")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 50 - 1)
    assert reason(tmp_path / "c.png").reason == "image_too_large"
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 50)
    assert load_image(tmp_path / "c.png").size == (50, 40)
    size = (tmp_path / "c.png").stat().st_size
    monkeypatch.setattr(decoding, "MAX_BYTES", size)
    assert load_image(tmp_path / "c.png").size == (50, 40)
    monkeypatch.setattr(decoding, "MAX_BYTES", size - 1)
    assert reason(tmp_path / "c.png").reason == "image_too_large"


def test_thin_images():
    for size in ((1, 5000), (5000, 1), (1, 1)):
        for decode in ("exact", "fast"):
            crops = read_crops(encode(Image.new("RGB", size, (9, 99, 199)), "PNG"), 16, decode=decode)
            assert crops.shape == (5, 16, 16, 3)
            assert (crops == (9, 99, 199)).all()


def test_crops_are_the_quadrants_and_then_the_whole():
    pixels = np.zeros((60, 100, 3), np.uint8)  # not square: both sides are scaled on their own
    pixels[:30, :50], pixels[:30, 50:], pixels[30:, :50], pixels[30:, 50:] = 10, 20, 30, 40
    for decode in ("exact", "fast"):
        crops = read_crops(encode(Image.fromarray(pixels), "PNG"), 16, decode=decode)
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


@pytest.mark.parametrize("size", [(1280, 960), (200, 150), (97, 640), (64, 64)])
def test_exact_crops_come_from_the_decoded_original(tmp_path, size):
    path = tmp_path / "a.jpg"
    photo(0, *size).save(path, quality=90)
    expected = static_hd_crops(Image.open(path).convert("RGB"), 64)
    np.testing.assert_array_equal(read_crops(path, 64), expected)
    np.testing.assert_array_equal(read_crops(path.read_bytes(), 64, with_quadrants=False), expected[4:])


# Of crops cut from `image.resize((128, 128))` and `image.resize((64, 64))` in Pillow 11.3 and 12.0.
DIGESTS = {
    (320, 200): "b7796daeab11385e",
    (97, 640): "42568261e9e966ab",
    (60, 500): "182a615b5a360a0e",
    (50, 40): "78b53a837703d12c",
}


@pytest.mark.parametrize("by_pillow", [False, True])
@pytest.mark.parametrize("size", DIGESTS)
def test_exact_crops_are_the_published_ones_in_every_version_of_pillow(size, by_pillow, monkeypatch):
    if by_pillow:  # as where there is no C compiler
        monkeypatch.setattr(resample, "_library", lambda: None)
    width, height = size
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    crops = static_hd_crops(Image.fromarray(noise), 64)
    assert hashlib.sha256(crops.tobytes()).hexdigest()[:16] == DIGESTS[size]


def test_one_file_at_several_sizes(tmp_path):
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (60, 80, 3), np.uint8))
    image.save(tmp_path / "image.png")
    sizes = [(50, 30), (30, 70), (120, 90), (1, 9)]
    for found in (
        read_resized(tmp_path / "image.png", sizes),
        read_resized((tmp_path / "image.png").read_bytes(), sizes, "fast"),
    ):
        for pixels, size in zip(found, sizes, strict=True):
            across = image.resize((size[0], 60), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(pixels, np.asarray(across.resize(size, Image.Resampling.BICUBIC)))


# Above the sizes from which JPEGs are decoded at 1/2 and 1/4: 384 and 768 with quadrants of 64, half of that without,
# where the page's letters shrink to three pixels.
@pytest.mark.parametrize("size", [(385, 389), (515, 517), (1283, 961)])
@pytest.mark.parametrize("with_quadrants", [True, False])
def test_fast_crops_are_close(tmp_path, size, with_quadrants):
    for make, limit in ((photo, 1), (page, 3 if with_quadrants else 6)):
        make(1, *size).save(tmp_path / "a.jpg", quality=90)
        exact = read_crops(tmp_path / "a.jpg", 64, with_quadrants).astype(int)
        fast = read_crops(tmp_path / "a.jpg", 64, with_quadrants, "fast").astype(int)
        assert fast.shape == exact.shape
        assert 0 < np.abs(fast - exact).mean() < limit


def test_fast_crops_are_resized_from_what_the_file_covers():
    data = encode(photo(1, 387, 389), "JPEG", quality=90)
    half = Image.open(io.BytesIO(data))
    half.draft("RGB", (193, 194))
    assert half.size == (194, 195)
    across = half.resize((64, 195), Image.Resampling.BICUBIC, (0, 0, 193.5, 195))
    expected = across.resize((64, 64), Image.Resampling.BICUBIC, (0, 0, 64, 194.5))
    np.testing.assert_array_equal(read_crops(data, 64, decode="fast")[4], np.asarray(expected))


def test_fast_is_exact_where_an_image_is_too_small(tmp_path):
    for size in ((127, 300), (213, 160), (383, 500)):
        photo(1, *size).save(tmp_path / "a.jpg", quality=90)
        fast = read_crops(tmp_path / "a.jpg", 64, decode="fast")
        np.testing.assert_array_equal(fast, read_crops(tmp_path / "a.jpg", 64))


def test_reduced_decoding_keeps_what_is_needed(picture):
    def decoded(data, at_least):
        image, covered = image_module._decode(data, "", at_least)
        assert image.mode == "RGB"
        return image.size, covered

    jpeg = encode(picture.resize((401, 300)), "JPEG")
    for at_least in (None, 301, 151):
        assert decoded(jpeg, at_least) == ((401, 300), (401, 300))
    assert decoded(jpeg, 150) == ((201, 150), (200.5, 150))
    assert decoded(jpeg, 75) == ((101, 75), (100.25, 75))
    assert decoded(jpeg, 1) == ((51, 38), (50.125, 37.5))
    for kind in ("L", "CMYK"):
        assert decoded(encode(picture.convert(kind), "JPEG"), 24) == ((32, 24), (32, 24))
    assert decoded(encode(picture, "PNG"), 24) == ((64, 48), (64, 48))


def test_fast_crops_of_bad_files(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode(photo(0, 200, 150), "JPEG")[:3000])
    for image, where in ((tmp_path / "a.jpg", "d.json, record 4"), ((tmp_path / "a.jpg").read_bytes(), "shard 3")):
        for decode in ("exact", "fast"):
            with pytest.raises(BadRecord) as e:
                read_crops(image, 16, decode=decode, where=where)
            assert (e.value.reason, e.value.where) == ("corrupt_image", where)


def test_unknown_way_of_decoding(picture):
    with pytest.raises(UserError, match="decode='quick' is unknown; allowed: exact, fast"):
        read_crops(encode(picture, "PNG"), 16, decode="quick")
