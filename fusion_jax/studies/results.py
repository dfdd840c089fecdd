"""Reads what the runs of a study wrote, and computes its figures: the contents of study.json."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.errors import UserError, check
from fusion_jax.files import parse_json, read_file
from fusion_jax.studies import statistics
from fusion_jax.studies.config import StudyConfig, Variant
from fusion_jax.studies.folder import EVALUATED, Folder, read_json
from fusion_jax.training import jsonl

_KINDS = ("topic", "category", "split")  # the keys of a question that name its kind; the first that it has counts
_LARGEST = 1 << 30  # bytes of a file of predictions


def collect(study: StudyConfig, variants: list[Variant], folder: Folder) -> dict[str, Any]:
    """The figures of all runs that are done, as JSON. Accuracies and differences are in percent.

    Raises:
      UserError: a file of a run is damaged, or two runs answered different questions.
    """
    done = {v.name: [s for s in range(study.seeds) if folder.evaluated(v.name, s).exists()] for v in variants}
    runs = {v.name: {str(seed): _run(v, seed, folder) for seed in done[v.name]} for v in variants}
    return {
        "base": study.base,
        "baseline": study.baseline,
        "seeds": study.seeds,
        "evaluation": {"tasks": study.evaluation.task_names, "data_dir": study.evaluation.data_dir},
        "missing": {name: sorted({*range(study.seeds)} - {*of}) for name, of in done.items() if len(of) < study.seeds},
        "tasks": {task: _task(task, study, done, folder) for task in study.evaluation.task_names},
        "cost": {name: _cost(list(of.values())) for name, of in runs.items() if of},
        "runs": runs,
    }


def _run(variant: Variant, seed: int, folder: Folder) -> dict[str, Any]:
    """The figures of one run: its benchmarks' own scores, and what its training and its evaluation cost."""
    evaluation = folder.evaluation(variant.name, seed)
    summary = read_json(evaluation / "summary.json")
    workdir = folder.workdir(variant.trained_as, seed)
    seconds, flops = training_cost(variant, workdir)
    return {
        "workdir": str(workdir.relative_to(folder.path)),
        "evaluation": str(evaluation.relative_to(folder.path)),
        "scores": {name: task.get("scores", {}) for name, task in summary.get("tasks", {}).items()},
        "train_seconds": seconds,
        "train_flops": flops,
        "evaluate_seconds": read_json(folder.evaluated(variant.name, seed))["seconds"],
    }


def training_cost(variant: Variant, workdir: Path) -> tuple[float, float]:
    """The seconds of all training steps, and the FLOPs that the model's arithmetic needs for them.

    Both are sums over the rows of the metrics, which hold every step once, whatever was trained again after a kill.
    Compilation in the middle of a stage counts as time, the start of the process does not.
    """
    seconds = flops = 0.0
    for rows in curves(variant, workdir):
        before = 0
        for row in rows:
            if "seconds_per_step" in row:
                seconds += row["seconds_per_step"] * (row["step"] - before)
                flops += row.get("model_flops", 0.0)
                before = row["step"]
    return seconds, flops


def curves(variant: Variant, workdir: Path) -> list[list[dict[str, Any]]]:
    """The rows of the metrics of each stage that has any."""
    paths = [workdir / stage.name / "metrics.jsonl" for stage in variant.run.stages]
    return [jsonl.read_rows(path) for path in paths if path.exists()]


def _cost(runs: list[dict[str, Any]]) -> dict[str, float]:
    keys = ("train_seconds", "train_flops", "evaluate_seconds")
    return {key: float(np.mean([run[key] for run in runs])) for key in keys}


# ---- Answers.


def _task(task: str, study: StudyConfig, done: dict[str, list[int]], folder: Folder) -> dict[str, Any]:
    """The figures of one benchmark; without variants where its answers have no scores."""
    scores: dict[str, np.ndarray] = {}
    ids: list[str] = []
    kinds: list[str] = []
    for name, seeds in done.items():
        of_runs = []
        for seed in seeds:
            path = folder.evaluation(name, seed) / task / "predictions.jsonl"
            rows = _rows(path)
            if any(row["score"] is None for row in rows):
                return {"questions": len(rows), "variants": {}}
            ids = ids or [row["id"] for row in rows]
            kinds = kinds or [_kind(row) for row in rows]
            check([row["id"] for row in rows] == ids, f"{path} answers other questions than the runs before it.")
            of_runs.append([row["score"] for row in rows])
        if of_runs:
            scores[name] = np.array(of_runs, float)
    figures = {name: _variant(values, kinds, done[name]) for name, values in scores.items()}
    if study.baseline in scores:
        _compare(figures, scores, done, study.baseline)
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return {"questions": len(ids), "kinds": counts, "variants": figures}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The predictions that count: those for comparison are left out."""
    try:
        rows = [parse_json(line) for line in read_file(path, _LARGEST).split(b"\n") if line]
        good = all(isinstance(row["score"], int | float | None) and isinstance(row["id"], str) for row in rows)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError):
        good = False
    again = path.parents[1] / EVALUATED
    check(good, f"{path} is damaged; delete {again}, and the same command writes it again.")
    return [row for row in rows if not row.get("control")]


def _kind(row: dict[str, Any]) -> str:
    about = row.get("about", {})
    return next((str(about[key]) for key in _KINDS if about.get(key)), "all")


def _variant(scores: np.ndarray, kinds: list[str], seeds: list[int]) -> dict[str, Any]:
    means = 100 * scores.mean(1)
    by_kind = {}
    for kind in sorted(set(kinds)):
        of_kind = 100 * scores[:, [k == kind for k in kinds]].mean(1)
        by_kind[kind] = {"mean": float(of_kind.mean()), "std": statistics.spread(of_kind)}
    low, high = statistics.bootstrap_interval(scores)
    return {
        "accuracy": {str(seed): float(mean) for seed, mean in zip(seeds, means)},
        "mean": float(means.mean()),
        "std": statistics.spread(means),
        "interval": [100 * low, 100 * high],
        "kinds": by_kind,
    }


def _compare(figures: dict[str, Any], scores: dict[str, np.ndarray], done: dict[str, list[int]], baseline: str) -> None:
    """Adds to each other variant its difference to the baseline, over the seeds that both have."""
    others = [name for name in scores if name != baseline and set(done[name]) & set(done[baseline])]
    of_runs, of_questions = [], []
    for name in others:
        shared = [seed for seed in done[name] if seed in done[baseline]]
        one, two = (scores[v][[done[v].index(seed) for seed in shared]] for v in (name, baseline))
        low, high = statistics.bootstrap_interval(one - two)
        figures[name]["difference"] = {
            "seeds": len(shared),
            "mean": float(100 * (one - two).mean()),
            "interval": [100 * low, 100 * high],
        }
        of_runs.append(statistics.p_runs(one.mean(1), two.mean(1)))
        of_questions.append(statistics.p_questions((one - two).mean(0)))
    for key, values in (("p_runs", of_runs), ("p_questions", of_questions)):
        for name, value, corrected in zip(others, values, statistics.holm(values)):
            figures[name]["difference"] |= {key: value, f"{key}_holm": corrected}


def is_finite(value: Any) -> bool:
    """Whether a value of the metrics can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
