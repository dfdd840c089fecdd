"""Continuous batching against answers given one by one; places, deadlines, compilations."""

import dataclasses
import queue

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from test_generate import QUESTIONS, config, picture, weights

from fusion_jax import generate
from fusion_jax.data import pipeline
from fusion_jax.data.sources import Record
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.models.config import RopeConfig, replace
from fusion_jax.models.fusion import Fusion
from fusion_jax.sampling import Sampling, settings
from fusion_jax.serve.engine import Closing, Engine, Full
from fusion_jax.streaming import TextStream
from fusion_jax.synth.tokenizer import train_tokenizer

# Some prompts pass LongRoPE's original length, some do with their answers, others never: each has its own factors.
ROPE = RopeConfig("longrope", original_length=70, max_length=512, short_factors=(1.0,) * 4, long_factors=(9.0,) * 4)
MODEL = replace(tiny_run.MODEL, **{"llm.rope": ROPE})
BUCKETS = generate.Buckets(lengths=(80, 160), questions=(64,), rounds=(2,), images=(0, 1, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(
        train_tokenizer([*QUESTIONS, "A red circle and a blue star."], tmp_path_factory.mktemp("t"), 600)
    )


@pytest.fixture(scope="module")
def engine(tokenizer):
    prompts = generate.Prompts(dataclasses.replace(config(), model=MODEL), tokenizer, BUCKETS)
    one = Engine(Fusion(MODEL, jnp.float32), weights(), prompts, rows=4, max_tokens=24, queue_limit=80)
    one.start()
    yield one
    one.close(10)


def mixed(i):
    """The i-th of many requests that differ in images, rounds, lengths and settings."""
    images, rounds = (i // 2) % 3, 1 + i % 2
    turns = []
    for r in range(rounds):
        turns.append({"from": "human", "value": QUESTIONS[(i + r) % 4] * (1 + i % 3)})
        turns.append({"from": "gpt", "value": "A red circle."})
    turns[0]["value"] = "<image>\n" * images + turns[0]["value"]
    record = Record(str(i), None, turns[:-1], f"prompt {i}", tuple(picture(i + k) for k in range(images)))
    drawn = {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "seed": i} if i % 4 == 3 else {}
    return record, Sampling(max_tokens=3 + i % 22, **drawn)


def collect(engine, requests, timeout=300.0):
    events = queue.Queue()
    texts, ends = [""] * len(requests), {}
    for i, (record, how) in enumerate(requests):
        engine.submit(engine.prepare(record), how, lambda event, i=i: events.put((i, event)), timeout)
    while len(ends) < len(requests):
        i, event = events.get(timeout=300)
        texts[i] += event.text
        if event.finish:
            ends[i] = event.finish
    return texts, [ends[i] for i in range(len(requests))]


def alone(engine, record, how):
    """The same by the functions that know nothing of rows and rings."""
    prompts, limit = engine.prompts, np.array([how.max_tokens], np.int32)
    batch = prompts.batch([prompts.example(record)])
    room = batch.tokens.shape[1] + 24  # one program for all limits
    prefilled = generate.prefill(engine.model, engine.params, batch, room, limit)
    state = generate.begin(*prefilled, batch, limit, settings([how]))
    tokens, _, _ = generate.decode(engine.model, engine.params, state, 24, prompts.stop_ids, not how.greedy)
    stream = TextStream(prompts.tokenizer, prompts.stop_ids, how.stop, how.max_tokens)
    return stream.add(tokens[0].tolist())


def test_64_mixed_requests_equal_one_by_one_without_compiling(engine):
    requests = [mixed(i) for i in range(64)]
    spec = pipeline.layout_spec(MODEL, 1, 1, 1)
    lengths = [generate.needs(engine.prepare(record), spec, engine.prompts.latents).length for record, _ in requests]
    reach = [length + how.max_tokens - 1 for length, (_, how) in zip(lengths, requests)]
    kinds = [(length > ROPE.original_length, far > ROPE.original_length) for length, far in zip(lengths, reach)]
    assert set(kinds) == {(False, False), (False, True), (True, True)}
    texts, ends = collect(engine, requests)
    assert engine.recompilations == 0
    assert set(ends) <= {"stop", "length"} and len(set(texts)) > 16
    for text, (record, how) in zip(texts, requests):
        assert alone(engine, record, how) == text
    assert engine.busy == engine.waiting == 0


def test_a_cancelled_request_frees_its_row_and_a_late_one_times_out(engine):
    record, _ = mixed(1)
    events = queue.Queue()
    requests = [engine.submit(engine.prepare(record), Sampling(max_tokens=24), events.put, 60.0) for _ in range(12)]
    for request in requests:
        request.cancel()
    ends = [next(e.finish for e in iter(events.get, None) if e.finish) for _ in requests]
    assert "cancelled" in ends and engine.busy == engine.waiting == 0
    assert collect(engine, [mixed(0)] * 6, timeout=-1.0)[1] == ["timeout"] * 6


def test_places_are_limited(engine):
    taken = engine.rows + engine.queue_limit
    for _ in range(taken):
        engine.reserve()
    with pytest.raises(Full):
        engine.reserve()
    for _ in range(taken):
        engine.release()
    engine.reserve()
    engine.release()


def test_closing_answers_what_was_accepted_and_refuses_the_rest(engine, tokenizer):
    prompts = generate.Prompts(dataclasses.replace(config(), model=MODEL), tokenizer, BUCKETS)
    other = Engine(engine.model, engine.params, prompts, rows=4, max_tokens=24)
    other.start()
    record, how = mixed(0)
    assert "".join(other.answer(other.prepare(record), how)) == "".join(engine.answer(engine.prepare(record), how))
    events = queue.Queue()
    other.submit(other.prepare(mixed(2)[0]), Sampling(max_tokens=20), events.put, 60.0)
    other.close(30)
    ends = []
    while not events.empty():
        ends.append(events.get().finish)
    assert ends[-1] in ("stop", "length")
    with pytest.raises(Closing):
        other.reserve()
