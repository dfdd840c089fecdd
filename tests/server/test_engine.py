"""Continuous batching against answers given one by one; places, deadlines, compilations."""

import dataclasses
import json
import queue
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_run
from helpers.generation import QUESTIONS, config, make_tokenizer, picture, wait_for_programs, weights

from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import measure
from fusion_jax.data.sources import Record
from fusion_jax.errors import UserError
from fusion_jax.inference.decoding import begin, decode, prefill
from fusion_jax.inference.prompts import Buckets, Prompts
from fusion_jax.inference.sampling import Sampling, settings
from fusion_jax.inference.streaming import TextStream
from fusion_jax.models.config import RopeConfig, replace
from fusion_jax.models.fusion import Fusion
from fusion_jax.server.engine import Engine
from fusion_jax.server.grammar import GrammarError, Grammars
from fusion_jax.server.prefills import _holds
from fusion_jax.server.requests import Closing, Full
from fusion_jax.server.running_batch import RunningBatch
from fusion_jax.server.structured import read_form

# Some prompts pass LongRoPE's original length, some do with their answers, others never: each has its own factors.
ROPE = RopeConfig("longrope", original_length=70, max_length=512, short_factors=(1.0,) * 4, long_factors=(9.0,) * 4)
MODEL = replace(tiny_run.MODEL, **{"llm.rope": ROPE})
BUCKETS = Buckets(lengths=(80, 160), questions=(64,), rounds=(2,), images=(0, 1, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def engine(tokenizer):
    prompts = Prompts(dataclasses.replace(config(), model=MODEL), tokenizer, BUCKETS)
    one = Engine(RunningBatch(Fusion(MODEL, jnp.float32), weights(), prompts, rows=4, max_tokens=24), queue_limit=80)
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
    prefilled = prefill(engine.batch.model, engine.batch.params, batch, room, limit)
    state = begin(*prefilled, batch, limit, settings([how]))
    tokens, _, _ = decode(engine.batch.model, engine.batch.params, state, 24, prompts.stop_ids, not how.greedy)
    stream = TextStream(prompts.tokenizer, prompts.stop_ids, how.stop, how.max_tokens)
    return stream.add(tokens[0].tolist())


def test_64_mixed_requests_equal_one_by_one_without_compiling(engine):
    requests = [mixed(i) for i in range(64)]
    spec = layout_spec(MODEL, 1, 1, 1)
    lengths = [measure(engine.prepare(record), spec, engine.prompts.latents).length for record, _ in requests]
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
    available = engine.rows + engine.queue_limit
    for _ in range(available):
        engine.reserve()
    with pytest.raises(Full):
        engine.reserve()
    for _ in range(available):
        engine.release()
    engine.reserve()
    engine.release()


def test_closing_answers_what_was_accepted_and_refuses_the_rest(engine, tokenizer):
    prompts = Prompts(dataclasses.replace(config(), model=MODEL), tokenizer, BUCKETS)
    other = Engine(RunningBatch(engine.batch.model, engine.batch.params, prompts, rows=4, max_tokens=24))
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


# Answers of a form, and probabilities.

FORMS = [
    {"guided_choice": ["A red circle", "a blue star", "猫"]},
    {"guided_regex": "[0-9]{3}-[a-z]{2} ?"},
    {"guided_json": {"enum": [7, "seven", None]}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "seen",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y z"]}},
                    "required": ["a", "b"],
                    "additionalProperties": False,
                },
            },
        }
    },
]


@pytest.fixture(scope="module")
def grammars(engine):
    pytest.importorskip("llguidance")
    return Grammars(engine.prompts, MODEL.llm.vocab_size)


def collect_formed(engine, requests):
    """[(text, finish, tokens)] of (record, sampling, form or None, likely), all at once."""
    events, done = queue.Queue(), {}
    results = [["", None, []] for _ in requests]
    for i, (record, how, constraint, likely) in enumerate(requests):
        engine.submit(engine.prepare(record), how, lambda event, i=i: events.put((i, event)), 300.0, constraint, likely)
    while len(done) < len(requests):
        i, event = events.get(timeout=300)
        results[i][0] += event.text
        results[i][2] += event.tokens
        if event.finish:
            results[i][1] = done[i] = event.finish
    return results


