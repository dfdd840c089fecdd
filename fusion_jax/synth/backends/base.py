"""Defines the interface of the models that the data engine calls, and their errors.

Every request has two forms: chat messages (a prompt and the caption as data), which endpoints read, and `data`, the
structured request that the prompt was made from, which the embedded backend reads. `seed` is the only source of
randomness that a backend may use: equal arguments must lead to equal replies. These are the contents of `data`, and
those that `Reply.parsed` must have:

    purpose    data                                            parsed
    judge      caption                                         {"drawable": bool}
    describe   kind, caption                                   by kind, below
    qa         kind, caption, descriptions, state              {"pairs": [{"question", "answer"}, ...]}, or none
    statement  kind, pairs, state                              {"statements": [text, one for each pair]}
    verify     kind, caption, descriptions, state              {"correct": bool}
    draw       kind, caption, descriptions, state, index       (an image: that of descriptions[index])

For `describe` they depend on the kind. All lines but the first have the published limits; a reply that breaks them is
requested again:

    multi_choice, conv_short, conv_long, reasoning   {"description"}
    text_qa          {"description": 110-150 words, "texts": <= 3 of <= 12 words, each part of the description}
    contrast_short, contrast_long   {"left": 120-180 words, "right": 120-180 words}
    caption_color    {"caption": <= 12 words, as in all captions, "colors": the <= 3 named in it}
    caption_count    {"caption", "objects": [{"name", "count"}]: <= 3 of a kind, <= 6 in all, as the caption says}
    caption_scene    {"caption", "scene": the one scene element, as the caption writes it}
    caption_spatial  {"caption", "objects": [two or more names in the caption], "relation": as the caption writes it}
    caption_text     {"caption", "texts": [{"text", "carrier"}], both as the caption writes them}

`descriptions` are the texts that the images are drawn from: one, or left and right for the contrast kinds; the caption
itself for the caption kinds. `kind` is absent from `judge`. Pairs of multi_choice are {"question", "options": [2 to 4
texts], "answer": one of them}. Conversations of the caption kinds need no `qa` request; the one pair to verify asks for
the caption. `state` is the `Reply.state` of the `describe` reply, or None: any JSON value, kept with the sample, such
as a scene graph. Texts of replies pass through the text filters (synth/filters.py).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Reply:
    """One answer of a model.

    Attributes:
      text: the model's answer. parsed: the object in it where the backend has it; else the engine parses `text`.
      prompt_tokens, completion_tokens: as counted by the backend, 0 where it does not count.
      state: of a `describe` reply, a JSON value that is passed with every later request about the sample.
    """

    text: str
    parsed: dict | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    state: Any = None


class BackendError(Exception):
    """A request failed. `reason` is a short name under which the sample is counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail or reason)
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.reason, str(self))


class Retryable(BackendError):
    """The request failed by overload, a cut connection or a timeout: it may well succeed later.

    `wait`: seconds to wait, where the endpoint names them, or None.
    """

    def __init__(self, reason: str, detail: str = "", wait: float | None = None):
        super().__init__(reason, detail)
        self.wait = wait


class Refused(BackendError):
    """The model refused to answer. A refusal is paid for like an answer; a further attempt uses another seed."""


class Unusable(BackendError):
    """No further attempt can succeed, for instance as the request is too long; the run drops the sample."""


class LanguageModel(Protocol):
    """Writes text.

    Attributes:
      name: name of the model, for lineage. settings: other values that decide its answers, such as the temperature.
      paid: whether replies are kept in the journal, because they cost money or time.
    """

    name: str
    settings: dict[str, Any]
    paid: bool

    def chat(self, messages: list[dict], schema: dict | None, seed: int, purpose: str, data: dict) -> Reply:
        """Returns one reply. Several threads may call it at the same time.

        Args:
          messages: chat messages, [{"role", "content"}, ...]. schema: JSON schema that the answer should meet.

        Raises:
          BackendError: this request failed. UserError: no request can succeed (wrong key, unknown model).
        """
        ...


class VisionModel(Protocol):
    """Decides whether an answer about images is right; its attributes are those of `LanguageModel`."""

    name: str
    settings: dict[str, Any]
    paid: bool

    def verify(
        self, images: list[Image.Image], messages: list[dict], question: str, answer: str, seed: int, data: dict
    ) -> Reply:
        """Returns a reply whose `parsed` is {"correct": bool}. `messages` are only text: the backend puts the images in
        front. Raises the errors of `LanguageModel.chat`."""
        ...


class ImageGenerator(Protocol):
    """Draws images; its attributes are those of `LanguageModel`."""

    name: str
    settings: dict[str, Any]
    paid: bool

    def draw(self, description: str, size: tuple[int, int], seed: int, data: dict) -> Image.Image:
        """Draws an RGB image of `size` (width, height). Raises the errors of `LanguageModel.chat`."""
        ...


class Scorer(Protocol):
    """Compares images with texts, as CLIP does."""

    name: str

    def similarity(self, images: list[Image.Image], texts: list[str]) -> np.ndarray:
        """(images, texts) float32, cosine of the embeddings."""
        ...
