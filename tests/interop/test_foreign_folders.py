"""Folders and checkpoints that others made, of wrong forms and sizes: one sentence each, nothing copied from elsewhere.

tests/hostile/folders.py tries many more by chance; here are those that once passed, failed in a traceback or hung.
"""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import orbax.checkpoint.experimental.v1 as ocp
import pytest
from helpers.fixtures import tiny
from helpers.published_folder import PUBLISHED, write_with_tokenizer

from fusion_jax import convert
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.interop import FORMATS, exporting, importing, model_card
from fusion_jax.interop.new_folder import check_room, new_folder
from fusion_jax.interop.opening import open_backbones, open_published
from fusion_jax.interop.tensors import TensorFolder
from fusion_jax.training.about import load_about

MODEL = tiny("released", **PUBLISHED)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_with_tokenizer(root / "one", MODEL)
    write_with_tokenizer(root / "shards", MODEL, shard_bytes=30_000)
    importing.write_checkpoint(open_published(root / "one"), root / "checkpoint", progress=False)
    return root


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made / "one", tmp_path / "folder")


def refused(make, *words):
    with pytest.raises(UserError) as error:
        make()
    message = str(error.value)
    assert message.isprintable() and len(message) < 1500
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def with_entries(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 9999),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2.0),
        ("hidden_size", 10**400),
        ("intermediate_size", -1),
        ("vocab_size", 10**12),
        ("vocab_size", "61"),
        ("num_attention_heads", [4]),
        ("num_key_value_heads", 0),
        ("head_dim", -4),
        ("rms_norm_eps", NAN),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", INFINITY),
        ("rope_theta", NAN),
        ("rope_theta", 0),
        ("rope_theta", -10000.0),
        ("rope_theta", 10**400),
        ("rope_theta", {"a": 1}),
        ("rope_scaling", "llama3"),
        ("sliding_window", -5),
        ("sliding_window", INFINITY),
        ("layer_types", [["full_attention"]]),
        ("max_position_embeddings", "many"),
        ("tie_word_embeddings", "false"),
        ("attention_bias", "no"),
        ("hidden_act", ["silu"]),
        ("model_type", ["fusion_llama"]),
        ("vision_config", [1]),
        ("mm_vision_tower", {"a": 1}),
        ("query_len", [4]),
        ("query_len", "9" * 4000),
        ("num_of_vision_sampler_layers", -1),
        ("start_of_vision_sampler_layers", None),
    ],
)
def test_config_values_of_wrong_kinds_and_sizes(folder, key, value):
    with_entries(folder / "config.json", **{key: value})
    what = "layers.9998" if value == 9999 else key
    refused(lambda: open_published(folder), str(folder), what)


