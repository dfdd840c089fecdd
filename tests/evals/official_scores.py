"""What official scorers make of nasty answers.

`python tests/evals/official_scores.py SOURCE` asks the scorers of an installed package and writes what they say into
official_scores.json, which test_official_scores.py compares with ours. SOURCE is one of the keys of CASES:
"lmms-eval 0.7.3" or "lmms-eval 0.3.0" (pip install --no-deps lmms-eval==VERSION and what its modules import), or
"VLMEvalKit" (ms-vlmeval 0.0.20, likewise).
"""

import json
import os
import random
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from nasty_answers import answers

from fusion_jax.evals import (
    ai2d,
    chartqa,
    choices,
    docvqa,
    hallusion,
    mathvista,
    mmbench,
    mme,
    mmmu,
    mmstar,
    ocrbench,
    pope,
    realworldqa,
    scienceqa,
    seed,
    textvqa,
    vizwiz,
)
from fusion_jax.evals.task import Question

FILE = Path(__file__).with_suffix(".json")
COUNT, SEED = 1000, 16
OPTIONS = {"A": "a red bus", "B": "a dog", "C": "the sky", "D": "None"}
FEW = {"A": "leaf", "B": "nan", "D": "0"}
CAR = "Which way?\nA. Left\nB. Turn right\nC. Right\nPlease answer directly with only the letter."


@dataclass(frozen=True)
class Case:
    """One benchmark: our rule, some of its questions, and the official score of an answer to one of them."""

    ours: Callable[[Question, str], tuple[Any, float | None]]
    questions: Sequence[Question]
    theirs: Callable[[Question, str], float]

    def scores(self, said: Sequence[str], ours: bool) -> list[list[float]]:
        """One list for each question, with one score for each answer."""
        rule = (lambda q, a: self.ours(q, a)[1]) if ours else self.theirs
        return [[round(float(rule(q, a)), 4) for a in said] for q in self.questions]


def questions(*references: Any, prompt: str = "", **about: Any) -> list[Question]:
    return [Question(str(n), prompt, right, about=about) for n, right in enumerate(references)]


def _lmms(name: str):
    os.environ.setdefault("OPENAI_API_KEY", "never used")  # some modules make a client when they are read
    return import_module(f"lmms_eval.{name}")


def _utils(name: str):
    return _lmms(f"tasks.{name}.utils")


def _exact(said: str, right: str) -> float:
    metrics = _lmms("api.metrics")
    return metrics.exact_match_hf_evaluate([said], [right], ignore_case=True, ignore_punctuation=True)["exact_match"]


def _ai2d(q: Question, said: str) -> float:
    rule = _utils("ai2d").MultiChoiceRegexFilter(r"([A-Z])\.", 0, ignore_case=True, ignore_punctuation=True)
    return _exact(rule.apply([[said]], [{}])[0].strip(), q.reference)


def _anls(q: Question, said: str) -> float:
    return _lmms("api.metrics").anls(q.reference, [said.strip()])["anls"]


def _mmmu(q: Question, said: str) -> float:
    utils, multiple = _utils("mmmu"), q.about["multiple"]
    kind = "multiple-choice" if multiple else "open"
    doc = {"question_type": kind, "options": str(q.about["options"]), "id": "validation_Art_1", "answer": q.reference}
    with mock.patch.object(random, "choice", random.Random(q.id).choice):  # as ours draws
        parsed = utils.mmmu_process_results(doc, [said.strip()])["mmmu_acc"]["parsed_pred"]
    judge = utils.eval_multi_choice if multiple else utils.eval_open
    return float(judge(q.reference, parsed[0]))


def _realworldqa_before(q: Question, said: str) -> float:
    utils, docs = _utils("realworldqa"), [{"question": q.prompt}]
    said = utils.NumberWordsToDigitsFilter().apply([[said]], docs)
    said = utils.MultiChoiceRegexFilter(r"(\([A-Z]\))", 0, ignore_case=True).apply(said, docs)[0]
    return _exact(said, q.reference)


def _seed(q: Question, said: str) -> float:
    doc = {"answer": q.reference, "data_type": "image", "question_id": "1"}
    utils = _utils("seedbench")
    return utils.seed_aggregation_result([utils.seed_process_result(doc, [said.strip()])["seed_image"]])


