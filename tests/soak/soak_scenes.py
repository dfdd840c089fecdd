"""How fast the embedded backend is, and whether its memory stays: one JSON line.

    python -m fusion_jax.synth.worlds.scenes.benchmark --samples 20000 --processes 2

A sample is all that the data engine asks of the backend: description, image or images of 384 x 384 (encoded as JPEG),
questions, statements and their verification, the kinds in turn. Ends with an error if memory grows by more than
`--growth` between the first half of a process's work and its end.
"""

import io
import itertools
import json
import multiprocessing
import resource
import sys
import time

from absl import flags

from fusion_jax.command_line.cli import out_of_ctrl_c, run_main
from fusion_jax.errors import check
from fusion_jax.synth.backends import embedded
from fusion_jax.synth.kinds import KINDS

WARM_UP = 200  # samples until most things have been modelled once
SIZE = (384, 384)

_SAMPLES = flags.DEFINE_integer("samples", 2000, "samples in all")
_PROCESSES = flags.DEFINE_integer("processes", 2, "processes that share them")
_GROWTH = flags.DEFINE_float("growth", 0.03, "allowed growth of memory over the second half")


def make_sample(number: int, caption: str, kind: str) -> int:
    """All that the engine asks for one caption; returns the number of images."""
    model, painter, vision = embedded.LanguageModel(), embedded.ImageGenerator(), embedded.VisionModel()
    asked = KINDS[kind]
    data = {"kind": kind, "caption": caption}
    model.chat([], None, number, "judge", data)
    reply = model.chat([], None, number, "describe", data)
    data |= {"descriptions": asked.descriptions(reply.parsed), "state": reply.state}
    for index, description in enumerate(data["descriptions"]):
        image = painter.draw(description, SIZE, number, data | {"index": index})
        image.save(io.BytesIO(), "JPEG", quality=92)
    if asked.ask is not None:
        pairs = model.chat([], None, number, "qa", data).parsed["pairs"]
        model.chat([], None, number, "statement", data | {"pairs": pairs})
        for pair in pairs:
            vision.verify([], [], pair["question"], pair["answer"], number, data)
    return asked.images


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


def main(argv: list[str]) -> None:
    check(len(argv) == 1, "Give flags only: --samples, --processes, --growth.")
    check(_SAMPLES.value >= 10 * _PROCESSES.value >= 10, "--samples must be at least ten for each of --processes.")
    jobs = [(seed, _SAMPLES.value // _PROCESSES.value) for seed in range(_PROCESSES.value)]
    with out_of_ctrl_c():
        pool = multiprocessing.get_context("spawn").Pool(len(jobs))
    with pool:
        parts = pool.map(work, jobs)
    growth = max(part["memory_mib"][-1] / part["memory_mib"][5] - 1 for part in parts)
    result = {
        "samples": _SAMPLES.value,
        "processes": len(jobs),
        "images_per_second": round(sum(part["images"] / part["seconds"] for part in parts), 1),
        "images_per_cpu_second": round(
            sum(part["images"] for part in parts) / sum(part["cpu_seconds"] for part in parts), 1
        ),
        "memory_mib": [part["memory_mib"] for part in parts],
        "memory_growth": round(growth, 4),
    }
    print(json.dumps(result))
    check(growth <= _GROWTH.value, f"Memory grew by {growth:.1%} over the second half; {_GROWTH.value:.1%} is allowed.")


if __name__ == "__main__":
    run_main(main)
