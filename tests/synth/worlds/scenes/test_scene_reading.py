"""What is kept of a caption: word by word, for captions of all sorts."""

import pytest

from fusion_jax.synth.backends import embedded
from fusion_jax.synth.backends.base import Unusable
from fusion_jax.synth.worlds.scenes import compose, graph, language, reading
from fusion_jax.synth.worlds.scenes.forms import KINDS
from fusion_jax.synth.worlds.scenes.parse import parse


def read(caption: str) -> reading.Reading:
    return reading.read(caption, compose.settle(parse(caption), graph.generator(caption)))


@pytest.mark.parametrize(
    ("caption", "understood", "missed"),
    [
        ("A man with an umbrella at a bus stop", ["umbrella"], ["man", "bus", "stop"]),
        ("A black cat sleeping on a red chair", ["black", "cat", "red", "chair"], ["sleeping", "on"]),
        ("A cat in a box on the beach", ["cat", "box", "beach"], ["in"]),
        ("Two birds over a sandy beach", ["two", "birds", "over", "sandy", "beach"], []),
        ("A cup of apples in front of a lamp", ["cup", "apples", "front", "lamp"], ["of"]),
        ("A cat under a table", ["cat", "table"], ["under"]),
        ('A sign with "OPEN" on it and a cat', ['"OPEN"', "sign", "cat"], []),
        (
            "A man with a red umbrella at the beach",
            ["red", "umbrella", "beach"],
            ["man"],
        ),
        ('A street sign that reads "Main Street" on a pole', ['"Main Street"', "street", "sign"], ["pole"]),
        ("A slice of chocolate cake on a plate", ["cake"], ["slice", "chocolate", "plate"]),
        ("Two cats to the left of a large tree", ["two", "cats", "left", "large", "tree"], []),
        ("Five apples", ["apples"], ["five"]),
        ("a photo of a photo of an apple and an apple", ["apple"], []),
        ("Un chapeau, un hat, deux chats", ["hat"], ["un", "chapeau", "deux", "chats"]),
        ("雪の中の car", ["car"], ["雪の中の"]),
        ("No cats, but a duck", ["duck"], ["cats"]),
    ],
)
def test_words_are_understood_or_missed(caption, understood, missed):
    found = read(caption)
    assert (list(found.understood), list(found.missed)) == (understood, missed)
    assert found.kept_share == round(len(understood) / (len(understood) + len(missed)), 4)


def test_what_is_invented_is_listed():
    scene = graph.scene(
        "beach",
        [
            graph.Group("umbrella", 1, "red", "", "front", "left"),
            graph.Group("bucket", 2, "blue", "small", "front", "right"),
            graph.Group("sign", 1, "white", "", "back", "center", "OPEN"),
        ],
    )
    assert reading.read("A red umbrella at the beach", scene).invented == (
        'a white sign, reading "OPEN"',
        "two small blue buckets",
    )
    assert reading.read("An umbrella, two blue buckets and a sign", scene).invented == (
        'the text "OPEN" on the sign',
        "white for the sign",
        "red for the umbrella",
        "on a sandy beach",
    )


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("a bus stop", []),
        ("bus stops and apple pies", []),
        ("cat food beside a car park", []),
        ("a bus stopping here", ["bus"]),
        ("a cat sits, the car stopped", ["cat", "car"]),
        ("a vase full of flowers", ["vase", "flower"]),
        ("a cat asleep on a chair outside", ["cat", "chair"]),
        ("apple tree", ["tree"]),
        ('a sign that says "bus stop"', ["sign"]),
    ],
)
def test_a_noun_before_another_names_nothing(text, nouns):
    assert [mention.noun for mention in language.mentions(text)] == nouns


def test_every_kind_says_what_it_kept_and_of_its_own_captions_keeps_nearly_all():
    model, shares = embedded.LanguageModel(), []
    for number, caption in enumerate(embedded.captions(60, 31)):
        kind = KINDS[number % 13]
        found = model.chat([], None, number, "describe", {"kind": kind, "caption": caption}).state["reading"]
        assert set(found) == {"understood", "missed", "invented", "kept_share"}
        shares.append(found["kept_share"])
    assert sum(shares) > 0.93 * len(shares) and min(shares) > 0.4


def test_a_description_of_another_model_is_drawn_only_where_enough_is_kept():
    data = {"index": 0, "state": None}
    with pytest.raises(Unusable, match="man"):
        embedded.ImageGenerator().draw("A man with an umbrella waits at a bus stop.", (64, 64), 1, data)
