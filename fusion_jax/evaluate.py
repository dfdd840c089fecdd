"""Evaluation of a checkpoint: `python -m fusion_jax.evaluate --checkpoint DIR --tasks held_out --data_dir DIR`.

Prints the scores as one JSON line last and, with --output, writes them with every question to a file.
"""

import json
import logging
import time
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from fusion_jax import checkpoint
from fusion_jax.cli import run_main
from fusion_jax.errors import UserError
from fusion_jax.evals import held_out
from fusion_jax.generate import Answerer
from fusion_jax.models.fusion import Fusion

TASKS = {"held_out": held_out.run}

log = logging.getLogger("fusion_jax")

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "step folder, stage folder or workdir")
_TASKS = flags.DEFINE_list("tasks", ["held_out"], f"which of: {', '.join(TASKS)}")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder with the tasks' data files")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for scores and all answers")
_ROWS = flags.DEFINE_integer("batch_size", 32, "questions answered at a time")
_SHOW = flags.DEFINE_integer("show", 0, "print this many questions with the model's answers")


def main(argv: list[str]) -> None:
    del argv
    if not _CHECKPOINT.value or not _DATA_DIR.value:
        raise UserError("Give --checkpoint DIR and --data_dir DIR.")
    unknown = [task for task in _TASKS.value if task not in TASKS]
    if unknown:
        raise UserError(f"Unknown task {unknown[0]!r}; allowed: {', '.join(TASKS)}.")
    loaded = checkpoint.load_model(_CHECKPOINT.value)
    model = Fusion(loaded.config.model, jnp.dtype(loaded.config.dtype))
    answerer = Answerer(model, loaded.params, loaded.config, loaded.tokenizer, rows=_ROWS.value)
    results = {"checkpoint": str(loaded.folder)}
    for task in _TASKS.value:
        start = time.perf_counter()
        scores = TASKS[task](answerer, Path(_DATA_DIR.value))
        results[task] = scores
        for example in _spread(scores["examples"], _SHOW.value):
            verdict = (
                "right" if held_out.normalise(example["answer"]) == held_out.normalise(example["expected"]) else "wrong"
            )
            log.info(
                "%s\n    Q: %s\n    model: %s   expected: %s   (%s)",
                Path(example["image"]).name,
                example["question"],
                example["answer"],
                example["expected"],
                verdict,
            )
        log.info("%s: %d questions in %.0f s", task, scores["questions"], time.perf_counter() - start)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=2))
    for task in _TASKS.value:
        del results[task]["examples"]
    print(json.dumps(results))


def _spread(examples: list[dict], count: int) -> list[dict]:
    """`count` examples of as many kinds as possible, in file order."""
    seen: dict[str, int] = {}
    ranked = []
    for position, example in enumerate(examples):
        seen[example["kind"]] = seen.get(example["kind"], 0) + 1
        ranked.append((seen[example["kind"]], position))
    return [examples[position] for _, position in sorted(ranked)[:count]]


if __name__ == "__main__":
    run_main(main)
