"""Record files and mixtures: what comes out, what is chosen, and what is said about broken ones."""

import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusion_jax.data import json_records
from fusion_jax.data.sources import load_mixture, load_records, load_source
from fusion_jax.data.tfds import TfdsRecords
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
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    source = load_source(write(tmp_path / "a.json", make(12), **style))
    assert len(source) == 12
    assert ids(source) == [f"r{k}" for k in range(12)]
    assert source[3].turns == source[-9].turns == TURNS
    assert source[3].image_path == tmp_path / "s/3.jpg"
    assert source[3].where == f"{tmp_path / 'a.json'}, record 3 (id r3)"
    with pytest.raises(IndexError):
        source[12]


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    """A mapped file would end the process here."""
    path = write(tmp_path / "a.json", make(1000))
    source = load_source(path)
    assert source[999].id == "r999"
    path.write_text("[]")
    with pytest.raises(UserError, match=r"a.json, record 999 is no longer valid JSON: the file changed"):
        source[999]


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
    folder = tmp_path / "images"
    folder.mkdir()
    records[0]["image"] = ["x.jpg", "y.jpg"]
    source = load_source(write(tmp_path / "a.json", records), folder, allow_outside=True)
    expected = [folder / "x.jpg", None, None, folder / "x.jpg", Path("/abs/x.jpg"), folder / "s/5.jpg"]
    assert [r.image_path for r in source] == expected
    assert source[0].images == (folder / "x.jpg", folder / "y.jpg")
    assert [source[k].images for k in (1, 5)] == [(), (folder / "s/5.jpg",)]
    assert source.text(0) == source[0]
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
        (
            "a.yaml",
            "datasets: [{json_path: x.json, stratgy: all}]",
            r"datasets\[0\]\.stratgy is not a key; did you mean sampling_strategy\?",
        ),
        ("a.yaml", "datasets: [{jsonpath: x.json}]", r"one of json_path, shards, tfds; .*; did you mean json_path\?"),
        ("a.yaml", "datasets: [{json_path: x.json}]", "x.json"),
        ("a.yaml", "datasets: [{json_path: x.json, sampling_strategy: 'some:3'}]", "'some:3'.*first:N, end:N"),
        ("a.yaml", "datasets: [{json_path: x.json, image_folder: pics}]", "pics"),
        ("a.csv", "x", r"\.jsonl, \.yaml"),
        ("a.yaml", "datasets: [{json_path: x.json, json_path: y.json}]", "'json_path' occurs twice"),
        ("a.yaml", "datasets: [{json_path: x.json, shards: y}]", "one of json_path, shards, tfds"),
        (
            "a.yaml",
            "datasets: [{json_path: x.json, weight: 0}]",
            "weight must be a number above 0 and at most 1,000,000, not 0",
        ),
        ("a.yaml", "datasets: [{json_path: x.json, weight: true}]", "weight"),
        ("a.yaml", "datasets: [{json_path: x.json, weight: .inf}]", "weight"),
        ("a.yaml", "datasets: [{json_path: x.json, allow_outside: 1}]", "allow_outside must be true or false"),
        (
            "a.yaml",
            "datasets: [{shards: x, image_folder: y}]",
            r"datasets\[0\]\.image_folder is not a key; known keys: shards, sampling_strategy",
        ),
        ("a.yaml", "datasets: [{shards: x}]", "x is not a folder of shards"),
        ("a.yaml", "datasets: [{tfds: mnist}]", "tfds:name"),
        ("a.yaml", "datasets: [{tfds: 'mnist:train', features: image}]", "features must be a mapping"),
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
        ({"conversations": TURNS, "image": ["a", ""]}, "bad_image", "'image'"),
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
    monkeypatch.setattr(json_records, "_CHUNK", 1)
    assert len(load_source(write(tmp_path / "a.json", [12, 345]))) == 2


def test_doubled_keys_of_a_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "image": "a.jpg", "image": "b.jpg", "conversations": []}\n')
    source = load_source(tmp_path / "a.jsonl")
    with pytest.raises(BadRecord, match="'image' occurs twice") as e:
        source[0]
    assert e.value.reason == "duplicate_key"


