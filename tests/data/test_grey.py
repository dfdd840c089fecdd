"""Grey of other than 8 bits: what white is, the same in training and in the exported processor, or a refusal."""

import io
import struct

import numpy as np
import pytest
from helpers.png import png
from PIL import Image

from fusion_jax.data import grey
from fusion_jax.data.image import load_image, read_crops, read_size
from fusion_jax.errors import BadRecord

SIDE = 64
RAMP = np.tile(np.linspace(0, 1, SIDE), (SIDE, 1))
UNSIGNED, SIGNED, FRACTIONS = 1, 2, 3


def tiff(values, order="<", kind=UNSIGNED, bits=None, photometric=1, tags=(), packed=None, places=None):
    """An uncompressed TIFF from (height, width[, channels]) values. tags: {number: (type, value)}."""
    values = np.asarray(values)
    channels = values.shape[2] if values.ndim == 3 else 1
    data = packed or values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = bits or values.dtype.itemsize * 8
    entries = {256: (4, values.shape[1]), 257: (4, values.shape[0]), 258: (3, bits), 259: (3, 1), 262: (3, photometric)}
    entries |= {273: (4, 0), 277: (3, channels), 278: (4, values.shape[0]), 279: (4, len(data)), 339: (3, kind)}
    entries |= dict(tags)
    if channels > 1:
        entries |= {258: (3, (bits,) * channels), 339: (3, (kind,) * channels)}
    code = {3: "H", 4: "I", 8: "h", 9: "i", 11: "f", 12: "d"}
    fields = {tag: (t, v if isinstance(v, tuple) else (v,)) for tag, (t, v) in sorted(entries.items())}
    room = 8 + 2 + 12 * len(fields) + 4
    sizes = {tag: struct.calcsize(f"{order}{len(v)}{code[t]}") for tag, (t, v) in fields.items()}
    outside = sum(size for size in sizes.values() if size > 4)
    fields[273] = (4, places or (room + outside,))
    directory, extra = struct.pack(f"{order}H", len(fields)), b""
    for tag, (t, v) in fields.items():
        packed_value = struct.pack(f"{order}{len(v)}{code[t]}", *v)
        if len(packed_value) > 4:
            place = struct.pack(f"{order}I", room + len(extra))
            extra += packed_value
        else:
            place = packed_value.ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, t, len(v)) + place
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return start + directory + b"\0" * 4 + extra + data


def ramp(top, dtype, low=0):
    values = low + RAMP * (top - low)
    return (values if np.dtype(dtype).kind == "f" else np.rint(values)).astype(dtype)


def by_pillow(values, form="TIFF", **options):
    file = io.BytesIO()
    Image.fromarray(values).save(file, form, **options)
    return file.getvalue()


def png16(values):
    return png(SIDE, SIDE, 16, 0, b"".join(b"\0" + row.tobytes() for row in values.astype(">u2")))


def png16_colour(values, alpha=False):
    pixels = np.repeat(values.astype(">u2")[..., None], 4 if alpha else 3, 2)
    return png(SIDE, SIDE, 16, 6 if alpha else 2, b"".join(b"\0" + row.tobytes() for row in pixels))


