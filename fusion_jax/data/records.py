"""Reads turns, images and system text out of a record in any of the usual forms.

    LLaVA      {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": ...}]}
    ShareGPT   {"images": ["a.jpg"], "system": "Be brief.", "conversations": [{"from": "system", ...}, ...]}
    messages   {"images": [{"path": "a.jpg"}], "messages": [{"role": "user", "content": "<image>What?"}, ...]}
    parts      {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.jpg"},
                                                         {"type": "text", "text": "What?"}]}, ...]}

docs/data.md has the table of what is understood and what is refused. No part of a conversation is left out silently: a
record with something that no template can hold is bad.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusion_jax.data.conversation import IMAGE_TAG, LONE_SURROGATE
from fusion_jax.data.media import Named, check_media, named_images, plain_key, read_image
from fusion_jax.errors import BadRecord
from fusion_jax.files import brief, shown

_ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "model"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TOOL_ROLES = ("tool", "tools", "function", "function_call", "function_response", "tool_call", "tool_response")
_TOOL_ROLES += ("observation", "ipython", "environment")
_TOOLS = ("tools", "functions", "tool_calls", "function_call")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
_TURNS = ("conversations", "messages")
_SYSTEM = ("system", "systemprompt", "systemmessage")
# Tags that other systems put in place of media; in HTML some of them are text, but hardly at the start of a question.
_OTHER_TAGS = re.compile(
    r"\A\s*<(?:video|audio|speech)>|<img>[^<>\n]+</img>|<ImageHere>|<image_placeholder>|"
    r"<\|(?:image|video|audio)(?:_\d+|_pad|_start)?\|>|<\|vision_start\|>"
)
_NUMBERED_TAG = re.compile(r"<image[ _]?\d+>")  # beside images these are words about them


@dataclass(frozen=True)
class Said:
    """A record, whatever its form was.

    Attributes:
      id: its own id, or its number in the file.
      turns: `{"from": "human" | "gpt", "value": text}` each; whether one may follow the other is not checked.
      images: in the order of their `<image>` tags.
      system: the record's own system text; None without one.
      where: file, record and id, for messages.
    """

    id: str
    turns: list[dict[str, str]]
    images: tuple[Named, ...]
    system: str | None
    where: str


def understand(record: Any, number: int, where: str, *, stored: bool = False) -> Said:
    """Reads a record's turns, images and system text.

    Args:
      record: parsed JSON. number: the record's number in its file, which names it if it has no id.
      stored: whether its images are stored with it, as in shards, so that it names none.

    Raises:
      BadRecord: it is not an object (bad_record), has no turns (missing_key), or bad ones (bad_turns, unknown_role,
        tool_turn, system_turn); values that are not images or are remote (bad_image, remote_image); media under other
        keys (unknown_media); two keys that say different things (contradiction).
    """
    if not isinstance(record, Mapping):
        raise BadRecord("bad_record", where, f"a record must be an object, not {type(record).__name__}")
    name = str(number)
    if record.get("id") is not None:
        name = str(record["id"])
        where = f"{where} (id {shown(name)})"
    turns, system, places = _both(record, where)
    if any(_given(record.get(key)) for key in _TOOLS):
        raise BadRecord("tool_turn", where, "the record offers tools, for which no template has a place")
    if stored:
        if any(places):
            raise BadRecord("contradiction", where, "its turns hold images of their own, and others lie beside it")
        return Said(name, turns, (), system, where)
    key, images = named_images(record, where)
    tag = next((match[0] for turn in turns if (match := _NUMBERED_TAG.search(turn["value"]))), None)
    if tag and not images and not any(places):
        raise BadRecord("unknown_media", where, f"a turn says {tag}, and the record has no image")
    check_media(record, ("id", *_TURNS), bool(images) or any(places), where)
    return Said(name, turns, tuple(_in_order(places, images, key, where)), system, where)


def _given(tools: Any) -> bool:
    return bool(tools) and not (isinstance(tools, str) and tools.strip() in ("", "[]", "{}", "null"))


def _both(record: Mapping, where: str) -> tuple[list[dict[str, str]], str | None, list[Named | None]]:
    """Returns turns, system text, and for each image tag of the human turns the image that its part has, or None."""
    keys = [key for key in _TURNS if record.get(key) is not None]
    if not keys:
        has = ", ".join(shown(key, 40) for key in list(record)[:12]) or "none"
        raise BadRecord("missing_key", where, f"the key 'conversations' (or 'messages') is missing; it has {has}")
    turns, system, places = _turns(record[keys[0]], keys[0], where)
    if keys[1:] and (turns, system, places) != _turns(record[keys[1]], keys[1], where):
        raise BadRecord("contradiction", where, "'conversations' and 'messages' say different things; leave one out")
    for key in (key for key in record if plain_key(key) in _SYSTEM and record[key] not in (None, "")):
        said = _text(record[key], f"'{key}'", where)
        if system not in (None, said):
            raise BadRecord("contradiction", where, f"'{shown(key)}' is another system text than the first turn's")
        system = said
    return turns, system, places


def _turns(value: Any, key: str, where: str) -> tuple[list[dict[str, str]], str | None, list[Named | None]]:
    if not isinstance(value, list):
        raise BadRecord("bad_turns", where, f"'{key}' must be a list, not {type(value).__name__}")
    turns, system, places = [], None, []
    for k, turn in enumerate(value):
        what = f"'{key}' entry {k}"
        names = ("role", "content") if key == "messages" else ("from", "value")
        if not isinstance(turn, Mapping):
            raise BadRecord("bad_turns", where, f"{what} must be an object with '{names[0]}' and '{names[1]}'")
        who = _role(_either(turn, ("from", "role"), names[0], what, where), what, where)
        if any(_given(turn.get(tools)) for tools in _TOOLS):
            raise BadRecord("tool_turn", where, f"{what} calls a tool, for which no template has a place")
        if who == "gpt":
            _check_answer(turn, what, where)
        content = _either(turn, ("value", "content"), names[1], what, where)
        if who == "system":
            if turns or system is not None:
                raise BadRecord("system_turn", where, f"{what} is a system text after the first turn")
            system = _text(content, what, where)
            check_media(turn, (), False, where, f" in {what}")
            continue
        text, parts = _content(content, what, where)
        if who == "human" and (tag := _OTHER_TAGS.search(text)):
            detail = f"{what} has {shown(tag[0].strip())}, the tag of another system; an image's is {IMAGE_TAG}"
            raise BadRecord("unknown_media", where, detail)
        own, images = named_images(turn, where, f" in {what}")
        check_media(turn, ("from", "role", "value", "content"), bool(images), where, f" in {what}")
        if images and not parts:
            text, parts = "".join(f"{IMAGE_TAG}\n" for _ in images) + text, [None] * len(images)
        if images:
            parts = _in_order(parts, images, own, where)
        turns.append({"from": who, "value": text})
        places += parts
    return turns, system or None, places


def _check_answer(turn: Mapping, what: str, where: str) -> None:
    """Raises BadRecord if an answer is not to be learnt like the others, or has more than its text."""
    if turn.get("weight") not in (None, 1):
        detail = f"{what} has weight {brief(turn['weight'])}; every answer is learnt alike: leave the record out"
        raise BadRecord("bad_turns", where, detail)
    for key in ("loss", "train", "training"):
        if turn.get(key) is False:
            raise BadRecord("bad_turns", where, f"{what} has {key} false; every answer is learnt: leave the record out")
    for key in _THOUGHTS:
        if turn.get(key):
            raise BadRecord("bad_turns", where, f"{what} has '{key}', for which no template has a place")


def _either(turn: Mapping, keys: Sequence[str], usual: str, what: str, where: str) -> Any:
    values = [turn[key] for key in keys if key in turn]
    values = [one for one in values if one is not None] or values[:1]
    if not values:
        raise BadRecord("missing_key", where, f"the key '{usual}' is missing in {what}")
    if any(one != values[0] for one in values):
        raise BadRecord("contradiction", where, f"'{keys[0]}' and '{keys[1]}' differ in {what}")
    return values[0]


def _role(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadRecord("bad_turns", where, f"the role ('from' or 'role') must be a text in {what}")
    role = value.strip().lower()
    if role in _TOOL_ROLES:
        raise BadRecord("tool_turn", where, f"{what} is of {brief(value)}; no template has a place for tools")
    if role not in _ROLES:
        raise BadRecord("unknown_role", where, f"{what} is of {brief(value)}; known are {', '.join(_ROLES)}")
    return _ROLES[role]


def _text(value: Any, what: str, where: str) -> str:
    """Returns a system text."""
    text, places = _content(value, what, where)
    if places:
        raise BadRecord("system_turn", where, f"{what} has an image in a system text")
    if LONE_SURROGATE.search(text):
        raise BadRecord("bad_turns", where, f"{what} holds half a surrogate pair, which is not text")
    return text


def _content(value: Any, what: str, where: str) -> tuple[str, list[Named | None]]:
    """Returns a turn's text with an IMAGE_TAG for each image, and for each of these the part's own image, or None."""
    if isinstance(value, str):
        return value, [None] * value.count(IMAGE_TAG)
    if not isinstance(value, list):
        raise BadRecord("bad_turns", where, f"the text ('value' or 'content') must be a text or parts in {what}")
    text, places = "", []
    for i, part in enumerate(value):
        said, place = _part(part, f"part {i} of {what}", where)
        # As in published data sets, images in front of a text are on lines of their own.
        text += f"{said}\n" if place and not text.replace(IMAGE_TAG, "").strip() else said
        places += place or [None] * said.count(IMAGE_TAG)
    return text, places


def _part(part: Any, what: str, where: str) -> tuple[str, list[Named | None]]:
    """Returns a part's text, or IMAGE_TAG and its image."""
    if isinstance(part, str):
        return part, []
    if not isinstance(part, Mapping):
        raise BadRecord("bad_turns", where, f"{what} must be an object or a text")
    filled = {key: one for key, one in part.items() if one is not None and key != "type"}
    kind = part.get("type")
    if kind is None:
        kind = "text" if "text" in filled else "image" if named_images(filled, where, f" in {what}")[0] else None
    if kind in ("text", "input_text", "output_text"):
        said = [filled[key] for key in ("text", "value", "content") if key in filled]
        if not said or not isinstance(said[0], str):
            raise BadRecord("bad_turns", where, f"{what} must have a text as 'text'")
        check_media(filled, ("text", "value", "content"), False, where, f" in {what}")
        if key := named_images(filled, where, f" in {what}")[0]:
            raise BadRecord("contradiction", where, f"{what} is a text and has '{shown(key)}' as well")
        return said[0], []
    if kind in ("image", "image_url", "input_image", "img"):
        return IMAGE_TAG, [_image_of(filled, what, where)]
    named = f"the type {brief(kind)}" if kind is not None else f"the keys {', '.join(shown(key, 40) for key in part)}"
    raise BadRecord("unknown_media", where, f"{what} has {named}; parts are of the types text and image")


