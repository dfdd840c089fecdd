"""The interface of the models that the data engine calls, and how they may fail.

Every request travels in two forms: as chat messages (a prompt and the caption as data), which endpoints read, and as
`data`, the structured request that the prompt was made from, which the embedded backend reads. `seed` is all the
randomness a backend may use: equal arguments, equal reply. What `data` holds and `Reply.parsed` must hold:

    purpose    data                                            parsed
    judge      caption                                         {"drawable": bool}
    describe   kind, caption                                   by kind, below
    qa         kind, caption, descriptions, state              {"pairs": [{"question", "answer"}, ...]}, or none
    statement  kind, pairs, state                              {"statements": [text, one for each pair]}
    verify     kind, caption, descriptions, state              {"correct": bool}
    draw       kind, caption, descriptions, state, index       (an image: that of descriptions[index])

`describe` by kind. All but the first line are the published limits, and a reply that breaks them is requested anew:

    multi_choice, conv_short, conv_long, reasoning   {"description"}
    text_qa          {"description": 110-150 words, "texts": <= 3 of <= 12 words, each standing in the description}
    contrast_short, contrast_long   {"left": 120-180 words, "right": 120-180 words}
    caption_color    {"caption": <= 12 words, as in all captions, "colors": the <= 3 named in it}
    caption_count    {"caption", "objects": [{"name", "count"}]: <= 3 of a kind, <= 6 in all, as the caption says}
    caption_scene    {"caption", "scene": the one scene element, as the caption writes it}
    caption_spatial  {"caption", "objects": [two or more names in the caption], "relation": as the caption writes it}
    caption_text     {"caption", "texts": [{"text", "carrier"}], both as the caption writes them}

`descriptions` are the texts that the images are drawn from: one, or left and right for the contrast kinds; the caption
itself for the caption kinds. `kind` is absent from `judge`. Pairs of multi_choice are {"question", "options": [2 to 4
texts], "answer": one of them}. Conversations of the caption kinds need no `qa` request; their one pair to verify
asks for the caption. `state` is what the `describe` reply had in `Reply.state`, or None: anything that JSON can
say, kept with the sample (a scene graph, for instance). Texts of replies pass the text filters (synth/filters.py).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Reply:
    """One answer of a model.

    Attributes:
      text: the model's answer. parsed: the object in it where the backend has it; else the engine reads `text`.
      prompt_tokens, completion_tokens: as counted by the backend, 0 where it does not count.
      state: of a `describe` reply: goes along with every later request about the sample. JSON must hold it.
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
    """Overload, a cut connection, a timeout: the same request may well succeed later.

    `wait`: seconds to wait, where the endpoint names them, or None.
    """

    def __init__(self, reason: str, detail: str = "", wait: float | None = None):
        super().__init__(reason, detail)
        self.wait = wait


class Refused(BackendError):
    """The model refused to answer. That is paid for like an answer; a further try takes another seed."""


class Unusable(BackendError):
    """No further try can succeed (the request is too long, for instance): the sample is dropped, the run continues."""


class LanguageModel(Protocol):
    """Writes text.

    Attributes:
      name: of the model, for lineage. settings: what else decides its answers (temperature and the like).
      paid: whether replies are kept in the journal, because they cost money or time.
    """

    name: str
    settings: dict[str, Any]
    paid: bool

    def chat(self, messages: list[dict], schema: dict | None, seed: int, purpose: str, data: dict) -> Reply:
        """One reply. Called by several threads at once.

        Args:
          messages: chat messages, [{"role", "content"}, ...]. schema: JSON schema that the answer should meet.

        Raises:
          BackendError: this request failed. UserError: no request can succeed (wrong key, unknown model).
        """
        ...


class VisionModel(Protocol):
    """Decides whether an answer about images is right; attributes as of `LanguageModel`."""

    name: str
    settings: dict[str, Any]
    paid: bool

    def verify(
        self, images: list[Image.Image], messages: list[dict], question: str, answer: str, seed: int, data: dict
    ) -> Reply:
        """`parsed` is {"correct": bool}. `messages` are text only: the backend puts the images in front. Raises as
        `LanguageModel.chat`."""
        ...


class ImageGenerator(Protocol):
    """Draws; attributes as of `LanguageModel`."""

    name: str
    settings: dict[str, Any]
    paid: bool

    def draw(self, description: str, size: tuple[int, int], seed: int, data: dict) -> Image.Image:
        """An RGB image of `size` (width, height). Raises as `LanguageModel.chat`."""
        ...


class Scorer(Protocol):
    """Compares images with texts, as CLIP does."""

    name: str

    def similarity(self, images: list[Image.Image], texts: list[str]) -> np.ndarray:
        """(images, texts) float32, cosine of the embeddings."""
        ...
