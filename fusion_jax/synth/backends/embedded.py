"""The data engine's default backend: no network, no weights. A scene graph stands behind every word and every pixel.

    caption --parse--> draft --settle--> scene graph --write--> description, caption
                                             |--------draw----> image
                                             |--------ask-----> questions and answers, true by construction
                                             `-------claims---> is this answer right?

The graph travels as the sample's state. Where there is none, because another model wrote the description, the
description is parsed: what cannot be drawn as it says is refused.

There are two styles. "scenes" is the one above. "shapes" are the small plain pictures of the quickstart, for training
and for tests ("shapes/train", ...): a caption names its picture, and all else follows from it (`scene/shapes.py`).
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

from PIL import Image

from fusion_jax.synth.backends.base import Reply, Unusable
from fusion_jax.synth.worlds.scenes import ask, claims, compose, contrast, graph, reading, reason, write
from fusion_jax.synth.worlds.scenes import draw as drawing
from fusion_jax.synth.worlds.scenes.falsify import falsify
from fusion_jax.synth.worlds.scenes.graph import Scene
from fusion_jax.synth.worlds.scenes.parse import Draft, parse
from fusion_jax.synth.worlds.shapes import world as shapes

VERSION = 2
SOURCE = "embedded scenes"
LICENCE = "Generated data, made by this program alone: free to use, change and share for any purpose."

CAPTION_KINDS = ("caption_color", "caption_count", "caption_scene", "caption_spatial", "caption_text")
CONTRAST_KINDS = ("contrast_short", "contrast_long")
STYLES = ("scenes", *(f"{shapes.STYLE}/{split}" for split in shapes.SPLITS))
SHORT = 20  # words of a caption at most; a longer description is a paragraph
TRIES = 20  # for captions of at most twelve words


def captions(count: int, seed: int, style: str = "scenes") -> Iterator[str]:
    """A pool of captions in one of `STYLES`, each a function of the seed and its number."""
    if style not in STYLES:
        raise ValueError(f"no style {style!r}; there are {', '.join(STYLES)}")
    for number in range(count):
        if style != "scenes":
            yield shapes.Picture(seed, style.removeprefix(f"{shapes.STYLE}/"), number).caption
            continue
        rng = graph.generator(seed, "pool", number)
        texts = rng.choices((0, 1, 2), (8, 3, 1))[0]
        made = compose.settle(compose.random_draft(rng, rng.choices((1, 2, 3), (2, 5, 4))[0], texts), rng)
        yield write.pool_caption(made, rng)


def scenes_of(data: dict[str, Any]) -> list[Scene]:
    """The scenes of a request: its state, or else read from its descriptions. `Unusable` where that fails."""
    state = data.get("state")
    try:
        if isinstance(state, dict) and "scenes" in state:
            return [graph.from_json(each) for each in state["scenes"]]
        return [read_exactly(description) for description in data["descriptions"]]
    except compose.Impossible as error:
        raise Unusable("not_drawable", str(error)) from None
    except ValueError as error:
        raise Unusable("foreign_state", str(error)) from None


def read_exactly(description: str) -> Scene:
    """The scene of a description, what it leaves open decided by its words. Raises `compose.Impossible`, also where
    the scene keeps too little of it."""
    made = compose.settle(parse(description), graph.generator(description), exact=True)
    found = reading.read(description, made)
    # A paragraph speaks of light and manner, too, and has its things in a fraction of its words.
    short = write.count_words(description) <= SHORT
    if found.kept_share < (reading.KEPT_MIN if short else reading.PARAGRAPH_MIN):
        raise compose.Impossible(reading.complaint(found.to_json()))
    return made


class LanguageModel:
    """Judges, describes, asks and states from scene graphs.

    Attributes:
      wrong_share: share of the answers that are made wrong, for tests of verification.
    """

    name = "embedded"
    paid = False

    def __init__(self, wrong_share: float = 0.0):
        self.wrong_share = wrong_share
        self.settings = {"version": VERSION} | ({"wrong_share": wrong_share} if wrong_share else {})

    def chat(self, messages: list[dict], schema: dict | None, seed: int, purpose: str, data: dict) -> Reply:
        del messages
        rng = graph.generator(seed, purpose, data.get("kind", ""))
        picture = _picture(data)
        if picture is not None:
            return _reply_about_shapes(picture, purpose, data)
        state = None
        if purpose == "judge":
            parsed = {"drawable": bool(parse(data["caption"]).groups)}
        elif purpose == "describe":
            parsed, scenes = _describe(data["kind"], data["caption"], schema, rng)
            # Of two scenes one differs from the caption's on purpose.
            found = [reading.read(data["caption"], made) for made in scenes]
            understood = max(found, key=lambda each: each.kept_share)
            state = {"scenes": [graph.to_json(made) for made in scenes], "reading": understood.to_json()}
        elif purpose == "qa":
            parsed, state = _with_topics(self._pairs(data, schema, rng, seed))
        elif purpose == "statement":
            scenes = scenes_of(data)
            parsed = {"statements": [_statement(pair, scenes) for pair in data["pairs"]]}
        elif purpose == "verify":
            parsed = _verify(data["question"], data["answer"], data)
        else:
            raise ValueError(f"no purpose {purpose!r}")
        return Reply(json.dumps(parsed, ensure_ascii=False), parsed, state=state)

    def _pairs(self, data: dict, schema: dict | None, rng: random.Random, seed: int) -> list[dict]:
        scenes = scenes_of(data)
        pairs = _ask(data["kind"], schema, scenes, rng)
        for number, pair in enumerate(pairs):
            if planted(seed, number, self.wrong_share):
                wrong = falsify(pair["question"], pair["answer"], scenes, graph.generator(seed, "false", number))
                if wrong is None:
                    continue
                if "options" in pair and wrong not in pair["options"]:
                    wrong = next(option for option in pair["options"] if option != pair["answer"])
                pair["answer"] = wrong
        return pairs


def _picture(data: dict[str, Any]) -> shapes.Picture | None:
    """The picture of shapes that a request is about, or None for one about a scene."""
    try:
        return shapes.from_json(data.get("state")) or shapes.from_caption(data.get("caption", ""))
    except ValueError as error:
        raise Unusable("foreign_state", str(error)) from None


def _reply_about_shapes(picture: shapes.Picture, purpose: str, data: dict) -> Reply:
    state = None
    if purpose == "judge":
        parsed: dict = {"drawable": True}
    elif purpose == "describe":
        if data["kind"] not in shapes.KINDS:
            raise Unusable("no_such_kind", f"pictures of shapes come in the kinds {', '.join(shapes.KINDS)}")
        parsed, state = {"description": shapes.description(picture, data["kind"])}, picture.to_json()
    elif purpose == "qa":
        pairs = []
        for r in picture.ask(data["kind"]):
            options = {"options": list(r.options)} if r.options else {}
            pairs.append({"question": r.question, "answer": r.answer, "topic": r.kind} | options)
        parsed, state = _with_topics(pairs)
    elif purpose == "statement":
        parsed = {"statements": [f"{pair['question']} {pair['answer']}" for pair in data["pairs"]]}
    else:
        parsed = _verify(data["question"], data["answer"], data)
    return Reply(json.dumps(parsed, ensure_ascii=False), parsed, state=state)


def _with_topics(pairs: list[dict]) -> tuple[dict, dict]:
    """The reply's pairs, and beside them what each question is about."""
    topics = {pair["question"]: pair.pop("topic") for pair in pairs if "topic" in pair}
    return {"pairs": pairs}, {"topics": topics}


