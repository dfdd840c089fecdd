"""Reads the JSONL files of a run, whose entries have a `step`, and removes entries after a step."""

import json
import logging
from pathlib import Path

from fusion_jax.errors import UserError
from fusion_jax.files import write_whole

log = logging.getLogger("fusion_jax")


def truncate_rows(path: Path, step: int) -> None:
    """Keeps the lines of a JSONL file whose `step` is at most `step`.

    Lines that are not such an entry are dropped with a warning: those that a kill left incomplete, and damaged ones.

    Raises:
      UserError: `path` is not a file.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path} must be a file; move away what is there.")
    content, kept, bad = path.read_bytes(), [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        entry = _entry(line)
        if entry is None and line:
            bad.append(number)
        elif entry is not None and entry["step"] <= step:
            kept.append(line + b"\n")
    if bad:
        numbers = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        log.warning("%s: %d damaged line(s) cut off (%s)", path, len(bad), numbers)
    if b"".join(kept) == content:
        return
    write_whole(path, b"".join(kept))


def read_rows(path: Path) -> list[dict]:
    """Returns the entries of a JSONL file, each with a `step`; other lines are skipped."""
    return [entry for line in path.read_bytes().split(b"\n") if (entry := _entry(line)) is not None]


def _entry(line: bytes) -> dict | None:
    """Returns the entry in a line; None if there is none."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return entry if type(step) is int and 0 <= step < 2**63 else None
