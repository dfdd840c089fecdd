"""A web page to chat about an uploaded image, streaming, on the API's address; attention pictures beside the answer."""

import asyncio
import contextlib
import functools
import html
import io
import logging
import re
import threading
from collections.abc import AsyncIterator, Iterator

import fastapi
import jax
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.routing import Match, Mount

from fusion_jax.serve import gradio_alone  # isort: split

import gradio as gr

from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.sampling import Sampling
from fusion_jax.serve import protocol
from fusion_jax.serve.addresses import page_methods
from fusion_jax.serve.api import Options
from fusion_jax.serve.engine import Closing, Engine, Full
from fusion_jax.serve.gate import Gate
from fusion_jax.serve.pictures import Busy, Pictures, suggested
from fusion_jax.serve.talks import Talks, browser
from fusion_jax.serve.uploads import NoRoom, Uploads

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
_SWEPT = 600  # seconds between looks through the uploads
_SESSIONS = 256  # pages that Gradio keeps the state of
_READING = 4  # images that are in memory and decoded at once


def mount(app: fastapi.FastAPI, engine: Engine, options: Options, pictures: Pictures) -> fastapi.FastAPI:
    """The application with the page at /, behind `Gate`."""
    uploads = Uploads(gradio_alone.FOLDER, options.limits.upload_bytes)
    page = make_page(engine, options, pictures, uploads)
    site = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        css=_STYLE,
        max_file_size=options.limits.image_bytes,
        footer_links=[],
        # The rest says what Gradio's environment or later defaults could change.
        allowed_paths=[],
        show_error=False,
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )
    before = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(_SWEPT)
                await run_in_threadpool(uploads.sweep)

        sweeping = asyncio.create_task(sweep())
        try:
            async with before(app), site.router.lifespan_context(site):
                yield
        finally:
            sweeping.cancel()
            uploads.close()

    app.router.lifespan_context = lifespan
    app.router.routes.append(_Page("/", Gate(site, uploads, events(page), options, functools.partial(_pending, page))))
    return app


class _Page(Mount):
    """The page's addresses alone: all others are answered as they are without the page."""

    def matches(self, scope) -> tuple[Match, dict]:
        return super().matches(scope) if page_methods(scope["path"]) else (Match.NONE, {})


def _pending(page: gr.Blocks, session: str) -> bool:
    """Whether Gradio has a message for a session, or an event of it that is not over."""
    queue = page._queue
    messages = queue.pending_messages_per_session.get(session)
    if messages is None:
        return False
    known = queue.pending_event_ids_session.get(session, ())
    return not messages.empty() or any(event in queue.event_ids_to_events for event in known)


def events(page: gr.Blocks) -> dict[int, list[str]]:
    """For each function of the page that a browser may ask for, by its number, the kinds of its inputs."""
    config = page.get_config_file()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    inputs_of = {d["id"]: [kinds[i] for i in d["inputs"]] for d in config["dependencies"] if d["backend_fn"]}
    unknown = {kind for inputs in inputs_of.values() for kind in inputs} - {"textbox", "radio", "slider", "image"}
    assert not unknown, f"the gate checks no {unknown}"
    return inputs_of