def test_images_outside_their_folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "images2").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "linked").symlink_to(tmp_path / "images2")
    (folder / "inside.jpg").symlink_to(folder / "sub" / "a.jpg")
    (tmp_path / "other").symlink_to(folder)
    outside = ["../secret.jpg", "sub/../../secret.jpg", "../images2/a.jpg", f"{tmp_path}/secret.jpg", "/etc/passwd"]
    outside += ["link.jpg", "linked/a.jpg", ".."]
    inside = ["sub/a.jpg", "sub/../a.jpg", f"{folder}/sub/a.jpg", "inside.jpg", "a\0b.jpg", "missing/..jpg"]
    records = [{"image": name, "conversations": TURNS} for name in [*outside, *inside]]
    path = write(tmp_path / "a.json", records)
    for start in (folder, tmp_path / "other"):  # the folder itself may well be a link
        source = load_source(path, start)
        for i, name in enumerate(outside):
            with pytest.raises(BadRecord, match="allow_outside") as e:
                source[i]
            assert e.value.reason == "image_outside_folder", name
        assert [source[len(outside) + i].image_path for i in range(len(inside))] == [start / name for name in inside]
    (tmp_path / "m.yaml").write_text("datasets: [{json_path: a.json, image_folder: images, allow_outside: true}]")
    for source in (load_source(path, folder, allow_outside=True), load_source(tmp_path / "m.yaml")):
        assert [r.image_path for r in source] == [folder / name for name in [*outside, *inside]]


