"""The requests of the OpenAI API as prompts, and its answers."""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusion_jax.data import image
from fusion_jax.data.conversation import IMAGE_SLOT
from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.generate import BETWEEN
from fusion_jax.sampling import Sampling
from fusion_jax.serve.data_urls import decode, is_data_url
from fusion_jax.serve.error import ApiError
from fusion_jax.serve.json_body import read_json, text_too_long


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
      max_tokens: of an answer. body_bytes: of a request. image_bytes, image_pixels: of an image, before it is decoded.
      images: of a conversation. text_bytes: of all its texts in UTF-8. upload_bytes: of all images
      that the page keeps.
    """

    max_tokens: int
    body_bytes: int = 32 << 20
    image_bytes: int = 20 << 20
    image_pixels: int = 40_000_000
    images: int = 1
    text_bytes: int = 1 << 20
    upload_bytes: int = 1 << 30


@dataclass(frozen=True)
class ChatRequest:
    """record: the conversation with its images' bytes. how: settings. stream, usage: answer in pieces; tell the counts
    at the end of them. addresses: of images that are still to be fetched, by their number; see `with_fetched`."""

    record: Record
    how: Sampling
    stream: bool
    usage: bool
    addresses: dict[int, str]

    def with_fetched(self, fetched: dict[int, bytes], limits: Limits) -> "ChatRequest":
        """The request with these bytes for its addresses. ApiError where one is no image, or too large."""
        for data in fetched.values():
            check_image(data, limits, "image_url")
        images = tuple(fetched.get(number, data) for number, data in enumerate(self.record.images))
        return replace(self, record=replace(self.record, images=images), addresses={})


# Keys whose other values would change the answer in ways that are not supported: better refused than ignored.
_FIXED = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "logit_bias": {},
    "tools": [],
    "functions": [],
    "response_format": {"type": "text"},
}


def parse(body: bytes | io.BytesIO, model: str, limits: Limits, urls: bool) -> ChatRequest:
    """A request's body, checked. A buffer is closed as soon as it has been read, to give its memory back.

    Args:
      model: the name that is served. urls: whether images may be http(s) addresses.

    Raises:
      ApiError: 400 or 404 with what is wrong.
    """
    data = read_json(io.BytesIO(body) if isinstance(body, bytes) else body, limits.text_bytes)
    wanted = _get(data, "model", str, model)
    if wanted != model:
        raise ApiError(404, f"The model {wanted[:80]!r} does not exist; served is {model!r}.", "model_not_found")
    for key, allowed in _FIXED.items():
        value = data.get(key)
        same = value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
        if value is not None and not same:
            raise ApiError(400, f"{key} can only be {json.dumps(allowed)} here.", "unsupported_value", key)
    options = _get(data, "stream_options", dict, {})
    record, addresses = _record(data.get("messages"), limits, urls)
    return ChatRequest(
        record,
        _sampling(data, limits),
        _get(data, "stream", bool, False),
        _get(options, "include_usage", bool, False),
        addresses,
    )


def _get(data: dict, key: str, kind: type | tuple[type, ...], default):
    value = data.get(key)
    if value is None:
        return default
    numbers = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in numbers):
        raise ApiError(400, f"{key} has the wrong type: {json.dumps(value)[:80]}.", "invalid_type", key)
    return value


def _sampling(data: dict, limits: Limits) -> Sampling:
    wanted = _get(data, "max_tokens", int, limits.max_tokens)
    wanted = _get(data, "max_completion_tokens", int, wanted)
    if not 1 <= wanted <= limits.max_tokens:
        asked = str(wanted) if abs(wanted) < 10**12 else "a number"
        raise ApiError(
            400, f"max_tokens must lie in 1..{limits.max_tokens}, not {asked}.", "invalid_value", "max_tokens"
        )
    stop = data.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop):
        raise ApiError(400, "stop must be a text or at most 16 texts of 1 to 256 characters.", "invalid_value", "stop")
    number = (int, float)
    try:
        return Sampling(
            max_tokens=wanted,
            temperature=float(_get(data, "temperature", number, 0)),
            top_k=max(_get(data, "top_k", int, 0), 0),  # -1 means all, too
            top_p=float(_get(data, "top_p", number, 1)),
            repetition_penalty=float(_get(data, "repetition_penalty", number, 1)),
            seed=_get(data, "seed", int, time.time_ns() % 2**32),
            stop=tuple(stop),
        )
    except (UserError, OverflowError) as error:
        raise ApiError(400, str(error)[:200], "invalid_value") from error


def _record(messages: Any, limits: Limits, urls: bool) -> tuple[Record, dict[int, str]]:
    """The conversation, and the addresses of those images that are not in it. Messages of one role that follow each
    other are one turn. System messages in front of all turns are the conversation's system text; a later one joins the
    user's turn behind it, or the one before it where none follows."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message.", "invalid_value", "messages")
    turns: list[tuple[str, list[str]]] = []
    images: list[bytes | str] = []
    first, system, size = [], [], 0
    for k, message in enumerate(messages):
        where = f"messages[{k}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise ApiError(400, f"{where}: role must be system, user or assistant.", "invalid_value", where)
        text = _content(message.get("content"), role, where, images, limits, urls)
        size += len(text.encode(errors="replace"))
        if size > limits.text_bytes:
            raise text_too_long(limits.text_bytes)
        if role in ("system", "developer"):
            (system if turns else first).append(text)
            continue
        who = "human" if role == "user" else "gpt"
        if not turns or turns[-1][0] != who:
            turns.append((who, []))
        if who == "human":
            turns[-1][1].extend(system)
            system = []
        turns[-1][1].append(text)
    if not turns or turns[-1][0] != "human":
        raise ApiError(400, "The last message must be the user's.", "invalid_value", "messages")
    turns[-1][1].extend(system)
    said = [{"from": who, "value": BETWEEN.join(texts)} for who, texts in turns]
    addresses = {number: data for number, data in enumerate(images) if isinstance(data, str)}
    known = tuple(b"" if isinstance(data, str) else data for data in images)
    text = BETWEEN.join(first) or None
    return Record("request", None, said, "messages", known, literal=True, system=text), addresses