def make_page(engine: Engine, options: Options, pictures: Pictures, uploads: Uploads) -> gr.Blocks:
    """An image, a conversation, a line to write in; a word to look for and its picture."""
    talks = Talks()
    reading = threading.Semaphore(_READING)

    def read(image: dict, request: gr.Request) -> bytes:
        """An upload of the browser that asks, within the limits."""
        try:
            data = uploads.read(image["path"], _owner(request))
            protocol.check_image(data, options.limits, "image")
        except BadRecord as error:
            raise _error(f"{error.detail[0].upper()}{error.detail[1:]}.") from error
        except protocol.ApiError as error:
            raise _error(error.message) from error
        return data

    def reply(question, image, temperature, length, request: gr.Request):
        """Yields the conversation, the line to write in and words to look for, again while the answer grows."""
        question = (question or "").strip()
        if not question:
            raise _error("Write a question first.")
        talk = talks.get(request.session_hash)
        # After an error a question stands without an answer: the next one takes its place.
        if talk and talk[-1]["role"] == "user":
            talk.pop()
        asked, answer = {"role": "user", "content": question}, _said("")
        talk.append(asked)
        so_far = [*talk]
        choices = suggested(question) if image else []
        yield _shown([*so_far, _said("…")]), "", gr.Radio(choices, value=None, visible=bool(choices))
        # Again with every piece: a slow browser sees the last of several updates alone.
        words = {"choices": choices, "visible": bool(choices)}
        with _errors():
            with reading if image else contextlib.nullcontext():
                example = engine.prepare(_record(so_far, read(image, request) if image else None))
            how = Sampling(max_tokens=int(length), temperature=temperature)
            for piece in engine.answer(example, how, options.timeout):
                answer["content"] += piece
                # Two questions at once in one page: the later one stays, and roles go on to take turns.
                if talk[-1] is asked:
                    talk.append(answer)
                yield _shown([*so_far, answer]), "", gr.Radio(**words)
        answer["content"] = answer["content"] or "(no words)"
        if talk[-1] is asked:
            talk.append(answer)
        yield _shown([*so_far, answer]), "", gr.Radio(**words)

    def look(word, image, request: gr.Request):
        """The picture of a word of the last question."""
        asked = talks.asked(request.session_hash)
        for missing, what in ((not image, "Upload an image"), (not asked, "Ask a question")):
            if missing:
                raise _error(f"{what} first.")
        word = (word or "").strip()
        if not word:
            raise _error("Write a word of your last question first.")
        data = read(image, request)
        with _errors():
            drawn = pictures.draw(data, asked[-1].strip(), word)
            # Among the uploads, so that it is shown to this browser alone and counts with them.
            file = io.BytesIO()
            Image.fromarray(drawn).save(file, "PNG")
            shown = uploads.path(uploads.add(_owner(request), file.getvalue()), _owner(request))
        return gr.Image(str(shown), visible=True, alt_text=f"Where the model looks for {word}")

    def forget(request: gr.Request):
        talks.clear(request.session_hash)

    def begin_again(request: gr.Request):
        forget(request)
        return [], None, "", "", gr.Radio([], value=None, visible=False)

    longest = options.limits.max_tokens
    with gr.Blocks(title=options.model, analytics_enabled=False, fill_width=True) as page:
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"], elem_id="image")
                with gr.Accordion("Settings", open=False):
                    temperature = gr.Slider(0, 2, 0, label="Temperature (0: the likeliest words)")
                    length = gr.Slider(1, longest, min(256, longest), step=1, label="Longest answer in tokens")
            with gr.Column(scale=3, min_width=280):
                # Plain text: an answer may be anything, a link that carries the conversation elsewhere for instance.
                chat = gr.Chatbot(
                    label="Conversation",
                    height="60vh",
                    elem_id="chat",
                    buttons=["copy", "copy_all"],
                    render_markdown=False,
                    latex_delimiters=[],
                    allow_tags=False,
                )
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
        # Values as the gate has checked them: Gradio would open the image itself.
        private = {"api_visibility": "private", "preprocess": False}
        asked = gr.on(
            [question.submit, send.click],
            reply,
            [question, image, temperature, length],
            [chat, question, words],
            concurrency_limit=engine.rows + engine.queue_limit,
            **private,
        )
        stop.click(None, cancels=[asked], **private)
        chat.clear(forget, cancels=[asked], **private)
        # Each caller is told at once that another picture is being made: Gradio's queue would have no end.
        drawing = {"fn": look, "outputs": [picture], "concurrency_limit": None, **private}
        seen = gr.on([word.submit, show.click], inputs=[word, image], **drawing)
        # Whoever goes through the words by keyboard gets the picture of the one where he stops.
        pressed = words.input(inputs=[words, image], trigger_mode="always_last", **drawing)
        words.input(lambda chosen: chosen, words, word, **private)
        for one in (seen, pressed):
            one.success(None, js=_INTO_VIEW, **private)
        # Another word or image: the word that was pressed may be pressed again.
        word.input(None, None, words, js="() => null", **private)
        image.change(lambda: (gr.Image(None, visible=False), None), None, [picture, words], **private)
        clear.click(
            begin_again,
            None,
            [chat, image, question, word, words],
            cancels=[asked, seen, pressed],
            **private,
        )
    # Of those Gradio keeps copies of the components; nothing here reads them.
    page.state_session_capacity = _SESSIONS
    # Those that wait here have no place in the engine's queue yet.
    return page.queue(api_open=False, max_size=engine.rows + engine.queue_limit)


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
    except NoRoom as error:
        raise _error("The server has no room for another picture; try again later.") from error
    except Closing as error:
        raise _error(f"The engine has failed: {error}" if str(error) else "The server is shutting down.") from error
    except (BadRecord, UserError) as error:
        raise _error(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        log.exception("the device failed")
        raise _error("The device failed, or has no memory left for this; the server's log says why.") from error


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _shown(talk: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation for the page, which takes text for HTML even where it renders no Markdown.

    Only what would be read as HTML is escaped, so that other text is copied from the page as it was written.
    """

    def plain(text: str) -> str:
        if html.unescape(text) != text:
            text = text.replace("&", "&amp;")
        return re.sub("<(?=[A-Za-z/!?])", "&lt;", text)

    return [{**message, "content": plain(message["content"])} for message in talk]


def _owner(request: gr.Request) -> str:
    """The browser that asks, as the gate names it."""
    return browser(request.session_hash)


def _record(talk: list[dict[str, str]], image: bytes | None) -> Record:
    """The conversation on the page as a prompt. The image stands at its first question."""
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in talk]
    return Record("page", None, turns, "the page", () if image is None else (image,), literal=True)
