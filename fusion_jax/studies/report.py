"""Writes a study's report: study.json, report.md, report.html and figures, of whatever is done."""

import time
from pathlib import Path
from typing import Any

from fusion_jax.files import locked, write_whole
from fusion_jax.studies import blocks, figures, results, statistics
from fusion_jax.studies.blocks import Block, Figure, Heading, Table, Text
from fusion_jax.studies.config import StudyConfig, Variant
from fusion_jax.studies.folder import Folder, write_json

_WAIT = 0.2  # seconds between two attempts to get the report's lock
_NONE = "-"


def write(study: StudyConfig, variants: list[Variant], folder: Folder) -> list[Path]:
    """Writes or rewrites the report and returns its files. Processes that share the folder do so in turn.

    Raises:
      UserError: a file of a run is damaged.
    """
    while True:
        with locked(folder.path / "report.lock") as free:
            if free:
                return _write(study, variants, folder)
        time.sleep(_WAIT)


def _write(study: StudyConfig, variants: list[Variant], folder: Folder) -> list[Path]:
    found = results.collect(study, variants, folder)
    write_json(folder.path / "study.json", found)
    content = _content(study, variants, folder, found)
    paths = [folder.path / name for name in ("study.json", "report.md", "report.html")]
    write_whole(paths[1], blocks.markdown(content))
    write_whole(paths[2], blocks.page(content[0].text, content))
    return paths


def _content(study: StudyConfig, variants: list[Variant], folder: Folder, found: dict[str, Any]) -> list[Block]:
    content: list[Block] = [Heading(f"Study: {', '.join(study.variants)}", 1), *blocks.paragraphs(study.about)]
    done = sum(len(runs) for runs in found["runs"].values())
    state = f"Base {study.base}, {study.seeds} seed{'s' * (study.seeds > 1)} of {len(variants)} variants"
    if found["missing"]:
        names = "; ".join(f"{name}: {', '.join(map(str, seeds))}" for name, seeds in found["missing"].items())
        state += f"; {done} of {study.seeds * len(variants)} are done. These seeds are missing: {names}"
    content.append(Text(f"{state}."))
    for task, of in found["tasks"].items():
        if of["variants"]:
            content += _of_task(task, of, study, folder, found["cost"])
        else:
            content += [Heading(task), Text("There are no scored answers yet.")]
    if study.published is not None:
        content += _beside_published(study, found)
    path = folder.path / "curves.png"
    if figures.draw_curves(path, variants, study.seeds, folder):
        content += [Heading("Learning curves"), Figure(path, "training and validation loss of every variant by step")]
    return content + _cost(found)


def _of_task(task: str, of: dict[str, Any], study: StudyConfig, folder: Folder, cost: dict[str, Any]) -> list[Block]:
    variants = of["variants"]
    head = ("variant", "runs", "accuracy", "std", "95% interval")
    head += (f"minus {study.baseline}", "95% interval", "p (runs)", "p (questions)")
    rows = []
    for name, v in variants.items():
        row = [name, str(len(v["accuracy"])), _number(v["mean"]), _number(v["std"]), _interval(v["interval"])]
        if (d := v.get("difference")) is None:
            rows.append([*row, *[_NONE] * 4])
            continue
        p = [_p(d["p_runs_holm"]), _p(d["p_questions_holm"])]
        rows.append([*row, _signed(d["mean"]), _interval(d["interval"], _signed), *p])
    content: list[Block] = [Heading(task), Table(head, rows), Text(_note(of, study))]
    if study.seeds > 1:
        seeds = list(map(str, range(study.seeds)))
        runs = [[name, *(_number(v["accuracy"].get(seed)) for seed in seeds)] for name, v in variants.items()]
        content += [Heading(f"{task} of every run", 3), Table(("variant", *(f"seed {seed}" for seed in seeds)), runs)]
    stem = folder.path / task
    figures.draw_accuracy(accuracy := Path(f"{stem}_accuracy.png"), task, variants, study.baseline)
    content.append(Figure(accuracy, f"accuracy of every variant on {task}, and its difference to {study.baseline}"))
    if len(of["kinds"]) > 1:
        content += [Heading(f"{task} by kind of question", 3), _kinds(of)]
        figures.draw_kinds(kinds := Path(f"{stem}_kinds.png"), task, of["kinds"], variants)
        content.append(Figure(kinds, f"accuracy of every variant on {task} by kind of question"))
    if all(cost[name]["train_flops"] for name in variants):
        figures.draw_cost(path := Path(f"{stem}_cost.png"), task, variants, cost)
        content.append(Figure(path, f"accuracy on {task} over the FLOPs of training"))
    return content