def with_sbit(data, bits):
    import zlib

    chunk = b"sBIT" + bytes([bits])
    return data[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def pack12(values):
    flat = values.reshape(-1, 2).astype(np.uint32)
    both = flat[:, 0] << 12 | flat[:, 1]
    return np.stack([both >> 16, both >> 8 & 255, both & 255], 1).astype(np.uint8).tobytes()


def pgm(values, most):
    kind = ">u2" if most > 255 else "u1"
    return b"P5 %d %d %d\n" % (SIDE, SIDE, most) + values.astype(kind).tobytes()


TWELVE = ramp(4095, np.uint16)
RAMPS = {
    "float 0..1": tiff(ramp(1, "f4"), kind=FRACTIONS),
    "float 0..1, big-endian": tiff(ramp(1, "f4"), ">", kind=FRACTIONS),
    "float 0..255": tiff(ramp(255, "f4"), kind=FRACTIONS),
    "float 0..4095": tiff(ramp(4095, "f4"), kind=FRACTIONS),
    "float 0..65535": tiff(ramp(65535, "f4"), kind=FRACTIONS),
    "float 0..1, compressed": by_pillow(ramp(1, "f4"), compression="tiff_adobe_deflate"),
    "float -1..1, stated": tiff(ramp(1, "f4", -1), kind=FRACTIONS, tags={340: (11, -1.0), 341: (11, 1.0)}),
    "float 0..1, white is 0": tiff(ramp(1, "f4"), kind=FRACTIONS, photometric=0),
    "int32 0..65535": tiff(ramp(65535, "i4"), kind=SIGNED),
    "int32 0..255": tiff(ramp(255, "i4"), kind=SIGNED),
    "int32 0..1": tiff((RAMP > 0.5).astype("i4"), kind=SIGNED),
    "int32, all its bits": tiff(ramp(2**31 - 1, "i4"), kind=SIGNED),
    "int32 0..1023, big-endian": tiff(ramp(1023, "i4"), ">", kind=SIGNED),
    "int32 0..100000, stated": tiff(ramp(100_000, "i4"), kind=SIGNED, tags={341: (9, 100_000)}),
    "uint32 0..65535": tiff(ramp(65535, "u4")),
    "uint32, all its bits": tiff(ramp(2**32 - 1, "u4")),
    "uint32, 12 bits, compressed": by_pillow(ramp(4095, "i4"), compression="tiff_lzw"),
    "int16 -1024..3071, stated": tiff(ramp(3071, "i2", -1024), kind=SIGNED, tags={340: (8, -1024), 341: (8, 3071)}),
    "int16, all its bits": tiff(ramp(32767, "i2"), kind=SIGNED),
    "int16, 12 bits": tiff(ramp(4095, "i2"), kind=SIGNED),
    "int16, big-endian": tiff(ramp(4095, "i2"), ">", kind=SIGNED),
    "int8": tiff(ramp(127, "i1"), kind=SIGNED),
    "int8, stated": tiff(ramp(127, "i1", -128), kind=SIGNED, tags={340: (8, -128), 341: (8, 127)}),
    "12 bits packed": tiff(TWELVE, bits=12, packed=pack12(TWELVE)),
    "10 bits in 16": tiff(ramp(1023, np.uint16)),
    "12 bits in 16": tiff(TWELVE),
    "12 bits in 16, big-endian": tiff(TWELVE, ">"),
    "12 bits in 16, compressed": by_pillow(TWELVE, compression="tiff_lzw"),
    "12 bits in 16, stated": tiff(TWELVE, tags={281: (3, 4095)}),
    "12 bits in 16, stated as the default": tiff(TWELVE, tags={281: (3, 65535)}),
    "0..3000 in 16, stated": tiff(ramp(3000, np.uint16), tags={281: (3, 3000)}),
    "14 bits in 16": tiff(ramp(16383, np.uint16)),
    "8 bits in 16": tiff(ramp(255, np.uint16)),
    "16 bits": tiff(ramp(65535, np.uint16)),
    "16 bits, big-endian": tiff(ramp(65535, np.uint16), ">"),
    "16 bits, white is 0": tiff(ramp(65535, np.uint16), photometric=0),
    "16 bits, several pages": by_pillow(
        TWELVE, save_all=True, append_images=[Image.fromarray(np.zeros((9, 9), np.uint16))]
    ),
    "1 bit": by_pillow(RAMP > 0.5),
    "PNG, 1 bit": by_pillow(RAMP > 0.5, "PNG"),
    "PNG, 16 bits": png16(ramp(65535, np.uint16)),
    "PNG, 12 bits": png16(TWELVE),
    "PNG, 12 bits, sBIT": with_sbit(png16(TWELVE), 12),
    "PNG, 12 bits stretched to 16, sBIT": with_sbit(png16(TWELVE << 4 | TWELVE >> 8), 12),
    "PNG, 16 bits of colour": png16_colour(ramp(65535, np.uint16)),
    "PNG, 16 bits of colour and alpha": png16_colour(ramp(65535, np.uint16), True),
    "TIFF, 16 bits of colour": tiff(np.repeat(ramp(65535, np.uint16)[..., None], 3, 2), photometric=2),
    "TIFF, 16 bits of colour, big-endian": tiff(np.repeat(ramp(65535, np.uint16)[..., None], 3, 2), ">", photometric=2),
    "PGM, 1": pgm(RAMP > 0.5, 1),
    "PGM, 16 levels": pgm(np.rint(RAMP * 15), 15),
    "PGM, 1023": pgm(ramp(1023, np.uint16), 1023),
    "PGM, 4095": pgm(TWELVE, 4095),
    "PGM, 65535": pgm(ramp(65535, np.uint16), 65535),
    "PGM as text, 4095": b"P2 64 64 4095\n" + b" ".join(b"%d" % one for one in TWELVE.ravel()),
    "JPEG 2000, 16 bits": by_pillow(ramp(65535, np.uint16), "JPEG2000"),
    "palette of 16 levels": by_pillow((np.rint(RAMP * 15) * 17).astype(np.uint8), "PNG", bits=4),
}
COLOUR12 = np.repeat(TWELVE[..., None], 3, 2)
REFUSED = {
    "NaN": (tiff(np.where(RAMP > 0.5, np.nan, RAMP).astype("f4"), kind=FRACTIONS), "not finite"),
    "infinity": (tiff(np.where(RAMP > 0.5, np.inf, RAMP).astype("f4"), kind=FRACTIONS), "not finite"),
    "float -1..1": (tiff(ramp(1, "f4", -1), kind=FRACTIONS), "below 0"),
    "float 0..1.02": (tiff(ramp(1.02, "f4"), kind=FRACTIONS), "which value is white"),
    "float 0..1e6": (tiff(ramp(1e6, "f4"), kind=FRACTIONS), "which value is white"),
    "float 0..0.01": (tiff(ramp(0.01, "f4"), kind=FRACTIONS), "which value is white"),
    "int32 0..100000": (tiff(ramp(100_000, "i4"), kind=SIGNED), "which value is white: the largest, 100000"),
    "int16 -1024..3071": (tiff(ramp(3071, "i2", -1024), kind=SIGNED), "below 0"),
    "int8 -128..127": (tiff(ramp(127, "i1", -128), kind=SIGNED), "below 0"),
    "labels 0..9": (tiff(ramp(9, np.uint16)), "which value is white: the largest, 9"),
    "over what is stated": (tiff(TWELVE, tags={281: (3, 1023)}), "from 0 to 1023, and they go from 0 to 4095"),
    "12 bits of colour in 16": (tiff(COLOUR12, photometric=2), "16 bits a channel"),
    "12 bits of ink in 16": (tiff(np.repeat(TWELVE[..., None], 4, 2), photometric=5), "16 bits a channel"),
    "12 bits of colour in 16, PNG": (png16_colour(TWELVE), "16 bits a channel"),
}


@pytest.fixture(scope="module")
def exported():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from fusion_jax.interop.torch import image_fusion

    return image_fusion


@pytest.mark.parametrize("name", RAMPS)
def test_ramps_stay_ramps(name):
    data = RAMPS[name]
    pixels = np.asarray(load_image(data))
    expected = np.broadcast_to(RAMP[..., None] * 255, pixels.shape)
    falls = "white is 0" in name
    assert 126 <= pixels.mean() <= 128.5, pixels.mean()
    if len(np.unique(pixels)) > 2:
        assert np.abs(pixels - (255 - expected if falls else expected)).max() <= (9 if "16 levels" in name else 1.5)
    assert (pixels[..., :1] == pixels).all()
    assert read_crops(data, 8, False)[0, :, 0].max() < read_crops(data, 8, False)[0, :, -1].min() or falls
    assert read_size(data) == (SIDE, SIDE)


@pytest.mark.parametrize("name", RAMPS)
def test_an_exported_processor_sees_the_same(tmp_path, exported, name):
    (tmp_path / "image").write_bytes(RAMPS[name])
    pixels = np.asarray(load_image(RAMPS[name]))
    np.testing.assert_array_equal(np.asarray(exported.to_rgb(tmp_path / "image")), pixels)
    with Image.open(tmp_path / "image") as opened:  # as who calls the processor may have done it
        np.testing.assert_array_equal(np.asarray(exported.to_rgb(opened)), pixels)


@pytest.mark.parametrize("name", REFUSED)
def test_without_a_clear_range(tmp_path, name):
    data, words = REFUSED[name]
    (tmp_path / "image.tif").write_bytes(data)
    with pytest.raises(BadRecord, match=words) as caught:
        load_image(tmp_path / "image.tif", "record 3")
    assert (caught.value.reason, caught.value.where) == ("unclear_range", "record 3")
    assert "\n" not in str(caught.value) and "image.tif" in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_an_exported_processor_refuses_the_same(tmp_path, exported, name):
    data, words = REFUSED[name]
    (tmp_path / "image.tif").write_bytes(data)
    with pytest.raises(ValueError, match=f"image.tif.*{words}"):
        exported.to_rgb(tmp_path / "image.tif")


def test_what_the_header_says_holds_for_dark_pictures():
    dark = TWELVE // 8
    packed = tiff(dark, bits=12, packed=pack12(dark))
    for data in (packed, tiff(dark, tags={281: (3, 4095)}), pgm(dark, 4095)):
        np.testing.assert_array_equal(np.asarray(load_image(data))[..., 0], dark >> 4)


def test_planes_of_16_bits_are_not_taken_for_8(exported):
    """Uncompressed, Pillow reads each byte as a value: another picture."""
    planes = np.stack([ramp(65535, np.uint16)] * 3)
    places = tuple(300 + 2 * SIDE * SIDE * k for k in range(3))
    data = tiff(
        planes[0],
        photometric=2,
        tags={277: (3, 3), 284: (3, 2), 258: (3, (16,) * 3), 339: (3, (1,) * 3), 279: (4, (2 * SIDE * SIDE,) * 3)},
        places=places,
        packed=planes.tobytes(),
    )
    assert Image.open(io.BytesIO(data)).mode == "RGB"
    with pytest.raises(BadRecord, match="planes of 16 bits, which are not read without compression"):
        load_image(data)
    with Image.open(io.BytesIO(data)) as opened, pytest.raises(ValueError, match="planes of 16 bits"):
        exported.to_rgb(opened)


@pytest.mark.parametrize(
    "data",
    [tiff(TWELVE, bits=14), tiff(ramp(1, "f8"), kind=FRACTIONS), tiff(ramp(1, "f2"), kind=FRACTIONS)],
    ids=["14 bits packed", "float64", "float16"],
)
def test_kinds_that_pillow_does_not_read(data):
    with pytest.raises(BadRecord, match="a TIFF of a kind that Pillow does not read"):
        load_image(data)


@pytest.mark.parametrize("dtype", ["f4", "i4", "u2"])
def test_one_value_everywhere(dtype):
    kind = {"f": FRACTIONS, "i": SIGNED, "u": UNSIGNED}[dtype[0]]
    for value, expected in ((0, 0), (1, 255), (200, 200)):
        data = tiff(np.full((5, 7), value, dtype), kind=kind)
        assert (np.asarray(load_image(data)) == expected).all()


def test_images_in_memory(exported):
    """A caller of the exported processor may hand over what no file says anything about."""
    for values in (ramp(1, "f4"), TWELVE, ramp(65535, "i4")):
        image = Image.fromarray(values)
        assert 126 <= np.asarray(exported.to_rgb(image)).mean() <= 128.5
    with pytest.raises(ValueError, match="below 0"):
        exported.to_rgb(Image.fromarray(ramp(1, "f4", -1)))


def test_large_pictures_take_little_memory_on_the_way():
    values = np.arange(3 * 2**20, dtype=np.int32).reshape(3, 2**20) % 65536
    levels = grey.to_eight_bits(values, None, 2**31 - 1, False)
    np.testing.assert_array_equal(levels, values >> 8)
