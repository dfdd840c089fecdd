"""Defines the configuration of a study as frozen dataclasses, and the runs that follow from it.

A study file has a function get_config, as a run's has; docs/studies.md describes its keys.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from fusion_jax.command_line.config_flag import load_config, set_key
from fusion_jax.config import RunConfig, from_dict, to_dict
from fusion_jax.errors import UserError, check, check_choice
from fusion_jax.evals.guide import GUIDES
from fusion_jax.evals.registry import find_tasks
from fusion_jax.files import brief

DATA = "{data}"  # in the study's texts: the folder of the drawn data
EVALUATION = "evaluation."  # begins the keys of a variant that change its evaluation, not its training
STUDY_RANGES = {"seeds": (1, 1000)}
EVALUATION_CHOICES = {"guide": GUIDES, "rule": ("official", "published")}
_VARIED = ("guide",)  # what a variant may change of its evaluation: all must answer the same questions


@dataclass(frozen=True)
class EvaluationConfig:
    """How every run is evaluated: the flags of `fusion_jax.evaluate`."""

    tasks: tuple[str, ...] = ("held_out",)
    """Benchmarks."""
    data_dir: str = DATA
    """Folder with their data; `{data}`: the data that were drawn for the first seed, whatever the run's seed."""
    limit: int = 0
    """About how many questions of each benchmark; 0: all."""
    rule: str = "official"
    """How answers are scored, see docs/evaluation.md."""
    guide: str = "question"
    """What the vision encoder reads: the `question`, an `other` one, or `none`."""
    batch_size: int = 32
    """Questions answered at a time."""

    def __post_init__(self):
        check(len(self.tasks) > 0, "tasks is empty; give at least one benchmark.")
        find_tasks(self.tasks)
        check(self.limit >= 0, f"limit={self.limit} must not be negative.")
        check(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")
        for name, allowed in EVALUATION_CHOICES.items():
            check_choice(f"{name}=", getattr(self, name), allowed)

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks' folders, which the rule is part of."""
        return [task.name for task in find_tasks(self.tasks, self.rule)]


@dataclass(frozen=True)
class PublishedConfig:
    """A published table that the report shows beside the study's own figures."""

    source: str
    """Where it is from, and how those runs differ from these."""
    columns: tuple[str, ...]
    """Names of its figures."""
    rows: dict[str, tuple[float, ...]]
    """The figures of each variant that was published, in the order of `columns`."""

    def __post_init__(self):
        for name, figures in self.rows.items():
            check(
                len(figures) == len(self.columns),
                f"rows[{name!r}] has {len(figures)} figures for {len(self.columns)} columns.",
            )


@dataclass(frozen=True)
class StudyConfig:
    """A study: variants of one run, trained with several seeds each."""

    base: str
    """Config file of the run, with its argument: `configs/flare.py:l_3b`. `{data}` in it is the data's folder."""
    variants: dict[str, dict]
    """Changed keys of each variant, {name: {key: value}}; a key is written as on the command line, without `--config.`,
    and those that begin with `evaluation.` change its evaluation alone."""
    baseline: str
    """The variant that the others are compared with."""
    about: str = ""
    """What is expected, and why; the report begins with it."""
    seeds: int = 5
    """Runs of each variant; they are trained with the seeds 0, 1, ..."""
    common: dict = field(default_factory=dict)
    """Changed keys of all runs."""
    steps_share: float = 1.0
    """The share of the base's steps that each stage trains, above 0 and at most 1."""
    data: str = ""
    """Config file of `fusion_jax.synthesize` that draws the data of each seed; empty: the base names its own."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How every run is evaluated, see below."""
    published: PublishedConfig | None = None
    """Published figures, see below."""

    def __post_init__(self):
        check(len(self.variants) > 1, "variants: give at least two.")
        for name in self.variants:
            check(
                0 < len(name.encode()) <= 100 and name.isprintable() and name.strip(".") != "" and "/" not in name,
                f"variants: {name[:50]!r} must be the name of a folder, without a slash, of at most 100 bytes.",
            )
        check_choice("baseline=", self.baseline, self.variants)
        least, most = STUDY_RANGES["seeds"]
        check(least <= self.seeds <= most, f"seeds={self.seeds} must be from {least} to {most}.")
        check(0 < self.steps_share <= 1, f"steps_share={self.steps_share} must be above 0 and at most 1.")
        check(bool(self.data) or DATA not in self.base, f"base={self.base} names {DATA}, but no data are drawn.")
        check(
            bool(self.data) or DATA not in self.evaluation.data_dir,
            f"evaluation.data_dir={self.evaluation.data_dir} names {DATA}, but no data are drawn.",
        )
        for name in self.published.rows if self.published else ():
            check_choice("published.rows: variant ", name, self.variants)


@dataclass(frozen=True)
class Variant:
    """One variant, checked.

    Attributes:
      trained_as: the variant whose runs it evaluates: itself, or an earlier one that is trained the same way.
      changes: keys and values that its command of training sets, besides the seed.
      run: the configuration of its runs. evaluation: that of its evaluation.
    """

    name: str
    trained_as: str
    changes: dict[str, Any]
    run: RunConfig
    evaluation: EvaluationConfig


def read_study(values: Mapping[str, Any]) -> tuple[StudyConfig, list[Variant]]:
    """Makes and checks a study and its variants.

    Raises:
      UserError: a key or a value of the study, of its base or of a variant is wrong.
    """
    study = from_dict(StudyConfig, values)
    variants: list[Variant] = []
    shorter = _fewer_steps(study)
    for name, keys in study.variants.items():
        where = f"variant {name!r}: "
        training = {key: value for key, value in keys.items() if not key.startswith(EVALUATION)}
        for key, value in (study.common | keys).items():
            check(key != "seed", f"{where}the seed is the study's own; set seeds.")
            check(
                _is_simple(value),
                f"{where}{key} must be set to a number, a text or a list of them, got {brief(value)}; a key inside of "
                "a mapping is written model.mask or stages[0].steps.",
            )
        varied = {key.removeprefix(EVALUATION): keys[key] for key in keys if key not in training}
        for key in varied:
            check_choice(f"{where}key {EVALUATION}", key, _VARIED)
        try:
            changes = shorter | study.common | training
            run = from_dict(RunConfig, _changed(study.base, changes))
            evaluation = from_dict(EvaluationConfig, to_dict(study.evaluation) | varied, "evaluation")
            check(
                evaluation.guide == "question" or run.model.text_guided,
                f"evaluation.guide={evaluation.guide!r} needs an encoder that reads text (model.text_guided).",
            )
        except UserError as error:
            raise UserError(f"{where}{error}") from error
        same = next((other.trained_as for other in variants if other.run == run), name)
        twin = next((v.name for v in variants if v.trained_as == same and v.evaluation == evaluation), None)
        check(twin is None, f"{where}it is the same as the variant {twin!r}.")
        variants.append(Variant(name, same, changes, run, evaluation))
    return study, variants


def _is_simple(value: Any) -> bool:
    """Whether the command line can set a key to this value."""
    parts = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(part, bool | int | float | str) for part in parts)


