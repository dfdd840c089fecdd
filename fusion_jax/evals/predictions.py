"""Keeps answers on disk: appended as they come, shared by processes, bound to one checkpoint.

OUTPUT/TASK/parts/00001-of-00004.jsonl   the answers of process 1 of 4; the first line names the checkpoint
OUTPUT/TASK/predictions.jsonl            all of them in the benchmark's order, scored; written by process 0
"""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError
from fusion_jax.files import open_file, parse_json, shown, try_lock, write_whole

_PARTS = "parts"
_LONGEST = 1 << 20  # bytes of the first line


def fingerprint(step_folder: Path) -> str:
    """Names a checkpoint by its files: a copy elsewhere has the same name, any other save a different one.

    The sizes of the parameters' files and the contents of the small ones (the config, and the index of every tensor's
    blocks) are enough for that, so that the weights need not be read.
    """
    digest = hashlib.sha256()
    for path in sorted(p for name in ("params", "about") for p in (step_folder / name).rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(step_folder).as_posix()} {size}\n".encode())
        if size <= 1 << 16:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_folder(output: Path, header: dict[str, Any]) -> None:
    """Raises UserError if the output folder holds answers of another checkpoint."""
    for path in sorted(output.glob(f"*/{_PARTS}/*.jsonl")):
        _check_header(path, header)


def _check_header(path: Path, header: dict[str, Any]) -> None:
    try:
        with open_file(path) as file:
            first = file.readline(_LONGEST)
        if not first.endswith(b"\n"):
            return  # the process was stopped before it had written anything
        written = parse_json(first)
        checkpoint = written["checkpoint"]
    except OSError as e:
        raise UserError(f"Cannot read {path}: {e.strerror}.") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not a file of answers; give another --out.") from e
    if checkpoint != header["checkpoint"]:
        raise UserError(
            f"{path} holds answers of another checkpoint ({shown(written.get('folder'))}), or of another "
            "--weights or --guide; give another --out, or delete that folder."
        )


class Part:
    """The file to which one process appends its answers to one task."""

    def __init__(self, folder: Path, index: int, count: int, header: dict[str, Any]):
        self.path = folder / _PARTS / f"{index:05d}-of-{count:05d}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115
        try:
            free = try_lock(self._file.fileno())
        except OSError:  # the file system has no locks
            free = True
        if not free:
            self._file.close()
            raise UserError(f"{self.path} is being written by another process; give each its own --process_id.")
        _check_header(self.path, header)
        data = self.path.read_bytes()
        kept = data.rfind(b"\n") + 1  # a process that was killed may have left half a line
        self._file.truncate(kept)
        if not kept:
            self._write(header)
            self.flush()

    def add(self, key: str, prompt: str, answer: str) -> None:
        self._write({"id": key, "prompt": digest(prompt), "answer": answer})

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write((json.dumps(value, ensure_ascii=False) + "\n").encode(errors="replace"))


def digest(prompt: str) -> str:
    """A short name of a prompt: an answer counts only for the prompt that it answered."""
    return hashlib.sha256(prompt.encode(errors="replace")).hexdigest()[:12]


def read_answers(folder: Path) -> dict[tuple[str, str], str]:
    """All answers to a task so far, of all processes, by question and `digest` of its prompt."""
    answers = {}
    for path in sorted((folder / _PARTS).glob("*.jsonl")):
        for row in _rows(path):
            answers[row["id"], row["prompt"]] = row["answer"]
    return answers


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_file(path) as file:
        for number, line in enumerate(file):
            if not number or not line.endswith(b"\n"):
                continue
            try:
                row = parse_json(line)
                known = all(isinstance(row[key], str) for key in ("id", "prompt", "answer"))
            except (ValueError, KeyError, TypeError):
                known = False
            if known:  # a machine that fails may leave half a line; its question is asked again
                yield row


def wait_for(folder: Path, wanted: set[tuple[str, str]], patience: float, poll: float = 2.0) -> dict:
    """Waits until every wanted answer exists, and returns all answers.

    Raises:
      UserError: no process has answered anything for `patience` seconds.
    """
    last, since = -1, time.monotonic()
    while True:
        answers = read_answers(folder)
        missing = len(wanted - answers.keys())
        if not missing:
            return answers
        if missing != last:
            last, since = missing, time.monotonic()
        if time.monotonic() - since > patience:
            raise UserError(
                f"{folder}: {missing} of {len(wanted)} answers are missing and none came for {patience:.0f} seconds; "
                "start the other processes again, or this one alone with --num_processes=1."
            )
        time.sleep(poll)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes JSONL, whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, text.encode("utf-8", errors="replace"))
