"""Time and memory of the slowest files that image limits allow: `python tests/helpers/slowest_images.py [KIND ...]`.

Noise of 80 million pixels, which is what decoders are slowest with, or as much of it as a format may have, and files
made to be slow. Each is read in a process of its own. Times are the processor's.
"""

import argparse
import io
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from fusion_jax.data import formats, image

SIDE = 8944  # of 80 million pixels
SLOW_SIDE = 3162  # of 10 million
SCRIPT = Path(__file__)


def noise(side: int = SIDE, channels: int = 3) -> Image.Image:
    """Not the same in neighbouring places; made quickly."""
    tile = np.random.default_rng(0).integers(0, 256, (512, 512, channels), np.uint8)
    times = -(-side // 512)
    pixels = np.tile(tile, (times, times, 1))[:side, :side]
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels))


def encode(one: Image.Image, form: str, **options) -> bytes:
    file, usual = io.BytesIO(), ImageFile.MAXBLOCK
    ImageFile.MAXBLOCK = 1 << 29  # Pillow wants room for a whole JPEG
    one.save(file, form, **options)
    ImageFile.MAXBLOCK = usual
    return file.getvalue()


def many_scans() -> bytes:
    """A black JPEG whose scan of one bit of each block comes again and again."""
    data = encode(Image.new("RGB", (SIDE, SIDE)), "JPEG", progressive=True, subsampling=0)
    starts = [found.start() for found in re.finditer(b"\xff\xda", data)]
    heads = [(start, start + 8 + 2 * data[start + 4]) for start in starts]
    start, end = next(one for one in heads if data[one[1] - 3 : one[1] - 1] == b"\0\0" and data[one[1] - 1] >> 4)
    part = data[start:end] + bytes(4)
    return data[:-2] + part * (formats.MAX_SCANS - len(starts)) + data[-2:]


def empty_runs() -> bytes:
    """A BMP each of whose rows ends after a pixel: the rest is filled byte by byte."""
    width, height = 7745, formats.MAX_SLOW_SAMPLES // 7745
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + sizes + bytes(1024) + b"\1\5\0\0" * height + b"\0\1"


def text() -> bytes:
    rows = (formats.MAX_TEXT - 50) // 2 // 3000
    return b"P3\n1000 %d\n9\n" % rows + b"1 " * (3000 * rows)


KINDS = {
    "JPEG": lambda: encode(noise(), "JPEG", quality=95, subsampling=0),
    "JPEG, progressive": lambda: encode(noise(), "JPEG", quality=75, subsampling=0, progressive=True),
    "JPEG, progressive, CMYK": lambda: encode(
        Image.frombytes("CMYK", (SIDE, SIDE), noise(channels=4).tobytes()), "JPEG", quality=75, progressive=True
    ),
    "JPEG of 100 scans": many_scans,
    "PNG": lambda: encode(noise(), "PNG", compress_level=1),
    "WebP": lambda: encode(noise(), "WEBP", quality=50, method=0),
    "WebP, lossless": lambda: encode(noise(), "WEBP", lossless=True, method=0, quality=0),
    "GIF": lambda: encode(noise(channels=1), "GIF"),
    "BMP": lambda: encode(noise(channels=4), "BMP"),
    "BMP of runs, 30 million": empty_runs,
    "TIFF, LZW": lambda: encode(noise(), "TIFF", compression="tiff_lzw"),
    "TIFF, JPEG": lambda: encode(noise(), "TIFF", compression="jpeg", quality=95),
    "TIFF, CCITT": lambda: encode(noise(channels=1).convert("1"), "TIFF", compression="group4"),
    "TIFF of fractions": lambda: encode(
        Image.fromarray(np.asarray(noise(channels=1)).astype(np.float32) / 255), "TIFF"
    ),
    "PPM of 16 bits": lambda: b"P6 %d %d 65535\n" % (SIDE, SIDE) + 2 * noise().tobytes(),
    "PPM of text, 4 MiB": text,
    "JPEG 2000, lossless, 10 million": lambda: encode(noise(SLOW_SIDE), "JPEG2000"),
    "JPEG 2000 of 16 bits, 30 million": lambda: encode(
        Image.fromarray(np.random.default_rng(0).integers(0, 65536, (5477, 5477)).astype(np.uint16)), "JPEG2000"
    ),
    "AVIF": lambda: encode(noise(), "AVIF", speed=10, quality=95, subsampling="4:4:4"),
}


def read(path: Path) -> str:
    data = path.read_bytes()
    before, begun = _peak(), time.process_time()
    try:
        found = image.load_image(data)
    except image.BadRecord as bad:
        return f"{len(data) / 1e6:.1f} MB | | | {bad.detail} |"
    seconds = time.process_time() - begun
    return f"{len(data) / 1e6:.1f} MB | {seconds:.1f} s | {_peak() - before:.0f} MB | {found.width}x{found.height} |"


def _peak() -> float:
    """Of this process's memory so far, MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help="some of the table's first column")
    parser.add_argument("--read", type=Path, help="a file to read in this process")
    options = parser.parse_args()
    if options.read is not None:
        print(read(options.read))
        return
    print("| file | size | processor | memory, without the file | pixels |\n|---|---|---|---|---|")
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "image")
            path.write_bytes(KINDS[kind]())
            done = subprocess.run([sys.executable, SCRIPT, "--read", path], capture_output=True, text=True, check=True)
        print(f"| {kind} | {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
