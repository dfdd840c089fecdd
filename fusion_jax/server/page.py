"""Builds the web page: a streaming chat about an uploaded image, with attention pictures beside it."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator

import fastapi
from starlette.concurrency import run_in_threadpool
from starlette.routing import Match, Mount

from fusion_jax.server import gradio_environment  # isort: split

import gradio as gr

from fusion_jax.server.addresses import page_methods
from fusion_jax.server.engine import Engine
from fusion_jax.server.gradio_proxy import GradioProxy
from fusion_jax.server.options import Options
from fusion_jax.server.page_events import PageEvents, record_of
from fusion_jax.server.page_text import message_lines, question_message
from fusion_jax.server.pictures import Pictures
from fusion_jax.server.space_left import space_left
from fusion_jax.server.uploads import Uploads

_STYLE = """
footer {display: none !important}
#image {max-height: 45vh}
#picture .image-container {padding-top: 36px}  /* keeps its label and buttons off the picture */
#state p, #missed p {margin: 0 0 4px; color: var(--body-text-color); font-size: var(--text-sm)}
:is(#state, #missed) p.problem {color: var(--error-text-color)}
.wrap:has(.error) {display: none}  /* refusals are shown above; the picture before stays legible */
@media (max-width: 700px) {#image {max-height: 30vh}}
"""
_INTO_VIEW = """
() => setTimeout(() => document.querySelector("#picture")?.scrollIntoView({block: "nearest", behavior: "smooth"}), 400)
"""
# Gradio's own messages, such as that of a refused upload, close at the next action.
_CLOSING = """
() => {
  const close = (event) => {
    if (!event.target.closest?.(".toast-body")) document.querySelectorAll(".toast-close").forEach((one) => one.click())
  }
  for (const name of ["pointerdown", "keydown", "change"]) document.addEventListener(name, close, true)
}
"""
_SWEEP = 600  # seconds between two deletions of old uploads
_SESSIONS = 256  # pages whose state Gradio keeps


def mount(app: fastapi.FastAPI, engine: Engine, options: Options, pictures: Pictures) -> fastapi.FastAPI:
    """The application with the page at /, behind `GradioProxy`."""
    uploads = Uploads(gradio_environment.FOLDER, options.limits.upload_bytes)
    page = make_page(engine, options, pictures, uploads)
    site = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        css=_STYLE,
        js=_CLOSING,
        max_file_size=options.limits.image_bytes,
        footer_links=[],
        # The remaining arguments fix settings that Gradio's environment or later defaults could change.
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
                await asyncio.sleep(_SWEEP)
                await run_in_threadpool(uploads.sweep)

        sweeping = asyncio.create_task(sweep())
        try:
            async with before(app), site.router.lifespan_context(site):
                yield
        finally:
            sweeping.cancel()
            uploads.close()

    app.router.lifespan_context = lifespan
    app.router.routes.append(
        _Page("/", GradioProxy(site, uploads, events(page), options, functools.partial(_pending, page)))
    )
    return app


class _Page(Mount):
    """Mounts only the page's addresses: all others are answered as without the page."""

    def matches(self, scope) -> tuple[Match, dict]:
        return super().matches(scope) if page_methods(scope["path"]) else (Match.NONE, {})


def _pending(page: gr.Blocks, session: str) -> bool:
    """Whether Gradio has a message for a session, or an unfinished event of it."""
    queue = page._queue
    messages = queue.pending_messages_per_session.get(session)
    if messages is None:
        return False
    known = queue.pending_event_ids_session.get(session, ())
    return not messages.empty() or any(event in queue.event_ids_to_events for event in known)


def events(page: gr.Blocks) -> dict[int, list[str]]:
    """The kinds of the inputs of each function that a browser may call, by the function's number."""
    config = page.get_config_file()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    inputs_of = {d["id"]: [kinds[i] for i in d["inputs"]] for d in config["dependencies"] if d["backend_fn"]}
    unknown = {kind for inputs in inputs_of.values() for kind in inputs} - {"textbox", "radio", "slider", "image"}
    assert not unknown, f"the proxy cannot check inputs of the kind {unknown}"
    return inputs_of


def make_page(engine: Engine, options: Options, pictures: Pictures, uploads: Uploads) -> gr.Blocks:
    """The page's components: an image, a conversation, an input line, a word to look for and its picture."""
    on = PageEvents(engine, options, pictures, uploads)
    longest = options.limits.max_tokens
    with gr.Blocks(title=options.model, analytics_enabled=False, fill_width=True) as page:
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"], elem_id="image")
                with gr.Accordion("Settings", open=False):
                    temperature = gr.Slider(0, 2, 0, label="Temperature (0: the likeliest words)")
                    length = gr.Slider(1, longest, min(256, longest), step=1, label="Longest answer in tokens")
            with gr.Column(scale=3, min_width=280):
                # Plain text: an answer may hold anything, such as a link that would leak the conversation.
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
                state = gr.HTML(
                    message_lines("", space_left(engine.prompts, record_of([question_message("?")], None))),
                    elem_id="state",
                )
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
        # These are the values that the proxy has checked; with preprocessing Gradio would open the image itself.
        private = {"api_visibility": "private", "preprocess": False}
        answering = gr.on(
            [question.submit, send.click],
            on.reply,
            [question, image, temperature, length],
            [chat, question, words, state, missed],
            show_progress_on=[chat, question],
            concurrency_limit=engine.rows + engine.queue_limit,
            **private,
        )
        quiet = {"show_progress": "hidden", **private}
        stop.click(on.settle, image, [chat, question, state, missed], cancels=[answering], **quiet)
        chat.clear(on.forget, image, [state, missed], cancels=[answering], **quiet)
        # Without Gradio's queue, which has no bound, a browser learns immediately that another picture is being drawn.
        drawing = {
            "fn": on.look,
            "outputs": [picture, state, missed],
            "show_progress_on": [picture, missed],
            "concurrency_limit": None,
            **private,
        }
        typed = gr.on([word.submit, show.click], inputs=[word, image], **drawing)
        # Moving through the words by keyboard draws only the picture of the last one.
        pressed = words.input(inputs=[words, image], trigger_mode="always_last", **drawing)
        words.input(lambda value: value, words, word, **private)
        for one in (typed, pressed):
            one.success(None, js=_INTO_VIEW, **private)
        # After another word or image, the word that was pressed can be pressed again.
        word.input(None, None, words, js="() => null", **private)
        image.change(on.changed, image, [picture, words, state, missed], **quiet)
        clear.click(
            on.begin_again,
            None,
            [chat, image, word, words, state, missed],
            cancels=[answering, typed, pressed],
            **quiet,
        )
    # For each of these sessions Gradio keeps copies of the components, which are not read here.
    page.state_session_capacity = _SESSIONS
    # Events in this queue have no place in the engine's queue yet.
    return page.queue(api_open=False, max_size=engine.rows + engine.queue_limit)