@pytest.mark.parametrize(("weight", "expected"), [(1, 40), (0.5, 20), (2, 80), (2.25, 90), (0.001, 1)])
def test_weights(tmp_path, weight, expected):
    write(tmp_path / "a.json", make(50))
    entry = {"json_path": "a.json", "sampling_strategy": "end:40", "weight": weight}
    (tmp_path / "m.yaml").write_text(json.dumps({"datasets": [entry, {"json_path": "a.json"}]}))
    source = load_source(tmp_path / "m.yaml", seed=3)
    drawn = ids(source)
    assert source.parts == [("a.json", expected), ("a.json", 50)]
    assert drawn[expected:] == [f"r{k}" for k in range(50)]
    assert [source.part(i) for i in (0, expected - 1, expected)] == [0, 0, 1]
    counts = {f"r{k}": drawn[:expected].count(f"r{k}") for k in range(50)}
    assert all(counts[f"r{k}"] == 0 for k in range(10))
    assert {counts[f"r{k}"] for k in range(10, 50)} <= {int(weight), int(weight) + 1}
    assert drawn == ids(load_source(tmp_path / "m.yaml", seed=3)) == ids(pickle.loads(pickle.dumps(source)))
    if expected % 40 > 1:
        assert drawn != ids(load_source(tmp_path / "m.yaml", seed=4))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the TensorFlow dataset `tiny_scenes`: five records in ArrayRecord format."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    features = {
        "id": np.int64,
        "image": tfds.features.Image(),
        "images": tfds.features.Sequence(tfds.features.Image()),
        "caption": text,
        "captions": tfds.features.Sequence({"text": text, "score": np.float32}),
        "talk": tfds.features.Sequence({"from": text, "value": text}),
        "talk_json": text,
    }

    class TinyScenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for k in range(5):
                path = folder / f"{k}.png"
                Image.new("RGB", (6 + k, 4), (k, 0, 0)).save(path)
                talk = [{"from": "human", "value": f"图{k}?"}, {"from": "gpt", "value": f"{k} 🐱"}]
                yield (
                    k,
                    {
                        "id": 100 + k,
                        "image": path,
                        "images": [path] * (k % 3),
                        "caption": f"scene {k}",
                        "captions": [{"text": f"first {k}", "score": 1.0}, {"text": "second", "score": 0.5}],
                        "talk": talk,
                        "talk_json": json.dumps(talk),
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    TinyScenes(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def tfds_source(folder, **entry):
    (folder / "m.yaml").write_text(json.dumps({"datasets": [{"tfds": "tiny_scenes:train", "data_dir": "."} | entry]}))
    return load_source(folder / "m.yaml")


def test_tfds_without_tensorflow(prepared, monkeypatch):
    source = tfds_source(prepared)  # id, image and caption are found by their names
    assert "tensorflow" not in sys.modules
    records = sorted(source, key=lambda record: record.id)  # TFDS shuffles when it writes
    assert [record.id for record in records] == ["100", "101", "102", "103", "104"]
    for k, record in enumerate(records):
        assert record.images == ((prepared / f"{k}.png").read_bytes(),)
        assert Image.open(io.BytesIO(record.images[0])).size == (6 + k, 4)
        assert record.turns == [
            {"from": "human", "value": "<image>\nDescribe the image briefly."},
            {"from": "gpt", "value": f"scene {k}"},
        ]
        assert record.image_path is not None
    assert source[0].where.startswith("tfds:tiny_scenes:train, record 0 (id 10")
    assert ids(pickle.loads(pickle.dumps(source))) == ids(source)
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    with pytest.raises(IndexError):
        source[5]


def test_tfds_features(prepared):
    source = tfds_source(prepared, features={"image": "images", "text": "captions/text", "id": "id"}, prompt="What?")
    assert sorted(len(record.images) for record in source) == [0, 0, 1, 1, 2]
    for record in source:
        k = int(record.id) - 100
        question = "<image>\n" * len(record.images) + "What?"
        assert [turn["value"] for turn in record.turns] == [question, f"first {k}"]
        assert record.images == ((prepared / f"{k}.png").read_bytes(),) * len(record.images)
    for feature in ("talk", "talk_json"):
        source = tfds_source(prepared, features={"conversations": feature, "id": "id"})
        for record in source:
            k = int(record.id) - 100
            assert record.turns == [{"from": "human", "value": f"图{k}?"}, {"from": "gpt", "value": f"{k} 🐱"}]
            assert record.images == ()


def test_tfds_features_by_their_names():
    def chosen(*known):
        records = TfdsRecords.__new__(TfdsRecords)
        records.spec, records.prompt = "tfds:x:train", None
        return records._choose(None, dict.fromkeys(known))

    assert chosen("images", "messages", "system", "split") == {
        "image": "images",
        "conversations": "messages",
        "system": "system",
    }
    assert chosen("image", "image_id", "images", "caption") == {"image": "image", "text": "caption"}
    for known, name in (
        (("video", "caption"), "video"),
        (("image", "caption", "audio"), "audio"),
        (("text", "frames"), "frames"),
    ):
        with pytest.raises(UserError, match=f"tfds:x:train has the feature '{name}', which is not read"):
            chosen(*known)


def test_tfds_pictures_in_a_feature_are_named():
    import tensorflow_datasets as tfds

    records = TfdsRecords.__new__(TfdsRecords)
    records.spec, records.prompt = "tfds:x:train", None
    text, picture = tfds.features.Text(), tfds.features.Image()
    for known in ({"inputs": {"a": picture}}, {"steps": tfds.features.Sequence({"a": picture, "b": text})}):
        (name,) = known
        with pytest.raises(UserError, match=f"tfds:x:train has the feature '{name}', which is not read"):
            records._choose(None, tfds.features.FeaturesDict({"text": text} | known))
    known = tfds.features.FeaturesDict({"text": text, "image": picture, "tags": tfds.features.Sequence(text)})
    assert records._choose(None, known) == {"text": "text", "image": "image"}


def test_tfds_system_text(prepared):
    source = tfds_source(prepared, features={"conversations": "talk", "system": "caption", "id": "id"})
    assert {record.system for record in source} == {f"scene {k}" for k in range(5)}


def test_tfds_splits_strategies_and_weights(prepared):
    half = {"tfds": "tiny_scenes:1.0.0:train[:40%]", "weight": 2.5}
    source = tfds_source(prepared, **half)
    assert len(source) == 5
    everything = ids(tfds_source(prepared))
    assert ids(source)[:4] == everything[:2] * 2
    assert ids(tfds_source(prepared, sampling_strategy="end:1")) == everything[-1:]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"tfds": "tiny_scenes:test"}, "Unknown split 'test'"),
        ({"tfds": "tiny_scenes"}, "expected tfds:name"),
        ({"tfds": "tiny_scene:train"}, "Cannot open tfds:tiny_scene:train in .*tfds build tiny_scene "),
        ({"features": {"image": "picture", "text": "caption"}}, "no feature 'picture' for image; it has caption"),
        ({"features": {"image": "image"}}, "conversations, or the one with the text"),
        (
            {"features": {"picture": "image"}},
            r"features\.picture is not a key; known keys: id, image, conversations, text, system",
        ),
        ({"features": {"conversations": "talk"}, "prompt": "?"}, "`prompt` belongs to a `text`"),
        ({"data_dir": 5}, "must be texts"),
    ],
)
def test_unusable_tfds(prepared, entry, message):
    with pytest.raises(UserError, match=message) as e:
        tfds_source(prepared, **entry)
    assert f"{prepared}/m.yaml, datasets entry 0" in str(e.value)


def test_missing_and_damaged_files_of_tfds(prepared, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    file = next(folder.rglob("*.array_record-*"))
    data = file.read_bytes()
    at = 500  # in the first record; they are compressed
    file.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    bad = []
    for i in range(5):
        try:
            tfds_source(folder)[i]
        except BadRecord as e:
            bad.append(e)
    assert [e.reason for e in bad] == ["corrupt_record"]
    file.unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        tfds_source(folder)
