"""A web page to chat about an uploaded image, streaming, on the API's address."""

import hmac
import itertools
import logging
from pathlib import Path

import fastapi
import gradio as gr

from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.sampling import Sampling
from fusion_jax.serve import protocol
from fusion_jax.serve.api import Options
from fusion_jax.serve.engine import Closing, Engine, Full

log = logging.getLogger("fusion_jax")

_STYLE = (
    "footer {display: none !important} #image {max-height: 45vh} @media (max-width: 700px) {#image {max-height: 30vh}}"
)


def mount(app: fastapi.FastAPI, engine: Engine, options: Options) -> fastapi.FastAPI:
    """The application with the page at /. Where there is an API key the page asks for it as the password."""
    ask = None
    if options.api_key:

        def ask(user: str, password: str) -> bool:
            return hmac.compare_digest(password.encode(), options.api_key.encode())

    return gr.mount_gradio_app(
        app,
        make_page(engine, options),
        path="/",
        auth=ask,
        css=_STYLE,
        max_file_size=options.limits.image_bytes,
        footer_links=[],
    )


def make_page(engine: Engine, options: Options) -> gr.Blocks:
    """An image, a conversation, a line to write in."""

    def reply(question, image, history, temperature, length):
        """Yields the conversation and the line to write in, again and again while the answer grows."""
        question = (question or "").strip()
        if not question:
            raise gr.Error("Write a question first.", print_exception=False)
        history = [*history, {"role": "user", "content": question}]
        record = _record(history, image, options)
        how = Sampling(max_tokens=int(length), temperature=temperature)
        yield [*history, {"role": "assistant", "content": "…"}], ""
        answer = ""
        try:
            for piece in engine.answer(record, how, options.timeout):
                answer += piece
                yield [*history, {"role": "assistant", "content": answer}], ""
        except Full as error:
            raise gr.Error("Too many requests are waiting; try again.", print_exception=False) from error
        except Closing as error:
            raise gr.Error("The server is shutting down.", print_exception=False) from error
        except (BadRecord, UserError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        yield [*history, {"role": "assistant", "content": answer or "(no words)"}], ""

    longest = options.limits.max_tokens
    with gr.Blocks(title=options.model, analytics_enabled=False) as page:
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                # Without a mode Gradio hands the file on undecoded: our own limits come first.
                image = gr.Image(
                    type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"], elem_id="image"
                )
                with gr.Accordion("Settings", open=False):
                    temperature = gr.Slider(0, 2, 0, label="Temperature (0: the likeliest words)")
                    length = gr.Slider(1, longest, min(256, longest), step=1, label="Longest answer in tokens")
            with gr.Column(scale=2, min_width=280):
                chat = gr.Chatbot(label="Conversation", height="60vh", elem_id="chat")
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
                    stop, clear = gr.Button("Stop", size="sm"), gr.Button("New conversation", size="sm")
        asked = gr.on(
            [question.submit, send.click],
            reply,
            [question, image, chat, temperature, length],
            [chat, question],
            concurrency_limit=engine.rows + engine.queue_limit,
            api_visibility="private",
        )
        stop.click(None, cancels=[asked], api_visibility="private")
        clear.click(lambda: ([], None, ""), None, [chat, image, question], cancels=[asked], api_visibility="private")
    return page


def _record(history: list[dict], image: str | None, options: Options) -> Record:
    """The conversation on the page as a prompt. The image stands at its first question."""
    images = ()
    if image is not None:
        data = Path(image).read_bytes()
        try:
            protocol.check_image(data, options.limits, "image")
        except protocol.ApiError as error:
            raise gr.Error(error.message, print_exception=False) from error
        images = (data,)
    turns = []
    for message in history:
        who = "human" if message["role"] == "user" else "gpt"
        text = _text(message["content"])
        # After an error a question stands without an answer: the next one takes its place.
        if turns and turns[-1]["from"] == who:
            turns.pop()
        turns.append({"from": who, "value": text.replace(protocol.IMAGE_TAG, "")})
    return Record("page", None, list(itertools.dropwhile(lambda t: t["from"] == "gpt", turns)), "the page", images)


def _text(content) -> str:
    """Gradio gives texts back as lists of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))
