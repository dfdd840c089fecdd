"""The quickstart's data: complete, readable, the same for any number of processes, nothing of the test in training."""

import hashlib
import json
import pathlib

import numpy as np
import pytest
import sentencepiece
import yaml
from helpers.shapes_data import make_shapes
from PIL import Image

from configs import quickstart
from configs.quickstart_data import get_config
from fusion_jax.config import RunConfig, from_dict
from fusion_jax.errors import UserError
from fusion_jax.synth.tokenizer import ADDED_TOKENS
from fusion_jax.synth.worlds.shapes import facts, grid
from fusion_jax.training import checks

COUNTS = {"stage1": 110, "stage1_5": 90, "stage2": 100, "validation": 20, "held_out": 100}


def make(out: pathlib.Path, **changes) -> pathlib.Path:
    return make_shapes(out, ",".join(map(str, COUNTS.values())), **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    return make(tmp_path_factory.mktemp("shapes") / "data")


def records(folder: pathlib.Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_it_is_what_it_was(made):
    """The recipe is tuned to this data. Whoever changes it measures the quickstart again (docs/performance.md)."""
    said, pixels = hashlib.sha256(), hashlib.sha256()
    for name in COUNTS:
        for record in records(made, name):
            said.update(json.dumps([record["conversations"], record.get("topics")]).encode())
            pixels.update(np.asarray(Image.open(made / record["image"])).tobytes())
    assert said.hexdigest() == "14b5de7053076ab2b83cccb38df2aff5ea27b08244a94a2b653587cb123fbd88"
    assert pixels.hexdigest() == "8d9a6810de57097728eb807650f610b35f2e27c531c960db819ee0b934e4302a"


def test_the_number_of_processes_changes_nothing(made, tmp_path):
    again = make(tmp_path / "data", processes=2, block=64)
    for name in (*(f"{name}.json" for name in COUNTS), "stage2.yaml", "tokenizer/tokenizer.model"):
        assert (again / name).read_bytes() == (made / name).read_bytes(), name


def test_its_training_would_start(made, tmp_path):
    config = from_dict(RunConfig, quickstart.get_config(str(made)).to_dict())
    problems = []
    inputs = checks.open_inputs(config, tmp_path, (), problems)
    assert not problems and list(inputs.sizes) == ["stage1", "stage1_5", "stage2"]
    assert all(len(inputs.validation[name].records) == COUNTS["validation"] for name in ("stage1_5", "stage2"))


@pytest.mark.parametrize("name", COUNTS)
def test_records_are_llava_records(made, name):
    listed = records(made, name)
    assert len(listed) == COUNTS[name]
    assert len({record["id"] for record in listed}) == len({record["image"] for record in listed}) == len(listed)
    for record in listed:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert name == "stage1" or len(record["topics"]) * 2 == len(turns)
        with Image.open(made / record["image"]) as image:
            image.load()
            assert image.size == (48, 48) and image.mode == "RGB"


def test_tests_ask_one_question_each_and_every_topic(made):
    for name in ("validation", "held_out"):
        assert all(len(record["topics"]) == 1 for record in records(made, name))
    assert {record["topics"][0] for record in records(made, "held_out")} == set(facts.KINDS)


def test_held_out_pairs_are_nowhere_in_the_training_text(made):
    for name in list(COUNTS)[:4]:
        text = (made / f"{name}.json").read_text(encoding="utf-8")
        assert not any(" ".join(pair) in text for pair in grid.UNSEEN)


def test_mixtures_name_their_files(made):
    for stage in ("stage1", "stage1_5", "stage2"):
        first, *others = yaml.safe_load((made / f"{stage}.yaml").read_text())["datasets"]
        assert first == {"json_path": f"{stage}.json", "image_folder": ".", "sampling_strategy": "all"}
        assert len(others) == {"stage1": 0, "stage1_5": 2, "stage2": 1}[stage]
        assert all((made / dataset["json_path"]).exists() for dataset in others)


def test_the_tokenizer_writes_words_as_one_piece_and_knows_every_character(made):
    folder = made / "tokenizer"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    for word in (*grid.COLOURS, *grid.SHAPES, "yes", "no", "small", "large"):
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


@pytest.mark.parametrize("counts", ["1,2,3", "a,b,c,d,e", "1,1,1,1,0"])
def test_impossible_counts_are_named(tmp_path, counts):
    with pytest.raises(UserError, match=r"counts|COUNT"):
        make_shapes(tmp_path / "data", counts)


def test_config_mistakes_are_named(tmp_path):
    def pools(**changes):
        return [get_config("1,1,1,1,1").to_dict()["pools"][0] | changes]

    for changes, words in (
        ({"pools": pools(split="stage1")}, "plain name such as held_out, and not a stage"),
        ({"pools": pools(kinds={})}, "config.kinds is empty"),
        ({"pools": pools(kinds={"conv": 1.0})}, r"pools\[0\].kinds: kind 'conv' is unknown"),
        ({"pools": pools(path="embedded:cubes:3")}, "STYLE one of scenes, shapes/train"),
        ({"mixtures": {"stage2": {"stage3": "all"}}}, "stage 'stage3' is unknown"),
        ({"tokenizer": 20}, "300 pieces or more"),
    ):
        with pytest.raises(UserError, match=words):
            make_shapes(tmp_path / "data", "1,1,1,1,1", **changes)