def _changed(base: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    config = load_config(base)
    for key, value in changes.items():
        set_key(config, key, value)
    return config.to_dict()


def _fewer_steps(study: StudyConfig) -> dict[str, int]:
    """The keys that shorten the base's stages."""
    if study.steps_share == 1:
        return {}
    changes = {}
    for number, stage in enumerate(from_dict(RunConfig, load_config(study.base).to_dict()).stages):
        check(
            stage.steps > 0,
            f"steps_share={study.steps_share} needs stages with steps, but {stage.name} of {study.base} has epochs.",
        )
        changes[f"stages[{number}].steps"] = max(1, round(stage.steps * study.steps_share))
    return changes


def as_argument(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else repr(tuple(value) if isinstance(value, list) else value)


def describe(study: StudyConfig, variants: list[Variant]) -> dict[str, Any]:
    """All that the runs of a study depend on, as JSON: not its number of seeds, its texts and its published table."""
    described = {
        "base": study.base,
        "data": study.data,
        "evaluation": to_dict(study.evaluation),
        "baseline": study.baseline,
        "variants": {
            variant.name: {"run": to_dict(variant.run), "evaluation": to_dict(variant.evaluation)}
            for variant in variants
        },
    }
    if study.data:
        described["data_values"] = load_config(study.data).to_dict()
    return json.loads(json.dumps(described, default=ConfigDict.to_dict))


def first_difference(one: Any, other: Any, where: str = "") -> str:
    """The key at which two descriptions differ first; empty where they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            path = f"{where}.{key}" if where else str(key)
            if key not in one or key not in other:
                return path
            if found := first_difference(one[key], other[key], path):
                return found
        return ""
    return "" if one == other else where