@pytest.mark.parametrize(
    "key, value",
    [
        ("image_size", 10**9),
        ("image_size", 24.0),
        ("patch_size", []),
        ("layer_norm_eps", NAN),
        ("layer_norm_eps", 0),
        ("num_hidden_layers", 10**12),
        ("hidden_act", "gelu"),
        ("hidden_size", "16"),
    ],
)
def test_tower_values_of_wrong_kinds_and_sizes(folder, key, value):
    tower = json.loads((folder / "config.json").read_text())["vision_config"]
    tower[key] = value
    with_entries(folder / "config.json", vision_config=tower)
    refused(lambda: open_published(folder), str(folder), key)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0],
    "long_factor": [2.0, 2.0],
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "scaling, word",
    [
        (LLAMA3 | {"factor": NAN}, "factor"),
        (LLAMA3 | {"factor": 0}, "factor"),
        (LLAMA3 | {"factor": "8"}, "factor"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor"),
        (LLAMA3 | {"original_max_position_embeddings": 10**12}, "original_max_position_embeddings"),
        (LLAMA3 | {"rope_type": 3}, "rope_type"),
        (LONGROPE | {"short_factor": [1.0] * 3}, "short_factors"),
        (LONGROPE | {"short_factor": [1.0, NAN]}, "short_factor"),
        (LONGROPE | {"long_factor": [0, 1]}, "long_factor"),
        (LONGROPE | {"long_factor": "ab"}, "long_factor"),
        (LONGROPE | {"long_factor": ["1", "2"]}, "long_factor"),
        (LONGROPE | {"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
        (LONGROPE | {"attention_factor": INFINITY}, "attention_factor"),
        ({"full_attention": {"rope_type": "default"}}, "each kind of layer"),
    ],
)
def test_rotary_settings_of_wrong_kinds(folder, scaling, word):
    with_entries(folder / "config.json", rope_scaling=scaling)
    refused(lambda: open_published(folder), str(folder), word)


@pytest.mark.parametrize(
    "text, word",
    [
        ("[" * 100_000, "nested"),
        ('{"a": ' * 200 + "1" + "}" * 200, "nested"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "digits"),
        (b"\xff\xfe{}", "not valid JSON"),
        ('{"model_type": "\\ud800"}', "not valid JSON"),
        ("[]", "not a JSON object"),
        ("", "not valid JSON"),
    ],
)
def test_texts_that_are_no_config(folder, text, word):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: open_published(folder), "config.json", word)


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")


@pytest.mark.parametrize("name", FILES)
def test_pipes_folders_and_endless_files_are_not_read(folder, name):
    path = folder / name
    for make in (
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(name),
        lambda: path.symlink_to("nowhere"),
        lambda: path.write_bytes(b"") or os.truncate(path, 1 << 40),
    ):
        path.unlink(missing_ok=True)
        make()
        refused(lambda: open_published(folder), name)
        if path.is_dir():
            path.rmdir()


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.json"]
)
def test_links_do_not_carry_files_of_this_machine_into_checkpoints(folder, tmp_path, name):
    secret = tmp_path / "secret.json"
    secret.write_text((folder / "tokenizer.json").read_text() if name == "tokenizer.json" else "{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    refused(lambda: open_published(folder), str(folder / name), "link out of its folder", str(secret))


def test_links_of_a_hugging_face_cache_are_followed(made, tmp_path):
    cache = tmp_path / "hub" / "models--someone--model"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((made / "one").iterdir())):
        shutil.copy(path, cache / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"{number}")
    opened = open_published(snapshot)
    assert opened.tokenizer == load_tokenizer(made / "one")


@pytest.mark.parametrize(
    "placed, word",
    [
        ([1], "weight_map"),
        (None, "weight_map"),
        ({}, "weight_map"),
        ({"a": 5}, "5"),
        ({"a": None}, "None"),
        ({"a": ["x.safetensors"]}, "plain file name"),
        ({"a": ".."}, "plain file name"),
        ({"a": "../model.safetensors"}, "plain file name"),
        ({"a": "/etc/passwd"}, "plain file name"),
        ({"a": "sub/model.safetensors"}, "plain file name"),
        ({"a": "x\0.safetensors"}, "plain file name"),
        ({"a": "config.json"}, "plain file name"),
        ({"a": "gone.safetensors"}, "missing"),
        ({"a": "x.safetensors" * 100}, "plain file name"),
    ],
)
def test_indexes_of_wrong_forms(made, tmp_path, placed, word):
    folder = shutil.copytree(made / "shards", tmp_path / "folder")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    refused(lambda: open_published(folder), "model.safetensors.index.json" if word != "missing" else "gone", word)


def header(path: Path, text: bytes, said: int | None = None) -> None:
    path.write_bytes((len(text) if said is None else said).to_bytes(8, "little") + text + bytes(64))


@pytest.mark.parametrize(
    "text, said, word",
    [
        (b"{}", 1 << 62, "damaged"),
        (b"{}", 50, "damaged"),
        (b'{"a": {"dtype": "F32", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}}', None, ""),
        (b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 1099511627776]}}', None, "damaged"),
        (b'{"a": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 64]}}', None, "damaged"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"1," * 99 + b'16], "data_offsets": [0, 64]}}', None, "dimensions"),
        (b'{"\\u001b[2J": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}', None, ""),
        (b'{"a": {"dtype": "X1", "shape": [16], "data_offsets": [0, 64]}}', None, "damaged"),
        (b"[" * 10_000, None, "damaged"),
    ],
)
def test_headers_that_lie(folder, text, said, word):
    header(folder / "model.safetensors", text, said)
    refused(lambda: open_published(folder), str(folder), word)


def test_headers_of_a_million_tensors_are_not_read(folder):
    path = folder / "model.safetensors"
    path.write_bytes((1 << 26).to_bytes(8, "little"))
    os.truncate(path, (1 << 26) + 8)
    refused(lambda: open_published(folder), "model.safetensors", "header of 67,108,864 bytes")


