"""Parses chat requests of the OpenAI API, and builds its answers."""

import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusion_jax.data import image
from fusion_jax.data.sources import Record
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.inference.sampling import Sampling
from fusion_jax.server.data_urls import decode, is_data_url
from fusion_jax.server.error import ApiError
from fusion_jax.server.json_body import read_json
from fusion_jax.server.keys import CHAT, STREAM, check_keys, read
from fusion_jax.server.messages import read_messages
from fusion_jax.server.requests import MOST_LOGPROBS, TokenLogprob
from fusion_jax.server.structured import Form, read_form


@dataclass(frozen=True)
class Limits:
    """The limits of one request.

    Attributes:
      max_tokens: most tokens of an answer. body_bytes: most bytes of a request.
      image_bytes, image_pixels: largest image, checked before it is decoded. images: most images of a conversation.
      text_bytes: most bytes of a conversation's texts in UTF-8. upload_bytes: most bytes of images that the page keeps.
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
    """A parsed request.

    Attributes:
      record: the conversation with its images' bytes. how: the sampling settings.
      stream: whether to answer in pieces. usage: whether to report the token counts after the last piece.
      addresses: addresses of images that are still to be fetched, by the image's number; see `with_fetched`.
      form: the form of the answer.
      top_logprobs: how many alternatives of each token to report; None reports no log probabilities.
    """

    record: Record
    how: Sampling
    stream: bool
    usage: bool
    addresses: dict[int, str]
    form: Form | None = None
    top_logprobs: int | None = None

    def with_fetched(self, fetched: dict[int, bytes], limits: Limits) -> "ChatRequest":
        """The request with fetched images for its addresses. Raises ApiError where one is not an image or too large."""
        for data in fetched.values():
            check_image(data, limits, "image_url")
        images = tuple(fetched.get(number, data) for number, data in enumerate(self.record.images))
        return replace(self, record=replace(self.record, images=images), addresses={})


def parse(body: bytes | io.BytesIO, model: str, limits: Limits, urls: bool) -> ChatRequest:
    """Parses and checks a request's body. A buffer is closed as soon as it has been read, to free its memory.

    Args:
      model: the name of the served model. urls: whether images may be http(s) addresses.

    Raises:
      ApiError: 400, or 404 for another model.
    """
    data = read_json(io.BytesIO(body) if isinstance(body, bytes) else body, limits.text_bytes)
    wanted = read(data, "model", str, model)
    if wanted != model:
        raise ApiError(404, f"The model {wanted[:80]!r} does not exist; this server has {model!r}.", "model_not_found")
    check_keys(data, CHAT)
    options = read(data, "stream_options", dict, {})
    check_keys(options, STREAM, "stream_options")
    record, addresses = _record(data.get("messages"), limits, urls)
    return ChatRequest(
        record,
        _sampling(data, limits),
        read(data, "stream", bool, False),
        read(options, "include_usage", bool, False, "stream_options"),
        addresses,
        read_form(data),
        _top_logprobs(data),
    )


def _top_logprobs(data: dict) -> int | None:
    """How many alternatives of each token to report; None reports no log probabilities at all."""
    most = read(data, "top_logprobs", int, 0)
    if not read(data, "logprobs", bool, False):
        if most:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", "invalid_value", "top_logprobs")
        return None
    if not 0 <= most <= MOST_LOGPROBS:
        raise ApiError(400, f"top_logprobs must lie in 0..{MOST_LOGPROBS}.", "invalid_value", "top_logprobs")
    return most


def _max_tokens(data: dict, limits: Limits) -> int:
    """The longest answer in tokens, which has two names in the API."""
    values = {key: read(data, key, int, None) for key in ("max_completion_tokens", "max_tokens")}
    values = {key: value for key, value in values.items() if value is not None}
    for key, value in values.items():
        if not 1 <= value <= limits.max_tokens:
            shown = str(value) if abs(value) < 10**12 else "a number"
            raise ApiError(400, f"{key} must lie in 1..{limits.max_tokens}, not {shown}.", "invalid_value", key)
    if len(set(values.values())) > 1:
        problem = "max_tokens and max_completion_tokens are two names of one setting, and differ"
        raise ApiError(400, f"{problem}.", "invalid_value", "max_completion_tokens")
    return next(iter(values.values()), limits.max_tokens)


def _sampling(data: dict, limits: Limits) -> Sampling:
    stop = data.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop):
        raise ApiError(400, "stop must be a text or at most 16 texts of 1 to 256 characters.", "invalid_value", "stop")
    number = (int, float)
    try:
        return Sampling(
            max_tokens=_max_tokens(data, limits),
            temperature=float(read(data, "temperature", number, 0)),
            top_k=max(read(data, "top_k", int, 0), 0),  # -1 means all as well
            top_p=float(read(data, "top_p", number, 1)),
            repetition_penalty=float(read(data, "repetition_penalty", number, 1)),
            seed=read(data, "seed", int, time.time_ns() % 2**32),
            stop=tuple(stop),
        )
    except (UserError, OverflowError) as error:
        raise ApiError(400, str(error)[:200], "invalid_value") from error


def _record(messages: Any, limits: Limits, urls: bool) -> tuple[Record, dict[int, str]]:
    """The conversation, and the addresses of the images that it links to."""
    images: list[bytes | str] = []

    def take_image(address: Any, where: str) -> None:
        if len(images) == limits.images:
            many = f"{where}: more than {limits.images} image(s) in a conversation."
            raise ApiError(400, many, "too_many_images", where)
        images.append(_image(address, where, limits, urls))
        if isinstance(images[-1], bytes):
            check_image(images[-1], limits, where)

    turns, system = read_messages(messages, limits.text_bytes, take_image)
    addresses = {number: data for number, data in enumerate(images) if isinstance(data, str)}
    known = tuple(b"" if isinstance(data, str) else data for data in images)
    return Record("request", None, turns, "messages", known, literal=True, system=system), addresses


def _image(address: Any, where: str, limits: Limits, urls: bool) -> bytes | str:
    """An image's bytes, or its http(s) address."""
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
    """Raises ApiError where the data are not an image, or it is too large by its header."""
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
    """The token counts of an answer."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def logprobs_of(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """The API's report of tokens: the text, the bytes and the log probability of each."""

    def named(token: int, value: float) -> dict[str, Any]:
        word = tokenizer.token_bytes(token)
        # The API's value for minus infinity, which JSON numbers cannot express.
        value = value if math.isfinite(value) else -9999.0
        return {"token": word.decode(errors="replace"), "bytes": [*word], "logprob": value}

    content = [{**named(one.token, one.value), "top_logprobs": [named(*pair) for pair in one.top]} for one in tokens]
    return {"content": content, "refusal": None}


def completion(
    name: str, model: str, created: int, text: str, finish: str, counts: dict, logprobs: dict | None = None
) -> dict[str, Any]:
    """The answer in one piece. logprobs: see `logprobs_of`."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": finish,
    }
    head = {"id": name, "object": "chat.completion", "created": created, "model": model}
    return {**head, "choices": [choice], "usage": counts}


def chunk(
    name: str, model: str, created: int, delta: dict | None, finish: str | None, counts=None, logprobs=None
) -> dict[str, Any]:
    """One piece of a streamed answer; without `delta` the piece with the token counts."""
    choices: Sequence[dict] = ()
    if delta is not None:
        choices = [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]
    head = {"id": name, "object": "chat.completion.chunk", "created": created, "model": model}
    return {**head, "choices": list(choices), **({"usage": counts} if counts else {})}
