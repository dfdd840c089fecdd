"""Provides what several kinds share: checks of limits, requests to judge and verifier, wordings."""

import re
from collections.abc import Callable

from fusion_jax.synth import replies
from fusion_jax.synth.kinds.base import TEXT, Ask, listed, obj
from fusion_jax.synth.replies import Invalid, clean_text, one_line, words

CAPTION_WORDS = 12
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
CAPTION_REQUESTS = (
    "Describe the image briefly.",
    "Write a short caption for this image.",
    "What does the image show?",
    "Give a one-sentence description of the image.",
    "Summarize what you see in a few words.",
)


_LETTERS = 40  # most characters of a word with its punctuation, on average


def limit_words(text: str, low: int, high: int, what: str) -> str:
    """Returns the text. Raises `Invalid` (too_long, too_short) where its number of words is not within low .. high."""
    if len(text) > _LETTERS * (high + 5):
        raise Invalid("too_long", f"{what} has {len(text)} characters, the limit is {high} words")
    count = len(words(text))
    if count > high:
        raise Invalid("too_long", f"{what} has {count} words, the limit is {high}")
    if count < low:
        raise Invalid("too_short", f"{what} has {count} words, at least {low} are needed")
    return text


def caption(value: dict) -> str:
    """The clean caption of an answer: one line, <= 12 words."""
    return limit_words(one_line(value["caption"]), 2, CAPTION_WORDS, "the caption")


def stands_in(part: str, whole: str) -> bool:
    """Whether `whole` contains the words of `part`, next to each other."""
    inner, outer = (" ".join(word.lower() for word in words(text)) for text in (part, whole))
    return bool(inner) and f" {inner} " in f" {outer} "


def drop_article(name: str) -> str:
    return re.sub(r"^(?:a|an|the|one|some)\s+", "", name, flags=re.IGNORECASE)


def only_caption(text: str) -> dict | None:
    """Reads prose in place of a caption's JSON: its first line is the caption."""
    line = replies.prose(text).split("\n", 1)[0]
    return {"caption": line} if line and len(line) <= _LETTERS * (CAPTION_WORDS + 5) else None


def only_description(text: str) -> dict | None:
    """Reads prose in place of a description's JSON."""
    description = replies.prose(text)
    return {"description": description} if description else None


def only_pairs(text: str) -> dict | None:
    """Reads prose in place of the JSON of questions and answers."""
    pairs = replies.pairs_from_prose(text)
    return {"pairs": pairs} if pairs else None


def caption_turns(pairs: list[dict], number: int) -> list[tuple[str, str]]:
    return [(CAPTION_REQUESTS[number % len(CAPTION_REQUESTS)], pairs[0]["answer"])]


def plain_turns(pairs: list[dict], number: int) -> list[tuple[str, str]]:
    del number
    return [(pair["question"], pair["answer"]) for pair in pairs]


def short_turns(pairs: list[dict], number: int) -> list[tuple[str, str]]:
    """Like `plain_turns`, but the first question requests short answers."""
    turns = plain_turns(pairs, number)
    return [(f"{turns[0][0]}\nAnswer with a single word or phrase.", turns[0][1]), *turns[1:]]


def check_description(value: dict, data: dict) -> dict:
    """Checks that a description has 20 to 260 words; the papers have no limit for descriptions in general."""
    del data
    return {"description": limit_words(clean_text(value["description"]), 20, 260, "the description")}


def check_pairs(most: int, answer_words: tuple[int, int]) -> Callable[[dict, dict], dict]:
    """Keeps the first `most` pairs that are complete, different and within the limits. Raises Invalid if none is."""

    def check(value: dict, data: dict) -> dict:
        del data
        kept: list[dict] = []
        seen: set[str] = set()
        reasons: list[Invalid] = []
        for pair in value["pairs"]:
            try:
                question, answer = one_line(pair["question"]), clean_text(pair["answer"])
                limit_words(question, 2, 60, "a question")
                limit_words(answer, *answer_words, "an answer")
            except Invalid as e:
                reasons.append(e)
                continue
            if question.lower() not in seen:
                seen.add(question.lower())
                kept.append({"question": question, "answer": answer})
        if not kept:
            raise reasons[0] if reasons else Invalid("no_pairs", "there is no question")
        return {"pairs": kept[:most]}

    return check


