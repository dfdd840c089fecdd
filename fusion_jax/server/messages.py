"""The messages of a chat request as a conversation's turns, with nothing of them lost and nothing added."""

from collections.abc import Callable, Mapping
from typing import Any

from fusion_jax.data.conversation import IMAGE_SLOT
from fusion_jax.inference.prompts import BETWEEN
from fusion_jax.server.error import ApiError
from fusion_jax.server.json_body import text_too_long
from fusion_jax.server.keys import Keys, check_keys, no_op

_ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_TOOLS = "there are no tools here"
_MESSAGE = Keys(taken=("role", "content", "name"), fixed={"tool_calls": (_TOOLS, no_op([]))})
_ASSISTANT = Keys(
    taken=(*_MESSAGE.taken, "refusal"),
    ignored=("annotations",),  # they say where words came from, and are none
    fixed={
        "tool_calls": (_TOOLS, no_op([])),
        "function_call": (_TOOLS, no_op()),
        "audio": ("only text is heard and said", no_op()),
        "reasoning_content": ("no template has a place for it", no_op("")),
        "reasoning": ("no template has a place for it", no_op("")),
    },
)
_PARTS = {
    "text": Keys(taken=("type", "text"), ignored=("cache_control", "prompt_cache_breakpoint")),
    "refusal": Keys(taken=("type", "refusal")),
    "image_url": Keys(taken=("type", "image_url"), ignored=("cache_control", "prompt_cache_breakpoint")),
}
_IMAGE = Keys(
    taken=("url",),
    fixed={"detail": ("images are always read in full; leave it out", no_op("auto", "high", "original"))},
)


def read_messages(
    messages: Any, text_bytes: int, take_image: Callable[[Any, str], None]
) -> tuple[list[dict[str, str]], str | None]:
    """The turns of a conversation, with an IMAGE_SLOT for each image, and its system text.

    Messages of one role that follow each other are one turn. System texts before the user's first message are the
    conversation's own; later ones are said as the user's words are.

    Args:
      text_bytes: how many bytes all texts may have. take_image: called with each image's address and its place.

    Raises:
      ApiError: 400 with the message and what is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message.", "invalid_value", "messages")
    turns: list[tuple[str, list[str]]] = []
    system, names, size = [], {}, 0
    for k, message in enumerate(messages):
        where = f"messages[{k}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("tool", "function"):
            raise ApiError(400, f"{where}: {_TOOLS}, so no message is a {role}'s.", "unsupported_value", where)
        if not isinstance(role, str) or role not in _ROLES:
            said = "role must be system, developer, user or assistant"
            raise ApiError(400, f"{where}: {said}.", "invalid_value", where)
        check_keys(message, _ASSISTANT if role == "assistant" else _MESSAGE, where)
        _check_name(message.get("name"), role, names, where)
        text = _text(message, role, where, take_image)
        size += len(text.encode(errors="replace"))
        if size > text_bytes:
            raise text_too_long(text_bytes)
        who = _ROLES[role]
        if who == "system" and not any(one == "human" for one, _ in turns):
            system.append(text)
            continue
        who = "human" if who == "system" else who
        if not turns or turns[-1][0] != who:
            turns.append((who, []))
        turns[-1][1].append(text)
    if not turns or turns[-1][0] != "human":
        raise ApiError(400, "The last message must be the user's.", "invalid_value", "messages")
    return [{"from": who, "value": _joined(texts)} for who, texts in turns], _joined(system) or None


def _joined(texts: list[str]) -> str:
    return BETWEEN.join(filter(None, texts))


def _check_name(name: Any, role: str, names: dict[str, str], where: str) -> None:
    """Names of speakers are nothing that a template holds; ApiError where they tell those of one role apart."""
    if name is None:
        return
    if not isinstance(name, str):
        raise ApiError(400, f"{where}: name must be a text.", "invalid_type", where)
    if names.setdefault(role, name) != name:
        said = f"several names of one role ({role}) are not supported; write who speaks into the text"
        raise ApiError(400, f"{where}: {said}.", "unsupported_value", where)


def _text(message: Mapping[str, Any], role: str, where: str, take_image: Callable[[Any, str], None]) -> str:
    """What a message says. An assistant's may be nothing: what it had was a refusal, or no words."""
    content, refusal = message.get("content"), message.get("refusal")
    if refusal is not None and not isinstance(refusal, str):
        raise ApiError(400, f"{where}: refusal must be a text.", "invalid_type", where)
    if content is None and role == "assistant":
        return refusal or ""
    if isinstance(content, str):
        return _joined([content, refusal or ""])
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where}: content must be a text or a list of parts.", "invalid_value", where)
    text = ""
    for i, part in enumerate(content):
        # As data sets write it: images in front of a text stand on lines of their own.
        said = _part(part, role, f"{where}.content[{i}]", take_image)
        leads = said is IMAGE_SLOT and not text.replace(IMAGE_SLOT, "").strip()
        text += f"{said}\n" if leads else said
    return _joined([text, refusal or ""])


def _part(part: Any, role: str, where: str, take_image: Callable[[Any, str], None]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    allowed = {"user": ("text", "image_url"), "assistant": ("text", "refusal")}.get(role, ("text",))
    if kind not in allowed:
        said = f"parts of {role} messages must have the type {' or '.join(allowed)}"
        raise ApiError(400, f"{where}: {said}.", "invalid_value", where)
    check_keys(part, _PARTS[kind], where)
    if kind == "image_url":
        # Taken out of the message: a long text that nobody needs once it is decoded.
        address = part.pop("image_url", None)
        if isinstance(address, dict):
            check_keys(address, _IMAGE, f"{where}.image_url")
        take_image(address, where)
        return IMAGE_SLOT
    if not isinstance(part.get(kind), str):
        raise ApiError(400, f"{where}: {kind} must be a text.", "invalid_type", where)
    return part[kind]
