"""The exported PyTorch model and processor, loaded as users load them, against published tensors and the JAX model."""

import dataclasses
import functools
import json
import os
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import jinja2
import numpy as np
import pytest
import tokenizers
from helpers import fixtures, goldens
from helpers.exported_model import (
    CHATS,
    assert_close,
    export,
    messages,
    named_tensors,
    picture,
    torch,
    torch_inputs,
    transformers,
)
from PIL import Image

from fusion_jax.data import chat_template, conversation, image
from fusion_jax.data.conversation import ANSWER_START, LATENTS
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.image import static_hd_crops
from fusion_jax.data.layout import Example, lay_out, measure
from fusion_jax.data.render_chat import _Generation as Generation
from fusion_jax.data.templates import TEMPLATES, stop_ids
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.inference import generate
from fusion_jax.interop.torch.folder import chat_template as jinja_text
from fusion_jax.interop.torch.folder import write_side_files
from fusion_jax.models.config import RopeConfig
from fusion_jax.models.fusion import Fusion
from fusion_jax.models.llm import LLMConfig
from fusion_jax.synth.tokenizer import train_tokenizer


def mixed_batch(config):
    """One round, two rounds, text only, another image; rows of different lengths."""
    kinds = [{}, {"rounds": 2, "question": 3}, {"image": False, "answer": 2}, {"question": 2, "answer": 1}]
    return fixtures.lay(config, [fixtures.example(config, seed, **kind) for seed, kind in enumerate(kinds)])


# Published tensors.


@pytest.fixture(scope="module", params=goldens.CASES or [pytest.param("", marks=goldens.needs_goldens)])
def golden_model(request, tmp_path_factory):
    config, params = goldens.load_weights(request.param)
    return request.param, export(tmp_path_factory.mktemp(request.param), config, params)


@pytest.mark.parametrize("file", goldens.MASKS)
def test_published_outputs(golden_model, file):
    case, model = golden_model
    golden = goldens.load(case, file)
    model.config.mask = golden.config.mask
    with torch.no_grad():
        out = model(**torch_inputs(golden.batch))
    assert_close(out.logits, golden.io["out_logits"], 2e-4, golden.io["out_attention_mask"].astype(bool))
    for ours, theirs in (("loss", "out_loss"), ("ce", "out_ce"), ("v2t", "out_l_v2t"), ("t2v", "out_l_t2v")):
        assert abs(float(out[ours]) - float(golden.io[theirs])) <= 1e-5, ours


@pytest.mark.parametrize("file", goldens.MASKS)
def test_published_generation(golden_model, file):
    case, model = golden_model
    golden = goldens.load(case, file)
    model.config.mask = golden.config.mask
    crops = golden.io["images_uint8_48"][0].repeat(8, axis=2).repeat(8, axis=3).transpose(0, 2, 3, 1)
    prompt = golden.io["gen_prompt"][0].astype(np.int32)
    example = Example(prompt, None, golden.io["instructs"][0].astype(np.int32), crops)
    count = golden.config.latent_counts[0]
    length = len(prompt) - 2 + golden.config.tokens_per_image + count
    spec = goldens.layout_spec(golden.config, length, golden.io["instructs"].shape[1], 1)
    inputs = torch_inputs(lay_out([example], spec, count), labels=False)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    np.testing.assert_array_equal(out.sequences[:, length:], golden.io["gen_tokens"])
    assert_close(torch.stack(out.logits, 1), golden.io["gen_logits"], 2e-4)


# The JAX model.

# Of the prompts below one is longer, one becomes so with its answer, and one does not.
LONGROPE = RopeConfig(
    "longrope", original_length=20, max_length=80, short_factors=(1.0, 1.5, 2.0), long_factors=(3.0, 5.0, 9.0)
)
# Every option in some model; windows of 5x5 patches in 2x2 cells overlap.
MODELS = {
    "paper": fixtures.tiny("paper", **{"vision.image_size": 40}),
    "released": fixtures.tiny("released"),
    "options": fixtures.tiny(
        "paper",
        mask="none",
        image_tokens=9,
        **{"vision.image_size": 32, "exchange.layers": 1, "llm.tied_head": True, "llm.qkv_bias": True},
        **{"llm.sliding_window": 5, "llm.head_dim": 6, "llm.rope": LONGROPE},
    ),
    "bare": fixtures.tiny(
        "paper", text_guided=False, mapping_loss_weight=0.0, semantic_exchange=False, taps="released"
    ),
}


