"""Writes, reads and checks the `about` entry of a checkpoint: config, tokenizer files, environment."""

import base64
import binascii
import importlib.metadata
import json
import logging
import math
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from fusion_jax.config import RunConfig, from_dict, to_dict
from fusion_jax.data import chat_template
from fusion_jax.data.conversation import encode_conversation
from fusion_jax.data.templates import TEMPLATES
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.data.tokenizer_files import TOKENIZER_FILES, read_config
from fusion_jax.errors import UserError, check, first_line
from fusion_jax.models.config import FusionConfig
from fusion_jax.training import integrity

log = logging.getLogger("fusion_jax")

LARGEST = 1 << 28  # bytes of the whole entry, and of each tokenizer file in it
_MOST_LAYERS, _MOST_TOKENS = 1 << 14, 1 << 20
# The version of the entry. With version 1, or none, every conversation began with a BOS token (or else the padding
# token), whatever the tokenizer's files say. With version 2 it begins as `data.templates.first_ids` describes.
FORMAT = 2
_KINDS = {
    "config": dict,
    "tokenizer": dict,
    "origin": dict,
    "records": dict,  # from earlier versions: the numbers of records alone
    "data": dict,
    "conversation": list,
    "stage": dict,
    "environment": dict,
}
_PART = {"name": str, "drawn": int, "chosen": int, "records": int, "bytes": int, "hash": str}


def describe_run(
    config: RunConfig,
    tokenizer: Tokenizer | None,
    origin: dict[str, Any] | None = None,
    data: dict[str, list[dict[str, Any]]] | None = None,
) -> dict[str, str]:
    """Returns the `about` entry of a checkpoint: one JSON text, because Orbax writes a file entry per leaf.

    Args:
      origin: what an import keeps of the folder that it read, for a later export (see `interop.opening.Opened`).
      data: a description of each stage's files (`RecordSource.describe`).
    """
    files = {}
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in sorted(Path(folder).iterdir())}
    about = {
        "format": FORMAT,
        "config": to_dict(config),
        "tokenizer": files,
        "origin": origin or {},
        "data": data or {},
        "conversation": [] if tokenizer is None else conversation_ids(tokenizer, config.template),
        "environment": environment(),
    }
    return {"json": json.dumps(about)}


def with_stage(about: dict[str, str], name: str, order: int) -> dict[str, str]:
    """Returns a run's entry with the stage of a checkpoint added; `order` is from `checkpoint_folders.order_in`."""
    return {"json": json.dumps({**json.loads(about["json"]), "stage": {"name": name, "order": order}})}


def conversation_ids(tokenizer: Tokenizer, template: str) -> list[int]:
    """Returns tokens, labels and question tokens of a fixed conversation.

    They differ if the template, the tokenizer or the code has changed. Empty if the tokenizer lacks a token of the
    template.
    """
    texts = ("human", "<image>\nWhat is it?"), ("gpt", "A tree."), ("human", "How tall?"), ("gpt", "12 m, I'd say.")
    turns = [{"from": role, "value": text} for role, text in texts]
    try:
        encoded = encode_conversation(turns, tokenizer, chat_template.find(template, tokenizer), 1)
    except UserError:
        return []
    return [*encoded.input_ids.tolist(), *encoded.labels.tolist(), *encoded.instructs.tolist()]