def follows(form, text):
    if "guided_choice" in form:
        return text in form["guided_choice"]
    if "guided_regex" in form:
        return re.fullmatch(form["guided_regex"], text) is not None
    schema = form.get("guided_json") or form["response_format"]["json_schema"]["schema"]
    spoken = json.loads(text)
    return spoken in schema["enum"] if "enum" in schema else list(spoken) == ["a", "b"] and spoken["b"] in ("x", "y z")


def test_answers_follow_their_forms_and_change_no_others(engine, grammars):
    requests, free = [], {}
    for i in range(24):
        record, how = mixed(i)
        if i % 2:
            free[i] = (record, how)
            requests.append((record, how, None, 2 if i % 3 == 0 else None))
        else:
            how = Sampling(max_tokens=24, temperature=1.5 if i % 4 else 0.0, seed=i)
            requests.append((record, how, grammars.matcher(read_form(FORMS[i // 2 % 4])), None))
    before = engine.recompilations  # what the tests themselves have compiled
    results = collect_formed(engine, requests)
    assert engine.recompilations == before
    spoken = set()
    for i, (text, finish, _) in enumerate(results):
        if i in free:
            assert text == alone(engine, *free[i])
        elif finish == "stop":
            assert follows(FORMS[i // 2 % 4], text), text
            spoken.add(text)
        else:
            assert finish == "length" and i // 2 % 4 == 3, (i, text)  # white space within JSON may be long
    assert len(spoken) > 5
    # The device's rows are free again.
    assert engine.busy == 0 and np.asarray(engine.batch.state.done).all()


def test_a_form_that_is_whole_ends_with_its_last_token(engine, grammars):
    record, _ = mixed(0)
    choice = read_form({"guided_choice": ["A red circle"]})
    count = len(collect_formed(engine, [(record, Sampling(max_tokens=24), grammars.matcher(choice), 0)])[0][2])
    exact, short = (
        collect_formed(engine, [(record, Sampling(max_tokens=most), grammars.matcher(choice), 0)])[0]
        for most in (count, count - 1)
    )
    assert exact[:2] == ["A red circle", "stop"]
    assert short[1] == "length" and "A red circle".startswith(short[0]) and short[0] != "A red circle"
    stopped = Sampling(max_tokens=24, stop=("red",))
    assert collect_formed(engine, [(record, stopped, grammars.matcher(choice), None)])[0][:2] == ["A ", "stop"]


def test_probabilities_are_the_models_own(engine):
    """Before temperature and penalty: the logits' of a run that keeps them."""
    record, _ = mixed(2)
    how = Sampling(max_tokens=10, temperature=0.7, repetition_penalty=1.3, seed=4)
    (text, _, tokens), (plain, _, none) = collect_formed(engine, [(record, how, None, 3), (record, how, None, None)])
    assert text == plain and none == []
    prompts, limit = engine.prompts, np.array([how.max_tokens], np.int32)
    batch = prompts.batch([prompts.example(record)])
    prefilled = prefill(engine.batch.model, engine.batch.params, batch, batch.tokens.shape[1] + 24, limit)
    state = begin(*prefilled, batch, limit, settings([how]))
    ids, logits, _ = decode(engine.batch.model, engine.batch.params, state, 10, prompts.stop_ids, True, True)
    shares = np.asarray(jax.nn.log_softmax(logits[0]))
    assert 0 < len(tokens) <= 10
    for k, one in enumerate(tokens):
        assert one.token == ids[0, k] and len(one.top) == 3
        np.testing.assert_allclose(one.value, shares[k, one.token], atol=1e-4)
        np.testing.assert_allclose([value for _, value in one.top], np.sort(shares[k])[::-1][:3], atol=1e-4)
    spoken = b"".join(prompts.tokenizer.token_bytes(one.token) for one in tokens)
    assert spoken.decode(errors="replace").strip() == text
    greedy = collect_formed(engine, [(record, Sampling(max_tokens=10), None, 20)])[0]
    assert all(one.top[0] == (one.token, one.value) and len(one.top) == 20 for one in greedy[2])
    with pytest.raises(UserError, match=r"0\.\.20"):
        engine.submit(engine.prepare(record), how, print, 1.0, top_logprobs=21)


def test_a_form_that_leads_nowhere_ends_its_own_answer_alone(engine):
    class Nowhere:
        prefix, ended = "", False

        def __init__(self):
            self.left = 3

        def fill(self, bits, row):
            if not self.left:
                raise GrammarError("no token can come next")

        def take(self, token):
            self.left -= 1

    events = queue.Queue()
    example = engine.prepare(mixed(0)[0])
    engine.submit(example, Sampling(max_tokens=20), events.put, 60.0, Nowhere())
    texts, _ = collect(engine, [mixed(4)])
    received = []
    while not received or received[-1].finish is None:
        received.append(events.get(timeout=60))
    received = received[-1:]
    assert [(event.finish, "no token can come next" in event.problem) for event in received] == [("error", True)]
    assert texts == [alone(engine, *mixed(4))] and not engine.problem


def test_steps_of_one_token_are_taken_only_beside_a_form(engine, grammars):
    before = engine.statistics.chunks
    collect_formed(engine, [(mixed(0)[0], Sampling(max_tokens=16), None, None)])
    assert engine.statistics.chunks - before <= 2
    form = grammars.matcher(read_form({"guided_regex": "[a-z]{9}"}))
    before = engine.statistics.chunks
    collect_formed(engine, [(mixed(0)[0], Sampling(max_tokens=16), form, None)])
    assert engine.statistics.chunks - before > 2


SHAPES = Buckets(lengths=(80, 160), questions=(16, 64), rounds=(1, 2), images=(0, 1, 2))


def asked(i, words=1, rounds=1, images=1):
    record, how = mixed(4 * i)
    turns = [{"from": "human", "value": "What? " * words}, {"from": "gpt", "value": "A star."}] * rounds
    turns[0] = {"from": "human", "value": "<image>\n" * images + turns[0]["value"]}
    pictures = tuple(picture(100 * i + k) for k in range(images))
    return dataclasses.replace(record, turns=turns[:-1], images=pictures), how


def submit(engine, requests):
    """Queues requests; returns the queues of their events."""
    queues = [queue.Queue() for _ in requests]
    for (record, how), events in zip(requests, queues):
        engine.submit(engine.prepare(record), how, events.put, 300.0)
    return queues


def read(queues):
    """The answers whose events arrive in these queues."""
    texts = []
    for events in queues:
        text, finish = "", None
        while finish is None:
            event = events.get(timeout=300)
            text, finish = text + event.text, event.finish
        texts.append(text)
    return texts


def test_prompts_of_one_shape_are_prefilled_together_once_their_programs_are_ready(tokenizer):
    prompts = Prompts(dataclasses.replace(config(), model=MODEL), tokenizer, SHAPES)
    engine = Engine(RunningBatch(Fusion(MODEL, jnp.float32), weights(), prompts, rows=4, max_tokens=24), queue_limit=80)
    ran = []
    run = engine.batch.prefills.run

    def recorded(examples, hows):
        states = run(examples, hows)
        ran.append((len(examples), len(states)))
        return states

    engine.start()
    started = set(engine.batch.prefills._ready)
    engine.batch.prefills.run = recorded
    try:
        assert {count for count, _ in started} == {1}
        crops = [(spec.question_length, spec.rounds) for _, spec in started if spec.crops]
        assert set(crops) == {(64, 2)}, "only the largest are compiled at the start"

        requests = [asked(i) for i in range(4)]
        with engine._wake:  # all wait before the first is admitted
            first = submit(engine, requests)
        before = read(first)
        wait_for_programs(engine)
        # Small ones of their own, for one prompt and for several.
        ready = set(engine.batch.prefills._ready) - started
        assert {(spec.question_length, spec.rounds) for _, spec in ready} == {(16, 1)}
        assert {count for count, _ in ready} >= {1, 4}
        ran.clear()
        with engine._wake:
            second = submit(engine, requests)
        assert read(second) == before
        assert ran == [(4, 4)]
        assert read(submit(engine, requests[:1])) == before[:1] and ran[1:] == [(1, 1)]
        for text, (record, how) in zip(before, requests):
            assert alone(engine, record, how) == text
    finally:
        engine.close(10)
    assert engine.batch.prefills._compiler.ended


def test_prefills_pad_to_the_smallest_shape_that_is_ready(engine):
    spec = engine.batch.prefills.shape(engine.prepare(mixed(2)[0]))
    assert _holds(spec, spec) and _holds(dataclasses.replace(spec, question_length=65, rounds=9), spec)
    assert not _holds(dataclasses.replace(spec, question_length=1), spec)
    assert not _holds(dataclasses.replace(spec, length=spec.length + 1), spec)
