"""What the page says where something goes wrong, and that nothing of it stays: by its requests, and in a browser."""

import re
import shutil

import pytest
from helpers.page_site import png, served

from fusion_jax.errors import BadRecord, UserError
from fusion_jax.server.requests import Full

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ASK = ("textbox", "image", "slider", "slider")
ALERT = '<p role="alert" class="problem">'


class Broken:
    """Lets an engine fail: before its answer, or in the middle of it."""

    def __init__(self, engine, monkeypatch):
        self.error, self.pieces, self.engine, self._prepare = None, 0, engine, engine.prepare
        monkeypatch.setattr(engine, "answer", self.answer)
        monkeypatch.setattr(engine, "prepare", self.prepare)

    def prepare(self, record):
        if isinstance(self.error, BadRecord):
            raise self.error
        return self._prepare(record)

    def answer(self, record, how, timeout):
        assert self.engine.go.wait(20)
        yield from ["A red ", "circle."][: self.pieces if self.error else 2]
        if self.error:
            raise self.error


@pytest.fixture
def broken(site, monkeypatch):
    return Broken(site[1], monkeypatch)


def texts(chat):
    return [message["content"][0]["text"] for message in chat]


ERRORS = [
    (Full(), "Too many requests are waiting; try again."),
    (BadRecord("too_long", "the page", "has 375 positions"), "The question does not fit into the conversation."),
    (BadRecord("too_many_rounds", "the page", "has 5 rounds"), "The question does not fit into the conversation."),
    (BadRecord("corrupt_image", "the page", "the image is cut off"), "The image is cut off."),
    (UserError("The answer was not finished: timeout."), "The answer was not finished: timeout."),
    (ZeroDivisionError("secret"), "The server failed; its log says why."),
]


@pytest.mark.parametrize(("error", "written"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
def test_after_an_error_the_question_is_in_the_line_again_and_nowhere_else(site, visitor, broken, error, written):
    visitor.ask("First?")
    broken.error = error
    chat, line, _, state, _ = visitor.ask("Second?")
    assert texts(chat) == ["First?", "A red circle."] and line == "Second?"
    assert state.startswith(f"{ALERT}{written}</p><p>Round 2 of 40; about") and "secret" not in state
    broken.error = None
    chat, line, _, state, _ = visitor.ask("Third?")
    assert texts(chat) == ["First?", "A red circle.", "Third?", "A red circle."] and not line
    assert ALERT not in state and "Round 3 of 40" in state
    written = [turn["value"] for turn in site[1].records[-1].turns]
    assert written == ["First?", "A red circle.", "Third?"]


def test_an_answer_that_breaks_off_stays_as_far_as_it_came(site, visitor, broken):
    broken.error, broken.pieces = UserError("The answer was not finished: timeout."), 1
    chat, line, _, state, _ = visitor.ask("First?")
    assert texts(chat) == ["First?", "A red "] and not line and ALERT in state
    broken.error = None
    assert texts(visitor.ask("Second?")[0]) == ["First?", "A red ", "Second?", "A red circle."]


def test_any_other_action_takes_a_message_away(visitor, broken):
    shown = {"look": ("textbox", "image"), "image": ("image",)}
    broken.error = Full()
    assert ALERT in visitor.ask("First?")[3]
    assert ALERT in visitor.run(visitor.number(*shown["look"]), ["First", None])[2]
    for number, kinds in visitor.kinds.items():
        if kinds == ["image"]:  # another image, Stop, and the conversation's own button
            values = visitor.run(number, [None])
            assert ALERT not in "".join(value for value in values if isinstance(value, str))
            assert any(isinstance(value, str) and "words fit" in value for value in values)
    broken.error = None
    *_, state, missed = visitor.ask("Second?")
    assert ALERT not in state and not missed


def test_messages_are_text(visitor, broken):
    broken.error = UserError("<b>${alert(1)}{{this}}`</b>")
    state = visitor.ask("First?")[3]
    assert "&lt;b&gt;&#36;&#123;alert(1)}&#123;&#123;this}}&#96;&lt;/b&gt;" in state


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_no_error_that_is_over(tmp_path, monkeypatch):
    sync_api = pytest.importorskip("playwright.sync_api")
    name = tmp_path / "mein Öl bild.png"
    name.write_bytes(png())
    with served() as (address, engine), sync_api.sync_playwright() as play:
        broken = Broken(engine, monkeypatch)
        chromium = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(30_000)
        page.goto(address)
        state, chat, line = page.locator("#state"), page.locator("#chat"), page.locator("#question textarea")

        def ask(text):
            line.fill(text)
            page.keyboard.press("Enter")

        state.get_by_text("Round 1 of 40; about").wait_for()
        (tmp_path / "none.png").write_text("no image")
        page.locator("#image input[type=file]").set_input_files(tmp_path / "none.png")
        page.locator(".toast-body").get_by_text("This image cannot be used").wait_for()
        page.locator("#image input[type=file]").set_input_files(name)
        page.locator(".toast-body").wait_for(state="detached", timeout=5000)  # Gradio itself leaves it for ten seconds
        page.locator("#image img").first.wait_for()
        state.get_by_text(re.compile(r"words fit\.$")).wait_for()  # no longer "fewer beside an image"
        broken.error = Full()
        ask("First?")
        state.get_by_text("Too many requests are waiting; try again.").wait_for()
        assert line.input_value() == "First?" and "…" not in chat.inner_text() and "First?" not in chat.inner_text()
        page.locator("#word input").fill("dog")
        page.locator("#show").click()
        page.locator("#missed").get_by_text("Ask a question first.").wait_for()
        assert "Too many" not in state.inner_text()
        broken.error = None
        ask("Second?")
        state.get_by_text("Round 2 of 40; about").wait_for()
        assert "A red circle." in chat.inner_text() and not page.locator("#missed").inner_text().strip()
        assert not page.locator(".error:visible, .toast-body:visible, .problem:visible").count()
        assert engine.records[-1].images == (png(),)

        # Stop before the first word: no dots stay.
        engine.go.clear()
        ask("Third?")
        chat.get_by_text("…").first.wait_for()
        state.get_by_text("Answering").wait_for()
        page.get_by_role("button", name="Stop").click()
        state.get_by_text("Round 2 of 40; about").wait_for()
        assert line.input_value() == "Third?" and "…" not in chat.inner_text() and "Third?" not in chat.inner_text()
        engine.go.set()
        chromium.close()
