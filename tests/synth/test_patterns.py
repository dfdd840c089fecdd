"""Regular expressions that read what models say take time in proportion to it."""

import json
import re

import pytest
from helpers.cpu_time import takes_less_than
from helpers.slow_patterns import Used, grows, used

import fusion_jax.evals
import fusion_jax.synth
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.kinds.common import JUDGE
from fusion_jax.synth.replies import Invalid, find_json, prose


@pytest.mark.parametrize("package", [fusion_jax.synth, fusion_jax.evals])
def test_every_pattern_takes_linear_time(package):
    patterns = used(package)
    assert len(patterns) >= 20
    assert {one.where: said for one in patterns if (said := grows(one)) is not None} == {}


@pytest.mark.parametrize(
    "pattern",
    [
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"\bmore\b.*\bthan\b",
        r'The answer is "(.*)"\.',
    ],
)
def test_patterns_that_do_not_are_noticed(pattern):
    assert grows(Used("here", re.compile(pattern), "finditer")) is not None


@pytest.mark.parametrize(
    "text",
    [
        "```" + "a" * 197_000,
        "```\n" * 50_000,
        "[0," * 900 + "0," * 98_000,
        '["a",' * 900 + '"' + "b" * 195_000,
        "[" + "[[]]," * 39_000,
        ('[{"a":' * 70 + "]" * 3) * 470,
    ],
)
def test_looking_for_json_ends_soon(text):
    with takes_less_than(2):
        find_json(text)
        prose(text)
        for ask in (JUDGE, KINDS["caption_scene"].describe):
            with pytest.raises(Invalid):
                ask.read(text, None, {"caption": "x"})


def test_json_behind_many_brackets_is_still_found():
    assert find_json("[1] [2] (see [3, 4]) [[" * 50 + '{"a": 1}') == {"a": 1}
    assert find_json("`" * 30 + 'json-5\n{"a": 1}\n```') == {"a": 1}


def test_written_texts_of_a_description_are_counted_before_they_are_compared():
    said = {"description": '"." ' * 1400 + "wide " * 120, "texts": ["a " * 95_000, "b"]}
    with takes_less_than(2), pytest.raises(Invalid, match="a written text has"):
        KINDS["text_qa"].describe.read(json.dumps(said), None, {})
