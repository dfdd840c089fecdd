"""The run's folder while it is worked on: samples in blocks, each a file that appears whole or not at all.

    OUT/manifest.json           config, prompts, inputs; at the end what came out
    OUT/work/pool.json          how many captions and blocks there are; written once all blocks are
    OUT/work/blocks/00012.jsonl {"block": 12, "done": ["filter", "judge"]}, then a sample a line
    OUT/journal/                paid replies (journal.py)
    OUT/images/                 images, named by what they were drawn from

A block's file is replaced when its samples have been through the stages that were asked for. Killed before, they go
through them again; what had been paid for by then comes out of the journal.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fusion_jax import files
from fusion_jax.data import shards
from fusion_jax.errors import UserError, check
from fusion_jax.synth import captions
from fusion_jax.synth.backends import factory
from fusion_jax.synth.config import OPERATIONAL, SynthConfig
from fusion_jax.synth.images import write_once
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.kinds.common import JUDGE, STATEMENT, VERIFY
from fusion_jax.synth.replies import Invalid, one_line
from fusion_jax.synth.stages import STAGES, Sample, make_seed
from fusion_jax.values.dicts import to_dict

FORMAT, VERSION = "fusion_jax synthesis", 1
MAX_CAPTION = 2000  # characters


def identity(config: SynthConfig) -> dict[str, Any]:
    """What a run that goes on must find unchanged: the config without what does not change the result, the prompts."""
    said = json.loads(json.dumps(to_dict(config)))
    for part, keys in OPERATIONAL.items():
        for key in keys:
            (said[part] if part else said).pop(key)
    prompts = {"judge": JUDGE.version, "verify": VERIFY.version, "statement": STATEMENT.version}
    for name in config.used_kinds:
        kind = KINDS[name]
        prompts[name] = "/".join(ask.version for ask in (kind.describe, kind.ask) if ask)
    drawn = "embedded" in (config.llm.backend, config.vision.backend, config.images.backend)
    own = {"embedded": factory.embedded().VERSION} if drawn else {}  # what it makes is decided by its code
    return {"format": FORMAT, "version": VERSION, "config": said, "prompts": prompts} | own


def open_run(config: SynthConfig, out: Path) -> dict[str, Any]:
    """Makes the folder, or finds that it holds this very run, and returns its manifest. UserError otherwise."""
    check(not out.exists() or out.is_dir(), f"{out} is a file; --out names a folder.")
    wanted = identity(config)
    if not is_new(out):
        manifest = find_run(config, out)
        if all(manifest.get(key) == wanted[key] for key in wanted):
            return manifest
        shutil.rmtree(out / "work", ignore_errors=True)  # captions alone: nothing had come of them
    manifest = wanted | {"state": "running"}
    write_json(out / "manifest.json", manifest)
    return manifest


def find_run(config: SynthConfig, out: Path) -> dict[str, Any]:
    """The manifest of the run in a folder that this config may go on with: its own, or one of another config of which
    nothing has come so far, so that a mistake can be corrected and paid replies are still used. UserError otherwise."""
    wanted = identity(config)
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        found = {"embedded": None} | {key: manifest[key] for key in wanted if key != "embedded" or key in manifest}
        found = {key: found[key] for key in wanted}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        raise UserError(
            f"{out} holds files that are no synthesis run; name a new or empty folder with --out."
        ) from None
    same_format = all(found[key] == wanted[key] for key in ("format", "version"))
    if found != wanted and not (same_format and not _has_come_to_something(out)):
        raise UserError(f"{out} holds a run made otherwise ({_difference(found, wanted)}); name another with --out.")
    return manifest


def is_new(out: Path) -> bool:
    """Whether a folder is not there, or holds nothing but a lock."""
    return not out.exists() or all(path.name == "lock" for path in out.iterdir())


def _has_come_to_something(out: Path) -> bool:
    """Whether a sample has been through a stage and is still there."""
    for path in sorted((out / "work" / "blocks").glob("*.jsonl")):
        done, samples = read_block(out, int(path.stem))
        if done and not all("dropped" in sample for sample in samples):
            return True
    return False


@contextlib.contextmanager
def leaving_nothing(out: Path, created: list[Path]) -> Iterator[None]:
    """Empties a folder that was new, and removes the created ones, should it end in an error before anything was paid
    for or came through a stage: so that the corrected command finds things as the first did."""
    new = is_new(out)
    try:
        yield
    except Exception:
        paid = any(path.stat().st_size for path in (out / "journal").glob("*.jsonl")) or any(
            (out / "images").glob("*/*")
        )
        if new and not paid and not _has_come_to_something(out):
            for path in out.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            for path in created:
                with contextlib.suppress(OSError):
                    path.rmdir()
        raise


def _difference(found: Any, wanted: Any, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *found]:
            if found.get(key) != wanted.get(key):
                return _difference(found.get(key), wanted.get(key), f"{where}.{key}" if where else key)
    return f"{where} was {found!r} and is {wanted!r}"[:300]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second run out of the folder. The system lifts it when the process ends, however that happens."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with files.locked(out / "lock") as mine:
            check(mine, f"Another process is working in {out}.")
            yield
    except OSError as e:
        raise UserError(f"Cannot write to {out}: {e.strerror or e}; the same command goes on from here.") from e


def write_json(path: Path, value: Any) -> None:
    write_once(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def make_pool(config: SynthConfig, out: Path) -> dict[str, Any]:
    """Deals all captions into blocks, unless that is done; returns what pool.json says. UserError as `read_pool`."""
    told = out / "work" / "pool.json"
    if told.exists():
        with _readable(out, told) as f:
            found = json.load(f)
            return {key: found[key] for key in ("captions", "blocks", "inputs")}
    seen: set[int] = set()
    waiting: list[Sample] = []
    blocks = count = 0
    for sample, kinds in _captions(config):
        _assign(config, sample, count, kinds, seen)
        waiting.append(sample)
        count += 1
        if len(waiting) == config.block:
            write_block(out, blocks, [], waiting)
            blocks, waiting = blocks + 1, []
    if waiting:
        write_block(out, blocks, [], waiting)
        blocks += 1
    inputs = [_describe_input(pool.path) for pool in config.pools]
    found = {"captions": count, "blocks": blocks, "inputs": inputs}
    write_json(told, found)
    return found


def _captions(config: SynthConfig) -> Iterator[tuple[Sample, dict[str, float]]]:
    """Each caption, and what kinds it may become in what shares."""
    for i, pool in enumerate(config.pools):
        source, licence = pool.source, pool.licence
        if pool.path.startswith("embedded:"):
            source, licence = source or factory.embedded().SOURCE, licence or factory.embedded().LICENCE
        for found in captions.read_pool(pool, make_seed(config.seed, "pool", i)):
            origin = {"pool": Path(pool.path).name, "record": found.pop("record"), "source": source, "licence": licence}
            yield found | {"origin": origin} | ({"split": pool.split} if pool.split else {}), pool.kinds or config.kinds


def _assign(config: SynthConfig, sample: Sample, n: int, kinds: dict[str, float], seen: set[int]) -> None:
    """Number, kind and key of a caption; `dropped` if it is none or was there before."""
    reason, text = None, ""
    try:
        text = one_line(sample["caption"])
    except Invalid:
        reason = "empty_caption"
    if len(text) > MAX_CAPTION:
        reason, text = "caption_too_long", text[:MAX_CAPTION]
    known = int.from_bytes(hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest())
    if reason is None and known in seen:
        reason = "duplicate_caption"
    seen.add(known)
    # By its text, not its number: other captions beside it do not change what it becomes.
    names, weights = zip(*sorted(kinds.items()))
    at = make_seed(config.seed, text, "kind") / (1 << 31) * sum(weights)
    kind = next((name for name, end in zip(names, itertools.accumulate(weights)) if at < end), names[-1])
    sample |= {"id": f"{n:08d}-{kind}", "n": n, "kind": kind, "caption": text, "lineage": {}}
    sample["stage"] = config.stages.get(kind, KINDS[kind].stage)
    sample["key"] = hashlib.sha256(f"{kind}/{text}".encode()).hexdigest()[:16]
    if reason is not None:
        sample["dropped"] = {"stage": "pool", "reason": reason, "detail": "", "again": False}


def _describe_input(path: str) -> dict[str, Any]:
    if path.startswith(("tfds:", "embedded:")):
        return {"path": path}
    return {"path": Path(path).name, "bytes": os.path.getsize(path), "sha256": shards.hash_file(Path(path))}


def _block_path(out: Path, number: int) -> Path:
    return out / "work" / "blocks" / f"{number:05d}.jsonl"


def write_block(out: Path, number: int, done: list[str], samples: list[Sample]) -> None:
    lines = [{"block": number, "done": done}, *samples]
    write_once(
        _block_path(out, number),
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode(errors="replace"),
    )


@contextlib.contextmanager
def _readable(out: Path, path: Path) -> Iterator[IO[str]]:
    try:
        with open(path, encoding="utf-8") as f:
            yield f
    except (ValueError, RecursionError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} is damaged; delete {out / 'work'} and start the same command again: what was paid for is kept "
            "in the journal."
        ) from e


def read_done(out: Path, number: int) -> list[str]:
    """The stages that a block's samples have been through. UserError where its file is damaged."""
    with _readable(out, _block_path(out, number)) as f:
        return json.loads(f.readline())["done"]


