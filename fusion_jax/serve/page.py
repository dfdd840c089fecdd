"""A web page to chat about an uploaded image, streaming, on the API's address; attention pictures beside the answer."""

import contextlib
import hmac
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import fastapi
import gradio as gr
import jax

from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.sampling import Sampling
from fusion_jax.serve import protocol
from fusion_jax.serve.api import Options
from fusion_jax.serve.engine import Closing, Engine, Full
from fusion_jax.serve.pictures import Busy, Pictures, suggested

log = logging.getLogger("fusion_jax")

_STYLE = """
footer {display: none !important}
#image {max-height: 45vh}
#picture .image-container {padding-top: 36px}  /* its label and buttons lie over nothing */
:is(#picture, #chat) .wrap:has(.error) {display: none}  /* the message is shown; what stood there stays legible */
@media (max-width: 700px) {#image {max-height: 30vh}}
"""
_INTO_VIEW = """
() => setTimeout(() => document.querySelector("#picture")?.scrollIntoView({block: "nearest", behavior: "smooth"}), 400)
"""
_KEPT = (3600, 24 * 3600)  # seconds: how often uploads and pictures are looked through, and how long they are kept


def mount(app: fastapi.FastAPI, engine: Engine, options: Options, pictures: Pictures) -> fastapi.FastAPI:
    """The application with the page at /. Where there is an API key the page asks for it as the password."""
    ask = None
    if options.api_key:

        def ask(user: str, password: str) -> bool:
            return hmac.compare_digest(password.encode(), options.api_key.encode())

    return gr.mount_gradio_app(
        app,
        make_page(engine, options, pictures),
        path="/",
        auth=ask,
        css=_STYLE,
        max_file_size=options.limits.image_bytes,
        footer_links=[],
    )


