"""A real server process on a tiny checkpoint: the official client, broken callers, shutdown."""

import base64
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from typing import Literal

import jax.numpy as jnp
import pytest
from helpers import tiny_run
from helpers.generation import QUESTIONS, picture
from helpers.server_process import KEY, bomb, metrics

from fusion_jax.data.sources import Record
from fusion_jax.inference import generate
from fusion_jax.inference.prompts import Buckets, Prompts
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models.fusion import Fusion
from fusion_jax.training.loading import load_model

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def question(i):
    address = "data:image/png;base64," + base64.b64encode(picture(i)).decode()
    image = [{"type": "image_url", "image_url": {"url": address}}] if i % 4 else []
    return [{"role": "user", "content": [*image, {"type": "text", "text": QUESTIONS[i % len(QUESTIONS)]}]}]


@pytest.fixture(scope="module")
def expected(folder):
    """The answers to `question(0)` ... `question(7)` by the batch function."""
    loaded = load_model(folder)
    one = generate.Answerer(Fusion(tiny_run.MODEL, jnp.float32), loaded.params, loaded.config, loaded.tokenizer, rows=1)
    buckets = Buckets((80, 160), (64,), (2,), (0, 1))
    one.prompts = Prompts(loaded.config, loaded.tokenizer, buckets)
    answers = []
    for i in range(8):
        text = ("<image>\n" if i % 4 else "") + QUESTIONS[i % len(QUESTIONS)]
        images = (picture(i),) if i % 4 else ()
        record = Record("x", None, [{"from": "human", "value": text}], "x", images)
        answers.append(one.answer([record], Sampling(max_tokens=24))[0])
    return answers


def test_the_official_client_asks_and_streams(client, expected):
    assert [model.id for model in client.models.list()] == ["fusion"]
    answer = client.chat.completions.create(model="fusion", messages=question(1), max_tokens=24)
    assert answer.choices[0].message.content == expected[1]
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 24 and answer.usage.prompt_tokens > 9
    pieces = list(
        client.chat.completions.create(
            model="fusion", messages=question(1), max_tokens=24, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == expected[1]
    assert pieces[-1].usage == answer.usage


class Seen(pydantic.BaseModel):
    """What the client's own `parse` asks for."""

    kind: Literal["star", "ball"]
    many: bool


def test_the_official_client_gets_answers_of_a_form(client):
    def ask(**more):
        return client.chat.completions.create(model="fusion", messages=question(1), max_tokens=48, **more)

    seen = []
    for seed in range(3):
        # White space, of which these random weights say much, may cut an answer off: the client raises then.
        with contextlib.suppress(openai.LengthFinishReasonError):
            how = {"max_tokens": 48, "seed": seed, "temperature": 1.0, "response_format": Seen}
            completion = client.chat.completions.parse(model="fusion", messages=question(1), **how)
            seen.append(completion.choices[0].message.parsed)
    assert seen and all(isinstance(one, Seen) for one in seen)
    choices = ["A red circle", "a blue star"]
    for wanted in ({"structured_outputs": {"choice": choices}}, {"guided_choice": choices}):
        answer = ask(extra_body=wanted).choices[0]
        assert answer.message.content in choices and answer.finish_reason == "stop"
    pieces = list(ask(extra_body={"guided_regex": "[0-9]{3}, [0-9]{3}"}, stream=True))
    assert re.fullmatch("[0-9]{3}, [0-9]{3}", "".join(p.choices[0].delta.content or "" for p in pieces))
    cut = ask(extra_body={"guided_regex": "[a-z]{200}"}).choices[0]
    assert cut.finish_reason == "length" and re.fullmatch("[a-z]{48,199}", cut.message.content)
    for wanted in ({"uniqueItems": True}, {"type": "sting"}, {"enum": []}, {"$ref": "https://example.org/schema"}):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": wanted}}
        with pytest.raises(openai.BadRequestError, match=r"json_schema\.schema cannot be used"):
            ask(response_format=form)


def test_the_official_client_gets_probabilities_whole_and_in_pieces(client, expected):
    wanted = {"model": "fusion", "messages": question(1), "max_tokens": 24, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**wanted).choices[0]
    tokens = whole.logprobs.content
    assert whole.message.content == expected[1]
    assert bytes(byte for one in tokens for byte in one.bytes).decode(errors="replace").strip() == expected[1]
    for one in tokens:
        assert one.logprob <= 0 and one.top_logprobs[0].token == one.token and len(one.top_logprobs) == 3
    pieces = list(client.chat.completions.create(**wanted, stream=True))
    streamed = [one for p in pieces if p.choices[0].logprobs for one in p.choices[0].logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in tokens]
    alone = client.chat.completions.create(**wanted | {"top_logprobs": None}).choices[0].logprobs.content
    assert [(one.token, one.top_logprobs) for one in alone] == [(one.token, []) for one in tokens]
    assert client.chat.completions.create(**wanted | {"logprobs": False, "top_logprobs": 0}).choices[0].logprobs is None


def test_every_role_of_the_official_client_is_heard(client):
    def counted(*messages):
        messages = [{"role": role, "content": content} for role, content in messages]
        return client.chat.completions.create(model="fusion", messages=messages, max_tokens=1).usage.prompt_tokens

    base = counted(("user", "What is in the image?"))
    for role in ("assistant", "developer"):
        both = ((role, "A red circle."), (role, "A red circle and a blue star."))
        one, more = (counted(text, ("user", "What is in the image?")) for text in both)
        assert base != one < more
    assert counted(("user", "What?"), ("assistant", None), ("user", "What?")) > counted(("user", "What?"))


def test_errors_come_in_the_form_that_the_client_knows(client, server):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt", messages=question(0))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fusion", messages=[{"role": "user", "content": "long " * 500}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server[0]}/v1", api_key="wrong", max_retries=0).models.list()


def post(server, body, read=True):
    """Status of a raw request."""
    request = urllib.request.Request(
        f"{server[0]}/v1/chat/completions",
        body,
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            # Otherwise the first line, and then the connection is closed in mid-stream.
            answer.read() if read else answer.readline()
            return answer.status
    except urllib.error.HTTPError as error:
        assert set(json.load(error)["error"]) == {"message", "type", "param", "code"}
        return error.code


def with_image(data):
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    return json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}]}
    ).encode()


