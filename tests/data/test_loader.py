"""The input pipeline over a few real files: order, epochs, resuming, latent draws, bad records."""

import dataclasses
import itertools
import json
import pickle
from collections import Counter

import grain
import jax
import numpy as np
import pytest
from helpers.board_fake import Store
from helpers.fixtures import tiny
from PIL import Image

from fusion_jax.batch import PIXELS
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.conversation import IMAGE, LATENTS, encode_conversation, encode_prompt
from fusion_jax.data.examples import ExampleLoader, ExampleMaker, layout_spec
from fusion_jax.data.layout import check_fits, lay_out
from fusion_jax.data.loader import _SENT_AHEAD, _Batches, _Feeding, training_batches
from fusion_jax.data.plan import Sizes
from fusion_jax.data.planner import Counts, draw_latent_count, stage_steps
from fusion_jax.data.sources import Record, load_source
from fusion_jax.data.stages import fixed_loader, open_source, stage_loader, stage_seed
from fusion_jax.data.templates import TEMPLATES
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.data.validation_batches import first_records, fixed_batches, plan_all
from fusion_jax.devices.board import Board
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.synth.tokenizer import train_tokenizer

RECORDS, ROWS = 12, 4
WORDS = ["red", "blue", "green", "cube", "ball", "cone", "left", "right", "up", "down", "many", "few"]
SENTENCES = [f"How many {a} {b} are there? There is one." for a in WORDS for b in WORDS]


def record(i):
    turns = [
        {"from": "human", "value": "<image>\nHow many are there?"},
        {"from": "gpt", "value": f"There is one {WORDS[i % 12]}."},
    ]
    return {"id": f"r{i}", "image": f"{i}.png", "conversations": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    rng = np.random.default_rng(0)
    for i in range(RECORDS):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "good.json").write_text(json.dumps([record(i) for i in range(RECORDS)]))
    train_tokenizer(SENTENCES, folder / "tokenizer", vocab_size=320)
    return folder


@pytest.fixture(scope="module")
def open_batches(folder):
    """A function that starts a training pipeline over one of the folder's files."""
    started = []
    tokenizer = load_tokenizer(folder / "tokenizer")

    def start(file="good.json", seed=1, name="one", threads=2, model=None, **stage):
        model = model or tiny(latent_counts=(1, 4), **{"llm.vocab_size": 640})
        sizes = {"max_length": 120, "max_question_length": 16, "max_rounds": 2, "batch_size": ROWS, "steps": 1000}
        stage = StageConfig(name, str(folder / file), **sizes | stage)
        config = RunConfig(
            model=model,
            stages=(stage,),
            tokenizer=str(folder / "tokenizer"),
            seed=seed,
            loader_threads=threads,
            max_bad_records=0.9,
        )
        batches = training_batches(config, stage, load_source(stage.data), tokenizer)
        started.append(batches)
        return batches

    yield start
    for batches in started:
        batches.close()


def take(batches, count):
    return [fed for fed, _ in itertools.islice(batches, count)]


def same(a, b):
    return a.batch.latent_count == b.batch.latent_count and all(
        np.array_equal(value, getattr(b.batch, name)) for name, value in vars(a.batch).items() if name != "latent_count"
    )


def pictures(feds):
    """What tells records apart: their pixels."""
    return [row.tobytes() for fed in feds for row in fed.batch.crops[:, 0]]


def test_batches_hold_the_records(open_batches, folder):
    batch = take(open_batches(), 1)[0].batch
    assert batch.tokens.shape == (ROWS, 120) and batch.crops.shape == (ROWS, 1, 24, 24, 3)
    assert (batch.crop_kind == PIXELS).all() and (batch.crop_text_mask.sum(-1) > 3).all()
    originals = []
    for i in range(RECORDS):
        image = Image.open(folder / f"{i}.png").convert("RGB").resize((24, 24), Image.Resampling.BICUBIC)
        originals.append(np.asarray(image).tobytes())
    tokenizer = load_tokenizer(folder / "tokenizer")
    for crop, targets, weights in zip(batch.crops[:, 0], batch.targets, batch.loss_weights):
        i = originals.index(crop.tobytes())  # the image belongs to the answer
        assert tokenizer.decode(targets[weights > 0].tolist()).startswith(f"There is one {WORDS[i]}.")