def test_a_tensor_larger_than_the_memory_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1)
    refused(lambda: open_published(folder), "model.safetensors", "more than this machine's")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"1000000000000": {"content": "x"}}}, ("1000000000000",)),
        ("tokenizer_config.json", {"added_tokens_decoder": {"999999999": {"content": "x"}}}, ("beyond",)),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "x"}}}, ("'-1'",)),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "x"}}}, ("'x'",)),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": 5}}}, ("content",)),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": ""}}}, ("7",)),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "x", "special": "no"}}}, ("special",)),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, ("added_tokens_decoder",)),
        ("tokenizer_config.json", {"bos_token": {"name": "<s>"}}, ("bos_token", "content")),
        ("tokenizer_config.json", {"bos_token": 1}, ("bos_token",)),
        ("tokenizer_config.json", {"additional_special_tokens": "<s>"}, ("additional_special_tokens",)),
        ("tokenizer_config.json", {"additional_special_tokens": [1]}, ("additional_special_tokens",)),
        ("special_tokens_map.json", {"eos_token": ["</s>"]}, ("eos_token",)),
        ("special_tokens_map.json", [1], ("not a JSON object",)),
        ("added_tokens.json", {"x": 10**12}, ("x", "1000000000000")),
        ("added_tokens.json", {"x": -1}, ("x", "-1")),
        ("added_tokens.json", {"x": "5"}, ("x", "'5'")),
        ("added_tokens.json", {"x": 5.0}, ("x", "5.0")),
        ("added_tokens.json", {"": 5}, ("1 to 1000 characters",)),
        ("added_tokens.json", ["x"], ("not a JSON object",)),
        ("tokenizer.json", {}, ("not a valid tokenizer file",)),
        (
            "tokenizer.json",
            {"model": {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}},
            ("4294967295",),
        ),
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}, ("not a valid tokenizer",)),
    ],
)
def test_tokenizer_files_of_wrong_forms(folder, name, content, words):
    path = folder / name
    if path.is_file() and isinstance(content, dict) and name != "tokenizer.json":
        content = json.loads(path.read_text()) | content
    path.write_text(json.dumps(content))
    refused(lambda: open_published(folder), str(folder), name, *words)


