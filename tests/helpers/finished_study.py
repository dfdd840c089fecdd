"""A study's folder as finished runs leave it, with answers that are drawn at random."""

import json
from pathlib import Path

import numpy as np

from fusion_jax.studies.config import StudyConfig, Variant
from fusion_jax.studies.folder import Folder

KINDS = ("colour", "count", "exists", "place", "shape", "size")


def finish(
    study: StudyConfig, variants: list[Variant], folder: Folder, chances: dict[str, float], questions: int = 120
) -> None:
    """Writes the runs of the variants in `chances`, the probability of a right answer of each."""
    for v in variants:
        for seed in range(study.seeds if v.name in chances else 0):
            write_run(v, seed, folder, chances[v.name], questions)


def write_run(variant: Variant, seed: int, folder: Folder, chance: float, questions: int) -> None:
    rng = np.random.default_rng([seed, *variant.name.encode()])
    chance = chance + 0.03 * rng.standard_normal()
    evaluation, workdir = folder.evaluation(variant.name, seed), folder.workdir(variant.trained_as, seed)
    (evaluation / "held_out").mkdir(parents=True)
    rows = [
        {"id": f"{n}", "score": float(rng.random() < chance), "about": {"topic": KINDS[n % len(KINDS)]}}
        for n in range(questions)
    ]
    rows += [{**row, "id": f"{row['id']}/shuffled", "score": 1.0, "control": True} for row in rows]
    write_rows(evaluation / "held_out" / "predictions.jsonl", rows)
    accuracy = sum(row["score"] for row in rows[:questions]) / questions
    summary = {"tasks": {"held_out": {"scores": {"held_out_accuracy": accuracy}}}}
    (evaluation / "summary.json").write_text(json.dumps(summary))
    folder.evaluated(variant.name, seed).write_text('{"seconds": 9.5}')
    for stage in variant.run.stages if not folder.trained(variant.trained_as, seed).exists() else ():
        (workdir / stage.name).mkdir(parents=True)
        steps = range(2, 2 * 50 + 1, 2)
        metrics = [
            {"step": s, "ce": 6 / s**0.3 + rng.random() / 9, "seconds_per_step": 0.5, "model_flops": 4e12}
            for s in steps
        ]
        metrics += [{"step": s, "validation/ce": 6 / s**0.3 + 0.2} for s in steps if s % 20 == 0]
        write_rows(workdir / stage.name / "metrics.jsonl", metrics)
    folder.trained(variant.trained_as, seed).write_text('{"seconds": 70.0}')


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
