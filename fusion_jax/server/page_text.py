"""Writes the texts of the web page: messages for the user, and conversations as the page shows them."""

import html
import logging
import re

import jax

from fusion_jax.errors import BadRecord, UserError
from fusion_jax.server.error import ApiError
from fusion_jax.server.pictures import Busy
from fusion_jax.server.requests import Closing, Full
from fusion_jax.server.uploads import NoRoom

log = logging.getLogger("fusion_jax")


def problem_text(error: Exception) -> str:
    """What went wrong, in one sentence for the user of the page."""
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
                return "The question does not fit into the conversation."  # the next line says how much does
            return f"{error.detail[0].upper()}{error.detail[1:].removesuffix('.')}."
        case UserError():
            return str(error)
        case ApiError():
            return f"{error.message[0].upper()}{error.message[1:]}"
        case jax.errors.JaxRuntimeError():
            log.error("the device failed", exc_info=error)
            return "The device failed, or has no memory left for this; the server's log says why."
    log.error("the page failed", exc_info=error)
    return "The server failed; its log says why."


def message_lines(problem: str, more: str = "") -> str:
    """Messages as HTML. Their text is escaped for HTML, and for Gradio's templates."""

    def plain(text: str) -> str:
        return html.escape(text).replace("$", "&#36;").replace("{", "&#123;").replace("`", "&#96;")

    first = f'<p role="alert" class="problem">{plain(problem)}</p>' if problem else ""
    return first + (f"<p>{plain(more)}</p>" if more else "")


def question_message(text: str) -> dict[str, str]:
    """A message of the user."""
    return {"role": "user", "content": text}


def answer_message(text: str) -> dict[str, str]:
    """A message of the model."""
    return {"role": "assistant", "content": text}


def escaped(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation escaped for the page, which reads text as HTML even where it renders no Markdown.

    Only what would be read as HTML is escaped, so that other text can be copied from the page unchanged.
    """

    def plain(text: str) -> str:
        if html.unescape(text) != text:
            text = text.replace("&", "&amp;")
        return re.sub("<(?=[A-Za-z/!?])", "&lt;", text)

    return [{**message, "content": plain(message["content"])} for message in messages]
