"""Data files that attack the reader: JSON, JSONL, mixtures, shards, tokenizer folders. Each ends in a UserError, or in
records of which every one is read, encoded, or a BadRecord; with messages that a terminal can show, and in seconds."""

import functools
import itertools
import json
import os
import shutil
import time
from pathlib import Path

from helpers.fixtures import tiny
from PIL import Image

from fusion_jax.data import shard_writing, shards
from fusion_jax.data.examples import ExampleMaker
from fusion_jax.data.shard_checking import check_shards
from fusion_jax.data.sources import load_source
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.files import read_file
from fusion_jax.synth.tokenizer import train_tokenizer

QUICK = 300
SECONDS = 20.0  # for one attempt; most take milliseconds
TURNS = [{"from": "human", "value": "<image>\nHow many cats?"}, {"from": "gpt", "value": "Two cats."}]
GOOD = {"id": "7", "image": "a.png", "conversations": TURNS}
TEXTS = [
    "",
    "<image>",
    "cat \ud83d",
    "\0",
    "\x1b[2J",
    "<|end|>",
    "x" * 3000,
    "a.png",
    "../a.png",
    "/etc/passwd",
    "pipe",
    ".",
]
TEXTS += [
    "a\0.png",
    "zero",
    "é" * 300,
    "human",
    "gpt",
    "\u202e",
    "<vision_start>",
    "https://127.0.0.1/a.png",
    "~",
    "\n\r\t",
    "😀",
]
KEYS = [
    "id",
    "image",
    "images",
    "conversations",
    "from",
    "value",
    "width",
    "height",
    "bytes",
    "number",
    "name",
    "x",
    "",
]
KEYS += ["messages", "role", "content", "type", "text", "path", "image_url", "system", "video", "tools"]
YAML_KEYS = [
    "json_path",
    "shards",
    "tfds",
    "sampling_strategy",
    "weight",
    "image_folder",
    "allow_outside",
    "features",
    "x",
]
STRATEGIES = [
    "all",
    "first:1",
    "end:50%",
    "random:0.0000001%",
    "random:1e999%",
    "first:0",
    "random:101%",
    "end:" + "9" * 5000,
]
STRATEGIES += ["random:١%", "first:-1", "random:%", "all ", "random:1", "random:0.%", "first:00001", "end:100.0%"]
SNIPPETS = [
    "&a",
    "*a",
    "<<: *a",
    "!!python/object:os.system",
    "!!timestamp x",
    "!!int ''",
    "? [1]",
    "|",
    "2020-01-01",
    "{",
    "[",
]
SNIPPETS += [
    "]",
    "}",
    "\t",
    "%YAML 9",
    "---",
    "...",
    "!!binary x",
    "'",
    '"',
    '"\\0"',
    ".inf",
    ".nan",
    "0x",
    "1:2:3",
    "~",
    "\ufeff",
]


def one(random, values):
    return values[random.integers(len(values))]


def any_value(random, depth: int = 0):
    """A JSON value, now and then one that no parser likes; such parts are marked and put in by `as_json`."""
    kind = random.integers(12 if depth < 4 else 7)
    if kind < 2:
        return one(random, TEXTS)
    if kind == 2:
        return one(random, [None, True, False, float("nan"), float("inf"), -0.0, 1e308])
    if kind == 3:
        return int(random.integers(-5, 100))
    if kind == 4:
        return 10 ** int(random.integers(1, 4000))
    if kind == 5:
        return f"@digits{random.integers(4000, 6000)}@"
    if kind == 6:
        return f"@deep{one(random, [50, 99, 101, 500, 990, 1000, 2000, 20000])}@"
    if kind < 9:
        return [any_value(random, depth + 1) for _ in range(random.integers(4))]
    return {one(random, KEYS): any_value(random, depth + 1) for _ in range(random.integers(4))}


def as_json(random, value) -> str:
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    while (at := text.find('"@')) >= 0:
        end = text.index('@"', at + 2)
        word, number = text[at + 2 : end].rstrip("0123456789"), text[at + 2 : end]
        count = int(number[len(word) :])
        text = text[:at] + ("9" * count if word == "digits" else "[" * count + "]" * count) + text[end + 2 :]
    return text


def vary(random, value):
    """A copy of a JSON value with something replaced, added or left out, at any depth."""
    if random.random() < 0.15:
        return any_value(random)
    if isinstance(value, list) and value:
        changed, k = list(value), random.integers(len(value))
        action = random.integers(4)
        if action == 0:
            del changed[k]
        elif action == 1:
            changed.insert(k, changed[k])
        else:
            changed[k] = vary(random, changed[k])
        return changed
    if isinstance(value, dict) and value:
        changed, key = dict(value), one(random, list(value))
        action = random.integers(5)
        if action == 0:
            del changed[key]
        elif action == 1:
            changed[one(random, KEYS)] = any_value(random)
        else:
            changed[key] = vary(random, changed[key])
        return changed
    return any_value(random)


