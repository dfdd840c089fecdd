"""Every text of a request's messages is in the prompt, once, in its order and letter by letter; nothing else is."""

import dataclasses
import itertools
import json
import random
import re

import pytest
from helpers.generation import QUESTIONS, config, picture
from helpers.requests import LIMITS, data_url, parse

from fusion_jax.data.conversation import IMAGE_SLOT
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.inference.prompts import Prompts, Steps
from fusion_jax.server import protocol
from fusion_jax.server.error import ApiError
from fusion_jax.synth.tokenizer import train_tokenizer

WORDS = ("Qa <image>", "Qb <|end|>", "Qc\n", " Qd", "Qe [/INST]", "Qf", "Qg", "Qh", "Qi")


@pytest.fixture(scope="module", params=["phi3", "mistral"])
def prompts(request, tmp_path_factory):
    """With a place for a system text, and without."""
    tokenizer = load_tokenizer(train_tokenizer([*QUESTIONS, *WORDS], tmp_path_factory.mktemp("t"), 600))
    return Prompts(dataclasses.replace(config(), template=request.param), tokenizer, Steps())


def prompted(prompts, messages):
    """The prompt of messages without images, as text."""
    ids = prompts.example(parse(messages).record).input_ids
    return prompts.tokenizer.decode(ids[ids >= 0], skip_special=False)


def conversations():
    """Of every order of up to four roles before the user's last word, and longer ones at random."""
    roles = ("system", "developer", "user", "assistant")
    for count in range(4):
        yield from itertools.product(roles, repeat=count)
    rng = random.Random(0)
    for _ in range(60):
        yield [rng.choice(roles) for _ in range(rng.randrange(4, 8))]


def test_no_text_is_lost_and_none_is_added(prompts):
    empty = prompted(prompts, [{"role": "user", "content": "Qz"}]).replace("Qz", "")
    marks = set(re.findall(r"<[^>]*>|\[/?INST\]|\S+", empty)) | {"</s>", "<|assistant|>", "<|end|>"}
    for roles in conversations():
        pairs = [*zip((*roles, "user"), WORDS)]
        text = prompted(prompts, [{"role": role, "content": word} for role, word in pairs])
        words = [word.strip() for _, word in pairs]
        in_order = sorted(words, key=text.index)
        assert all(text.count(word) == 1 for word in words), (roles, text)
        # A system text before the user's first word has a place of its own, in front.
        first = [role for role, _ in pairs].index("user")
        front = [word.strip() for role, word in pairs[:first] if role in ("system", "developer")]
        spoken = [word for word in words if word not in front]
        assert [word for word in in_order if word not in front] == spoken, (roles, text)
        assert [word for word in in_order if word in front] == front, (roles, text)
        rest = text
        for word in sorted(words, key=len, reverse=True):
            rest = rest.replace(word, " ", 1)
        left = set(re.findall(r"<[^>]*>|\[/?INST\]|\S+", rest))
        assert left <= marks, (roles, left - marks)


def test_a_greeting_stands_in_front_as_an_answer_does_between_rounds(prompts):
    last_question = {"role": "user", "content": "Qf"}
    greeted = prompted(prompts, [{"role": "assistant", "content": "Qg"}, last_question])
    later = prompted(
        prompts, [{"role": "user", "content": "Qh"}, {"role": "assistant", "content": "Qg"}, last_question]
    )
    assert greeted.endswith(later[later.index("Qg") :])
    template = prompts.template
    assert template.greeting.strip() in greeted[: greeted.index("Qg")]
    assert template.greeting.strip() == ("<|assistant|>" if template.name == "phi3" else "[INST]  [/INST]")
    # A data set's is left out, as its training was.
    record = parse([{"role": "assistant", "content": "Qg"}, last_question]).record
    ids = prompts.example(dataclasses.replace(record, literal=False)).input_ids
    assert "Qg" not in prompts.tokenizer.decode(ids, skip_special=False)


