"""Defines count captions, which state how many things there are: at most three of a kind, six in all."""

from fusion_jax.synth.kinds.base import NUMBER, TEXT, Ask, Kind, listed, obj
from fusion_jax.synth.kinds.common import NUMBERS, caption, caption_turns, drop_article, only_caption, stands_in
from fusion_jax.synth.replies import Invalid, one_line, words

EACH, IN_ALL = 3, 6


def _number(word: str) -> int | None:
    """The number that a word means, or None. Python reads at most 4300 digits, and no caption counts to a million."""
    if word.lower() in NUMBERS:
        return NUMBERS.index(word.lower())
    return int(word[:7]) if word.isdecimal() else None


def _numbers(text: str) -> list[int]:
    """The numbers a text names, in words or digits."""
    return [number for word in words(text) if (number := _number(word)) is not None]


def check(value: dict, data: dict) -> dict:
    del data
    text = caption(value)
    objects = [{"name": drop_article(one_line(each["name"])), "count": int(each["count"])} for each in value["objects"]]
    if not objects:
        raise Invalid("no_object", "nothing is counted")
    names = [each["name"].lower() for each in objects]
    if len(set(names)) < len(names):
        raise Invalid("object_twice", "an object is counted twice")
    for each in objects:
        if not stands_in(each["name"], text):
            raise Invalid("object_not_in_caption", f"{each['name']!r} is not in the caption")
        if not 1 <= each["count"] <= EACH:
            raise Invalid("too_many_objects", f"{each['count']} of a kind, the limit is {EACH}")
    if sum(each["count"] for each in objects) > IN_ALL:
        raise Invalid("too_many_objects", f"more than {IN_ALL} objects in all")
    # "a", "an" and "the" may mean one; every other number must be in the caption, and the caption has no further ones.
    numbers = _numbers(text)
    counts = [each["count"] for each in objects]
    several, counted = (sorted(n for n in each if n != 1) for each in (numbers, counts))
    if several != counted or numbers.count(1) > counts.count(1):
        raise Invalid("counts_differ", "the caption's numbers are not those of the list")
    return {"caption": text, "objects": objects}


def prose(text: str) -> dict | None:
    """Each number word counts the word after it, or the one after that where adjectives come between."""
    answer = only_caption(text)
    if not answer:
        return None
    caption_words = words(answer["caption"])
    objects = []
    for i, word in enumerate(caption_words[:-1]):
        if (count := _number(word)) is not None:
            objects.append({"name": caption_words[i + 1], "count": count})
    return answer | {"objects": objects}


KIND = Kind(
    name="caption_count",
    stage="stage1",
    describe=Ask(
        instructions=(
            "You rewrite a caption for a picture so that it counts things. Choose one to three kinds of things that "
            "stand apart from each other and say in words how many of each there are: at most 3 of a kind, at most 6 "
            "in all. At most 12 words. List each thing as it stands in your caption, with its number."
        ),
        form='{"caption": "...", "objects": [{"name": "...", "count": 2}, ...]}',
        schema=obj(caption=TEXT, objects=listed(obj(name=TEXT, count=NUMBER))),
        check=check,
        prose=prose,
    ),
    descriptions=lambda answer: [answer["caption"]],
    ask=None,
    turns=caption_turns,
)