@functools.cache
def tiny_model(name):
    with tempfile.TemporaryDirectory() as folder:
        return export(Path(folder), MODELS[name], fixtures.params(MODELS[name]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_jax(name, side):
    config, model = MODELS[name], tiny_model(name)
    params, batch = fixtures.params(config), mixed_batch(config)
    inputs = torch_inputs(batch, side)
    out = model(**inputs)
    (loss, parts), grads = fixtures.grad_fn(config)(params, batch)
    hidden, _ = fixtures.forward_fn(config)(params, batch)
    logits = Fusion(config).apply({"params": params}, hidden, method="logits")
    assert_close(out.logits[inputs["attention_mask"].bool()], np.asarray(logits)[batch.segment_ids > 0], 2e-4)
    for key, expected in {"loss": loss, **parts}.items():
        assert abs(float(out[key].detach()) - float(expected)) <= 1e-5, key
    if side == "left":
        return
    model.zero_grad()
    out.loss.backward()
    ours = {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}
    for key, expected in named_tensors(config, grads).items():
        np.testing.assert_allclose(ours.get(key, 0.0), expected, rtol=1e-3, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, inputs = tiny_model("released"), torch_inputs(mixed_batch(MODELS["released"]))

    def gradients():
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    parts = model.model
    encoder = parts.vision_tower["vision_tower"]["vision_model"].encoder
    watched = (encoder["layers"][0], parts.layers[0], parts.vision_sampler_layers[0])
    calls = []
    handles = [m.register_forward_pre_hook(lambda module, _: calls.append(module)) for m in watched]
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    try:
        model.train()
        actual = gradients()
    finally:
        for handle in handles:
            handle.remove()
        model.eval()
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.disable_input_require_grads()
    assert [calls.count(module) for module in watched] == [4, 2, 2]  # twice each; the encoder sees two kinds of views
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-6, msg=name)


def test_text_only_batch_needs_no_visual_inputs():
    config, model = MODELS["paper"], tiny_model("paper")
    batch = fixtures.lay(config, [fixtures.example(config, s, image=False) for s in (0, 1)])
    inputs = torch_inputs(batch)
    with torch.no_grad():
        full = model(**inputs)
        encoder = model.model.vision_tower["vision_tower"]["vision_model"]
        handle = encoder.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
        bare = model(**{key: inputs[key] for key in ("input_ids", "attention_mask", "labels")})
        handle.remove()
    torch.testing.assert_close(full.logits, bare.logits)
    torch.testing.assert_close(full.loss, bare.loss)
    assert float(bare.v2t) == float(bare.t2v) == 0


def test_an_image_without_all_that_belongs_to_it_is_refused():
    """It would answer as if it had seen the image."""
    inputs = torch_inputs(mixed_batch(MODELS["paper"]), labels=False)
    needed = {"pixel_values", "visual_index", "question_ids", "question_mask"}
    for name in sorted(needed | {"round_image", "round_end", "latent_start"}):
        with pytest.raises(ValueError, match=f"image without {name}: pass on"):
            tiny_model("paper")(**{key: value for key, value in inputs.items() if key != name})


def prompts(config):
    """One round, two rounds (waiting for the second answer), text only: prompts of different lengths."""

    def cut(example):
        last = example.labels.tolist()[::-1].index(ANSWER_START)
        return dataclasses.replace(example, input_ids=example.input_ids[: len(example.input_ids) - last], labels=None)

    cases = [fixtures.example(config, 0), fixtures.example(config, 1, rounds=2, question=6)]
    return [cut(e) for e in [*cases, fixtures.example(config, 2, image=False, question=9)]]


def lay_prompts(config, examples):
    # A prompt's layout marks its last token only, so earlier rounds' ends are marked as in training.
    marked = []
    for example in examples:
        labels = np.full(len(example.input_ids), -100, np.int32)
        labels[-1] = ANSWER_START
        latents = np.flatnonzero(example.input_ids == LATENTS)
        if len(latents) == 2:
            labels[latents[1] - 5] = ANSWER_START  # answer of three tokens and one between
        marked.append(dataclasses.replace(example, labels=labels))
    return fixtures.lay(config, marked)


@pytest.mark.parametrize("name", ["paper", "released", "options"])
def test_generation_in_a_batch_equals_one_by_one_and_jax(name):
    config, model = MODELS[name], tiny_model(name)
    examples = prompts(config)
    batch = lay_prompts(config, examples)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    inputs = torch_inputs(batch, "left", labels=False)
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    without_cache = model.generate(**inputs, **options, use_cache=False)[:, inputs["input_ids"].shape[1] :]
    np.testing.assert_array_equal(without_cache, together)
    if name == "options":  # with the window and LongRoPE
        reach = inputs["attention_mask"].sum(1) + options["max_new_tokens"] - 1
        kinds = zip(inputs["attention_mask"].sum(1) > LONGROPE.original_length, reach > LONGROPE.original_length)
        assert {(bool(a), bool(b)) for a, b in kinds} == {(False, False), (False, True), (True, True)}
        expected = generate.greedy(Fusion(config), fixtures.params(config), batch, 8, ()).tokens
        np.testing.assert_array_equal(together, expected)
    for i, example in enumerate(examples):
        single = torch_inputs(lay_prompts(config, [example]), labels=False)
        alone = model.generate(**single, **options)[:, single["input_ids"].shape[1] :]
        np.testing.assert_array_equal(alone[0], together[i])


def test_cached_keys_of_the_other_longrope_factors_are_refused():
    """In a loop of one's own, which does not say how long the rows may become."""
    model = tiny_model("options")
    ids = torch.arange(3, 3 + LONGROPE.original_length)[None]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"passes the 20 positions of LongRoPE's short factors.*give.*`reach`"):
            model(ids[:, :1], past_key_values=cache)
        reach = torch.tensor([LONGROPE.original_length + 1])
        cache = model(ids, use_cache=True, reach=reach).past_key_values
        step = model(ids[:, :1], past_key_values=cache, reach=reach).logits[:, -1]
        torch.testing.assert_close(step, model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1])