def _note(of: dict[str, Any], study: StudyConfig) -> str:
    differences = [v["difference"] for v in of["variants"].values() if "difference" in v]
    comparisons = f"{len(differences)} comparison{'s' * (len(differences) != 1)}"
    text = (
        f"Accuracy is the mean score of {of['questions']} questions in percent, std its standard deviation over runs. "
        f"Intervals are from {statistics.DRAWS} bootstrap samples, which draw runs and questions. Differences are "
        "between runs of the same seed. p (runs) is how often a difference as large arises where whole runs change "
        "places between the variant and the baseline: it tells whether other runs would differ, too. p (questions) is "
        "the same where the two change places question by question: it tells whether these runs would differ on other "
        f"questions. Both are two-sided and corrected by Holm's method for {comparisons}."
    )
    least = statistics.smallest_p(min((d["seeds"] for d in differences), default=1), len(differences))
    return text if least is None else f"{text} With so few runs p (runs) cannot be below {least:.2g}."


def _kinds(of: dict[str, Any]) -> Table:
    head = ("variant", *(f"{kind} ({count})" for kind, count in of["kinds"].items()))
    rows = []
    for name, v in of["variants"].items():
        cells = [v["kinds"][kind] for kind in of["kinds"]]
        rows.append(
            [name, *(_number(c["mean"]) + (f" ± {c['std']:.1f}" if c["std"] is not None else "") for c in cells)]
        )
    return Table(head, rows)


def _beside_published(study: StudyConfig, found: dict[str, Any]) -> list[Block]:
    published = study.published
    tasks = [task for task, of in found["tasks"].items() if of["variants"]]
    rows = []
    for name in study.variants:
        ours = [found["tasks"][task]["variants"].get(name) for task in tasks]
        theirs = published.rows.get(name, [None] * len(published.columns))
        rows.append([name, *(_number(v and v["mean"]) for v in ours), *map(_number, theirs)])
    head = ("variant", *(f"here: {task}" for task in tasks), *(f"published: {name}" for name in published.columns))
    return [Heading("Beside the published figures"), Table(head, rows), Text(published.source)]


def _cost(found: dict[str, Any]) -> list[Block]:
    if not found["cost"]:
        return []
    least = min((cost["train_flops"] for cost in found["cost"].values() if cost["train_flops"]), default=None)
    rows = []
    for name, cost in found["cost"].items():
        flops = cost["train_flops"]
        cells = [f"{flops / 1e12:.3g}", f"{flops / least:.2f}"] if flops else [_NONE, _NONE]
        rows.append([name, *cells, f"{cost['train_seconds']:.0f}", f"{cost['evaluate_seconds']:.0f}"])
    head = ("variant", "TFLOP of training", "over the least", "seconds of training", "seconds of evaluation")
    note = (
        "Means over the runs. FLOPs are those that the model's arithmetic needs (docs/performance.md). Seconds depend "
        "on what else the machine did. Training counts its steps and their compilation, evaluation its whole process."
    )
    return [Heading("Cost"), Table(head, rows), Text(note)]


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.1f}"


def _interval(interval: list[float], write=_number) -> str:
    return f"{write(interval[0])} to {write(interval[1])}"


def _p(value: float | None) -> str:
    return _NONE if value is None else ("<0.001" if value < 0.001 else f"{value:.3f}")
