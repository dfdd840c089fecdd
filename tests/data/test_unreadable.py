"""Files that attack the reader: pipes, depth, numbers, names, encodings. One sentence or a bad record, never a hang."""

import json
import logging
import os
import pickle
import struct

import pytest
from helpers.fixtures import tiny

from fusion_jax import files
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import json_records, shards
from fusion_jax.data.image import load_image, read_size
from fusion_jax.data.loader import Fed
from fusion_jax.data.planner import Counts
from fusion_jax.data.shard_writing import convert
from fusion_jax.data.sources import load_records, load_source
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.evals import files as benchmark_files
from fusion_jax.evals import predictions
from fusion_jax.training.input_check import InputCheck

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
STAGE = StageConfig("s", "a.json", batch_size=4)
GOOD = json.dumps({"id": "good", "conversations": TURNS})
DEEP = '{"id": "deep", "conversations": ' + "[" * 2000 + '"]["' + "]" * 2000 + "}"
BAD = {
    "far too deep": DEEP,
    "nearly at the parser's depth": '{"id": ' + "[" * 900 + "]" * 900 + "}",
    "too deep by one": "[" * 101 + "]" * 101,
    "an integer of 5,000 digits": '{"id": %s, "conversations": []}' % ("9" * 5000),
    "a negative one": '{"id": "x", "more": [-%s]}' % ("8" * 4400),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("chunk", [50, 1 << 22])
def test_one_record_that_cannot_be_parsed_is_a_bad_record(tmp_path, monkeypatch, bad, chunk):
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    (tmp_path / "a.json").write_text(f"[{GOOD}, {bad},\n {GOOD}]")
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{bad}\n{GOOD}\n")
    for name in ("a.json", "a.jsonl"):
        source = load_source(tmp_path / name)
        assert [source[0].id, source[2].id, len(source)] == ["good", "good", 3]
        with pytest.raises(BadRecord, match=f"{name}, record 1") as e:
            source[1]
        assert e.value.reason == "unreadable_json"
        assert len(str(e.value)) < 300


def test_depth_is_counted_outside_of_texts_and_allowed_up_to_a_hundred():
    for value in ("[" * 100 + "]" * 100, json.dumps(['["\\' * 500] * 50), "[" + "[],{}," * 500 + "0]"):
        assert files.parse_json(value) == json.loads(value)
    for value in (b'"', b'["', b'["[' + b"[" * 200, b"\xff", b'{"a":1', b"[" * 10**6):
        with pytest.raises(ValueError):
            files.parse_json(value)


def test_a_list_that_never_closes_is_invalid(tmp_path):
    (tmp_path / "a.json").write_text(f"[{GOOD}, {'[' * 5000}")
    with pytest.raises(UserError, match=r"a\.json is not valid JSON at line 1.*does not end"):
        load_source(tmp_path / "a.json")


def test_a_record_that_is_too_long_is_never_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "_MAX_RECORD", 500)
    monkeypatch.setattr(json_records, "_CHUNK", 100)
    long = json.dumps({"id": "long", "conversations": [{"from": "human", "value": "x" * 5000}]})
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{long}\n{GOOD}\n{long}")
    source = load_source(tmp_path / "a.jsonl")
    assert [source[0].id, source[2].id, len(source)] == ["good", "good", 4]
    for i in (1, 3):
        with pytest.raises(BadRecord, match=f"{len(long)} bytes, over 500") as e:
            source[i]
        assert e.value.reason == "too_large"
    (tmp_path / "a.json").write_text(f"[{GOOD}, {long[:-1]}")
    with pytest.raises(UserError, match="not valid JSON"):
        load_source(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.yaml"])
def test_pipes_and_devices_are_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}.*it is a pipe"):
        load_source(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name}.*a device"):
        load_source(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}.*[Dd]irectory"):
        load_source(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_pipes_in_tokenizer_folders(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}.*not a regular file"):
        load_tokenizer(tmp_path)


def test_pipes_among_benchmark_files(tmp_path):
    for name, read in (
        ("a.json", benchmark_files.read_json),
        ("a.tsv", lambda path: benchmark_files.read_table(path, ["x"])),
        ("a.parquet", lambda path: benchmark_files.read_parquet([path], ["x"])),
        ("parts/0.jsonl", lambda path: predictions.check_folder(tmp_path, {"checkpoint": "x"})),
    ):
        path = tmp_path / "task" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
        with pytest.raises(UserError, match=f"{path}.*it is a pipe"):
            read(path)


def test_a_pipe_as_manifest(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json.*it is a pipe"):
        load_source(tmp_path)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{b}'] * 10)}]\n" for b, c in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {x0: 1, x1: 1}\n" + "".join(
    f"{c}: &{c} {{<<: [{', '.join([f'*{b}'] * 10)}]}}\n" for b, c in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 2000 + "]" * 2000, "nested too deeply"),
        ("datasets: [{json_path: a.json, weight: 1.0e+300}]", "at most 1,000,000"),
        ("datasets: [{json_path: a.json, weight: .nan}]", "weight must be a number"),
        ("datasets: [{json_path: a.json, weight: %s}]" % ("9" * 5000), "not valid YAML"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'random:1e999%'}]", "unknown sampling strategy"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'first:%s'}]" % ("9" * 5000), "unknown sampling strategy"),
        ('datasets: [{json_path: "a\\0.json"}]', "no file can have this name"),
        ('datasets: [{json_path: a.json, image_folder: "x\\0"}]', "no image folder"),
        ("datasets: [{json_path: a.json, image_folder: [x]}]", "image_folder must be a text"),
        ("datasets: [{json_path: a.json, ? [1, 2] : x}]", "not valid YAML"),
        ("datasets: [{json_path: a.json, null: x}]", "None is not a key"),
        ("datasets: [{json_path: a.json, 2020-01-01: x}]", "2020-01-01 is not a key"),
        ("datasets: [{json_path: !!python/object:os.system x}]", "not valid YAML"),
        ("datasets: !!timestamp x", "not valid YAML"),
        ('datasets: !!int ""', "not valid YAML"),
        ("datasets: !!bool x", "not valid YAML"),
        ("datasets: *gone", "not valid YAML"),
        ("datasets: &d [*d]", "entry 0 must be a mapping"),
        (LAUGHS + "datasets: [{json_path: a.json, weight: *i}]", "weight must be a number"),
        (LAUGHS + "datasets: *i", "entry 0 must be a mapping"),
        (MERGES + "datasets: [*i]", "more than 1000 keys"),
        (b"\xff\xfe" + "datasets: []".encode("utf-16-le"), "not valid YAML"),
        ("#" * (1 << 21), "more than 1048576 bytes"),
        ("5", "must have a list `datasets`"),
        (r'datasets: [{json_path: "a\n\ud83d.json"}]', r"Cannot read the data file .*a\\n\\ud83d\.json: no file"),
        (r'datasets: [{json_path: a.json, image_folder: "a\n\eb"}]', r"no image folder .*a\\n\\x1bb"),
        ("datasets: [{json_path: null}]", "entry 0: json_path must be a text, not null"),
        ("datasets: [{json_path: ''}]", "entry 0: json_path must be a text, not an empty text"),
        ("datasets: [{shards: 5}]", "entry 0: shards must be a text, not 5"),
        ("datasets: [{tfds: [a]}]", "entry 0: tfds must be a text"),
        (
            "datasets: [{json_path: a.json, weight: null}]",
            "weight must be a number above 0 and at most 1,000,000, not null",
        ),
        ("datasets: [{json_path: a.json, sampling_strategy: null}]", "unknown sampling strategy null"),
        ("datasets: [{json_path: a.json, allow_outside: null}]", "allow_outside must be true or false, not null"),
        ("datasets: [null]", "entry 0 must be a mapping .*, not null"),
        ("datasets: [{json_path: a.json, shards: x}]", "entry 0 must be a mapping .*it has json_path, shards"),
        ("datasets: [{weight: 2}]", "entry 0 must be a mapping .*it has 'weight'"),
        ("datasets: null", "must have a list `datasets` .*datasets is null"),
        ("datasets: [{json_path: a.json, wieght: 2}]", r"datasets\[0\].wieght is not a key; did you mean weight"),
        ("image_folder: x\ndatasets: [{json_path: a.json}]", "image_folder is beside `datasets`"),
        ("dataset: x\ndatasets: [{json_path: a.json}]", r"the mixture\.dataset is not a key; did you mean datasets\?"),
        ("", "must have a list `datasets`"),
    ],
    ids=range(41),
)
def test_mixtures_that_attack(tmp_path, text, message):
    (tmp_path / "a.json").write_text(f"[{GOOD}]")
    (tmp_path / "m.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as e:
        load_source(tmp_path / "m.yaml")
    assert len(str(e.value)) < 1000
    assert "\n" not in str(e.value)


def test_the_smallest_share_is_one_record(tmp_path):
    (tmp_path / "a.json").write_text(f"[{GOOD}, {GOOD}]")
    (tmp_path / "m.yaml").write_text(
        "datasets: [{json_path: a.json, sampling_strategy: 'random:0.0000001%', weight: 3}]"
    )
    assert len(load_source(tmp_path / "m.yaml")) == 3
    assert len(load_records(tmp_path / "a.json", strategy="end:0.0000001%")) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_named_or_refused(tmp_path, encoding):
    for name, text in (("a.json", f'[{{"id": "é"}}, {GOOD}]'), ("a.jsonl", f'{{"id": "é"}}\n{GOOD}\n')):
        (tmp_path / name).write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=f"{name}.*(UTF-16|not valid|must hold)"):
            load_source(tmp_path / name)