def _content(content: Any, role: str, where: str, images: list[bytes | str], limits: Limits, urls: bool) -> str:
    """The text of a message with a slot for each image, whose bytes or address is appended to `images`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: content must be a text or a list of parts.", "invalid_value", where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and role == "user":
            if len(images) == limits.images:
                many = f"{where}: more than {limits.images} image(s) in a conversation."
                raise ApiError(400, many, "too_many_images", where)
            # Taken out of the message: a long text that nobody needs once it is decoded.
            images.append(_image(part.pop("image_url", None), where, limits, urls))
            if isinstance(images[-1], bytes):
                check_image(images[-1], limits, where)
            texts.append(IMAGE_SLOT + "\n")
        else:
            raise ApiError(400, f"{where}: a part must be a text, or a user's image_url.", "invalid_value", where)
    return "".join(texts)


def _image(address: Any, where: str, limits: Limits, urls: bool) -> bytes | str:
    """An image's bytes, or the address that has them."""
    address = address.pop("url", None) if isinstance(address, dict) else address
    if not isinstance(address, str):
        raise ApiError(400, f"{where}: image_url needs a url.", "invalid_image_url", where)
    if urls and address[:99].lstrip().lower().startswith(("http://", "https://")):
        return address.strip()
    if not is_data_url(address):
        allowed = "a data, http or https URL" if urls else "a data URL"
        raise ApiError(400, f"{where}: image_url must be {allowed}.", "invalid_image_url", where)
    return decode(address, limits.image_bytes, where)


def check_image(data: bytes, limits: Limits, where: str) -> None:
    """ApiError where an image is too large, seen in its header, or none."""
    if len(data) > limits.image_bytes:
        raise ApiError(400, f"{where}: the image has over {limits.image_bytes} bytes.", "image_too_large", where)
    try:
        width, height = image.read_size(data, where)
    except BadRecord as error:
        raise ApiError(400, str(error), error.reason, where) from error
    if width * height > limits.image_pixels:
        size = f"{width}x{height} pixels; allowed are {limits.image_pixels} in all"
        raise ApiError(400, f"{where}: the image has {size}.", "image_too_large", where)


def usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def completion(name: str, model: str, created: int, text: str, finish: str, counts: dict) -> dict[str, Any]:
    """The answer in one piece."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": finish,
    }
    head = {"id": name, "object": "chat.completion", "created": created, "model": model}
    return {**head, "choices": [choice], "usage": counts}


def chunk(name: str, model: str, created: int, delta: dict | None, finish: str | None, counts=None) -> dict[str, Any]:
    """One piece of a streamed answer; without `delta` the one that carries the counts."""
    choices: Sequence[dict] = ()
    if delta is not None:
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    head = {"id": name, "object": "chat.completion.chunk", "created": created, "model": model}
    return {**head, "choices": list(choices), **({"usage": counts} if counts else {})}
