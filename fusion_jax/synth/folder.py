"""Guards the folder of a run: it has one config and one process, and is empty after a failed start.

OUT/manifest.json           config, prompts, inputs; at the end the counts and costs
OUT/work/                   captions and unfinished samples (pool.py, blocks.py)
OUT/journal/                paid replies (journal.py)
OUT/images/                 images, named by hashes of what they were drawn from
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusion_jax import files
from fusion_jax.errors import UserError, check
from fusion_jax.synth.backends import factory
from fusion_jax.synth.blocks import read_block
from fusion_jax.synth.config import OPERATIONAL, SynthConfig
from fusion_jax.synth.images import write_once
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.kinds.common import JUDGE, STATEMENT, VERIFY
from fusion_jax.values.dicts import to_dict

FORMAT, VERSION = "fusion_jax synthesis", 1


def identity(config: SynthConfig) -> dict[str, Any]:
    """What must be the same to continue a run: prompts, and the config without what does not change the result."""
    settings = json.loads(json.dumps(to_dict(config)))
    for part, keys in OPERATIONAL.items():
        for key in keys:
            (settings[part] if part else settings).pop(key)
    prompts = {"judge": JUDGE.version, "verify": VERIFY.version, "statement": STATEMENT.version}
    for name in config.used_kinds:
        kind = KINDS[name]
        prompts[name] = "/".join(ask.version for ask in (kind.describe, kind.ask) if ask)
    drawn = "embedded" in (config.llm.backend, config.vision.backend, config.images.backend)
    own = {"embedded": factory.embedded().VERSION} if drawn else {}  # its output depends on its code
    return {"format": FORMAT, "version": VERSION, "config": settings, "prompts": prompts} | own


def open_run(config: SynthConfig, out: Path) -> dict[str, Any]:
    """The manifest of the run in a folder; begins one in a new folder. Raises UserError for another run's folder."""
    check(not out.exists() or out.is_dir(), f"{out} is a file; --out names a folder.")
    wanted = identity(config)
    if not is_new(out):
        manifest = find_run(config, out)
        if all(manifest.get(key) == wanted[key] for key in wanted):
            return manifest
        shutil.rmtree(out / "work", ignore_errors=True)  # it holds only captions, no results
    manifest = wanted | {"state": "running"}
    write_json(out / "manifest.json", manifest)
    return manifest


def find_run(config: SynthConfig, out: Path) -> dict[str, Any]:
    """The manifest of a run that this config may continue: its own, or one of another config without results so far, so
    that a mistake can be corrected and paid replies are still used.

    Raises:
      UserError: the folder holds another run or other files.
    """
    wanted = identity(config)
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        present = {"embedded": None} | {key: manifest[key] for key in wanted if key != "embedded" or key in manifest}
        present = {key: present[key] for key in wanted}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        raise UserError(
            f"{out} holds files that are not a synthesis run; name a new or empty folder with --out."
        ) from None
    same_format = all(present[key] == wanted[key] for key in ("format", "version"))
    if present != wanted and not (same_format and not _has_results(out)):
        raise UserError(
            f"{out} holds a run with another configuration ({_difference(present, wanted)}); "
            "name another folder with --out."
        )
    return manifest


def is_new(out: Path) -> bool:
    """Whether a folder does not exist, or holds only a lock."""
    return not out.exists() or all(path.name == "lock" for path in out.iterdir())


def _has_results(out: Path) -> bool:
    """Whether any sample has passed a stage without being dropped."""
    for path in sorted((out / "work" / "blocks").glob("*.jsonl")):
        done, samples = read_block(out, int(path.stem))
        if done and not all("dropped" in sample for sample in samples):
            return True
    return False


@contextlib.contextmanager
def leaving_nothing(out: Path, created: list[Path]) -> Iterator[None]:
    """Empties a folder that was new and removes the created ones where the block raises before anything was paid for or
    a sample passed a stage, so that the corrected command starts in the same state."""
    new = is_new(out)
    try:
        yield
    except Exception:
        paid = any(path.stat().st_size for path in (out / "journal").glob("*.jsonl")) or any(
            (out / "images").glob("*/*")
        )
        if new and not paid and not _has_results(out):
            for path in out.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            for path in created:
                with contextlib.suppress(OSError):
                    path.rmdir()
        raise


def _difference(present: Any, wanted: Any, where: str = "") -> str:
    if isinstance(present, dict) and isinstance(wanted, dict):
        for key in [*wanted, *present]:
            if present.get(key) != wanted.get(key):
                return _difference(present.get(key), wanted.get(key), f"{where}.{key}" if where else key)
    return f"{where} was {present!r} and is {wanted!r}"[:300]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Locks the folder against a second run; the system releases the lock when the process ends in any way."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with files.locked(out / "lock") as mine:
            check(mine, f"Another process is working in {out}.")
            yield
    except OSError as e:
        raise UserError(f"Cannot write to {out}: {e.strerror or e}; the same command goes on from here.") from e


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    write_once(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
