"""The command's files: complete, readable, the same for any number of workers, never half written."""

import json
import pathlib
import subprocess
import sys

import pytest
import sentencepiece
import yaml
from PIL import Image

from fusion_jax.errors import UserError
from fusion_jax.synth import questions, scenes
from fusion_jax.synth.make_scenes import ScenesConfig, make_scenes
from fusion_jax.synth.tokenizer import ADDED_TOKENS

SMALL = ScenesConfig(stage1=110, stage1_5=90, stage2=100, validation=20, held_out=50, pixels=48)
FILES = ("stage1", "stage1_5", "stage2", "validation", "held_out")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "data", SMALL, workers=1, progress=False)


def records(folder: pathlib.Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_number_of_workers_changes_nothing(made, tmp_path):
    again = make_scenes(tmp_path / "data", SMALL, workers=2, progress=False)
    assert contents(again) == contents(made)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]  # nothing temporary is left


def test_the_seed_changes_everything(made, tmp_path):
    tiny = ScenesConfig(seed=1, stage1=5, stage1_5=5, stage2=5, validation=5, held_out=5, pixels=48)
    other = make_scenes(tmp_path / "data", tiny, workers=1, progress=False)
    assert records(other, "stage1")[:5] != records(made, "stage1")[:5]


@pytest.mark.parametrize("name", FILES)
def test_records_are_llava_records(made, name):
    listed = records(made, name)
    assert len(listed) == getattr(SMALL, name)
    assert len({record["id"] for record in listed}) == len(listed)
    for record in listed:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert len(record["kinds"]) * 2 == len(turns)
        assert sum(turn["value"].count("<image>") for turn in turns) == ("image" in record)
        assert turns[0]["value"].startswith("<image>\n") == ("image" in record)
        assert ("image" in record) != (record["kinds"] == ["text"])
        if "image" in record:
            with Image.open(made / record["image"]) as image:
                image.load()
                assert image.size == (48, 48) and image.mode == "RGB"


def test_a_few_records_have_no_image_and_a_few_images_are_jpeg(made):
    assert sum("image" not in record for record in records(made, "stage2")) == 3
    endings = [p.suffix for p in (made / "images").rglob("*.*")]
    assert len(endings) == 110 + 20 + 50
    assert 0.05 < endings.count(".jpg") / len(endings) < 0.3


def test_tests_ask_one_question_each_and_every_kind(made):
    for name in ("validation", "held_out"):
        assert all(len(record["kinds"]) == 1 for record in records(made, name))
    assert {record["kinds"][0] for record in records(made, "held_out")} == set(questions.KINDS)


def test_held_out_pairs_are_nowhere_in_the_training_text(made):
    for name in FILES[:4]:
        text = (made / f"{name}.json").read_text(encoding="utf-8")
        assert not any(" ".join(pair) in text for pair in scenes.UNSEEN)


def test_mixtures_name_their_files(made):
    for stage in FILES[:3]:
        datasets = yaml.safe_load((made / f"{stage}.yaml").read_text())["datasets"]
        assert datasets[0] == {"json_path": f"{stage}.json", "image_folder": ".", "sampling_strategy": "all"}
        assert all((made / dataset["json_path"]).exists() for dataset in datasets)


def test_the_manifest_counts(made):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["records"] == {name: getattr(SMALL, name) for name in FILES}
    assert manifest["images"] == {"train": 110, "validation": 20, "held_out": 50}
    assert manifest["source"] == "fusion_jax scene generator" and "free" in manifest["licence"]
    assert sum(manifest["rounds_by_kind"]["held_out"].values()) == 50


def test_the_tokenizer_writes_words_as_one_piece_and_knows_every_character(made):
    folder = made / "tokenizer"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    for word in (*scenes.COLOURS, *scenes.SHAPES, *scenes.WORDS, *questions.NUMBERS, "yes", "no", "small", "large"):
        assert len(pieces.encode(word)) == 1, word
    assert len(pieces.encode("What colour is the star?")) <= 7
    assert len(pieces.encode("You are a helpful AI assistant.")) <= 10
    for text in ("A. red\nB. top left\n", "Zürich, 東京 42 🙂", "two  spaces"):
        ids = pieces.encode(text)
        assert pieces.unk_id() not in ids and pieces.decode(ids) == text
    added = json.loads((folder / "added_tokens.json").read_text())
    assert sorted(added.values()) == list(range(pieces.vocab_size(), pieces.vocab_size() + len(ADDED_TOKENS)))
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {token: int(i) for i, token in ((i, d["content"]) for i, d in decoder.items()) if token in added} == added


def test_a_complete_folder_is_kept(made, capsys):
    before = (made / "manifest.json").stat().st_mtime_ns
    make_scenes(made, SMALL, workers=1, progress=False)
    assert "kept as it is" in capsys.readouterr().out
    assert (made / "manifest.json").stat().st_mtime_ns == before


def test_foreign_folders_are_left_alone(made, tmp_path):
    with pytest.raises(UserError, match="other arguments"):
        make_scenes(made, ScenesConfig(seed=5), workers=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a scene data set"):
        make_scenes(tmp_path, SMALL, workers=1)
    with pytest.raises(UserError, match="is a file"):
        make_scenes(tmp_path / "notes.txt", SMALL, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("wrong", [{"stage2": 0}, {"pixels": 8}, {"held_out": -1}])
def test_impossible_sizes_are_named(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--{name}"):
        make_scenes(tmp_path / "data", ScenesConfig(**wrong), workers=1)
    assert not (tmp_path / "data").exists()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("fusion_jax.synth.make_scenes.train_tokenizer", lambda *_: 1 / 0)
    tiny = ScenesConfig(stage1=2, stage1_5=2, stage2=2, validation=2, held_out=2, pixels=24)
    with pytest.raises(ZeroDivisionError):
        make_scenes(tmp_path / "data", tiny, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_complains_in_one_sentence(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    command = [sys.executable, "-m", "fusion_jax.synth.make_scenes", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
