"""Kept prompts: later turns continue them, with the answers of the whole conversation, and nothing else does."""

import dataclasses
import queue
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_run
from helpers.fixtures import params
from helpers.generation import config, make_tokenizer, picture, wait_for_programs

from fusion_jax.data.sources import Record
from fusion_jax.inference.decoding import Encoding
from fusion_jax.inference.generate import Answerer
from fusion_jax.inference.prefixes import Prefix
from fusion_jax.inference.prompts import Buckets, Prompts
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models.config import RopeConfig, replace
from fusion_jax.models.fusion import Fusion
from fusion_jax.server.engine import Engine
from fusion_jax.server.metrics import Metrics
from fusion_jax.server.prefixes import Prefixes
from fusion_jax.server.running_batch import RunningBatch

# An answer of 32 tokens brings the second turn beyond the original length, one of 8 not even the third.
ROPE = RopeConfig("longrope", original_length=92, max_length=512, short_factors=(1.0,) * 4, long_factors=(9.0,) * 4)
MODEL = replace(tiny_run.MODEL, **{"llm.rope": ROPE, "guide": "first_round"})
BUCKETS = Buckets(lengths=(100, 200), questions=(64,), rounds=(3,), images=(0, 1, 2))
SHORT, DRAWN = Sampling(max_tokens=8), Sampling(max_tokens=8, temperature=0.9, repetition_penalty=1.2, seed=5)
ANSWER = "A red circle."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("t"))


def started(tokenizer, model=MODEL, **more):
    prompts = Prompts(dataclasses.replace(config(), model=model), tokenizer, BUCKETS)
    batch = RunningBatch(Fusion(model, jnp.float32), params(model), prompts, rows=4, max_tokens=32, **more)
    engine = Engine(batch, queue_limit=80)
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine(tokenizer):
    one = started(tokenizer, prefix_bytes=1 << 24)
    for images in (1, 0):  # the programs of the rests
        for rounds in (1, 2, 3, 3):
            ask(one, chat(900 + images, rounds, images))
            wait_for_programs(one)
    assert prefixes(one).hits
    yield one
    one.close(10)


@pytest.fixture(scope="module")
def alone(tokenizer):
    answerer = Answerer(Fusion(MODEL), params(MODEL), dataclasses.replace(config(), model=MODEL), tokenizer, rows=1)
    return lambda record, how=SHORT: answerer.answer([record], how)[0]


def chat(seed, rounds=1, images=1, **changes):
    """The prompt of a turn of the conversation about picture `seed`; changes by the number of a turn."""
    said = [f"What is in picture {seed}?", ANSWER, "Which colour?", ANSWER, "Describe it."][: 2 * rounds - 1]
    said = [changes.get(f"turn{k}", text) for k, text in enumerate(said)]
    turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
    if images > 1:
        turns[0]["value"] = "<image>\n" * images + turns[0]["value"]
    return Record(str(seed), None, turns, "prompt", tuple(picture(seed + k) for k in range(images)))


def ask(engine, record, how=SHORT):
    return "".join(engine.answer(engine.prepare(record), how))


def prefixes(engine) -> Prefixes:
    return engine.batch.prefills.prefixes


def counted(engine, record, how=SHORT):
    """The answer, and how many hits and misses it was."""
    before = prefixes(engine).hits, prefixes(engine).misses
    text = ask(engine, record, how)
    return text, prefixes(engine).hits - before[0], prefixes(engine).misses - before[1]


@pytest.mark.parametrize("images", [0, 1])
def test_each_turn_continues_the_one_before(engine, alone, images):
    before = engine.recompilations
    answers = []
    for rounds, hits in ((1, 0), (2, 1), (3, 1)):
        record = chat(10 + images, rounds, images)
        answers.append(counted(engine, record, SHORT))
        assert answers[-1][1:] == (hits, 0)
    assert engine.recompilations == before
    for rounds, (text, *_) in enumerate(answers, 1):
        assert text == alone(chat(10 + images, rounds, images))


