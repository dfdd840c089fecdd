"""Record files and mixtures: what comes out, what is chosen, and what is said about broken ones."""

import json
import pickle
from pathlib import Path

import pytest

from fusion_jax.data import sources
from fusion_jax.data.sources import load_mixture, load_records, load_source
from fusion_jax.errors import BadRecord, UserError

TURNS = [{"from": "human", "value": '<image>\n"图"? \\ [{\n'}, {"from": "gpt", "value": "naïve 🐱"}]


def make(n, prefix="r"):
    return [{"id": f"{prefix}{k}", "image": f"s/{k}.jpg", "conversations": TURNS} for k in range(n)]


def write(path, records, **kwargs):
    path.write_text(json.dumps(records, **kwargs), encoding="utf-8")
    return path


def ids(source):
    return [record.id for record in source]


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_json_list(tmp_path, monkeypatch, chunk, style):
    """Whatever the layout and wherever the reading window ends."""
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    source = load_source(write(tmp_path / "a.json", make(12), **style))
    assert len(source) == 12
    assert ids(source) == [f"r{k}" for k in range(12)]
    assert source[3].turns == source[-9].turns == TURNS
    assert source[3].image_path == tmp_path / "s/3.jpg"
    assert source[3].where == f"{tmp_path / 'a.json'}, record 3 (id r3)"
    with pytest.raises(IndexError):
        source[12]


def test_jsonl_with_blank_lines_bom_and_no_last_newline(tmp_path):
    lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in make(3))
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines + "\r\n \n", encoding="utf-8")
    assert ids(load_source(tmp_path / "a.jsonl")) == ["r0", "r1", "r2"]
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    assert load_source(tmp_path / "a.jsonl")[2].turns == TURNS


def test_json_with_bom(tmp_path):
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(make(2)), encoding="utf-8")
    assert ids(load_source(tmp_path / "a.json")) == ["r0", "r1"]


def test_images(tmp_path):
    records = make(6)
    del records[0]["image"]
    records[1]["image"] = None
    records[2]["image"] = ""
    records[3]["image"] = ["x.jpg"]
    records[4]["image"] = "/abs/x.jpg"
    del records[5]["id"]
    (tmp_path / "images").mkdir()
    source = load_source(write(tmp_path / "a.json", records), tmp_path / "images")
    folder = tmp_path / "images"
    expected = [None, None, None, folder / "x.jpg", Path("/abs/x.jpg"), folder / "s/5.jpg"]
    assert [r.image_path for r in source] == expected
    assert source[5].id == "5"
    assert source[5].where.endswith("record 5")


@pytest.mark.parametrize(
    ("strategy", "chosen"),
    [
        ("all", range(30)),
        ("first:4", range(4)),
        ("end:4", range(26, 30)),
        ("first:10%", range(3)),
        ("end:11%", range(26, 30)),
        ("first:99", range(30)),
        ("end:2.5%", range(29, 30)),
    ],
)
def test_strategies(tmp_path, strategy, chosen):
    path = write(tmp_path / "a.json", make(30))
    source = load_records(path, strategy=strategy)
    assert ids(source) == [f"r{k}" for k in chosen]
    assert f"record {chosen[-1]} " in source[len(source) - 1].where


def test_random_depends_on_seed_and_name_only(tmp_path):
    path = write(tmp_path / "a.json", make(100))
    (tmp_path / "d").mkdir()
    same = write(tmp_path / "d" / "a.json", make(100))
    other = write(tmp_path / "b.json", make(100))
    picked = ids(load_records(path, strategy="random:20%", seed=1))
    assert len(set(picked)) == 20
    assert picked == sorted(picked, key=lambda name: int(name[1:]))
    assert picked != [f"r{k}" for k in range(20)]
    assert picked == ids(load_records(same, strategy="random:20", seed=1))
    assert picked != ids(load_records(path, strategy="random:20", seed=2))
    assert picked != ids(load_records(other, strategy="random:20", seed=1))


