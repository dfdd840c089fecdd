"""Turns the messages of a chat request into the turns of a conversation, without loss or addition."""

from collections.abc import Callable, Mapping
from typing import Any

from fusion_jax.data.conversation import IMAGE_SLOT
from fusion_jax.inference.prompts import BETWEEN
from fusion_jax.server.error import ApiError
from fusion_jax.server.json_body import text_too_long
from fusion_jax.server.keys import Keys, check_keys, no_op

_ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_TOOLS = "there are no tools here"
_MESSAGE = Keys(read=("role", "content", "name"), fixed={"tool_calls": (_TOOLS, no_op([]))})
_ASSISTANT = Keys(
    read=(*_MESSAGE.read, "refusal"),
    ignored=("annotations",),  # sources of the text, which are not part of it
    fixed={
        "tool_calls": (_TOOLS, no_op([])),
        "function_call": (_TOOLS, no_op()),
        "audio": ("the model reads images and text, and answers in text", no_op()),
        "reasoning_content": ("no template has a place for it", no_op("")),
        "reasoning": ("no template has a place for it", no_op("")),
    },
)
_PARTS = {
    "text": Keys(read=("type", "text"), ignored=("cache_control", "prompt_cache_breakpoint")),
    "refusal": Keys(read=("type", "refusal")),
    "image_url": Keys(read=("type", "image_url"), ignored=("cache_control", "prompt_cache_breakpoint")),
}
_IMAGE = Keys(
    read=("url",),
    fixed={"detail": ("images are always read in full; leave it out", no_op("auto", "high", "original"))},
)


def read_messages(
    messages: Any, text_bytes: int, take_image: Callable[[Any, str], None]
) -> tuple[list[dict[str, str]], str | None]:
    """The turns of a conversation, with an IMAGE_SLOT for each image, and its system text.

    Messages of one role that follow each other are one turn. System texts before the user's first message are the
    conversation's own; later ones count as the user's.

    Args:
      text_bytes: most bytes of all texts. take_image: called with each image's address and its place.

    Raises:
      ApiError: 400, which names the message and the problem.
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
            problem = "role must be system, developer, user or assistant"
            raise ApiError(400, f"{where}: {problem}.", "invalid_value", where)
        check_keys(message, _ASSISTANT if role == "assistant" else _MESSAGE, where)
        _check_name(message.get("name"), role, names, where)
        text = _text(message, role, where, take_image)
        size += len(text.encode(errors="replace"))
        if size > text_bytes:
            raise text_too_long(text_bytes)
        speaker = _ROLES[role]
        if speaker == "system" and not any(one == "human" for one, _ in turns):
            system.append(text)
            continue
        speaker = "human" if speaker == "system" else speaker
        if not turns or turns[-1][0] != speaker:
            turns.append((speaker, []))
        turns[-1][1].append(text)
    if not turns or turns[-1][0] != "human":
        raise ApiError(400, "The last message must be the user's.", "invalid_value", "messages")
    return [{"from": speaker, "value": _joined(texts)} for speaker, texts in turns], _joined(system) or None


def _joined(texts: list[str]) -> str:
    return BETWEEN.join(filter(None, texts))


def _check_name(name: Any, role: str, names: dict[str, str], where: str) -> None:
    """Raises ApiError where one role has several names, because no template can express that."""
    if name is None:
        return
    if not isinstance(name, str):
        raise ApiError(400, f"{where}: name must be a text.", "invalid_type", where)
    if names.setdefault(role, name) != name:
        problem = f"several names of one role ({role}) are not supported; write the speaker into the text"
        raise ApiError(400, f"{where}: {problem}.", "unsupported_value", where)


def _text(message: Mapping[str, Any], role: str, where: str, take_image: Callable[[Any, str], None]) -> str:
    """The text of a message; an assistant's may be empty, or a refusal."""
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
        # As in data sets, images before the text are on lines of their own.
        piece = _part(part, role, f"{where}.content[{i}]", take_image)
        leads = piece is IMAGE_SLOT and not text.replace(IMAGE_SLOT, "").strip()
        text += f"{piece}\n" if leads else piece
    return _joined([text, refusal or ""])


def _part(part: Any, role: str, where: str, take_image: Callable[[Any, str], None]) -> str:
    """The text of a part; IMAGE_SLOT for an image."""
    kind = part.get("type") if isinstance(part, dict) else None
    allowed = {"user": ("text", "image_url"), "assistant": ("text", "refusal")}.get(role, ("text",))
    if kind not in allowed:
        problem = f"parts of {role} messages must have the type {' or '.join(allowed)}"
        raise ApiError(400, f"{where}: {problem}.", "invalid_value", where)
    check_keys(part, _PARTS[kind], where)
    if kind == "image_url":
        # The address is removed from the message: the long text is not needed once it is decoded.
        address = part.pop("image_url", None)
        if isinstance(address, dict):
            check_keys(address, _IMAGE, f"{where}.image_url")
        take_image(address, where)
        return IMAGE_SLOT
    if not isinstance(part.get(kind), str):
        raise ApiError(400, f"{where}: {kind} must be a text.", "invalid_type", where)
    return part[kind]
