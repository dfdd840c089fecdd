"""What is done about image files that are made to be slow, to fill memory or to say one thing and be another."""

import io
import os
import re
import stat
import struct
import threading
import zlib

import numpy as np
import pytest
from helpers.cpu_time import takes_less_than
from PIL import Image

from fusion_jax.data import formats, jpeg2000, resample, shard_writing
from fusion_jax.data import image as image_module
from fusion_jax.data.avif import coded_pixels
from fusion_jax.data.image import load_image, read_crops, read_size, read_tiles
from fusion_jax.data.tiles import Tiling
from fusion_jax.errors import BadRecord


def encode(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def refusal(data):
    """The reason, and the sentence, with which all readers refuse what they get, in seconds."""
    refusals = []
    with takes_less_than(3):
        for read in (load_image, lambda one, where: read_crops(one, 8, where=where)):
            with pytest.raises(BadRecord) as e:
                read(data, "here")
            refusals.append((e.value.reason, e.value.detail))
        assert refusals[0] == refusals[1]
    return refusals[0]


@pytest.fixture
def picture():
    y, x = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([4 * x, 5 * y, 255 - 2 * x - 2 * y], -1).astype(np.uint8))


def same_pixels(data, other):
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(load_image(other)))


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(tags, data, twice=()):
    """Of one directory, tags being numbers; 273 or 324 is where the data begin."""
    entries = sorted([*tags.items(), *twice])
    listed = b""
    for tag, value in entries:
        listed += struct.pack("<HHII", tag, 4, 1, 8 + 2 + 12 * len(entries) + 4 if tag in (273, 324) else value)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + listed + bytes(4) + data


def iptc(inner, width, height):
    """A picture of any size within a header that says another one."""

    def field(record, tag, data):
        return bytes((0x1C, record, tag)) + struct.pack(">H", len(data)) + data

    head = field(3, 60, b"\1\0") + field(3, 65, b"\1") + field(3, 20, struct.pack(">H", width))
    return head + field(3, 30, struct.pack(">H", height)) + field(3, 120, b"\5") + field(8, 10, inner)


def test_pictures_nested_in_others_are_not_opened(picture):
    nested = iptc(encode(Image.new("L", (1500, 1500)), "PNG"), 10, 10)
    found = Image.open(io.BytesIO(nested))
    assert (found.format, found.size) == ("IPTC", (10, 10))
    found.load()
    assert found.im.size == (1500, 1500)  # what used to overrun the resizer's rows
    assert refusal(nested) == (
        "corrupt_image",
        f"the image is not an image of a known format, which are {formats.ALLOWED}",
    )
    for form in ("ICO", "ICNS", "DDS", "EPS", "PCX", "TGA", "SGI", "DIB"):
        data = encode(picture.resize((32, 32)), form)
        assert Image.open(io.BytesIO(data)).format == form
        assert refusal(data)[0] == "corrupt_image"
        with pytest.raises(BadRecord, match="not an image of a known format"):
            read_size(data)
        with pytest.raises(BadRecord, match="not an image of a known format"):
            shard_writing._look_at(data, "a", 100, "here")


def test_an_image_that_changes_its_size_is_refused_by_the_resizer_and_the_loader(monkeypatch, picture):
    lying = Image.new("RGB", (10, 10))
    lying.im = Image.new("RGB", (1500, 1500)).im
    output = np.empty((1, 8, 8, 3), np.uint8)
    for library in (resample._library, lambda: None):
        monkeypatch.setattr(resample, "_library", library)
        with pytest.raises(ValueError, match="calls itself RGB of 10x10"):
            resample.resample(lying, [output])
        with pytest.raises(ValueError, match="calls itself L"):
            resample.resample(picture.convert("L"), [output])
        with pytest.raises(ValueError, match="cut into 2 tiles"):
            resample.resample(picture, [np.empty((2, 8, 8, 3), np.uint8)])
        with pytest.raises(ValueError, match="float32"):
            resample.resample(picture, [np.empty((1, 8, 8, 3), np.float32)])

    def load(image):
        image.im = Image.new(image.mode, (1500, 1500)).im

    monkeypatch.setattr(image_module.Image.Image, "load", load)  # as a decoder of Pillow's might
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    reason, detail = refusal(encode(Image.new("RGB", (9, 9)), "BMP"))
    assert reason == "corrupt_image" and "decoding it gave RGB of 1500x1500" in detail


