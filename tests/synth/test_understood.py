"""Other people's captions through the embedded backend: what is kept, dropped, counted, and whose the records are."""

import json
import logging

import pytest

from fusion_jax.errors import UserError
from fusion_jax.synth import blocks, engine
from fusion_jax.synth.backends import embedded
from fusion_jax.synth.backends.config import ImageConfig
from fusion_jax.synth.config import FilterConfig, PoolConfig, SelectConfig, SynthConfig
from fusion_jax.synth.run import synthesize

CAPTIONS = [
    "A man with an umbrella at a bus stop",
    "A black cat sleeping on a red chair",
    "A red car in front of a white house",
    "The theory of relativity",
    "",
    "A woman reading a book to two children in a library",
    "Three green apples and a blue mug on a wooden table",
]
OFF = dict.fromkeys(("alphanumeric_min", "special_min", "special_max", "character_repetition_max"), None)


def config(path, **more) -> SynthConfig:
    given = {
        "pools": (PoolConfig(path=str(path), source="my site", licence="all rights reserved"),),
        "kinds": {"conv_short": 1.0, "caption_color": 1.0},
        "filters": FilterConfig(**OFF),
        "images": ImageConfig(width=96, height=96),
        "select": SelectConfig(image_distance=-1),
        "shards": False,
    }
    return SynthConfig(**given | more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("understood")
    (folder / "c.jsonl").write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in CAPTIONS))
    manifest = synthesize(config(folder / "c.jsonl"), folder / "out", progress=False)
    return folder / "out", manifest


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_captions_of_which_too_little_is_kept_are_dropped_and_counted(run):
    out, manifest = run
    dropped = {one["caption"]: one for one in lines(out / "dropped.jsonl")}
    assert set(dropped) == {CAPTIONS[0], CAPTIONS[3], CAPTIONS[4], CAPTIONS[5]}
    assert dropped[CAPTIONS[0]]["reason"] == "too_little_understood"
    assert "25%" in dropped[CAPTIONS[0]]["detail"] and "man, bus, stop" in dropped[CAPTIONS[0]]["detail"]
    assert (dropped[CAPTIONS[0]]["understood"], dropped[CAPTIONS[0]]["kept_share"]) == (["umbrella"], 0.25)
    assert dropped[CAPTIONS[3]]["reason"] == "not_drawable"
    counted = manifest["understood"]
    assert (counted["captions"], counted["nothing_known"], counted["too_little"]) == (5, 1, 2)
    assert counted["with_inventions"] == sum(bool(one["invented"]) for one in lines(out / "lineage.jsonl"))
    assert counted["missed"]["man"] == 1


def test_a_record_says_what_was_kept_and_is_not_the_captions_owner_s(run):
    out, _ = run
    made = lines(out / "lineage.jsonl")
    assert {one["caption"] for one in made} == {CAPTIONS[1], CAPTIONS[2], CAPTIONS[6]}
    for one in made:
        words = len(one["understood"]) + len(one["missed"])
        assert one["kept_share"] == round(len(one["understood"]) / words, 4) >= 0.6
        assert one["origin"]["source"] == "my site" and one["origin"]["licence"] == "all rights reserved"
        nouns = {group["noun"] for group in one["state"]["scenes"][0]["groups"]}
        for noun in nouns - {"cat", "chair", "car", "house", "apple", "mug"}:
            assert any(noun in phrase or f"{noun}s" in phrase for phrase in one["invented"]), (noun, one["invented"])
        assert "reading" not in one["state"]
    records = [record for path in out.glob("stage*.json") for record in json.loads(path.read_text())]
    assert len(records) == 3
    for record in records:
        assert record["source"] == "embedded scenes, after a caption from: my site"
        assert record["licence"] == embedded.LICENCE


def test_the_report_and_the_log_say_it(run, tmp_path, caplog):
    out, _ = run
    report = (out / "report.html").read_text()
    assert "What the embedded backend understood" in report and "man 1" in report
    assert "67% of the caption kept" in report and "missed: sleeping, on" in report
    # Without a scorer there is no CLIPScore, and none is spoken of.
    assert "0.5 SSIM_a (no scorer" in report and "CLIPScore + 0.5" not in report
    (tmp_path / "c.txt").write_text("A cat on a bus\n" + CAPTIONS[0] + "\n")
    with caplog.at_level(logging.INFO, "fusion_jax"):
        synthesize(config(tmp_path / "c.txt"), tmp_path / "out", progress=False)
    assert "draws 43 things in 12 settings" in caplog.text and "c.txt" in caplog.text
    assert "read 2 captions and kept 46% of their words" in caplog.text
    assert "1 captions dropped" in caplog.text and "bus (1)" in caplog.text


def test_another_threshold_keeps_more_and_a_run_without_records_says_why(tmp_path):
    (tmp_path / "c.txt").write_text(CAPTIONS[0] + "\n")
    with pytest.raises(UserError, match="describe: too_little_understood 1"):
        synthesize(config(tmp_path / "c.txt"), tmp_path / "none", progress=False)
    loose = config(tmp_path / "c.txt", filters=FilterConfig(**OFF, understood_min=0.2))
    assert sum(synthesize(loose, tmp_path / "out", progress=False)["records"].values()) == 1
    with pytest.raises(UserError, match="understood_min"):
        FilterConfig(understood_min=60)


def test_progress_counts_captions_and_ends_at_their_number(tmp_path, monkeypatch):
    """It counted whole blocks: 256 for 7 captions."""
    shown = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.done = total, 0
            shown.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            self.done += count

    monkeypatch.setattr(engine.tqdm, "tqdm", Bar)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in CAPTIONS))
    for block in (256, 3):
        synthesize(config(tmp_path / "c.jsonl", block=block), tmp_path / f"out{block}")
        assert (shown[-1].total, shown[-1].done) == (7, 7)
    assert blocks.size(tmp_path / "out3", 2) == 1


def test_a_run_of_an_earlier_embedded_backend_does_not_go_on(tmp_path):
    (tmp_path / "c.txt").write_text(CAPTIONS[2] + "\n")
    synthesize(config(tmp_path / "c.txt"), tmp_path / "out", progress=False)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["embedded"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="embedded was None and is 2"):
        synthesize(config(tmp_path / "c.txt"), tmp_path / "out", progress=False)
