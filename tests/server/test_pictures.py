"""Attention pictures beside running answers: limits, one at a time, no program of the answers compiled again."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_run
from helpers.generation import QUESTIONS, config, picture, weights

from fusion_jax.data.sources import Record
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.inference.prompts import Buckets, Prompts
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models.fusion import Fusion
from fusion_jax.server import pictures as module
from fusion_jax.server.engine import Engine
from fusion_jax.server.pictures import Busy, Pictures, suggested
from fusion_jax.server.requests import Closing, Full
from fusion_jax.server.running_batch import RunningBatch
from fusion_jax.synth.tokenizer import train_tokenizer

BUCKETS = Buckets(lengths=(144,), questions=(64,), rounds=(1,), images=(0, 1))
QUESTION = "How many circles can you see here?"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    tokenizer = load_tokenizer(
        train_tokenizer([*QUESTIONS, "A red circle and a blue star."], tmp_path_factory.mktemp("t"), 600)
    )

    def make(dtype=jnp.float32, queue_limit=4):
        prompts = Prompts(config(), tokenizer, BUCKETS)
        return Engine(RunningBatch(Fusion(tiny_run.MODEL, dtype), weights(), prompts, 2, max_tokens=96), queue_limit)

    return make


@pytest.fixture(scope="module")
def engine(make):
    one = make()
    one.start()
    yield one
    one.close(10)


@pytest.fixture(scope="module")
def pictures(engine):
    return Pictures(engine, config())


@pytest.fixture
def compiled():
    """Names of the programs that are compiled meanwhile."""
    names = []

    def listen(event, duration, **more):
        if event.endswith("backend_compile_duration"):
            names.append(more.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def ask(i):
    return Record("x", None, [{"from": "human", "value": "<image>\n" + QUESTIONS[i % 4]}], "x", (picture(i),))


def test_answers_go_on_and_none_of_their_programs_is_compiled_again(engine, pictures, compiled):
    expected = ["".join(engine.answer(engine.prepare(ask(i)), Sampling(max_tokens=96))) for i in range(3)]
    assert not compiled
    texts, began = [""] * 3, threading.Semaphore(0)

    def answer(i):
        for piece in engine.answer(engine.prepare(ask(i)), Sampling(max_tokens=96)):
            texts[i] += piece
            began.release()

    threads = [threading.Thread(target=answer, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    began.acquire()
    chunks = engine.statistics.chunks
    drawn = pictures.draw(picture(1), QUESTION, "circles")
    assert engine.statistics.chunks > chunks  # the answers did not wait for it
    for thread in threads:
        thread.join()
    assert texts == expected
    assert compiled and engine.recompilations == 0

    compiled.clear()
    other = pictures.draw(picture(1), QUESTION, "see")
    assert not compiled  # another word is the same program, and so is another question of about that length
    pictures.draw(picture(2), QUESTIONS[0], "picture")
    assert not compiled
    assert drawn.dtype == np.uint8 and drawn.shape[1:] == (799, 3) and drawn.std() > 20
    assert (drawn != other[: len(drawn)]).any()
    assert engine.reserved == 0


def test_what_cannot_be_drawn_is_said_and_gives_its_place_back(engine, pictures):
    with pytest.raises(UserError, match="'star' is not in the question; its words are: How, many, circles, can"):
        pictures.draw(picture(1), QUESTION, "star")
    with pytest.raises(BadRecord, match="the page"):
        pictures.draw(b"no image", QUESTION, "circles")
    with pytest.raises(BadRecord) as caught:  # nothing longer than what is served reaches the device
        pictures.draw(picture(1), "circles " * 80, "circles")
    assert caught.value.reason in ("too_long", "question_too_long")
    assert engine.reserved == 0
    places = engine.rows + engine.queue_limit
    for _ in range(places):
        engine.reserve()
    with pytest.raises(Full):
        pictures.draw(picture(1), QUESTION, "circles")
    for _ in range(places):
        engine.release()
    assert engine.reserved == 0


def test_one_picture_at_a_time(engine, pictures, monkeypatch):
    began, go_on, real, drawn = threading.Event(), threading.Event(), module.levels, []

    def slow(*arguments, **named):
        began.set()
        assert go_on.wait(60)
        return real(*arguments, **named)

    monkeypatch.setattr(module, "levels", slow)
    thread = threading.Thread(target=lambda: drawn.append(pictures.draw(picture(1), QUESTION, "circles")))
    thread.start()
    assert began.wait(60)
    with pytest.raises(Busy):
        pictures.draw(picture(1), QUESTION, "circles")
    go_on.set()
    thread.join()
    assert len(drawn) == 1 and engine.reserved == 0
    assert pictures.draw(picture(1), QUESTION, "circles").shape == drawn[0].shape


def test_a_bfloat16_model_is_drawn_and_a_closing_one_is_not(make):
    core = make(jnp.bfloat16)
    half = Pictures(core, config())
    assert half.draw(picture(1), QUESTION, "circles").std() > 20
    core.refuse()
    with pytest.raises(Closing):
        half.draw(picture(1), QUESTION, "circles")


def test_words_are_suggested():
    assert suggested("Which colour is the Star left of the star?") == ["colour", "Star", "left"]
    assert suggested("What is this?") == []
    assert suggested("这是一张很长很长很长很长很长很长很长很长很长的图片吗") == []
    assert suggested(" ".join(f"word{i}" for i in range(20))) == [f"word{i}" for i in range(12, 20)]