def test_means_of_states_are_rounded_once():
    """Layers that add nothing: every state is the first one, and so are its means, in bfloat16 to the bit."""
    module = sys.modules[type(tiny_model("paper")).__module__]
    config = module.FusionConfig(vision={"width": 8, "heads": 2, "mlp_dim": 8, "layers": 14, "image_size": 32})
    encoder = module.VisionEncoder(config).to(torch.bfloat16)
    for layer in encoder.encoder["layers"]:
        for last in (layer.self_attn["out_proj"], layer.mlp["fc2"]):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(encoder(x), torch.cat([x, x], -1))


def test_sliding_window_equals_a_dense_mask():
    model = tiny_model("options")
    layer, window, length = model.model.layers[0], MODELS["options"].llm.sliding_window, 12
    module = __import__(type(model).__module__, fromlist=["decoder_mask"])
    attention_mask = torch.ones(2, length, dtype=torch.long)
    attention_mask[0, :3] = 0
    mask, causal = module.decoder_mask(attention_mask, length, window)
    dense = torch.zeros(2, 1, length, length, dtype=torch.bool)
    for b in range(2):
        for q in range(length):
            for k in range(length):
                dense[b, 0, q, k] = k == q or (q - window < k <= q and bool(attention_mask[b, k]))
    assert not causal and torch.equal(mask, dense)
    assert torch.equal(module.decoder_mask(attention_mask, 1, window)[0], dense[:, :, -1:])
    # Nothing outside the window reaches a query.
    torch.manual_seed(0)
    x = torch.randn(2, length, MODELS["options"].llm.width)
    half = LLMConfig.per_head.fget(MODELS["options"].llm) // 2
    cos, sin = torch.ones(1, 1, length, half), torch.zeros(1, 1, length, half)
    changed = x.clone()
    changed[:, : length - window] += 1
    with torch.no_grad():
        torch.testing.assert_close(layer(x, cos, sin, mask, False)[:, -1], layer(changed, cos, sin, mask, False)[:, -1])


def test_bfloat16_and_saving(tmp_path):
    config, model = MODELS["paper"], tiny_model("paper")
    inputs = torch_inputs(mixed_batch(config))
    model.save_pretrained(tmp_path)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16)
    with torch.no_grad():
        out, full = half(**inputs), model(**inputs)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32 and abs(float(out.loss - full.loss)) < 0.1


def test_unknown_latent_count():
    inputs = torch_inputs(mixed_batch(dataclasses.replace(MODELS["paper"], latent_counts=(1,))))
    with pytest.raises(ValueError, match=r"l\^2 = 1; allowed are \[4\]"):
        tiny_model("paper")(**inputs)


