"""Lays out a study's folder, and says what of the study is done.

OUT/config.json                      what the runs depend on; another study is refused
OUT/study.json  report.md  report.html  *.png
OUT/data/SEED/                       the data of a seed, if the study draws them; SEED.log, SEED.json (done)
OUT/runs/VARIANT/SEED/               an ordinary workdir, and train.log, trained.json (done), study.lock
OUT/evaluations/VARIANT/SEED/        an ordinary folder of evaluation, and evaluate.log, evaluated.json (done)
OUT/compiled/                        compiled programs, which the runs share
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError, check
from fusion_jax.files import parse_json, read_file, write_whole
from fusion_jax.studies.config import DATA, StudyConfig, Variant, describe, first_difference

EVALUATED = "evaluated.json"
_LARGEST = 1 << 26  # bytes of the files of a study that are read


@dataclass(frozen=True)
class Run:
    """One training and its evaluations, which one process does together.

    Attributes:
      variant: the variant that is trained. seed: its seed.
      evaluated: the variants that its checkpoint is evaluated for.
    """

    variant: Variant
    seed: int
    evaluated: tuple[Variant, ...]

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"


@dataclass(frozen=True)
class Folder:
    """The folder of a study."""

    path: Path

    def data(self, seed: int) -> Path:
        return self.path / "data" / str(seed)

    def data_done(self, seed: int) -> Path:
        return self.path / "data" / f"{seed}.json"

    def workdir(self, variant: str, seed: int) -> Path:
        return self.path / "runs" / variant / str(seed)

    def trained(self, variant: str, seed: int) -> Path:
        return self.workdir(variant, seed) / "trained.json"

    def evaluation(self, variant: str, seed: int) -> Path:
        return self.path / "evaluations" / variant / str(seed)

    def evaluated(self, variant: str, seed: int) -> Path:
        return self.evaluation(variant, seed) / EVALUATED

    def is_done(self, run: Run) -> bool:
        return all(self.evaluated(variant.name, run.seed).exists() for variant in run.evaluated)

    def with_data(self, text: str, seed: int) -> str:
        """The text with the data's folder of a seed in place of `{data}`."""
        return text.replace(DATA, str(self.data(seed)))


def runs_of(study: StudyConfig, variants: list[Variant]) -> list[Run]:
    """All runs, those of the first seed first, so that an early report has something of every variant."""
    trained = [variant for variant in variants if variant.trained_as == variant.name]
    return [
        Run(one, seed, tuple(v for v in variants if v.trained_as == one.name))
        for seed in range(study.seeds)
        for one in trained
    ]


def claim(folder: Folder, study: StudyConfig, variants: list[Variant]) -> None:
    """Makes the study's folder, or checks that it holds the same study.

    Raises:
      UserError: it holds another study or other files; the first key that differs is named.
    """
    path, wanted = folder.path / "config.json", describe(study, variants)
    if path.exists():
        key = first_difference(read_json(path), wanted)
        check(not key, f"{folder.path} holds a study with another value of {key}; give another --out.")
        return
    check(
        not folder.path.exists() or (folder.path.is_dir() and not any(folder.path.iterdir())),
        f"--out={folder.path} is not the folder of a study and not empty; give another.",
    )
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def read_json(path: Path) -> Any:
    """Reads a JSON file of the study. Raises UserError where that cannot be."""
    try:
        return parse_json(read_file(path, _LARGEST))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and what it describes is done again.") from error


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")
