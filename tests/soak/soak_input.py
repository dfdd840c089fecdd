"""Resident memory of the whole input pipeline over many samples: `python tests/soak/soak_input.py --samples 200000`.

Real shards of small JPEGs and text-only conversations, packed rows, several threads. Prints a JSON line last; exits
with 1 where memory grew by 5% or more after the first tenth of the samples.
"""

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from helpers.fixtures import tiny
from PIL import Image

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.loader import training_batches
from fusion_jax.data.planner import open_source
from fusion_jax.data.shard_writing import convert
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.synth.tokenizer import train_tokenizer

IMAGES = 2000
WORDS = ["red", "blue", "green", "cube", "ball", "cone", "left", "right", "up", "down", "many", "few"]


def rss() -> float:
    """Resident memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def make_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    records = []
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (rng.integers(24, 80), rng.integers(24, 80), 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        (folder / "images" / f"{i}.jpg").write_bytes(buffer.getvalue())
        turns = []
        for _ in range(rng.integers(1, 4)):
            turns += [
                {"from": "human", "value": " ".join(rng.choice(WORDS, rng.integers(3, 10)))},
                {"from": "gpt", "value": " ".join(rng.choice(WORDS, rng.integers(1, 20)))},
            ]
        record = {"id": str(i), "conversations": turns}
        records.append(record | ({"image": f"{i}.jpg"} if i % 10 else {}))
    (folder / "records.json").write_text(json.dumps(records))
    train_tokenizer([" ".join(rng.choice(WORDS, 8)) for _ in range(300)], folder / "tokenizer", vocab_size=300)
    convert(folder / "records.json", folder / "images", folder / "shards", workers=1, progress=False)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=200_000)
    samples = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        model = tiny(latent_counts=(1, 4), **{"llm.vocab_size": 640})
        stage = StageConfig(
            "soak", str(folder / "shards"), max_length=400, max_question_length=80, max_rounds=12, batch_size=64,
            packing=True, steps=1 << 30,
        )  # fmt: skip
        config = RunConfig(model=model, stages=(stage,), tokenizer="", loader_threads=4)
        source = open_source(config, stage)
        batches = training_batches(config, stage, source, load_tokenizer(folder / "tokenizer"))
        seen, measured = 0, []
        while seen < samples:
            fed, _ = next(batches)
            seen += fed.samples
            if seen >= len(measured) * samples / 20:
                measured.append(rss())
                print(f"{seen} samples: {measured[-1]:.1f} MiB", file=sys.stderr)
        batches.close()
    warm = measured[2]
    growth = max(measured[3:]) / warm - 1
    print(json.dumps({"samples": seen, "rss_mib_warm": warm, "rss_mib_last": measured[-1], "rss_growth": growth}))
    return int(growth >= 0.05)


if __name__ == "__main__":
    sys.exit(main())
