"""The exported processor as people use it: prompts as texts, images of every kind, padding, cutting, pipelines."""

import base64
import copy
import functools
import http.server
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import pytest
import sentencepiece
import tokenizers
from helpers import fixtures
from helpers.exported_model import CHATS, export, messages, picture, torch, transformers
from PIL import Image

from fusion_jax.data import conversation
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.image import load_image, read_crops, read_tiles, static_hd_crops
from fusion_jax.data.layout import Example, lay_out, measure
from fusion_jax.data.templates import TEMPLATES
from fusion_jax.data.tiles import choose_tiling
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.interop import tokenizer_json
from fusion_jax.interop.torch import image_fusion
from fusion_jax.interop.torch.folder import write_side_files
from fusion_jax.interop.torch.image_fusion import static_views, to_rgb
from fusion_jax.interop.torch.text_fusion import SentencePieceText
from fusion_jax.synth.tokenizer import train_tokenizer

WAYS = ({"add_generation_prompt": True}, {"add_generation_prompt": False}, {"continue_final_message": True})
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [text for rounds in CHATS.values() for r in rounds for text in r if text]
    return load_tokenizer(train_tokenizer(texts * 20, tmp_path_factory.mktemp("tokenizer"), 300))


@pytest.fixture(scope="module")
def processors(tokenizer, tmp_path_factory):
    """By preset; template phi3."""

    @functools.cache
    def load(preset, **changes):
        config = fixtures.tiny(preset, **{"llm.vocab_size": tokenizer.vocab_size}, **changes)
        folder = tmp_path_factory.mktemp("folder")
        write_side_files(folder, config, tokenizer, TEMPLATES["phi3"], "float32")
        return config, transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    return load


def assert_same(inputs, expected):
    assert set(inputs) == set(expected)
    for key in expected:
        assert torch.equal(inputs[key], expected[key]), key


def chat(part, question="What is red?", answer=None):
    turns = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
    return turns + [{"role": "assistant", "content": answer}] * (answer is not None)


def test_the_first_question_alone_guides_if_the_model_says_so(processors):
    first, later = chat({"type": "image", "image": picture(0)}), [{"role": "assistant", "content": "A ball."}]
    later = [*first, *later, {"role": "user", "content": "Where?"}]
    for guide, same in (("first_round", True), ("all_rounds", False)):
        _, processor = processors("paper", guide=guide)
        one, two = (processor([turns], padding=True)["question_ids"] for turns in (first, later))
        assert (torch.as_tensor(one).tolist() == torch.as_tensor(two).tolist()) == same


# Prompts as texts.


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_rendered_prompt_gives_the_inputs_of_its_conversation(processors, preset):
    _, processor = processors(preset)
    image = picture(0)
    chats = [messages(rounds, image) for rounds in CHATS.values() if "<image>" in str(rounds) or "text" in str(rounds)]
    chats += [chat({"type": "image", "image": image}, "  What is  red?\n", " A ball. ")]
    chats += [[{"role": "system", "content": "Be brief."}, *chat({"type": "image", "image": image}, "And?")]]
    chats += [messages(CHATS["text only"])]
    for one in chats:
        for ways in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
            {"continue_final_message": True},
        ):
            if "continue_final_message" in ways and one[-1]["role"] == "user":
                continue
            inputs = processor.apply_chat_template(one, tokenize=True, return_dict=True, return_tensors="pt", **ways)
            text = processor.apply_chat_template(one, tokenize=False, **ways)
            own = [image] if "<image>" in text else None
            assert_same(processor(text=[text], images=own, padding=True, truncation=True, max_length=4096), inputs)
            assert ("labels" in inputs) == (one[-1]["role"] == "assistant" and "continue_final_message" not in ways)
    # Together, their images one behind the other, in a list each, and as one list of lists.
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in chats]
    listed = [[image] if "<image>" in text else [] for text in texts]
    together = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    assert_same(processor(text=texts, images=listed, padding=True), together)
    assert_same(processor(text=texts, images=[image for own in listed for image in own], padding=True), together)


