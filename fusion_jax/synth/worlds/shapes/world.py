"""Implements the world of plain shapes, for models without pretraining: a caption names its picture.

The functions are those listed in `synth/worlds`. A picture decides everything, so neither schema nor seed changes an
answer.
"""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from fusion_jax.synth.backends.base import Unusable
from fusion_jax.synth.worlds.shapes import picture
from fusion_jax.synth.worlds.shapes.picture import KINDS, SPLITS, STYLE, Picture

STYLES = tuple(f"{STYLE}/{split}" for split in SPLITS)


def captions(count: int, seed: int, style: str) -> Iterator[str]:
    """Yields the names of the first `count` pictures of a split."""
    split = style.removeprefix(f"{STYLE}/")
    for number in range(count):
        yield Picture(seed, split, number).caption


def _find(request: dict[str, Any]) -> Picture | None:
    """The picture that a request is about, or None for a request of another world."""
    try:
        return picture.from_json(request.get("state")) or picture.from_caption(request.get("caption", ""))
    except ValueError as error:
        raise Unusable("foreign_state", str(error)) from None


def _picture(request: dict[str, Any]) -> Picture:
    named = _find(request)
    assert named is not None, "owns() holds for this request"
    return named


def owns(request: dict[str, Any]) -> bool:
    """Whether the request's state or caption names a picture of shapes. Raises `Unusable` for a broken state."""
    return _find(request) is not None


def drawable(caption: str) -> bool:
    """Always true: a caption of this world names its picture."""
    del caption
    return True


def describe(request: dict[str, Any], schema: dict | None, seed: int) -> tuple[dict, dict]:
    """The picture in words, and its name as the state. Raises `Unusable` for a kind outside `KINDS`."""
    del schema, seed
    if request["kind"] not in KINDS:
        raise Unusable("no_such_kind", f"pictures of shapes come in the kinds {', '.join(KINDS)}")
    named = _picture(request)
    return {"description": named.description(request["kind"])}, named.to_json()


def ask(request: dict[str, Any], schema: dict | None, seed: int) -> list[dict]:
    """Questions and answers of the request's kind, each with its topic and, where it is a choice, its options."""
    del schema, seed
    pairs = []
    for each in _picture(request).ask(request["kind"]):
        options = {"options": list(each.options)} if each.options else {}
        pairs.append({"question": each.question, "answer": each.answer, "topic": each.kind} | options)
    return pairs


def statements(pairs: list[dict], request: dict[str, Any]) -> list[str]:
    """Joins each question and its answer."""
    del request
    return [f"{pair['question']} {pair['answer']}" for pair in pairs]


def verify(question: str, answer: str, request: dict[str, Any]) -> bool:
    """Whether the answer is right for the picture."""
    return _picture(request).correct(question, answer)


def draw(description: str, request: dict[str, Any], size: tuple[int, int], seed: int) -> Image.Image:
    """Draws the picture as a square of the shorter side, and stretches it to `size`."""
    del description, seed
    return _picture(request).draw(min(size)).resize(size)
