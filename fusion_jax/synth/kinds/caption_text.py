"""Defines text captions, which state what is written on what."""

import re

from fusion_jax.synth.kinds.base import TEXT, Ask, Kind, listed, obj
from fusion_jax.synth.kinds.common import caption, caption_turns, drop_article, only_caption, stands_in
from fusion_jax.synth.replies import Invalid, one_line, words

_WRITTEN = re.compile(r"[\"“]([^\"“”]+)[\"”]")


def check(value: dict, data: dict) -> dict:
    del data
    text = caption(value)
    if not value["texts"]:
        raise Invalid("no_text", "nothing is written")
    texts = []
    for each in value["texts"]:
        written, carrier = one_line(each["text"]), drop_article(one_line(each["carrier"]))
        if not stands_in(written, text):
            raise Invalid("text_not_in_caption", f"{written!r} is not in the caption")
        if not stands_in(carrier, _WRITTEN.sub(" ", text)):
            raise Invalid("no_carrier", f"what carries {written!r} is not in the caption")
        texts.append({"text": written, "carrier": carrier})
    listed_texts = {tuple(map(str.lower, words(each["text"]))) for each in texts}
    for written in _WRITTEN.findall(text):
        if tuple(map(str.lower, words(written))) not in listed_texts:
            raise Invalid("no_carrier", f"the caption does not say what carries {written!r}")
    return {"caption": text, "texts": texts}


def prose(text: str) -> dict | None:
    """A carrier is the noun before the quotation, or the one after "on"."""
    answer = only_caption(text)
    if not answer:
        return None
    texts = []
    for match in _WRITTEN.finditer(answer["caption"]):
        before = re.sub(
            r"\b(?:saying|reading|reads?|says|with|that|the|words?|text|labell?ed|written)\b",
            " ",
            answer["caption"][: match.start()],
            flags=re.IGNORECASE,
        )
        behind = re.match(
            r"\s*(?:written |painted |printed )?on (?:an?|the) ([\w-]+(?: [\w-]+)?)", answer["caption"][match.end() :]
        )
        nouns = words(_WRITTEN.sub(" ", before))
        carrier = behind[1].split()[-1] if behind else nouns[-1] if nouns else None
        if carrier:
            texts.append({"text": match[1], "carrier": carrier})
    return answer | {"texts": texts}


KIND = Kind(
    name="caption_text",
    stage="stage1",
    describe=Ask(
        instructions=(
            "You rewrite a caption for a picture in which something is written. Choose one or two things of the "
            "caption, or things that fit it, that carry writing, such as a sign, a book, a shirt or a cup, and say "
            "what is written on each, in double quotation marks. Short, plain words are drawn best. At most 12 words "
            "with what is written. List each written text with the thing that carries it, as they stand in your "
            "caption."
        ),
        form='{"caption": "...", "texts": [{"text": "...", "carrier": "..."}, ...]}',
        schema=obj(caption=TEXT, texts=listed(obj(text=TEXT, carrier=TEXT))),
        check=check,
        prose=prose,
    ),
    descriptions=lambda answer: [answer["caption"]],
    ask=None,
    turns=caption_turns,
)