# The processor.

HAS_IMAGE = ("image", "two rounds", "late image", "finished")
TOKENIZERS = goldens.GOLDENS.parent / "conversations" / "tokenizers"


def jax_example(config, tokenizer, template, rounds, image) -> tuple[Example, str]:
    turns = [{"from": who, "value": v} for r in rounds for who, v in zip(("human", "gpt"), r) if v is not None]
    encode = conversation.encode_prompt if len(turns) % 2 else conversation.encode_conversation
    encoded = encode(
        turns,
        tokenizer,
        template,
        image is not None,
        latents=config.semantic_exchange,
        latents_without_image=config.text_only == "zero_image",
    )
    crops = None
    if image is not None:
        crops = static_hd_crops(image, config.vision.image_size, config.uses_quadrants)
    question = encoded.instructs if image is not None and config.text_guided else encoded.instructs[:0]
    return Example(encoded.input_ids, encoded.labels, question, crops), encoded.prompt


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory):
    texts = [text for rounds in CHATS.values() for r in rounds for text in r if text]
    return train_tokenizer(texts * 20, tmp_path_factory.mktemp("tokenizer"), 300)


def load_processor(folder):
    return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module", params=["paper", "released"])
def processing(request, small_tokenizer, tmp_path_factory):
    tokenizer, template = load_tokenizer(small_tokenizer), TEMPLATES["phi3"]
    config = fixtures.tiny(request.param, **{"llm.vocab_size": tokenizer.vocab_size})
    folder = tmp_path_factory.mktemp("model")
    model = export(folder, config, fixtures.params(config), tokenizer, template)
    return config, tokenizer, template, load_processor(folder), model


@pytest.mark.parametrize("side", ["left", "right"])
def test_processor_equals_the_pipeline(processing, side):
    config, tokenizer, template, processor, model = processing
    images = [picture(k) if name in HAS_IMAGE else None for k, name in enumerate(CHATS)]
    chats = [messages(rounds, image) for rounds, image in zip(CHATS.values(), images)]
    given = [None if "<image>" in str(r) else [image] if image else None for r, image in zip(CHATS.values(), images)]
    inputs = processor(chats, images=given, padding_side=side)

    made = [jax_example(config, tokenizer, template, r, i) for r, i in zip(CHATS.values(), images)]
    examples, count = [example for example, _ in made], config.fixed_latent_count
    spec = functools.partial(layout_spec, config, question_length=max(len(e.question_ids) for e in examples), rounds=2)
    length = max(measure(e, spec(length=1), count).length for e in examples)
    expected = torch_inputs(lay_out(examples, spec(length=length), count), side)
    assert set(inputs) == set(expected)
    text = expected["attention_mask"].bool()
    text[text.clone()] = torch.cat([line[:n] < 0 for line, n in zip(expected["visual_index"], text.sum(1))])
    for key in expected:
        where = text if key == "input_ids" else torch.ones_like(expected[key], dtype=torch.bool)
        assert inputs[key].dtype == expected[key].dtype, key
        torch.testing.assert_close(inputs[key][where], expected[key][where], rtol=0, atol=1e-6, msg=key)
    assert (inputs["input_ids"][~text] == tokenizer.pad_id).all()
    prompts_ = [processor.apply_chat_template(c, images=i, add_generation_prompt=True) for c, i in zip(chats, given)]
    assert prompts_ == [prompt for _, prompt in made]
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).loss)


