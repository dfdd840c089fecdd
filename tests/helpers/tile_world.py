"""A small honest world for testing the data engine: pictures of coloured tiles, and a model that knows about them.

A caption names colours and a number. The model writes what each kind asks for about a row of tiles in those colours;
the pictures show them; the verifier looks at the picture's pixels and knows nothing else. Answers to a known share of
the questions are wrong on purpose. Everything is a function of its input.
"""

import hashlib
import json
import re

import numpy as np
from PIL import Image

PALETTE = {
    "red": (220, 30, 30),
    "green": (30, 160, 40),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 40),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "purple": (140, 40, 160),
    "orange": (250, 140, 20),
}
COUNTS = ("zero", "one", "two", "three", "four", "five", "six")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_WORDS = """
light falls softly across wide wooden floor boards while dust drifts near open windows beside tall shelves
with folded linen cups jars baskets candles clocks mirrors stools curtains carpets plants ladders brushes
buckets handles hooks ropes ribbons paper stones leaves shells feathers bricks pipes rails steps doors frames
beams nails
"""
_FILLER = _WORDS.split()


def number(text: str, *parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, (text, *parts))).encode()).digest()[:6])


def captions(count: int, seed: int = 0, style: str = "scenes") -> list[str]:
    """Different captions of two to five tiles, no two neighbours of one colour."""
    made = []
    for i in range(count):
        row = [list(PALETTE)[number("caption", seed, i) % 8]]
        for k in range(1 + number("length", seed, i) % 4):
            row.append([c for c in PALETTE if c != row[-1]][number("tile", seed, i, k) % 7])
        made.append(f"Wall {i} with tiles in {', '.join(row[:-1])} and {row[-1]}")
    return made


def colours(text: str) -> list[str]:
    """Colours in the first sentence, in order."""
    return [word for word in re.findall(r"[a-z]+", text.split(".")[0].lower()) if word in PALETTE]


def wall(text: str) -> str:
    found = re.search(r"[Ww]all (\d+)", text)
    return found[1] if found else "0"


def filler(count: int, key: str) -> str:
    words = [_FILLER[number(key, i) % len(_FILLER)] for i in range(count)]
    return " ".join(" ".join(words[i : i + 9]).capitalize() + "." for i in range(0, count, 9))


def describe(kind: str, caption: str) -> dict:
    row, n = colours(caption), wall(caption)
    shown = f"Wall {n} has a row of tiles: {', '.join(row)}."
    if kind == "caption_color":
        return {"caption": f"Wall {n} has tiles in {row[0]} and {row[1]}", "colors": row[:2]}
    if kind == "caption_count":
        letters = n.translate(str.maketrans("0123456789", "abcdefghij"))  # a number would count
        return {
            "caption": f"Wall {letters} has two {row[0]} tiles and one lamp",
            "objects": [{"name": f"{row[0]} tiles", "count": 2}, {"name": "lamp", "count": 1}],
        }
    if kind == "caption_scene":
        return {"caption": f"Wall {n} has {row[0]} tiles on a beach", "scene": "beach"}
    if kind == "caption_spatial":
        return {
            "caption": f"Wall {n} has a {row[0]} tile left of a {row[1]} tile",
            "objects": [f"{row[0]} tile", f"{row[1]} tile"],
            "relation": "left of",
        }
    if kind == "caption_text":
        return {
            "caption": f'Wall {n} has {row[0]} tiles and a sign saying "Open"',
            "texts": [{"text": "Open", "carrier": "sign"}],
        }
    if kind == "text_qa":
        said = f'{shown} A sign reads "Gate {n}". {filler(112, n)}'
        return {"description": said, "texts": [f"Gate {n}"]}
    if kind.startswith("contrast"):
        other = [row[-1], *row[:-1]] if row[0] != row[-1] else row[::-1][1:]
        right = f"Wall {n} has a row of tiles: {', '.join(other)}. {filler(125, n + 'right')}"
        return {"left": f"{shown} {filler(125, n + 'left')}", "right": right}
    return {"description": f"{shown} {filler(60, n)}"}


