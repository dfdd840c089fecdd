"""Defines multiple choice questions, at most eight per picture; the engine shuffles the options."""

import random

from fusion_jax.synth.kinds.base import TEXT, Ask, Kind, listed, obj
from fusion_jax.synth.kinds.common import DESCRIBE, GROUNDED, limit_words, only_pairs
from fusion_jax.synth.replies import Invalid, one_line, words

MOST = 8
OPTIONS = (2, 4)
LETTERS = "ABCD"


def _check_pair(pair: dict) -> dict:
    question = limit_words(one_line(pair["question"]), 2, 60, "a question")
    options = [_bare(one_line(option)) for option in pair["options"]]
    if not OPTIONS[0] <= len(options) <= OPTIONS[1]:
        raise Invalid("wrong_options", f"{len(options)} options, {OPTIONS[0]} to {OPTIONS[1]} are needed")
    if len({option.lower() for option in options}) < len(options):
        raise Invalid("wrong_options", "two options are the same")
    answer = one_line(pair["answer"])
    same = [option for option in options if option.lower() == _bare(answer).lower()]
    letter = words(answer)[0].upper() if words(answer) else ""
    if not same and len(letter) == 1 and letter in LETTERS[: len(options)]:  # the option's letter instead of its text
        same = [options[LETTERS.index(letter)]]
    if not same:
        raise Invalid("answer_not_an_option", "the answer is none of the options")
    return {"question": question, "options": options, "answer": same[0]}


def _bare(option: str) -> str:
    """An option without its letter: "B. red" and "(b) red" are "red"."""
    head, _, rest = option.partition(" ")
    return rest.strip() if rest and head.strip("().:").upper() in tuple(LETTERS) and head[-1] in ").:" else option


def check(value: dict, data: dict) -> dict:
    del data
    kept: list[dict] = []
    reasons: list[Invalid] = []
    for pair in value["pairs"]:
        try:
            checked = _check_pair(pair)
        except Invalid as e:
            reasons.append(e)
            continue
        if checked["question"].lower() not in {one["question"].lower() for one in kept}:
            kept.append(checked)
    if not kept:
        raise reasons[0] if reasons else Invalid("no_pairs", "there is no question")
    return {"pairs": kept[:MOST]}


def prose(text: str) -> dict | None:
    answer = only_pairs(text)
    pairs = [pair for pair in answer["pairs"] if "options" in pair] if answer else []
    return {"pairs": pairs} if pairs else None


def turns(pairs: list[dict], number: int) -> list[tuple[str, str]]:
    """Shuffles the options for each sample, because models often put the right one at the same place."""
    rounds = []
    for k, pair in enumerate(pairs):
        options = list(pair["options"])
        random.Random(f"{number}/{k}").shuffle(options)
        lines = [f"{LETTERS[i]}. {option}" for i, option in enumerate(options)]
        question = "\n".join([pair["question"], *lines, "Answer with the letter of the right option."])
        rounds.append((question, LETTERS[options.index(pair["answer"])]))
    return rounds


KIND = Kind(
    name="multi_choice",
    stage="stage1_5",
    describe=DESCRIBE,
    ask=Ask(
        instructions=(
            "You write multiple choice questions about a picture that you know from its description. Write 4 to 8, "
            "each with four options of which exactly one is right. The wrong ones must be of the same sort as the "
            "right one, about equally long, and clearly wrong for this picture. Options carry no letters; the answer "
            "repeats the right option word for word. " + GROUNDED
        ),
        form='{"pairs": [{"question": "...", "options": ["...", "...", "...", "..."], "answer": "..."}, ...]}',
        schema=obj(pairs=listed(obj(question=TEXT, options=listed(TEXT), answer=TEXT))),
        check=check,
        prose=prose,
        shows=("descriptions",),
    ),
    turns=turns,
)
