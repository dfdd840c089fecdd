"""Attention pictures of the served model, beside its answers: one at a time, in the caller's thread."""

import threading

import numpy as np

from fusion_jax.config import RunConfig
from fusion_jax.data.sources import Record
from fusion_jax.inference import attention_pictures
from fusion_jax.inference.attention_maps import levels, words
from fusion_jax.server import engine

STEP = 128  # lengths are rounded up to this: few programs, since the first visitor with a length waits for its compiler
DPI = 170
LONGEST_WORD = 24  # text without spaces is no word to press
# What questions are made of besides what they are about.
_SMALL = """
a about all am an and any are as at be been but by can could describe did do does each few for from give had has have he
her here his how i if in into is it its many may me more most much my name no not of on one or our out please say see
shall she should show so some such tell than that the their them then there these they this those to too up us very was
we were what when where which who whom whose why will with would yes you your
"""


class Busy(Exception):
    """Another picture is being made."""


class Pictures:
    """Draws where the served model looks for a word.

    The picture's program is none of the answers': it is compiled when a question of its length first asks for one, and
    `Engine.recompilations` leaves it out. It runs beside the answers, which share the device with it.

    Args:
      core: whose model, parameters and limits these are. config: of the run, for its template.
    """

    def __init__(self, core: engine.Engine, config: RunConfig):
        self.core, self.config = core, config
        self._one = threading.Lock()

    def draw(self, image: bytes, question: str, word: str) -> np.ndarray:
        """The question alone, asked about the image: (height, width, 3) uint8, see `attention_pictures.draw_small`.

        Raises:
          Busy: another one is being made. engine.Full, engine.Closing: as for an answer, whose places this counts with.
          BadRecord: the question does not fit what is served, or the image cannot be read.
          UserError: the word is not in the question.
        """
        if not self._one.acquire(blocking=False):
            raise Busy
        try:
            self.core.reserve()
            try:
                # An answer's limits hold for pictures, too.
                self.core.prepare(
                    Record("picture", None, [{"from": "human", "value": question}], "the page", (image,), literal=True)
                )
                return self._draw(image, question, word)
            finally:
                self.core.release()
        finally:
            self._one.release()

    def _draw(self, image: bytes, question: str, word: str) -> np.ndarray:
        core = self.core
        with engine.counted_apart():
            attention = levels(
                core.model,
                core.params,
                self.config,
                core.prompts.tokenizer,
                image,
                question,
                word,
                core.prompts.latents,
                step=STEP,
            )
        return attention_pictures.pixels(attention_pictures.draw_small(attention), DPI)


def suggested(question: str, most: int = 8) -> list[str]:
    """Words of a question that may be worth looking for: those that are not small English ones, the last `most`."""
    small, chosen = set(_SMALL.split()), {}
    for word in words(question):
        if len(word) <= LONGEST_WORD and word.lower() not in small and not word.isdigit():
            chosen.setdefault(word.lower(), word)
    return list(chosen.values())[-most:]
