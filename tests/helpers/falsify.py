"""Wrong answers, for tests of verification: false by the scene graph, and otherwise like right ones."""

import dataclasses
import json
import random
import re
from collections.abc import Sequence

from fusion_jax.synth.backends import embedded
from fusion_jax.synth.backends.base import Reply
from fusion_jax.synth.worlds.scenes import contrast, facts, graph, language
from fusion_jax.synth.worlds.scenes.graph import Scene
from fusion_jax.synth.worlds.scenes.lexicon import COLOUR_WORDS, NOUNS, NUMBERS
from fusion_jax.synth.worlds.scenes.world import scenes_of


def planted(seed: int, number: int, share: float) -> bool:
    """Whether the pair of this number in the `qa` reply to this seed is to be made wrong."""
    return graph.generator(seed, "planted", number).random() < share


class Liar(embedded.LanguageModel):
    """The embedded language model with a share of wrong answers."""

    def __init__(self, wrong_share: float):
        super().__init__()
        self.wrong_share = wrong_share

    def chat(self, messages: list[dict], schema: dict | None, seed: int, purpose: str, data: dict) -> Reply:
        reply = super().chat(messages, schema, seed, purpose, data)
        if purpose != "qa":
            return reply
        scenes = scenes_of(data)
        for number, pair in enumerate(reply.parsed["pairs"]):
            if planted(seed, number, self.wrong_share):
                wrong = falsify(pair["question"], pair["answer"], scenes, graph.generator(seed, "false", number))
                if wrong is None:
                    continue
                if "options" in pair and wrong not in pair["options"]:
                    wrong = next(option for option in pair["options"] if option != pair["answer"])
                pair["answer"] = wrong
        return dataclasses.replace(reply, text=json.dumps(reply.parsed, ensure_ascii=False))


def falsify(question: str, answer: str, scenes: Sequence[Scene], rng: random.Random) -> str | None:
    """A wrong answer in the place of a right one, or None where none can be made.

    A question that `facts.py` or `contrast.py` knows gets another answer of the same sort. In any other answer one
    claim is replaced: by a colour, a noun or a number that the scenes do not have.
    """
    known = facts.by_question(scenes[0]) if len(scenes) == 1 else contrast.by_question(*scenes)
    fact = known.get(question.split("\n")[0].strip().lower())
    if fact is not None and fact.wrong:
        wrong = rng.choice(fact.wrong)
        if answer.strip().lower() == fact.short.lower():
            return wrong
        if fact.short in ("yes", "no"):
            return answer.replace(fact.short.capitalize(), wrong.capitalize(), 1)
        replaced = re.sub(
            rf"(?<!\w){re.escape(fact.short)}(?!\w)", wrong.replace("\\", ""), answer, flags=re.IGNORECASE
        )
        if replaced != answer:
            return replaced
    return _turned(answer, scenes, rng)


def _turned(answer: str, scenes: Sequence[Scene], rng: random.Random) -> str | None:
    """The answer with one thing in it replaced by one that is in no picture."""
    listed = [m for m in _placed_mentions(answer) if not m[1].negated]
    rng.shuffle(listed)
    hidden = {noun for made in scenes for noun in made.place.shows}
    for start, mention in listed:
        phrase = answer[start + mention.start : start + mention.end]
        if mention.noun in hidden:
            continue
        if mention.colour:
            free = [c for c in COLOUR_WORDS if all(not made.count(mention.noun, COLOUR_WORDS[c]) for made in scenes)]
            turned = re.sub(r"\b(" + "|".join(COLOUR_WORDS) + r")\b", rng.choice(free), phrase, count=1)
        elif mention.count and mention.count > 1:
            there = {made.count(mention.noun) for made in scenes}
            free = [n for n in range(2, 6) if n not in there]
            turned = phrase.replace(NUMBERS[mention.count], NUMBERS[rng.choice(free)], 1)
        else:
            absent = [n for n in graph.absent_nouns(scenes[0]) if all(not made.count(n) for made in scenes)]
            noun = NOUNS[rng.choice([n for n in absent if n not in hidden])]
            turned = re.sub(r"(?<![\w-])[\w-]++$", noun.plural if mention.plural else noun.name, phrase)
        if turned != phrase:
            return answer[: start + mention.start] + turned + answer[start + mention.end :]
    return None


def _placed_mentions(answer: str) -> list[tuple[int, language.Mention]]:
    """The mentions of a text, each with where its sentence begins."""
    found, position = [], 0
    for sentence in language.sentences(answer):
        start = answer.index(sentence, position)
        position = start + len(sentence)
        found += [(start, mention) for mention in language.mentions(sentence)]
    return found
