"""Calls OpenAI-compatible endpoints: chat for language and vision models, images for generators.

Servers differ in the parameters that they support. A parameter that one rejects by name (a form of structured output,
`seed`, `max_tokens` under that name) is left out or replaced from then on, which is logged once.
"""

import base64
import io
import logging
from typing import Any

from PIL import Image

from fusion_jax.data.image import load_image
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.synth.backends.base import Refused, Reply, Retryable, Unusable
from fusion_jax.synth.backends.config import STRUCTURED, ImageConfig, ModelConfig
from fusion_jax.synth.backends.http import MAX_IMAGE, Client, Rate, Rejected

log = logging.getLogger("fusion_jax")

_JPEG_QUALITY = 92
_MAX_CONTENT = 1 << 20  # characters of an answer
_MAX_TOKENS = 1 << 40  # in one reply; a larger number is an error


class ChatEndpoint:
    """A language or vision model served at /chat/completions."""

    paid = True

    def __init__(self, config: ModelConfig, what: str, rates: dict[str, Rate], share: float = 1.0):
        """Args: as for `Client`. Raises UserError."""
        self.name = config.model
        self.settings = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        self.client = Client(config, what, rates, share)
        self._structured = STRUCTURED.index(config.structured)
        self._length_key = "max_tokens"
        self._left_out: frozenset[str] = frozenset()

    def check(self) -> None:
        """See `Client.check`."""
        self.client.check()

    def chat(self, messages: list[dict], schema: dict | None, seed: int, purpose: str, data: dict) -> Reply:
        """See `LanguageModel.chat`; `data` is not read."""
        del data
        for _ in range(8):
            body = self._body(messages, schema, seed, purpose)
            try:
                return self._reply(self.client.post("/chat/completions", body))
            except Rejected as e:
                if e.reason == "not_found":
                    raise UserError(
                        f"{self.client.address}/chat/completions does not serve {self.name!r} ({e}); "
                        f"check {self.client.what}.model and {self.client.what}.base_url."
                    ) from e
                if not self._adapt(body, str(e)):
                    raise
        raise Unusable("bad_request", "the endpoint rejects every form of the request")

    def verify(
        self, images: list[Image.Image], messages: list[dict], question: str, answer: str, seed: int, data: dict
    ) -> Reply:
        """See `VisionModel.verify`."""
        del question, answer, data
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images
        ]
        parts.append({"type": "text", "text": messages[-1]["content"]})
        request = [*messages[:-1], {"role": "user", "content": parts}]
        return self.chat(request, _VERDICT, seed, "verify", {})

    def _body(self, messages: list[dict], schema: dict | None, seed: int, purpose: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "temperature": self.settings["temperature"],
            self._length_key: self.settings["max_tokens"],
            "seed": seed,
        }
        if schema is not None and STRUCTURED[self._structured] == "json_schema":
            named = {"name": purpose, "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        elif schema is not None and STRUCTURED[self._structured] == "json_object":
            body["response_format"] = {"type": "json_object"}
        return {key: value for key, value in body.items() if key not in self._left_out}

    def _adapt(self, body: dict[str, Any], complaint: str) -> bool:
        """Changes later requests after an error of the endpoint; returns False where nothing is left to change."""
        complaint = complaint.lower()
        if "max_tokens" in body and "max_completion_tokens" in complaint:
            self._length_key = "max_completion_tokens"
            log.info("%s: max_completion_tokens in place of max_tokens", self.client.address)
            return True
        for key in ("seed", "temperature"):
            if key in body and key in complaint:
                self._left_out |= {key}
                log.info("%s does not take %s: left out", self.client.address, key)
                return True
        about_format = any(word in complaint for word in ("response_format", "schema", "json", "structured", "guided"))
        if "response_format" in body and about_format:
            used = STRUCTURED.index(body["response_format"]["type"])
            self._structured = max(self._structured, used + 1)
            log.info(
                "%s does not offer %s: %s instead",
                self.client.address,
                STRUCTURED[used],
                STRUCTURED[self._structured],
            )
            return True
        return False

    def _reply(self, body: dict[str, Any]) -> Reply:
        try:
            choice = body["choices"][0]
            message = choice["message"]
            content = message.get("content")
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            raise Retryable("broken_reply", "the reply has no choices[0].message") from e
        if isinstance(content, list):  # some servers answer in parts: only the texts are used, not thoughts or images
            content = "".join(filter(None, map(_text_of, content)))
        if not isinstance(content, str):
            content = ""
        if len(content) > _MAX_CONTENT:
            raise Unusable("reply_too_long", f"over {_MAX_CONTENT} characters")
        if message.get("refusal") or choice.get("finish_reason") == "content_filter":
            raise Refused("refused", self.client.scrub(str(message.get("refusal") or "content filter"))[:300])
        usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
        prompt, completion = (_count(usage.get(key)) for key in ("prompt_tokens", "completion_tokens"))
        return Reply(self.client.scrub(content), None, prompt, completion)


def _text_of(part: Any) -> str | None:
    if not isinstance(part, dict) or part.get("type", "text") not in ("text", "output_text"):
        return None
    return part["text"] if isinstance(part.get("text"), str) else None


def _count(value: Any) -> int:
    """A number of tokens; 0 where the field holds something else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKENS else 0


_VERDICT = {
    "type": "object",
    "properties": {"correct": {"type": "boolean"}},
    "required": ["correct"],
    "additionalProperties": False,
}


class ImageEndpoint:
    """An image generator served at /images/generations."""

    paid = True

    def __init__(self, config: ImageConfig, what: str, rates: dict[str, Rate], share: float = 1.0):
        """Args: as for `Client`. Raises UserError."""
        self.name = config.model
        self.settings: dict[str, Any] = {}
        self.client = Client(config, what, rates, share)
        self._left_out: frozenset[str] = frozenset()

    def check(self) -> None:
        """See `Client.check`."""
        self.client.check()

    def draw(self, description: str, size: tuple[int, int], seed: int, data: dict) -> Image.Image:
        """See `ImageGenerator.draw`. An image of another size is resized."""
        del data
        body = {
            "model": self.name,
            "prompt": description,
            "n": 1,
            "size": f"{size[0]}x{size[1]}",
            "response_format": "b64_json",
            "seed": seed,
        }
        for _ in range(4):
            try:
                sent = {key: value for key, value in body.items() if key not in self._left_out}
                reply = self.client.post("/images/generations", sent, MAX_IMAGE)
                break
            except Rejected as e:
                if e.reason == "not_found":
                    raise UserError(
                        f"{self.client.address}/images/generations does not serve {self.name!r} ({e}); "
                        f"check {self.client.what}.model and {self.client.what}.base_url."
                    ) from e
                unknown = [key for key in ("seed", "response_format") if key in sent and key in str(e).lower()]
                if not unknown:
                    raise
                self._left_out |= {unknown[0]}
                log.info("%s does not take %s: left out", self.client.address, unknown[0])
        else:
            raise Unusable("bad_request", "the endpoint rejects every form of the request")
        image = _decode(self._file(reply))
        return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)

    def _file(self, body: dict[str, Any]) -> bytes:
        entries = body.get("data")
        first = entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else {}
        if isinstance(first.get("b64_json"), str):
            try:
                return base64.b64decode(first["b64_json"], validate=True)
            except ValueError as e:  # also binascii.Error, and characters outside ASCII
                raise Unusable("bad_image", "the image is not base64") from e
        if isinstance(first.get("url"), str):
            return self.client.fetch(first["url"])
        raise Unusable("bad_image", "the reply holds no image")


def _decode(data: bytes) -> Image.Image:
    try:
        return load_image(data)
    except BadRecord as e:
        raise Unusable("bad_image", f"the image cannot be used: {e.detail}") from e


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
