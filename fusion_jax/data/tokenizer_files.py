"""Reads and checks the files of a tokenizer folder before anything relies on them.

They come from whoever published the model, and every checkpoint and export copies them. So every value must have the
right type, and no file of a folder that is not the user's own may be a link out of it.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError, check
from fusion_jax.files import brief, read_file
from fusion_jax.models.limits import RANGES
from fusion_jax.values.foreign import flag, mapping, read_bytes, read_object, sequence, text, whole

# Everything that decides what a tokenizer does; these are read, hashed and saved.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
MOST_BYTES = 1 << 26  # bytes of a file; the largest tokenizer.json have some 35 MB
MOST_ADDED = 1 << 16
MOST_IDS = RANGES["vocab_size"][1]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CONFIG = "tokenizer_config.json"
_MORE = "additional_special_tokens"
_CHAT = "chat_template.jinja"
MOST_TEMPLATE = 1 << 17  # characters; the longest published chat templates have some 20,000
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def present(folder: Path, name: str) -> bool:
    """Returns whether a folder holds that file. Raises UserError if it is not a regular file, or too large."""
    path = folder / name
    if not os.path.lexists(path):
        return False
    target = _target(path)
    check(target.is_file(), f"{path} is not a regular file, or is a link to nothing.")
    size = target.stat().st_size
    check(size <= MOST_BYTES, f"{path} has {size:,} bytes; at most {MOST_BYTES:,} are read.")
    return True


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Checks those files of somebody else's folder, a resolved path, for links out of it.

    Raises:
      UserError: one is a link out of the folder. It would carry any file of this machine into checkpoints and exports.
        Links to the blobs of a Hugging Face cache (`models--*/blobs`) are its way of keeping files, from its own
        `snapshots` and from folders elsewhere.
    """
    for path in (folder / name for name in names):
        target = _target(path)
        blob = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
        check(
            folder in target.parents or blob,
            f"{path} is a link out of its folder, to {target}; copy that file into the folder if it belongs to the "
            "tokenizer.",
        )


def _target(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is a link that leads in a circle.") from error


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads tokenizer_config.json, and the names of the bos, eos, unk and pad tokens by role, if they are named.

    Raises:
      UserError: a file is not a JSON object, or a token of a role is not a text.
    """
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", _CONFIG):
        config, where = _read(folder, file), f"{folder / file}"
        for role in _ROLES:
            if role in config:
                names.pop(role, None)  # null in the latter file withdraws what the former says
            if config.get(role) not in (None, ""):
                names[role] = _content(config[role], role, where)
        for token in sequence(config, _MORE, where):
            _content(token, _MORE, where)
    return config, names


def declared_tokens(folder: Path, config: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Returns id and entry of every token that tokenizer_config.json adds, by ascending id.

    An entry has `content` (text) and the `FLAGS` (bool).
    """
    where = f"{folder / _CONFIG} (added_tokens_decoder)"
    entries = mapping(config, "added_tokens_decoder", f"{folder / _CONFIG}")
    check(len(entries) <= MOST_ADDED, f"{where} has {len(entries):,} tokens; at most {MOST_ADDED:,} are allowed.")
    tokens = []
    for key, entry in entries.items():
        check(key.isascii() and key.isdecimal() and len(key) <= 9, f"{where}: {brief(key)} is not a token id.")
        check(int(key) < MOST_IDS, f"{where}: token id {key} is beyond {MOST_IDS:,}.")
        check(isinstance(entry, dict), f"{where}: {key} must be an object, got {brief(entry)}.")
        flags = {name: flag(entry, name, f"{where}, {key}") for name in FLAGS}
        tokens.append((int(key), {"content": _content(entry, key, where), **flags}))
    return sorted(tokens, key=lambda item: item[0])


def added_tokens(folder: Path) -> dict[str, int]:
    """Reads added_tokens.json, a map from text to id."""
    content, path = _read(folder, "added_tokens.json"), folder / "added_tokens.json"
    check(len(content) <= MOST_ADDED, f"{path} has {len(content):,} tokens; at most {MOST_ADDED:,} are allowed.")
    for token, i in content.items():
        whole(content, token, f"{path}", 0, MOST_IDS - 1)
        _content(token, brief(i), f"{path}")
    return content


def special_tokens(folder: Path, config: dict[str, Any]) -> list[str]:
    """Reads `additional_special_tokens` of tokenizer_config.json."""
    where = f"{folder / _CONFIG}"
    return [_content(token, _MORE, where) for token in sequence(config, _MORE, where)]


def adds_bos(folder: Path, config: dict[str, Any]) -> bool | None:
    """Reads `add_bos_token` of tokenizer_config.json; None if it is absent. Raises UserError if it is not a bool."""
    key = "add_bos_token"
    return None if config.get(key) is None else flag(config, key, f"{folder / _CONFIG}")


def chat_template(folder: Path, config: dict[str, Any]) -> tuple[str, Path] | None:
    """Reads the folder's chat template, Jinja text, and its file: chat_template.jinja is preferred to `chat_template`
    of tokenizer_config.json, which may also list several by name; then "default" is used. None without one.

    Raises:
      UserError: it is not a text, or too long.
    """
    path = folder / _CONFIG
    content = config.get("chat_template")
    if isinstance(content, list):
        named = {entry.get("name"): entry.get("template") for entry in content if isinstance(entry, dict)}
        content = named.get("default")
    if present(folder, _CHAT):
        path = folder / _CHAT
        try:
            content = read_bytes(path, MOST_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text.") from error
    if content in (None, ""):
        return None
    check(isinstance(content, str), f"{path}: chat_template must be a text, got {brief(content)}.")
    check(len(content) <= MOST_TEMPLATE, f"{path}: a chat template of over {MOST_TEMPLATE:,} characters is too long.")
    return content, path


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_object(folder / name) if present(folder, name) else {}


def _content(token: Any, key: str, where: str) -> str:
    """Returns the text of a token, which is written as a text or as an object with `content`."""
    content = text(token, "content", f"{where}: {key}") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise UserError(f"{where} has a value of the wrong kind: {key} must be a token, got {brief(content)}.")
    check(0 < len(content) <= 1000, f"{where}: the token {brief(content)} of {key} must have 1 to 1000 characters.")
    return content


def fingerprint(folder: Path) -> str:
    """Returns a hash of the names and contents of the tokenizer files in `folder`."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            content = read_file(folder / name)
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()