def test_tokenizer_files_that_ask_to_pad_or_cut_are_not_obeyed(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["padding"] = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    content["truncation"] = {"max_length": 1, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).encode("two cubes two") == [6, 7, 6]


# ---- Pickles.


def pickled(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def test_pickles_that_lie_or_run_code(folder):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")
    path = pickled(folder)

    def tried(*words):
        refused(lambda: TensorFolder(folder, allow_pickle=True), path.name, *words)

    path.write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    tried("not a PyTorch zip file")
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    tried("whose numbers all lie in the file")
    torch.save({"a": torch.zeros(3).to_sparse()}, path)
    tried()
    torch.save({"a": torch.zeros(3, device="meta")}, path)
    tried()
    torch.save({5: torch.zeros(3)}, path)
    tried("values that are not named tensors")
    torch.save([torch.zeros(3)], path)
    tried("values that are not named tensors")
    # What PyTorch stores, compressed: a bomb would be like this.
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as whole:
        entries = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in entries.items():
            bomb.writestr(name, content + (bytes(10**6) if name.endswith("data/0") else b""))
    tried("compressed")
    path.unlink()
    os.mkfifo(path)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": path.name}}))
    tried("not a regular file")


# ---- Checkpoints.


def described(made: Path, into: Path, change) -> Path:
    """A copy of the checkpoint that says other things of itself."""
    copy = shutil.copytree(made / "checkpoint", into / "checkpoint")
    about = load_about(copy)
    change(about)
    shutil.rmtree(copy / "about")
    ocp.save_checkpointables(into / "other", {"about": {"json": json.dumps(about)}})
    shutil.copytree(into / "other" / "about", copy / "about")
    return copy


def set_in(*path, value):
    def change(about):
        for key in path[:-1]:
            about = about[key]
        about[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "path, value",
    [
        (("config", "model", "llm", "layers"), 10**12),
        (("config", "model", "llm", "layers"), 9000),
        (("config", "model", "llm", "norm_eps"), NAN),
        (("config", "model", "vision", "image_size"), 10**9),
        (("config",), []),
        (("tokenizer",), []),
        (("origin",), [1]),
        (("origin", "config"), "x"),
        (("origin", "config", "rope_theta"), "x"),
        (("origin", "unused"), [1]),
        (("origin", "unused", "lm_head.weight"), {"dtype": "float32", "shape": [1], "data": "AAAAAA=="}),
        (("origin", "unused", "x.post_layernorm.weight"), {"dtype": "float32", "shape": [1 << 40], "data": "AAAAAA=="}),
        (("origin", "unused", "x.post_layernorm.weight"), {"dtype": "object", "shape": [1], "data": "AAAAAA=="}),
        (("origin", "unused", "x.post_layernorm.weight"), 5),
    ],
)
def test_checkpoints_that_say_odd_things_of_themselves(made, tmp_path, path, value):
    copy = described(made, tmp_path, set_in(*path, value=value))
    refused(lambda: exporting.export(copy, tmp_path / "out", "published", progress=False), str(copy))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_exports_point_to_no_code_of_others(folder, tmp_path, format):
    with_entries(folder / "config.json", auto_map={"AutoModel": "someone/elsewhere--evil.Model"}, custom_pipelines={})
    with_entries(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["someone/elsewhere--evil.T", None]})
    importing.write_checkpoint(open_published(folder), tmp_path / "checkpoint", progress=False)
    exporting.export(tmp_path / "checkpoint", tmp_path / "out", format, progress=False)
    for path in (tmp_path / "out").glob("*.json"):
        assert "elsewhere" not in path.read_text(), path
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["bos_token"] == "<s>"


def test_failures_leave_no_folders_above_the_target(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "c" / "d"):
        raise KeyboardInterrupt
    assert not list((tmp_path / "a").iterdir())
    with new_folder(tmp_path / "a" / "b" / "c") as building:
        (building / "x").touch()
    assert (tmp_path / "a" / "b" / "c" / "x").is_file()


def test_targets_that_no_folder_can_have(tmp_path):
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    os.mkfifo(tmp_path / "pipe")
    for target in (circle / "x", tmp_path / ("x" * 300), "a\0b", tmp_path / "pipe" / "x", "/"):
        refused(lambda target=target: check_room(target, 1) or new_folder(target).__enter__())


def test_paths_of_other_kinds_than_folders(made, tmp_path):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    target = tmp_path / "out"
    for name in ("file", "pipe"):
        refused(lambda name=name: open_published(tmp_path / name), f"{name} is neither a folder nor")
        refused(lambda name=name: open_backbones(tmp_path / name, made / "one"), f"{name} is neither a folder nor")
        refused(lambda name=name: open_backbones(made / "one", tmp_path / name), f"{name} is neither a folder nor")
        refused(lambda name=name: exporting.export(tmp_path / name, target, "published"), "holds no checkpoint")
    refused(lambda: exporting.export(made / "one", target, "published"), "holds no checkpoint")
    for name in ("x" * 300, "a\0b", "a\x1b[2Jb"):
        refused(lambda name=name: open_published(tmp_path / name), "has no config.json")
        refused(lambda name=name: load_tokenizer(tmp_path / name), "no tokenizer folder")
    # And the command ends as commands do.
    command = [sys.executable, "-m", "fusion_jax.convert", "import", "--from", tmp_path / "pipe", "--out", target]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(convert.__file__).parents[1], timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not target.exists()


@pytest.mark.parametrize("value", ['"a text"', '"1.5"', "[1]", "true", "1" + "0" * 400])
def test_metrics_of_a_run_that_hold_something_else_than_numbers(tmp_path, value):
    step = tmp_path / "checkpoints" / "4"
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 4, "ce": 1.25, "note": "x"}\n{"step": 5, "ce": "later"}\n')
    assert "| ce | 1.2500 |" in model_card.metrics_at(step)
    file.write_text(f'{{"step": 4, "ce": {value}}}\n')
    refused(lambda: model_card.metrics_at(step), str(file))


def test_sizes_are_refused_before_memory_is_taken(folder):
    with_entries(folder / "config.json", num_hidden_layers=10_000, intermediate_size=1 << 20)
    tracemalloc.start()
    try:
        refused(lambda: open_published(folder), "layers.9999")
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
