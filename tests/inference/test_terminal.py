"""The terminal chat's commands, over a model that says what it was asked."""

import json

import numpy as np
import pytest
from PIL import Image

from fusion_jax.errors import UserError
from fusion_jax.inference.sampling import Sampling
from fusion_jax.inference.terminal import Chat


class Echo:
    """Answers with the number of turns and the image's name, in two pieces; stops in mid-answer if told so."""

    interrupt = False

    def stream(self, record, how):
        yield f"{len(record.turns)} "
        if self.interrupt:
            raise KeyboardInterrupt
        yield record.image_path.stem if record.image_path else "text"


@pytest.fixture
def chat(tmp_path):
    for name in ("cat", "dog"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{name}.png")
    written = []
    chat = Chat(Echo(), Sampling(), str(tmp_path / "cat.png"), written.append)
    chat.written = lambda: "".join(written[-3:])
    return chat


def test_rounds_add_up_and_reset_begins_again(chat):
    assert chat.handle("What?") and chat.written() == "1 cat\n"
    chat.handle("And?")
    assert chat.written() == "3 cat\n"
    chat.handle("/reset")
    chat.handle("What?")
    assert chat.written() == "1 cat\n"
    assert not chat.handle("/quit")


def test_another_image_begins_again_and_a_wrong_one_changes_nothing(chat, tmp_path):
    chat.handle("What?")
    chat.handle(f"/image {tmp_path / 'none.png'}")
    assert "error: " in chat.written() and len(chat.turns) == 2
    chat.handle(f"/image {tmp_path / 'dog.png'}")
    chat.handle("What?")
    assert chat.written() == "1 dog\n"
    chat.handle("/image")
    chat.handle("What?")
    assert chat.written() == "1 text\n"
    with pytest.raises(UserError, match="none"):
        Chat(Echo(), Sampling(), str(tmp_path / "none.png"), print)


def test_a_conversation_is_saved_as_a_record(chat, tmp_path):
    chat.handle("/save")
    assert "Name the file" in chat.written()
    chat.handle("What?")
    chat.handle(f"/save {tmp_path / 'saved.json'}")
    [record] = json.loads((tmp_path / "saved.json").read_text())
    assert record["image"].endswith("cat.png")
    assert record["conversations"] == [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "1 cat"},
    ]


def test_a_stopped_answer_counts_as_far_as_it_came(chat):
    chat.answerer.interrupt = True
    chat.handle("What?")
    assert chat.turns[-1]["value"] == "1 " and "[stopped]" in chat.written()
    chat.handle("/what")
    assert "/image FILE" in chat.written()


def test_what_is_typed_is_text_and_what_is_said_steers_no_terminal(chat, tmp_path, monkeypatch):
    records = []

    def stream(record, how):
        records.append(record)
        yield "a\x1b]0;title\x07b\r\x9b2J\n\tc"

    monkeypatch.setattr(chat.answerer, "stream", stream)
    chat.handle("<image> <|end|>")
    assert records[0].literal and records[0].turns[-1]["value"] == "<image> <|end|>"
    assert "a]0;titleb2J\n\tc" in chat.written()
    chat.handle(f"/save {tmp_path / 'saved.json'}")
    [record] = json.loads((tmp_path / "saved.json").read_text())
    assert record["conversations"][0]["value"] == "<image>\n <|end|>"  # a second tag would be a second image
