"""What `fusion_jax.inspect` says about small real data, by hand counts and by what training gets; and its page."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from helpers.fixtures import tiny
from PIL import Image

from fusion_jax.batch import NO_CROP
from fusion_jax.config import RunConfig, StageConfig, to_dict
from fusion_jax.data.layout import Example, lay_out
from fusion_jax.data.loader import training_batches
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.devices import flops
from fusion_jax.errors import UserError
from fusion_jax.inspection import rows as page_rows
from fusion_jax.inspection.charts import histogram
from fusion_jax.inspection.figures import summary
from fusion_jax.inspection.inspect import Options, inspect
from fusion_jax.inspection.page import page as whole_page
from fusion_jax.inspection.page import stage_section
from fusion_jax.inspection.sample import draw_sample, open_stage
from fusion_jax.inspection.steps import planned_steps, sample_rows, step_statistics
from fusion_jax.inspection.tables import stage_tables
from fusion_jax.synth.tokenizer import train_tokenizer
from fusion_jax.training.about import describe_run

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('x')</script> & \"<b>\""
LONG = "There are many. " * 40
SHORT = "There is one."
TILES = {"tile_grids": ((1, 1), (1, 2), (2, 1), (2, 2)), "tile_tokens": 4}
CASES = {
    "packed": ("paper", {}, {"packing": True, "max_images": 2, "max_rounds": 6}),
    "unpacked": ("paper", {}, {"max_images": 2}),
    "one crop a row": ("released", {}, {}),
    "quadrants": ("released", {}, {"packing": True, "max_images": 2, "max_rounds": 6}),
    "tiles": ("paper", TILES, {"packing": True, "max_images": 2, "max_rounds": 6}),
}


def turns(*values):
    return [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]


# What each record has in the mixture below: images, rounds that stay, rounds lost; or why it is bad.
RECORDS = {
    "one": ({"image": "0.png", "conversations": turns("<image>\nHow many?", SHORT)}, (1, 1, 0)),
    "rounds": ({"image": "1.png", "conversations": turns("<image>\nHow many?", SHORT, "And?", "Two.")}, (1, 2, 0)),
    "images": ({"image": ["0.png", "2.png"], "conversations": turns("<image>\n<image>\nBoth?", SHORT)}, (2, 1, 0)),
    "evil": ({"conversations": turns(EVIL, EVIL)}, (0, 1, 0)),
    "cut": ({"image": "1.png", "conversations": turns("<image>\nHow many?", SHORT, "And?", LONG)}, (1, 1, 1)),
    "long": ({"image": "0.png", "conversations": turns("<image>\nHow many?", LONG)}, "too_long"),
    "silent": ({"image": "0.png", "conversations": turns("<image>\nHow many?")}, "no_answer"),
    "broken": ({"image": "cut.png", "conversations": turns("<image>\nHow many?", SHORT)}, "corrupt_image"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    rng = np.random.default_rng(0)
    for i, size in enumerate(((30, 30), (20, 60), (60, 40))):  # height, width
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    whole = (folder / "2.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "a.json").write_text(json.dumps([{"id": name, **record} for name, (record, _) in RECORDS.items()]))
    text = {"id": "text", "conversations": turns("Say hello, café ☕.", "Hello.")}
    (folder / "b.json").write_text(json.dumps([text, {**text, "id": "text2"}]))
    (folder / "m.yaml").write_text("datasets:\n- json_path: a.json\n- {json_path: b.json, weight: 2}\n")
    (folder / "bad.json").write_text(json.dumps([{"id": EVIL, **RECORDS["silent"][0]}]))
    (folder / "empty.json").write_text("[]")
    train_tokenizer(
        ["How many are there? There is one.", "And both? Two of them, many."] * 20, folder / "tokenizer", 300
    )
    return folder


def configured(folder, preset="paper", model=(), stage=(), **changes):
    model = tiny(preset, latent_counts=(1, 4), **{"llm.vocab_size": 640, **dict(model)})
    sizes = {"max_length": 240, "max_question_length": 80, "max_rounds": 2, "batch_size": 4, "steps": 9, **dict(stage)}
    stage = StageConfig("one", str(folder / "m.yaml"), **sizes)
    return RunConfig(
        model, (stage,), str(folder / "tokenizer"), seed=3, loader_threads=2, max_bad_records=1.0, **changes
    )


def opened_and_measured(config, samples=0, images=100):
    opened = open_stage(config, config.stages[0], load_tokenizer(config.tokenizer))
    return opened, draw_sample(opened, samples, images, progress=False)


@pytest.fixture(scope="module", params=CASES)
def case(request, folder):
    preset, model, stage = CASES[request.param]
    config = configured(folder, preset, model, stage)
    return request.param, *opened_and_measured(config)


# Figures.


def test_hand_counts(folder):
    opened, sample = opened_and_measured(configured(folder, stage=CASES["unpacked"][2]))
    got = summary(opened, sample)
    a, b = got["parts"]
    good = [expected for _, expected in RECORDS.values() if not isinstance(expected, str)]
    good.append((1, 1, 0))  # the broken image's record: by its text it is one
    assert (a["name"], a["records"], a["looked_at"], a["bad"]) == ("a.json", 8, 8, 2)
    assert (b["name"], b["records"], b["looked_at"], b["bad"], b["usable"]) == ("b.json", 4, 4, 0, 4)
    assert (a["usable"], a["share"], b["share"]) == (6, 8 / 12, 4 / 12)
    assert a["images"]["mean"] * 6 == a["crops"]["mean"] * 6 == sum(images for images, _, _ in good) == 6
    assert a["rounds"] == {"mean": 7 / 6, "median": 1, "p95": 2, "max": 2}
    assert (a["shortened"], a["dropped_rounds"], a["text_only"], a["tokens_per_image"]) == (1, 1, 1 / 6, 9.0)
    assert (b["shortened"], b["text_only"], b["tokens_per_image"], b["question"]["max"]) == (0, 1.0, None, 0)
    # Two images of 9 tokens and 4 latents, or one and two rounds of 4: positions at the largest l^2.
    assert a["visual"]["max"] == 2 * 9 + 4 and b["visual"]["max"] == 0
    assert (a["images_decoded_of"], a["bad_images"], b["images_decoded_of"]) == (5, 1, 0)
    reasons = {(entry["reason"], entry["seen_in"]): entry for entry in got["bad_records"]}
    assert {key: entry["count"] for key, entry in reasons.items()} == {
        ("too_long", "text"): 1,
        ("no_answer", "text"): 1,
        ("corrupt_image", "image"): 1,
    }
    assert "(id broken)" in reasons["corrupt_image", "image"]["examples"][0]
    # 2 of 12 by the text; of the other 10 a half has images, and a fifth of those is broken.
    assert got["bad_share"] == pytest.approx(2 / 12 + 10 / 12 * 0.5 * 0.2)
    everything = got["all"]
    assert (everything["records"], everything["looked_at"], everything["usable"]) == (12, 12, 10)
    assert everything["text"]["mean"] * 10 == pytest.approx(a["text"]["mean"] * 6 + b["text"]["mean"] * 4)
    assert a["share_of_flops"] + b["share_of_flops"] == pytest.approx(1)
    costs = [part["usable"] * part["flops_per_sample"] for part in (a, b)]
    assert a["share_of_flops"] == pytest.approx(costs[0] / sum(costs))
    assert everything["flops_per_sample"] == pytest.approx(sum(costs) / 10)
    json.dumps(got, allow_nan=False)


def test_records_are_measured_as_they_are_laid_out(case):
    """Tokens, crops and FLOPs of each record, from its text alone, are those of a batch with this record alone."""
    name, opened, sample = case
    seen = 0
    for measured in sample.records[sample.records["good"] > 0]:
        example = opened.loader.load(int(measured["number"]))
        if not isinstance(example, Example):
            continue
        costs = []
        for latents in (1, 4):
            batch = lay_out([example], dataclasses.replace(opened.loader.spec, crops=16), latents)
            shape = flops.shape_of_examples([example], opened.loader.spec, latents)
            assert shape == flops.shape_of(batch)
            costs.append(flops.step_flops(opened.config.model, shape))
        visual = (batch.visual_index >= 0).sum()
        assert measured["text"] == (batch.segment_ids > 0).sum() - visual
        assert measured["length"] - measured["text"] + 4 * measured["rounds"] == visual
        assert measured["crops"] == (batch.crop_kind != NO_CROP).sum()
        assert measured["supervised"] == batch.loss_weights.sum()
        assert measured["question"] == len(example.question_ids)
        assert measured["flops"] == pytest.approx(np.mean(costs))
        seen += 1
    assert seen >= (7 if name == "one crop a row" else 9)
    if name == "tiles":
        assert sample.records["crops"].max() > 4


def test_small_data_sets_are_looked_at_too(folder):
    opened, sample = opened_and_measured(configured(folder), samples=1, images=0)
    got = summary(opened, sample)
    assert got["looked_at"] == got["all"]["looked_at"] == 1
    assert [part["looked_at"] for part in got["parts"]] == [8, 4]
    assert len({int(number) for number in sample.records["number"]}) == 12


def trained(opened, steps):
    """What training gets for its first steps."""
    batches = training_batches(opened.config, opened.stage, opened.source, opened.tokenizer)
    feds = [fed for fed, _ in itertools.islice(batches, steps)]
    batches.close()
    return feds


def test_steps_are_those_of_training(case):
    _, opened, sample = case
    feds = trained(opened, 6)
    steps = list(itertools.islice(planned_steps(opened, sample), 6))
    for fed, step in zip(feds, steps):
        broken = sum(bad.reason == "corrupt_image" for bad in fed.bad)
        assert sum(map(len, step.rows)) == fed.samples + broken
        assert (step.latents, len(step.rows)) == (fed.batch.latent_count, len(fed.batch.tokens))
    shown = sample_rows(opened, sample, rows=6)
    assert [some.step for some in shown] == [0, 1, 2]
    for fed, some in zip(feds, shown):
        count, groups = len(some.batch.tokens), len(some.batch.crops)
        assert count >= 1 and some.batch.latent_count == fed.batch.latent_count
        for name, value in vars(some.batch).items():
            if name == "latent_count":
                continue
            of_groups = name.startswith("crop") or name == "quadrants"
            whole = getattr(fed.batch, name)[: groups if of_groups else count]
            if of_groups and count < len(fed.batch.tokens) // len(fed.batch.crops):
                # The other rows of the group have crops behind those of the rows shown.
                used = int((some.batch.crop_kind[0] != NO_CROP).sum())
                whole, value = whole[:, :used], value[:, :used]
            np.testing.assert_array_equal(value, whole, err_msg=name)


def test_steps_end_where_those_of_training_do(folder):
    """Behind an epoch, of which the last step holds what is left."""
    opened, sample = opened_and_measured(configured(folder, stage={"steps": 0, "batch_size": 4}), images=0)
    steps = list(planned_steps(opened, sample))
    feds = trained(opened, 100)
    assert [len(step.rows) for step in steps] == [4, 4, 4] and feds[-1].last
    assert [sum(map(len, step.rows)) for step in steps] == [4, 4, 1]  # of 12 records three are bad by their texts
    assert [sum(map(len, step.rows)) for step in steps] == [fed.samples + fed.broken for fed in feds]
    got = summary(opened, sample)
    assert (got["steps"], got["epochs"], got["step"]["steps_planned"]) == (3, 1, 2)


def test_step_figures_are_those_of_the_batches(case):
    _, opened, sample = case
    clean = all(bad.reason != "corrupt_image" for _, bad in sample.bad_images)
    got = step_statistics(opened, sample)
    assert got["steps_planned"] >= 2 and not clean
    feds = trained(opened, got["steps_planned"])
    lost = sum(bad.reason == "corrupt_image" for fed in feds for bad in fed.bad)
    assert got["samples"] * len(feds) == pytest.approx(sum(fed.samples for fed in feds) + lost)
    batch = feds[0].batch
    assert (got["rows"], got["groups"], got["positions"]) == (len(batch.tokens), len(batch.crops), batch.tokens.size)
    assert got["text_only_steps"] == np.mean([fed.batch.crop_kind.size == 0 for fed in feds])
    filled = np.mean([(fed.batch.segment_ids > 0).mean() for fed in feds])
    # Planned figures count the conversations whose images turn out to be broken.
    assert filled <= got["filled_positions"] + 1e-9 and (lost or filled == pytest.approx(got["filled_positions"]))
    assert 0 < got["padded_to_longest"] <= 1 and 0 < got["filled_crops"] <= 1


# The page.


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of each kind of span."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(page)
        assert not self.open, "unclosed elements"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else ("", {}), data))

    def of(self, tag, kind=None):
        return [a for t, a in self.elements if t == tag and (kind is None or kind in (a.get("class") or "").split())]


def page_of(opened, sample, rows):
    figures = summary(opened, sample)
    section = stage_section(figures, stage_tables(figures), opened, sample, rows)
    return whole_page([section])


def test_the_page_shows_every_crop_and_token(case):
    name, opened, sample = case
    rows = sample_rows(opened, sample, rows=12)
    found = Parsed(page_of(opened, sample, rows))
    pictures = supervised = text = ends = latents = questions = 0
    for some in rows:
        batch = some.batch
        slots = batch.crop_kind == 1
        pictures += int(slots.sum()) * (1 + batch.quadrants.shape[2])
        supervised += int(batch.loss_weights.sum())
        text += int(((batch.segment_ids > 0) & (batch.visual_index < 0)).sum())
        ends += int((batch.round_end >= 0).sum())
        latents += int((batch.latent_start >= 0).sum())
        for row, examples in enumerate(some.examples):
            questions += sum(len(e.question_ids) for e in examples if e.crops is not None)
            kinds = page_rows.kinds(batch, row, some.spec)
            assert (kinds == page_rows.PADDING).sum() == (batch.segment_ids[row] == 0).sum()
            assert (kinds == page_rows.ANSWER).sum() == batch.loss_weights[row].sum()
            counted = (kinds == page_rows.LATENTS).sum()
            assert counted == batch.latent_count * (batch.latent_start[row] >= 0).sum()
            rounds_and_text = (kinds == page_rows.TEXT).sum() + (kinds == page_rows.ANSWER).sum()
            assert rounds_and_text == ((batch.segment_ids[row] > 0) & (batch.visual_index[row] < 0)).sum()
            ended = sum(tiling.box(24, 2)[1] - tiling.box(24, 2)[0] for e in examples for tiling in e.tilings)
            assert (kinds == page_rows.ROW_END).sum() == ended
    assert pictures > 0 and len(found.of("img")) == pictures
    assert all(a["src"].startswith("data:image/") and a["alt"] for a in found.of("img"))
    tokens = [a for a in found.of("span", "t") if "position" in a["title"]]
    assert len(tokens) == text and len(found.of("span", "answer")) == supervised > 0
    assert sum("· supervised: predicted at" in a["title"] for a in tokens) == supervised
    assert len(found.of("span", "end")) == ends > 0
    assert len(found.of("span", "latents")) == latents > 0
    assert len(found.of("span", "t")) - text == questions > 0
    if name == "tiles":
        assert found.of("span", "tile") and found.of("div", "grid")


def test_conversations_are_text_on_the_page(folder, case):
    _, opened, sample = case
    rows = sample_rows(opened, sample, rows=30)
    while not any("(id evil)" in e.where for some in rows for row in some.examples for e in row):
        rows = sample_rows(opened, sample, rows=60, steps=len(rows) + 5)
    page = page_of(opened, sample, rows)
    found = Parsed(page)
    assert not {"script", "b", "link", "iframe"} & {tag for tag, a in found.elements if a.get("class") != "hp"}
    for _, attributes in found.elements:
        assert not [key for key in attributes if key.startswith("on")]
        assert attributes.get("href", "#").startswith("#") and attributes.get("src", "data:").startswith("data:")
    [policy] = [a["content"] for a in found.of("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert "http://" not in page and "https://" not in page
    # Joined again, the tokens are the conversation, accents and all.
    said = "".join(data for (tag, a), data in found.texts if tag == "span" and "t" in (a.get("class") or "").split())
    assert said.count(EVIL) >= 2


def test_tokens_of_one_character_are_joined(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = tokenizer.encode("café ☕\n<")
    pieces = page_rows._pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "\ufffd" not in "".join(pieces)
    assert "".join(piece for piece in pieces if piece != "·") == ' café ☕<span class="nl">↵</span>\n&lt;'
    assert pieces.count("·") == 3  # two bytes and three, of which the first show the whole


def test_histograms():
    svg = histogram(np.array([1, 1, 1, 5]), "a <b>")
    titles = [data for (tag, _), data in Parsed(svg).texts if tag == "title"]
    assert titles == ["0: 0 of 4", "1: 3 of 4", "2: 0 of 4", "3: 0 of 4", "4: 0 of 4", "5: 1 of 4"]
    wide = [data for (tag, _), data in Parsed(histogram(np.arange(100), "wide")).texts if tag == "title"]
    assert wide[0] == "0–3: 4 of 100" and len(wide) == 25 and "a &lt;b&gt;" in svg


# The command.


def run_command(*arguments):
    command = [sys.executable, "-m", "fusion_jax.inspect", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_command_prints_tables_and_a_line_for_programs(folder, tmp_path):
    config = tmp_path / "config.py"
    values = json.dumps(to_dict(configured(folder, stage=CASES["packed"][2])))
    config.write_text(f"import json\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n"
                      f"    return ConfigDict(json.loads({values!r}))\n")  # fmt: skip
    done = run_command("--config", str(config), "--out", str(tmp_path / "p.html"))
    assert done.returncode == 0, done.stderr
    *_, page, last = done.stdout.splitlines()
    got = json.loads(last)
    assert page.startswith("page: ") and got["page"] == str(tmp_path / "p.html")
    assert [stage["stage"] for stage in got["stages"]] == ["one"] and got["stages"][0]["all"]["records"] == 12
    for word in ("RECORDS", "a.json", "b.json", "A STEP", "1 x too_long", "positions that hold something"):
        assert word in done.stdout
    assert "one: texts: 100%" in done.stderr and "one: images: 100%" in done.stderr
    assert Parsed((tmp_path / "p.html").read_text()).of("img")


def test_a_missing_config_is_one_sentence():
    done = run_command("--config", "none.py")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: There is no config file ") and "none.py" in done.stderr


def test_what_cannot_be_inspected_is_said(folder, tmp_path):
    config = configured(folder)
    with pytest.raises(UserError, match="--stage='two' is unknown; allowed: one"):
        inspect(config, Options(stage="two"))
    with pytest.raises(UserError, match="--limit=-1 must be at least 0"):
        Options(limit=-1)
    with pytest.raises(UserError, match="in a folder that exists"):
        inspect(config, Options(), tmp_path / "none" / "page.html")
    empty = dataclasses.replace(config.stages[0], data=str(folder / "empty.json"))
    with pytest.raises(UserError, match=r"empty\.json"):
        inspect(dataclasses.replace(config, stages=(empty,)), Options())
    with pytest.raises(UserError, match="no tokenizer folder"):
        inspect(dataclasses.replace(config, tokenizer=str(folder / "none")), Options())


def test_data_without_a_usable_record(folder, tmp_path, capsys):
    config = configured(folder)
    stage = dataclasses.replace(config.stages[0], data=str(folder / "bad.json"))
    config = dataclasses.replace(config, stages=(stage,), max_bad_records=0.5)
    got = inspect(config, Options(), tmp_path / "page.html", progress=False)
    [stage] = got["stages"]
    assert stage["step"] is None and stage["all"]["usable"] == 0 and stage["all"]["length"] is None
    shown = capsys.readouterr().out
    assert "1 x no_answer" in shown and "training would stop" in shown
    found = Parsed((tmp_path / "page.html").read_text())
    assert not found.of("img") and not found.of("script")
    assert any(EVIL in data for (tag, _), data in found.texts if tag == "pre")


def test_a_run_that_starts_from_a_checkpoint_takes_its_tokenizer(folder, tmp_path):
    trained_with = configured(folder)
    about = describe_run(trained_with, load_tokenizer(folder / "tokenizer"))
    ocp.save_checkpointables(tmp_path / "10", {"params": {"x": np.zeros(1)}, "about": about})
    config = dataclasses.replace(trained_with, tokenizer="", init_from=str(tmp_path), template="llama3")
    got = inspect(config, Options(), progress=False)
    assert got["stages"] == inspect(trained_with, Options(), progress=False)["stages"]
