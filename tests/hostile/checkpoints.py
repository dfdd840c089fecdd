"""Damaged and forged workdirs: step folders, their lists, about and input state, names, logs, the lock file.

Whatever lies there, a restart goes back to a checkpoint that is whole or ends with one sentence, and so do the commands
that load a model; nothing outside the workdir is written, nothing hangs on a pipe or a device.
"""

import base64
import contextlib
import json
import logging
import os
import shutil
import signal
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from helpers import tiny_run

from fusion_jax.config import RunConfig, from_dict
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.training import about, checkpoint, lock, resume
from fusion_jax.training.checkpoint_folders import FOLDER, step_of, steps_in
from fusion_jax.training.jsonl import read_rows, truncate_rows
from fusion_jax.training.loading import find_checkpoint
from fusion_jax.training.plots import plot_losses
from fusion_jax.training.state import TrainState

QUICK = 40
SECONDS = 60  # that one attempt may take
STAGE = "stage1"
DATA = [{"name": "d.json", "drawn": 48, "chosen": 1, "records": 48, "bytes": 9000, "hash": "0" * 64}]
STRANGE = ("007", "٣", "1e3", "-5", "99999999999999999999", "4²", "1٣", "3.damaged", "5.writing", "+7", " 8", "0x9")
VALUES = [None, True, 0, -1, 5, 1.5, 2**70, 10**30, float("nan"), "x", "", "../../x", [], [1], {}, {"a": 1}, [[]], "\0"]
PATHS = (
    "../../outside/planted",
    "/outside/planted",
    "a/../../planted",
    "..",
    ".",
    "",
    "\0",
    "tokenizer.model/x",
    "x\\y",
)


def state_at(step):
    numbers = jnp.arange(32 * 32, dtype=jnp.float32).reshape(32, 32) + step
    counters = (jnp.int32(step), jnp.int32(0), jnp.int32(1))
    return TrainState(counters[0], {"a": {"kernel": numbers}}, {"mu": numbers * 2}, *counters[1:])


def position(step):
    return {"step": step, "parent": {"next_index": 4 * step}}


def accept(step, data):
    """What training does: the state of its input is refused where it is none."""
    if data != position(step):
        raise ValueError("another position")


def attempts(random, folder):
    whole, outside = folder / "whole", folder / "outside"
    build(whole / STAGE / FOLDER, folder / "tokenizer")
    outside.mkdir()
    (outside / "canary").write_text("untouched")
    os.mkfifo(outside / "pipe")
    number = 0
    while True:
        number += 1
        work = folder / f"work{number}" / "run"
        kind, damage, attempt = KINDS[random.integers(len(KINDS))]
        work.mkdir(parents=True)
        said = damage(random, whole, work, outside)
        yield f"{kind}: {said}", lambda work=work, attempt=attempt: watched(attempt, work, outside)
        shutil.rmtree(work.parent, ignore_errors=True)


def watched(attempt, work, outside):
    """An attempt that may not take long, nor leave anything beside the workdir."""

    def late(*_):
        raise TimeoutError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        outcome = attempt(work)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert [path.name for path in work.parent.iterdir()] == ["run"], "something was written beside the workdir"
    assert sorted(path.name for path in outside.iterdir()) == ["canary", "pipe"]
    assert (outside / "canary").read_text() == "untouched"
    return outcome


