"""Forms of records: each is understood in full or refused by name; no part is left out silently."""

import base64
import dataclasses
import functools
import io
import json
from collections import Counter

import pytest
from helpers.fixtures import tiny
from PIL import Image

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import shard_writing
from fusion_jax.data.conversation import encode_conversation, encode_prompt
from fusion_jax.data.examples import ExampleMaker
from fusion_jax.data.media import Named
from fusion_jax.data.records import understand
from fusion_jax.data.shard_checking import check_shards
from fusion_jax.data.stages import open_source
from fusion_jax.data.templates import TEMPLATES
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import BadRecord
from fusion_jax.inspection.figures import summary
from fusion_jax.inspection.sample import draw_sample, open_stage
from fusion_jax.synth.tokenizer import train_tokenizer

TURNS = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red."}]
PLAIN = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red."}]
TWO = [{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "No."}]
SYSTEM = {"from": "system", "value": "Be brief."}
CALL = {"from": "function_call", "value": "{}"}


def png(colour="red", size=(8, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


RED = png()
TEXT = base64.b64encode(RED).decode()
URL = f"data:image/png;base64,{TEXT}"
A, B, INLINE = Named("a.png"), Named("b.png"), Named("", RED)


def said(*content, answer="Red.", **more):
    content = content[0] if isinstance(content[0], str) else list(content)
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}


def text(value):
    return {"type": "text", "text": value}


UNDERSTOOD = {
    "image": ({"image": "a.png", "conversations": TURNS}, TURNS, [A], None),
    "a list in image": ({"image": ["a.png"], "conversations": TURNS}, TURNS, [A], None),
    "images": ({"images": ["a.png", "b.png"], "conversations": TWO}, TWO, [A, B], None),
    "one name in images": ({"images": "a.png", "conversations": PLAIN}, PLAIN, [A], None),
    "no tag": ({"images": ["a.png"], "conversations": PLAIN}, PLAIN, [A], None),
    "Image": ({"Image": "a.png", "conversations": PLAIN}, PLAIN, [A], None),
    "IMAGES": ({"IMAGES": ["a.png"], "conversations": PLAIN}, PLAIN, [A], None),
    "image_path": ({"image_path": "a.png", "conversations": PLAIN}, PLAIN, [A], None),
    "imagePaths": ({"imagePaths": ["a.png"], "conversations": PLAIN}, PLAIN, [A], None),
    "img": ({"img": "a.png", "conversations": PLAIN}, PLAIN, [A], None),
    "picture": ({"picture": "a.png", "conversations": PLAIN}, PLAIN, [A], None),
    "photos": ({"photos": ["a.png"], "conversations": PLAIN}, PLAIN, [A], None),
    "image_url that is a file": ({"image_url": "a.png", "conversations": PLAIN}, PLAIN, [A], None),
    "a file's address": ({"image": "file:///d/a%20b.png", "conversations": PLAIN}, PLAIN, [Named("/d/a b.png")], None),
    "the same twice": ({"image": "a.png", "images": ["a.png"], "conversations": TURNS}, TURNS, [A], None),
    "where it came from": (
        {"image": "a.png", "image_url": "https://x.y/z.jpg", "image_id": "z", "conversations": TURNS},
        TURNS,
        [A],
        None,
    ),
    "nothing under media keys": (
        {"image": None, "images": [], "video": None, "audio": "", "videos": [], "conversations": PLAIN},
        PLAIN,
        [],
        None,
    ),
    "what only tells of an image": (
        {"image_size": [3, 4], "num_images": 0, "image_caption": "a cat", "topics": ["a"], "conversations": PLAIN},
        PLAIN,
        [],
        None,
    ),
    "path and no bytes": ({"images": [{"path": "a.png", "bytes": None}], "conversations": TURNS}, TURNS, [A], None),
    "path and bytes": (
        {"image": {"path": "a.png", "bytes": TEXT}, "conversations": TURNS},
        TURNS,
        [Named("a.png", RED)],
        None,
    ),
    "bytes as numbers": ({"images": [{"bytes": list(RED)}], "conversations": TURNS}, TURNS, [INLINE], None),
    "a data URL": ({"image": URL, "conversations": TURNS}, TURNS, [INLINE], None),
    "base64": ({"image": TEXT, "conversations": TURNS}, TURNS, [INLINE], None),
    "base64 in lines": ({"image": base64.encodebytes(RED).decode(), "conversations": TURNS}, TURNS, [INLINE], None),
    "system": ({"system": "Be brief.", "conversations": PLAIN}, PLAIN, [], "Be brief."),
    "no system": ({"system": "", "conversations": PLAIN}, PLAIN, [], None),
    "system turn": ({"conversations": [SYSTEM, *PLAIN]}, PLAIN, [], "Be brief."),
    "system twice": ({"system": "Be brief.", "conversations": [SYSTEM, *PLAIN]}, PLAIN, [], "Be brief."),
    "messages": (said("<image>\nWhich colour?", images=["a.png"]), TURNS, [A], None),
    "messages with system": (
        {"messages": [{"role": "system", "content": [text("Be brief.")]}, *said("Which colour?")["messages"]]},
        PLAIN,
        [],
        "Be brief.",
    ),
    "roles among conversations": ({"conversations": said("Which colour?")["messages"]}, PLAIN, [], None),
    "from among messages": ({"messages": PLAIN}, PLAIN, [], None),
    "both, and the same": ({"conversations": PLAIN, **said("Which colour?")}, PLAIN, [], None),
    "null beside": ({"conversations": None, **said("Which colour?")}, PLAIN, [], None),
    "an empty list of tools": (said("Which colour?", tools="[]"), PLAIN, [], None),
    "part with its place": (
        said({"type": "image"}, text("Which colour?"), images=["a.png"]),
        TURNS,
        [A],
        None,
    ),
    "part with its path": (said({"type": "image", "path": "a.png"}, text("Which colour?")), TURNS, [A], None),
    "part with image": (said({"type": "image", "image": "a.png"}, text("Which colour?")), TURNS, [A], None),
    "part with no type": (said({"image": "a.png"}, {"text": "Which colour?"}), TURNS, [A], None),
    "part with url": (
        said({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, text("Which colour?")),
        TURNS,
        [INLINE],
        None,
    ),
    "part with bytes": (said({"type": "image", "bytes": TEXT}, text("Which colour?")), TURNS, [INLINE], None),
    "part with source": (
        said({"type": "image", "source": {"type": "base64", "data": TEXT}}, text("Which colour?")),
        TURNS,
        [INLINE],
        None,
    ),
    "part with nulls": (
        said(
            {"type": "image", "text": None, "image": "a.png"}, {"type": "text", "text": "Which colour?", "image": None}
        ),
        TURNS,
        [A],
        None,
    ),
    "parts in order": (
        said(
            text("Is "),
            {"type": "image"},
            text(" older than "),
            {"type": "image", "path": "b.png"},
            text("?"),
            images="a.png",
        ),
        [{"from": "human", "value": "Is <image> older than <image>?"}, PLAIN[1]],
        [A, B],
        None,
    ),
    "images in front": (
        said({"type": "image"}, {"type": "image"}, text("Same?"), answer="No.", images=["a.png", "b.png"]),
        TWO,
        [A, B],
        None,
    ),
    "named by parts and record": (
        said({"type": "image", "path": "a.png"}, text("Which colour?"), image="a.png"),
        TURNS,
        [A],
        None,
    ),
    "an image beside its turn": ({"conversations": [PLAIN[0] | {"image": "a.png"}, PLAIN[1]]}, TURNS, [A], None),
    "words about an image": (
        said("Which colour has <image 1>?", image="a.png"),
        [{"from": "human", "value": "Which colour has <image 1>?"}, PLAIN[1]],
        [A],
        None,
    ),
    "a page's text": (
        said("Write <video> and <audio>."),
        [{"from": "human", "value": "Write <video> and <audio>."}, PLAIN[1]],
        [],
        None,
    ),
    "an answer in parts": (
        {"messages": [PLAIN[0], {"role": "assistant", "content": [text("Re"), text("d.")]}]},
        PLAIN,
        [],
        None,
    ),
}


@pytest.mark.parametrize(("record", "turns", "images", "system"), UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_understood(record, turns, images, system):
    found = understand(json.loads(json.dumps(record)), 3, "f.json, record 3")
    assert (found.turns, found.images, found.system) == (turns, tuple(images), system)
    assert (found.id, found.where) == ("3", "f.json, record 3")


REFUSED = {
    "video": ({"video": "a.mp4", "conversations": PLAIN}, "unknown_media", "'video'"),
    "video beside an image": (
        {"image": "a.png", "Video": ["a.mp4"], "conversations": TURNS},
        "unknown_media",
        "'Video'",
    ),
    "audio": ({"audio": {"array": [0.5], "path": None}, "conversations": PLAIN}, "unknown_media", "'audio'"),
    "video_path": ({"video_path": "clip", "conversations": PLAIN}, "unknown_media", "'video_path'"),
    "frames": ({"frames": ["1.jpg", "2.jpg"], "conversations": PLAIN}, "unknown_media", "'frames'"),
    "screenshot": ({"screenshot": "s", "conversations": PLAIN}, "unknown_media", "'screenshot'"),
    "an image's id alone": ({"image_id": "000123", "conversations": PLAIN}, "unknown_media", "'image_id'"),
    "a file under any key": ({"stuff": "x/1.JPG", "conversations": PLAIN}, "unknown_media", "'stuff'"),
    "an image in an object": (
        {"metadata": {"image": {"path": "a"}}, "conversations": PLAIN},
        "unknown_media",
        "'metadata'",
    ),
    "images in a list": ({"inputs": [{"x": {"img": "a"}}], "conversations": PLAIN}, "unknown_media", "'inputs'"),
    "a second image": (
        {"image": "a.png", "image2": "b.png", "conversations": TURNS},
        "unknown_media",
        "'image2'",
    ),
    "image_b": ({"image": "a.png", "image_b": "b", "conversations": TURNS}, "unknown_media", "'image_b'"),
    "bytes under any key": ({"stuff": {"x": TEXT}, "conversations": PLAIN}, "unknown_media", "'stuff'"),
    "an address": ({"image": "https://x.y/z.jpg", "conversations": TURNS}, "remote_image", "https://x.y/z.jpg"),
    "an address in image_url": ({"image_url": "s3://x/z.jpg", "conversations": PLAIN}, "remote_image", "s3://x"),
    "different images": ({"image": "a.png", "images": ["b.png"], "conversations": TURNS}, "contradiction", "'images'"),
    "one and two": (
        {"image": "a.png", "images": ["a.png", "b.png"], "conversations": TURNS},
        "contradiction",
        "'image'",
    ),
    "a number": ({"image": 5, "conversations": TURNS}, "bad_image", "'image' must be a file name, not int"),
    "an object in objects": (
        {"image": functools.reduce(lambda x, _: {"path": x}, range(90), 5)} | {"conversations": TURNS},
        "bad_image",
        "'path' of",
    ),
    "an empty object": ({"image": {}, "conversations": TURNS}, "bad_image", "'image'"),
    "torn base64": (
        {"image": {"bytes": TEXT[:-7] + "!"}, "conversations": TURNS},
        "bad_image",
        "not an image in base64",
    ),
    "an empty list of bytes": ({"image": {"bytes": [1, 999]}, "conversations": TURNS}, "bad_image", "'bytes'"),
    "a URL of text": ({"image": "data:image/png,x", "conversations": TURNS}, "bad_image", "data URL"),
    "base64 of no image": (
        {"image": "QUJD" * 20_000, "conversations": TURNS},
        "bad_image",
        "base64, but not of a known image",
    ),
    "a text of 300 KB": ({"image": "x. " * 100_000, "conversations": TURNS}, "bad_image", "(300 KB)"),
    "a late system text": ({"conversations": [*PLAIN, SYSTEM]}, "system_turn", "entry 2"),
    "two system texts": ({"conversations": [SYSTEM, SYSTEM, *PLAIN]}, "system_turn", "entry 1"),
    "different system texts": ({"system": "Be long.", "conversations": [SYSTEM, *PLAIN]}, "contradiction", "'system'"),
    "an image in a system text": (
        {"images": ["a.png"], "conversations": [{"from": "system", "value": "<image>"}, *PLAIN]},
        "system_turn",
        "image",
    ),
    "half a system text": ({"system": "\ud83d", "conversations": PLAIN}, "bad_turns", "surrogate"),
    "a system of numbers": ({"system": 5, "conversations": PLAIN}, "bad_turns", "'system'"),
    "a tool's turn": ({"conversations": [PLAIN[0], CALL, PLAIN[1]]}, "tool_turn", "entry 1"),
    "tools": (said("Which colour?", tools=[{"name": "see"}]), "tool_turn", "tools"),
    "a call": (
        {"messages": [PLAIN[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "tool_turn",
        "entry 1",
    ),
    "an unknown role": (
        {"conversations": [PLAIN[0], {"from": "narrator", "value": "x"}]},
        "unknown_role",
        "'narrator'",
    ),
    "no role": ({"conversations": [{"value": "x"}]}, "missing_key", "'from' is missing in 'conversations' entry 0"),
    "no content": ({"messages": [{"role": "user"}]}, "missing_key", "'content' is missing in 'messages' entry 0"),
    "content of numbers": ({"messages": [{"role": "user", "content": 5}]}, "bad_turns", "entry 0"),
    "two roles": ({"messages": [{"role": "user", "from": "gpt", "content": "x"}]}, "contradiction", "entry 0"),
    "different turns": ({"conversations": TURNS, **said("Other?")}, "contradiction", "'messages'"),
    "no turns": ({"image": "a.png", "texts": [{"user": "x"}]}, "missing_key", "it has image, texts"),
    "a video part": (
        said({"type": "video", "video": "a.mp4"}, text("x")),
        "unknown_media",
        "part 0 of 'messages' entry 0",
    ),
    "a sound part": (said({"type": "input_audio", "input_audio": {}}, text("x")), "unknown_media", "'input_audio'"),
    "a part of no kind": (said({"sound": "x"}, text("x")), "unknown_media", "keys sound"),
    "a text part with an image": (said({"type": "text", "text": "x", "image": "a.png"}), "contradiction", "'image'"),
    "an image part with a text": (said({"type": "image", "text": "x", "image": "a.png"}), "contradiction", "text"),
    "more places than images": (
        said({"type": "image", "path": "b.png"}, {"type": "image"}, {"type": "image"}, text("x"), images=["a.png"]),
        "contradiction",
        "2 image tags or parts",
    ),
    "a video in a turn": ({"conversations": [PLAIN[0] | {"video": "a.mp4"}, PLAIN[1]]}, "unknown_media", "entry 0"),
    "a video's tag": (said("<video>\nWhat?"), "unknown_media", "<video>"),
    "an image with a number": (said("Compare with <image 1>."), "unknown_media", "<image 1>"),
    "a path in the text": (said("Picture 1: <img>a.png</img>\nWhat?"), "unknown_media", "<img>a.png</img>"),
    "another system's image": (said("<img>a.png</img>What?"), "unknown_media", "<img>a.png</img>"),
    "and its number": (said("What is on <|image_1|>?", image="a.png"), "unknown_media", "<|image_1|>"),
    "an answer that is not to be learnt": (
        {"conversations": [PLAIN[0], PLAIN[1] | {"weight": 0}]},
        "bad_turns",
        "weight 0",
    ),
    "an answer of half the weight": (
        {"conversations": [PLAIN[0], PLAIN[1] | {"weight": 0.5}]},
        "bad_turns",
        "weight 0.5",
    ),
    "an answer without loss": ({"conversations": [PLAIN[0], PLAIN[1] | {"loss": False}]}, "bad_turns", "loss false"),
    "thoughts": (
        {"conversations": [PLAIN[0], PLAIN[1] | {"reasoning_content": "Hm."}]},
        "bad_turns",
        "'reasoning_content'",
    ),
}


@pytest.mark.parametrize(("record", "reason", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(record, reason, words):
    with pytest.raises(BadRecord) as e:
        understand(json.loads(json.dumps(record)), 3, "f.json, record 3")
    assert e.value.reason == reason
    assert words in str(e.value) and str(e.value).startswith("f.json, record 3")
    assert str(e.value).isprintable() and len(str(e.value)) < 400


@pytest.mark.parametrize("value", [5, None, [], "x", True, [TURNS]])
def test_what_is_no_object(value):
    with pytest.raises(BadRecord, match="must be an object"):
        understand(value, 0, "f.json, record 0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every record above that can be in one file, two images and a tokenizer."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "a.png").write_bytes(RED)
    (folder / "b.png").write_bytes(png("blue", (5, 9)))
    good = {name: record for name, (record, *_) in UNDERSTOOD.items() if name != "a file's address"}
    bad = {name: record for name, (record, *_) in REFUSED.items()}
    records = [{"id": name, **record} for name, record in (good | bad).items()]
    (folder / "all.json").write_text(json.dumps(records))
    train_tokenizer(["Which colour? Red.", "Same? No. Be brief."] * 20, folder / "tokenizer", 300)
    return folder


def configured(folder, data, template="phi3"):
    sizes = {"max_length": 300, "max_question_length": 100, "max_rounds": 2, "batch_size": 4, "max_images": 2}
    model = tiny(**{"llm.vocab_size": 640})
    stages = (StageConfig("one", str(folder / data), **sizes),)
    return RunConfig(model, stages, str(folder / "tokenizer"), template=template, max_bad_records=1.0)


def examples(folder, data, template="phi3"):
    """What training makes of each record, by its id: ids, labels, question and crops, or why there is nothing."""
    config = configured(folder, data, template)
    source, maker = open_source(config, config.stages[0]), ExampleMaker(config.model, tokenizer_of(folder), template)
    found = {}
    for i in range(len(source)):
        try:
            record = source[i]
            made = maker(record)
            crops = None if made.crops is None else made.crops.tobytes()
            found[record.id] = (made.input_ids.tolist(), made.labels.tolist(), made.question_ids.tolist(), crops)
        except BadRecord as bad:
            found[bad.where.partition("(id ")[2][:-1]] = bad.reason
    return found


def tokenizer_of(folder):
    return load_tokenizer(folder / "tokenizer")


def test_training_conversion_and_inspection_read_the_same(folder):
    direct = examples(folder, "all.json")
    expected = {name: reason for name, (_, reason, _) in REFUSED.items()}
    assert {name: made for name, made in direct.items() if isinstance(made, str)} == expected
    assert len(direct) == len(UNDERSTOOD) - 1 + len(REFUSED)
    assert direct["system"] == direct["system turn"] != direct["no system"] == direct["null beside"]
    manifest = shard_writing.convert(folder / "all.json", None, folder / "shards", max_bad_records=1.0, progress=False)
    assert manifest["skipped"]["reasons"] == Counter(expected.values())
    stored = examples(folder, "shards")
    assert stored == {name: made for name, made in direct.items() if not isinstance(made, str)}
    assert check_shards(folder / "shards", progress=False) == []
    for data, bad in (("all.json", Counter(expected.values())), ("shards", {})):
        config = configured(folder, data)
        opened = open_stage(config, config.stages[0], tokenizer_of(folder))
        sample = draw_sample(opened, 0, 100, progress=False)
        reasons = {one["reason"]: one["count"] for one in summary(opened, sample)["bad_records"]}
        assert reasons == bad


def test_a_system_text_takes_the_place_of_the_templates(folder):
    phi3 = TEMPLATES["phi3"]
    got = encode_conversation(PLAIN, tokenizer_of(folder), phi3, 0, system="Be brief.", latents=False)
    assert got.prompt.startswith("<|system|>\nBe brief.<|end|>\n<|user|>\nWhich colour?")
    prompt = encode_prompt(PLAIN[:1], tokenizer_of(folder), phi3, 0, system="Be brief.", latents=False)
    assert prompt.input_ids.tolist() == got.input_ids[: len(prompt.input_ids)].tolist()
    assert encode_conversation(PLAIN, tokenizer_of(folder), phi3, 0).prompt.startswith("<|system|>\nYou are")
    for encode, turns in ((encode_conversation, PLAIN), (encode_prompt, PLAIN[:1])):
        with pytest.raises(BadRecord, match=r"a\.json, record 1.*phi3") as e:
            frameless = dataclasses.replace(phi3, system_frame=None)
            encode(turns, tokenizer_of(folder), frameless, 0, system="Be brief.", where="a.json, record 1")
        assert e.value.reason == "system_turn"