def test_metadata_does_not_reach_pillow(picture):
    jpeg, png = encode(picture, "JPEG"), encode(picture, "PNG")
    # A directory whose 600 entries are the same 7000 fractions: dozens of gigabytes for some versions of Pillow.
    entries = b"".join(struct.pack("<HHII", 1000 + i, 5, 7000, 8) for i in range(600))
    directory = (b"II*\0\x08\0\0\0" + struct.pack("<H", 600) + entries + bytes(60_000))[:60_000]
    segments = b""
    for mark, name in ((b"\xff\xe1", b"Exif\0\0"), (b"\xff\xe2", b"MPF\0")):
        segments += mark + struct.pack(">H", 2 + len(name + directory)) + name + directory
    segments += b"\xff\xe1\0\x0aExif\0\0II" * 50_000
    crowded = jpeg[:2] + segments + jpeg[2:]
    texts = [png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 2000
    texts += [png_chunk(b"zTXt", b"\0\0" + zlib.compress(bytes(1_000_000)))] * 2000
    heavy = png[:33] + b"".join(texts) + png[33:]
    with takes_less_than(3):
        same_pixels(crowded, jpeg)
        same_pixels(heavy, png)
        assert read_size(crowded) == read_size(heavy) == picture.size
    assert not Image.open(io.BytesIO(formats.prepare("PNG", heavy)[0])).info


def test_jpegs_keep_what_decides_their_colours(picture):
    ycck = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    assert formats.prepare("JPEG", ycck)[0].count(b"Adobe") == 1
    plain = encode(
        picture, "JPEG", quality=95, exif=b"Exif\0\0" + bytes(300), comment=b"c" * 999, icc_profile=bytes(70_000)
    )
    shorter = formats.prepare("JPEG", plain)[0]
    assert b"JFIF" in shorter and len(shorter) < len(plain) - 70_000
    with Image.open(io.BytesIO(plain)) as image:
        np.testing.assert_array_equal(np.asarray(load_image(plain)), np.asarray(image.convert("RGB")))
    several = encode(picture, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48), (255, 0, 0))])
    with Image.open(io.BytesIO(several)) as image:
        assert image.n_frames == 2
        np.testing.assert_array_equal(np.asarray(load_image(several)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("length", [0, 1])
def test_jpeg_segments_without_a_length(picture, length):
    """libjpeg passes over metadata that are shorter than the number that says so, and refuses all else."""
    data = encode(picture, "JPEG")
    for marker in (*range(0xE0, 0xF0), 0xFE):
        odd = data[:2] + bytes((0xFF, marker, 0, length)) + data[2:]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(odd))), np.asarray(Image.open(io.BytesIO(data))))
        same_pixels(odd, data)
    for marker in (0xC4, 0xDB, 0xDD):
        assert refusal(data[:2] + bytes((0xFF, marker, 0, length)) + data[2:])[0] == "corrupt_image"


def test_scans_of_a_jpeg_are_counted(picture):
    data = encode(picture, "JPEG", progressive=True)
    starts = [found.start() for found in re.finditer(b"\xff\xda", data)]
    part = data[starts[1] : starts[2]]
    assert 2 < len(starts) < 15

    def repeated(scans):
        return data[: starts[2]] + part * (scans - len(starts)) + data[starts[2] :]

    assert load_image(repeated(formats.MAX_SCANS)).size == picture.size
    assert refusal(repeated(formats.MAX_SCANS + 1)) == ("image_too_large", "the image has more than 100 scans")
    # What looks like scans, but lies in metadata or behind the image, does not count.
    load_image(data[:2] + b"\xff\xe1\1\x92" + b"\xff\xda" * 200 + data[2:] + b"\xff\xda" * 200)


