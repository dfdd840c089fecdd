"""What requests may say, and what the API answers to the rest."""

import base64
import json

import pytest
from test_generate import picture

from fusion_jax.data.conversation import IMAGE_SLOT
from fusion_jax.serve import protocol
from fusion_jax.serve.protocol import ApiError, Limits

LIMITS = Limits(max_tokens=64, image_pixels=10_000, image_bytes=1 << 20, images=2)


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def shown(data, text="What?"):
    address = {"url": data_url(data) if isinstance(data, bytes) else data}
    return [{"type": "image_url", "image_url": address}, {"type": "text", "text": text}]


def parse(messages=None, fetcher=None, **keys):
    messages = [{"role": "user", "content": "Hi"}] if messages is None else messages
    return protocol.parse(json.dumps({"messages": messages, **keys}).encode(), "fusion", LIMITS, fetcher)


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
    assert wanted.record.turns[0]["value"] == "Be brief.\n\n" + IMAGE_SLOT + "\nWhat?"
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
        (None, {"stop": [""]}, 400, "invalid_value"),
    ],
)
def test_wrong_requests_are_named(messages, keys, status, code):
    with pytest.raises(ApiError) as caught:
        parse(messages, **keys)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}


def test_what_is_no_json_is_named():
    for body in (b"{", b"[1]", b"\xff", b"[" * 100_000):
        with pytest.raises(ApiError) as caught:
            protocol.parse(body, "fusion", LIMITS, None)
        assert caught.value.status == 400
