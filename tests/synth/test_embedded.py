"""The embedded backend against the engine's kinds: limits kept, answers true by a second reader, lies found."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from helpers.falsify import Liar, planted

from fusion_jax.synth import filters
from fusion_jax.synth.backends import embedded
from fusion_jax.synth.backends.base import Unusable
from fusion_jax.synth.config import FilterConfig
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.worlds.scenes import claims, compose, contrast, graph, write
from fusion_jax.synth.worlds.scenes.forms import CAPTION_KINDS
from fusion_jax.synth.worlds.scenes.lexicon import COLOURS, NOUNS
from fusion_jax.synth.worlds.scenes.settings import SETTINGS
from fusion_jax.synth.worlds.scenes.world import scenes_of

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
PER_KIND = 25
CAPTIONS = list(embedded.captions(400, 11))


def sample(kind: str, number: int, model: embedded.LanguageModel | None = None) -> tuple[dict, list[dict]]:
    """A request's data with its state, and the pairs as the engine's checks leave them."""
    model, asked = model or embedded.LanguageModel(), KINDS[kind]
    data = {"kind": kind, "caption": CAPTIONS[number % len(CAPTIONS)]}
    reply = model.chat([], None, number, "describe", data)
    answer = asked.describe.read(reply.text, reply.parsed, data)
    assert answer == asked.describe.read(reply.text, None, data)  # as if it came over the wire
    data |= {"descriptions": asked.descriptions(answer), "state": json.loads(json.dumps(reply.state))}
    if asked.ask is None:
        return data, [{"question": "Describe the image briefly.", "answer": data["descriptions"][0]}]
    reply = model.chat([], None, number, "qa", data)
    pairs = asked.ask.read(reply.text, reply.parsed, data)["pairs"]
    assert len(pairs) == len(reply.parsed["pairs"])  # no limit broken, nothing cut
    return data, pairs


@pytest.mark.parametrize("kind", KINDS)
def test_replies_keep_every_limit_of_their_kind(kind):
    for number in range(PER_KIND):
        data, pairs = sample(kind, number)
        assert len(data["descriptions"]) == KINDS[kind].images == len(data["state"]["scenes"])
        assert KINDS[kind].turns(pairs, number)
        if kind in CAPTION_KINDS:
            assert len(data["descriptions"][0].split()) <= 12
        else:
            assert scenes_of({"descriptions": data["descriptions"]}) == scenes_of(data)


def test_reasons_are_long_and_contrasts_differ():
    for number in range(PER_KIND):
        _, pairs = sample("reasoning", number)
        assert all(100 <= len(pair["answer"].split()) <= 500 for pair in pairs) and len(pairs) <= 6
        data, _ = sample("contrast_long", number)
        left, right = scenes_of(data)
        assert left != right
        assert all(120 <= len(text.split()) <= 180 for text in data["descriptions"])


def facts_of(state: dict) -> dict:
    """What the second reader knows: straight from the state's JSON."""
    groups = state["groups"]
    return {
        "number": Counter({noun: sum(g["count"] for g in groups if g["noun"] == noun) for noun in NOUNS}),
        "colours": {noun: {g["colour"] for g in groups if g["noun"] == noun} for noun in NOUNS},
        "columns": {noun: {g["column"] for g in groups if g["noun"] == noun} for noun in NOUNS},
        "texts": {g["noun"]: g["text"] for g in groups},
        "total": sum(g["count"] for g in groups),
        "place": SETTINGS[state["setting"]],
    }


SINGULAR = {noun.plural: name for name, noun in NOUNS.items()} | {name: name for name in NOUNS}


def true_answer(question: str, state: dict) -> str | None:
    """The answer to a question by its words and the state alone; None for forms that are not read here."""
    known = facts_of(state)
    if found := re.fullmatch(r"How many (\w+) (?:are there|can you count)\?", question):
        return next(word for word, n in NUMBERS.items() if n == known["number"][SINGULAR[found[1]]])
    if re.match("How many things are there in all", question):
        return next(word for word, n in NUMBERS.items() if n == known["total"])
    if found := re.fullmatch(r"(?:What color (?:is|are)|Which color (?:do|does)) the (\w+?)(?: have)?\?", question):
        (colour,) = known["colours"][SINGULAR[found[1]]]
        return colour
    if found := re.fullmatch(r"Is there an? (\w+) (\w+) in the picture\?", question):
        return "yes" if found[1] in known["colours"][found[2]] else "no"
    if found := re.fullmatch(r"(?:Is there|Can you see) an? (\w+)(?: in the picture)?\?", question):
        return "yes" if known["number"][found[1]] else "no"
    if found := re.fullmatch(r"(?:Is|Are) the (\w+) to the left or to the right of the (\w+)\?", question):
        order = ("left", "center", "right")
        a, b = (order.index(next(iter(known["columns"][SINGULAR[word]]))) for word in found.groups())
        return "to the left" if a < b else "to the right"
    if question == "Is the scene indoors or outdoors?":
        return "indoors" if known["place"].indoors else "outdoors"
    if question.startswith(("Where does the scene", "In what surroundings")):
        return f"{known['place'].preposition} a {known['place'].phrase}"
    if found := re.fullmatch(r"(?:What is written on|What does) the (\w+)(?: say)?\?", question):
        return known["texts"][found[1]]
    return None


