"""Draws attention pictures of the served model beside its answers, one at a time."""

import threading

import numpy as np

from fusion_jax.config import RunConfig
from fusion_jax.data.sources import Record
from fusion_jax.inference import attention_pictures
from fusion_jax.inference.attention_maps import levels
from fusion_jax.inference.word_tokens import words
from fusion_jax.server import compilations
from fusion_jax.server.engine import Engine

STEP = 128  # lengths are rounded up to it, for few programs: the first question of a length waits for the compiler
DPI = 170
LONGEST_WORD = 24  # most characters of a word that is suggested
# Words that are never what a question is about.
_SMALL = """
a about all am an and any are as at be been but by can could describe did do does each few for from give had has have he
her here his how i if in into is it its many may me more most much my name no not of on one or our out please say see
shall she should show so some such tell than that the their them then there these they this those to too up us very was
we were what when where which who whom whose why will with would yes you your
"""


class Busy(Exception):
    """Another picture is being drawn."""


class Pictures:
    """Draws where the served model looks for a word.

    Pictures have a program of their own, which is compiled for the first question of each length, and is not counted in
    `Engine.recompilations`. It shares the device with the answers.

    Args:
      engine: its model, parameters and limits are used. config: the run's config, for its template.
    """

    def __init__(self, engine: Engine, config: RunConfig):
        self.engine, self.config = engine, config
        self._one = threading.Lock()

    def draw(self, image: bytes, question: str, word: str) -> np.ndarray:
        """The picture of a question without a conversation, (height, width, 3) uint8; see `draw_small`.

        Raises:
          Busy: another picture is being drawn. requests.Full, requests.Closing: as for an answer, whose places it uses.
          BadRecord: the question does not fit the server's limits, or the image cannot be read.
          UserError: the word is not in the question.
        """
        if not self._one.acquire(blocking=False):
            raise Busy
        try:
            self.engine.reserve()
            try:
                # The limits of answers hold for pictures as well.
                self.engine.prepare(
                    Record("picture", None, [{"from": "human", "value": question}], "the page", (image,), literal=True)
                )
                return self._draw(image, question, word)
            finally:
                self.engine.release()
        finally:
            self._one.release()

    def _draw(self, image: bytes, question: str, word: str) -> np.ndarray:
        engine = self.engine
        with compilations.uncounted():
            attention = levels(
                engine.batch.model,
                engine.batch.params,
                self.config,
                engine.prompts.tokenizer,
                image,
                question,
                word,
                engine.prompts.latents,
                step=STEP,
            )
        return attention_pictures.pixels(attention_pictures.draw_small(attention), DPI)


def suggested(question: str, most: int = 8) -> list[str]:
    """The last `most` words of a question that may be worth a picture: those that are not common English words."""
    small, chosen = set(_SMALL.split()), {}
    for word in words(question):
        if len(word) <= LONGEST_WORD and word.lower() not in small and not word.isdigit():
            chosen.setdefault(word.lower(), word)
    return list(chosen.values())[-most:]