def damage(random, data: bytes) -> bytes:
    """Bytes flipped, cut out, doubled, put in, or cut off."""
    data = bytearray(data)
    for _ in range(random.integers(1, 6)):
        at, end = sorted(int(random.integers(len(data) + 1)) for _ in range(2))
        action = random.integers(5)
        if action == 0 and at < len(data):
            data[at] ^= int(random.integers(1, 256))
        elif action == 1:
            del data[at : min(end, at + 50)]
        elif action == 2:
            data[at:at] = data[at : min(end, at + 50)]
        elif action == 3:
            data[at:at] = one(
                random, [b'"', b"\\", b"[", b"}", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b",", b"\xed\xa0\x80"]
            )
        elif random.random() < 0.3:
            del data[at:]
    return bytes(data)


# ---- One attempt of each kind: writes files into `here` and gives the path to load.


def json_file(random, here: Path) -> Path:
    records = [vary(random, GOOD) if random.random() < 0.7 else GOOD for _ in range(random.integers(1, 5))]
    texts = [as_json(random, record) for record in records]
    lines = random.random() < 0.5
    text = "\n".join(texts) if lines else "[" + ", ".join(texts) + "]"
    data = text.encode("utf-8", "surrogatepass")
    if random.random() < 0.3:
        data = damage(random, data)
    if random.random() < 0.1:
        data = data.decode("utf-8", "replace").encode(one(random, ["utf-16", "utf-16-be", "utf-8-sig", "utf-32"]))
    path = here / ("a.jsonl" if lines else "a.json")
    path.write_bytes(data)
    return path


def mixture(random, here: Path) -> Path:
    (here / "a.json").write_text(json.dumps([GOOD] * 3))
    entries = []
    for _ in range(random.integers(1, 4)):
        entry = {"json_path": "a.json"}
        for _ in range(random.integers(3)):
            key = one(random, YAML_KEYS)
            values = [*TEXTS, 0, -1, 2.5, 1e300, True, None, [], {"image": "x"}, 10**300]
            entry[key] = one(random, STRATEGIES) if key == "sampling_strategy" else one(random, values)
        entries.append(entry)
    text = json.dumps({"datasets": entries})  # which is YAML, too
    for _ in range(random.integers(3)):
        at = int(random.integers(len(text) + 1))
        text = text[:at] + one(random, SNIPPETS) + text[at:]
    if random.random() < 0.2:
        deep = int(random.integers(10, 3000))
        text = "datasets: " + one(random, ["[" * deep + "]" * deep, "{a: " * deep + "}" * deep, "[" * deep])
    if random.random() < 0.2:
        names = "abcdefghijk"
        lists = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(names)]
        merged = [f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in itertools.pairwise(names)]
        laughs = ["a: &a [x]\n", *lists] if random.random() < 0.5 else ["a: &a {x: y}\n", *merged]
        entry = one(random, ["*k", "{json_path: a.json, weight: *k}", "{json_path: a.json, features: *k}"])
        text = "".join(laughs) + f"datasets: [{entry}]\n"
    data = text.encode("utf-8", "surrogatepass")
    path = here / "m.yaml"
    path.write_bytes(damage(random, data) if random.random() < 0.2 else data)
    return path


def changed_manifest(random, here: Path, made: Path) -> Path:
    shutil.copytree(made, here / "s")
    path = here / "s" / shards.MANIFEST
    manifest = json.loads(path.read_text())
    for _ in range(random.integers(1, 3)):
        manifest = vary(random, manifest)
    data = as_json(random, manifest).encode("utf-8", "surrogatepass")
    path.write_bytes(damage(random, data) if random.random() < 0.3 else data)
    return here / "s"


def own_shards(random, here: Path) -> Path:
    """Shards with a true manifest around records that lie, or damaged bytes of the right size."""
    folder = here / "s"
    folder.mkdir()
    picture = (here.parent / "a.png").read_bytes()
    about = {"name": "a.png", "format": "PNG", "width": 8, "height": 8, "bytes": len(picture)}
    header = {"id": "7", "number": 3, "conversations": TURNS, "images": [about]}
    described = []
    names = {"shard": "shard-00000-of-00001.array_record", "text": "text-00000-of-00001.array_record"}
    writers = {kind: shards.open_writer(folder / name) for kind, name in names.items()}
    for _ in range(3):
        text = as_json(random, vary(random, header) if random.random() < 0.8 else header)
        text = text.encode("utf-8", "surrogatepass")
        length = len(text) if random.random() < 0.8 else int(random.integers(0, 2**32))
        whole = length.to_bytes(4, "little") + text + picture
        writers["text"].write(text)
        writers["shard"].write(damage(random, whole) if random.random() < 0.2 else whole)
    shard = {"records": 3, "images": 3, "image_bytes": 3 * len(picture)}
    for kind, name in names.items():
        writers[kind].close()
        data = (folder / name).read_bytes()
        if random.random() < 0.3:
            at = int(random.integers(len(data)))
            (folder / name).write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        size = len(data)
        shard[kind] = {"name": name, "bytes": size, "sha256": f"{random.integers(2**60):064x}"}
    described.append(shard)
    manifest = {"format": shards.FORMAT, "version": shards.VERSION, "records": 3, "shards": described}
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    return folder


