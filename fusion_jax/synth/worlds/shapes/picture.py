"""Defines a picture of plain shapes, named by seed, split and number.

Everything about it follows from the name: what it shows, every pixel, every question. So both its state and its caption
are the name:

    "Plain shapes, picture 17 of train 0"
"""

import dataclasses
import functools
import random
import re
from typing import Any

from PIL import Image

from fusion_jax.synth.worlds.shapes import facts, grid, questions
from fusion_jax.synth.worlds.shapes.facts import Fact
from fusion_jax.synth.worlds.shapes.grid import Grid
from fusion_jax.synth.worlds.shapes.questions import Round

STYLE = "shapes"
SPLITS = ("train", "validation", "held_out")
KINDS = ("caption_long", "conv_long", "conv_short", "multi_choice")
_NAMED = re.compile(rf"Plain shapes, picture (\d{{1,12}}) of ({'|'.join(SPLITS)}) (\d{{1,12}})")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of a data set: `split` is one of `SPLITS`; `held_out` has unseen pairs of colour and shape."""

    seed: int
    split: str
    index: int

    def rng(self, purpose: str) -> random.Random:
        """The random generator for one purpose."""
        # A string as the seed gives the same numbers on every machine and Python, independent for each purpose.
        return random.Random(f"{self.seed}/{self.split}/{self.index}/{purpose}")

    @functools.cached_property
    def _content(self) -> tuple[Grid, Fact]:
        rng = self.rng("scene")
        goal = questions.target(self.index, rng)
        return questions.target_grid(goal, rng, "held_out" if self.split == "held_out" else "train")

    @property
    def grid(self) -> Grid:
        """What the picture shows."""
        return self._content[0]

    @property
    def fact(self) -> Fact:
        """The fact for which the picture was drawn, which is that of its first question."""
        return self._content[1]

    def draw(self, pixels: int) -> Image.Image:
        """Draws the picture, RGB of `pixels` x `pixels`."""
        return grid.draw(self.grid, pixels, self.rng("image"))

    def description(self, kind: str) -> str:
        """Describes the drawing in words: captions of `caption_long` are training texts as they are, while those of the
        other kinds have the length of a description."""
        text = questions.caption(self.grid, self.rng("description"))
        if kind == "caption_long":
            return text
        return f"{text} Each of them is plain, with a dark outline, on a soft gray background without anything else."

    def ask(self, kind: str) -> list[Round]:
        """Questions and answers of one of `KINDS`; the short conversations outside "train" have one round."""
        rng = self.rng(kind)
        if kind == "conv_long":
            return questions.sentence_rounds(self.grid, rng)
        if kind == "multi_choice":
            return questions.choice_rounds(self.grid, self.fact, rng)
        if self.split == "train":
            return questions.short_rounds(self.grid, self.fact, rng)
        return [questions.short_round(self.fact, rng)]

    def correct(self, question: str, answer: str) -> bool:
        """Whether an answer is right by any fact of the grid in any wording. A text that is not a known question is a
        request for a caption."""
        question, answer = question.split("\n")[0].split(" (")[0].strip(), answer.strip()  # without its options
        for kind, wordings in questions.WORDINGS.items():
            if not question.startswith(tuple(wording.partition("{")[0] for wording in wordings)):
                continue
            for fact in facts.facts(self.grid, kind, "held_out"):  # all pairs of colour and shape
                be = "are" if fact.plural else "is"
                if question in (wording.format(s=fact.subject, be=be) for wording in wordings):
                    return answer.lower() in (fact.answer.lower(), fact.statement.lower())
        # A caption lists the same shapes in some wording, and is right if it is one of those that can be written.
        return any(answer == questions.caption(self.grid, random.Random(k)) for k in range(200))

    @property
    def caption(self) -> str:
        """The caption that names it, for the data engine's pool."""
        return f"Plain shapes, picture {self.index} of {self.split} {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """The name as a JSON object: the state of a sample."""
        return {"style": STYLE, **dataclasses.asdict(self)}


# The engine requests the same picture repeatedly, and finding its grid takes longer than drawing it.
_picture = functools.lru_cache(maxsize=8)(Picture)


def from_caption(caption: str) -> Picture | None:
    """The picture that a caption names, or None."""
    match = _NAMED.fullmatch(caption)
    return _picture(int(match[3]), match[2], int(match[1])) if match else None


def from_json(state: Any) -> Picture | None:
    """The picture of a state, or None for a state of another style. Raises ValueError for a broken one."""
    if not isinstance(state, dict) or state.get("style") != STYLE:
        return None
    try:
        return _picture(int(state["seed"]), SPLITS[SPLITS.index(state["split"])], int(state["index"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the state of a picture of shapes: {error}") from None