def build(folder: Path, tokenizer: Path) -> None:
    """Three whole checkpoints with a real tokenizer."""
    tokenizer.mkdir()
    sentences = tokenizer / "sentences.txt"
    sentences.write_text("".join(f"the quick brown fox number {i} jumps over the lazy dog\n" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(sentences), model_prefix=str(tokenizer / "tokenizer"), vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    config = from_dict(RunConfig, tiny_run.get_config("data").to_dict())
    entry = about.describe_run(config, load_tokenizer(tokenizer), data={STAGE: DATA})
    # Without what differs from one run of the tests to the next, so that equal seeds give equal inputs.
    entry = {"json": json.dumps(json.loads(entry["json"]) | {"environment": {}})}
    checkpoints = checkpoint.Checkpoints(folder, entry)
    for step in (1, 2, 3):
        checkpoints.finish(step, state_at(step), position(step), patience=0)


# ---- Step folders.


def damage_steps(random, whole, work, outside):
    shutil.copytree(whole, work, dirs_exist_ok=True)
    folder = work / STAGE / FOLDER
    said = []
    for _ in range(random.integers(1, 4)):
        step = folder / str(random.choice([3, 3, 3, 2]))
        change = DAMAGES[random.integers(len(DAMAGES))]
        # A change before may have left nothing for this one.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
            said.append(f"{step.name} {change.__name__} {change(random, step, outside)}")
    return ", ".join(said)


def text(path):
    """The content of a file; neither a pipe nor a device is waited for."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_text()


def any_file(random, step):
    files = sorted(path for path in step.rglob("*") if path.is_file())
    return files[random.integers(len(files))] if files else step / "params"


def content(random, step, outside):
    path = any_file(random, step)
    before = path.read_bytes()
    place = int(random.integers(len(before) + 1))
    after = [
        before[:place],
        b"",
        before[:place] + bytes([random.integers(256)]) + before[place + 1 :],
        bytes(random.integers(0, 256, place % 4096, np.uint8)),
        before + before,
        json.dumps(VALUES[random.integers(len(VALUES))]).encode(),
        b"[" * 100_000,
        b"\0" * len(before),
    ][random.integers(8)]
    path.unlink()  # it may be a link by now
    path.write_bytes(after)
    return path.relative_to(step)


def kind_of_file(random, step, outside):
    path = any_file(random, step) if random.random() < 0.8 else step / str(random.choice(["params", "about", "data"]))
    return f"{path.relative_to(step)} {other_kind(random, path, outside)}"


def other_kind(random, path, outside):
    """Nothing, a folder, a pipe, or a link in place of a file."""
    which = random.integers(7)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if which == 1:
        path.mkdir()
    elif which == 2:
        os.mkfifo(path)
    elif which > 2:
        path.symlink_to([outside / "canary", "/dev/zero", outside / "pipe", path.name][which - 3])
    return which


def without_list(random, step, outside):
    (step / "files.0.json").unlink()
    return ""


def listed(random, step, outside):
    """The list itself: other forms, names that lead elsewhere."""
    path = step / "files.0.json"
    entries = json.loads(text(path))
    name = sorted(entries)[random.integers(len(entries))]
    value = VALUES[random.integers(len(VALUES))]
    forged = [
        value,
        {**entries, name: value},
        {**entries, name: [value, value]},
        {**entries, str(random.choice(PATHS)): [9, zlib.crc32(b"untouched")]},
        {key: entry for key, entry in entries.items() if key != name},
        {name: entries[name]},
    ][random.integers(6)]
    path.unlink()
    path.write_text(json.dumps(forged))
    return path.read_text()[:60]


def relist(step):
    """A forger lists what they have written."""
    checkpoint.integrity.write(step, 0)


def text_of(random, step, part, change):
    path = step / part / "_strings.json"
    inner = json.loads(json.loads(text(path))["json"])
    forged = change(inner)
    path.unlink()
    path.write_text(json.dumps({"json": forged if isinstance(forged, str) else json.dumps(forged)}))
    relist(step)


def forged_about(random, step, outside):
    said = []

    def change(inner):
        value = VALUES[random.integers(len(VALUES))]
        place = str(random.choice(["config", "tokenizer", "origin", "data", "conversation"]))
        name = str(random.choice([*PATHS, "pytorch_model.bin", "tokenizer.model", "tokenizer.json", "é" * 300]))
        data = [base64.b64encode(b"planted").decode(), "not base64!", value][random.integers(3)]
        key = sorted(inner["config"])[random.integers(len(inner["config"]))]
        part = str(random.choice(["vision", "llm"]))
        size = sorted(inner["config"]["model"][part])[0]
        said.append(f"{place} {value!r} {name[:20]!r} {key}")
        return [
            value,
            "[" * 100_000,
            "{",
            {k: v for k, v in inner.items() if k != place},
            {**inner, place: value},
            {**inner, "tokenizer": {name: data}},
            {**inner, "tokenizer": {**inner["tokenizer"], name: data}},
            {**inner, "config": {**inner["config"], key: value}},
            {**inner, "config": {k: v for k, v in inner["config"].items() if k != key}},
            {**inner, "config": {**inner["config"], "model": {part: {size: value}}}},
        ][random.integers(10)]

    text_of(random, step, "about", change)
    return said[0]


def forged_data(random, step, outside):
    said = []

    def change(inner):
        value = VALUES[random.integers(len(VALUES))]
        said.append(repr(value))
        key = sorted(inner)[random.integers(len(inner))]
        forged = [
            value,
            "{",
            {**inner, key: value},
            {k: v for k, v in inner.items() if k != key},
            {**inner, "more": value},
        ]
        return forged[random.integers(5)]

    text_of(random, step, "data", change)
    return said[0]


def names(random, step, outside):
    """Other things that look like steps, all newer than the real ones."""
    which, name = random.integers(7), str(random.integers(4, 10**6))
    other = step.with_name(name)
    if which == 0:
        other = step.with_name(str(random.choice(STRANGE)))
        shutil.copytree(step, other, symlinks=True, dirs_exist_ok=True)
    elif which == 1:
        other.write_text("a file")
    elif which == 2:
        other.symlink_to(random.choice([step.name, str(outside), "nowhere", name]))
    elif which == 3:
        other.mkdir()
    elif which == 4:
        other.mkdir()
        (other / "files.0.json").write_text(text(step / "files.0.json"))
    elif which == 5:
        (other / "params").mkdir(parents=True)
    else:
        shutil.copytree(step, other, symlinks=True)
    return f"{which} {other.name}"


DAMAGES = (content, content, kind_of_file, without_list, listed, forged_about, forged_data, names)


def load_steps(work):
    folder = work / STAGE / FOLDER
    with recorded() as said:
        newest = max(steps_in(folder), default=0)
        passed = load_model_like(work, newest, said)
        resume.newest_about(folder)
        try:
            restored = checkpoint.Checkpoints(folder, {"json": json.dumps({"config": {}, "tokenizer": {}})}).restore(
                jax.eval_shape(lambda: state_at(0)), accept
            )
        except UserError as error:
            assert_a_sentence(error)
            return "refused"
        assert restored is not None
        step, state, data = restored
        assert data == position(step) and step in (1, 2, 3)
        if "cannot be checked" not in said():
            for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True):
                np.testing.assert_array_equal(got, wanted)
        assert step == newest or f"going back to step {step}" in said(), said()
    return "accepted" if step == newest and passed == newest else "refused"


def load_model_like(work, newest, said):
    """What the commands do with a checkpoint, up to its parameters. The step that they use, 0 for none."""
    try:
        found = find_checkpoint(work)
        loaded = about.load_about(found)
        about.config_of(loaded, found)
        target = work / "tokenizer"
        about.save_tokenizer(loaded, target)
    except UserError as error:
        assert_a_sentence(error)
        return 0
    assert {path.name for path in target.iterdir()} <= set(about.TOKENIZER_FILES)
    step = step_of(found)
    assert step == newest or "trying the previous one" in said(), said()
    return step


# ---- Logs and the lock.


def damage_log(random, whole, work, outside):
    lines = [json.dumps({"step": step, "ce": 1.0 / step}).encode() for step in range(1, 9)]
    for _ in range(random.integers(1, 5)):
        place = int(random.integers(len(lines)))
        line = lines[place]
        value = VALUES[random.integers(len(VALUES))]
        cut = int(random.integers(len(line) + 1))
        lines[place] = [
            line[:cut],
            line[:cut] + bytes(random.integers(0, 256, 8, np.uint8)) + line[cut:],
            b"\0" * 4096,
            json.dumps(value).encode(),
            json.dumps({"step": value, "ce": 1.0}).encode(),
            json.dumps({"step": 3, "ce": value, "v2t": value}).encode(),
            b"[" * 100_000,
            b'{"step": ' + b"9" * 5000 + b"}",
            line + line,
        ][random.integers(9)]
    (work / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n" * int(random.integers(2)))
    if random.random() < 0.1:
        return f"kind {other_kind(random, work / 'metrics.jsonl', outside)}"
    return f"{len(lines)} lines"


def load_log(work):
    path = work / "metrics.jsonl"
    with recorded() as said:
        before = path.read_bytes() if path.is_file() and path.resolve().parent == work else b""
        try:
            truncate_rows(path, 6)
        except UserError as error:
            assert_a_sentence(error)
            return "refused"
        except OSError:
            return "refused"  # which training turns into one sentence
        if not path.is_file():
            return "refused"
        rows = read_rows(path)
        assert all(type(row["step"]) is int and row["step"] <= 6 for row in rows)
        for line in path.read_bytes().splitlines():
            assert line in before or not before
        truncate_rows(path, 6)  # nothing is left to cut off
        plot_losses({"stage": path}, work / "losses.png")
        return "refused" if "cut off" in said() else "accepted"


def damage_lock(random, whole, work, outside):
    path, value = work / lock.FILE, VALUES[random.integers(len(VALUES))]
    entry = {"pid": 1, "host": os.uname().nodename, "since": "then"}
    key = str(random.choice(list(entry)))
    path.write_bytes(
        [
            json.dumps(value).encode(),
            json.dumps({**entry, key: [value, {}][random.integers(2)]}).encode(),
            json.dumps({k: v for k, v in entry.items() if k != key}).encode(),
            bytes(random.integers(0, 256, 50, np.uint8)),
            b"\0" * 100,
            b"[" * 100_000,
        ][random.integers(6)]
    )
    if random.random() < 0.4:
        return f"kind {other_kind(random, path, outside)}"
    return path.name


def take_lock(work):
    stale, lock.STALE = lock.STALE, 0.01
    try:
        with lock.hold(work):
            assert json.loads((work / lock.FILE).read_text())["pid"] == os.getpid()
        assert not (work / lock.FILE).read_bytes()
        return "accepted"
    except UserError as error:
        assert_a_sentence(error)
        return "refused"
    finally:
        lock.STALE = stale


KINDS = (
    ("steps", damage_steps, load_steps),
    ("steps", damage_steps, load_steps),
    ("steps", damage_steps, load_steps),
    ("log", damage_log, load_log),
    ("lock", damage_lock, take_lock),
)


def assert_a_sentence(error):
    assert str(error) and "\n" not in str(error) and len(str(error)) < 1500, str(error)


@contextlib.contextmanager
def recorded():
    """A function that gives what the product's log has said meanwhile."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("fusion_jax")
    log.addHandler(handler)
    try:
        yield lambda: "\n".join(said)
    finally:
        log.removeHandler(handler)