def test_webp_is_measured_before_it_is_opened(picture, monkeypatch):
    extended = encode(picture, "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    assert extended[12:16] == b"VP8X"
    for data in (encode(picture, "WEBP"), encode(picture, "WEBP", lossless=True), extended):
        assert formats.prepare("WEBP", data)[1] == picture.size == read_size(data)
    monkeypatch.setattr(image_module.Image, "open", None)  # it would make two canvases
    assert refusal(extended[:24] + b"\xff" * 6 + extended[30:])[0] == "image_too_large"


def test_tiffs_are_no_larger_than_they_say():
    pixels = zlib.compress(bytes(4_000_000))
    sound = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 278: 10, 279: len(pixels), 273: 0}
    assert load_image(tiff(sound, pixels)).size == (10, 10)
    assert "twice" in refusal(tiff(sound, pixels, twice=[(256, 2000)]))[1]
    for tag in (254, 258, 262, 266, 274, 278, 279, 284, 317, 320, 338, 339, 347, 530, 700, 32997):
        assert "twice" in refusal(tiff(sound | {tag: sound.get(tag, 1)}, pixels, twice=[(tag, 1)]))[1], tag
    assert "compression, number 34925" in refusal(tiff(sound | {259: 34925}, pixels))[1]
    tiled = {key: value for key, value in sound.items() if key not in (273, 278, 279)} | {325: len(pixels), 324: 0}
    assert load_image(tiff(tiled | {322: 1024, 323: 1024}, pixels)).size == (10, 10)
    reason, detail = refusal(tiff(tiled | {322: 16, 323: 2**27}, pixels))
    assert reason == "image_too_large" and "tiles of 16x134217728 pixels" in detail
    assert refusal(tiff(tiled | {322: 0, 323: 16}, pixels))[0] == "corrupt_image"
    # Directories whose parts are longer than the file, or that hold a million numbers.
    long = struct.pack("<HHII", 1000, 4, 10_000_000, 8)
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + long + bytes(4)
    assert refusal(data)[0] == "corrupt_image"
    reason, detail = refusal(data + bytes(40_000_000))
    assert reason == "image_too_large" and "numbers in its directory" in detail


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg", "tiff_adobe_deflate"])
def test_tiff_texts_may_stand_twice(picture, compression):
    """Common writers put two descriptions. Which of the two a decoder takes must not matter, of whatever type it is."""
    data = encode(picture, "TIFF", compression=compression)
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    own = [data[at + 2 + 12 * k : at + 14 + 12 * k] for k in range(count)]
    for tag in (269, 270, 305, 306, 315, 33432, 34665, 34675, 42112, 50839, 65000):
        entries = [entry for entry in own if struct.unpack_from("<H", entry)[0] != tag]
        entries += [struct.pack("<HHII", tag, kind, 4, 8) for kind in (2, 7, 1)]  # four bytes, read where they stand
        entries.sort(key=lambda entry: struct.unpack_from("<H", entry)[0])
        listed = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
        same_pixels(data[:4] + struct.pack("<I", len(data)) + data[8:] + listed, data)


def test_tiff_turned_by_its_xmp(picture):
    data = encode(picture, "TIFF", tiffinfo={700: b'<x tiff:Orientation="6"/>'})
    assert read_size(data) == load_image(data).size == (48, 64)
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.rot90(np.asarray(picture), -1))


def test_avif_frames_are_counted(picture):
    clear = picture.copy()
    clear.putalpha(90)
    for image, times in ((picture, 1), (clear, 2)):
        data = encode(image, "AVIF")
        assert coded_pixels(data) == 64 * 48 * times
        assert load_image(data).size == (64, 48)
    film = encode(picture, "AVIF", save_all=True, append_images=[Image.new("RGB", picture.size)])
    assert Image.open(io.BytesIO(film)).n_frames == 2
    assert np.abs(np.asarray(load_image(film)).astype(int) - np.asarray(picture)).mean() < 8


def test_avif_pixels_are_those_of_its_header(monkeypatch):
    data = bytearray(encode(Image.new("L", (2000, 1500)), "AVIF", speed=10))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", 10, 10)
    assert Image.open(io.BytesIO(data)).size == (10, 10) and coded_pixels(bytes(data)) == 3_000_000
    monkeypatch.setattr(formats, "MAX_AV1_PIXELS", 3_000_000)
    assert load_image(bytes(data)).size == (10, 10)  # scaled, as the decoder does it
    monkeypatch.setattr(formats, "MAX_AV1_PIXELS", 2_999_999)
    reason, detail = refusal(bytes(data))
    assert reason == "image_too_large" and "3000000 pixels in all its parts" in detail
    # Frames that are not shown: the unit of the picture three times.
    place = data.index(b"mdat") + 4
    three = data[:place] + data[place:] * 3
    size = len(data) - place
    iloc = data.index(struct.pack(">I", size), data.index(b"iloc"))
    three[iloc : iloc + 4] = struct.pack(">I", 3 * size)
    three[place - 8 : place - 4] = struct.pack(">I", 3 * size + 8)
    assert coded_pixels(bytes(three)) == 9_000_000


def test_slow_decoders_have_limits_of_their_own(picture, monkeypatch):
    runs = (
        struct.pack("<IiiHHIIiiII", 40, 64, 48, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024) + b"\x40\1\0\0" * 48 + b"\0\1"
    )
    runs = b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + runs
    for data, samples in ((encode(picture, "JPEG2000"), 64 * 48 * 3), (runs, 64 * 48)):
        monkeypatch.setattr(formats, "MAX_SLOW_SAMPLES", samples)
        assert load_image(data).size == (64, 48)
        monkeypatch.setattr(formats, "MAX_SLOW_SAMPLES", samples - 1)
        assert refusal(data)[0] == "image_too_large"
        with pytest.raises(BadRecord, match=f"allowed are {samples - 1}"):
            read_size(data)