def questions(kind: str, descriptions: list[str], wrong_share: float) -> dict:
    """A question about each tile and one about their number."""
    pairs = []
    sides = ("left", "right") if len(descriptions) == 2 else ("",)
    for side, description in zip(sides, descriptions):
        row = colours(description)
        where = f" in the {side} image" if side else ""
        for i in range(min(len(row), 3)):
            pairs.append((f"Which colour is the {ORDINALS[i]} tile from the left{where}?", row[i], list(PALETTE)))
        pairs.append((f"How many tiles are there{where}?", COUNTS[len(row)], list(COUNTS)))
    made = []
    for k, (question, right, all_answers) in enumerate(pairs[:5]):
        others = [answer for answer in all_answers if answer != right]
        start = number(descriptions[0], k, "options") % len(others)
        others = others[start:] + others[:start]
        planted = is_planted(descriptions[0], k, wrong_share)
        answer = others[0] if planted else right
        if kind == "multi_choice":
            made.append({"question": question, "options": [right, *others[:3]], "answer": answer})
            continue
        if kind.endswith("long"):
            answer = f"Looking closely, one can see that it is {answer}."
        elif kind == "reasoning":
            answer = f"It is {answer}. {filler(110, descriptions[0] + str(k))}"
        made.append({"question": question, "answer": answer})
    return {"pairs": made}


def is_planted(description: str, k: int, share: float) -> bool:
    return number(description, k, "wrong") % 1000 < 1000 * share


def draw(description: str, size: tuple[int, int]) -> Image.Image:
    """Tiles in the upper half; in the lower one a pattern of the description's own, so that no two look alike."""
    width, height = size
    row = colours(description)
    pixels = np.zeros((height, width, 3), np.uint8)
    for i, colour in enumerate(row):
        pixels[: height // 2, width * i // len(row) : width * (i + 1) // len(row)] = PALETTE[colour]
    pattern = np.random.default_rng(number(description, "pattern")).integers(40, 216, (4, 8), np.uint8)
    half = height - height // 2
    lower = np.asarray(Image.fromarray(pattern).resize((width, half), Image.Resampling.NEAREST))
    pixels[height // 2 :] = lower[..., None]
    return Image.fromarray(pixels)


def look(image: Image.Image) -> list[str]:
    """The colours of the tiles, read from the pixels."""
    line = np.asarray(image.convert("RGB"), np.int32)[image.height // 4]
    names, colours_ = list(PALETTE), np.array(list(PALETTE.values()))
    nearest = ((line[:, None] - colours_[None]) ** 2).sum(-1).argmin(1)
    runs = [[int(nearest[0]), 0]]
    for one in nearest:
        if one != runs[-1][0]:
            runs.append([int(one), 0])
        runs[-1][1] += 1
    return [names[one] for one, length in runs if length >= image.width // 20]


def verify(images: list[Image.Image], question: str, answer: str) -> bool:
    """Whether the answer is right by the pixels alone."""
    row = look(images[1 if "right image" in question else 0])
    said = re.findall(r"[a-z]+", answer.split(". ")[0].lower())
    if "How many" in question:
        return {word for word in said if word in COUNTS[2:]} == {COUNTS[len(row)]}
    if "Which colour" in question:
        place = next(i for i, name in enumerate(ORDINALS) if f"the {name} tile" in question)
        return [word for word in said if word in PALETTE] == [row[place]]
    return {word for word in said if word in PALETTE} <= set(row)  # a caption


def reply(purpose: str, data: dict, wrong_share: float = 0.0) -> dict:
    """The answer to one request for text."""
    if purpose == "judge":
        return {"drawable": "tiles" in data["caption"]}
    if purpose == "describe":
        return describe(data["kind"], data["caption"])
    if purpose == "qa":
        return questions(data["kind"], data["descriptions"], wrong_share)
    assert purpose == "statement"
    return {"statements": [f"{pair['question']} {pair['answer']}" for pair in data["pairs"]]}


# ---- The same as a backend without a network.

VERSION = 1
SOURCE, LICENCE = "tile world", "CC0"
STYLES = ("scenes",)


class LanguageModel:
    name, settings, paid = "tile-writer", {}, False

    def chat(self, messages, schema, seed, purpose, data):
        from fusion_jax.synth.backends.base import Reply

        answer = reply(purpose, data)
        return Reply(json.dumps(answer), answer)


class VisionModel:
    name, settings, paid = "tile-viewer", {}, False

    def verify(self, images, messages, question, answer, seed, data):
        from fusion_jax.synth.backends.base import Reply

        return Reply("", {"correct": verify(images, question, answer)})


class ImageGenerator:
    name, settings, paid = "tile-painter", {}, False

    def draw(self, description, size, seed, data):
        return draw(description, size)