def test_text_parts_are_one_text_and_images_lead_it_on_lines_of_their_own():
    image = {"type": "image_url", "image_url": {"url": data_url(picture(1)), "detail": "high"}}
    text = [{"type": "text", "text": word} for word in ("Is", " it", "\n?")]
    for parts, expected in (
        (text, "Is it\n?"),
        ([image, *text], f"{IMAGE_SLOT}\nIs it\n?"),
        ([text[0], image, *text[1:]], f"Is{IMAGE_SLOT} it\n?"),
        ([*text, image], f"Is it\n?{IMAGE_SLOT}"),
        ([image, image, text[0]], f"{IMAGE_SLOT}\n{IMAGE_SLOT}\nIs"),
    ):
        assert parse([{"role": "user", "content": parts}]).record.turns[0]["value"] == expected
    parts = [*text[:1], {"type": "refusal", "refusal": " I cannot."}]
    wanted = parse([{"role": "assistant", "content": parts}, {"role": "user", "content": "a"}])
    assert wanted.record.turns[0]["value"] == "Is I cannot."


@pytest.mark.parametrize(
    ("message", "content_text"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": "", "refusal": None, "tool_calls": None, "audio": None, "annotations": []}, ""),
        ({"content": None, "refusal": "I cannot.", "function_call": None, "tool_calls": []}, "I cannot."),
        ({"content": "So far.", "refusal": "No more."}, "So far.\n\nNo more."),
        ({"content": "A <image> and <|end|>", "name": "bot"}, "A <image> and <|end|>"),
    ],
)
def test_an_assistants_message_may_be_a_refusal_or_no_words(message, content_text):
    user = {"role": "user", "content": "a"}
    wanted = parse([user, {"role": "assistant", **message}, user])
    assert wanted.record.turns[1] == {"from": "gpt", "value": content_text}
    assert len(wanted.record.turns) == 3


@pytest.mark.parametrize(
    ("message", "where", "code"),
    [
        ({"role": "user", "content": None}, "messages[0]", "invalid_value"),
        ({"role": "user"}, "messages[0]", "invalid_value"),
        ({"role": "user", "content": []}, "messages[0]", "invalid_value"),
        ({"role": "system", "content": {"text": "a"}}, "messages[0]", "invalid_value"),
        ({"role": "tool", "content": "a", "tool_call_id": "1"}, "messages[0]", "unsupported_value"),
        ({"role": "function", "content": "a", "name": "f"}, "messages[0]", "unsupported_value"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "messages[0].tool_calls", "unsupported_value"),
        ({"role": "assistant", "content": "a", "audio": {"id": "1"}}, "messages[0].audio", "unsupported_value"),
        ({"role": "assistant", "reasoning_content": "Hm"}, "messages[0].reasoning_content", "unsupported_value"),
        ({"role": "user", "contents": "a"}, "messages[0].contents", "unknown_parameter"),
        ({"role": "user", "content": "a", "refusal": "b"}, "messages[0].refusal", "unknown_parameter"),
        (
            {"role": "user", "content": [{"type": "text", "txt": "a"}]},
            "messages[0].content[0].txt",
            "unknown_parameter",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]", "invalid_type"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "a"}]}, "messages[0].content[0]", "invalid_value"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0]", "invalid_value"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0]", "invalid_value"),
        ({"role": "user", "content": "a", "name": ["b"]}, "messages[0]", "invalid_type"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "detail": "low"}}]},
            "messages[0].content[0].image_url.detail",
            "unsupported_value",
        ),
    ],
)
def test_what_a_message_cannot_be_is_named(message, where, code):
    with pytest.raises(ApiError) as caught:
        parse([message, {"role": "user", "content": "a"}])
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, where, code)


def test_names_that_tell_speakers_of_one_role_apart_are_refused():
    named = [{"role": "user", "content": "a", "name": name} for name in ("Ann", "Ann", None, "Bob")]
    assert parse(named[:3]).record.turns[0]["value"] == "a\n\na\n\na"
    with pytest.raises(ApiError, match=r"messages\[3\]: several names of one role \(user\)"):
        parse(named)


def test_the_clients_own_answer_may_be_sent_back():
    """`message.model_dump()` of the official client, all keys."""
    openai = pytest.importorskip("openai")
    answer = protocol.completion("n", "fusion", 0, "A star.", "stop", protocol.usage(1, 2))
    message = openai.types.chat.ChatCompletion.model_validate(answer).choices[0].message.model_dump()
    body = json.dumps({"messages": [message, {"role": "user", "content": "a"}]}).encode()
    assert protocol.parse(body, "fusion", LIMITS, False).record.turns[0]["value"] == "A star."