def planted(seed: int, number: int, share: float) -> bool:
    """Whether the pair of this number in the `qa` reply to this seed is to be made wrong."""
    return graph.generator(seed, "planted", number).random() < share


class VisionModel:
    """An oracle: reads the scene graph that travels with the images, never their pixels."""

    name = "embedded-oracle"
    paid = False

    def __init__(self):
        self.settings = {"version": VERSION}

    def verify(
        self, images: list[Image.Image], messages: list[dict], question: str, answer: str, seed: int, data: dict
    ) -> Reply:
        del images, messages, seed
        parsed = _verify(question, answer, data)
        return Reply(json.dumps(parsed), parsed)


class ImageGenerator:
    """Draws scene graphs (`scene/draw.py`)."""

    name = "embedded"
    paid = False

    def __init__(self):
        self.settings = {"version": VERSION}

    def draw(self, description: str, size: tuple[int, int], seed: int, data: dict) -> Image.Image:
        picture = _picture(data)
        if picture is not None:
            return picture.draw(min(size)).resize(size)
        index = data.get("index", 0)
        scenes = scenes_of({"descriptions": [description] * (index + 1), "state": data.get("state")})
        return drawing.draw(scenes[index], size, seed)


def _verify(question: str, answer: str, data: dict) -> dict:
    picture = _picture(data)
    if picture is not None:
        return {"correct": shapes.correct(picture, question, answer)}
    return {"correct": claims.correct(question, answer, scenes_of(data))}