def test_processor_round_trip_and_chat_template(processing, tmp_path):
    config, tokenizer, _, processor, model = processing
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    picture_ = picture(0)
    for rounds in CHATS.values():
        with_image = "<image>" in str(rounds)
        chat = messages(rounds, picture_)
        before, after = processor(chat), again.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        assert set(before) == set(after)
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert before["input_ids"].shape[0] == 1 and ("pixel_values" in before) == (
            with_image or config.text_only == "zero_image"
        )
        for header in (False, True):
            ways = {"tokenize": False, "add_generation_prompt": header}
            rendered = processor.tokenizer.apply_chat_template(chat, chat_template=again.chat_template, **ways)
            assert rendered == processor.apply_chat_template(chat, **ways)
    ids = tokenizer.encode("A ball. And where?")
    assert processor.batch_decode([ids], skip_special_tokens=True) == [tokenizer.decode(ids)]
    assert model.generation_config.eos_token_id == list(stop_ids(tokenizer, TEMPLATES["phi3"]))
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id == tokenizer.pad_id
    inputs = processor(messages([("What is red?", None)]), picture_)
    answer = model.generate(**inputs, max_new_tokens=3)
    assert answer.shape[1] <= inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    ("chat", "images", "message"),
    [
        ([{"role": "system", "content": "x"}], None, "hold a user's turn"),
        ([{"role": "tool", "content": "x"}], None, "tool"),
        ([{"role": "user", "content": "x"}] * 2, None, "alternate"),
        ([{"role": "assistant", "content": "x"}], None, "alternate"),
        ([{"role": "user", "content": "<image>x"}], None, "no image"),
        ([{"role": "user", "content": "<image><image>x"}], "picture", "one image per conversation"),
        ([{"role": "user", "content": [{"type": "video"}]}], None, "video"),
        ([[{"role": "user", "content": "x"}]], ["picture", "picture"], "2 images; one image"),
    ],
)
def test_unusable_conversations(processing, chat, images, message):
    with pytest.raises(ValueError, match=message):
        processing[3](chat, images)