@pytest.mark.parametrize("kind", ["conv_short", "multi_choice", "text_qa"])
def test_answers_are_true_by_a_second_reader(kind):
    read = 0
    for number in range(100):
        data, pairs = sample(kind, number)
        for pair in pairs:
            expected = true_answer(pair["question"], data["state"]["scenes"][0])
            if expected is not None and (kind != "text_qa" or '"' not in pair["answer"]):
                assert pair["answer"] == expected, (pair, data["state"])
                read += 1
            elif expected is not None:
                assert f'"{expected}"' in pair["answer"]
    assert read > (200 if kind != "text_qa" else 40)


def test_captions_of_each_kind_say_what_is_there():
    for number in range(PER_KIND):
        for kind in CAPTION_KINDS:
            data, _ = sample(kind, number)
            groups = data["state"]["scenes"][0]["groups"]
            words = re.findall(r"[a-z]+", data["descriptions"][0].lower())
            if kind == "caption_color":
                assert {w for w in words if w in COLOURS} == {g["colour"] for g in groups}
                assert len({g["colour"] for g in groups}) <= 3
            if kind == "caption_count":
                assert sum(g["count"] for g in groups) <= 6 and all(g["count"] <= 3 for g in groups)
            if kind == "caption_text":
                assert all(f'"{g["text"]}"' in data["descriptions"][0] for g in groups if g["text"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].ask])
def test_the_oracle_drops_what_is_planted_and_nothing_else(kind):
    model, vision = Liar(0.2), embedded.VisionModel()
    judged: Counter = Counter()
    for number in range(70):
        data, pairs = sample(kind, number, model)
        for k, pair in enumerate(pairs):
            reply = vision.verify([], [], pair["question"], pair["answer"], 0, data)
            judged[planted(number, k, 0.2), reply.parsed["correct"]] += 1
    assert judged[True, False] > 12
    assert judged[True, True] <= 0.01 * judged[True, False]
    assert judged[False, False] <= 0.01 * judged[False, True]


def test_the_oracle_finds_every_right_answer_about_more_of_two_pictures():
    """It read the side that was named first: "The right image does: there are two balls in the left image, ..."."""
    asked = 0
    for number in range(150):
        data, _ = sample("contrast_long", number)
        scenes = scenes_of(data)
        for fact in contrast.facts(*scenes):
            if fact.topic == "more":
                asked += 1
                assert claims.correct(fact.questions[0], fact.sentence, scenes), fact
                assert not claims.correct(fact.questions[0], fact.wrong[0], scenes), fact
    assert asked > 20


SCENE = graph.from_json(
    {
        "version": 1,
        "setting": "beach",
        "groups": [
            {"noun": "kite", "count": 1, "colour": "blue", "size": "", "row": "air", "column": "right", "text": ""},
            {
                "noun": "sign",
                "count": 1,
                "colour": "green",
                "size": "",
                "row": "back",
                "column": "left",
                "text": "OPEN",
            },
            {
                "noun": "ball",
                "count": 3,
                "colour": "red",
                "size": "small",
                "row": "front",
                "column": "right",
                "text": "",
            },
        ],
    }
)


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        ("What do you see?", "Three red balls lie on the right, below a blue kite.", True),
        ("What do you see?", "Two red balls lie on the right.", False),
        ("What do you see?", "Three blue balls.", False),
        ("What do you see?", "There is a cat.", False),
        ("What do you see?", "There is no cat, but there are balls.", True),
        ("What do you see?", "There is no ball.", False),
        ("Where is it?", "On a sandy beach.", True),
        ("Where is it?", "In a quiet library.", False),
        ("Where is it?", "The scene is indoors.", False),
        ("What is where?", "The kite is above the balls, and the sign is to the left of the balls.", True),
        ("What is where?", "The kite is below the balls.", False),
        ("What is where?", "The sign is to the right of the balls.", False),
        ("What is where?", "The balls are in the background.", False),
        ("What is where?", "The balls are in front of the sign.", True),
        ("What does it say?", 'The sign reads "OPEN".', True),
        ("What does it say?", 'The sign reads "CLOSED".', False),
        ("What does it say?", 'The kite is blue. It says "OPEN".', True),
        ("What color is the kite?", "blue", True),
        ("What color is the kite?", "Blue.", True),
        ("What color is the kite?", "turquoise", False),
        ("What color is the kite?", "The kite is red.", False),
        ("How many balls are there?", "three", True),
        ("How many balls are there?", "four", False),
        ("Is there a cat in the picture?", "no", True),
        ("Is there a cat in the picture?", "Yes, there is no doubt.", False),
        ("Are there more balls or more kites?", "There are more balls than kites.", True),
        ("Are there more balls or more kites?", "There are more kites than balls.", False),
        ("How many?", "There are five things in all.", True),
        ("How many?", "There are six things in all.", False),
        ("What is left?", "Five less two leaves three.", True),
        ("What is left?", "Five less two leaves four.", False),
    ],
)
def test_the_oracle_by_example(question, answer, right):
    assert claims.correct(question, answer, [SCENE]) == right