def test_jpeg2000_header_and_pixels_agree(picture):
    data = bytearray(encode(picture, "JPEG2000"))
    at = data.index(b"ihdr") + 4
    data[at : at + 8] = struct.pack(">II", 480, 640)
    reason, detail = refusal(bytes(data))
    assert (reason, "640x480" in detail, "64x48" in detail) == ("corrupt_image", True, True)
    data = bytearray(encode(Image.new("L", (200, 200)), "JPEG2000"))
    at = data.index(b"\xff\x4f\xff\x51") + 8 + 16
    data[at : at + 8] = struct.pack(">II", 1, 1)
    assert refusal(bytes(data)) == ("image_too_large", "the image has more than 16384 tiles")


@pytest.mark.parametrize("where", ["image", "tile"])
def test_jpeg2000_parts_are_not_tiny(where, monkeypatch):
    """A few bytes that would take gigabytes, in the image's header or in a tile's."""
    data = encode(Image.new("RGB", (300, 300)), "JPEG2000", no_jp2=True, codeblock_size=(16, 16), num_resolutions=6)
    at = data.index(b"\xff\x52")
    end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]

    def styled(precincts, blocks=data[at + 10 : at + 12]):
        own = (
            bytes([data[at + 4] | bool(precincts)]) + data[at + 5 : at + 10] + blocks + data[at + 12 : end] + precincts
        )
        style = b"\xff\x52" + struct.pack(">H", len(own) + 2) + own
        if where == "image":
            return data[:at] + style + data[end:]
        tile = data.index(b"\xff\x90")
        length = struct.unpack_from(">I", data, tile + 6)[0]
        head = data[tile : tile + 6] + struct.pack(">I", length + len(style)) + data[tile + 10 : tile + 12]
        return data[:tile] + head + style + data[tile + 12 :]

    assert load_image(styled(b"")).size == (300, 300)
    formats.prepare("JPEG2000", styled(b"\x77" * 6))
    formats.prepare("JPEG2000", styled(b"", b"\0\0"))
    monkeypatch.setattr(jpeg2000, "MAX_BLOCKS", 3 * 75 * 75 - 1)
    for tiny, said in (
        (b"\x11" * 5 + b"\0", "precincts"),
        (b"\x77" * 5 + b"\x10", "precincts"),
        (b"", "16875 blocks; allowed are 16874"),
    ):
        reason, detail = refusal(styled(tiny) if tiny else styled(tiny, b"\0\0"))
        assert reason == "corrupt_image" and said in detail
    for options in ({}, {"tile_size": (64, 64)}, {"precinct_size": (128, 128)}, {"quality_layers": [20, 5]}):
        for raw in (True, False):
            assert load_image(encode(Image.new("RGB", (300, 200)), "JPEG2000", no_jp2=raw, **options)).size == (
                300,
                200,
            )


def test_jpeg2000_blocks_are_counted():
    """Of any size: their number is what memory is taken for, 240 MB for as many as are allowed."""
    picture = Image.effect_noise((300, 200), 50)
    for shape in ((4, 4), (4, 16), (4, 1024), (1024, 4), (64, 64)):
        data = encode(picture, "JPEG2000", codeblock_size=shape)
        assert np.array_equal(np.asarray(load_image(data))[..., 0], np.asarray(picture))
    # An image of one row, whose blocks have as many values as ones of 8 x 8, but are as many as ones of one row.
    thin = bytearray(encode(Image.new("L", (400, 1)), "JPEG2000", no_jp2=True, codeblock_size=(4, 16)))
    thin[8:12], thin[24:28] = struct.pack(">I", 4 * jpeg2000.MAX_BLOCKS), struct.pack(">I", 4 * jpeg2000.MAX_BLOCKS)
    assert jpeg2000.measure(thin)[0] == (4 * jpeg2000.MAX_BLOCKS, 1)
    thin[8:12] = struct.pack(">I", 4 * jpeg2000.MAX_BLOCKS + 1)
    with pytest.raises(ValueError, match="470001 blocks"):
        jpeg2000.measure(thin)


