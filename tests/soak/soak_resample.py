"""Fuzzes resample.c under the address and undefined-behaviour sanitizers: `python tests/soak/soak_resample.py`.

Shapes are random, most of them possible and some not: sides of zero, below it and beyond all bounds, parts that are no
number, tiles that do not divide, buffers and strides too small by a byte or by much. Possible ones must give equal
pixels with and without AVX2, the others the code that stands for what is wrong; and every buffer has exactly the size
that the functions are given, so that a byte read or written beside it ends the run.
"""

import argparse
import math
import random
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from fusion_jax.data import resample

DRIVER = Path(__file__).with_name("soak_resample.c")
SANITIZERS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
DONE, BAD_SIZE, TOO_SMALL = 0, 2, 3
LARGEST = 1 << 24
ODD_SIDES = (0, -1, -(2**31), 2**31 - 1, LARGEST + 1)
ODD_PARTS = ("nan", "inf", "-inf", "0", "-1", "1e300")


def build(folder: Path) -> Path:
    """The driver, compiled with sanitizers. CalledProcessError where the compiler cannot."""
    made = folder / "soak_resample"
    flags = ["-O2", "-g", "-ffp-contract=off", *SANITIZERS, f"-I{resample.SOURCE.parent}"]
    subprocess.run(["gcc", *flags, "-o", made, DRIVER], check=True, capture_output=True, text=True, timeout=300)
    return made


def shape(rng: random.Random) -> str:
    """A line for the driver, half of them possible ones."""
    longest = 3000 if rng.random() < 0.02 else 90

    def side() -> int:
        return max(1, int(math.exp(rng.uniform(0, math.log(longest)))))

    width, height, tiles = side(), side(), rng.choice((1, 1, 2, 3))
    if width * height > 300_000:
        height = max(1, 300_000 // width)
    out = [tiles * max(1, side() // tiles) for _ in range(2)]
    if out[0] * max(height, out[1]) > 300_000:
        out[0] = tiles
    covered = [str(one) if rng.random() < 0.5 else repr(one * rng.uniform(0.01, 1)) for one in (width, height)]
    stride = 3 * out[0] + 1 + rng.choice((0, 0, 0, 1, 7))
    sizes = {"width": width, "height": height, "out_width": out[0], "out_height": out[1]}
    src, middle, dst = 4 * width * height, (height - 1) * stride + 3 * out[0] + 1, 3 * out[0] * out[1]
    across = down = DONE

    kind = rng.choice(("possible",) * 6 + ("side", "huge", "part", "tiles", "src", "middle", "dst", "stride"))
    if kind == "side":
        name = rng.choice(list(sizes))
        sizes[name] = rng.choice(ODD_SIDES)
        across = BAD_SIZE if name != "out_height" else DONE
        down = BAD_SIZE if name != "width" else DONE
    elif kind == "huge":  # a side that is allowed, for which no buffer here is large enough
        name = rng.choice(list(sizes))
        sizes[name] = LARGEST
        across = DONE if name == "out_height" else TOO_SMALL
        down = DONE if name == "width" else TOO_SMALL
        tiles = 1
    elif kind == "part":
        which = rng.randrange(2)
        covered[which] = rng.choice((*ODD_PARTS, repr(math.nextafter((width, height)[which], math.inf))))
        across, down = (BAD_SIZE, DONE) if which == 0 else (DONE, BAD_SIZE)
    elif kind == "tiles":
        tiles = rng.choice((0, -1, -(2**31), 2**31 - 1, sizes["out_width"] + 1))
        down = BAD_SIZE
    elif kind == "src":
        src, across = _less(rng, src), TOO_SMALL
    elif kind == "middle":
        middle = _less(rng, middle)
        across, down = TOO_SMALL, DONE if middle >= (height - 1) * stride + 3 * out[0] else TOO_SMALL
    elif kind == "dst":
        dst, down = _less(rng, dst), TOO_SMALL
    elif kind == "stride":
        stride = rng.choice((0, -1, 3 * out[0] - 1, -(2**63), 2**63 - 1, 2**62))
        across = down = TOO_SMALL
    numbers = (width, height) if not sizes else (sizes["width"], sizes["height"])
    fields = (
        *numbers,
        *covered,
        sizes["out_width"],
        sizes["out_height"],
        tiles,
        stride,
        src,
        middle,
        dst,
        across,
        down,
    )
    return " ".join(map(str, fields))


def _less(rng: random.Random, size: int) -> int:
    return rng.choice((size - 1, rng.randrange(size), 0))


def run(count: int, seed: int = 0) -> Counter[tuple[int, int]]:
    """Number of shapes by what the two functions returned. AssertionError at the first that went wrong."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        driver = build(Path(folder))
        lines = "".join(shape(rng) + "\n" for _ in range(count))
        done = subprocess.run([driver], input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[:3000]
    rows = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    return Counter({(across, down): number for across, down, number in rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    outcomes = run(options.count, options.seed)
    assert outcomes.total() == options.count
    resized = outcomes[DONE, DONE]
    refused = Counter(code for codes, number in outcomes.items() for code in [max(codes)] for _ in range(number))
    print(
        f"resample.c under {SANITIZERS[0].removeprefix('-fsanitize=')}: {options.count} shapes (seed {options.seed}), "
        f"{resized} resized to equal pixels with and without AVX2, {refused[BAD_SIZE]} refused for a size and "
        f"{refused[TOO_SMALL]} for a buffer, as expected; nothing found in {time.monotonic() - begun:.0f} s"
    )


if __name__ == "__main__":
    main()
