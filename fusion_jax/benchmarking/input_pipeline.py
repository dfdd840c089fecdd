"""Measures how fast files become crops, compared with the published loader.

    images_per_second             files to crops, wall clock, with the requested number of worker threads
    images_per_second_by_workers  the same for 1, 2, ... threads, measured alternately
    published_images_per_second   the published way, wall clock, one thread, measured alternately with ours
    images_per_cpu_second, published_images_per_cpu_second   the same in CPU time of one thread: on a machine that does
                                  other work, too, these two and their ratio are the ones that mean something
    ratio                         of these two
    images_per_cpu_second_by_workers   in CPU time of the process, where contention between threads would show
    mean_pixel_difference         of the crops that `fast` makes from the same files to the exact ones, of 255
    text_pixel_difference         the same for pages of small print, the worst that sets contain
    large_mean_pixel_difference, large_text_pixel_difference   the same for images of LARGE x LARGE pixels, the smallest
                                  that `fast` decodes at half their size, where it differs most
    packing_efficiency, padding_efficiency   real tokens over row slots; see packing.py
    rss_growth                    of the resident memory from the end of the first round to that of the last

Workers are threads: decoding and resizing release the interpreter's lock, and nothing is copied between processes.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from fusion_jax.data import packing
from fusion_jax.data.image import read_crops
from fusion_jax.errors import check

SIZE = 384  # of a crop
WIDTH, HEIGHT, QUALITY = 1280, 960, 90
LARGE = 2304
PHOTOS, PAGES, ROUNDS = 8, 2, 5
_MEAN = _STD = np.full(3, 0.5, np.float32)


def photo(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A picture with contrast in every octave, as photographs have it, sharp edges and a sensor's noise."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128, np.float32)
    for cell, contrast in ((320, 45), (160, 20), (80, 14), (40, 11), (20, 9), (10, 8), (5, 7), (2, 7)):
        shape = -(-height // cell) + 1, -(-width // cell) + 1
        light = rng.normal(0, contrast, shape)
        for channel in range(3):  # textures differ in light more than in colour
            values = Image.fromarray((light + rng.normal(0, contrast / 3, shape)).astype(np.float32))
            pixels[..., channel] += np.asarray(values.resize((width, height), Image.Resampling.BICUBIC))
    pixels += rng.normal(0, 2, pixels.shape).astype(np.float32)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    shapes = Image.fromarray((255 - pixels).clip(0, 255).astype(np.uint8))  # textured, too
    mask = Image.new("L", picture.size)
    draw = ImageDraw.Draw(mask)
    for kind in ("ellipse", "polygon", "line") * 4:
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.02, 0.12) * width
        opacity = int(rng.integers(60, 200))
        if kind == "ellipse":
            draw.ellipse((x - r, y - r / 2, x + r, y + r / 2), fill=opacity)
        elif kind == "polygon":
            draw.regular_polygon((x, y, r), int(rng.integers(3, 7)), rotation=float(rng.uniform(0, 90)), fill=opacity)
        else:
            draw.line((x, y, x + 5 * r, y + rng.uniform(-4, 4) * r), fill=opacity, width=int(rng.integers(1, 9)))
    picture.paste(shapes, mask=mask)
    return picture


def page(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Lines of random letters, 20 pixels high, dark on light."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (width, height), (248, 247, 242))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    letters = list("abcdefghijklmnopqrstuvwxyzABCE0123456789")
    for y in range(12, height - 30, 26):
        words = ["".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(30)]
        draw.text((16, y), " ".join(words), fill=(25, 25, 35), font=font)
    return picture


def published_crops(path: Path, size: int = SIZE) -> Float[np.ndarray, "5 3 size size"]:
    """Does what the published loader does for an image: each crop passes on its own through a float32 processor.

    The processor is that of SigLIP in Hugging Face transformers, reduced to what it computes: to an array, back to an
    image that is resized to the size it has, to an array again, rescaled through float64, normalised, channels first.
    """
    with Image.open(path) as file:
        image = file.convert("RGB")
    double = image.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
    crops = [double.crop((x, y, x + size, y + size)) for y in (0, size) for x in (0, size)]
    crops.append(image.resize((size, size), Image.Resampling.BICUBIC))
    tensors = []
    for crop in crops:
        resized = np.array(Image.fromarray(np.array(crop)).resize((size, size), Image.Resampling.BICUBIC))
        values = (resized.astype(np.float64) * (1 / 255)).astype(np.float32)
        tensors.append(((values - _MEAN) / _STD).transpose(2, 0, 1))
    return np.stack(tensors)


def pixel_difference(paths: list[Path], size: int = SIZE) -> float:
    """Mean absolute difference, of 255, between the crops of `fast` and the exact ones."""

    def crops(path: Path, decode: str) -> UInt8[np.ndarray, "N size size 3"]:
        return read_crops(path, size, decode=decode).astype(np.int16)

    return float(np.mean([np.abs(crops(path, "fast") - crops(path, "exact")).mean() for path in paths]))


def _times(run: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of this thread."""
    wall, cpu = time.perf_counter(), time.thread_time()
    run()
    return time.perf_counter() - wall, time.thread_time() - cpu


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(workers: int, decode: str, rounds: int = ROUNDS, photos: int = PHOTOS) -> dict:
    """Measures the figures listed above, also for fewer workers, in `rounds` passes over the photos."""
    check(workers >= 1, f"--workers={workers}: at least one is needed.")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.jpg") for i in range(photos + PAGES)]
        for i, path in enumerate(paths):
            (photo(i) if i < photos else page(i)).save(path, quality=QUALITY)
        pages = paths[photos:]
        paths = paths[:photos]
        ours, published = [], []
        for _ in range(rounds):
            for path in paths:  # alternating, so that other work on the machine slows both alike
                ours.append(_times(lambda path=path: read_crops(path, SIZE, decode=decode)))
                published.append(_times(lambda path=path: published_crops(path)))
        (wall, cpu), (published_wall, published_cpu) = (
            np.median(times, axis=0).tolist() for times in (ours, published)
        )
        print(f"one thread: {1 / wall:.1f} images/s, published way {1 / published_wall:.1f}", file=sys.stderr)

        large = {}
        for kind, make in (("mean", photo), ("text", page)):
            path = Path(folder, f"large_{kind}.jpg")
            make(0, LARGE, LARGE).save(path, quality=QUALITY)
            large[f"large_{kind}_pixel_difference"] = pixel_difference([path])

        def crops_of(path: Path) -> None:
            read_crops(path, SIZE, decode=decode)

        counts = range(1, workers + 1)
        rates, cpu_rates, resident = {n: [] for n in counts}, {n: [] for n in counts}, []
        with contextlib.ExitStack() as stack:
            pools = {n: stack.enter_context(ThreadPoolExecutor(n)) for n in counts}
            for _ in range(rounds + 1):
                for n, pool in pools.items():  # alternating, as above
                    wall_start, cpu_start = time.perf_counter(), time.process_time()
                    list(pool.map(crops_of, paths * 2))
                    rates[n].append(2 * len(paths) / (time.perf_counter() - wall_start))
                    cpu_rates[n].append(2 * len(paths) / (time.process_time() - cpu_start))
                resident.append(_resident_bytes())
        # The first round warms up.
        by_workers, cpu_by_workers = (
            {n: statistics.median(values[1:]) for n, values in found.items()} for found in (rates, cpu_rates)
        )
        for n in counts:
            print(f"{n} threads: {by_workers[n]:.1f} images/s, {cpu_by_workers[n]:.1f} a CPU second", file=sys.stderr)
        return {
            "decode": decode,
            "workers": workers,
            "images_per_second": by_workers[workers],
            "images_per_second_by_workers": by_workers,
            "images_per_cpu_second_by_workers": cpu_by_workers,
            "published_images_per_second": 1 / published_wall,
            "images_per_cpu_second": 1 / cpu,
            "published_images_per_cpu_second": 1 / published_cpu,
            "ratio": published_cpu / cpu,
            "mean_pixel_difference": pixel_difference(paths),
            "text_pixel_difference": pixel_difference(pages),
            **large,
            **packing.measure(),
            "rss_growth": resident[-1] / resident[0] - 1,
            "load": os.getloadavg()[0],
            "jpeg_bytes": int(np.mean([path.stat().st_size for path in paths])),
        }
