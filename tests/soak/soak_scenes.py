"""Speed and memory of the embedded backend: `python tests/soak/soak_scenes.py --samples 20000 --processes 2`.

A sample is all that the data engine asks of the backend: description, image or images of 384 x 384 (encoded as JPEG),
questions, statements and their verification, the kinds in turn. Prints a JSON line; exits with 1 where memory grew by
more than `--growth` between the first half of a process's work and its end.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import resource
import sys
import time

from fusion_jax.synth.backends import embedded
from fusion_jax.synth.kinds import KINDS

WARM_UP = 200  # samples until most things have been drawn once
SIZE = (384, 384)


def make_sample(number: int, caption: str, kind: str) -> int:
    """All that the engine asks for one caption; returns the number of images."""
    model, painter, vision = embedded.LanguageModel(), embedded.ImageGenerator(), embedded.VisionModel()
    sampled = KINDS[kind]
    data = {"kind": kind, "caption": caption}
    model.chat([], None, number, "judge", data)
    reply = model.chat([], None, number, "describe", data)
    data |= {"descriptions": sampled.descriptions(reply.parsed), "state": reply.state}
    for index, description in enumerate(data["descriptions"]):
        image = painter.draw(description, SIZE, number, data | {"index": index})
        image.save(io.BytesIO(), "JPEG", quality=92)
    if sampled.ask is not None:
        pairs = model.chat([], None, number, "qa", data).parsed["pairs"]
        model.chat([], None, number, "statement", data | {"pairs": pairs})
        for pair in pairs:
            vision.verify([], [], pair["question"], pair["answer"], number, data)
    return sampled.images


def _resident() -> int:
    """Resident memory of this process, MiB."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize() >> 20
    except OSError:  # no Linux: the peak instead, which cannot hide growth either
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def work(job: tuple[int, int]) -> dict:
    """One process's share: (seed, samples) -> images, seconds, CPU seconds (warm-up left out), memory by tenths."""
    seed, samples = job
    images, memory = 0, []
    start, cpu = time.perf_counter(), time.process_time()
    for number, (caption, kind) in enumerate(zip(embedded.captions(samples, seed), itertools.cycle(KINDS))):
        if number == min(WARM_UP, samples // 2):
            images, start, cpu = 0, time.perf_counter(), time.process_time()
        images += make_sample(number, caption, kind)
        if number % max(1, samples // 10) == 0:
            memory.append(_resident())
    memory.append(_resident())
    return {
        "images": images,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "memory_mib": memory,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--samples", type=int, default=2000, help="samples of all processes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--growth", type=float, default=0.03, help="growth of memory allowed over the second half")
    args = parser.parse_args()
    if not args.samples >= 10 * args.processes >= 10:
        parser.error("--samples must be at least ten for each of --processes")
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        parts = pool.map(work, [(seed, args.samples // args.processes) for seed in range(args.processes)])
    growth = max(part["memory_mib"][-1] / part["memory_mib"][5] - 1 for part in parts)
    images, cpu_seconds = (sum(part[key] for part in parts) for key in ("images", "cpu_seconds"))
    result = {
        "samples": args.samples,
        "processes": args.processes,
        "images_per_second": round(sum(part["images"] / part["seconds"] for part in parts), 1),
        "images_per_cpu_second": round(images / cpu_seconds, 1),
        "memory_mib": [part["memory_mib"] for part in parts],
        "memory_growth": round(growth, 4),
    }
    print(json.dumps(result))
    return int(growth > args.growth)


if __name__ == "__main__":
    sys.exit(main())