def make_page(engine: Engine, options: Options, pictures: Pictures) -> gr.Blocks:
    """An image, a conversation, a line to write in; a word to look for and its picture."""

    def reply(question, image, history, temperature, length):
        """Yields the conversation, the line to write in and words to look for, again while the answer grows."""
        question = (question or "").strip()
        if not question:
            raise _error("Write a question first.")
        history = [*history, {"role": "user", "content": question}]
        record = _record(history, image, options)
        how = Sampling(max_tokens=int(length), temperature=temperature)
        found = suggested(question) if image else []
        yield [*history, _said("…")], "", gr.Radio(found, value=None, visible=bool(found))
        answer = ""
        with _errors():
            for piece in engine.answer(record, how, options.timeout):
                answer += piece
                yield [*history, _said(answer)], "", gr.skip()
        yield [*history, _said(answer or "(no words)")], "", gr.skip()

    def look(word, image, history):
        """The picture of a word of the last question."""
        asked = [_text(message["content"]) for message in history if message["role"] == "user"]
        for missing, what in ((not image, "Upload an image"), (not asked, "Ask a question")):
            if missing:
                raise _error(f"{what} first.")
        word = (word or "").strip()
        if not word:
            raise _error("Write a word of your last question first.")
        data = _checked(image, options)
        with _errors():
            drawn = pictures.draw(data, asked[-1].strip(), word)
        return gr.Image(drawn, visible=True, alt_text=f"Where the model looks for {word}")

    longest = options.limits.max_tokens
    with gr.Blocks(title=options.model, analytics_enabled=False, fill_width=True, delete_cache=_KEPT) as page:
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                # Without a mode Gradio hands the file on undecoded: our own limits come first.
                image = gr.Image(
                    type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"], elem_id="image"
                )
                with gr.Accordion("Settings", open=False):
                    temperature = gr.Slider(0, 2, 0, label="Temperature (0: the likeliest words)")
                    length = gr.Slider(1, longest, min(256, longest), step=1, label="Longest answer in tokens")
            with gr.Column(scale=3, min_width=280):
                chat = gr.Chatbot(label="Conversation", height="60vh", elem_id="chat", buttons=["copy", "copy_all"])
                with gr.Row():
                    question = gr.Textbox(
                        show_label=False,
                        placeholder="Ask about the image; Enter sends",
                        autofocus=True,
                        scale=5,
                        max_lines=4,
                        elem_id="question",
                    )
                    send = gr.Button("Ask", variant="primary", scale=1, min_width=72, elem_id="ask")
                with gr.Row():
                    stop = gr.Button("Stop", size="sm", min_width=100)
                    clear = gr.Button("New conversation", size="sm", min_width=100)
            with gr.Column(scale=3, min_width=280):
                word = gr.Textbox(
                    label="Word to look for",
                    placeholder="A word of the last question; Enter draws",
                    max_lines=1,
                    elem_id="word",
                )
                words = gr.Radio(show_label=False, container=False, visible=False, elem_id="words")
                show = gr.Button("Show attention", size="sm", elem_id="show")
                picture = gr.Image(
                    label="Where the model looks for the word",
                    format="png",
                    interactive=False,
                    visible=False,
                    buttons=["fullscreen", "download"],
                    elem_id="picture",
                )
        private = {"api_visibility": "private"}
        asked = gr.on(
            [question.submit, send.click],
            reply,
            [question, image, chat, temperature, length],
            [chat, question, words],
            concurrency_limit=engine.rows + engine.queue_limit,
            **private,
        )
        stop.click(None, cancels=[asked], **private)
        # Each caller is told at once that another picture is being made: Gradio's queue would have no end.
        drawing = {"fn": look, "outputs": [picture], "concurrency_limit": None, **private}
        seen = gr.on([word.submit, show.click], inputs=[word, image, chat], **drawing)
        # Whoever goes through the words by keyboard gets the picture of the one where he stops.
        pressed = words.input(inputs=[words, image, chat], trigger_mode="always_last", **drawing)
        words.input(lambda chosen: chosen, words, word, **private)
        for one in (seen, pressed):
            one.success(None, js=_INTO_VIEW, **private)
        # Another word or image: the word that was pressed may be pressed again.
        word.input(None, None, words, js="() => null", **private)
        image.change(lambda: (gr.Image(None, visible=False), None), None, [picture, words], **private)
        clear.click(
            lambda: ([], None, "", "", gr.Radio([], value=None, visible=False)),
            None,
            [chat, image, question, word, words],
            cancels=[asked, seen, pressed],
            **private,
        )
    return page


def _error(text: str) -> gr.Error:
    return gr.Error(text, print_exception=False)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What the engine refuses, as the page says it."""
    try:
        yield
    except Full as error:
        raise _error("Too many requests are waiting; try again.") from error
    except Busy as error:
        raise _error("Another picture is being drawn; try again in a few seconds.") from error
    except Closing as error:
        raise _error(f"The engine has failed: {error}" if str(error) else "The server is shutting down.") from error
    except (BadRecord, UserError) as error:
        raise _error(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        log.exception("the device failed")
        raise _error("The device failed, or has no memory left for this; the server's log says why.") from error


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _record(history: list[dict], image: str | None, options: Options) -> Record:
    """The conversation on the page as a prompt. The image stands at its first question."""
    images = ()
    if image is not None:
        images = (_checked(image, options),)
    turns = []
    for message in history:
        who = "human" if message["role"] == "user" else "gpt"
        text = _text(message["content"])
        # After an error a question stands without an answer: the next one takes its place.
        if turns and turns[-1]["from"] == who:
            turns.pop()
        turns.append({"from": who, "value": text})
    return Record(
        "page", None, list(itertools.dropwhile(lambda t: t["from"] == "gpt", turns)), "the page", images, literal=True
    )


def _checked(image: str, options: Options) -> bytes:
    """The image's bytes, within the limits."""
    data = Path(image).read_bytes()
    try:
        protocol.check_image(data, options.limits, "image")
    except protocol.ApiError as error:
        raise _error(error.message) from error
    return data


def _text(content) -> str:
    """Gradio gives texts back as lists of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))
