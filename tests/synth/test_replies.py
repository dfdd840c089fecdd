"""What models say becomes clean values, or a reason why not."""

import pytest

from fusion_jax.synth.replies import Invalid, clean_text, find_json, one_line, pairs_from_prose, prose, refuses


@pytest.mark.parametrize(
    ("said", "clean"),
    [
        ("<b>A red</b> kite &amp; a dog", "A red kite & a dog"),
        ("x < 5 and y > 3", "x < 5 and y > 3"),
        ("<script>alert(1)</script>A cat", "A cat"),
        ("<scr<b></b>ipt>alert(1)</scr<b></b>ipt>A cat", "alert(1) A cat"),
        ("&lt;img src=x onerror=alert(1)&gt; cat", "cat"),
        ("<image>\nTwo cats.<|end|>", "Two cats."),
        ("[INST] hello [/INST]", "hello"),
        ("tab\there\x00nul\x1b[31m", "tab here nul [31m"),
        ("zero\u200bwidth \u202eright to left", "zerowidth right to left"),
        ("line one\r\n\r\n  line   two ", "line one\nline two"),
        ("**Bold** and __more__", "Bold and more"),
        ("half \ud83d a pair", "half a pair"),
        ("naïve 图 🐱", "naïve 图 🐱"),
    ],
)
def test_clean_text(said, clean):
    assert clean_text(said) == clean
    assert clean_text(clean) == clean


@pytest.mark.parametrize("said", ["", " \n\t", "<b></b>", "\u200b", None, 5, ["a"]])
def test_nothing_left(said):
    with pytest.raises(Invalid):
        clean_text(said)


def test_one_line():
    assert one_line('"A cat\non a mat"') == "A cat on a mat"
    assert one_line('"Open" and "shut"') == '"Open" and "shut"'


@pytest.mark.parametrize(
    "said",
    [
        '{"a": 1}',
        'Sure!\n```json\n{"a": 1}\n```\nDone {"b": 2}',
        '<think>maybe {"a": 0}?</think>{"a": 1}',
        'Here it is: {"a": 1}',
        '{broken {"a": 1}',
    ],
)
def test_find_json(said):
    assert find_json(said) == {"a": 1}


@pytest.mark.parametrize("said", ["", "no object", '{"a": ', "[1, 2]", "{" * 100_000])
def test_no_json(said):
    assert find_json(said) is None


@pytest.mark.parametrize(
    "said",
    [
        "A red kite.",
        "Sure! Here is the caption: A red kite.",
        "Certainly, here's a description of the picture:\n\nA red kite.",
        "**Caption:** A red kite.",
        "<thinking>hm</thinking>\nA red kite.",
        "```\nA red kite.\n```",
    ],
)
def test_prose(said):
    assert prose(said) == "A red kite."


def test_pairs_from_prose():
    said = """Here are the questions:

    1. **Q:** Where is the cat?
    **A:** On the mat.

    2. Question: What colour is it?
    A) red
    B) grey
    Answer: B

    Q3: How many?
    A3: Two,
    of which one sleeps."""
    assert pairs_from_prose(said) == [
        {"question": "Where is the cat?", "answer": "On the mat."},
        {"question": "What colour is it?", "options": ["red", "grey"], "answer": "grey"},
        {"question": "How many?", "answer": "Two,\nof which one sleeps."},
    ]
    assert pairs_from_prose("Nothing of the kind.") == []


@pytest.mark.parametrize(
    ("said", "is_one"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with this request.", True),
        ("Sorry, I can't do that.", True),
        ("As an AI language model, I ...", True),
        ("A sorry sight: I cannot see the sign's end.", False),
        ("I can see a cat.", False),
    ],
)
def test_refuses(said, is_one):
    assert refuses(said) is is_one