def test_what_a_text_may_be(processors, tokenizer):
    _, processor = processors("paper")
    image, prompt = picture(0), chat({"type": "image", "image": picture(0)})
    expected = processor(prompt)
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    for written in (text, "<s>" + text, "What is red?", "<image>\nWhat is red?", "<image>What is red?"):
        assert_same(processor(text=written, images=image), expected)
    assert_same(processor([image], [text]), expected)  # the order of other processors
    # An answer, as trainers give it beside its prompt: the ids of the whole conversation.
    whole = processor(chat({"type": "image", "image": image}, answer="A ball."))
    answer = processor(text="A ball.<|end|>", add_special_tokens=False)
    assert set(answer) == {"input_ids", "attention_mask"}
    length = expected["input_ids"].shape[1]
    assert torch.equal(torch.cat([expected["input_ids"], answer["input_ids"]], 1), whole["input_ids"])
    assert torch.equal(whole["labels"][:, length:], answer["input_ids"]) and (whole["labels"][:, :length] == -100).all()
    for wrong, given, said in (
        (text.replace("<image>", ""), image, "no place for its image"),
        (text, None, "there is no image"),
        ("Here: " + text, image, "does not begin as this model's prompts do"),
        ([], None, "no conversation"),
        ([text, text, text], [image, image], "2 images for 3"),
    ):
        with pytest.raises(ValueError, match=said):
            processor(text=wrong, images=given)
    with pytest.raises(TypeError, match="no argument paddding"):
        processor(text=text, images=image, paddding=True)
    with pytest.raises(ValueError, match="does not support tools"):
        processor.apply_chat_template(prompt, tools=[{"name": "f"}])


# Images.