def test_mixture(tmp_path):
    (tmp_path / "d" / "images").mkdir(parents=True)
    write(tmp_path / "d" / "a.json", make(5, "a"))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in make(10, "b")))
    path = tmp_path / "mix.yaml"
    path.write_text(
        "datasets:\n"
        "  - json_path: d/a.json\n    sampling_strategy: 'first:2'\n    image_folder: d/images\n"
        f"  - json_path: {tmp_path}/b.jsonl\n    sampling_strategy: 'end:20%'\n"
        "  - json_path: d/a.json\n"
    )
    source = load_source(path)
    assert ids(source) == ["a0", "a1", "b8", "b9", "a0", "a1", "a2", "a3", "a4"]
    folders = [tmp_path / "d" / "images", tmp_path, tmp_path / "d"]
    assert [source[k].image_path.parent.parent for k in (0, 2, 4)] == folders
    (tmp_path / "e").mkdir()
    assert load_source(path, tmp_path / "e")[2].image_path == tmp_path / "e" / "s/8.jpg"
    assert load_source(path, tmp_path / "e")[0].image_path == tmp_path / "d" / "images" / "s/0.jpg"
    again = pickle.loads(pickle.dumps(source))
    assert ids(again) == ids(source)


def test_mixture_seed(tmp_path):
    write(tmp_path / "a.json", make(50))
    (tmp_path / "m.yml").write_text("datasets:\n  - {json_path: a.json, sampling_strategy: 'random:5'}\n")
    assert ids(load_source(tmp_path / "m.yml", seed=1)) == ids(load_mixture(tmp_path / "m.yml", 1))
    assert ids(load_mixture(tmp_path / "m.yml", 1)) != ids(load_mixture(tmp_path / "m.yml", 2))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "must hold a JSON list"),
        ("a.json", '{"id": 1}', "JSON list.*jsonl"),
        ("a.json", "[]", "no records"),
        ("a.json", '[{"id": 1},\n{"id" 2}]', "line 2.*delimiter"),
        ("a.json", '[{"id": 1}\n', "expected ','"),
        ("a.json", '[{"id": 1},', "not valid JSON"),
        ("a.json", '[{"id": 1}] x', "after the list"),
        ("a.json", b'["\xff"]', "UTF-8"),
        ("a.jsonl", '{"id": 1}\n\n{"id": }\n', "line 3"),
        ("a.jsonl", "", "no records"),
        ("a.yaml", "files: []", "datasets"),
        ("a.yaml", "datasets: []", "at least one"),
        ("a.yaml", "datasets: [", "not valid YAML"),
        ("a.yaml", "datasets: [x.json]", "entry 0.*json_path"),
        ("a.yaml", "datasets: [{json_path: x.json, stratgy: all}]", "'stratgy'.*sampling_strategy"),
        ("a.yaml", "datasets: [{json_path: x.json}]", "x.json"),
        ("a.yaml", "datasets: [{json_path: x.json, sampling_strategy: 'some:3'}]", "'some:3'.*first:N, end:N"),
        ("a.yaml", "datasets: [{json_path: x.json, image_folder: pics}]", "pics"),
        ("a.csv", "x", r"\.jsonl, \.yaml"),
    ],
)
def test_unusable_files(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as e:
        load_source(tmp_path / name)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.yaml"])
def test_missing_file(tmp_path, name):
    with pytest.raises(UserError, match=name):
        load_source(tmp_path / name)


@pytest.mark.parametrize("strategy", ["first", "first:", "first:0", "random:101%", "all:3", "end:-1", "random:0%", 7])
def test_unknown_strategies(tmp_path, strategy):
    path = write(tmp_path / "a.json", make(2))
    with pytest.raises(UserError, match=r"a\.json.*allowed are all, first:N"):
        load_records(path, strategy=strategy)


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        ({"id": "x"}, "missing_key", "'conversations'"),
        ({"conversations": "hi"}, "bad_turns", "'conversations' must be a list"),
        ({"conversations": ["hi"]}, "bad_turns", "entry 0"),
        ({"conversations": [TURNS[0], {"from": "gpt"}]}, "missing_key", "'value' is missing.*entry 1"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "bad_turns", "'value'"),
        ({"conversations": TURNS, "image": 3}, "bad_image", "'image'"),
        ({"conversations": TURNS, "image": ["a", "b"]}, "several_images", "'image'"),
        (5, "bad_record", "int"),
    ],
)
def test_bad_records_are_found_when_read(tmp_path, record, reason, message):
    source = load_source(write(tmp_path / "a.json", [*make(1), record]))
    assert source[0].id == "r0"
    with pytest.raises(BadRecord, match=message) as e:
        source[1]
    assert e.value.reason == reason
    assert e.value.where.startswith(f"{tmp_path / 'a.json'}, record 1")


def test_a_file_changed_after_opening_is_named(tmp_path):
    path = write(tmp_path / "a.json", make(2))
    source = load_source(path)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(UserError, match=r"a\.json.*changed"):
        source[0]


def test_numbers_are_read_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK", 1)
    assert len(load_source(write(tmp_path / "a.json", [12, 345]))) == 2
