"""A web page to chat about an uploaded image, streaming, on the API's address; attention pictures beside the answer."""

import asyncio
import contextlib
import functools
import html
import io
import logging
import re
import threading
from collections.abc import AsyncIterator

import fastapi
import gradio as gr
import jax
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.routing import Match, Mount

from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError, check
from fusion_jax.inference.sampling import Sampling
from fusion_jax.server import gradio_alone, protocol
from fusion_jax.server.addresses import page_methods
from fusion_jax.server.api import Options
from fusion_jax.server.engine import Closing, Engine, Full
from fusion_jax.server.gate import Gate
from fusion_jax.server.pictures import Busy, Pictures, suggested
from fusion_jax.server.room import room
from fusion_jax.server.talks import Talks, browser, drop_unanswered
from fusion_jax.server.uploads import NoRoom, Uploads

log = logging.getLogger("fusion_jax")

_STYLE = """
footer {display: none !important}
#image {max-height: 45vh}
#picture .image-container {padding-top: 36px}  /* its label and buttons lie over nothing */
#state p, #missed p {margin: 0 0 4px; color: var(--body-text-color); font-size: var(--text-sm)}
:is(#state, #missed) p.problem {color: var(--error-text-color)}
.wrap:has(.error) {display: none}  /* what is refused before it begins is said above; what stood there stays legible */
@media (max-width: 700px) {#image {max-height: 30vh}}
"""
_INTO_VIEW = """
() => setTimeout(() => document.querySelector("#picture")?.scrollIntoView({block: "nearest", behavior: "smooth"}), 400)
"""
# What Gradio itself says, of an upload that was refused for instance, goes with the next action.
_CLOSING = """
() => {
  const close = (event) => {
    if (!event.target.closest?.(".toast-body")) document.querySelectorAll(".toast-close").forEach((one) => one.click())
  }
  for (const name of ["pointerdown", "keydown", "change"]) document.addEventListener(name, close, true)
}
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
        js=_CLOSING,
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

    def read(image: dict | None, request: gr.Request) -> bytes | None:
        """An upload of the browser that asks, within the limits; None for none."""
        if image is None:
            return None
        data = uploads.read(image["path"], _owner(request))
        protocol.check_image(data, options.limits, "image")
        return data

    def status(image: dict | None, request: gr.Request, problem: str = "") -> str:
        """The lines below the question: what has gone wrong, and how much more fits."""
        more, talk = "", [*talks.get(request.session_hash), _asked("?")]
        try:
            with reading if image else contextlib.nullcontext():
                more = room(engine.prompts, _record(talk, read(image, request)))
        except Exception as error:
            problem = problem or _problem(error)
        return _lines(problem, more)

    def reply(question, image, temperature, length, request: gr.Request):
        """Yields the conversation, the line to write in, words to look for, and the messages below the question and
        below the word; again while the answer grows, because a slow browser sees the last of several updates alone."""
        talk, question = talks.get(request.session_hash), (question or "").strip()
        drop_unanswered(talk)
        asked, answer, problem = _asked(question), _said(""), ""
        choices = suggested(question) if image else []
        words, waiting = {"choices": choices, "visible": bool(choices)}, _lines("", "Answering; Stop ends it.")
        try:
            check(bool(question), "Write a question first.")
            talk.append(asked)
            so_far = [*talk]
            yield _shown([*so_far, _said("…")]), "", gr.Radio(**words, value=None), waiting, ""
            with reading if image else contextlib.nullcontext():
                example = engine.prepare(_record(so_far, read(image, request)))
            how = Sampling(max_tokens=int(length), temperature=temperature)
            for piece in engine.answer(example, how, options.timeout):
                answer["content"] += piece
                # Two questions at once in one page: the later one stays, and roles go on to take turns.
                if talk and talk[-1] is asked:
                    talk.append(answer)
                yield _shown([*so_far, answer]), "", gr.Radio(**words), waiting, ""
            answer["content"] = answer["content"] or "(no words)"
            if talk and talk[-1] is asked:
                talk.append(answer)
        except Exception as error:
            problem = _problem(error)
        # What got no answer is out of the conversation and stands in the line again, to be changed or sent once more.
        line = drop_unanswered(talk, asked)
        if line:
            choices = suggested((talks.asked(request.session_hash) or [""])[-1]) if image else []
            words = {"choices": choices, "visible": bool(choices)}
        yield _shown(talk), line, gr.Radio(**words), status(image, request, problem), ""

    def settle(image, request: gr.Request):
        """After `Stop`: as `reply` leaves it."""
        line = drop_unanswered(talks.get(request.session_hash))
        return _shown(talks.get(request.session_hash)), line or gr.skip(), status(image, request), ""

    def look(word, image, request: gr.Request):
        """The picture of a word of the last question, and the messages."""
        problem, shown = "", gr.skip()
        try:
            asked, word = talks.asked(request.session_hash), (word or "").strip()
            check(bool(image), "Upload an image first.")
            check(bool(asked), "Ask a question first.")
            check(bool(word), "Write a word of your last question first.")
            drawn = pictures.draw(read(image, request), asked[-1], word)
            # Among the uploads, so that it is shown to this browser alone and counts with them.
            file = io.BytesIO()
            Image.fromarray(drawn).save(file, "PNG")
            path = uploads.path(uploads.add(_owner(request), file.getvalue()), _owner(request))
            shown = gr.Image(str(path), visible=True, alt_text=f"Where the model looks for {word}")
        except Exception as error:
            problem = _problem(error)
        return shown, status(image, request), _lines(problem)

    def changed(image, request: gr.Request):
        return gr.Image(None, visible=False), None, status(image, request), ""

    def forget(image, request: gr.Request):
        talks.clear(request.session_hash)
        return status(image, request), ""

    def begin_again(request: gr.Request):
        talks.clear(request.session_hash)
        return [], None, "", gr.Radio([], value=None, visible=False), status(None, request), ""

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
                state = gr.HTML(_lines("", room(engine.prompts, _record([_asked("?")], None))), elem_id="state")
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
                missed = gr.HTML("", elem_id="missed")
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
            [chat, question, words, state, missed],
            show_progress_on=[chat, question],
            concurrency_limit=engine.rows + engine.queue_limit,
            **private,
        )
        quiet = {"show_progress": "hidden", **private}
        stop.click(settle, image, [chat, question, state, missed], cancels=[asked], **quiet)
        chat.clear(forget, image, [state, missed], cancels=[asked], **quiet)
        # Each caller is told at once that another picture is being made: Gradio's queue would have no end.
        drawing = {
            "fn": look,
            "outputs": [picture, state, missed],
            "show_progress_on": [picture, missed],
            "concurrency_limit": None,
            **private,
        }
        seen = gr.on([word.submit, show.click], inputs=[word, image], **drawing)
        # Whoever goes through the words by keyboard gets the picture of the one where he stops.
        pressed = words.input(inputs=[words, image], trigger_mode="always_last", **drawing)
        words.input(lambda chosen: chosen, words, word, **private)
        for one in (seen, pressed):
            one.success(None, js=_INTO_VIEW, **private)
        # Another word or image: the word that was pressed may be pressed again.
        word.input(None, None, words, js="() => null", **private)
        image.change(changed, image, [picture, words, state, missed], **quiet)
        clear.click(
            begin_again,
            None,
            [chat, image, word, words, state, missed],
            cancels=[asked, seen, pressed],
            **quiet,
        )
    # Of those Gradio keeps copies of the components; nothing here reads them.
    page.state_session_capacity = _SESSIONS
    # Those that wait here have no place in the engine's queue yet.
    return page.queue(api_open=False, max_size=engine.rows + engine.queue_limit)


def _problem(error: Exception) -> str:
    """What has gone wrong, in one sentence for the person."""
    match error:
        case Full():
            return "Too many requests are waiting; try again."
        case Busy():
            return "Another picture is being drawn; try again in a few seconds."
        case NoRoom():
            return "The server has no room for another picture; try again later."
        case Closing():
            return f"The engine has failed: {error}" if str(error) else "The server is shutting down."
        case BadRecord():
            if error.reason in ("too_long", "question_too_long", "too_many_rounds"):
                return "The question does not fit into the conversation."  # the line behind it says what does
            return f"{error.detail[0].upper()}{error.detail[1:].removesuffix('.')}."
        case UserError():
            return str(error)
        case protocol.ApiError():
            return f"{error.message[0].upper()}{error.message[1:]}"
        case jax.errors.JaxRuntimeError():
            log.error("the device failed", exc_info=error)
            return "The device failed, or has no memory left for this; the server's log says why."
    log.error("the page failed", exc_info=error)
    return "The server failed; its log says why."


def _lines(problem: str, more: str = "") -> str:
    """Messages as HTML; what is in them is text, to Gradio's templates as well."""

    def plain(text: str) -> str:
        return html.escape(text).replace("$", "&#36;").replace("{", "&#123;").replace("`", "&#96;")

    wrong = f'<p role="alert" class="problem">{plain(problem)}</p>' if problem else ""
    return wrong + (f"<p>{plain(more)}</p>" if more else "")


def _asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


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
