"""Defines long captions, which are the descriptions of the images; the papers do not have this kind."""

import dataclasses

from fusion_jax.synth.kinds.base import Kind
from fusion_jax.synth.kinds.common import DESCRIBE, limit_words
from fusion_jax.synth.replies import clean_text

REQUESTS = (
    "Describe the image.",
    "What is in the image?",
    "Tell me what you see.",
    "Write a caption for the image.",
    "What does the image show?",
)


def check(value: dict, data: dict) -> dict:
    del data
    return {"description": limit_words(clean_text(value["description"]), 3, 260, "the caption")}


def turns(pairs: list[dict], number: int) -> list[tuple[str, str]]:
    return [(REQUESTS[number % len(REQUESTS)], pairs[0]["answer"])]


KIND = Kind(
    name="caption_long",
    stage="stage1",
    describe=dataclasses.replace(DESCRIBE, check=check),
    ask=None,
    turns=turns,
)
