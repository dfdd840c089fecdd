"""What requests may say, and what the API answers to the rest."""

import dataclasses
import io
import json

import pytest
from helpers.generation import picture
from helpers.requests import LIMITS, parse, shown
from PIL import Image

from fusion_jax.data.conversation import IMAGE_SLOT
from fusion_jax.server import protocol
from fusion_jax.server.protocol import ApiError


def test_a_conversation_becomes_turns_and_images():
    wanted = parse(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": shown(picture(1))},
            {"role": "assistant", "content": "A star."},
            {"role": "user", "content": "And?"},
        ],
        model="fusion",
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop="END",
    )
    assert [turn["from"] for turn in wanted.record.turns] == ["human", "gpt", "human"]
    assert wanted.record.system == "Be brief."
    assert wanted.record.turns[0]["value"] == IMAGE_SLOT + "\nWhat?"
    assert wanted.record.images == (picture(1),)
    assert wanted.stream and wanted.usage
    assert (wanted.how.max_tokens, wanted.how.temperature, wanted.how.top_p) == (9, 0.5, 0.9)
    assert (wanted.how.seed, wanted.how.stop) == (3, ("END",))


@pytest.mark.parametrize(
    ("messages", "keys", "status", "code"),
    [
        ([], {}, 400, "invalid_value"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], {}, 400, "invalid_value"),
        ([{"role": "robot", "content": "a"}], {}, 400, "invalid_value"),
        ([{"role": "user", "content": shown("data:image/png;base64,@@")}], {}, 400, "invalid_image_url"),
        ([{"role": "user", "content": shown("http://example.org/a.png")}], {}, 400, "invalid_image_url"),
        ([{"role": "user", "content": shown("file:///etc/hostname")}], {}, 400, "invalid_image_url"),
        ([{"role": "user", "content": shown(b"no image")}], {}, 400, "corrupt_image"),
        ([{"role": "user", "content": shown(picture(0, 101))}], {}, 400, "image_too_large"),
        ([{"role": "user", "content": shown(picture(0)) * 3}], {}, 400, "too_many_images"),
        (None, {"model": "another"}, 404, "model_not_found"),
        (None, {"max_tokens": 65}, 400, "invalid_value"),
        (None, {"max_tokens": "many"}, 400, "invalid_type"),
        (None, {"temperature": -1}, 400, "invalid_value"),
        (None, {"n": 2}, 400, "unsupported_value"),
        (None, {"n": True}, 400, "unsupported_value"),
        (None, {"logprobs": 0}, 400, "invalid_type"),
        (None, {"tools": {}}, 400, "unsupported_value"),
        (None, {"model": ["fusion"]}, 400, "invalid_type"),
        (None, {"max_tokens": 0}, 400, "invalid_value"),
        (None, {"max_completion_tokens": 0}, 400, "invalid_value"),
        (None, {"max_tokens": -(10**400)}, 400, "invalid_value"),
        (None, {"max_tokens": True}, 400, "invalid_type"),
        (None, {"temperature": 10**400}, 400, "invalid_value"),
        (None, {"top_k": 2**31}, 400, "invalid_value"),
        (None, {"stop": [""]}, 400, "invalid_value"),
        (None, {"stop": [[]]}, 400, "invalid_value"),
        (None, {"stream": 1}, 400, "invalid_type"),
        (["a"], {}, 400, "invalid_value"),
        ([{"role": ["user"], "content": "a"}], {}, 400, "invalid_value"),
        ([{"role": "user", "content": None}], {}, 400, "invalid_value"),
        ([{"role": "system", "content": "a"}], {}, 400, "invalid_value"),
        ([{"role": "user", "content": shown("data:image/png;base64,AA==AAAA")}], {}, 400, "invalid_image_url"),
        ([{"role": "user", "content": shown("data:image/png;base64,A A\n" * 300_000)}], {}, 400, "invalid_image_url"),
        ([{"role": "user", "content": "a" * 70_000}], {}, 400, "context_length_exceeded"),
        ([{"role": "user", "content": "a"}] * 20_000, {}, 400, "too_many_values"),
    ],
)
def test_wrong_requests_are_named(messages, keys, status, code):
    with pytest.raises(ApiError) as caught:
        parse(messages, **keys)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}