def read_block(out: Path, number: int) -> tuple[list[str], list[Sample]]:
    """Those stages, and the samples. UserError as above."""
    with _readable(out, _block_path(out, number)) as f:
        head, *samples = map(json.loads, f)
    return head["done"], samples


def size(out: Path, number: int) -> int:
    """How many samples a block has. UserError as above."""
    with _readable(out, _block_path(out, number)) as f:
        return sum(1 for _ in f) - 1


def all_samples(out: Path, blocks: int) -> Iterator[Sample]:
    """All samples in their order, a block in memory at a time."""
    for number in range(blocks):
        yield from read_block(out, number)[1]


def missing(done: list[str], wanted: list[str], number: int) -> list[str]:
    """Which of the wanted stages a block still has to go through. UserError where one before them is missing."""
    todo = [stage for stage in STAGES if stage in wanted and stage not in done]
    if todo:
        before = list(STAGES)[: list(STAGES).index(todo[0])]
        gap = [stage for stage in before if stage not in done]
        check(
            not gap, f"Stage {todo[0]} needs stage {gap[0] if gap else ''}, which block {number} has not been through."
        )
        order = list(STAGES)[len(before) : len(before) + len(todo)]
        check(order == todo, f"Stage {todo[-1]} needs all stages before it: {', '.join(order)}.")
    return todo
