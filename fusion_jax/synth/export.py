"""Writes the selected samples as records, shards and mixtures for training.

OUT/stage1.json stage1_5.json stage2.json    LLaVA records, images relative to OUT
OUT/validation.json                          the validation share of all of them, and the files that pools name
OUT/shards/stage1/ ...                       the same records with their images (data/shard_writing.py)
OUT/stage1.yaml ...                          the mixtures that a stage's `data` names
OUT/tokenizer/                               a vocabulary of the stages' texts, if wanted
OUT/lineage.jsonl                            how each record was made, a line each: `origin` is the caption's, `source`
                                             and `licence` the record's; of the embedded backend also what it
                                             `understood` and `missed` of the caption and what it `invented`
OUT/dropped.jsonl                            every caption that did not become a record, with stage and reason

{"id": "00000012-conv_short", "image": "images/3f/3f0c...png", "conversations": [...], "kind": "conv_short",
 "topics": ["colour"], "source": "...", "licence": "..."}    topics: of the rounds, where the backend knows them
"""

import contextlib
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusion_jax.data import shard_writing, shards
from fusion_jax.errors import check
from fusion_jax.files import whole_file
from fusion_jax.synth.backends import factory
from fusion_jax.synth.blocks import all_samples
from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.images import write_once
from fusion_jax.synth.kinds import KINDS, STAGES
from fusion_jax.synth.select import verdicts
from fusion_jax.synth.stages import Sample, conversation
from fusion_jax.synth.tokenizer import train_tokenizer

log = logging.getLogger("fusion_jax")

VALIDATION = "validation"
_TOKENIZER_RECORDS = 20_000  # of a stage
_MISSED = 20  # the most frequent words of captions that the embedded backend cannot draw


def export(config: SynthConfig, out: Path, blocks: int) -> dict[str, Any]:
    """Writes the files listed above and returns the counts: records by file and kind, dropped captions by reason.

    Raises:
      UserError: no selection has been made.
    """
    selection = out / "work" / "selection.jsonl"
    check(selection.exists(), f"There is no {selection}; run the stage `select` first.")
    chosen = verdicts(selection)
    files: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    readings = _Readings()
    splits = sorted({pool.split for pool in config.pools if pool.split} - {VALIDATION})
    every = (*STAGES, VALIDATION, *splits)
    with contextlib.ExitStack() as stack:
        written = {name: stack.enter_context(_Whole(out / f"{name}.json")) for name in every}
        lineage = stack.enter_context(_Whole(out / "lineage.jsonl"))
        left_out = stack.enter_context(_Whole(out / "dropped.jsonl"))
        for sample in all_samples(out, blocks):
            readings.add(sample)
            verdict = None if "dropped" in sample else next(chosen)
            if verdict is not None and verdict["id"] != sample["id"]:
                raise AssertionError(f"the selection names {verdict['id']} where {sample['id']} stands")
            if verdict is None or "reason" in verdict:
                why = sample.get("dropped") or {"stage": "select", **verdict}
                dropped[f"{why['stage']}: {why['reason']}"] += 1
                line = {"id": sample["id"], "caption": sample["caption"], "origin": sample["origin"]}
                left_out.line(
                    line | {key: why[key] for key in ("stage", "reason", "detail")} | sample.get("reading", {})
                )
                continue
            name = sample["stage"] if verdict["split"] == "train" else verdict["split"]
            written[name].item(record(config, sample))
            lineage.line(_lineage(config, sample, name))
            files[name] += 1
            kinds[sample["kind"]] += 1
    _drop_empty(out, every, files)
    if config.shards:
        for name in STAGES:
            if files[name]:
                _shards(out, name)
    for name in STAGES:
        if files[name]:
            others = {other: how for other, how in config.mixtures.get(name, {}).items() if files[other]}
            parts = [_part(config, other, how) for other, how in ({name: "all"} | others).items()]
            write_once(out / f"{name}.yaml", ("datasets:\n" + "".join(parts)).encode())
    if config.tokenizer:
        train_tokenizer(_texts(out, files), out / "tokenizer", config.tokenizer)
    order = [name for name in every if files[name]]
    return {
        "records": {name: files[name] for name in order},
        "kinds": {name: kinds[name] for name in KINDS if kinds[name]},
        "dropped": dict(sorted(dropped.items())),
        **readings.counts(),
    }