def test_what_is_no_json_is_named():
    odd = [
        '{"seed": NaN}',
        '{"seed": -Infinity}',
        '{"stop": "\\ud800"}',
        "[" * 300 + "]" * 300,
        '{"seed": %s}' % ("1" * 9000),
    ]
    odd += ['{"a": 1}{}', '{"a": "\x01"}', '{"a": 01}', "{'a': 1}", ""]
    unread = [text.encode(encoding) for text in ('{"seed": 1}',) for encoding in ("utf-16", "utf-32", "utf-8-sig")]
    for body in (
        b"{",
        b"[1]",
        b"\xff",
        b"[" * 10_000,
        b'{"a": "\xed\xa0\x80"}',
        *unread,
        *(text.encode() for text in odd),
    ):
        with pytest.raises(ApiError) as caught:
            protocol.parse(body, "fusion", LIMITS, None)
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_odd_json_that_is_json_is_taken():
    body = b' {"n": 1.0, "messages": [{"content": "\\ud83d\\ude00<image>", "role": "user"}], "seed": 1, "seed": 1e400} '
    with pytest.raises(ApiError, match="seed has the wrong type"):
        protocol.parse(body, "fusion", LIMITS, False)
    wanted = protocol.parse(
        body.replace(b"1e400", b"1180591620717411303424"), "fusion", LIMITS, False
    )  # the last one counts
    assert wanted.how.seed == 2**70
    assert wanted.record.literal and wanted.record.turns[0]["value"] == "\N{GRINNING FACE}<image>"


def test_messages_of_one_role_become_one_turn():
    roles = ("assistant", "system", "user", "user", "assistant", "assistant", "developer", "user", "system")
    wanted = parse([{"role": role, "content": str(k)} for k, role in enumerate(roles)])
    turns = [(turn["from"], turn["value"]) for turn in wanted.record.turns]
    assert turns == [("gpt", "0"), ("human", "2\n\n3"), ("gpt", "4\n\n5"), ("human", "6\n\n7\n\n8")]
    assert wanted.record.system == "1"
    wanted = parse([{"role": role, "content": str(k)} for k, role in enumerate(("system", "developer", "user"))])
    assert wanted.record.system == "0\n\n1" and wanted.record.turns == [{"from": "human", "value": "2"}]
    assert parse([{"role": "system", "content": ""}, {"role": "user", "content": "a"}]).record.system is None
    wanted = parse([{"role": "user", "content": shown(picture(k), str(k))} for k in range(2)])
    assert wanted.record.turns[0]["value"] == f"{IMAGE_SLOT}\n0\n\n{IMAGE_SLOT}\n1"
    assert wanted.record.images == (picture(0), picture(1))


@pytest.mark.parametrize("escaped", [False, True])
def test_an_image_of_many_pieces_is_read(escaped):
    """Longer than what is decoded at once, and with slashes that some programs escape."""
    image = Image.effect_noise((99, 99), 200).convert("RGB")
    file = io.BytesIO()
    image.resize((700, 700)).save(file, "BMP")
    limits = dataclasses.replace(LIMITS, image_pixels=10**6, image_bytes=4 << 20)
    body = json.dumps({"messages": [{"role": "user", "content": shown(file.getvalue())}]})
    body = body.replace("/", "\\/") if escaped else body
    assert protocol.parse(body.encode(), "fusion", limits, False).record.images == (file.getvalue(),)


def test_addresses_wait_to_be_fetched_and_are_looked_at_then():
    content = [*shown("https://a.example/x"), *shown(picture(1)), *shown("http://b.example/")]
    limits = dataclasses.replace(LIMITS, images=3)
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    wanted = protocol.parse(body, "fusion", limits, True)
    assert wanted.addresses == {0: "https://a.example/x", 2: "http://b.example/"}
    whole = wanted.with_fetched({0: picture(2), 2: picture(3)}, limits)
    assert whole.record.images == (picture(2), picture(1), picture(3)) and not whole.addresses
    with pytest.raises(ApiError) as caught:
        wanted.with_fetched({0: b"no image", 2: picture(3)}, limits)
    assert caught.value.code == "corrupt_image"
