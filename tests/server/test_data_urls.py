"""Images in requests as people and their programs write them: data URLs, and addresses to be fetched."""

import base64
import json
import math
from urllib.parse import quote

import pytest
from helpers.generation import picture

from fusion_jax.server import data_urls, json_body, protocol
from fusion_jax.server.protocol import ApiError, Limits

PNG = picture(1)
TEXT = base64.b64encode(PNG).decode()
LIMITS = Limits(max_tokens=64, images=2, text_bytes=2000, image_bytes=8 << 20)
ADVICE = "What is it?\nSay:\n1, 2"


def parse(address, change=str, urls=False, limits=LIMITS):
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": ADVICE}]
    body = change(json.dumps({"messages": [{"role": "user", "content": content}]}))
    return protocol.parse(body.encode(), "fusion", limits, urls)


def lines(text, width=76, end="\n"):
    return end.join(text[at : at + width] for at in range(0, len(text), width))


WRITTEN = [
    "data:image/png;base64," + TEXT,
    "DATA:IMAGE/PNG;BASE64," + TEXT,
    "Data:Image/Png;charset=UTF-8;Base64," + TEXT,
    " \n data:image/png;base64," + TEXT + " \r\n",
    "data:image/png; base64 , " + TEXT,
    "data:image/png;base64," + lines(TEXT),
    "data:image/png;base64,\r\n" + lines(TEXT, 64, "\r\n\t"),
    "data:image/png;base64," + TEXT.rstrip("="),
    "data:image/png;base64," + TEXT.translate(str.maketrans("+/", "-_")),
    "data:image/png;base64," + TEXT.translate(str.maketrans("+/", "-_")).rstrip("="),
    "data:image/png;base64," + quote(TEXT, safe=""),
    "data:image/png;base64," + quote(lines(TEXT)),
    "data:image/png;name=mein%20Bild.png;base64," + TEXT,
    "data:image/png;name=mein Öl.png;base64," + TEXT,
    "data:image/svg+xml;base64," + TEXT,
    "data:;base64," + TEXT,
    "data:base64," + TEXT,
    "data:application/octet-stream;base64;charset=utf-8," + TEXT,
    "data:image/png," + quote(PNG),
    "data:," + "".join(f"%{byte:02x}" for byte in PNG),
]


@pytest.mark.parametrize("address", WRITTEN, ids=[address.strip()[:40] for address in WRITTEN])
def test_data_urls_are_taken_as_people_write_them(address):
    assert base64.b64decode(TEXT) == PNG and {"+", "/", "="} <= {*TEXT}
    wanted = parse(address)
    assert wanted.record.images == (PNG,) and wanted.record.turns[0]["value"].endswith(ADVICE)


ESCAPES = {
    "slashes": lambda body: body.replace("/", "\\/"),
    "web": lambda body: body.replace("+", "\\u002B").replace("=", "\\u003d").replace("/", "\\u002f"),
    "lines": lambda body: body.replace("QQ", "QQ\\r\\n").replace("AA", "A\\u000AA"),
}


@pytest.mark.parametrize("change", ESCAPES.values(), ids=ESCAPES)
@pytest.mark.parametrize("copies", [1, 3])
def test_large_ones_with_escapes_of_json_are_no_text(change, copies, monkeypatch):
    """However an escape lies between the pieces, and far beyond the bytes that texts may have."""
    monkeypatch.setattr(json_body, "_PIECE", 997)
    monkeypatch.setattr(data_urls, "_PIECE", 499)
    monkeypatch.setattr(protocol, "check_image", lambda *_: None)
    data = PNG * math.ceil((copies * json_body._SMALL) / len(PNG))
    for address in ("data:image/png;base64,", "DATA:image/svg+xml;charset=utf-8;base64,"):
        wanted = parse(address + base64.b64encode(data).decode(), change)
        assert wanted.record.images == (data,) and wanted.record.turns[0]["value"].endswith(ADVICE)
    wanted = parse("data:image/png," + quote(data))
    assert wanted.record.images == (data,)


@pytest.mark.parametrize("piece", [7, 8, 9, 10, 11])
def test_no_escape_is_left_between_pieces(piece, monkeypatch):
    """One would make the parser keep the whole text twice."""
    monkeypatch.setattr(json_body, "_PIECE", piece)
    written = b'"data:;base64,' + b"A\\u002B\\/B\\nC\\u003dD" * 9 + b'"'
    assert json_body._unescaped(written, [(0, len(written))]).getvalue() == b'"data:;base64,' + b"A+/BC=D" * 9 + b'"'


def test_words_that_begin_like_one_keep_their_line_breaks():
    limits = Limits(max_tokens=64, text_bytes=1 << 20)
    for text in ("data: one\n", "Data:\n1,2\n3,4\n" * 9000, "data:a;base64,are these\nletters?\n" * 4000):
        body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
        assert protocol.parse(body, "fusion", limits, False).record.turns[0]["value"] == text


@pytest.mark.parametrize(
    ("address", "code", "sentence"),
    [
        ("data:", "invalid_image_url", "with a comma before the data"),
        ("data:image/png;base64", "invalid_image_url", "with a comma before the data"),
        ("data:image/png;base64,", "invalid_image_url", "holds no data"),
        ("data:image/png;base64, \n", "invalid_image_url", "holds no data"),
        ("data:image/png;base64,@@", "invalid_image_url", "not valid base64"),
        ("data:image/png;base64," + TEXT[:41], "invalid_image_url", "not valid base64"),
        ("data:image/png;base64,AA==AAAA", "invalid_image_url", "not valid base64"),
        ("data:image/png;base64,AAAA====", "invalid_image_url", "not valid base64"),
        ("data:image/png;base64,%zz", "invalid_image_url", "not valid base64"),
        ("data:image/png;base64,ä" + TEXT, "invalid_image_url", "not valid base64"),
        ("data:image/png;base64,💡" + TEXT, "invalid_image_url", "not valid base64"),
        ("data:image/png,a text", "corrupt_image", "no image of a known format"),
        ("data:text/plain;base64,aGk=", "corrupt_image", "no image of a known format"),
        ("data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>", "corrupt_image", "known format"),
        ("data:image/png;base64," + "A" * (12 << 20), "image_too_large", "over 8388608 bytes"),
        ("data:image/png;base64," + "ä" * 500_000, "invalid_image_url", "base64"),
        (TEXT, "invalid_image_url", "must be a data URL"),
        ("", "invalid_image_url", "must be a data URL"),
        ("'data:image/png;base64," + TEXT, "invalid_image_url", "must be a data URL"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_what_is_none_is_said(address, code, sentence):
    with pytest.raises(ApiError, match=sentence) as caught:
        parse(address)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_addresses_are_taken_as_people_write_them():
    assert parse(" HTTPS://Example.org/Öl bild.png\n", urls=True).addresses == {0: "HTTPS://Example.org/Öl bild.png"}
    with pytest.raises(ApiError, match="must be a data, http or https URL"):
        parse("example.org/a.png", urls=True)
