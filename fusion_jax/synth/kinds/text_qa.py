"""Defines questions about written text: a description with at most three texts, at most five pairs."""

import re

from fusion_jax.synth import replies
from fusion_jax.synth.kinds.base import TEXT, Ask, Kind, listed, obj
from fusion_jax.synth.kinds.common import limit_words, plain_turns, questions, stands_in
from fusion_jax.synth.replies import Invalid, clean_text, one_line

DESCRIPTION_WORDS = (110, 150)
TEXTS, TEXT_WORDS = 3, 12
MOST, ANSWER_WORDS = 5, (1, 80)
_WRITTEN = re.compile(r"[\"“]([^\"“”]+)[\"”]")


def check(value: dict, data: dict) -> dict:
    del data
    description = limit_words(clean_text(value["description"]), *DESCRIPTION_WORDS, "the description")
    texts = list(dict.fromkeys(one_line(text) for text in value["texts"]))
    for text in texts:  # checked before each text is searched for in the others, which is slow for long texts
        limit_words(text, 1, TEXT_WORDS, "a written text")
    quoted = [one_line(text) for text in _WRITTEN.findall(description)]
    texts += [text for text in quoted if not any(stands_in(text, known) for known in texts)]  # unlisted texts
    if not texts:
        raise Invalid("no_text", "nothing is written")
    if len(texts) > TEXTS:
        raise Invalid("too_many_texts", f"{len(texts)} written texts, the limit is {TEXTS}")
    for text in texts:
        limit_words(text, 1, TEXT_WORDS, "a written text")
        if not stands_in(text, description):
            raise Invalid("text_not_in_description", f"{text!r} is not in the description")
    return {"description": description, "texts": texts}


def prose(text: str) -> dict | None:
    description = replies.prose(text)
    return {"description": description, "texts": _WRITTEN.findall(description)} if description else None


KIND = Kind(
    name="text_qa",
    stage="stage1_5",
    describe=Ask(
        instructions=(
            "You turn a short caption into the description of one picture with writing in it, for an image generator. "
            "Write one paragraph of 110 to 150 words. Between one and three things carry writing, such as signs, "
            "labels, screens or covers; give the exact words of each in double quotation marks, at most 12 words, and "
            "say what carries it, where, in what style and colour. Describe the rest of the picture as well. Nothing "
            "else may stand in quotation marks. List the written texts."
        ),
        form='{"description": "...", "texts": ["...", ...]}',
        schema=obj(description=TEXT, texts=listed(TEXT)),
        check=check,
        prose=prose,
    ),
    ask=questions(
        "You write questions about the writing in a picture that you know from its description: 2 to 5 of them. "
        "Ask what is written, on what, where, in which colour or style, and what follows from it. Answers quote "
        "the writing exactly. The person who answers sees only the picture, never the description: do not mention "
        "a description. Ask only about what is clearly there, or clearly not there.",
        most=MOST,
        answer_words=ANSWER_WORDS,
    ),
    turns=plain_turns,
)