def _image_of(part: Mapping, what: str, where: str) -> Named | None:
    """Returns an image part's own image; None if the part only marks the place of the record's next one."""
    if part.get("text"):
        raise BadRecord("contradiction", where, f"{what} is an image and has a text as well")
    _, images = named_images(part, where, f" in {what}")
    check_media(
        part, ("source", "content", "value", "data", "path", "url", "file", "file_name"), True, where, f" in {what}"
    )
    for key in ("source", "content", "value"):
        if not images and isinstance(part.get(key), str | Mapping):
            images = [read_image(part[key], f"'{key}' in {what}", where)]
    if not images and part.keys() & {"path", "url", "bytes", "base64", "data", "file", "file_name"}:
        images = [read_image(part, what, where)]
    if len(images) > 1:
        raise BadRecord("bad_image", where, f"{what} has {len(images)} images; a part has one")
    return images[0] if images else None


def _in_order(places: list[Named | None], images: list[Named], key: str, where: str) -> list[Named]:
    """Returns the images of the tags: those that parts have, and in other places those that a key names, in order."""
    own = [place for place in places if place is not None]
    if not own or own == images:
        return images or own
    if len(own) + len(images) != len(places):
        named = f"'{shown(key)}' names {len(images)} images" if key else "the record names no image"
        detail = f"{named}, and {len(places) - len(own)} image tags or parts have none of their own"
        raise BadRecord("contradiction", where, detail)
    rest = iter(images)
    return [next(rest) if place is None else place for place in places]
