"""Reads a language model in a GGUF file like a Hugging Face folder: config.json and named tensors.

The package `gguf` unpacks quantised numbers; the tensors are those that llama.cpp computes with, not those before
quantisation. Key and tensor names, the order of rotary pairs and the factors of Llama 3's scaling are documented in
github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py and convert_hf_to_gguf.py.
"""

import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.errors import UserError, check
from fusion_jax.files import brief, shown
from fusion_jax.interop import table
from fusion_jax.interop.families import FAMILIES, GGUF, Family
from fusion_jax.interop.gguf_header import MAGIC, read_header
from fusion_jax.interop.gguf_tokenizer import write_tokenizer
from fusion_jax.interop.tensors import DTYPES, Entry
from fusion_jax.models.limits import RANGES
from fusion_jax.values.foreign import number, text, whole

_WHOLE = {"token_embd.weight": table.EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": table.HEAD}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
# Keys that change the arithmetic unless they are 0; models of the supported architectures do not use them.
_OTHER = (
    "expert_count",
    "attention.max_alibi_bias",
    "attention.clamp_kqv",
    "attention.scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


def find(llm: Path) -> Path | None:
    """The GGUF file at `llm`, or the one in a folder without other weights; None for anything else.

    Raises:
      UserError: the folder holds several.
    """
    if os.path.isfile(llm):
        with open(llm, "rb") as file:
            return llm if llm.suffix == ".gguf" or file.read(4) == MAGIC else None
    if not os.path.isdir(llm):
        return None
    names = sorted(os.listdir(llm))
    files = [name for name in names if name.endswith(".gguf")]
    if not files or any(name.startswith(("model.safetensors", "pytorch_model.bin")) for name in names):
        return None
    check(len(files) == 1, f"{llm} holds {len(files)} GGUF files ({shown(files[0])}, ...); name the one to import.")
    return llm / files[0]


class GgufFile:
    """The tensors of a GGUF file by the names of a Hugging Face folder, like `TensorFolder`.

    Attributes:
      folder: the path of the file. entries: tensor name to `Entry`; quantised tensors are float32. config: as in
        config.json.
    """

    def __init__(self, path: Path):
        """Reads the header.

        Raises:
          UserError: the package is missing, the file is damaged, cut short or not GGUF, or its architecture or one of
            its options is not supported.
        """
        try:
            import gguf
        except ImportError as error:
            raise UserError(f"{path}: reading GGUF needs a package: pip install -e '.[gguf]'.") from error
        self._gguf, self.folder = gguf, path
        self._header = read_header(path)
        self._values = self._header.values
        self._check_kind()
        self._family: Family = FAMILIES[GGUF[self._values["general.architecture"]]]
        self._sizes = {name: self._size(name) for name in self._header.places}
        self.config = self._config()
        self._names = {self._theirs(name): name for name in self._header.places}
        # A stack of layers has one dtype: float32 where its tensors are quantised or have several dtypes.
        wide = {self._type(name) for name, place in self._header.places.items() if len(place.shape) > 1}
        common = wide.pop() if len(wide) == 1 else "float32"
        self.entries = {
            theirs: Entry(path, self._header.places[name].shape, common if self._type(name) != "float32" else "float32")
            for theirs, name in self._names.items()
            if name not in (_FREQUENCIES, _SHORT, _LONG)
        }

    def _check_kind(self) -> None:
        where = str(self.folder)
        arch = text(self._values, "general.architecture", where)
        check(
            arch in GGUF,
            f"{where}: the architecture {brief(arch)} is not supported; supported: {', '.join(GGUF)}.",
        )
        parts = whole(self._values, "split.count", where, 0, 1 << 16, 0)
        check(parts <= 1, f"{where} is one of {parts} parts; join them first (llama-gguf-split --merge).")
        for key in (f"{arch}.{name}" for name in _OTHER):
            check(not self._values.get(key), f"{where}: {key}={brief(self._values.get(key))} is not supported.")
        scale = number(self._values, f"{arch}.rope.scale_linear", where, *RANGES["factor"], 1.0)
        check(scale == 1.0, f"{where}: {arch}.rope.scale_linear={scale} is not supported.")

    def _size(self, name: str) -> int:
        """Bytes of a tensor. Raises UserError where they are not all in the file, or its type cannot be unpacked."""
        gguf, place, where = self._gguf, self._header.places[name], f"{self.folder}: {shown(name)}"
        try:
            kind = gguf.GGMLQuantizationType(place.kind)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if kind.name not in ("F32", "F16", "BF16"):
                gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            known = place.kind in iter(gguf.GGMLQuantizationType)
            named = gguf.GGMLQuantizationType(place.kind).name if known else place.kind
            raise UserError(f"{where} is packed as {named}, which cannot be unpacked.") from error
        check(place.shape[-1] % block == 0, f"{where} is damaged: rows of {place.shape[-1]} are not whole blocks.")
        length = math.prod(place.shape) // block * size
        there = len(self._header.data)
        check(place.start + length <= there, f"{where} ends after the file's {there:,} bytes: it is cut short.")
        return length

    def _type(self, name: str) -> str:
        kind = self._gguf.GGMLQuantizationType(self._header.places[name].kind).name
        return {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")

    def _theirs(self, name: str) -> str:
        match = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name, re.ASCII)
        if match is None or match[2] not in _LAYER:
            return _WHOLE.get(name, name)
        part = _LAYER[match[2]]
        if self._family.fused and part == "mlp.up_proj":
            part = "mlp.gate_up_proj"
        return f"model.layers.{int(match[1])}.{part}.{match[3]}"

    def _config(self) -> dict[str, Any]:
        values, where = self._values, str(self.folder)
        arch = values["general.architecture"]

        def size(key: str, field: str, default: int | None = None) -> int:
            return whole(values, f"{arch}.{key}", where, *RANGES[field], default)

        def real(key: str, field: str, default: float | None = None) -> float:
            return _decimal(number(values, f"{arch}.{key}", where, *RANGES[field], default))

        check("token_embd.weight" in self._sizes, f"{where} lacks token_embd.weight.")
        width, heads = size("embedding_length", "width"), size("attention.head_count", "heads")
        head = size("attention.key_length", "head_dim", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            other = size(key, "head_dim", head)
            check(other == head, f"{where}: {arch}.{key}={other} is not supported; heads have {head} numbers.")
        config = {
            "model_type": GGUF[arch],
            "vocab_size": self._header.places["token_embd.weight"].shape[0],
            "hidden_size": width,
            "intermediate_size": size("feed_forward_length", "mlp_dim"),
            "num_hidden_layers": size("block_count", "layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": size("attention.head_count_kv", "kv_heads", heads),
            "head_dim": head,
            "hidden_act": "silu",
            "rms_norm_eps": real("attention.layer_norm_rms_epsilon", "norm_eps"),
            "rope_theta": real("rope.freq_base", "theta", 10000.0),
            "max_position_embeddings": size("context_length", "max_length"),
            "tie_word_embeddings": "output.weight" not in self._sizes,
        }
        window = size("attention.sliding_window", "sliding_window", 0)
        if window:
            config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
        for role in ("bos", "eos", "padding"):
            i = whole(values, f"tokenizer.ggml.{role}_token_id", where, 0, config["vocab_size"] - 1, -1)
            if i >= 0:
                config["pad_token_id" if role == "padding" else f"{role}_token_id"] = i
        return config | self._scaling(config)

    def _scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """The keys of config.json for rotary scaling, the factors of which are tensors in GGUF."""
        values, where, arch = self._values, str(self.folder), self._family.gguf
        kind = text(values, f"{arch}.rope.scaling.type", where, "none")
        original = f"{arch}.rope.scaling.original_context_length"
        if _LONG in self._sizes and _SHORT in self._sizes:
            factor = values.get(f"{arch}.rope.scaling.attn_factor")
            return {
                "original_max_position_embeddings": whole(values, original, where, *RANGES["original_length"]),
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": self._factors(_SHORT, config),
                    "long_factor": self._factors(_LONG, config),
                    **({} if factor is None else {"attention_factor": factor}),
                },
            }
        if _FREQUENCIES in self._sizes:
            factors = self._factors(_FREQUENCIES, config)
            scaling = {
                "rope_type": "llama3",
                "factor": max(factors),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": whole(values, original, where, *RANGES["original_length"], 8192),
            }
            expected = _llama3_factors(scaling, config)
            check(
                np.allclose(factors, expected, rtol=1e-3),
                f"{where}: {_FREQUENCIES} holds another scaling than Llama 3's (low and high factor 1 and 4).",
            )
            return {"rope_scaling": scaling} if max(factors) != 1 else {}
        return {} if kind == "none" else {"rope_scaling": {"rope_type": kind}}

    def _factors(self, name: str, config: dict[str, Any]) -> list[float]:
        shape, half = self._header.places[name].shape, config["head_dim"] // 2
        check(shape == (half,), f"{self.folder}: {name} has shape {shape}; heads of {2 * half} need ({half},).")
        factors = [_decimal(one) for one in self._unpacked(name).astype(np.float32).tolist()]
        least, most = RANGES["factor"]
        good = all(least <= one <= most for one in factors)  # NaN fails, too
        check(good, f"{self.folder}: {name} has values that are not factors from {least:g} to {most:g}.")
        return factors

    def _unpacked(self, name: str) -> np.ndarray:
        place = self._header.places[name]
        kind = self._gguf.GGMLQuantizationType(place.kind)
        raw = np.frombuffer(self._header.data, np.uint8, self._sizes[name], place.start)
        plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(kind.name)
        if plain is not None:
            return raw.view(DTYPES[plain]).reshape(place.shape)
        return self._gguf.dequantize(raw.reshape(*place.shape[:-1], -1), kind).reshape(place.shape)

    def get(self, name: str) -> np.ndarray:
        """One tensor, in its entry's dtype; safe to call from several threads."""
        array = self._unpacked(self._names[name])
        heads = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
        key = heads.get(name.rpartition("self_attn.")[2])
        if key is not None and self._family.gguf_interleaved:
            array = _apart(array, self.config[key])
        return array.astype(DTYPES[self.entries[name].dtype], copy=False)

    def tokenizer(self, folder: Path) -> tuple[Tokenizer, tempfile.TemporaryDirectory | None]:
        """The tokenizer of `folder`, or else of the metadata, with the folder of its files, which the caller must keep.

        Raises:
          UserError: there is no tokenizer, or the metadata do not fully describe it.
        """
        if any(os.path.lexists(folder / name) for name in _TOKENIZER_FILES):
            return load_tokenizer(folder), None
        kept = tempfile.TemporaryDirectory(prefix="fusion_jax-")
        write_tokenizer(self._values, Path(kept.name), self.folder)
        return load_tokenizer(kept.name), kept


def _apart(array: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rotary pairs in the rows of a query or key matrix half a head apart; llama.cpp interleaves them."""
    rows, columns = array.shape
    return array.reshape(heads, -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _decimal(value: float) -> float:
    """A float32 as the shortest decimal number that rounds to it: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _llama3_factors(scaling: dict[str, Any], config: dict[str, Any]) -> np.ndarray:
    """Divisors of the rotary frequencies in Llama 3's scaling, (head_dim / 2,)."""
    head = config["head_dim"]
    waves = 2 * math.pi * config["rope_theta"] ** (np.arange(0, head, 2) / head)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
