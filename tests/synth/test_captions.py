"""Captions are read from every kind of file, and what is no caption file is said."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fusion_jax.errors import UserError
from fusion_jax.synth.captions import read_pool
from fusion_jax.synth.config import PoolConfig

SAID = ["A cat on a mat", "naïve 图 🐱", "The end"]


def pool(path, **more):
    return PoolConfig(str(path), source="test", licence="CC0", **more)


def read(path, **more):
    return [found["caption"] for found in read_pool(pool(path, **more), seed=0)]


def test_text(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(SAID).encode())
    assert read(path) == SAID
    assert read(path, limit=2) == SAID[:2]
    assert [found["record"] for found in read_pool(pool(path), 0)] == [0, 1, 2]


def test_jsonl(tmp_path):
    path = tmp_path / "c.jsonl"
    records = [{"text": SAID[0], "image": "a.jpg", "clip_score": 0.3, "blip_score": 1}, {"text": 5}, {"other": "x"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = list(read_pool(pool(path, text="text", image="image"), 0))
    assert found[0] == {
        "record": 0,
        "caption": SAID[0],
        "image": str(tmp_path / "a.jpg"),
        "clip_score": 0.3,
        "blip_score": 1.0,
    }
    assert [one["caption"] for one in found[1:]] == [None, None]


def test_parquet(tmp_path):
    path = tmp_path / "c.parquet"
    table = pyarrow.table({"caption": [*SAID, None], "clip_score": [0.1, 0.2, None, 0.4], "more": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, path)
    found = list(read_pool(pool(path), 0))
    assert [one["caption"] for one in found] == [*SAID, None]
    assert [one.get("clip_score") for one in found] == [0.1, 0.2, None, 0.4]


def test_tfds(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(2, 2, 3)),
        "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
    }

    class SaidScenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
            for k, said in enumerate(SAID):
                yield k, {"image": tmp_path / "a.png", "captions": [{"text": said}, {"text": "second"}]}

    SaidScenes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    found = read("tfds:said_scenes:train", text="captions/text", data_dir=str(tmp_path))
    assert sorted(found) == sorted(SAID)  # TFDS shuffles when it writes
    with pytest.raises(UserError, match="it has captions, image"):
        read("tfds:said_scenes:train", text="words", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b"\n \n", "holds no captions"),
        ("latin.txt", "ein\nschöner Tag".encode("latin-1"), "not valid UTF-8 in line 2"),
        ("utf16.txt", "a cat".encode("utf-16"), "is UTF-16"),
        ("zeros.txt", b"a\x00b\n", "zero bytes"),
        ("broken.jsonl", b'{"caption": "a"}\n{"caption": ', "line 2 is not valid JSON"),
        ("other.jsonl", b'{"text": "a"}\n', "no field 'caption'"),
        ("list.jsonl", b'["a"]\n', "no field 'caption'"),
        ("broken.parquet", b"PAR1 no", "Cannot read"),
        ("a.csv", b"a,b", "unknown suffix"),
        ("endless.txt", b"x" * (2 << 20), "longer than"),
    ],
)
def test_bad_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_missing_file_column_and_origin(tmp_path):
    with pytest.raises(UserError, match="There is no caption file"):
        read(tmp_path / "nowhere.txt")
    pyarrow.parquet.write_table(pyarrow.table({"said": SAID}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="its columns are said"):
        read(tmp_path / "c.parquet")
    with pytest.raises(UserError, match="licence"):
        PoolConfig("c.txt", source="test")


@pytest.mark.parametrize("score", ["NaN", "Infinity", "-1e999", "1" + "0" * 400, "true", '"0.5"', "null", "[1]"])
def test_scores_that_are_none_are_left_out(tmp_path, score):
    (tmp_path / "c.jsonl").write_text(f'{{"caption": "a cat", "clip_score": {score}}}\n')
    assert list(read_pool(pool(tmp_path / "c.jsonl"), 0)) == [{"record": 0, "caption": "a cat"}]