def test_the_seed_decides(open_batches):
    first, again, other = (take(open_batches(seed=seed), 4) for seed in (1, 1, 2))
    assert all(same(a, b) for a, b in zip(first, again))
    assert pictures(first) != pictures(other)


def test_stages_differ_in_order(open_batches):
    one, two = (pictures(take(open_batches(name=name), 3)) for name in ("one", "two"))
    assert one != two and set(one) == set(two)


def test_threads_do_not_matter(open_batches):
    one, many = (take(open_batches(threads=threads), 5) for threads in (1, 7))
    assert all(same(a, b) for a, b in zip(one, many))


def test_every_record_is_seen_once_an_epoch_and_the_order_changes(open_batches):
    seen = pictures(take(open_batches(), 3 * RECORDS // ROWS))
    epochs = [seen[i : i + RECORDS] for i in range(0, len(seen), RECORDS)]
    assert len(epochs) == 3 and len(set(epochs[0])) == RECORDS
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("file", ["good.json", "bad.json"])
def test_state_resumes_at_the_identical_next_batch(open_batches, bad_file, file, after):
    batches = open_batches(file)
    take(batches, after)
    saved = json.loads(json.dumps(batches.get_state()))  # as a checkpoint keeps it
    expected = [next(batches) for _ in range(4)]
    fresh = open_batches(file)
    fresh.set_state(saved)
    for (a, counts_a), (b, counts_b) in zip(expected, [next(fresh) for _ in range(4)]):
        assert same(a, b) and counts_a == counts_b
        assert [bad.where for bad in a.bad] == [bad.where for bad in b.bad]


# Latents.


def test_latent_draw_is_a_function_of_seed_and_step_and_covers_the_set():
    counts = (4, 16, 36, 64, 144)
    draws = [draw_latent_count(counts, 7, step) for step in range(400)]
    assert draws == [draw_latent_count(counts, 7, step) for step in range(400)]
    assert draws[123] == draw_latent_count(counts, 7, 123) and isinstance(draws[0], int)
    assert draws != [draw_latent_count(counts, 8, step) for step in range(400)]
    for count in counts:  # 80 expected, standard deviation 8
        assert 48 <= draws.count(count) <= 112
    assert draw_latent_count((), 7, 0) == 0


def test_batches_draw_by_step(open_batches):
    feds = take(open_batches(), 8)
    config = dataclasses.make_dataclass("Seeded", ["seed"])(1)
    seed = stage_seed(config, StageConfig("one", "x"))
    assert [fed.batch.latent_count for fed in feds] == [draw_latent_count((1, 4), seed, s) for s in range(8)]
    assert {fed.batch.latent_count for fed in feds} == {1, 4}
    for fed in feds:
        assert (fed.batch.visual_index.max(-1) == 9 + fed.batch.latent_count - 1).all()


def test_without_exchange_nothing_is_drawn(open_batches):
    model = tiny("released", semantic_exchange=False, **{"llm.vocab_size": 640})
    batch = take(open_batches(model=model), 1)[0].batch
    assert batch.latent_count == 0 and batch.latent_start.shape == (ROWS, 0)


# Steps.


@pytest.mark.parametrize(
    ("stage", "expected"),
    [({"steps": 7}, 7), ({"epochs": 1}, 3), ({"epochs": 2}, 5), ({"epochs": 3}, 8), ({"epochs": 6}, 15)],
)
def test_steps_of_a_stage(stage, expected):
    assert stage_steps(StageConfig("s", "d", batch_size=64, **stage), 10, 4) == expected
    assert stage_steps(StageConfig("s", "d", batch_size=64, **stage), 10, 64) == (7 if "steps" in stage else 1)


def test_stage_seeds_differ():
    config = dataclasses.make_dataclass("Seeded", ["seed"])
    seeds = {stage_seed(config(seed), StageConfig(name, "d")) for seed in (1, 2) for name in ("a", "b", "c")}
    assert len(seeds) == 6 and all(0 <= seed < 2**31 for seed in seeds)


# Bad records.

REASONS = {"corrupt_image": "cut.png", "missing_image": "gone.png", "missing_key": "", "too_long": "", "no_answer": ""}


@pytest.fixture(scope="module")
def bad_file(folder):
    """The good records and five bad ones between them."""
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    corrupt, missing, keyless, long, unanswered = (record(i) for i in range(5))
    corrupt["image"], missing["image"] = "cut.png", "gone.png"
    del keyless["conversations"]
    long["conversations"][1]["value"] *= 30
    unanswered["conversations"].pop()
    records = [record(i) for i in range(RECORDS)]
    for i, bad in enumerate((corrupt, missing, keyless, long, unanswered)):
        records.insert(2 * i, {**bad, "id": f"bad{i}"})
    (folder / "bad.json").write_text(json.dumps(records))
    return folder / "bad.json"


def test_bad_records_are_skipped_counted_and_named(open_batches, bad_file):
    batches = open_batches("bad.json")
    bad, seen, pixels = [], [], []
    for _ in range(6):  # two epochs of good records
        fed, counts = next(batches)
        bad += fed.bad
        pixels += pictures([fed])
        seen.append(counts.seen)
        assert fed.batch.tokens.shape[0] == ROWS
        assert counts.bad == {reason: sum(b.reason == reason for b in bad) for reason in counts.bad}
        # A bad text is made up for by the next record, a bad image leaves its row empty.
        empty = ROWS - fed.samples
        assert empty == sum(b.reason.endswith("image") for b in fed.bad) == (fed.batch.segment_ids.max(1) == 0).sum()
        assert counts.seen == ROWS * len(seen) + sum(not b.reason.endswith("image") for b in bad)
    assert {b.reason for b in bad} == set(REASONS)
    assert len(set(pixels)) == RECORDS + 1  # and the empty rows' none
    # At most every bad record twice and once on the way into the third epoch.
    for reason in REASONS:
        assert 1 <= sum(b.reason == reason for b in bad) <= 3
    where = {b.reason: b.where for b in bad}
    for reason, name in zip(REASONS, ("bad0", "bad1", None, "bad3", "bad4")):
        assert str(bad_file) in where[reason] and (name is None or name in where[reason])
    for b in bad:
        assert REASONS[b.reason] in str(b)
    # Counts that were handed out do not change any more.
    fed, later = next(batches)
    assert later.seen > counts.seen and counts.seen == seen[-1]


def test_counts_stop_the_run_beyond_the_allowed_share():
    counts = Counts(seen=100, bad={"too_long": 2, "corrupt_image": 1})
    counts.check(0.03, 10)
    with pytest.raises(UserError) as error:
        counts.check(0.029, 10)
    for word in ("3 of 100", "1 corrupt_image", "2 too_long", "max_bad_records=0.029", "bad_records.jsonl"):
        assert word in str(error.value)
    # Early bad luck is measured against the whole data set.
    Counts(seen=2, bad={"too_long": 1}).check(0.01, 100)
    with pytest.raises(UserError):
        Counts(seen=2, bad={"too_long": 2}).check(0.01, 100)
    Counts().check(0.0, 100)


def test_a_source_without_usable_records_ends_instead_of_hanging():
    bad = BadRecord("missing_key", "file, record 0", "the key is missing")
    fed, counts = first_batch_of_nothing(bad, sizes=Sizes(1, 1, {4: 1}, False, 1))
    assert len(fed.bad) == counts.seen == counts.bad["missing_key"] > 1
    with pytest.raises(UserError):
        counts.check(0.5, 3)


def test_a_step_is_full_however_many_records_are_bad(open_batches, folder):
    """More than there are records, between the few good ones of which a step takes several."""
    keyless = {"id": "keyless", "image": "0.png"}
    (folder / "mostly_bad.json").write_text(json.dumps([record(0), *[keyless] * 4]))
    for fed in take(open_batches("mostly_bad.json"), 3):
        assert fed.samples == ROWS and len(fed.bad) > 5


def test_a_record_beyond_the_data_has_changed():
    """One that waited when its file was longer."""
    loader = ExampleLoader([None] * 3, None, layout_spec(tiny(), 40, 6, 2), 4)
    bad = loader.measure(3)
    assert isinstance(bad, BadRecord) and bad.reason == "changed" and "now has 3 records" in str(bad)


def first_batch_of_nothing(bad, sizes):
    endless = grain.MapDataset.source([bad]).repeat().to_iter_dataset(grain.ReadOptions(num_threads=0))
    loader = ExampleLoader([None] * 3, None, layout_spec(tiny(), 40, 6, 2), 4)
    stage = StageConfig("s", "d", batch_size=sizes.rows, steps=9)
    feeding = _Feeding(loader, stage, sizes, (4,), 0, 1, 0.5, tuple(range(sizes.groups)))
    return next(iter(_Batches(endless, feeding)))


# Several images.

SLOT, LATENT_SLOT = "<vision_start><image><vision_end>", "<vision_start><latent_image><vision_end>"


def turns(*values):
    return [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "questions"),
    [
        (
            ("<image>\n<image>\nHow many?", "one.", "How many left?", "one."),
            (f"{SLOT}\n{SLOT}{LATENT_SLOT}\nHow many?", f"{LATENT_SLOT}How many left?"),
        ),
        (
            ("Is <image> left?", "one.", "<image>How many?", "one."),
            (f"{LATENT_SLOT}Is {SLOT} left?", f"{SLOT}{LATENT_SLOT}How many?"),
        ),
        (("How many?", "one.", "<image> <image>", "one."), (f"{LATENT_SLOT}How many?", f"{SLOT} {SLOT}{LATENT_SLOT}")),
    ],
)
def test_several_images_stand_where_their_tags_are(folder, values, questions):
    tokenizer = load_tokenizer(folder / "tokenizer")
    got = encode_conversation(turns(*values), tokenizer, TEMPLATES["phi3"], 2)
    for question in questions:
        assert f"<|user|>\n{question}<|end|>\n<|assistant|>\n" in got.prompt
    ids = got.input_ids.tolist()
    assert (ids.count(IMAGE), ids.count(LATENTS)) == (2, 2)
    for i in np.flatnonzero(got.input_ids < 0):
        assert ids[i - 1] == tokenizer.vision_start_id and ids[i + 1] == tokenizer.vision_end_id
    asked = "".join(value.replace("<image>", "").strip() for value in values[::2])
    assert got.instructs.tolist() == [tokenizer.bos_id, *tokenizer.encode(asked)]
    prompt = encode_prompt(turns(*values[:-1]), tokenizer, TEMPLATES["phi3"], 2)
    assert got.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
    plain = encode_conversation(turns(*values), tokenizer, TEMPLATES["phi3"], 2, latents=False)
    assert plain.prompt == got.prompt.replace(LATENT_SLOT, "")


@pytest.mark.parametrize(
    ("question", "images", "reason", "words"),
    [
        ("<image><image>a", 0, "image_tag_without_image", "2 <image> tags for 0 images"),
        ("<image><image>a", 1, "several_images", "2 <image> tags for 1 image"),
        ("<image><image><image>a", 2, "image_tag_without_image", "3 <image> tags for 2 images"),
        ("<image>a", 2, "image_without_tag", "1 <image> tag for 2 images"),
        ("a", 3, "image_without_tag", "0 <image> tags for 3 images"),
    ],
)
def test_tags_and_images_must_agree(folder, question, images, reason, words):
    with pytest.raises(BadRecord, match=words) as error:
        encode_conversation(turns(question, "b"), load_tokenizer(folder / "tokenizer"), TEMPLATES["phi3"], images)
    assert error.value.reason == reason


def test_a_tag_that_appears_only_when_another_is_taken_out_is_text(folder):
    got = encode_conversation(
        turns("<im<image>age>a", "b"), load_tokenizer(folder / "tokenizer"), TEMPLATES["phi3"], True
    )
    assert got.input_ids.tolist().count(IMAGE) == 1


def test_several_images_from_files_and_bytes_to_a_row(folder):
    model = tiny("released", **{"llm.vocab_size": 640})
    maker = ExampleMaker(model, load_tokenizer(folder / "tokenizer"), "phi3")
    paths = [folder / f"{i}.png" for i in range(3)]
    said = turns("<image>\n<image>\nHow many?", "one.", "Is <image> left?", "one.")
    example = maker(Record("a", paths[0], said, "here", (paths[0], paths[1].read_bytes(), paths[2])))
    alone = [maker(Record("a", path, turns("How many?", "one."), "here")) for path in paths]
    assert example.crops.shape == (3, 5, 24, 24, 3)
    np.testing.assert_array_equal(example.crops, np.concatenate([e.crops for e in alone]))
    spec = layout_spec(model, 160, 40, 2, images=3)
    check_fits(example, spec, 4)
    batch = lay_out([example], spec, 4)
    assert (batch.crop_kind == PIXELS).all() and batch.round_crop.tolist() == [[1, 2]]
    assert (batch.crop_text_mask.sum(-1) == len(example.question_ids)).all()
    with pytest.raises(BadRecord, match="max_images is 1"):
        check_fits(example, layout_spec(model, 160, 40, 2), 4)


# Packing.


@dataclasses.dataclass(frozen=True)
class Packed(StageConfig):
    packing: bool = True
    max_images: int = 3


@pytest.fixture(scope="module")
def open_packed(folder):
    """A function that starts a packing pipeline over one of the folder's files."""
    started = []
    tokenizer = load_tokenizer(folder / "tokenizer")

    def start(file="good.json", threads=2, preset="paper", devices=1, **stage):
        model = tiny(preset, latent_counts=(1, 4), **{"llm.vocab_size": 640})
        sizes = {"max_length": 250, "max_question_length": 16, "max_rounds": 4, "batch_size": ROWS, "steps": 1000}
        stage = Packed("one", str(folder / file), **sizes | stage)
        config = RunConfig(model, (stage,), tokenizer="", seed=1, loader_threads=threads, max_bad_records=0.9)
        source = open_source(config, stage)
        batches = training_batches(config, stage, source, tokenizer, devices)
        started.append(batches)
        return batches

    yield start
    for batches in started:
        batches.close()


def packed_pictures(fed):
    batch = fed.batch
    return [crop.tobytes() for crop in batch.crops[batch.crop_kind == PIXELS]]


def test_packed_batches_hold_every_record_once_an_epoch(open_packed):
    batches = open_packed()
    emitted, before = Counter(), 0
    for step in range(20):
        fed, counts = next(batches)
        batch = fed.batch
        emitted.update(packed_pictures(fed))
        # Two rows share their crops; with more latents there is room for fewer records.
        crops = {1: 9, 4: 7}[batch.latent_count]
        assert batch.tokens.shape == (2, 250) and batch.crops.shape[:2] == (1, crops)
        assert fed.samples == (batch.crop_kind == PIXELS).sum() == sum(emitted.values()) - before
        before = sum(emitted.values())
        seed = stage_seed(dataclasses.make_dataclass("Seeded", ["seed"])(1), StageConfig("one", "x"))
        assert batch.latent_count == draw_latent_count((1, 4), seed, step)
        # What was read has been handed out or waits, each record as often as epochs began or ended.
        waiting = Counter(number for number, *_ in batches.get_state()["waiting"])
        assert sum(waiting.values()) + before == counts.seen
        assert len(emitted) <= RECORDS and max(emitted.values()) <= -(-counts.seen // RECORDS)
    assert before > 20 * ROWS - ROWS and len(emitted) == RECORDS
    # Four steps' worth may wait, which is 28 records here: of each at most three.
    assert min(emitted.values()) >= counts.seen // RECORDS - 3 and sum(waiting.values()) <= 28


def test_more_groups_than_rows_are_told(open_packed, caplog):
    open_packed(batch_size=32)
    assert "not batch_size" not in caplog.text
    open_packed(devices=8)
    assert "each of 8 devices" in caplog.text and f"not batch_size={ROWS}" in caplog.text


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("file", ["good.json", "bad.json"])
def test_packed_state_resumes_at_the_identical_next_batch(open_packed, bad_file, file, after):
    batches = open_packed(file)
    take(batches, after)
    saved = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(4)]
    fresh = open_packed(file, threads=5)  # nor does their number matter
    fresh.set_state(saved)
    for (a, counts_a), (b, counts_b) in zip(expected, [next(fresh) for _ in range(4)]):
        assert same(a, b) and counts_a == counts_b
        assert [bad.where for bad in a.bad] == [bad.where for bad in b.bad]


def test_bad_records_of_packed_batches_are_counted_and_leave_no_trace(open_packed, bad_file):
    batches = open_packed("bad.json")
    bad, pixels = [], Counter()
    for _ in range(12):
        fed, counts = next(batches)
        bad += fed.bad
        pixels.update(packed_pictures(fed))
        assert fed.samples == len(packed_pictures(fed))
        assert counts.bad == {reason: sum(b.reason == reason for b in bad) for reason in counts.bad}
    assert {b.reason for b in bad} == set(REASONS) and len(pixels) == RECORDS


def test_rows_are_dealt_evenly_over_devices_and_microbatches(open_packed):
    batch = take(open_packed(devices=3, accumulation=2), 1)[0].batch
    assert batch.tokens.shape[0] == batch.crops.shape[0] == 6
    assert (batch.segment_ids.max(1) > 0).sum() >= 4


def test_rows_that_no_record_fills_are_empty():
    bad = BadRecord("missing_key", "file, record 0", "the key is missing")
    fed, counts = first_batch_of_nothing(bad, Sizes(2, 1, {4: 3}, True, 2))
    assert len(fed.bad) == counts.seen == counts.bad["missing_key"] > 1
    assert fed.samples == 0 and fed.batch.tokens.shape == (2, 40)


# Several processes.


def rows_of(fed):
    """Each row's supervised tokens and its group's pixels: what a row is, whoever laid it out."""
    batch = fed.batch
    of_group = np.repeat([crops.tobytes() for crops in batch.crops], len(batch.tokens) // len(batch.crops))
    return [(t.tobytes(), s.tobytes(), g) for t, s, g in zip(batch.targets, batch.segment_ids, of_group)]


@pytest.mark.parametrize("packing", [True, False])
def test_processes_draw_one_plan_and_share_its_rows(folder, packing):
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = tiny(latent_counts=(1, 4), **{"llm.vocab_size": 640})
    stage = StageConfig(
        "one", str(folder / "good.json"), max_length=250, max_question_length=16, max_rounds=4, batch_size=ROWS,
        packing=packing, max_images=2, steps=100,
    )  # fmt: skip
    config = RunConfig(model=model, stages=(stage,), tokenizer="", seed=1, loader_threads=2)
    source = open_source(config, stage)

    stores, opened = [], []

    def start(*processes):
        """Each process is the shards that it holds."""
        stores.append(Store())
        count = len(processes)
        boards = [Board("run", stores[-1], process, count) if count > 1 else None for process in range(count)]
        opened.extend(board for board in boards if board)
        return [
            (training_batches(config, stage, source, tokenizer, 4, held, board), held)
            for held, board in zip(processes, boards)
        ]

    def step(processes):
        """The batch's rows, each shard's from the process that holds it."""
        feds = [next(batches)[0] for batches, _ in processes]
        assert len({fed.samples for fed in feds}) == len({fed.batch.latent_count for fed in feds}) == 1
        of_shard = {}
        for fed, (_, held) in zip(feds, processes):
            rows = rows_of(fed)
            size = len(rows) // len(held)
            of_shard |= {shard: rows[i * size : (i + 1) * size] for i, shard in enumerate(held)}
        return [row for shard in range(4) for row in of_shard[shard]]

    one, two, interleaved = start((0, 1, 2, 3)), start((0, 1), (2, 3)), start((0, 2), (1, 3))
    for _ in range(4):
        assert step(one) == step(two) == step(interleaved)
    # Saved by two, one of which keeps the state; four go on, where one would have been.
    saved = json.loads(json.dumps(two[0][0].get_state()))
    assert saved == json.loads(json.dumps(two[1][0].get_state()))
    four = start((0,), (1,), (2,), (3,))
    for batches, _ in four:
        batches.set_state(saved)
    for _ in range(20):
        assert step(one) == step(four)
    # What all have read is gone: a text, and who has read it, for each of those that may still be needed.
    assert 1 < len(stores[-1].texts) < 3 * (2 * _SENT_AHEAD)
    for board in opened:  # first, as training does: a process may wait for what the first no longer sends
        board.close()
    for batches, _ in (*one, *two, *interleaved, *four):
        batches.close()


# Rows of text alone.


@pytest.mark.parametrize(("preset", "split"), [("paper", True), ("released", False)])
def test_text_alone_pays_for_no_image(folder, open_batches, preset, split):
    records = [record(i) for i in range(RECORDS)]
    for one in records[::3]:
        del one["image"]
        one["conversations"] = [{**t, "value": t["value"].replace("<image>\n", "")} for t in one["conversations"]]
    (folder / "mixed.json").write_text(json.dumps(records))
    model = tiny(preset, latent_counts=(1, 4), **{"llm.vocab_size": 640})
    feds = take(open_batches("mixed.json", model=model), 12)
    kinds = Counter()
    for fed in feds:
        assert fed.samples == ROWS
        empty = fed.batch.crops.shape[1] == 0
        kinds[empty] += 1
        assert (fed.batch.visual_index.max() < 0) == empty and (fed.batch.latent_count == 0) == empty
    assert (kinds[True] >= 3) == split and kinds[False] >= 6


# Conversations that are too long.


@pytest.mark.parametrize(
    ("limits", "kept"),
    [({"max_length": 90}, 2), ({"max_rounds": 3}, 3), ({"max_question_length": 9}, 1), ({}, 5)],
)
def test_whole_last_rounds_go_where_a_row_is_too_short(folder, tmp_path, limits, kept):
    turns_ = turns("<image>\nHow many are there?", "There is one red.", *["How many?", "one."] * 4)
    long = {"id": "long", "image": "0.png", "conversations": turns_}
    cut = {**long, "conversations": turns_[: 2 * kept]}
    (tmp_path / "long.json").write_text(json.dumps([long, cut]))
    model = tiny(latent_counts=(4,), **{"llm.vocab_size": 640})
    sizes = {"max_length": 300, "max_question_length": 60, "max_rounds": 8, **limits}
    stage = StageConfig("one", str(tmp_path / "long.json"), str(folder), batch_size=1, **sizes)
    config = RunConfig(model=model, stages=(stage,), tokenizer="", loader_threads=1)
    source = open_source(config, stage)
    loader = stage_loader(config, stage, source, load_tokenizer(folder / "tokenizer"))
    found, expected = loader.load(0), loader.load(1)
    assert (found.dropped_rounds, expected.dropped_rounds) == (5 - kept, 0)
    for name in ("input_ids", "labels", "question_ids", "crops"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    batches = training_batches(config, stage, source, loader.maker.tokenizer)
    counts = [counts for _, counts in itertools.islice(batches, 2)][-1]
    batches.close()
    assert (counts.shortened, counts.dropped_rounds) == ((1, 5 - kept) if kept < 5 else (0, 0))


def test_no_image_is_dropped_with_its_round(folder):
    said = turns("How many are there?", "one.", "<image>\nHow many?", "one.")
    (folder / "late.json").write_text(json.dumps([{"id": "late", "image": "0.png", "conversations": said}]))
    model = tiny(latent_counts=(4,), **{"llm.vocab_size": 640})
    stage = StageConfig("one", str(folder / "late.json"), batch_size=1, max_length=300, max_rounds=1)
    config = RunConfig(model=model, stages=(stage,), tokenizer="")
    loader = stage_loader(config, stage, open_source(config, stage), load_tokenizer(folder / "tokenizer"))
    assert loader.load(0).reason == "too_many_rounds"


# Dynamic resolution.


@pytest.mark.parametrize("packing", [True, False])
def test_images_of_any_shape_share_their_crops(folder, packing):
    rng = np.random.default_rng(5)
    sizes = [(60, 60), (90, 40), (40, 90), (100, 30), (24, 24)] * 3
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(folder / f"shape{i}.png")
    (folder / "shapes.json").write_text(
        json.dumps([{**record(i), "image": f"shape{i}.png"} for i in range(len(sizes))])
    )
    grids = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3))
    model = tiny(latent_counts=(1, 4), tile_grids=grids, tile_tokens=4, **{"llm.vocab_size": 640})
    stage = StageConfig(
        "one", str(folder / "shapes.json"), max_length=250, max_question_length=16, max_rounds=6, batch_size=5,
        packing=packing, steps=9,
    )  # fmt: skip
    config = RunConfig(model=model, stages=(stage,), tokenizer="", seed=1, loader_threads=2)
    source = open_source(config, stage)
    tokenizer = load_tokenizer(folder / "tokenizer")
    batches = training_batches(config, stage, source, tokenizer)
    crops, samples = Counter(), 0
    for fed in take(batches, 9):
        used = (fed.batch.crop_kind == PIXELS).sum()
        rows, slots = len(fed.batch.tokens), fed.batch.crops.shape[1]
        assert used <= slots and (packing or slots < 5 * rows)  # less than the worst case for every row
        crops[fed.batch.crops.shape] += 1
        samples += fed.samples
    batches.close()
    assert len(crops) == 1 and samples >= 9 * 4
    loader = stage_loader(config, stage, source, tokenizer)
    counts = [len(loader.load(number).crops) for number in range(5)]
    assert counts == [5, 4, 3, 4, 1]  # 90 x 40 keeps more on three tiles in a row than on two


# Validation.


def test_fixed_batches_are_the_first_good_records_in_order(open_batches, bad_file, folder):
    model = tiny(latent_counts=(1, 4, 9), **{"llm.vocab_size": 640})
    stage = StageConfig("s", str(bad_file), max_length=120, max_question_length=16, batch_size=5)
    config = RunConfig(model=model, stages=(stage,), tokenizer="")
    loader = fixed_loader(config, stage, load_source(bad_file), load_tokenizer(folder / "tokenizer"))
    records, bad = first_records(loader, 5, 10)
    assert first_records(loader, 5, 0, 3)[0] == records and first_records(loader, 5, 1)[0] == records[:5]
    assert len(records) % 9 and first_records(loader, 9, 10)[0] == records  # the last batch need not be whole
    assert len(records) + len(bad) == len(loader.source) and "missing_image" in {one.reason for one in bad}
    planned = plan_all(records, loader.spec, 4, stage, 2)
    batches, broken = zip(*fixed_batches(loader, planned, 2, 2, (0, 1)))
    assert {b.latent_count for b in batches} == {4}
    expected = []
    names = [json.loads(bad_file.read_text())[measured.number]["image"] for measured in records]
    assert "gone.png" not in names and "cut.png" in names  # whose header is whole: it leaves its place empty
    assert [names[[m.number for m in records].index(number)] for one in broken for number in one] == ["cut.png"]
    for name in sorted({*names} - {"cut.png"}):
        image = Image.open(folder / name).convert("RGB")
        expected.append(np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC)).tobytes())
    assert sorted(crop.tobytes() for b in batches for crop in b.crops[b.crop_kind == PIXELS]) == sorted(expected)
    # Each process's rows are those of the shards that it holds, in the shapes of all.
    for whole, *parts in zip(batches, *(fixed_batches(loader, planned, 1, 2, (i,)) for i in (0, 1))):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *(batch for batch, _ in parts))
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(whole), strict=True))


def test_a_file_without_records_is_refused(tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    stage = StageConfig("s", str(tmp_path / "empty.json"))
    config = RunConfig(model=tiny(), stages=(stage,), tokenizer="")
    with pytest.raises(UserError) as error:
        open_source(config, stage)
    assert "empty.json" in str(error.value)


def test_bad_records_survive_pickling():
    bad = pickle.loads(pickle.dumps(BadRecord("too_long", "file, record 1", "needs 5")))
    assert (bad.reason, bad.where, bad.detail, str(bad)) == (
        "too_long", "file, record 1", "needs 5", "file, record 1: needs 5",
    )  # fmt: skip
