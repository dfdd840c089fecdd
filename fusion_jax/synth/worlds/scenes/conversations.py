"""Writes questions and answers of every kind about one scene, or about a left and a right one."""

import random

from fusion_jax.synth.backends.base import Unusable
from fusion_jax.synth.worlds.scenes import contrast, facts, reason, write
from fusion_jax.synth.worlds.scenes.facts import Fact
from fusion_jax.synth.worlds.scenes.forms import CONTRAST_KINDS, likeness
from fusion_jax.synth.worlds.scenes.graph import Scene


def ask(kind: str, schema: dict | None, scenes: list[Scene], rng: random.Random) -> list[dict]:
    """The pairs that a kind requests, each with its "topic" where it is about a single fact.

    Raises:
      Unusable: the kind's pairs have a form that this world does not write.
    """
    known = likeness(kind, "qa", schema)
    if len(scenes) == 2 and known not in CONTRAST_KINDS:
        known = "contrast_long" if rng.random() < 0.5 else "contrast_short"
    elif known != kind and known == "conv_short" and rng.random() < 0.5:
        known = "conv_long"  # only the kind's check knows which length it wants, so the next attempt may use the other
    if known in CONTRAST_KINDS:
        return _about_both(known, scenes, rng)
    (scene,) = scenes
    if known == "reasoning":
        return [{"question": q, "answer": a} for q, a in reason.answers(scene, rng, rng.randint(1, 4))]
    if known == "multi_choice":
        return _multiple_choice(scene, rng)
    if known == "text_qa":
        chosen = facts.choose(scene, rng, rng.randint(2, 5), ("text",))
        return [_pair(fact, fact.short if rng.random() < 0.5 else fact.sentence, rng) for fact in chosen]
    if known == "conv_short":
        return [_pair(fact, fact.short, rng) for fact in facts.choose(scene, rng, rng.randint(4, 8))]
    if known == "conv_long":
        return _at_length(scene, rng)
    raise Unusable("no_such_kind", f"the embedded backend asks nothing about pictures of kind {known!r}")


def _pair(fact: Fact, answer: str, rng: random.Random) -> dict:
    return {"question": rng.choice(fact.questions), "answer": answer, "topic": fact.topic}


def _multiple_choice(scene: Scene, rng: random.Random) -> list[dict]:
    topics = tuple(topic for topic in facts.TOPICS if topic not in ("exists", "absent"))
    pairs = []
    for fact in facts.choose(scene, rng, rng.randint(4, 8), topics):
        wrong = rng.sample(fact.wrong, min(3, len(fact.wrong)))
        options = [fact.short, *wrong]
        rng.shuffle(options)
        pairs.append(_pair(fact, fact.short, rng) | {"options": options})
    return pairs


def _at_length(scene: Scene, rng: random.Random) -> list[dict]:
    pairs = []
    for fact in facts.choose(scene, rng, rng.randint(3, 8)):
        more = facts.details(scene, fact, rng)
        least = 1 if write.count_words(fact.sentence) < 5 else 0
        pairs.append(_pair(fact, " ".join([fact.sentence, *more[: rng.randint(least, 2)]]), rng))
    return pairs


def _about_both(kind: str, scenes: list[Scene], rng: random.Random) -> list[dict]:
    pairs = []
    for fact in contrast.choose(*scenes, rng, rng.randint(3, 7)):
        answer = fact.short
        if kind == "contrast_long":
            more = [s for side, scene in zip(contrast.SIDES, scenes) for s in contrast.details(scene, side, fact)]
            answer = " ".join([fact.sentence, *more[: rng.randint(0, 2)]])
        pairs.append(_pair(fact, answer, rng))
    return pairs


def statement(pair: dict, scenes: list[Scene]) -> str:
    """Joins a question and its answer into one statement, whether the answer is right or not."""
    question, answer = pair["question"].split("\n")[0], pair["answer"]
    known = facts.by_question(scenes[0]) if len(scenes) == 1 else contrast.by_question(*scenes)
    fact = known.get(question.lower())
    if fact is not None and answer == fact.short:
        return fact.sentence
    if write.count_words(answer) >= 5 and answer.endswith("."):
        return " ".join(answer.split()[:40])
    return f'The answer to "{question}" is "{answer}".'
