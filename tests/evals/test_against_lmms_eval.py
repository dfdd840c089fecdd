"""Our rules beside those that an installed lmms-eval ships, on other answers than those whose scores are stored."""

import random
from importlib.metadata import version

import official_scores
import pytest
from nasty_answers import answers

from fusion_jax.evals import chartqa, choices, docvqa, mathvista, mmmu, vqa

pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install -e '.[lmms_eval]'")

SOURCE = f"lmms-eval {version('lmms_eval')}"
WORDS = ["the", "a", "an", "three", "none", "ten", "dont", "it's", "cat", "Red", "so", "is", "answer", "final"]
WORDS += ["answer is", "could be ", "=", ":", "?", ". ", "\n", "\t", "(A)", "B", "C.", "a-b", "x/y", "a - b", "[b]"]
WORDS += ["3", "4.50", "1,000", "1,,2", "1e5", ".5", "5.", "-2", "e.g.", "U.S.A.", "$5.00", "24/7", "couldnt've", "5%"]


def texts(count, seed=0, words=WORDS):
    rng = random.Random(seed)
    for _ in range(count):
        yield rng.choice([" ", "", "  "]).join(rng.choice(words) for _ in range(rng.randint(0, 7)))


@pytest.mark.parametrize("name", official_scores.CASES.get(SOURCE, ()))
def test_scores_of_nasty_answers(name):
    case, said = official_scores.CASES[SOURCE][name], answers(1000, seed=17)
    for question, ours, theirs in zip(case.questions, case.scores(said, ours=True), case.scores(said, ours=False)):
        different = [(a, mine, right) for a, mine, right in zip(said, ours, theirs) if mine != right]
        assert not different, (question.reference, different[:5])


def test_phrases_in_front_of_letters():
    official = pytest.importorskip("lmms_eval.tasks._task_utils.mcq_extract")
    assert set(official._ANSWER_PHRASES) == set(choices._PHRASES)


def test_vqa_normaliser():
    metric = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric")
    official = metric.EvalAIAnswerProcessor()
    for slip, form in vqa._CONTRACTIONS.items():
        assert official.CONTRACTIONS[slip] == form
    lower = {k: v for k, v in official.CONTRACTIONS.items() if k != v and k == k.lower()}
    assert lower == vqa._CONTRACTIONS
    for text in texts(20_000, words=[*WORDS, *lower]):
        assert vqa.normalise(text) == official(text), repr(text)


def test_open_answers_of_mmmu():
    official = pytest.importorskip("lmms_eval.tasks.mmmu.utils")
    for text in texts(10_000):
        theirs = official.parse_open_response(text)
        assert set(map(repr, mmmu.parse_open(text))) == set(map(repr, theirs)), repr(text)
        for reference in ("3", "cat", "a", ["4.5", "1000"]):
            assert mmmu.matches(mmmu.parse_open(text), reference) == official.eval_open(reference, theirs)


def test_relaxed_accuracy():
    official = pytest.importorskip("lmms_eval.tasks.chartqa.utils")
    pool = ["5", "5%", "0.05", "0", "0.0", "4.8", "5.3", "yes", "Yes", "5 %", "%", "-5", "1e3", "1,000", "950", "949"]
    for said in pool:
        for right in pool:
            assert chartqa.relaxed(said, right) == bool(official.relaxed_correctness(said, right)), (said, right)


def test_anls():
    official = pytest.importorskip("lmms_eval.api.metrics")
    rng = random.Random(0)
    for _ in range(5_000):
        said, *right = ("".join(rng.choices("ab C  ", k=rng.randint(0, 9))) for _ in range(rng.randint(2, 4)))
        theirs = official.anls(right, [said])
        theirs = theirs["anls"] if isinstance(theirs, dict) else theirs
        assert docvqa.anls(said, right) == pytest.approx(theirs), (said, right)


def test_extractions_of_mathvista(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "never used")  # a client is made when the module is read
    official = pytest.importorskip("lmms_eval.tasks.mathvista.mathvista_evals").MathVistaEvaluator
    theirs = official.__new__(official)
    options = ["cat", "dog", "bird"]
    for text in [*texts(3_000), "(A)", "B", "E", "3.14159", "-2", "[1, 2]", "(c) dog", "nan", "inf", "", " C "]:
        for kind, answer in (("multi_choice", "text"), ("free", "integer"), ("free", "float"), ("free", "list")):
            about = {"options": options, "question_type": kind, "answer_type": answer, "precision": 2}
            mine = mathvista.normalise(text, about)
            assert mine == theirs.normalize_extracted_answer(text, options, kind, answer, 2), (text, answer)