def _vqa(name: str) -> Callable[[Question, str], float]:
    def theirs(q: Question, said: str) -> float:
        doc = {"answers": list(q.reference), "question_id": "1"}
        return getattr(_utils(name), f"{name}_process_results")(doc, [said.strip()])["exact_match"]

    return theirs


def _mmbench_static(q: Question, said: str) -> float:
    evaluator = _lmms("tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    options = {x: q.about["options"].get(x) for x in "ABCD"}
    letter = evaluator.prefetch_answer({**options, "prediction": said.strip()})
    extract = _lmms("tasks._task_utils.mcq_extract").extract_mcq_answer
    return float((letter or extract(said.strip(), choices=sorted(q.about["options"]))) == q.reference)


def _mathvista(q: Question, said: str) -> float:
    kind = _lmms("tasks.mathvista.mathvista_evals").MathVistaEvaluator
    evaluator, about = kind.__new__(kind), q.about
    args = (list(about["options"]), about["question_type"], about["answer_type"], about["precision"])
    return evaluator.safe_equal(evaluator.normalize_extracted_answer(said, *args), q.reference)


def _process(name: str, figure: str, doc: Callable[[Question], dict[str, Any]], key: str = ""):
    """A task whose process_results says the score, as `figure` or within it."""

    def theirs(q: Question, said: str) -> float:
        result = getattr(_utils(name), f"{'sqa' if name == 'scienceqa' else name}_process_results")(
            doc(q), [said.strip()]
        )
        return result[figure][key] if key else result[figure]

    return theirs


def _vlmevalkit(name: str):
    """One of its modules, without the packages around it, which import what all its models and benchmarks need."""
    for package in ("vlmeval", *(f"vlmeval.{part}" for part in ("utils", "smp"))):
        if package not in sys.modules:
            bare = types.ModuleType(package)
            bare.__path__ = list(find_spec(package).submodule_search_locations)
            sys.modules[package] = bare
    return import_module(f"vlmeval.{name}")


def _vlmevalkit_choice(q: Question, said: str) -> float:
    return _vlmevalkit("utils.matching_util").can_infer(said, dict(q.about["options"])) == q.reference


def _vlmevalkit_yes(q: Question, said: str) -> float:
    words = _vlmevalkit("smp.misc").process_punctuation(said.lower()).split()
    return {"yes", "no"} & set(words) == {q.reference}


def _letters(by_rule: Callable) -> Callable:
    return lambda q, said: (None, float(by_rule(said, q.about["options"]) == q.reference))


def _mathvista_about(kind: str, answer_type: str) -> dict[str, Any]:
    return {"question_type": kind, "answer_type": answer_type, "precision": 2, "options": [*OPTIONS.values()]}


def _mathvista_normalised(q: Question, said: str) -> tuple[Any, float]:
    return mathvista.scored(q, said)


PEOPLE = [["2"] * 3 + ["two"] * 7, ["Unanswerable"] * 4 + ["don't"] * 6, ["1,000"] * 2 + ["1 2"] * 3 + ["A-B"] * 5]
MATHVISTA = [
    *questions("a dog", **_mathvista_about("multi_choice", "text")),
    *questions("3", "1000", **_mathvista_about("free_form", "integer")),
    *questions("3.14", "0.12", **_mathvista_about("free_form", "float")),
    *questions("[1, 2]", **_mathvista_about("free_form", "list")),
]
BY_TEXTS = [*questions("A", "B", "D", options=OPTIONS), *questions("B", options=FEW)]
STAR = {"category": "math", "l2_category": "geometry", "index": 1}
OCR = [
    *questions(["CENTRE"], ["2", "two"], dataset="IIIT5K", category="Regular Text Recognition"),
    *questions(["x ^ 2 + Y"], ["1"], dataset="HME100k", category="Handwritten Mathematical Expression Recognition"),
]


def _ocr_doc(q: Question) -> dict[str, Any]:
    return {"answer": q.reference, "dataset": q.about["dataset"], "question_type": q.about["category"]}


def _ocr(q: Question, said: str) -> float:
    return _utils("ocrbench").ocrbench_process_results(_ocr_doc(q), [said.strip()])["ocrbench_accuracy"]["score"]


MMMU = [
    *questions("A", "B", "D", multiple=True, options=[*OPTIONS.values()]),
    *questions("3", "dog", "a", "1000", ["4.5", "New  York"], multiple=False, options=[]),
]
CASES: dict[str, dict[str, Case]] = {
    "lmms-eval 0.7.3": {
        "ai2d": Case(ai2d.score, questions("A", "B"), _ai2d),
        "chartqa": Case(
            chartqa.score,
            questions("12%", "1000", "0", "Yes", "3"),
            _process("chartqa", "relaxed_overall", lambda q: {"answer": q.reference, "type": "human_test"}),
        ),
        "docvqa": Case(docvqa.score, questions(["Nokia", "nokia 3310"], ["1,000"], ["A", "New York"]), _anls),
        "mme": Case(
            mme.score,
            questions("yes", "no"),
            _process(
                "mme",
                "mme_perception_score",
                lambda q: {"answer": q.reference, "category": "OCR", "question_id": "1"},
                "score",
            ),
        ),
        "mmmu": Case(mmmu.score, MMMU, _mmmu),
        "mmstar": Case(
            mmstar.score,
            questions("A", "B"),
            _process("mmstar", "average", lambda q: {**STAR, "answer": q.reference}, "score"),
        ),
        "ocrbench": Case(ocrbench.score, OCR, _ocr),
        "realworldqa": Case(
            realworldqa.score,
            questions("B", "2", "Left", "E", prompt=CAR),
            _process("realworldqa", "exact_match", lambda q: {"answer": q.reference}),
        ),
        "seed_image": Case(seed.score, questions("A", "B"), _seed),
        "textvqa": Case(textvqa.score, questions(*PEOPLE), _vqa("textvqa")),
        "vizwiz, published": Case(vizwiz.normalised_score, questions(*PEOPLE), _vqa("vizwiz_vqa")),
        "pope, published": Case(
            pope.exact_score,
            questions("yes", "no"),
            _process("pope", "pope_accuracy", lambda q: {"answer": q.reference, "question_id": "1"}, "score"),
        ),
        "scienceqa, published": Case(
            scienceqa.strict_score,
            questions("A", "B"),
            _process("scienceqa", "exact_match", lambda q: {"answer": "AB".index(q.reference), "choices": ["x", "y"]}),
        ),
        "mmbench, published": Case(mmbench.static_score, BY_TEXTS, _mmbench_static),
        "mathvista, normalised": Case(_mathvista_normalised, MATHVISTA, _mathvista),
    },
    "lmms-eval 0.3.0": {
        "mmstar, published": Case(
            mmstar.first_letter_score,
            questions("A", "B"),
            _process("mmstar", "average", lambda q: {**STAR, "answer": q.reference}, "score"),
        ),
        "ocrbench, published": Case(ocrbench.lower_case_score, OCR, _ocr),
        "realworldqa, published": Case(
            realworldqa.flexible_score, questions("B", "2", "Left", prompt=CAR), _realworldqa_before
        ),
    },
    "VLMEvalKit": {
        "mmbench": Case(_letters(choices.find_letter), BY_TEXTS, _vlmevalkit_choice),
        "hallusion_bench": Case(hallusion.score, questions("yes", "no", category="VD", figure_id="1"), _vlmevalkit_yes),
    },
}


def packed(scores: Sequence[float]) -> str | dict[str, float]:
    """Tenths as one digit each, X for 1; other scores by the answer's number."""
    if all((10 * s).is_integer() for s in scores):
        return "".join("0123456789X"[round(10 * s)] for s in scores)
    return {str(n): s for n, s in enumerate(scores) if s}


def unpacked(scores: str | dict[str, float], count: int) -> list[float]:
    if isinstance(scores, str):
        return ["0123456789X".index(s) / 10 for s in scores]
    return [scores.get(str(n), 0.0) for n in range(count)]


def main(source: str) -> None:
    stored = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    said = answers(COUNT, SEED)
    if stored.get("answers") != said:
        stored = {"answers": said, "scores": {}}
    result = {name: [packed(s) for s in case.scores(said, ours=False)] for name, case in CASES[source].items()}
    stored["scores"] = dict(sorted({**stored["scores"], source: result}.items()))
    FILE.write_text(json.dumps(stored, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