@pytest.fixture(scope="module")
def server():
    data = io.BytesIO()
    picture(0).save(data, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = urllib.parse.unquote(self.path)
            self.send_response(200 if name in ("/a.png", "/ä b.png", "/slow.png") else 404)
            self.end_headers()
            if name == "/slow.png":
                for byte in data.getvalue()[:100]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            self.wfile.write(data.getvalue())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/a.png", data.getvalue()
        listening.shutdown()


def test_images_of_every_kind(processors, server, tmp_path):
    _, processor = processors("released")
    url, data = server
    path = tmp_path / "ä b.png"
    path.write_bytes(data)
    text, array = base64.b64encode(data).decode(), np.asarray(picture(0))
    expected = processor(chat({"type": "image", "image": picture(0)}))
    first, folded = (
        torch.from_numpy(array.transpose(2, 0, 1).copy()),
        "\n".join(text[k : k + 76] for k in range(0, 9**4, 76)),
    )
    kinds = [
        picture(0),
        array,
        array.transpose(2, 0, 1),
        array / np.float32(255),
        first,
        first.float() / 255,
        first[None],
    ]
    kinds += [
        array.astype(np.int64),
        data,
        bytearray(data),
        io.BytesIO(data),
        path,
        str(path),
        url,
        path.as_uri(),
        text,
    ]
    kinds += [folded, text.rstrip("="), "data:image/png;base64," + text, "DATA:image/PNG;BASE64,\n" + folded]
    kinds += [{"bytes": data, "path": None}, {"path": str(path)}, {"url": url}]
    for kind in kinds:
        assert_same(processor(chat({"type": "image"}), images=[kind]), expected)
        assert_same(processor(chat({"type": "image", "image": kind})), expected)
    parts = [{"type": "image", "url": url}, {"type": "image", "path": str(path)}, {"type": "image", "base64": text}]
    parts += [{"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": url}]
    for part in parts:
        assert_same(processor(chat(part)), expected)
        assert_same(processor.apply_chat_template(chat(part), tokenize=True, add_generation_prompt=True), expected)
    for wrong, said in (
        (np.zeros((5, 7, 9, 2), np.uint8), "shape"),
        (np.full((5, 7, 3), -1.0), "below 0"),
        (np.full((5, 7, 3), 70000), "which value is white"),
        (b"GIF87", "Cannot read the image"),
        (3.5, "A float is not an image"),
        ("data:image/png;base64,%%%", "does not hold base64"),
    ):
        with pytest.raises(ValueError, match=said):
            processor(chat({"type": "image"}), images=[wrong])
    with pytest.raises(OSError, match="404"):
        processor(chat({"type": "image", "url": url + "x"}))
    with pytest.raises(OSError, match=r"none\.png"):
        processor(chat({"type": "image", "path": "none.png"}))


def test_urls_as_people_write_them(server, monkeypatch):
    url, _ = server
    for written in (f" {url}\n", url.replace("http", "HTTP"), url.replace("a.png", "ä b.png")):
        assert to_rgb(written).size == picture(0).size
    for wrong, said in ((url + "x", "x: HTTP Error 404"), ("http://", "no host"), ("http://127.0.0.1:1/a", "refused")):
        with pytest.raises(OSError, match=f"Cannot fetch the image .*{said}"):
            to_rgb(wrong)
    with pytest.raises(ValueError, match="another machine"):
        to_rgb("file://elsewhere/a.png")
    monkeypatch.setattr(image_fusion, "URL_SECONDS", 0.2)
    with pytest.raises(OSError, match=r"slow\.png: it takes longer"):  # though no byte keeps it waiting for long
        to_rgb(url.replace("a.png", "slow.png"))


def test_parts_with_more_and_with_less_than_they_need(processors):
    _, processor = processors("paper")
    image, text = picture(0), {"type": "text", "text": "What is red?", "image": None}
    expected = processor([chat({"type": "image", "image": image}), messages([("Hi", None)])])
    for part in (
        {"type": "image", "index": 0},
        {"type": "image", "text": None},
        {"type": "image_url", "detail": "low"},
    ):
        chats = [[{"role": "user", "content": [part, text]}], messages([("Hi", None)])]
        for images in ([image], [[image], []], [[image], [None]], [image, None]):
            assert_same(processor(chats, images=images), expected)
    for wrong, said in (
        ([{"role": "user", "content": [{"type": "text"}]}], "has None as its text"),
        ([{"role": "user", "content": ["Hi"]}], "type is 'str'"),
        ([["Hi"]], "A message is 'Hi'"),
        (chat({"type": "image", "image": Image.new("RGB", (0, 5))}), "0 x 5 pixels|2 images"),
    ):
        for images in (None, [image]):
            with pytest.raises(ValueError, match=said):
                processor(wrong, images=images)


def files(folder):
    """A file of every kind that could be read in another way, and upright, flat and tiny ones."""
    rng = np.random.default_rng(0)
    noise = lambda w, h: Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))  # noqa: E731
    upright, ramp = noise(37, 91), np.linspace(0, 65535, 40 * 30).reshape(40, 30).astype(np.uint16)
    for k, size in enumerate(
        [(1, 1), (1, 300), (300, 1), (7, 400), (400, 7), (24, 48), (25, 24), (480, 640), (640, 480)]
    ):
        noise(*size).save(folder / f"size{k}.png")
    for turn in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = turn
        for end in ("jpg", "tif", "webp", "png"):
            upright.save(folder / f"turned{turn}.{end}", exif=exif)
    palette = upright.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(folder / "palette.png", transparency=bytes(range(256)))
    palette.save(folder / "palette.gif", transparency=3)
    rgba = Image.merge("RGBA", [*upright.split(), upright.getchannel(0)])
    for mode, ends in {
        "RGBA": ("png", "webp", "tif"),
        "LA": ("png",),
        "1": ("png", "tif", "bmp"),
        "CMYK": ("jpg", "tif"),
    }.items():
        for end in ends:
            rgba.convert(mode).save(folder / f"{mode}.{end}")
    Image.fromarray(ramp).save(folder / "grey16.png")
    Image.fromarray(ramp.astype(np.int32)).save(folder / "grey32.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(folder / "fractions.tif")
    (folder / "grey16.pgm").write_bytes(b"P5 30 40 65535\n" + ramp.astype(">u2").tobytes())
    (folder / "hundred.ppm").write_bytes(b"P6 37 91 100\n" + (np.asarray(upright) % 101).tobytes())
    (folder / "text.ppm").write_bytes(b"P3\n# said\n2 1\n255\n1 2 3 4 5 6")
    for end in ("gif", "webp", "png", "tif"):
        upright.save(folder / f"frames.{end}", save_all=True, append_images=[noise(37, 91)])
    upright.save(folder / "a.jp2")
    return sorted(folder.iterdir())


def test_crops_of_every_kind_of_file_are_those_of_training(tmp_path):
    for path in files(tmp_path):
        expected = read_crops(path, 24)
        assert np.array_equal(static_views(path, 24, True), expected), path.name
        with Image.open(path) as opened:
            transparency = opened.info.get("transparency")
            assert np.array_equal(static_views(opened, 24, True), expected), path.name
            assert opened.info.get("transparency") == transparency
        assert np.array_equal(static_hd_crops(load_image(path), 24), expected), path.name


def test_images_in_memory_of_every_mode():
    image = picture(0)
    for mode in ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBa", "I", "F"):
        made = image.convert("RGBA" if mode == "RGBa" else "L" if mode in "IF" else mode)
        made = made.convert(mode)
        expected = made.convert("L").convert("RGB") if mode in "IF" else made.convert("RGB")
        assert np.array_equal(np.asarray(to_rgb(made)), np.asarray(expected)), mode


# Batches.


def test_padding_and_kinds_of_tensors(processors):
    _, processor = processors("paper")
    chats = [chat({"type": "image", "image": picture(0)}), [{"role": "user", "content": "How are you?"}]]
    inputs = processor(chats)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert inputs["attention_mask"][1, 0] == 0 == 1 - inputs["attention_mask"][1, -1]  # left
    assert processor(chats, padding_side="right")["attention_mask"][1, 0] == 1
    assert processor(chats, padding="max_length", max_length=200)["input_ids"].shape == (2, 200)
    assert processor(chats, pad_to_multiple_of=64)["input_ids"].shape[1] % 64 == 0
    assert_same(processor(chats, text_kwargs={"padding_side": "right"}), processor(chats, padding_side="right"))
    assert_same(
        processor.apply_chat_template(
            chats, tokenize=True, add_generation_prompt=True, processor_kwargs={"padding": True}
        ),
        inputs,
    )
    with pytest.raises(ValueError, match="different lengths make no tensor"):
        processor(chats, padding=False)
    lists = processor(chats, padding=False, return_tensors=None)
    assert [len(row) for row in lists["input_ids"]] == lengths and isinstance(lists["input_ids"][0][0], int)
    arrays = processor(chats, return_tensors="np")
    assert all(np.array_equal(arrays[key], inputs[key].numpy()) for key in inputs)
    for wrong in ({"return_tensors": "tf"}, {"padding": "most"}, {"padding": "max_length"}, {"padding_side": "top"}):
        with pytest.raises(ValueError, match=r"not supported|not known|needs max_length"):
            processor(chats, **wrong)
    # The places of visual tokens count from the row's first token on, wherever it stands.
    right = processor(chats, padding_side="right")
    assert torch.equal(right["visual_index"], inputs["visual_index"])
    visual = right["visual_index"] >= 0
    assert (right["input_ids"][visual] == processor.image_token_id).all()


def test_cutting_never_goes_through_an_image_or_a_question(processors):
    _, processor = processors("paper")
    image = {"type": "image", "image": picture(0)}
    full = processor([*chat(image, answer="A ball."), *messages([("And where?", "On a shelf.")])])
    second = int(full["round_end"][0, 1])
    cut = functools.partial(processor, truncation=True)
    both = [*chat(image, answer="A ball."), *messages([("And where?", "On a shelf.")])]
    for limit in (second + 2, full["input_ids"].shape[1] - 1, full["input_ids"].shape[1]):
        some = cut(both, max_length=limit)
        for key in ("input_ids", "labels", "visual_index", "attention_mask"):
            assert torch.equal(some[key], full[key][:, :limit]), (limit, key)
        assert torch.equal(some["round_end"], full["round_end"])
    once = processor(chat(image, answer="A ball."))
    for limit in (second + 1, once["input_ids"].shape[1]):
        some = cut(both, max_length=limit)
        assert torch.equal(some["input_ids"], once["input_ids"]) and some["latent_start"].shape == (1, 1)
        assert torch.equal(some["labels"], once["labels"])
    with pytest.raises(ValueError, match="cut its image and the question after it"):
        cut(both, max_length=int(full["round_end"][0, 0]))
    with pytest.raises(ValueError, match="cut its last question"):
        cut(chat(image), max_length=30)
    assert_same(processor(chat(image), max_length=30), processor(chat(image)))


def test_masks_of_answers(processors):
    """As trainers ask for them: lists, and the end of an answer belongs to it."""
    _, processor = processors("paper")
    both = [*chat({"type": "image", "image": picture(0)}, answer="A ball."), {"role": "user", "content": "Where?"}]
    asked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(both, **asked)
    [ids], [mask] = inputs["input_ids"], inputs["assistant_masks"]
    assert processor.decode([i for i, real in zip(ids, mask) if real]) == "A ball.<|end|>"
    assert "generation" in processor.chat_template
    closed = processor.apply_chat_template(both[:2], **asked, return_tensors="pt")
    assert torch.equal(closed["labels"] >= 0, closed["assistant_masks"].bool())


# Dynamic resolution.


def test_tiles_are_those_of_training(processors, tokenizer, tmp_path):
    config, processor = processors("paper", tile_grids=GRIDS, tile_tokens=4)
    template, size, side = TEMPLATES["phi3"], config.vision.image_size, math.isqrt(config.tokens_per_tile)
    examples, chats = [], []
    for k, shape in enumerate([(90, 31), (20, 77), (64, 60), (24, 24)]):
        path = tmp_path / f"{k}.png"
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (shape[1], shape[0], 3), np.uint8)).save(path)
        more = [("gpt", "A ball."), ("human", "Where?")] * (k % 2)
        turns = [{"from": who, "value": text} for who, text in (("human", "What is red?"), *more)]
        encoded = conversation.encode_prompt(turns, tokenizer, template, 1)
        tiling = choose_tiling(shape, config.tile_grids, size)
        crops = read_tiles(path, tiling, size)
        examples.append(Example(encoded.input_ids, None, encoded.instructs, crops[:, None], tilings=(tiling,)))
        more = [{"role": "assistant", "content": "A ball."}, {"role": "user", "content": "Where?"}] * (k % 2)
        chats.append([*chat({"type": "image", "path": str(path)}), *more])
    inputs = processor(chats, padding_side="right")
    spec = functools.partial(layout_spec, config, question_length=max(len(e.question_ids) for e in examples), rounds=2)
    length = max(measure(e, spec(length=1), 4).length for e in examples)
    batch = lay_out(examples, spec(length=length), config.fixed_latent_count)
    text = torch.from_numpy(batch.visual_index) < 0
    assert torch.equal(inputs["attention_mask"], torch.from_numpy((batch.segment_ids > 0).astype(np.int64)))
    assert torch.equal(inputs["visual_index"] < 0, text)
    real = text & inputs["attention_mask"].bool()
    assert torch.equal(inputs["input_ids"][real].int(), torch.from_numpy(batch.tokens)[real])
    assert torch.equal(inputs["latent_start"].int(), torch.from_numpy(batch.latent_start))
    assert inputs["pixel_values"].shape[2] == 1 + 4 and {len(e.crops) for e in examples} == {1, 3, 5}
    for k, example in enumerate(examples):
        views, (tiling,) = inputs["pixel_values"][k, 0], example.tilings
        levels = torch.round((views + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(levels[-1], example.crops[0, 0])
        assert np.array_equal(levels[: tiling.rows * tiling.columns], example.crops[1:, 0])
        assert (views[tiling.rows * tiling.columns : -1] == 0).all()
        box = tiling.box(size, side) if tiling.rows else (0,) * 4
        assert inputs["tilings"][k, 0].tolist() == [tiling.rows, tiling.columns, *box]
        index = inputs["visual_index"][k]
        room = config.tokens_per_image + 2 * side * (2 * side + 1)  # the most tokens that tiles take
        assert index[(index >= 0) & (index < room)].tolist() == list(range(spec(length=1).tokens_of(tiling)))
        latents = index[index >= room] - room
        assert latents.tolist() == list(range((1 + k % 2) * config.fixed_latent_count))


def test_copies_and_workers_prepare_as_the_processor_does(processors):
    """Loaders send it to their processes."""
    _, processor = processors("paper")
    expected = processor(chat({"type": "image", "image": picture(0)}))
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert_same(other(chat({"type": "image", "image": picture(0)})), expected)


# Tokenizers.


def test_tokenizer_json_gives_the_ids_of_training(processors, tokenizer):
    _, processor = processors("paper")
    assert not processor.sentencepiece
    texts = list(tokenizer_json._trials(tokenizer))[:1500]
    got = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, got):
        assert ids == tokenizer.encode(text), repr(text)
    ids = processor.tokenizer("A ball.")["input_ids"]
    assert ids == [tokenizer.bos_id, *tokenizer.encode("A ball.")]


@pytest.mark.parametrize("strips", [{}, {"lstrip": True}, {"rstrip": True}], ids=str)
def test_tokenizer_json_with_an_added_token_that_is_not_special(tokenizer, tmp_path, strips):
    """As Phi-3's "</s>"; and with tokens that somebody adds later, in the middle of a text too."""
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    new = {"content": "<place>", "normalized": False, "special": False, **dict.fromkeys(("lstrip", "rstrip"), False)}
    config.setdefault("added_tokens_decoder", {})[str(tokenizer.vision_start_id)] = new | strips
    path.write_text(json.dumps(config))
    own = load_tokenizer(tmp_path)
    text = tokenizer_json.tokenizer_json(own)
    assert text is not None
    made = tokenizers.Tokenizer.from_str(text)
    made.add_tokens(["[later]"])
    for sample in ("A <place> ball.", "<place> ball", "  red", "A ball."):
        assert made.encode(sample, add_special_tokens=False).ids == own.encode(sample), sample
    for sample in ("A [later] ball.", "[later]", "ball[later]", "<place>[later] ball."):
        assert made.encode(sample).ids.count(made.token_to_id("[later]")) == 1, sample


def test_a_model_without_an_exact_tokenizer_json_keeps_its_own(tokenizer, tmp_path):
    """One that folds characters and joins spaces: the folder says that it needs sentencepiece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["A ball is on the shelf.", "What is red? Where is it?"] * 20),
        model_writer=model,
        vocab_size=24,
        model_type="unigram",
        minloglevel=2,
    )
    tokenizer.save(tmp_path / "own")
    (tmp_path / "own" / "tokenizer.model").write_bytes(model.getvalue())
    other = load_tokenizer(tmp_path / "own")
    assert tokenizer_json.tokenizer_json(other) is None
    # What the processor then does, with a token that somebody adds after loading.
    beside = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    beside.add_tokens([word for word, _ in sorted(other.added.items(), key=lambda item: item[1])], special_tokens=True)
    texts = SentencePieceText(model.getvalue(), beside)
    assert texts("What is red?") == other.encode("What is red?")
    beside.add_tokens(["[later]"])
    assert beside.convert_tokens_to_ids("[later]") in texts("What [later] is red?")
    assert tokenizer_json.tokenizer_json(tokenizer) is not None


# transformers' pipeline.


def test_the_pipeline_answers_as_generate_does(tokenizer, tmp_path):
    config = fixtures.tiny("paper", **{"llm.vocab_size": tokenizer.vocab_size})
    model = export(tmp_path, config, fixtures.params(config), tokenizer, TEMPLATES["phi3"])
    pipe = transformers.pipeline("image-text-to-text", str(tmp_path), trust_remote_code=True)
    image = picture(0)
    image.save(tmp_path / "a.png")
    # No single bytes: several that are no UTF-8 are decoded together with the prompt's.
    ways = {"max_new_tokens": 4, "suppress_tokens": list(range(259))}
    inputs = pipe.processor(chat({"type": "image", "image": image}))
    ids = model.generate(**inputs, **ways)[:, inputs["input_ids"].shape[1] :]
    [expected] = pipe.processor.batch_decode(ids, skip_special_tokens=True)
    given = {"generate_kwargs": ways, "return_full_text": False}
    own = chat({"type": "image", "image": image})
    assert pipe(text=own, **given)[0]["generated_text"] == expected
    assert pipe(text=chat({"type": "image", "url": str(tmp_path / "a.png")}), **given)[0]["generated_text"] == expected
    assert pipe(images=image, text="<image>\nWhat is red?", **given)[0]["generated_text"] == expected
    assert pipe(text=own, generate_kwargs=ways)[0]["generated_text"][-1]["content"] == expected
    assert len(pipe(text=[own, own], **given)) == 2
    begun = pipe(text=[*own, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}], generate_kwargs=ways)
    assert begun[0]["generated_text"][-1]["content"][0]["text"].startswith("A")


ALONE = """
import sys

for name in ("jax", "jaxlib", "flax", "grain", "orbax", "fusion_jax"):
    sys.modules[name] = None  # importing it fails

from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
part = {"type": "image", "path": sys.argv[2]}
inputs = processor([{"role": "user", "content": [part, {"type": "text", "text": "What is red?"}]}])
print(model.generate(**inputs, max_new_tokens=4)[0].tolist())
"""


def test_an_exported_folder_opens_where_this_package_cannot_be_imported(tokenizer, tmp_path):
    config = fixtures.tiny("paper", **{"llm.vocab_size": tokenizer.vocab_size})
    folder, image = tmp_path / "exported", tmp_path / "a.png"
    folder.mkdir()
    model = export(folder, config, fixtures.params(config), tokenizer, TEMPLATES["phi3"])
    for file in folder.glob("*.py"):
        imports = [line for line in file.read_text().splitlines() if re.match(r"\s*(from|import) fusion_jax\b", line)]
        assert not imports, (file.name, imports)
    picture(0).save(image)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", ALONE, str(folder), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(chat({"type": "image", "path": str(image)}))
    assert json.loads(done.stdout.splitlines()[-1]) == model.generate(**inputs, max_new_tokens=4)[0].tolist()
