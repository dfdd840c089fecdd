"""Language models out of GGUF files, which the package `gguf` writes here: the same as out of folders."""

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from flax.traverse_util import flatten_dict
from helpers.backbones import LLAMA3, LONGROPE, SIZES, cheap_connectors, language_model  # noqa: F401

from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.interop import gguf_file, gguf_tokenizer, importing
from fusion_jax.interop.opening import open_backbones
from fusion_jax.training.about import load_about, save_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the test extra: pip install -e '.[test]'")

HEADS = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}
HEAD = SIZES["hidden_size"] // SIZES["num_attention_heads"]
VOCABULARY = 400
WORDS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def beside(tensor, heads):
    """Rotary pairs beside each other, as llama.cpp keeps those of Llama."""
    return tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(path, kind, pack=None, edit=None):
    """A model of test_backbones as llama.cpp's converter would write it; `pack`: a type for its matrices; `edit` writes
    the metadata of a tokenizer, for which the vocabulary gets rows."""
    arch = kind.split("_")[0]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(language_model(kind).config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    names = {theirs: ours for ours, theirs in gguf_file._LAYER.items()} | {"mlp.gate_up_proj": "ffn_up"}
    whole = {theirs: ours for ours, theirs in gguf_file._WHOLE.items()}
    for name, tensor in language_model(kind).state_dict().items():
        array = tensor.numpy()
        if name == "lm_head.weight" and kind in ("llama_tied", "qwen2"):
            continue
        if name not in whole:
            _, _, layer, part = name.split(".", 3)
            part, ending = part.rsplit(".", 1)
            heads = HEADS.get(part.removeprefix("self_attn."))
            if arch == "llama" and heads:
                array = beside(array, heads)
            name = f"blk.{layer}.{names[part]}.{ending}"
        if edit is not None and name in ("model.embed_tokens.weight", "lm_head.weight"):
            array = np.pad(array, ((0, VOCABULARY - len(array)), (0, 0)))
        if pack is not None and array.ndim > 1 and (array.shape[-1] % 32 == 0 or pack.name in ("F16", "BF16")):
            writer.add_tensor(whole.get(name, name), gguf.quantize(array, pack), raw_dtype=pack)
        else:
            writer.add_tensor(whole.get(name, name), np.ascontiguousarray(array))
    if kind == "llama":
        waves = 2 * np.pi * 10000.0 ** (np.arange(0, HEAD, 2) / HEAD)
        original, factor = LLAMA3["original_max_position_embeddings"], LLAMA3["factor"]
        smooth = np.clip((original / waves - 1) / 3, 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).astype(np.float32))
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "phi3":
        for part in ("short", "long"):
            writer.add_tensor(f"rope_factors_{part}.weight", np.array(LONGROPE[f"{part}_factor"], np.float32))
        writer.add_rope_scaling_orig_ctx_len(LONGROPE["original_max_position_embeddings"])
        writer.add_sliding_window(300)
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(vision, llm):
    opened = open_backbones(vision, llm)
    return opened, flatten_dict(importing.read(opened, lambda _, shape, dtype: np.empty(shape, dtype)), sep="/")


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "phi3", "qwen2"])
def test_a_file_is_the_folder_that_it_was_made_from(folders, tmp_path, kind):
    write_gguf(tmp_path / "model.gguf", kind)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders / kind / name, tmp_path)
    opened, params = read(folders / "vision", tmp_path)
    expected_opened, expected = read(folders / "vision", folders / kind)
    assert (opened.model, opened.template, opened.tokenizer) == (
        expected_opened.model,
        expected_opened.template,
        expected_opened.tokenizer,
    )
    assert params.keys() == expected.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def bytes_bpe(pre):
    """A byte-level BPE trained on this file, as `tokenizers` has it, and as a GGUF file's metadata."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = gguf_tokenizer._SPLITS[pre]()
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=WORDS, initial_alphabet=sorted(alphabet), show_progress=False
    )
    model.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    merges = json.loads(model.to_str())["model"]["merges"]
    vocabulary = sorted(model.get_vocab().items(), key=lambda item: item[1])

    def metadata(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([word for word, _ in vocabulary])
        writer.add_token_types([3 if word in WORDS else 1 for word, _ in vocabulary])
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(4)
        writer.add_add_bos_token(False)
        writer.add_chat_template("{% for m in messages %}{{ m.content }}</s>{% endfor %}")

    return model, metadata


TEXTS = ("Two cubes, 12345 spheres!\n\n  it's <|im_start|>user\n", "def f(x):\n\treturn x ** 2  # Größe 日本 🙂", " ")


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "gpt-2"])
def test_the_tokenizer_of_the_metadata(tmp_path, pre):
    model, metadata = bytes_bpe(pre)
    file = gguf_file.GgufFile(write_gguf(tmp_path / "model.gguf", "llama", edit=metadata))
    tokenizer, kept = file.tokenizer(tmp_path / "model.gguf")
    for text in TEXTS:
        assert tokenizer.encode(text) == model.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|im_start|>", "") or "<|im" in text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 4, False)
    assert tokenizer.vocab_size == VOCABULARY + 2 and tokenizer.chat_template[0].startswith("{% for m")
    kept.cleanup()


@pytest.mark.parametrize("pack", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_packed_numbers_are_those_that_the_file_means(tmp_path, pack):
    kind = gguf.GGMLQuantizationType[pack]
    file = gguf_file.GgufFile(write_gguf(tmp_path / "model.gguf", "phi3", kind))
    name = "model.layers.1.mlp.down_proj.weight"
    given, found = language_model("phi3").state_dict()[name].numpy(), file.get(name)
    # Half a step of the packing (a scale of eight or four bits over a block's range), or the type's own rounding.
    blocks = given.reshape(-1, 32)
    step = {"F16": 2**-10, "BF16": 2**-7, "Q8_0": 1 / 127, "Q4_0": 1 / 8, "Q4_1": 2 / 15, "Q5_1": 2 / 31}[pack]
    far = np.abs(found.astype(np.float32).reshape(-1, 32) - blocks).max(1) / np.abs(blocks).max(1)
    assert 0 < far.max() < 1.05 * step
    assert file.entries[name].dtype == found.dtype.name == {"F16": "float16", "BF16": "bfloat16"}.get(pack, "float32")
    if pack == "Q8_0":  # a scale and 32 signed bytes
        raw = np.frombuffer(gguf.quantize(given, kind), np.dtype([("scale", "<f2"), ("bytes", "i1", 32)]))
        expected = (raw["scale"].astype(np.float32)[:, None] * raw["bytes"]).reshape(given.shape)
        np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", "llama", edit=bytes_bpe("smollm")[1]).read_bytes()


def at(data: bytes, text: bytes, form: str, value, skip: int = 0) -> bytes:
    """The file with the number that follows a text (and `skip` bytes) replaced."""
    place = data.index(text) + len(text) + skip
    return data[:place] + struct.pack(form, value) + data[place + struct.calcsize(form) :]


HOSTILE = {
    "empty": (lambda d: b"", "is not a GGUF file"),
    "other magic": (lambda d: b"GGML" + d[4:], "is not a GGUF file"),
    "version 1": (lambda d: at(d, b"GGUF", "<I", 1), "GGUF of version 1"),
    "big end first": (lambda d: at(d, b"GGUF", ">I", 3), "GGUF of version 50331648"),
    "many tensors": (lambda d: at(d, b"GGUF", "<Q", 1 << 60, 4), "it claims 1,152,921,504,606,846,976 tensors"),
    "many keys": (lambda d: at(d, b"GGUF", "<Q", 1 << 40, 12), "it claims 1,099,511,627,776 keys"),
    "long key": (lambda d: at(d, b"GGUF", "<Q", 1 << 62, 20), "a text of 4,611,686,018,427,387,904 bytes"),
    "long text": (lambda d: at(d, b"general.architecture", "<Q", 1 << 24, 4), "damaged or cut short: its header ends"),
    "unknown type": (lambda d: at(d, b"general.architecture", "<I", 77), "values of the unknown type 77"),
    "long list": (lambda d: at(d, b"tokenizer.ggml.tokens", "<Q", 1 << 50, 8), "ggml.tokens claims 1,125,899,906,8"),
    "list of lists": (lambda d: at(d, b"tokenizer.ggml.tokens", "<I", 9, 4), "values of the unknown type 9"),
    "no text": (lambda d: d.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.\xff\xfedel"), "is not UTF-8"),
    "twice": (
        lambda d: d.replace(b"llama.block_count", b"llama.block_bount", 0).replace(
            b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"
        ),
        "the key tokenizer.ggml.eos_token_id twice",
    ),
    "many axes": (lambda d: at(d, b"output_norm.weight", "<I", 1 << 31), "output_norm.weight has 2147483648 axes"),
    "huge tensor": (lambda d: at(d, b"output_norm.weight", "<Q", 1 << 63, 4), "output_norm.weight has the shape"),
    "large tensor": (lambda d: at(d, b"output_norm.weight", "<Q", 1 << 40, 4), "output_norm.weight ends after"),
    "no numbers": (lambda d: at(d, b"output_norm.weight", "<Q", 0, 4), "output_norm.weight has the shape"),
    "unknown packing": (lambda d: at(d, b"output_norm.weight", "<I", 4, 12), "output_norm.weight is packed as 4"),
    "packed ints": (lambda d: at(d, b"output_norm.weight", "<I", 26, 12), "output_norm.weight is packed as I32"),
    "odd rows": (lambda d: at(d, b"output_norm.weight", "<I", 8, 12), "rows of 48 are not whole blocks"),
    "far away": (lambda d: at(d, b"output_norm.weight", "<Q", 1 << 62, 16), "output_norm.weight ends after"),
    "cut short": (lambda d: d[:-100], "it is cut short"),
    "cut in the header": (lambda d: d[:3000], "damaged or cut short: its header ends at 3,000"),
    "other architecture": (lambda d: d.replace(b"llama", b"gemma"), "'gemma' is not supported; supported: llama, phi3"),
    "no heads": (lambda d: at(d, b"llama.attention.head_count", "<I", 0, 4), "llama.attention.head_count must be"),
    "many layers": (
        lambda d: at(d, b"llama.block_count", "<I", 1 << 31, 4),
        "llama.block_count must be a whole number",
    ),
    "more layers": (lambda d: at(d, b"llama.block_count", "<I", 9000, 4), r"lacks model.layers.8999"),
    "other width": (lambda d: at(d, b"llama.feed_forward_length", "<I", 65, 4), "the config asks for"),
    "no epsilon": (lambda d: at(d, b"layer_norm_rms_epsilon", "<f", float("nan"), 4), "rms_epsilon must be a number"),
    "other scaling": (lambda d: at(d, b"original_context_length", "<I", 64, 4), "another scaling than Llama 3's"),
    "no BPE": (lambda d: d.replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert"), "type 'bert' cannot be read"),
    "other splits": (
        lambda d: d.replace(b"smollm", b"falcon"),
        r"how its tokenizer \('falcon'\) splits texts; lay the",
    ),
    "no such token": (lambda d: at(d, b"eos_token_id", "<I", 1 << 30, 4), "eos_token_id must be a whole number"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_damaged_or_unknown_is_one_sentence(folders, whole, tmp_path, name):
    edit, message = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(edit(whole))
    with pytest.raises(UserError, match=message) as caught:
        open_backbones(folders / "vision", path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


def test_no_damage_ends_otherwise_than_by_a_sentence(whole, tmp_path):
    """Bytes of the header changed and files cut, 300 times: refused, or read as something else."""
    rng = np.random.default_rng(0)
    path, header = tmp_path / "x.gguf", whole.index(b"output_norm.weight") + 2000
    refused = 0
    for attempt in range(300):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(header)] = rng.integers(256)
        path.write_bytes(bytes(data[: rng.integers(len(data))] if attempt % 3 == 0 else data))
        try:
            file = gguf_file.GgufFile(path)
            file.tokenizer(path)
            for name in file.entries:
                file.get(name)
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1000
    assert refused > 150


def edited(tmp_path, **values):
    def edit(writer):
        bytes_bpe("smollm")[1](writer)
        for key, value in values.items():
            writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))

    return write_gguf(tmp_path / "model.gguf", "llama_tied", edit=edit)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"llama__expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"llama__rope__dimension_count": 6}, "llama.rope.dimension_count=6 is not supported; heads have 12 numbers"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling of type 'yarn' is unknown"),
        ({"llama__rope__scale_linear": 4.0}, "llama.rope.scale_linear=4.0 is not supported"),
        ({"split__count": 3}, "is one of 3 parts; join them first"),
    ],
)
def test_options_that_are_not_supported_are_named(folders, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        open_backbones(folders / "vision", edited(tmp_path, **values))


def test_folders_with_none_one_and_several_files(tmp_path):
    assert gguf_file.find(tmp_path) is None and gguf_file.find(tmp_path / "nowhere") is None
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
        if name == "a.gguf":
            assert gguf_file.find(tmp_path) == tmp_path / name
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(a.gguf, ...\); name the one to import"):
        gguf_file.find(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert gguf_file.find(tmp_path) is None
    shutil.copy(tmp_path / "a.gguf", tmp_path / "blob")  # without the ending, as caches name them
    assert gguf_file.find(tmp_path / "blob") == tmp_path / "blob"


def test_without_the_package_a_sentence_says_how_to_install_it(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(whole)
    with pytest.raises(UserError, match=r"x.gguf: reading GGUF needs a package: pip install -e '.\[gguf\]'"):
        open_backbones(tmp_path, tmp_path / "x.gguf")


def test_the_tokenizer_lasts_until_the_checkpoint_is_written(folders, tmp_path):
    opened = open_backbones(folders / "vision", edited(tmp_path))
    expected = opened.tokenizer.encode(TEXTS[0])
    importing.write_checkpoint(opened, tmp_path / "checkpoint", progress=False)
    files = Path(opened.kept.name)
    del opened
    save_tokenizer(load_about(tmp_path / "checkpoint"), tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == expected and not files.exists()
