"""Lengths stored beside shards: what they say, when they are used, and what happens where they are wrong."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.fixtures import tiny
from PIL import Image

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import lengths, shard_writing
from fusion_jax.data.examples import ExampleMaker
from fusion_jax.data.length_writing import write_lengths
from fusion_jax.data.sources import load_source
from fusion_jax.data.stages import stage_loader
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import BadRecord
from fusion_jax.models.config import replace
from fusion_jax.synth.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
TILES = {"tile_grids": ((1, 1), (1, 2), (2, 1), (2, 2)), "tile_tokens": 4}
WORDS = ["red", "blue", "green", "cube", "ball", "cone", "left", "right", "up", "down", "many", "few"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 records with 0 to 2 images, 1 to 4 rounds; record 5 is none that the encoding accepts."""
    folder = tmp_path_factory.mktemp("lengths")
    rng, records = np.random.default_rng(0), []
    for i, size in enumerate(((30, 20), (90, 20))):
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    for i in range(24):
        images = [f"{k}.png" for k in range(i % 3)]
        turns = []
        for _ in range(1 + i % 4):
            words = " ".join(rng.choice(WORDS, rng.integers(2, 9)))
            turns += [{"from": "human", "value": f"How many {words}?"}, {"from": "gpt", "value": "There is one."}]
        turns[0]["value"] = "<image>\n" * len(images) + turns[0]["value"]
        if i == 5:
            turns = turns[:1]
        records.append({"id": f"r{i}", "image": images, "conversations": turns})
    (folder / "all.json").write_text(json.dumps(records))
    train_tokenizer([f"How many {a} {b}? There is one." for a in WORDS for b in WORDS], folder / "tokenizer", 320)
    shard_writing.convert(folder / "all.json", folder, folder / "shards", shard_count=3, progress=False)
    return folder


def config_of(folder, preset="paper", tiles=False, **limits):
    model = tiny(preset, **TILES) if tiles else tiny(preset)
    sizes = {"max_length": 400, "max_question_length": 100, "max_rounds": 8, "max_images": 2, **limits}
    stage = StageConfig("one", str(folder / "shards"), batch_size=4, steps=3, **sizes)
    return RunConfig(model, (stage,), str(folder / "tokenizer"))


def loader_of(folder, config):
    return stage_loader(config, config.stages[0], load_source(folder / "shards"), load_tokenizer(config.tokenizer))


def measured(loader):
    return [loader.measure(number) for number in range(len(loader.source))]


def same(one, other):
    if isinstance(one, BadRecord):
        return isinstance(other, BadRecord) and str(one) == str(other)
    return one == other


@pytest.fixture(autouse=True)
def nothing_cached():
    lengths._open.cache_clear()


@pytest.mark.parametrize(("preset", "tiles"), [("paper", False), ("released", False), ("paper", True)])
@pytest.mark.parametrize("limits", [{}, {"max_length": 90}, {"max_rounds": 2}, {"max_question_length": 9}])
def test_stored_lengths_are_what_is_measured(folder, preset, tiles, limits):
    config = config_of(folder, preset, tiles, **limits)
    path = folder / "shards" / "not there"
    for path in (folder / "shards").glob("lengths-*"):
        path.unlink()
    live = measured(loader_of(folder, config))
    lengths._open.cache_clear()
    path = write_lengths(folder / "shards", config, progress=False)
    loader = loader_of(folder, config)
    stored = [loader._stored(number) for number in range(len(loader.source))]
    assert all(map(same, measured(loader), live))
    assert sum(one is not None for one in stored) > (2 if limits else 16)
    for one, (number, expected) in zip(stored, enumerate(live)):
        assert one is None or (one, 0) == expected, number
        assert one is None or not isinstance(loader.load_planned(one), BadRecord), number
    path.unlink()


def test_no_record_is_tokenized_that_has_lengths(folder, monkeypatch, caplog):
    config = config_of(folder)
    path = write_lengths(folder / "shards", config, workers=2, progress=False)
    loader = loader_of(folder, config)
    usable = [n for n in range(len(loader.source)) if not isinstance(loader.measure(n), BadRecord)]
    assert len(usable) >= len(loader.source) - 1
    monkeypatch.setattr(ExampleMaker, "text", None)
    assert [loader.measure(number)[0].number for number in usable] == usable
    monkeypatch.undo()

    # Another template, tokenizer or model has other lengths, and the log says once how they are stored.
    caplog.set_level(logging.INFO, "fusion_jax")
    others = [dataclasses.replace(config, template="llama3"), dataclasses.replace(config, model=tiny("released"))]
    for other in others:
        with_other = loader_of(folder, other)
        assert with_other._stored(0) is None and with_other._stored(1) is None
    assert len([r for r in caplog.records if "has no lengths" in r.getMessage()]) == 2
    other = dataclasses.replace(config, model=replace(config.model, **{"llm.layers": 3}))
    assert loader_of(folder, other)._stored(0) is not None  # what lengths do not depend on
    path.unlink()


def test_wrong_lengths_are_noticed(folder, caplog):
    config = config_of(folder)
    path = write_lengths(folder / "shards", config, progress=False)
    entries = np.load(path)
    entries["length"] += 1
    np.save(path, entries)
    loader = loader_of(folder, config)
    loaded = loader.load_planned(loader.measure(0)[0])
    assert isinstance(loaded, BadRecord) and loaded.reason == "changed"
    lengths._open.cache_clear()
    np.save(path, entries[:-1])  # too few
    assert loader_of(folder, config)._stored(0) is None
    assert "cannot be read" in caplog.text
    lengths._open.cache_clear()
    path.write_bytes(b"nothing")
    assert loader_of(folder, config)._stored(0) is None
    path.unlink()


def test_the_command_stores_lengths_of_shards_that_exist(folder):
    config = f"tests/helpers/tiny_run.py:{folder}"
    command = [sys.executable, "-m", "fusion_jax.shards", "--out", folder / "shards", "--config", config]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = list((folder / "shards").glob("lengths-*"))
    assert len(paths) == 1 and np.load(paths[0]).shape == (len(load_source(folder / "shards")),)
    paths[0].unlink()
