"""The requests of the OpenAI API as prompts, and its errors and answers."""

import base64
import binascii
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fusion_jax.data import image
from fusion_jax.data.conversation import IMAGE_TAG
from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.sampling import Sampling


class ApiError(Exception):
    """An error in that API's form. status: of HTTP. code: short machine-readable name. param: the key at fault."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
      max_tokens: of an answer. body_bytes: of a request. image_bytes, image_pixels: of an image, before it is decoded.
      images: of a conversation. upload_bytes: of all images that the page keeps.
    """

    max_tokens: int
    body_bytes: int = 32 << 20
    image_bytes: int = 20 << 20
    image_pixels: int = 40_000_000
    images: int = 1
    upload_bytes: int = 1 << 30


@dataclass(frozen=True)
class ChatRequest:
    """record: the conversation with its images' bytes. how: settings. stream, usage: answer in pieces; tell the counts
    at the end of them."""

    record: Record
    how: Sampling
    stream: bool
    usage: bool


# Keys whose other values would change the answer in ways that are not supported: better refused than ignored.
_FIXED = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}


def parse(body: bytes, model: str, limits: Limits, fetch: Callable[[str], bytes] | None) -> ChatRequest:
    """A request's body, checked.

    Args:
      model: the name that is served. fetch: gives the bytes behind an http(s) address; None where that is not allowed.

    Raises:
      ApiError: 400 or 404 with what is wrong.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", "invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.", "invalid_json")
    if data.get("model") is not None and data["model"] != model:
        raise ApiError(404, f"The model {data['model']!r} does not exist; served is {model!r}.", "model_not_found")
    for key, allowed in _FIXED.items():
        if data.get(key) is not None and data[key] not in allowed:
            raise ApiError(400, f"{key} can only be {json.dumps(allowed[0])} here.", "unsupported_value", key)
    options = _get(data, "stream_options", dict, {})
    return ChatRequest(
        _record(data.get("messages"), limits, fetch),
        _sampling(data, limits),
        _get(data, "stream", bool, False),
        _get(options, "include_usage", bool, False),
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
    wanted = _get(data, "max_completion_tokens", int, None) or _get(data, "max_tokens", int, limits.max_tokens)
    if wanted > limits.max_tokens:
        raise ApiError(
            400, f"max_tokens={wanted} is over this server's {limits.max_tokens}.", "invalid_value", "max_tokens"
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
        raise ApiError(400, str(error), "invalid_value") from error


def _record(messages: Any, limits: Limits, fetch) -> Record:
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message.", "invalid_value", "messages")
    turns, images, system = [], [], ""
    for k, message in enumerate(messages):
        where = f"messages[{k}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise ApiError(400, f"{where}: role must be system, user or assistant.", "invalid_value", where)
        text = _content(message.get("content"), role, where, images, limits, fetch)
        if role in ("system", "developer"):
            if turns:
                raise ApiError(400, f"{where}: a system message must come first.", "invalid_value", where)
            # The template's own system text is part of what the model was trained on: it stays.
            system += text + "\n\n"
            continue
        turns.append({"from": "human" if role == "user" else "gpt", "value": text})
    if not turns or turns[-1]["from"] != "human":
        raise ApiError(400, "The last message must be the user's.", "invalid_value", "messages")
    if system and turns[0]["from"] == "human":
        turns[0]["value"] = system + turns[0]["value"]
    return Record("request", None, turns, "messages", tuple(images))


def _content(content: Any, role: str, where: str, images: list[bytes], limits: Limits, fetch) -> str:
    """The text of a message with a tag for each image, whose bytes are appended to `images`."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: content must be a text or a list of parts.", "invalid_value", where)
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if IMAGE_TAG in part["text"]:
                raise ApiError(
                    400, f"{where}: {IMAGE_TAG} cannot be written; send an image_url.", "invalid_value", where
                )
            text += part["text"]
        elif kind == "image_url" and role == "user":
            if len(images) == limits.images:
                many = f"{where}: more than {limits.images} image(s) in a conversation."
                raise ApiError(400, many, "too_many_images", where)
            address = part.get("image_url")
            address = address.get("url") if isinstance(address, dict) else address
            images.append(_image(address, where, limits, fetch))
            text += IMAGE_TAG + "\n"
        else:
            raise ApiError(400, f"{where}: a part must be a text, or a user's image_url.", "invalid_value", where)
    return text


def _image(address: Any, where: str, limits: Limits, fetch) -> bytes:
    if not isinstance(address, str):
        raise ApiError(400, f"{where}: image_url needs a url.", "invalid_image_url", where)
    if address.startswith("data:"):
        head, _, data = address.partition(",")
        if not head.endswith(";base64"):
            raise ApiError(400, f"{where}: a data URL must be base64.", "invalid_image_url", where)
        try:
            found = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, f"{where}: the data URL is not valid base64.", "invalid_image_url", where) from error
    elif fetch is not None and address.startswith(("http://", "https://")):
        found = fetch(address)
    else:
        allowed = "a data URL" if fetch is None else "a data, http or https URL"
        raise ApiError(400, f"{where}: image_url must be {allowed}.", "invalid_image_url", where)
    check_image(found, limits, where)
    return found


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