def test_200_requests_of_16_callers_a_tenth_of_them_broken(client, server, expected):
    long = json.dumps({"messages": [{"role": "user", "content": "much " * 400}]}).encode()
    leaves = json.dumps({"messages": question(1), "stream": True, "max_tokens": 48}).encode()
    broken = ((b"{", 400), (with_image(b"nothing"), 400), (with_image(bomb()), 400), (leaves, 200), (long, 400))

    def ask(i):
        if i % 10 == 9:
            body, status = broken[i // 10 % 5]
            return post(server, body, read=body is not leaves) == status
        completion = client.chat.completions.create(
            model="fusion", messages=question(i % 8), max_tokens=24, stream=bool(i % 3 == 0)
        )
        if i % 3 == 0:
            return "".join(p.choices[0].delta.content or "" for p in completion) == expected[i % 8]
        return completion.choices[0].message.content == expected[i % 8]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        right = list(pool.map(ask, range(200)))
    assert all(right), [i for i, good in enumerate(right) if not good]
    for _ in range(100):
        counts = metrics(server)
        if not counts["fusion_requests_open"]:
            break
        time.sleep(0.1)
    assert counts["fusion_requests_open"] == counts["fusion_rows_busy"] == counts["fusion_requests_waiting"] == 0
    assert counts["fusion_recompilations"] == 0
    assert counts["fusion_decode_chunks_total"] < counts["fusion_answer_tokens_total"] / 8  # rows shared their chunks


def test_a_second_turn_of_the_official_client_continues_the_first(client, server):
    """Without an image, since all questions guide this model's images."""
    said = [{"role": "user", "content": "Which colour is it?"}]
    later = [*said, {"role": "assistant", "content": "A red circle."}, {"role": "user", "content": "Describe it."}]

    def ask(messages):
        completion = client.chat.completions.create(model="fusion", messages=messages, max_tokens=8)
        return completion.choices[0].message.content

    first, whole = ask(said), ask(later)
    for _ in range(600):
        if not metrics(server)["fusion_programs_pending"]:
            break
        time.sleep(0.1)
    before = metrics(server)
    assert (ask(later), ask(said)) == (whole, first)
    counts = metrics(server)
    assert counts["fusion_prefix_hits_total"] - before["fusion_prefix_hits_total"] == 1
    assert counts["fusion_prefix_misses_total"] == before["fusion_prefix_misses_total"] > 0
    assert counts["fusion_prefix_bytes"] > 0 and counts["fusion_recompilations"] == 0


def test_the_key_is_not_in_the_log(server, folder):
    assert KEY not in (folder / "log.txt").read_text()


def test_a_stop_signal_lets_requests_finish(client, server, expected):
    pieces = client.chat.completions.create(model="fusion", messages=question(1), max_tokens=24, stream=True)
    first = next(pieces)
    os.kill(server[1].pid, signal.SIGTERM)
    rest = "".join(p.choices[0].delta.content or "" for p in (first, *pieces) if p.choices)
    assert rest == expected[1]
    assert server[1].wait(60) == 0
