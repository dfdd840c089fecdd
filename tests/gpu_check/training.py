"""A short training run through `python -m fusion_jax.train`, here and on this machine's CPU: the losses must agree."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gpu_check.parts import arguments, note, say
from PIL import Image

from fusion_jax.synth.tokenizer import train_tokenizer
from fusion_jax.training.jsonl import read_rows

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-3  # relative, of the loss at each step
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 210), "yellow": (220, 200, 40)}
PLACES = {"top left": (2, 2), "top right": (2, 26), "bottom left": (26, 2), "bottom right": (26, 26)}


def make_data(folder: Path, count: int = 64) -> None:
    """Pictures of one square each, questions about its colour and place, a tokenizer: what
    tests/helpers/tiny_run.py reads."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        colour, place = (str(rng.choice(list(names))) for names in (COLOURS, PLACES))
        pixels = rng.integers(220, 256, (48, 48, 3), np.uint8)
        row, column = PLACES[place]
        pixels[row : row + 18, column : column + 18] = COLOURS[colour]
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        turns = [
            ("human", "<image>\nWhich colour is the square?"),
            ("gpt", f"It is {colour}."),
            ("human", "Where is it?"),
            ("gpt", f"The {colour} square is at the {place}."),
        ]
        conversation = [{"from": who, "value": text} for who, text in turns[: 2 + 2 * (i % 2)]]
        records.append({"id": str(i), "image": f"images/{i}.png", "conversations": conversation})
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "validation.json").write_text(json.dumps(records[:8]))
    (folder / "stage2.yaml").write_text(f"datasets:\n  - json_path: records.json\n    image_folder: {folder}\n")
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    train_tokenizer(texts, folder / "tokenizer", 360)


def start(data: Path, workdir: Path, steps: int, cpu: bool) -> subprocess.Popen:
    changes = {"checkpoint_every": steps, "validate_every": steps, "stages[0].learning_rate": 1e-3}
    command = [sys.executable, "-m", "fusion_jax.train", "--workdir", str(workdir)]
    command += ["--config", f"{ROOT / 'tests' / 'multihost' / 'one_stage.py'}:{data},{steps}"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    if cpu:
        environment |= {"JAX_PLATFORMS": "cpu"}
    # Both into this process's log, line by line, so that a part that is cut shows how far they came.
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr, stderr=sys.stderr)


def losses(workdir: Path) -> dict[int, float]:
    """By step."""
    file = workdir / "stage2" / "metrics.jsonl"
    return {row["step"]: row["total"] for row in read_rows(file) if "total" in row} if file.exists() else {}


def main() -> None:
    context = arguments()
    steps = 6 if context.dry_run else 30
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_data(folder / "data")
        runs = {name: start(folder / "data", folder / name, steps, name == "cpu") for name in ("cpu", "device")}
        failures = []
        for name, run in runs.items():
            if code := run.wait():
                failures.append(f"training on the {name} ended with exit code {code}; the log says why")
            note(f"{name}: exit code {code}")
        ours, theirs = losses(folder / "device"), losses(folder / "cpu")
    rows = [
        {"step": step, "device": ours[step], "cpu": theirs[step], "relative": abs(ours[step] / theirs[step] - 1)}
        for step in sorted(ours.keys() & theirs.keys())
    ]
    if not failures:
        if len(rows) != steps:
            failures.append(f"{len(rows)} of {steps} steps have a loss in both runs")
        worst = [row for row in rows if not row["relative"] <= LIMIT]
        if worst:
            failures.append(f"step {worst[0]['step']}: {worst[0]['device']} instead of {worst[0]['cpu']}")
        elif rows and not rows[-1]["cpu"] < rows[0]["cpu"]:
            failures.append("the loss did not fall")
    listed = [row for row in rows if row["step"] in (1, 2) or row["step"] % 5 == 0 or row["step"] == steps]
    say(
        {"limit": LIMIT, "largest_relative": max((row["relative"] for row in rows), default=0.0), "steps": listed},
        failures,
    )


if __name__ == "__main__":
    main()