def test_the_pool_is_varied_and_mostly_passes_the_published_filters():
    assert list(itertools.islice(embedded.captions(5000, 11), 400)) == CAPTIONS  # the count changes nothing
    assert len(set(CAPTIONS)) > 0.99 * len(CAPTIONS)
    assert list(embedded.captions(20, 12)) != CAPTIONS[:20]
    failed = Counter(found[0] for caption in CAPTIONS if (found := filters.failed(caption, FilterConfig())))
    assert sum(failed.values()) < 0.06 * len(CAPTIONS), failed
    assert all(embedded.LanguageModel().chat([], None, 0, "judge", {"caption": c}).parsed["drawable"] for c in CAPTIONS)
    judge = embedded.LanguageModel().chat([], None, 0, "judge", {"caption": "The best of all possible worlds"})
    assert judge.parsed == {"drawable": False}


def test_texts_are_not_near_duplicates_and_pass_the_filters():
    kept, failed = [], 0
    for number in range(90):
        data, pairs = sample("conv_long", number)
        failed += filters.failed(data["descriptions"][0], FilterConfig()) is not None
        words = " ".join([*data["descriptions"], *(p["question"] + " " + p["answer"] for p in pairs)]).lower().split()
        kept.append(set(zip(words, words[1:], words[2:])))
    assert failed < 5
    alike = [len(a & b) / len(a | b) for a, b in itertools.combinations(kept, 2)]
    assert max(alike) < 0.5 and np.mean(alike) < 0.2


def test_statements_are_one_for_each_pair_and_say_the_answer():
    for kind in ("conv_short", "contrast_short", "multi_choice"):
        data, pairs = sample(kind, 5, Liar(0.5))
        reply = embedded.LanguageModel().chat([], None, 5, "statement", data | {"pairs": pairs})
        statements = KINDS[kind].ask and reply.parsed["statements"]
        assert len(statements) == len(pairs)
        for pair, statement in zip(pairs, statements):
            if pair["answer"] not in ("yes", "no", "both images", "neither image", "zero", "one"):
                assert pair["answer"].split()[-1].lower() in statement.lower(), (pair, statement)


def test_a_foreign_description_is_drawn_or_refused():
    painter = embedded.ImageGenerator()
    data = {"descriptions": ["A red ball to the left of a green tree in a park."], "state": None, "index": 0}
    image = painter.draw(data["descriptions"][0], (128, 96), 1, data)
    assert image.size == (128, 96)
    for description in ("Sunset.", "Seven cats.", "A mug hovers above an apple."):
        with pytest.raises(Unusable) as raised:
            painter.draw(description, (64, 64), 1, {"descriptions": [description], "index": 0})
        assert raised.value.reason == "not_drawable"
    with pytest.raises(Unusable, match="scene graph"):
        painter.draw("", (64, 64), 1, {"descriptions": [""], "index": 0, "state": {"scenes": [{"version": 3}]}})


def test_nothing_depends_on_process_order_or_hash_seed():
    code = (
        "import hashlib, json\n"
        "from fusion_jax.synth.backends import embedded as e\n"
        "m, p, said = e.LanguageModel(), e.ImageGenerator(), []\n"
        "for n, kind in reversed(list(enumerate(['conv_long', 'contrast_short', 'text_qa', 'caption_text']))):\n"
        "    c = list(e.captions(n + 1, 11))[n]\n"
        "    r = m.chat([], None, n, 'describe', {'kind': kind, 'caption': c})\n"
        "    d = {'kind': kind, 'caption': c, 'state': r.state, 'descriptions': [''], 'index': 0}\n"
        "    q = '' if kind.startswith('caption') else m.chat([], None, n, 'qa', d).text\n"
        "    said.append(r.text + q + hashlib.sha256(p.draw('', (96, 96), n, d).tobytes()).hexdigest())\n"
        "print(json.dumps(sorted(said)))\n"
    )
    outputs = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in json.loads(outputs[0])]
    assert len(set(digests)) == 4


def test_a_caption_without_writing_in_it_ends_nothing():
    """The embedded backend could make no caption about writing of some captions, and said so in a traceback."""
    rng = graph.generator(1)
    for number in range(20):
        scene = compose.settle(compose.random_draft(rng, 1 + number % 3, 0), rng)
        assert (
            write.text_caption(dataclasses.replace(scene, groups=[g for g in scene.groups if not g.text]), rng) is None
        )
