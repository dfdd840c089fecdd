"""Tries hostile inputs of an area, one after the other, and counts what became of them.

An area is a module of this folder with

    QUICK      how many inputs the tests try; `launch/soak.sh` tries many more
    attempts   attempts(random, folder) -> an endless iterator of (what is tried, a function that tries it)

The function returns "refused" (the error that the documentation promises), or "accepted" (the input was harmless, and
used). Whatever else happens, another exception, more time or memory than allowed, a wrong status, is raised and counts
as a failure. What `attempts` needs for long, a server for instance, it starts first and ends in a `finally`.
"""

import importlib
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

AREAS = ("checkpoints", "commands", "folders", "images", "json_bodies", "page", "raw_http", "records", "replies")


@dataclass
class Tally:
    """What became of the inputs of one area.

    Attributes:
      outcomes: number of inputs by outcome. failures: one sentence for each that was not survived.
    """

    area: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return self.outcomes.total() + len(self.failures)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return f"{self.area}: {self.tried} tried, {self.outcomes.total()} survived ({counts}), {self.seconds:.0f} s"


def run(area: str, folder: Path, count: int | None = None, seed: int = 0) -> Tally:
    """Tries `count` inputs of an area, by default as many as the tests do. Equal seeds give equal inputs."""
    module = importlib.import_module(area)
    tally, begun = Tally(area), time.monotonic()
    attempts = module.attempts(np.random.default_rng(seed), folder)
    try:
        for number, (what, attempt) in zip(range(module.QUICK if count is None else count), attempts):
            try:
                tally.outcomes[attempt()] += 1
            except Exception as error:
                tally.failures.append(f"{area} {number} (seed {seed}), {what}: {type(error).__name__}: {error}"[:500])
    finally:
        attempts.close()
    tally.seconds = time.monotonic() - begun
    return tally