def environment() -> dict[str, Any]:
    """Returns what a run depends on besides its config: versions, devices, and the commit in a git checkout."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    here = Path(__file__).parents[2]
    commit = None
    if (here / ".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True)
        commit = done.stdout.decode().strip() or None
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in names},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "commit": commit,
        "started": time.strftime("%F %T %z"),
    }


def load_text(folder: Path, part: str) -> Any:
    """Reads the JSON of a small part of a step folder (`about`, `data`).

    Raises:
      ValueError: it cannot be read, or is larger than any that is written; the error says why.
    """
    try:
        size = sum((folder / name).stat().st_size for name in integrity.files(folder) if name.startswith(f"{part}/"))
        if size > LARGEST:
            raise ValueError(f"its {part} has {size:,} bytes, more than the {LARGEST:,} that are read")
        return json.loads(ocp.load_checkpointables(folder, {part: None})[part]["json"])
    except MemoryError:
        raise
    except Exception as error:  # Orbax, TensorStore and json raise errors of many types
        raise ValueError(first_line(error)) from error


def check_form(about: Any, needed: Collection[str] = ("config", "tokenizer")) -> dict[str, Any]:
    """Returns `about` if its entries have the right types and the `needed` ones are there.

    Raises:
      ValueError: names the entry.
    """
    if not isinstance(about, dict):
        raise ValueError(f"its about holds {type(about).__name__} instead of entries by name")
    for name in needed:
        if name not in about:
            raise ValueError(f"its about has no {name!r}")
    for name, kind in _KINDS.items():
        if name in about and not isinstance(about[name], kind):
            raise ValueError(f"{name!r} of its about is {type(about[name]).__name__} instead of {kind.__name__}")
    if type(about.get("format", FORMAT)) is not int:
        raise ValueError(f"'format' of its about is {about['format']!r:.80} instead of a number")
    for name, content in about.get("tokenizer", {}).items():
        if name not in TOKENIZER_FILES:
            raise ValueError(f"its about has a tokenizer file {name[:80]!r}; known are {', '.join(TOKENIZER_FILES)}")
        if not isinstance(content, str) or len(content) > LARGEST:
            raise ValueError(
                f"the content of the tokenizer file {name!r} in its about is not a text of a sensible size"
            )
    for name, count in about.get("records", {}).items():
        if type(count) is not int or count < 0:
            raise ValueError(f"'records' of its about has {count!r:.80} for {name[:80]!r} instead of a number")
    for name, parts in about.get("data", {}).items():
        for part in parts if isinstance(parts, list) else [None]:
            if not isinstance(part, dict) or {key: type(value) for key, value in part.items()} != _PART:
                raise ValueError(f"'data' of its about has {parts!r:.80} for {name[:80]!r} instead of files' numbers")
    if not all(type(token) is int for token in about.get("conversation", [])):
        raise ValueError("'conversation' of its about has something that is not a token")
    stage = about.get("stage", {"name": "", "order": 0})
    if {key: type(value) for key, value in stage.items()} != {"name": str, "order": int}:
        raise ValueError(f"'stage' of its about is {stage!r:.80} instead of a name and an order")
    return about


def load_about(folder: Path) -> dict[str, Any]:
    """Reads the `about` entry of a step folder.

    Raises:
      UserError: it is missing or damaged, or one of its entries has a wrong type; names the folder.
    """
    try:
        about = check_form(load_text(folder, "about"))
    except ValueError as error:
        raise UserError(f"{folder} is not an intact checkpoint: {error}") from error
    config_of(about, folder)
    return about


def config_of(about: dict[str, Any], folder: Path | str) -> RunConfig:
    """Returns the run config of an `about` entry. Raises UserError, which names the folder, if it is not valid."""
    try:
        config = from_dict(RunConfig, about["config"])
        _check_model(config.model)
        return config
    except UserError as error:
        raise UserError(f"{folder} has a config that cannot be used: {error}") from error
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} has a config that cannot be used ({first_line(error)}).") from error


def _check_model(model: FusionConfig) -> None:
    """Raises UserError if a size is too large for any model: describing its parameters alone would take all memory."""
    tokens = (model.vision.patches, model.image_tokens, model.tile_tokens, *model.latent_counts)
    for name, value, most in (
        ("vision.layers", model.vision.layers, _MOST_LAYERS),
        ("llm.layers", model.llm.layers, _MOST_LAYERS),
        ("exchange.layers", model.exchange.layers, _MOST_LAYERS),
        ("tokens of an image, a tile or a latent grid", max(tokens), _MOST_TOKENS),
        ("llm.vocab_size", model.llm.vocab_size, 2**31 - 129),
        ("most_crops", model.most_crops, _MOST_TOKENS),
    ):
        check(value <= most, f"config.model: {name}={value} is more than the {most} that are possible.")


def always_bos(about: dict[str, Any], where: Path | str) -> bool:
    """Returns whether a checkpoint was trained with a BOS before every conversation, whatever its tokenizer says."""
    if about.get("format", 1) >= 2:
        return False
    config = config_of(about, where)
    template = TEMPLATES.get(config.template)  # templates of a tokenizer came later
    return template is not None and template.bos is None and any(stage.data for stage in config.stages)


def save_tokenizer(about: dict[str, Any], folder: Path) -> None:
    """Writes the tokenizer's files of an `about` entry.

    If the checkpoint was trained with a BOS token that they do not ask for (`always_bos`), they are changed to do so.

    Raises:
      UserError: the checkpoint has no tokenizer, or an unknown file of one.
    """
    if not about["tokenizer"]:
        raise UserError(
            "The checkpoint holds no tokenizer: the folder it was imported from had none; put tokenizer files "
            "into that folder and import it again."
        )
    contents = {}
    try:
        for name, content in check_form(about, ("tokenizer",))["tokenizer"].items():
            contents[name] = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"The checkpoint holds a tokenizer that cannot be used: {error}.") from error
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    if "config" in about and always_bos(about, folder) and not load_tokenizer(folder).adds_bos:
        config, names = read_config(folder)
        first = names.get("bos_token", names.get("pad_token"))
        check(
            first is not None,
            "The checkpoint was trained with a BOS or padding token in front of every conversation, and its tokenizer "
            "names neither: it cannot be used.",
        )
        config |= {"add_bos_token": True, "bos_token": first}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        log.warning(
            "the checkpoint was trained with %s in front of every conversation, which its tokenizer does not ask for; "
            "so it stays",
            first,
        )


def check_size(folder: Path, like: Any) -> None:
    """Raises UserError if the files of a step folder are too small for parameters of the shapes of `like`.

    Arrays compress, but not a hundredfold: a config that promises more than that would only fill the memory.
    """
    described = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    stored = sum(path.stat().st_size for path in (folder / "params").rglob("*") if path.is_file())
    check(
        described <= 100 * stored + (1 << 30),
        f"{folder} is not an intact checkpoint: its config describes parameters of {described / 2**30:,.1f} GiB, "
        f"its files have {stored / 2**30:,.3f} GiB.",
    )
