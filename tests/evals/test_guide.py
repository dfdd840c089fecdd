"""Texts that guide the vision encoder in place of the question: chosen, tokenized, encoded, and read by the model."""

import dataclasses

import numpy as np
import pytest
from helpers import tiny_run
from helpers.bench_files import held_out_folder, pope_folder
from helpers.generation import answerer, config, make_tokenizer, record, weights

from fusion_jax.errors import UserError
from fusion_jax.evals import runner
from fusion_jax.evals.guide import guided_by
from fusion_jax.evals.prepare import prepare
from fusion_jax.evals.registry import TASKS
from fusion_jax.inference import generate
from fusion_jax.inference.decoding import first_state
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models.fusion import Fusion


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    labels = {"random": ["yes", "no", "yes"], "popular": ["no", "no"], "adversarial": ["yes"]}
    return prepare(TASKS["pope"], pope_folder(tmp_path_factory.mktemp("pope"), labels))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return answerer(make_tokenizer(tmp_path_factory.mktemp("tokenizer"))).prompts


def test_the_question_itself_guides_by_default(pope):
    assert guided_by(pope, "question") is pope and all(q.guide is None for q in pope.questions)


def test_another_question_differs_and_comes_from_the_task(pope):
    guided = guided_by(pope, "other").questions
    texts = {q.prompt for q in pope.questions}
    assert all(q.guide != q.prompt and q.guide in texts for q in guided)
    assert len({q.guide for q in guided}) > 2
    assert [q.guide for q in guided] == [q.guide for q in guided_by(pope, "other").questions], "it is always the same"
    assert [dataclasses.replace(q, guide=None) for q in guided] == pope.questions


def test_none_guides_by_an_empty_text_and_is_written_with_the_answer(pope):
    question = guided_by(pope, "none").questions[0]
    assert question.guide == "" and runner.record(pope.task, question).guide == ""
    assert runner.Prediction(question, "yes").row()["guide"] == ""
    assert "guide" not in runner.Prediction(pope.questions[0], "yes").row()


def test_equal_questions_have_no_other(tmp_path):
    held_out_folder(tmp_path, ["red", "blue"], [None, None])
    with pytest.raises(UserError, match="held_out: all questions have the same words"):
        guided_by(prepare(TASKS["held_out"], tmp_path), "other")


def test_only_the_encoder_reads_the_guide(prompts):
    plain, guide = record(0), record(1).turns[0]["value"].removeprefix("<image>\n")
    own, guided, alone = (prompts.example(dataclasses.replace(plain, guide=text)) for text in (None, guide, ""))
    for example in (guided, alone):
        np.testing.assert_array_equal(example.input_ids, own.input_ids)
    np.testing.assert_array_equal(guided.question_ids, prompts.example(record(1)).question_ids)
    assert len(own.question_ids) and not len(alone.question_ids)
    # A text without an image has no encoder to guide.
    assert not len(prompts.example(dataclasses.replace(record(1, images=0), guide="x")).question_ids)


def test_the_guide_changes_what_the_model_sees(tmp_path):
    # In so small an encoder only the early half runs, which sees no text with the paper's mask.
    model = Fusion(dataclasses.replace(tiny_run.MODEL, mask="none"))
    asked = generate.Answerer(model, weights(), config(), make_tokenizer(tmp_path))
    plain = record(0)

    def logits(guide):
        example = asked.prompts.example(dataclasses.replace(plain, guide=guide))
        batch = asked.prompts.batch([example])
        return np.asarray(first_state(asked.model, asked.params, batch, [Sampling(max_tokens=2)]).logits)

    own, same, other, none = map(logits, (None, "What is in the picture?", "Which colour?", ""))
    np.testing.assert_allclose(same, own, atol=1e-5)
    assert np.isfinite(none).all()
    assert min(np.abs(own - other).max(), np.abs(own - none).max(), np.abs(other - none).max()) > 1e-4