def test_other_settings_of_sampling_continue_the_same_prompt(engine, alone):
    ask(engine, chat(20))
    for how in (SHORT, DRAWN, Sampling(max_tokens=3), DRAWN):
        text, hits, misses = counted(engine, chat(20, 2), how)
        assert (text, hits, misses) == (alone(chat(20, 2), how), 1, 0)


def test_answers_that_reach_longrope_s_long_factors_do_not_continue_keys_of_the_short_ones(engine, alone):
    far = Sampling(max_tokens=32)
    ask(engine, chat(30))
    assert counted(engine, chat(30, 2), far) == (alone(chat(30, 2), far), 0, 1)
    assert counted(engine, chat(30, 3), far) == (alone(chat(30, 3), far), 1, 0)


LITERAL = {"literal": True, "system": "Be brief."}
CHANGES = {
    "another image": lambda: dataclasses.replace(chat(40, 2), images=(picture(41),)),
    "an edited answer": lambda: chat(40, 2, turn1="Which circles? 77 blue stars, you see."),
    "an edited question": lambda: chat(40, 2, turn0="Describe it."),
    "another system text": lambda: dataclasses.replace(chat(40, 2), **LITERAL),
    "one image more": lambda: dataclasses.replace(chat(40, 2, images=2), images=(picture(40), picture(41))),
    "no image": lambda: chat(40, 2, images=0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_conversation_that_differs_is_prefilled_whole(engine, alone, change):
    ask(engine, chat(40))
    assert counted(engine, chat(40, 2))[1:] == (1, 0)
    record = CHANGES[change]()
    hits = 1 if change == "an edited answer" else 0  # an answer is part of the rest
    assert counted(engine, record) == (alone(record), hits, 1 - hits)
    assert alone(record) != alone(chat(40, 2)), "the change changes nothing"


def test_an_edited_answer_further_back_is_prefilled_whole(engine, alone):
    for rounds in (1, 2, 3):
        ask(engine, chat(50, rounds))
    edited = chat(50, 3, turn1="Which circles? 77 blue stars, you see.")
    assert counted(engine, edited) == (alone(edited), 0, 1)


def test_an_image_in_a_later_turn_is_encoded(engine, alone):
    first = chat(60)
    first.turns[0]["value"] = "<image>\n" + first.turns[0]["value"]
    ask(engine, first)
    later = chat(60, 2)
    later = dataclasses.replace(later, images=(picture(60), picture(61)))
    later.turns[0]["value"] = "<image>\n" + later.turns[0]["value"]
    later.turns[2]["value"] = "<image>\n" + later.turns[2]["value"]
    text, hits, _ = counted(engine, later)
    assert (text, hits) == (alone(later), 0)


def test_prompts_that_are_prefilled_together_leave_each_its_own(engine, alone):
    """First turns, second turns and other people's first turns, all waiting at once."""
    others, first = [chat(60 + k) for k in range(4)], [chat(70 + k) for k in range(4)]
    both = [*(chat(70 + k, 2) for k in range(3)), chat(80)]
    for records, hits in ((others, 0), (first, 0), (both, 3), (both, 3)):
        events = [queue.Queue() for _ in records]
        examples = [engine.prepare(record) for record in records]
        before = prefixes(engine).hits
        with engine._wake:
            for example, own in zip(examples, events):
                engine.submit(example, SHORT, own.put, 300.0)
        for record, own in zip(records, events):
            text, finish = "", None
            while finish is None:
                event = own.get(timeout=300)
                text, finish = text + event.text, event.finish
            assert text == alone(record)
        assert prefixes(engine).hits - before == hits
        wait_for_programs(engine)  # of several prompts at once


def test_the_guide_decides_whether_images_are_kept(tokenizer):
    guided = replace(MODEL, guide="all_rounds")
    make_prompts = Prompts(dataclasses.replace(config(), model=guided), tokenizer, BUCKETS)
    kept = Prefixes(guided, 1)
    assert not kept.keeps(make_prompts.example(chat(0))) and kept.keeps(make_prompts.example(chat(0, images=0)))
    assert Prefixes(replace(guided, text_guided=False), 1).keeps(make_prompts.example(chat(0)))
    assert Prefixes(MODEL, 1).keeps(make_prompts.example(chat(0)))
    assert not Prefixes(MODEL, 0).keeps(make_prompts.example(chat(0)))


def test_every_id_every_pixel_and_the_guiding_question_count(tokenizer):
    make_prompts = Prompts(dataclasses.replace(config(), model=MODEL), tokenizer, BUCKETS)
    first, second = make_prompts.example(chat(0)), make_prompts.example(chat(0, 2))
    kept, none = Prefixes(MODEL, 1 << 20), np.zeros(1)
    kept.put(first, SHORT, Prefix(none, none, np.int32(42), None))
    assert kept.find(second, SHORT, 62) is not None
    for name, count in (("input_ids", len(first.input_ids)), ("question_ids", 1), ("crops", 1)):
        for place in range(count):
            changed = getattr(second, name).copy()
            changed.reshape(-1)[place] ^= 1
            assert kept.find(dataclasses.replace(second, **{name: changed}), SHORT, 62) is None
    changed = second.input_ids.copy()
    changed[len(first.input_ids) :] = 1  # what comes after it does not count
    assert kept.find(dataclasses.replace(second, input_ids=changed), SHORT, 62) is not None


def test_the_oldest_go_when_there_are_too_many_bytes(tokenizer):
    make_prompts = Prompts(dataclasses.replace(config(), model=MODEL), tokenizer, BUCKETS)
    examples = [make_prompts.example(chat(k)) for k in range(3)]
    later = [make_prompts.example(chat(k, 2)) for k in range(3)]

    def prefix(numbers):
        keys = np.zeros(numbers, np.float32)
        return Prefix(keys, keys, np.int32(5), Encoding(keys, keys))

    size = prefix(100).nbytes
    kept = Prefixes(MODEL, 2 * size)
    for example in examples[:2]:
        kept.put(example, SHORT, prefix(100))
    assert kept.bytes == 2 * size and kept.find(later[0], SHORT, 9) is not None
    kept.put(examples[2], SHORT, prefix(100))  # the second was used longest ago
    assert [kept.find(one, SHORT, 9) is not None for one in later] == [True, False, True]
    kept.put(examples[2], SHORT, prefix(50))  # again, smaller
    assert kept.bytes == size + prefix(50).nbytes
    kept.put(examples[1], SHORT, prefix(1000))  # too large for all the room
    assert [kept.find(one, SHORT, 9) is not None for one in later] == [True, False, True]


@pytest.mark.parametrize("wrong", ["-1", "nan", "inf", "much"])
def test_sizes_that_are_none_end_the_server_with_a_sentence(wrong):
    command = [sys.executable, "-m", "fusion_jax.serve", "--checkpoint=nowhere", f"--prefix_gib={wrong}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "prefix_gib" in done.stderr and "Traceback" not in done.stderr


def test_metrics_report_what_is_kept(engine):
    ask(engine, chat(90))
    values = {
        f"{one.name}{sample.name.removeprefix(one.name)}": sample.value
        for one in Metrics(engine).collect()
        for sample in one.samples
    }
    kept = prefixes(engine)
    assert values["fusion_prefix_hits_total"] == kept.hits > 0
    assert values["fusion_prefix_misses_total"] == kept.misses > 0
    assert values["fusion_prefix_bytes"] == kept.bytes == sum(one.nbytes for one in kept._kept.values()) > 0
    assert all(isinstance(x, jax.Array) for one in kept._kept.values() for x in jax.tree.leaves(one.keys))
