"""Keeps the prompts that were prefilled last on the device, so that the next turn of a conversation prefills its rest.

A prompt is kept where later questions do not change how its images are encoded: if the model's `guide` is
`first_round`, if no question guides its encoder, or if there is no image. It is looked up by a digest of all that its
keys and values depend on: token ids (template, system text, and every turn), the pixels that the encoder reads, the
question that guides it, and LongRoPE's factors. The number of latents is the server's.
"""

import hashlib
from collections import OrderedDict

import numpy as np

from fusion_jax.data.conversation import ANSWER_START
from fusion_jax.data.layout import Example
from fusion_jax.inference.prefixes import Prefix
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models.config import FusionConfig


def begins_with(example: Example) -> int:
    """How many of a prompt's ids are those of the prompt of the turn before; 0 in the first turn."""
    if example.labels is None:
        return 0
    ends = np.flatnonzero(example.labels == ANSWER_START)
    return int(ends[-2]) + 1 if len(ends) > 1 else 0


class Prefixes:
    """The kept prompts, the one that was used longest ago first. Only the engine's thread changes them.

    Args:
      most: bytes on the device; 0 keeps nothing.

    Attributes:
      bytes: those in use. hits: prompts of later turns that continued a kept one. misses: those prefilled whole.
    """

    def __init__(self, config: FusionConfig, most: int):
        self._config, self.most = config, most
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    @property
    def left(self) -> int:
        """Bytes that may still be used."""
        return self.most - self.bytes

    def keeps(self, example: Example) -> bool:
        """Whether the next turn can continue this prompt."""
        unguided = self._config.guide == "first_round" or not self._config.text_guided or not example.images
        return self.most > 0 and unguided and example.labels is not None

    def find(self, example: Example, how: Sampling, length: int) -> Prefix | None:
        """The kept prompt of the turn before. `length`: the prompt's positions."""
        count = begins_with(example)
        if not count or not self.keeps(example):
            return None
        key = self._key(example, count, self._far(length, how))
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, example: Example, how: Sampling, prefix: Prefix) -> None:
        """Keeps a prompt; drops those that were used longest ago while there are too many bytes."""
        if prefix.nbytes > self.most:
            return
        key = self._key(example, len(example.input_ids), self._far(int(prefix.length), how))
        old = self._kept.pop(key, None)
        self.bytes += prefix.nbytes - (0 if old is None else old.nbytes)
        self._kept[key] = prefix
        while self.bytes > self.most:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes

    def _far(self, length: int, how: Sampling) -> bool:
        """Whether prompt and answer together take LongRoPE's long factors, which rotate other keys."""
        rope = self._config.llm.rope
        return rope.kind == "longrope" and length + max(how.max_tokens, 1) - 1 > rope.original_length

    def _key(self, example: Example, count: int, far: bool) -> bytes:
        """The digest of a prompt's first `count` ids with all images: one that is new in a later turn is not a hit."""
        digest = hashlib.blake2b(repr((count, far, example.tilings, len(example.question_ids))).encode())
        arrays = example.input_ids[:count], example.question_ids
        for array in (*arrays, *(() if example.crops is None else (example.crops,))):
            digest.update(np.ascontiguousarray(array))
        return digest.digest()
