"""The simple drawing style: plain shapes on a grid (`synth/scenes.py`), for models that start from nothing.

A picture is named by seed, split and number, and everything about it follows from the name: what it shows, every pixel,
every question. So its state is the name, and its caption begins with it:

    "Picture 17 of train 0: A small red star at the top and a large blue ring on the left."
"""

import dataclasses
import functools
import random
import re
from typing import Any

from PIL import Image

from fusion_jax.synth import questions, scenes
from fusion_jax.synth.questions import Round

STYLE = "shapes"
SPLITS = ("train", "validation", "held_out")
_NAMED = re.compile(rf"Picture (\d{{1,12}}) of ({'|'.join(SPLITS)}) (\d{{1,12}}): ")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of a data set: `split` is of `SPLITS`; `held_out` has unseen pairs of colour and shape."""

    seed: int
    split: str
    index: int

    def rng(self, purpose: str) -> random.Random:
        # Seeded by a string: the same on every machine and every Python, and independent from purpose to purpose.
        return random.Random(f"{self.seed}/{self.split}/{self.index}/{purpose}")

    @functools.cached_property
    def _aimed(self) -> tuple[scenes.Scene, Round]:
        rng = self.rng("scene")
        goal = questions.target(self.index, rng)
        scene, fact = questions.target_scene(goal, rng, "held_out" if self.split == "held_out" else "train")
        return scene, questions.target_round(goal, fact, rng)

    @property
    def scene(self) -> scenes.Scene:
        return self._aimed[0]

    @property
    def asked(self) -> Round:
        """The question that the picture was drawn for."""
        return self._aimed[1]

    def draw(self, pixels: int, jpeg_share: float) -> tuple[Image.Image, bool]:
        """The picture, and whether it is one of the share that is stored as JPEG."""
        rng = self.rng("image")
        jpeg = rng.random() < jpeg_share
        return scenes.draw(self.scene, pixels, rng), jpeg

    def rounds(self, stage: str) -> list[Round]:
        """The conversation of a stage: "stage1" a caption, "stage1_5" sentences, "stage2" short answers."""
        rng = self.rng(stage)
        if stage == "stage1":
            return questions.caption_round(self.scene, rng)
        if stage == "stage1_5":
            return questions.sentence_rounds(self.scene, rng)
        return questions.short_rounds(self.scene, self.asked, rng)

    @property
    def caption(self) -> str:
        """The caption that names it, for the data engine's pool."""
        return f"Picture {self.index} of {self.split} {self.seed}: {self.rounds('stage1')[0].answer}"

    def to_json(self) -> dict[str, Any]:
        return {"style": STYLE, **dataclasses.asdict(self)}


def from_caption(caption: str) -> Picture | None:
    """The picture that a caption names, or None."""
    found = _NAMED.match(caption)
    return Picture(int(found[3]), found[2], int(found[1])) if found else None


def from_json(state: Any) -> Picture | None:
    """The picture of a state, or None for a state of another style. ValueError for a broken one."""
    if not isinstance(state, dict) or state.get("style") != STYLE:
        return None
    try:
        return Picture(int(state["seed"]), SPLITS[SPLITS.index(state["split"])], int(state["index"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the state of a picture of shapes: {error}") from None


def description(picture: Picture) -> str:
    """The caption at the length of a description."""
    caption = questions.caption(picture.scene, picture.rng("description"))
    return f"{caption} Each of them is plain, with a dark outline, on a soft gray background without anything else."


def ask(picture: Picture, kind: str) -> list[Round]:
    """Questions and answers of one of the data engine's kinds, `KINDS`: those of the stages, without what the engine
    adds itself (the wish for a short answer, the options' letters)."""
    if kind == "conv_long":
        # The engine wants at least five words; where all answers are shorter, the caption is asked for.
        long = [r for r in picture.rounds("stage1_5") if len(r.answer.split()) >= 5]
        return long or picture.rounds("stage1")
    short = [r for r in (picture.asked, *picture.rounds("stage2")) if r.kind != "choice"]
    bare = [dataclasses.replace(r, question=r.question.removesuffix(questions.BRIEFLY)) for r in short]
    return list(dict.fromkeys(bare)) or picture.rounds("stage1_5")


KINDS = ("conv_short", "conv_long")


def correct(picture: Picture, question: str, answer: str) -> bool:
    """Whether an answer is right: by all facts of the scene, in every wording. What is no question is a caption."""
    asked = question.split("\n")[0].strip()
    said = answer.strip()
    for kind in (*questions.KINDS, "describe"):
        if kind == "choice":
            continue
        for fact in questions.facts(picture.scene, kind, "held_out"):  # all pairs of colour and shape
            be = "are" if fact.plural else "is"
            if asked in (wording.format(s=fact.subject, be=be) for wording in questions.WORDINGS[kind]):
                return said.lower() in (fact.answer.lower(), fact.statement.lower())
    # A caption lists the same shapes in some order and wording: it is right if it is one of those that can be written.
    return any(said == questions.caption(picture.scene, random.Random(k)) for k in range(200))
