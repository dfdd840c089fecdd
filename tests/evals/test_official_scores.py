"""Our scores of 1,000 nasty answers beside those of official scorers, which official_scores.py has written down."""

import json

import official_scores
import pytest

STORED = json.loads(official_scores.FILE.read_text("utf-8"))
EVERY = [(source, name) for source, cases in official_scores.CASES.items() for name in cases]


@pytest.mark.parametrize(("source", "name"), EVERY)
def test_scores_are_the_official_ones(source, name):
    case, said = official_scores.CASES[source][name], STORED["answers"]
    official = [official_scores.unpacked(scores, len(said)) for scores in STORED["scores"][source][name]]
    assert any(map(any, official)), "no answer is right"
    for question, ours, theirs in zip(case.questions, case.scores(said, ours=True), official, strict=True):
        different = [(a, mine, right) for a, mine, right in zip(said, ours, theirs, strict=True) if mine != right]
        assert not different, (question.reference, different[:5])


def test_the_answers_are_many_and_of_all_kinds():
    said = STORED["answers"]
    assert len(said) == official_scores.COUNT and len(set(said)) > 600
    for mark in ("", "’", "1,,2", "(B)", "B.", "12%", "答案", "Sorry, I can't"):
        assert any(mark in a for a in said), mark