def test_odd_ids_and_image_names_can_be_logged(tmp_path, caplog):
    records = [
        {"id": f"cut {chr(0xD83D)}", "image": "a.png"},
        {"id": "\x1b[2J" + "x" * 10_000, "conversations": TURNS, "image": f"../{chr(0xD83D)}\0.png"},
        {"id": "nul", "conversations": TURNS, "image": "../a\n.png"},
        {"id": 0.0, "conversations": 5},
        {"id": [["x"] * 1000], "conversations": 5},
        {"id": float("nan"), "conversations": 5},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    source = load_source(tmp_path / "a.json")
    for i in (0, 2, 3, 4, 5):
        with pytest.raises(BadRecord) as e:
            source[i]
        assert len(str(e.value)) < 1000
        assert str(e.value).isprintable()
        logging.getLogger("fusion_jax").warning("%s", e.value)
        str(e.value).encode()
    assert source[1].where.isprintable()


LONG = "A" * 300_000
NAMES = {
    "half an emoji": "cut \ud83d.png",
    "lines and colours": "a\n\x1b[2J\u202e.png",
    "a zero byte": "a\0.png",
    "a long name": "b" * 400 + ".png",
    "a long path": "b/" * 2000 + "c.png",
    "base64": f"iVBORw0KGgo{LONG}",
    "base64 of nothing": LONG,
    "an address": f"https://x.y/\ud83d{LONG}",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_strange_image_name_is_one_short_line_wherever_it_is_told(tmp_path, caplog, name):
    records = [{"id": f"cut \ud83d{LONG}", "image": name, "conversations": TURNS}, json.loads(GOOD)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    source, found = load_source(tmp_path / "a.json"), []
    for look in (load_image, read_size):
        with pytest.raises(BadRecord) as e:
            record = source[0]
            look(record.images[0], record.where)
        found.append(f"{e.value.where}: {e.value.detail}")
        assert str(pickle.loads(pickle.dumps(e.value))).isprintable()
    manifest = convert(tmp_path / "a.json", None, tmp_path / "shards", max_bad_records=0.9, progress=False)
    found.append(manifest["skipped"]["listed"][0]["detail"])
    check = InputCheck(RunConfig(tiny(), (STAGE,), "", max_bad_records=1.0), STAGE, 2, tmp_path)
    check.note(1, Fed(None, 4, (e.value,), 0, 0), Counts(seen=2))
    found += [caplog.messages[-1], *(tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert len(found) == 5
    for line in found:
        assert line.isprintable() and len(line) < 1000
        line.encode()


def test_a_bad_record_is_one_short_line_whatever_it_says():
    bad = BadRecord("bad_image", f"cut \ud83d{LONG}", "two\nlines")
    assert str(bad).startswith(r"cut \ud83dAAA") and str(bad).endswith(r"... (300 KB): two\nlines")
    assert (bad.where, bad.detail) == (str(bad).removesuffix(r": two\nlines"), r"two\nlines")


def test_how_long_a_text_was_is_said():
    assert files.shown("x" * 300_000) == "x" * 200 + "... (300 KB)"
    assert files.shown("x" * 300) == "x" * 200 + "... (300 characters)"
    assert files.shown("\ud83d" * 200) == ("\\ud83d" * 200)[:200] + "... (200 characters)"
    assert files.shown("a\nb" * 3) == "a\\nb" * 3


@pytest.mark.parametrize(
    "image",
    [
        {"width": -1},
        {"width": 0},
        {"width": 10**30},
        {"height": "5"},
        {"height": True},
        {"bytes": -3},
        {"bytes": 1 << 40},
        {"name": None},
    ],
)
def test_headers_of_shards_are_checked(image):
    header = {"conversations": TURNS, "images": [{"name": "a", "width": 1, "height": 1, "bytes": 3} | image]}
    _, whole = shards.pack(header, [b"abc"])
    with pytest.raises(ValueError):
        shards.unpack(whole)


def test_lengths_that_lie_take_no_memory():
    _, whole = shards.pack({"images": [{"name": "a", "width": 1, "height": 1, "bytes": 1 << 29}] * 1000}, [b"abc"])
    for data in (b"", b"123", struct.pack("<I", 2**32 - 1) + b"{}", whole, whole[:-9]):
        with pytest.raises(ValueError):
            shards.unpack(data)
    for text in (DEEP, "[]", "{}", '{"images": {}}', '{"images": [], "number": %s}' % ("9" * 30), '{"images": [5]}'):
        with pytest.raises(ValueError):
            shards.parse_header(text.encode())


def test_a_byte_order_mark_in_the_middle_of_lines_put_together(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\ufeff{GOOD}\n\ufeff{GOOD}\n", encoding="utf-8")
    assert [record.id for record in load_source(tmp_path / "a.jsonl")] == ["good", "good"]