def odd_file(random, here: Path) -> Path:
    name = here / one(random, ["a.json", "a.jsonl", "m.yaml", "s"])
    kind = random.integers(5)
    if kind == 0:
        os.mkfifo(name)
    elif kind == 1:
        name.symlink_to(one(random, ["/dev/zero", "/dev/tty", "/dev/full", name, "nowhere", "/proc/self/mem", "/"]))
    elif kind == 2:
        name.mkdir()
        inside = name / one(random, [shards.MANIFEST, "x"])
        os.mkfifo(inside)
    elif kind == 3:
        return Path(
            one(random, [f"{name}\0", "x" * 300 + ".json", f"{name}/x.json", "\ud83d.json", "", "nonsense", "tfds:x:y"])
        )
    return name


def tokenizer_folder(random, here: Path, good: Path) -> Path:
    folder = shutil.copytree(good, here / "t")
    path = one(random, sorted(folder.iterdir()))
    if path.suffix == ".json" and random.random() < 0.7:
        value = json.loads(path.read_text())
        for _ in range(random.integers(1, 4)):
            value = vary(random, value)
        path.write_bytes(as_json(random, value).encode("utf-8", "surrogatepass"))
    elif random.random() < 0.8:
        path.write_bytes(damage(random, path.read_bytes()))
    else:
        path.unlink()
        if random.random() < 0.7:
            os.mkfifo(path)
    return folder


def attempts(random, folder):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    train_tokenizer(
        ["How many cats? Two cats are there, and one dog.", "The quick fox; 0123456789!"], folder / "tokenizer", 310
    )
    maker = ExampleMaker(tiny(), load_tokenizer(folder / "tokenizer"), "phi3")
    (folder / "made.json").write_text(json.dumps([GOOD] * 3))
    shard_writing.convert(folder / "made.json", folder, folder / "made", shard_count=2, progress=False)
    kinds = {
        "JSON": (json_file, 8),
        "mixture": (mixture, 4),
        "manifest": (functools.partial(changed_manifest, made=folder / "made"), 2),
        "shards": (own_shards, 3),
        "odd file": (odd_file, 1),
        "tokenizer": (functools.partial(tokenizer_folder, good=folder / "tokenizer"), 1),
    }
    names = [name for name, (_, times) in kinds.items() for _ in range(times)]
    number = 0
    try:
        while True:
            name, number = one(random, names), number + 1
            here = folder / f"attempt{number}"
            here.mkdir()
            path = kinds[name][0](random, here)
            yield f"{name}: {describe(path)}", functools.partial(attempt, path, folder, maker)
            shutil.rmtree(here)
    finally:
        shards._reader.cache_clear()


def describe(path: Path) -> str:
    inside = os.path.join(path, shards.MANIFEST) if path.name == "s" else path
    try:
        return f"{path.name[:50]!r} {read_file(inside)[:200]!r}"
    except OSError as error:
        return f"{path.name[:50]!r}, {error.strerror}"


def attempt(path: Path, images: Path, maker: ExampleMaker) -> str:
    begun = time.monotonic()
    try:
        return _load(path, images, maker)
    finally:
        took = time.monotonic() - begun
        if took > SECONDS:
            raise AssertionError(f"it took {took:.0f} s")


def _load(path: Path, images: Path, maker: ExampleMaker) -> str:
    try:
        if path.name == "t":
            _use(load_tokenizer(path))
            return "accepted"
        source = load_source(path, images if _names_images(path) else None)
    except UserError as error:
        check_message(error)
        return "refused"
    if path.suffix in (".json", ".jsonl"):
        _convert(path, images)
    if len(source) > 10_000:
        source.text(len(source) - 1)
        return "accepted"
    good = 0
    for i in range(len(source)):
        for read, encode in ((source.__getitem__, maker), (source.text, maker.text)):
            try:
                encode(read(i))
                good += 1
            except BadRecord as error:
                check_message(error)
            except UserError as error:  # a shard that cannot be opened is looked at when its first record is
                check_message(error)
                return "refused"
    return "accepted" if good else "refused"


def _convert(path: Path, images: Path) -> None:
    """The same records as shards, whole, or nothing."""
    out = path.parent / "out"
    try:
        shard_writing.convert(path, images, out, max_bad_records=1, progress=False)
    except UserError as error:
        check_message(error)
        assert not out.exists(), sorted(out.iterdir())
    else:
        assert check_shards(out, progress=False) == []
        assert not (out / "partial").exists()


def _names_images(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl", ".yaml")


def _use(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("How many cats <|end|> are there?")
    tokenizer.decode(ids)


def check_message(error: Exception) -> None:
    """Short enough for a line of a log, which escapes what is not printable."""
    assert len(str(error)) < 8000, f"{len(str(error))} characters: {str(error)[:200]}"
