"""Puts the captions of all pools into blocks of samples, each with its number, kind and key.

OUT/work/pool.json    {"captions": 1000, "blocks": 4, "inputs": [...]}; written once all blocks are
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusion_jax.data import shards
from fusion_jax.synth import captions
from fusion_jax.synth.backends import factory
from fusion_jax.synth.blocks import readable, write_block
from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.folder import write_json
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.replies import Invalid, one_line
from fusion_jax.synth.stages import Sample, make_seed

MAX_CAPTION = 2000  # characters


def make_pool(config: SynthConfig, out: Path) -> dict[str, Any]:
    """Writes the captions of all pools as blocks, unless they exist, and returns the contents of pool.json.

    Raises:
      UserError: as for `captions.read_pool`, or pool.json is damaged.
    """
    path = out / "work" / "pool.json"
    if path.exists():
        with readable(out, path) as f:
            content = json.load(f)
            return {key: content[key] for key in ("captions", "blocks", "inputs")}
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
    content = {"captions": count, "blocks": blocks, "inputs": inputs}
    write_json(path, content)
    return content


def _captions(config: SynthConfig) -> Iterator[tuple[Sample, dict[str, float]]]:
    """Yields each caption as a sample, with the weights of the kinds that it may become."""
    for i, pool in enumerate(config.pools):
        source, licence = pool.source, pool.licence
        if pool.path.startswith("embedded:"):
            source, licence = source or factory.embedded().SOURCE, licence or factory.embedded().LICENCE
        for record in captions.read_pool(pool, make_seed(config.seed, "pool", i)):
            origin = {"pool": Path(pool.path).name, "record": record.pop("record"), "source": source}
            sample = record | {"origin": origin | {"licence": licence}}
            yield sample | ({"split": pool.split} if pool.split else {}), pool.kinds or config.kinds


def _assign(config: SynthConfig, sample: Sample, n: int, kinds: dict[str, float], seen: set[int]) -> None:
    """Adds number, kind and key to a sample; `dropped` where its caption is empty, too long or a duplicate."""
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
    # The draw is by its text, not its number, so that other captions do not change what it becomes.
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
