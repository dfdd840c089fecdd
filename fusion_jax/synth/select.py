"""Chooses among the finished samples: the best of each kind, without duplicates, some for validation.

Ranking is by the mean CLIPScore of the statements, as published, or by the image score where there is no scorer. In
this order, a sample is left out if a better one has nearly the same text or nearly the same image. The papers do not
have this step, but generators repeat themselves.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.synth.blocks import all_samples
from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.images import write_once
from fusion_jax.synth.stages import Sample, make_seed

_PERMUTATIONS = 128
_SHINGLE = 3  # words


def select(config: SynthConfig, out: Path, blocks: int) -> Path:
    """Writes OUT/work/selection.jsonl and returns its path. It has a line for each remaining sample, in their order:
    {"id", "split": "train" | "validation" | the pool's own} or {"id", "reason", "detail"}."""
    ranked: list[tuple[str, float, int, str]] = []
    texts: dict[int, np.ndarray] = {}
    hashes: dict[int, list[int]] = {}
    splits: dict[int, str] = {}
    for sample in all_samples(out, blocks):
        if "dropped" in sample:
            continue
        n = sample["n"]
        ranked.append((sample["kind"], rank_score(sample), n, sample["id"]))
        if config.select.text_similarity is not None:
            texts[n] = shingles(whole_text(sample))
        hashes[n] = [int(one, 16) for one in sample.get("hashes", ())]
        if "split" in sample:
            splits[n] = sample["split"]
    verdicts: dict[int, dict[str, Any]] = {}
    kept = []
    for kind in sorted({one[0] for one in ranked}):
        of_kind = sorted((one for one in ranked if one[0] == kind), key=lambda one: (-one[1], one[2]))
        most = math.ceil(round(config.select.keep * len(of_kind), 6))
        kept += of_kind[:most]
        for one in of_kind[most:]:
            verdicts[one[2]] = {"id": one[3], "reason": "low_rank", "detail": f"{one[1]:.4g}"}
    kept_texts = TextIndex(config.select.text_similarity) if texts else None
    kept_images = ImageIndex(config.select.image_distance)
    for _, _, n, name in sorted(kept, key=lambda one: (-one[1], one[2])):
        if kept_texts and (other := kept_texts.find(texts[n])) is not None:
            verdicts[n] = {"id": name, "reason": "near_duplicate_text", "detail": other}
        elif (other := kept_images.find(hashes[n])) is not None:
            verdicts[n] = {"id": name, "reason": "near_duplicate_image", "detail": other}
        else:
            if kept_texts:
                kept_texts.add(name, texts[n])
            kept_images.add(name, hashes[n])
            verdicts[n] = {"id": name, "split": splits.get(n) or _split(config, name)}
    path = out / "work" / "selection.jsonl"
    write_once(path, "".join(json.dumps(verdicts[n]) + "\n" for n in sorted(verdicts)).encode())
    return path


def verdicts(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that `select` wrote."""
    with open(path, encoding="utf-8") as f:
        yield from map(json.loads, f)


def rank_score(sample: Sample) -> float:
    scores = sample["scores"]
    score = scores["image"] if scores["statement"] is None else scores["statement"]
    return 0.0 if score is None else score


def whole_text(sample: Sample) -> str:
    """All texts of a sample: two samples about similar pictures may still have different questions."""
    return " ".join([*sample["descriptions"], *(f"{pair['question']} {pair['answer']}" for pair in sample["pairs"])])


def _split(config: SynthConfig, name: str) -> str:
    share = make_seed(config.seed, name, "split") / (1 << 31)
    return "validation" if share < config.select.validation else "train"


def shingles(text: str) -> np.ndarray:
    """Hashes of the runs of three words, sorted, each once: (runs,) uint64."""
    words = re.findall(r"\w+", text.lower())
    runs = {" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))}
    hashes = [int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest()) for run in runs]
    return np.array(sorted(hashes), np.uint64)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sets as returned by `shingles`."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


class TextIndex:
    """Finds texts nearly the same as one: MinHash proposes, the exact similarity decides."""

    def __init__(self, threshold: float):
        import datasketch

        self._threshold, self._minhash = threshold, datasketch.MinHash
        # A little lower, so that pairs just above the threshold are proposed.
        self._lsh = datasketch.MinHashLSH(threshold=max(0.05, threshold - 0.1), num_perm=_PERMUTATIONS)
        self._sets: dict[str, np.ndarray] = {}
        self._last: tuple[bytes, Any] = (b"", None)

    def _sketch(self, hashes: np.ndarray):
        if self._last[0] != hashes.tobytes():
            sketch = self._minhash(num_perm=_PERMUTATIONS, hashfunc=lambda x: int(x) & 0xFFFFFFFF)
            sketch.update_batch(hashes.tolist())
            self._last = (hashes.tobytes(), sketch)
        return self._last[1]

    def find(self, hashes: np.ndarray) -> str | None:
        """The name of the earliest text that is nearly the same, or None."""
        near = self._lsh.query(self._sketch(hashes))
        same = [name for name in near if similarity(self._sets[name], hashes) >= self._threshold]
        return min(same, default=None)

    def add(self, name: str, hashes: np.ndarray) -> None:
        self._lsh.insert(name, self._sketch(hashes))
        self._sets[name] = hashes


class ImageIndex:
    """Finds images nearly the same as one by the differing bits of their hashes, exactly.

    Hashes are cut into one part more than the bits that may differ, so two close ones agree in at least one part.
    """

    def __init__(self, distance: int):
        self._distance = distance
        self._ends = [64 * i // (distance + 1) for i in range(distance + 2)] if distance >= 0 else []
        self._tables: list[dict[int, list[tuple[int, str]]]] = [defaultdict(list) for _ in self._ends[1:]]

    def _parts(self, one: int) -> list[int]:
        return [(one >> low) & ((1 << (high - low)) - 1) for low, high in zip(self._ends, self._ends[1:])]

    def find(self, hashes: list[int]) -> str | None:
        """The name of a sample with an image close to one of these; None if there is none."""
        near = set()
        for one in hashes:
            for table, part in zip(self._tables, self._parts(one)):
                near |= {name for other, name in table.get(part, ()) if (one ^ other).bit_count() <= self._distance}
        return min(near, default=None)

    def add(self, name: str, hashes: list[int]) -> None:
        for one in hashes:
            for table, part in zip(self._tables, self._parts(one)):
                table[part].append((one, name))
