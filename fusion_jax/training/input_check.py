"""Checks the input of a stage over all processes: bad records, equal data, equal planned batches."""

import dataclasses
import json
import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.loader import Fed
from fusion_jax.data.plan import Sizes, StepSize
from fusion_jax.data.planner import Counts
from fusion_jax.data.sources import RecordSource
from fusion_jax.data.stages import stage_loader, stage_sizes
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.devices import distributed
from fusion_jax.errors import BadRecord, check

log = logging.getLogger("fusion_jax")


def check_same_data(name: str, data: list[dict[str, Any]]) -> None:
    """Raises UserError if the processes hold different records. A collective. `data`: from `RecordSource.describe`."""
    by_process = distributed.gather(data)
    for process, other in enumerate(by_process):
        different = differences(other, by_process[0], "process 0")
        check(
            not different,
            f"The data of {name} are not the same for all processes: process {process} has {', '.join(different)}; "
            "give all machines the same files.",
        )


def check_same_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises UserError if the processes have different tokenizers. A collective."""
    by_process = distributed.gather(tokenizer.fingerprint)
    other = next((i for i, fingerprint in enumerate(by_process) if fingerprint != by_process[0]), None)
    check(
        other is None,
        f"The tokenizer is not the same for all processes: the files in {tokenizer.folder} of process {other} are not "
        "those of process 0; give all machines the same files.",
    )


def differences(data: list[dict[str, Any]], others: list[dict[str, Any]], whose: str) -> list[str]:
    """Says in phrases how two descriptions of data (`RecordSource.describe`) differ; names of files may differ."""
    if len(data) != len(others):
        names, theirs = (", ".join(part["name"] for part in parts) for parts in (data, others))
        return [f"the data sets {names} ({whose}: {theirs})"]
    phrases = []
    for part, other in zip(data, others):
        name = part["name"] if part["name"] == other["name"] else f"{part['name']} (in place of {other['name']})"
        if part["hash"] != other["hash"]:
            keys = [key for key in ("records", "bytes") if part[key] != other[key]]
            counts = [f"{part[key]:,} {key} ({whose}: {other[key]:,})" for key in keys]
            phrases.append(f"{name} with {' and '.join(counts) or 'other content of the same size'}")
        elif part["drawn"] != other["drawn"]:
            phrases.append(f"{part['drawn']:,} records of {name} an epoch ({whose}: {other['drawn']:,})")
        elif part["chosen"] != other["chosen"]:
            phrases.append(f"another choice of the records of {name}")
    return phrases


def agreed_sizes(config: RunConfig, stage: StageConfig, source: RecordSource, tokenizer, shards: int) -> Sizes:
    """Returns `stages.stage_sizes` as process 0 measures them. A collective.

    Args:
      shards: the number of shards of the rows of a microbatch.
    """
    sizes = None
    if distributed.is_first():
        loader = stage_loader(config, stage, source, tokenizer)
        sizes = dataclasses.asdict(stage_sizes(config, stage, loader, shards))
    sizes = distributed.gather(sizes)[0]

    def by_count(numbers: dict[str, int]) -> dict[int, int]:  # JSON's keys are strings
        return {int(latents): number for latents, number in numbers.items()}

    smaller = tuple(
        StepSize(one["question_length"], by_count(one["rounds"]), by_count(one["crops"])) for one in sizes["smaller"]
    )
    return Sizes(**sizes | {"crops": by_count(sizes["crops"]), "smaller": smaller})


class InputCheck:
    """Checks the input after every step, and ends a run whose data are too bad.

    With several processes each knows only the gaps in its own rows, until all exchange their counts every few steps; so
    an error is raised in all of them after the same step.
    """

    def __init__(self, config: RunConfig, stage: StageConfig, records: int, folder: Path, held: Sequence[int] = (0,)):
        """Sets up the checks of a stage.

        Args:
          records: number of records of the stage. folder: for `bad_records.jsonl`.
          held: shards of the rows that this process feeds (`sharding.held_shards`).
        """
        self._stage, self._records, self._path = stage, records, folder / "bad_records.jsonl"
        self._allowed = config.max_bad_records
        self._held = list(held)
        self._counts, self._plan = Counts(), 0  # those of the last step
        self._last: BadRecord | None = None  # the last bad record of this process
        self._gaps = 0  # checksum of this process's gaps
        self._own: Counter[str] = Counter()  # gaps of this process since the start, by reason
        self._all: Counter[str] = Counter()  # gaps of all processes, at their last exchange
        self._planned = self._unusable = 0  # samples and bad records since that exchange, without gaps
        self._in_row = 0  # bad records since the last sample
        self._agreed = True
        self._over = False  # the stage ends with this step
        self._to_show = 5  # bad records still to be logged; the file lists them all

    def note(self, step: int, fed: Fed, counts: Counts) -> None:
        """Lists and counts the bad records of a step, before it is computed. UserError if there are too many."""
        self._list(step, fed)
        gaps = fed.bad[len(fed.bad) - fed.broken :]
        self._own.update(bad.reason for bad in gaps)
        for bad in gaps:
            self._gaps = zlib.crc32(f"{bad.where} {bad.reason}".encode(), self._gaps)
        self._counts, self._plan, self._agreed, self._over = counts, fed.plan, False, fed.last
        planned = fed.samples + fed.broken
        self._planned += planned
        self._unusable += len(fed.bad) - fed.broken
        self._last = fed.bad[-1] if fed.bad else self._last
        if jax.process_count() == 1 or not planned:
            self.agree(step)
        self._total().check(self._allowed, self._records)

    def agree(self, step: int) -> Counts:
        """Exchanges and returns the counts over all processes. A collective.

        Raises:
          UserError: too many bad records, or the processes have planned different batches.
        """
        if not self._agreed:
            reports = distributed.gather(
                {"plan": self._plan, "gaps": self._own, "checksum": self._gaps, "held": self._held}
            )
            other = next((i for i, report in enumerate(reports) if report["plan"] != reports[0]["plan"]), None)
            check(
                other is None,
                f"The processes have planned different batches by step {step} of {self._stage.name} (process {other} "
                "and process 0); give all machines the same data, packages and program.",
            )
            # Processes of one `tensor` group feed the same rows, and have the same gaps in them.
            feeders: dict[tuple[int, ...], int] = {}
            for i, report in enumerate(reports):
                first = feeders.setdefault(tuple(report["held"]), i)
                check(
                    report["checksum"] == reports[first]["checksum"],
                    f"Processes {first} and {i} feed the same rows of {self._stage.name}, and one of them cannot read "
                    "an image that the other reads; give both machines the same files.",
                )
            gaps = sum((Counter(reports[i]["gaps"]) for i in feeders.values()), Counter())
            self._check_gaps(gaps.total() - self._all.total())
            self._all, self._agreed = gaps, True
        total = self._total()
        total.check(self._allowed, self._records)
        if self._over:
            self._check_use(sum(total.bad.values()) < total.seen)
        return total

    def position(self, step: int, state: dict) -> dict:
        """Returns the state of the input iterator after this step, with the counts over all processes. A collective."""
        return state | {"counts": state["counts"] | {"bad": self.agree(step).bad}}

    def _total(self) -> Counts:
        """Returns the counts with the gaps of the last exchange: the same in every process."""
        return self._counts.plus({reason: self._all[reason] - self._own[reason] for reason in self._all | self._own})

    def _check_gaps(self, gaps: int) -> None:
        used, bad = self._planned - gaps, self._unusable + gaps
        self._in_row = 0 if used else self._in_row + bad
        self._planned = self._unusable = 0
        # Two passes over the data contain a complete one, wherever they begin: no usable record is left.
        self._check_use(self._in_row < 2 * self._records)

    def _check_use(self, used: bool) -> None:
        check(
            used,
            f"None of the {self._records} records of {self._stage.data} can be used any more (the last: "
            f"{self._last}); bad_records.jsonl in the workdir lists them.",
        )

    def _list(self, step: int, fed: Fed) -> None:
        entries = [{"step": step, "reason": b.reason, "where": b.where, "detail": b.detail} for b in fed.bad]
        if not entries:
            return
        try:
            with self._path.open("a") as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        except OSError as error:
            log.warning("bad records are not listed: %s", error)
        for record in fed.bad[: max(0, self._to_show)]:
            log.warning("skipped a bad record (%s): %s", record.reason, record)
        self._to_show -= len(fed.bad)