def test_processor_opens_the_files_that_training_opens(processing, tmp_path):
    processor = processing[3]
    code = sys.modules[type(processor).__module__.replace("processing_", "image_")]

    def crops(image):
        return processor.views(image)[0]

    shown = picture(0)
    for name, form in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.mpo", "MPO"), ("a.ppm", "PPM"), ("a.tif", "TIFF")):
        shown.save(tmp_path / name, form)
        assert np.array_equal(crops(tmp_path / name), crops(image.load_image(tmp_path / name))), name
    Image.fromarray(np.linspace(0, 1, 35 * 40, dtype=np.float32).reshape(35, 40)).save(tmp_path / "grey.tif")
    grey = crops(tmp_path / "grey.tif")
    assert np.array_equal(grey, crops(image.load_image(tmp_path / "grey.tif"))) and 120 < grey.mean() < 135
    with Image.open(tmp_path / "grey.tif") as opened:
        assert np.array_equal(crops(opened), grey)
    turned = Image.Exif()
    turned[0x0112] = 6
    shown.save(tmp_path / "turned.tif", exif=turned)
    assert code.to_rgb(tmp_path / "turned.tif").size == image.load_image(tmp_path / "turned.tif").size == (31, 47)
    shown.resize((16, 16)).save(tmp_path / "a.ico")
    shown.save(tmp_path / "a.eps")
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    (tmp_path / "large.png").write_bytes(
        header + struct.pack(">I", zlib.crc32(header[12:])) + struct.pack(">I", 9) + b"IDAT"
    )
    (tmp_path / "text.ppm").write_bytes(b"P3 1001 1000 255 " + b"1 " * 99)
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("a.ico", "a.eps", "large.png", "text.ppm"):
        with pytest.raises(ValueError, match=f"Cannot read the image .*{name}"):
            crops(tmp_path / name)
    for name in ("pipe.png", "none.png", "."):
        with pytest.raises(OSError):
            crops(tmp_path / name)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_processor_without_bos_and_with_system_texts(preset, tmp_path):
    """A tokenizer whose own chat template the model follows: no token in front, a system text, white space trimmed."""
    words = [
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "system",
        "user",
        "assistant",
        "Be",
        "brief",
        "Hi",
        "Yes",
        " ",
        "\n",
    ]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+|\W"), "isolated")
    model.add_special_tokens(words[:3])
    model.save(str(tmp_path / "tokenizer.json"))
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<unk>"}
    roles[
        "chat_template"
    ] = """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe<|im_end|>\\n' }}{% endif %}
        {%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}
        {%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    tokenizer = load_tokenizer(tmp_path)
    template = chat_template.find("own", tokenizer)
    config = fixtures.tiny(preset, **{"llm.vocab_size": tokenizer.vocab_size})
    exported = export(tmp_path / "out", config, fixtures.params(config), tokenizer, template)
    processor = load_processor(tmp_path / "out")
    for system in (None, "", " Be brief\n"):
        for with_image in (False, True):
            for said in ((" Hi ",), ("",), ("Hi", " Yes ", "Hi<image>" if with_image else "Hi\n")):
                if not said[0] and not with_image:
                    continue
                turns = [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(said)]
                expected = conversation.encode_prompt(
                    turns,
                    tokenizer,
                    template,
                    with_image,
                    latents_without_image=config.text_only == "zero_image",
                    system=system,
                )
                chat = [{"role": ("user", "assistant")[k % 2], "content": v} for k, v in enumerate(said)]
                chat = [{"role": "system", "content": system}] * (system is not None) + chat
                got = processor._encoded(chat, [picture(0)] * with_image, True, False)[0]
                assert got.ids == expected.input_ids.tolist()
                assert got.question_ids == (expected.instructs.tolist() if with_image else [])
                assert got.prompt == expected.prompt
                assert got.ids[:2] == [1, 3] and got.ids[2] != 1
                if not with_image or "<image>" in said[-1]:
                    rendered = {"chat_template": processor.chat_template, "tokenize": False}
                    rendered["add_generation_prompt"] = True
                    assert processor.tokenizer.apply_chat_template(chat, **rendered) == got.prompt
    # An image alone: no question token at all.
    alone = processor([[{"role": "user", "content": [{"type": "image", "image": picture(0)}]}]])
    assert alone["question_ids"].shape == (1, 1, 1) and not alone["question_mask"].any()
    with torch.no_grad():
        assert torch.isfinite(exported(**alone).logits).all()
    assert processor.bos_token_id is None
    with pytest.raises(ValueError, match="system at the start"):
        processor([[{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be"}]])


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_the_exported_chat_template_leaves_no_message_out(name):
    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(jinja_text(fixtures.tiny("paper"), TEMPLATES[name]))
    user = {"role": "user", "content": "Hi"}
    for role, chat in (
        ("system", [user, {"role": "system", "content": "Be brief"}]),
        ("tool", [user, {"role": "tool", "content": "12"}]),
        ("system", [{"role": "system", "content": "Be brief"}, user]),
    ):
        if name == "chatml" and chat[-1] == user:
            assert "Be brief" in template.render(messages=chat)
            continue
        with pytest.raises(jinja2.TemplateError, match=f"role {role} has no place"):
            template.render(messages=chat)
    with pytest.raises(jinja2.TemplateError, match="type video has no place"):
        template.render(messages=[{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}])
    empty = [{"role": "system", "content": ""}, user]
    assert template.render(messages=empty) == template.render(messages=[user])


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason=f"no golden conversations in {TOKENIZERS} (set FUSION_GOLDENS)")
@pytest.mark.parametrize("name", ["phi3", "llama3"])
def test_published_conversations(name, tmp_path):
    tokenizer = load_tokenizer(TOKENIZERS / name)
    write_side_files(tmp_path, fixtures.tiny("released"), tokenizer, TEMPLATES[name], "float32")
    processor = load_processor(tmp_path)
    assert len(processor.tokenizer) == tokenizer.vocab_size
    roles = {"human": "user", "gpt": "assistant"}
    for row in json.loads((TOKENIZERS.parent / f"conversations_{name}.json").read_text())["rows"]:
        chat = [{"role": roles[t["from"]], "content": t["value"]} for t in row["record"]["conversations"]]
        has_image = "image" in row["record"]
        got = processor._encoded(chat, [picture(0)] * has_image, True, False)[0]
        labels = np.array(row["labels"])
        assert got.ids == row["input_ids"], row["record"]["id"]
        assert got.ends == np.flatnonzero(labels == ANSWER_START).tolist()
        assert got.labels == np.where(labels == ANSWER_START, -100, labels).tolist()
        assert got.question_ids == (row["instructs"] if has_image else [])
        assert got.prompt == row["prompt"]
    # Corners of white space and added tokens, where other implementations differ.
    rng = np.random.default_rng(0)
    parts = [
        "<|user|>",
        "<|end|>",
        "<|eot_id|>",
        "<vision_start>",
        " ",
        "  ",
        "\n",
        "▁",
        "a",
        "The",
        "é",
        "中",
        "\t",
        "</s>",
    ]
    for _ in range(300):
        text = "".join(rng.choice(parts, rng.integers(0, 8)))
        assert processor.encode(text) == tokenizer.encode(text), repr(text)
        after = int(rng.integers(tokenizer.vocab_size))
        assert processor.encode(text, after) == tokenizer.encode(text, after), (after, repr(text))
        ids = tokenizer.encode(text)
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), repr(text)
