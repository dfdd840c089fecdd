"""Folders that an import reads, damaged: configs, weights, indexes and tokenizers of other forms, sizes and kinds.

Nothing is written beside the folder, a refusal is one printable sentence that names it, and time and memory stay small.
"""

import copy
import functools
import io
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import sentencepiece
import tokenizers
from flax.traverse_util import flatten_dict
from helpers.fixtures import params, tiny

from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.interop import FORMATS, exporting, importing, table
from fusion_jax.interop.opening import open_backbones, open_published
from fusion_jax.interop.published_config import published_config
from fusion_jax.interop.shapes import parameter_shapes
from fusion_jax.interop.tensors import TensorWriter
from fusion_jax.training.about import load_about

QUICK = 150
_SECONDS, _MEGABYTES = 20, 1500
_SECRET = "what-only-this-machine-knows"
_MODEL = tiny("released", **{"exchange.heads": 16})
_WORDS = ["<unk>", "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


def attempts(random, folder):
    root = folder / "folders"
    bases = _bases(root / "bases")
    secret = root / "secret"
    secret.mkdir()
    (secret / "secret.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "key": _SECRET}))
    work = root / "work"
    while True:
        kind = ("published", "sharded", "backbones", "checkpoint")[random.integers(4)]
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(bases / kind, work)
        if kind == "checkpoint":
            format = FORMATS[random.integers(2)]
            what, attempt = _damage_description(random, work), functools.partial(_export, work, root / "out", format)
        else:
            if kind == "backbones":
                _vary(random, work / "llm" / "config.json")
            files = sorted(path for path in work.rglob("*") if path.is_file())
            chosen = random.permutation(len(files))[: random.integers(1, 3)]
            what = "; ".join(_damage(random, files[place], secret / "secret.json") for place in chosen)
            attempt = functools.partial(_import, kind, work, root / "kept")
        yield f"{kind}: {what}", functools.partial(_survive, attempt, work, root)


def _survive(attempt, work: Path, root: Path) -> str:
    before, begun, peak = _listing(root), time.monotonic(), _peak()
    try:
        attempt()
        outcome = "accepted"
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 2000, f"no plain sentence: {message[:200]!r}"
        assert str(work) in message, f"names no file: {message}"
        outcome = "refused"
    assert _listing(root) == before, "files were written"
    assert time.monotonic() - begun < _SECONDS, f"took {time.monotonic() - begun:.0f} s"
    assert _peak() - peak < _MEGABYTES, f"took {_peak() - peak} MB"
    return outcome


def _import(kind: str, work: Path, kept: Path) -> None:
    if kind == "backbones":
        opened = open_backbones(work / "vision", work / "llm")
    else:
        opened = open_published(work)
        importing.read(opened, lambda path, shape, dtype: np.empty(shape, dtype))
    if opened.tokenizer is not None:
        opened.tokenizer.decode(opened.tokenizer.encode("w1 w2 <s>é\n"))
        opened.tokenizer.save(kept)
        content = b"".join(path.read_bytes() for path in kept.iterdir())
        shutil.rmtree(kept)
        assert _SECRET.encode() not in content, "a file from elsewhere was carried on"


def _export(work: Path, target: Path, format: str) -> None:
    exporting.export(work, target, format, progress=False)
    shutil.rmtree(target)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _listing(root: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            about = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (about.st_mode, about.st_size)
    return found


# ---- What is damaged: a published model in one file and in shards, and a pair of backbones.


def _bases(folder: Path) -> Path:
    weights = flatten_dict(params(_MODEL), sep="/")
    shapes = parameter_shapes(_MODEL)
    described = published_config(_MODEL, "llama3", {}, "float32") | {"auto_map": {"AutoModel": "x--y.Z"}}

    def write(into: Path, config: dict, rows: list[table.Row], shard_bytes: int = 10**9) -> None:
        into.mkdir(parents=True)
        (into / "config.json").write_text(json.dumps(config, indent=1))
        writer = TensorWriter(into, {row.name: (row.shape, "float32") for row in rows}, shard_bytes)
        for row in rows:
            writer[row.name][...] = table.to_published(
                row, lambda path, index: weights[path] if index is None else weights[path][index], _MODEL
            )

    rows = table.published_rows(_MODEL, shapes, fused=False)
    write(folder / "published", described, rows)
    write(folder / "sharded", described, rows, shard_bytes=30_000)
    tower = described["vision_config"] | {"model_type": "siglip_vision_model"}
    # The last of its layers is dropped: the folder has one more than the model.
    extra = [row for row in table.vision_rows(_MODEL, shapes, "vision_model.") if "encoder.layers.3." in row.name]
    more = [table.Row(row.name.replace("layers.3.", "layers.4."), row.shape, row.paths, row.transform) for row in extra]
    write(folder / "backbones" / "vision", tower, table.vision_rows(_MODEL, shapes, "vision_model.") + more)
    decoder = {key: value for key, value in described.items() if not key.startswith(("mm_", "vision_", "auto"))}
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    decoder |= {"model_type": "llama", "rope_scaling": rope | {"original_max_position_embeddings": 32}}
    write(folder / "backbones" / "llm", decoder, table.llm_rows(_MODEL, shapes, fused=False))
    _write_tokenizer(folder / "published", 59)
    _write_tokenizer(folder / "backbones" / "llm", 61)
    _write_tokenizer(folder / "sharded", 59)
    _write_sentencepiece(folder / "sharded")
    importing.write_checkpoint(open_published(folder / "published"), folder / "checkpoint", progress=False)
    return folder


def _write_tokenizer(folder: Path, size: int) -> None:
    words = [*_WORDS, *(f"w{i}" for i in range(size - len(_WORDS)))]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(_WORDS)
    model.save(str(folder / "tokenizer.json"))
    added = {str(i): {"content": word, "lstrip": False, "special": True} for i, word in enumerate(_WORDS)}
    config = {"added_tokens_decoder": added, "bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "unk_token": {"content": "<unk>"}}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|eot_id|>": 3}))


def _write_sentencepiece(folder: Path) -> None:
    """A model of 40 pieces instead of tokenizer.json, the added tokens behind it."""
    model = io.BytesIO()
    sentences = ["two red cubes are left of the blue ball", "what is written on the door"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=40, model_type="bpe", minloglevel=3
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {str(40 + i): {"content": word, "special": True} for i, word in enumerate(_WORDS[3:])}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|eot_id|>": 40, "<|late|>": 44}))
    load_tokenizer(folder)


# ---- How it is damaged.


def _damage_description(random, work: Path) -> str:
    """What a checkpoint says of its config and of the folder it came from; its tokenizer is tried as a folder."""
    about = load_about(work)
    key = ("config", "origin")[random.integers(2)]
    about[key] = _alter(random, about[key], key)
    shutil.rmtree(work / "about")
    with tempfile.TemporaryDirectory() as other:
        ocp.save_checkpointables(Path(other) / "x", {"about": {"json": json.dumps(about)}})
        shutil.copytree(Path(other) / "x" / "about", work / "about")
    return f"a checkpoint with another {key}"


def _vary(random, path: Path) -> None:
    """Another architecture or rotary scaling, so that what only these read is tried, too."""
    config = json.loads(path.read_text())
    longrope = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
    more = (
        {},
        {"model_type": "mistral", "sliding_window": 7, "layer_types": ["sliding_attention"] * 2},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        {"rope_scaling": longrope | {"original_max_position_embeddings": 16}, "max_position_embeddings": 64},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": None},
    )
    path.write_text(json.dumps(config | more[random.integers(len(more))]))


def _damage(random, path: Path, secret: Path) -> str:
    way = random.integers(10)
    if way == 0:
        return f"{path.name} is {_replace(random, path, secret)}"
    content = path.read_bytes()
    if way < 3 or path.suffix == ".model":
        path.write_bytes(_scramble(random, content))
        return f"{path.name} scrambled"
    if path.suffix == ".json":
        if way == 3:  # as text, where JSON allows what a writer would not
            text = content.decode().replace("{", random.choice(['{"a":NaN,', '{"a":1e999,', '{"a":' + "[" * 9999]), 1)
            path.write_text(text)
            return f"{path.name} with odd text"
        path.write_text(json.dumps(_alter(random, json.loads(content), path.name)))
        return f"{path.name} altered"
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(_alter(random, header, "header")).encode(errors="replace")
    said = len(text) if random.integers(6) else int(random.choice([0, 1, len(text) - 1, 1 << 40, (1 << 62) - 1]))
    path.write_bytes(said.to_bytes(8, "little") + text + content[8 + length :])
    return f"{path.name} with an altered header"


def _replace(random, path: Path, secret: Path) -> str:
    kinds = (
        "a folder",
        "a pipe",
        "a link to nothing",
        "a link elsewhere",
        "a circle",
        "huge",
        "empty",
        "zeros",
        "gone",
    )
    kind = kinds[random.integers(len(kinds))]
    content = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to nothing":
        path.symlink_to("nowhere")
    elif kind == "a link elsewhere":
        path.symlink_to(secret if random.integers(2) else "/dev/zero")
    elif kind == "a circle":
        path.symlink_to(path.name)
    elif kind == "huge":
        path.write_bytes(content)
        os.truncate(path, 1 << 40)
    elif kind != "gone":
        path.write_bytes(b"" if kind == "empty" else bytes(len(content)))
    return kind


def _scramble(random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(random.integers(1, 6)):
        way, place = random.integers(5), int(random.integers(len(data) + 1))
        if way == 0:
            del data[place:]
        elif way == 1:
            data[place:place] = random.bytes(int(random.integers(1, 9)))
        elif way == 2:
            del data[place : place + int(random.integers(1, 99))]
        elif way == 3 and place < min(len(data), 4000):  # the front of a file decides most
            data[place] = int(random.integers(256))
        elif data:
            start = int(random.integers(len(data)))
            data[place:place] = data[start : start + 50]
    return bytes(data)


_KEYS = (
    "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "head_dim", "sliding_window",
    "layer_types", "use_sliding_window", "max_window_layers", "max_position_embeddings", "hidden_act", "mlp_bias",
    "attention_bias", "tie_word_embeddings", "layer_norm_eps", "rms_norm_eps", "model_type", "query_len",
    "additional_special_tokens", "added_tokens_decoder", "bos_token", "unk_token", "truncation", "padding",
    "weight_map", "__metadata__", "normalizer", "pre_tokenizer", "post_processor", "decoder",
    "original_max_position_embeddings", "chat_template", "add_bos_token",
)  # fmt: skip
_TEXTS = (
    "", "2", "llama", "qwen2", "phi3", "mistral", "longrope", "llama3", "silu", "\ud800", "../x.safetensors", "..",
    "/etc/passwd", "a\0b", "\x1b[2J\n", "x" * 5000, "4,16", "4," * 3000, "NaN", "<s>", "F16", "F64", "I8", "U128",
    "model.safetensors", "sub/model.safetensors", "google/siglip-so400m-patch14-384",
)  # fmt: skip
_NUMBERS = (
    0, 1, -1, 2, 3, 61, 1 << 31, 1 << 63, 10**12, -(10**12), 10**400, 10**4299, 1.0, 0.5, -1.5, 1e-45, 1e300,
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip


def _alter(random, content, name: str):
    """A JSON value with some values, keys or whole branches exchanged."""
    if random.integers(12) == 0:
        return _value(random)
    content = copy.deepcopy(content)
    for _ in range(random.integers(1, 4)):
        parent = place = None
        node = content
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            parent, place = node, keys[random.integers(len(keys))]
            node = node[place]
            if random.integers(3) == 0:
                break
        if parent is None:
            return _value(random)
        way = random.integers(8)
        if way == 0:
            del parent[place]
        elif way == 1 and isinstance(parent, dict):
            parent[str(_TEXTS[random.integers(len(_TEXTS))])] = parent.pop(place)
        elif way == 2 and isinstance(content, dict):
            content[_KEYS[random.integers(len(_KEYS))]] = _value(random)
        elif way == 3 and isinstance(node, int | float) and not isinstance(node, bool) and -1e9 < node < 1e9:
            parent[place] = (
                node + int(random.integers(-3, 4)) if random.integers(2) else node * 10 ** int(random.integers(15))
            )
        elif way == 4 and isinstance(parent, dict) and isinstance(node, int | str):
            parent[place] = {"content": node} if random.integers(2) else [node]
        elif way == 5 and len(parent) < 300:
            if isinstance(parent, list):
                parent += parent * int(random.integers(1, 50))
            else:
                parent |= {f"{place}{i}": node for i in range(int(random.integers(1, 50)))}
        else:
            parent[place] = _value(random)
    return content


def _value(random, depth: int = 0):
    way = random.integers(8 if depth < 3 else 5)
    if way == 0:
        return None
    if way == 1:
        return bool(random.integers(2))
    if way == 2:
        return _TEXTS[random.integers(len(_TEXTS))]
    if way < 5:
        return _NUMBERS[random.integers(len(_NUMBERS))]
    if way == 5:
        return [_value(random, depth + 1) for _ in range(random.integers(5))]
    if way == 6:
        return {_KEYS[random.integers(len(_KEYS))]: _value(random, depth + 1) for _ in range(random.integers(5))}
    rope = {"rope_type": ("llama3", "longrope", "default", "yarn")[random.integers(4)], "factor": _value(random, 3)}
    rope |= {"low_freq_factor": _value(random, 3), "high_freq_factor": 4.0, "short_factor": _value(random, 2)}
    return rope | {"original_max_position_embeddings": _value(random, 3), "long_factor": [1.0, 2.0]}