def _describe(kind: str, caption: str, schema: dict | None, rng: random.Random) -> tuple[dict, list[Scene]]:
    kind = _likeness(kind, "describe", schema)
    draft = parse(caption)
    if not draft.groups:
        raise Unusable("not_drawable", "the caption names nothing that the embedded backend can draw")
    if kind in CAPTION_KINDS:
        return _caption(kind, draft, rng)
    if kind in CONTRAST_KINDS:
        left = compose.settle(compose.extend(draft, rng, rng.randint(3, 5)), rng)
        scenes = [left, compose.vary(left, rng)]
        rng.shuffle(scenes)  # a variation loses things more often than it wins some
        texts = [write.description(made, rng, 120, 180) for made in scenes]
        return dict(zip(("left", "right"), texts)), scenes
    if kind == "text_qa":
        made = compose.settle(compose.extend(_with_room(draft), rng, rng.randint(3, 5), rng.randint(1, 3)), rng)
        texts = [group.text for group in made.texts]
        return {"description": write.description(made, rng, 110, 150), "texts": texts}, [made]
    made = compose.settle(compose.extend(draft, rng, rng.randint(3, 5)), rng)
    return {"description": write.description(made, rng, 60, 180)}, [made]


def _with_room(draft: Draft) -> Draft:
    """A draft that leaves room for a thing with a text, and has at most three texts itself."""
    part = _chosen(draft, sorted(range(len(draft.groups)), key=lambda i: not draft.groups[i].text)[:3])
    for group in part.groups:
        group.count = min(group.count or 1, graph.MAX_OF_A_KIND)
    while sum(group.count for group in part.groups) >= graph.MAX_THINGS:
        max(part.groups, key=lambda group: group.count).count -= 1
    return part


def _chosen(draft: Draft, numbers: list[int]) -> Draft:
    """The groups of these numbers, in that order, and the relations among them."""
    place = {number: k for k, number in enumerate(numbers)}
    relations = [(place[a], r, place[b]) for a, r, b in draft.relations if a in place and b in place]
    return Draft(draft.setting, [dataclasses.replace(draft.groups[i]) for i in numbers], relations)


_WRITERS = {
    "caption_color": write.color_caption,
    "caption_count": write.count_caption,
    "caption_scene": write.scene_caption,
    "caption_spatial": write.spatial_caption,
    "caption_text": write.text_caption,
}