def questions(instructions: str, most: int, answer_words: tuple[int, int]) -> Ask:
    """The request for questions and answers about descriptions.

    Args:
      instructions: the prompt. most: most pairs to keep. answer_words: fewest and most words of an answer.
    """
    return Ask(
        instructions=instructions,
        form='{"pairs": [{"question": "...", "answer": "..."}, ...]}',
        schema=obj(pairs=listed(obj(question=TEXT, answer=TEXT))),
        check=check_pairs(most, answer_words),
        prose=only_pairs,
        shows=("descriptions",),
    )


DESCRIBE = Ask(
    instructions=(
        "You turn a short caption into the description of one picture for an image generator. Write one paragraph of "
        "60 to 180 words. Say what is in the picture and where: the objects, how many of each, their colours, sizes, "
        "materials and positions to each other, then the background, the light and the style. Stay with what the "
        "caption allows and be concrete. Only describe what the eye can see: no names of living people, no sounds, "
        "smells, thoughts, stories or brands. Do not ask for written text in the picture."
    ),
    form='{"description": "..."}',
    schema=obj(description=TEXT),
    check=check_description,
    prose=only_description,
)

# The part of every prompt for questions that states what answers may be based on.
GROUNDED = (
    "The person who answers sees only the picture, never the description: do not mention a description, and do not ask "
    "about anything that the picture could not show. Ask only about what is clearly there, or clearly not there. Every "
    "answer must be certain from the description. Ask about different things: what there is, how many, colours, "
    "positions, actions, materials, the surroundings."
)

JUDGE_FORM = '{"drawable": true}'


def _check_judge(value: dict, data: dict) -> dict:
    del data
    return value


def _yes_or_no(key: str) -> Callable[[str], dict | None]:
    def read(text: str) -> dict | None:
        match = re.match(r"\W*(yes|no|true|false|correct|incorrect|wrong)\b", replies.prose(text), re.IGNORECASE)
        return {key: match[1].lower() in ("yes", "true", "correct")} if match else None

    return read


JUDGE = Ask(
    instructions=(
        "You decide whether a caption can drive an image generator. It can if it names things that can be seen and "
        "leaves one clear picture in the mind. It cannot if it is an advertisement, a title, a list of key words, a "
        "file name, an abstract thought or a fragment, if it depends on knowing a certain person, place or event, or "
        "if the picture would be sexual, violent or hateful."
    ),
    form=JUDGE_FORM,
    schema=obj(drawable={"type": "boolean"}),
    check=_check_judge,
    prose=_yes_or_no("drawable"),
)

VERIFY = Ask(
    instructions=(
        "You check answers about pictures. Look at the picture, or at the left and the right picture if there are two, "
        "read the question and the answer, and decide whether the answer is right by what can be seen. If any part of "
        "the answer is wrong or cannot be seen, it is not right."
    ),
    form='{"correct": true}',
    schema=obj(correct={"type": "boolean"}),
    check=_check_judge,
    prose=_yes_or_no("correct"),
    shows=("question", "answer"),
)


def _check_statements(value: dict, data: dict) -> dict:
    statements = [one_line(text) for text in value["statements"]]
    if len(statements) != len(data["pairs"]):
        raise Invalid("wrong_count", f"{len(statements)} statements for {len(data['pairs'])} questions")
    return {"statements": statements}


STATEMENT = Ask(
    instructions=(
        "You turn each question with its answer into one plain statement about a picture, as it would be if the answer "
        "is right. Keep the order. At most 40 words each; shorten long answers to what can be seen."
    ),
    form='{"statements": ["...", ...]}',
    schema=obj(statements=listed(TEXT)),
    check=_check_statements,
    shows=("pairs",),
)