def test_plain_text_pictures(monkeypatch):
    data = b"P3 # one\n2 # two\n1 9\n# three\r 9 0 0 # four\n 0 9 0\n"
    np.testing.assert_array_equal(np.asarray(load_image(data)), [[[255, 0, 0], [0, 255, 0]]])
    remarks = b"P2 700 700 255 " + b"#\n1 " * 490_000
    with takes_less_than(3):
        assert load_image(remarks).size == (700, 700)
    monkeypatch.setattr(formats, "MAX_TEXT", len(data) - 1)
    assert refusal(data)[0] == "image_too_large"
    for form in (b"Pf", b"PyP", b"PyRGBA", b"P0CMYK", b"P7"):
        assert refusal(form + b" 2 2 255\n" + bytes(64))[0] == "corrupt_image"


@pytest.mark.parametrize(("kind", "channels"), [(5, 1), (6, 3)])
@pytest.mark.parametrize("largest", [1, 9, 254, 256, 4095, 65534, 65535])
def test_ppm_values_are_scaled_as_pillow_scales_them(kind, channels, largest):
    rng = np.random.default_rng(0)
    values = rng.integers(0, min(largest + 2, 65536), (7, 5, channels)).astype(np.uint8 if largest < 256 else ">u2")
    data = b"P%d 5 7 %d\n" % (kind, largest) + values.tobytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        expected = np.asarray(image)
    if channels == 1:
        expected = np.repeat((expected >> 8 if largest > 255 else expected)[..., None], 3, -1)
    np.testing.assert_array_equal(np.asarray(load_image(data)), expected)
    assert refusal(data[:-1])[0] == "corrupt_image"


def test_ppm_values_are_scaled_quickly():
    data = b"P6 3000 2000 4095\n" + bytes(3000 * 2000 * 6)
    with takes_less_than(3):
        assert load_image(data).size == (3000, 2000)


def test_files_of_many_small_parts(picture, monkeypatch):
    gif, png = encode(picture, "GIF"), encode(picture, "PNG")
    at = gif.index(b",", 13)
    jpeg = encode(picture, "JPEG")
    monkeypatch.setattr(formats, "MAX_READS", 10_000)
    for data in (
        jpeg[:2] + b"\xff\xd0" * 10_000 + jpeg[2:],
        gif[:at] + b"!\xfe" + b"\1a" * 10_000 + b"\0" + gif[at:],
        png[:33] + png_chunk(b"tEXt", b"a\0b") * 10_000 + png[33:],
        b"P5 #" + b"a" * 10_000 + b"\n3 3 255\n" + bytes(9),
    ):
        assert refusal(data) == ("image_too_large", "the image is made of too many small parts")


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "folder", "link to itself"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    paths = {"pipe": tmp_path / "pipe", "link to a pipe": tmp_path / "link", "device": "/dev/zero", "folder": tmp_path}
    path = paths.get(kind, tmp_path / "loop")
    reads = (
        load_image,
        read_size,
        lambda one: read_crops(one, 8),
        lambda one: read_tiles(one, Tiling(), 8),
        lambda one: shard_writing._read_image(one, "here"),
    )
    found = []

    def try_all():
        for read in reads:
            with pytest.raises(BadRecord) as e:
                read(path)
            found.append(e.value.reason)

    thread = threading.Thread(target=try_all, daemon=True)
    thread.start()
    thread.join(20)
    assert found == ["missing_image"] * len(reads)


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    """Between the look at the path and its opening."""
    os.mkfifo(tmp_path / "a.png")
    monkeypatch.setattr(formats.os, "stat", lambda path: os.lstat(__file__))
    assert stat.S_ISFIFO(os.lstat(tmp_path / "a.png").st_mode)
    with pytest.raises(BadRecord, match="a pipe, a device or a socket"):
        load_image(tmp_path / "a.png")


def test_sizes_need_the_beginning_of_long_files_alone(tmp_path, picture, monkeypatch):
    reads = []
    whole = formats.read_file
    monkeypatch.setattr(formats, "read_file", lambda *arguments: reads.append(arguments[2:]) or whole(*arguments))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    for form, again in (("JPEG", 0), ("PNG", 0), ("BMP", 0), ("PPM", 0), ("JPEG2000", 0), ("TIFF", 1), ("WEBP", 1)):
        options = {"quality": 100} if form in ("JPEG", "WEBP") else {}
        (tmp_path / "a").write_bytes(encode(noise, form, **options))
        assert (tmp_path / "a").stat().st_size > 1 << 16
        reads.clear()
        assert read_size(tmp_path / "a") == (400, 300)
        assert len(reads) == 1 + again, form
    # A header that is longer than the beginning.
    jpeg = encode(noise, "JPEG")
    (tmp_path / "a").write_bytes(jpeg[:2] + b"\xff\xe1\xff\xff" + bytes(65_533) + jpeg[2:])
    assert read_size(tmp_path / "a") == load_image(tmp_path / "a").size == (400, 300)