class _Readings:
    """Sums what the embedded backend understood of all captions."""

    def __init__(self):
        self._shares: list[float] = []
        self._missed: Counter[str] = Counter()
        self._too_little = self._unknown = self._invented = self._inventions = 0

    def add(self, sample: Sample) -> None:
        """Counts a sample, dropped or not."""
        reason = sample.get("dropped", {}).get("reason")
        self._unknown += reason == "not_drawable"
        if reading := sample.get("reading"):
            self._shares.append(reading["kept_share"])
            self._missed.update(reading["missed"])
            self._too_little += reason == "too_little_understood"
            if reason != "too_little_understood":
                self._invented += bool(reading["invented"])
                self._inventions += len(reading["invented"])

    def counts(self) -> dict[str, Any]:
        """{"understood": ...} where the embedded backend read captions, else empty."""
        if not self._shares:
            return {}
        return {
            "understood": {
                "captions": len(self._shares),
                "kept_share": round(sum(self._shares) / len(self._shares), 4),
                "nothing_known": self._unknown,
                "too_little": self._too_little,
                "with_inventions": self._invented,
                "inventions": self._inventions,
                "missed": dict(self._missed.most_common(_MISSED)),
            }
        }


def _part(config: SynthConfig, name: str, how: str) -> str:
    source = f"shards: shards/{name}" if config.shards else f"json_path: {name}.json\n    image_folder: ."
    return f'  - {source}\n    sampling_strategy: "{how}"\n'


def _texts(out: Path, files: Counter[str]) -> Iterator[str]:
    """The texts of the stages' records."""
    for name in STAGES:
        if files[name]:
            for record in json.loads((out / f"{name}.json").read_text(encoding="utf-8"))[:_TOKENIZER_RECORDS]:
                yield from (turn["value"].removeprefix("<image>\n") for turn in record["conversations"])


def record(config: SynthConfig, sample: Sample) -> dict[str, Any]:
    """One LLaVA record of a finished sample."""
    files = [image["file"] for image in sample["images"]]
    topics = [pair.get("topic") for pair in sample["pairs"]]
    return {
        "id": sample["id"],
        "image": files[0] if len(files) == 1 else files,
        "conversations": conversation(sample, KINDS[sample["kind"]], config.seed),
        "kind": sample["kind"],
        **({"topics": topics} if all(topics) else {}),
        **rights(config, sample),
    }


def rights(config: SynthConfig, sample: Sample) -> dict[str, str]:
    """Source and licence of a record.

    They are the caption's, except where the embedded backend invented the scene from it: that scene is its own work,
    and the licence of the caption's source does not apply to it.
    """
    source, licence = sample["origin"]["source"], sample["origin"]["licence"]
    users = {Path(pool.path).name for pool in config.pools if not pool.path.startswith("embedded:")}
    if sample["origin"]["pool"] not in users:
        return {"source": source, "licence": licence}
    if "reading" in sample:
        own = factory.embedded()
        source = f"{own.SOURCE}, after a caption from: {source}"
        if config.images.backend == "embedded":
            return {"source": source, "licence": own.LICENCE}
        return {"source": f"{source}; image by {config.images.model}", "licence": licence}
    if config.images.backend == "embedded":
        source += "; image drawn by the embedded backend"
    return {"source": source, "licence": licence}


def _lineage(config: SynthConfig, sample: Sample, file: str) -> dict[str, Any]:
    keys = ("id", "kind", "caption", "origin", "descriptions", "answer", "state", "images", "pairs", "wrong")
    keys += ("unverified", "statements", "scores", "lineage")
    line = {"file": f"{file}.json"} | {key: sample[key] for key in keys if key in sample}
    return line | rights(config, sample) | sample.get("reading", {})


class _Whole:
    """A JSON file that appears once it is complete: a list of `item`s, or JSON Lines of `line`s."""

    def __init__(self, path: Path):
        self._list = path.suffix == ".json"
        self._whole = whole_file(path, path.with_name(f".{path.name}.tmp"), sync=True)
        self._items = 0

    def __enter__(self) -> "_Whole":
        self._file = io.TextIOWrapper(self._whole.__enter__(), encoding="utf-8", errors="replace")
        return self

    def item(self, value: Any) -> None:
        """Adds an item to the list."""
        self._file.write(("[\n" if not self._items else ",\n") + json.dumps(value, ensure_ascii=False))
        self._items += 1

    def line(self, value: Any) -> None:
        """Adds a line."""
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")

    def __exit__(self, *raised) -> None:
        if self._list:
            self._file.write("\n]\n" if self._items else "[]\n")
        self._file.detach()  # this writes out what is buffered; the file itself is closed below
        self._whole.__exit__(*raised)


def _drop_empty(out: Path, every: tuple[str, ...], files: Counter[str]) -> None:
    """Removes the files of stages without records."""
    for name in every:
        if not files[name]:
            (out / f"{name}.json").unlink()
            (out / f"{name}.yaml").unlink(missing_ok=True)
            shutil.rmtree(out / "shards" / name, ignore_errors=True)


def _shards(out: Path, name: str) -> None:
    """Writes the shards of one file; those of an earlier selection of this run are removed."""
    folder, recorded = out / "shards" / name, out / "work" / f"shards_{name}.sha256"
    digest = shards.hash_file(out / f"{name}.json")
    if not recorded.exists() or recorded.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        write_once(recorded, digest.encode())
    shard_writing.convert(out / f"{name}.json", out, folder, max_bad_records=0.0, progress=False)
