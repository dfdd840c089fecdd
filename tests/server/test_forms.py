"""Forms of answers: kept whatever is drawn; refused by name, and within seconds, where they cannot be or do harm."""

import dataclasses
import http.client
import json
import random
import signal
import string
import subprocess
import time

import numpy as np
import pytest
from helpers.echo_server import serving
from helpers.generation import QUESTIONS, config

from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.inference.prompts import Prompts, Steps
from fusion_jax.server.error import ApiError
from fusion_jax.server.grammar import Grammars
from fusion_jax.server.structured import read_form
from fusion_jax.synth.tokenizer import train_tokenizer

pytest.importorskip("llguidance")
V = 640


@pytest.fixture(scope="module", params=["phi3", "mistral"])
def grammars(request, tmp_path_factory):
    """Of models whose answers begin with a word, and with a space and a word."""
    tokenizer = load_tokenizer(train_tokenizer([*QUESTIONS, "A red circle."], tmp_path_factory.mktemp("t"), 600))
    prompts = Prompts(dataclasses.replace(config(), template=request.param), tokenizer, Steps())
    return Grammars(prompts, V)


def said(grammars, form, rng, most=60):
    """An answer of tokens that a model without preferences may give; None where it is not whole in so many."""
    matcher, ids = grammars.matcher(read_form(form)), []
    for _ in range(most):
        bits = np.full((1, V // 32), -1, np.int32)
        matcher.fill(bits, 0)
        allowed = np.nonzero(np.unpackbits(bits[0].view(np.uint8), bitorder="little"))[0]
        tokenizer = grammars._tokenizer
        assert all(i < tokenizer.vocab_size for i in allowed)
        stops = [i for i in allowed if tokenizer.is_control(i)]
        assert {*stops} <= {*grammars._stop_ids}
        token = int(rng.choice(allowed))
        if token in stops:
            break
        ids.append(token)
        matcher.take(token)
        if matcher.ended:
            break
    else:
        return None
    text = tokenizer.decode(ids, inside=True)
    assert text.startswith(matcher.prefix)
    return text.removeprefix(matcher.prefix)


def test_whatever_tokens_are_drawn_the_answer_has_its_form(grammars):
    rng = np.random.default_rng(0)
    choices = ["yes", "no", " a.b|c", 'é\n"/\\', "猫", "yes and no"]
    seen = {said(grammars, {"guided_choice": choices}, rng) for _ in range(60)}
    assert seen == {*choices}
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 3},
            "n": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    texts = [said(grammars, {"guided_json": schema}, rng, 200) for _ in range(12)]
    for one in [json.loads(text) for text in texts if text]:
        assert list(one) == ["name", "n"] and len(one["name"]) <= 3 and 1 <= one["n"] <= 9
    assert sum(text is not None for text in texts) > 3


def test_where_training_puts_a_space_before_an_answer_a_form_has_it_too(grammars, request):
    template = request.node.callspec.params["grammars"]
    assert grammars.matcher(read_form({"guided_choice": ["a"]})).prefix == {"phi3": "", "mistral": " "}[template]


CANNOT = [
    ({"guided_regex": "(a"}, "unclosed group"),
    ({"guided_regex": "(?=a)b"}, "look-ahead"),
    ({"guided_regex": r"(a)\1"}, "backreferences"),
    ({"guided_regex": r"[^\s\S]"}, "nothing satisfies it"),
    ({"guided_json": {"uniqueItems": True}}, 'not supported are the keywords ["uniqueItems"]'),
    ({"guided_json": {"type": "string", "format": "colour"}}, "Unknown format: colour"),
    ({"guided_json": {"type": "integer", "minimum": 5, "maximum": 2}}, "minimum (5) is greater than maximum (2)"),
    ({"guided_json": {"$ref": "#"}}, "nothing satisfies it"),
    ({"guided_json": {"$ref": "https://example.org/a.json"}}, "does not fetch resources"),
    ({"guided_regex": "((a{1,100}){1,100}){1,100}"}, "too many expressions"),
    ({"guided_json": {"properties": {f"p{i}": {} for i in range(2500)}}}, "items"),
    ({"guided_json": {"type": "integer", "multipleOf": 999983}}, "too much time or memory"),
]


@pytest.mark.parametrize(("form", "why"), CANNOT, ids=[why[:20] for _, why in CANNOT])
@pytest.mark.parametrize("grammars", ["phi3"], indirect=True)
def test_a_form_that_cannot_be_is_refused_with_the_reason(grammars, form, why):
    begun = time.monotonic()
    with pytest.raises(ApiError) as caught:
        grammars.matcher(read_form(form))
    assert time.monotonic() - begun < 20
    error = caught.value
    assert (error.status, error.param) == (400, next(iter(form))) and why in error.message, error.message
    assert error.message.startswith(f"{error.param} cannot be used: ") and len(error.message) < 400
    assert "x-guidance" not in error.message and "start:" not in error.message


@pytest.mark.parametrize("grammars", ["phi3"], indirect=True)
def test_a_form_that_was_good_is_not_tried_again(grammars, monkeypatch):
    form = read_form({"guided_regex": "[a-c]+"})
    grammars.matcher(form)
    monkeypatch.setattr(Grammars, "_check", lambda *_: pytest.fail("tried again"))
    assert grammars.matcher(form) is not grammars.matcher(form)


@pytest.mark.parametrize("grammars", ["phi3"], indirect=True)
def test_a_model_that_cannot_spell_a_choice_says_so(grammars, monkeypatch):
    monkeypatch.setattr(grammars, "_can_spell", lambda text: text != "猫")
    with pytest.raises(ApiError, match="cannot spell '猫'"):
        grammars.matcher(read_form({"guided_choice": ["a", "猫"]}))


@pytest.mark.parametrize("grammars", ["phi3"], indirect=True)
def test_a_common_form_is_not_too_complex_for_a_large_vocabulary(grammars, monkeypatch):
    from llguidance import LLTokenizer, TokenizerWrapper

    rng = random.Random(0)
    words = {"".join(rng.choices(f"{string.ascii_lowercase} AB0.", k=2 + k % 5)).encode() for k in range(100_000)}

    class Words:
        tokens = (*(bytes([byte]) for byte in range(256)), b"<end>", *sorted(words))
        eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)

        def __call__(self, text):
            return [*text]

    monkeypatch.setattr(grammars, "_words", LLTokenizer(TokenizerWrapper(Words())))
    matcher = grammars.matcher(read_form({"guided_regex": "[a-z]{1,20}"}))
    bits = np.zeros((1, -(-len(Words.tokens) // 32)), np.int32)
    matcher.fill(bits, 0)
    assert np.unpackbits(bits.view(np.uint8)).sum() > 10_000


@pytest.mark.parametrize("grammars", ["phi3"], indirect=True)
def test_digits_are_those_of_ascii_in_both_kinds_of_pattern(grammars):
    rng = np.random.default_rng(0)
    texts = {said(grammars, {"guided_regex": r"\d"}, rng) for _ in range(40)}
    texts |= {
        said(grammars, {"guided_json": {"type": "string", "pattern": r"^\d$"}}, rng).strip('"') for _ in range(40)
    }
    assert len(texts) > 5 and texts <= {*"0123456789"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("grammars", ["phi3"], indirect=True)
def test_a_form_is_not_blamed_for_a_server_that_is_stopped(grammars, number, monkeypatch):
    def run(command, **more):
        return subprocess.CompletedProcess(command, -number, b"", b"KeyboardInterrupt")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ApiError) as caught:
        grammars.matcher(read_form({"guided_regex": f"stopped by {number:d}"}))
    assert (caught.value.status, caught.value.code) == (503, "shutting_down")


def test_a_bad_form_is_refused_before_a_place_in_the_queue_is_taken(tmp_path):
    with serving(tmp_path) as server:
        places = server.engine.rows + server.engine.queue_limit
        for _ in range(places):
            server.engine.reserve()
        answers = []
        for form in ({"guided_regex": "(a"}, {}):
            body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **form})
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            connection.request("POST", "/v1/chat/completions", body)
            answer = connection.getresponse()
            answers.append((answer.status, json.load(answer)["error"]["param"]))
            connection.close()
        assert answers == [(400, "guided_regex"), (429, None)]
        for _ in range(places):
            server.engine.release()