def _caption(kind: str, draft: Draft, rng: random.Random) -> tuple[dict, list[Scene]]:
    """A caption of at most twelve words about a scene that holds what the draft names, as far as that can be said in
    twelve words; two things for a caption of where they are, one with a text for one of what is written."""
    order = list(range(len(draft.groups)))
    if kind == "caption_text":  # first what carries a text already
        order.sort(key=lambda i: (not draft.groups[i].text, draft.groups[i].noun not in compose.CARRIERS))
    least, texts = (2 if kind == "caption_spatial" else 1), (1 if kind == "caption_text" else 0)
    for attempt in range(TRIES):
        part = _chosen(draft, order[: max(least, 3 - attempt // 6)])
        part = compose.extend(part, rng, least, texts, longest=4)
        made = compose.settle(part, rng, colours=3 if kind == "caption_color" else None)
        written = _WRITERS[kind](made, rng)
        if written:
            return written, [made]
    raise Unusable("too_long", f"no caption of {write.CAPTION_WORDS} words could be made of it")


# What answers a kind that is not among these by name: (keys of `describe`, keys of a pair) -> the kind that it is like.
_FORMS = {
    "describe": {
        ("caption",): "caption_scene",
        ("description",): "conv_short",
        ("left", "right"): "contrast_short",
    },
    "qa": {("answer", "question"): "conv_short", ("answer", "options", "question"): "multi_choice"},
}
_DESCRIBED_KINDS = ("multi_choice", "conv_short", "conv_long", "reasoning", "text_qa", "caption_long")


def _likeness(kind: str, purpose: str, schema: dict | None) -> str:
    """The kind itself, or for one that this backend does not know another whose answers have the same form. `Unusable`
    where there is none."""
    if kind in (*CAPTION_KINDS, *CONTRAST_KINDS, *_DESCRIBED_KINDS):
        return kind
    wanted = (schema or {}).get("properties", {})
    if purpose == "qa":
        wanted = wanted.get("pairs", {}).get("items", {}).get("properties", {}) if set(wanted) == {"pairs"} else {}
    found = _FORMS[purpose].get(tuple(sorted(wanted)))
    if found is None:
        forms = "; ".join(", ".join(keys) for keys in _FORMS[purpose])
        raise Unusable(
            "no_such_kind",
            f"the embedded backend cannot answer {purpose} of kind {kind!r}: it writes answers with the keys {forms}; "
            f"asked for: {', '.join(wanted) or 'others'}; give llm another backend",
        )
    return found


def _ask(kind: str, schema: dict | None, scenes: list[Scene], rng: random.Random) -> list[dict]:
    known = _likeness(kind, "qa", schema)
    if len(scenes) == 2 and known not in CONTRAST_KINDS:
        known = "contrast_long" if rng.random() < 0.5 else "contrast_short"
    elif known != kind and known == "conv_short" and rng.random() < 0.5:
        known = "conv_long"  # which length the kind wants shows in its check: the next attempt may be the other
    kind = known
    if kind in CONTRAST_KINDS:
        return _ask_both(kind, scenes, rng)
    (made,) = scenes
    if kind == "reasoning":
        return [{"question": q, "answer": a} for q, a in reason.answers(made, rng, rng.randint(1, 4))]
    if kind == "multi_choice":
        return _multiple_choice(made, rng)
    if kind == "text_qa":
        chosen = ask.choose(made, rng, rng.randint(2, 5), ("text",))
        return [_pair(fact, fact.short if rng.random() < 0.5 else fact.sentence, rng) for fact in chosen]
    if kind == "conv_short":
        return [_pair(fact, fact.short, rng) for fact in ask.choose(made, rng, rng.randint(4, 8))]
    if kind == "conv_long":
        pairs = []
        for fact in ask.choose(made, rng, rng.randint(3, 8)):
            more = ask.details(made, fact, rng)
            least = 1 if write.count_words(fact.sentence) < 5 else 0
            pairs.append(_pair(fact, " ".join([fact.sentence, *more[: rng.randint(least, 2)]]), rng))
        return pairs
    raise Unusable("no_such_kind", f"the embedded backend asks nothing about pictures of kind {kind!r}")


def _pair(fact: ask.Fact, answer: str, rng: random.Random) -> dict:
    return {"question": rng.choice(fact.questions), "answer": answer, "topic": fact.topic}


def _multiple_choice(made: Scene, rng: random.Random) -> list[dict]:
    topics = tuple(topic for topic in ask.TOPICS if topic not in ("exists", "absent"))
    pairs = []
    for fact in ask.choose(made, rng, rng.randint(4, 8), topics):
        wrong = rng.sample(fact.wrong, min(3, len(fact.wrong)))
        options = [fact.short, *wrong]
        rng.shuffle(options)
        pairs.append(_pair(fact, fact.short, rng) | {"options": options})
    return pairs


def _ask_both(kind: str, scenes: list[Scene], rng: random.Random) -> list[dict]:
    pairs = []
    for fact in contrast.choose(*scenes, rng, rng.randint(3, 7)):
        answer = fact.short
        if kind == "contrast_long":
            more = [s for side, made in zip(contrast.SIDES, scenes) for s in contrast.details(made, side, fact)]
            answer = " ".join([fact.sentence, *more[: rng.randint(0, 2)]])
        pairs.append(_pair(fact, answer, rng))
    return pairs


def _statement(pair: dict, scenes: list[Scene]) -> str:
    """A question and its answer as one statement, whether the answer is right or not."""
    question, answer = pair["question"].split("\n")[0], pair["answer"]
    known = ask.by_question(scenes[0]) if len(scenes) == 1 else contrast.by_question(*scenes)
    fact = known.get(question.lower())
    if fact is not None and answer == fact.short:
        return fact.sentence
    if write.count_words(answer) >= 5 and answer.endswith("."):
        return " ".join(answer.split()[:40])
    return f'The answer to "{question}" is "{answer}".'
