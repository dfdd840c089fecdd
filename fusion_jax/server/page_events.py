"""Handles the web page's events: answers questions, draws pictures, keeps conversations."""

import contextlib
import io
import threading

from PIL import Image

from fusion_jax.server import gradio_environment  # noqa: F401

# isort: split

import gradio as gr

from fusion_jax.data.sources import Record
from fusion_jax.errors import check
from fusion_jax.inference.sampling import Sampling
from fusion_jax.server import protocol
from fusion_jax.server.conversations import Conversations, browser, drop_unanswered
from fusion_jax.server.engine import Engine
from fusion_jax.server.options import Options
from fusion_jax.server.page_text import answer_message, escaped, message_lines, problem_text, question_message
from fusion_jax.server.pictures import Pictures, suggested
from fusion_jax.server.space_left import space_left
from fusion_jax.server.uploads import Uploads

_READING = 4  # images that are in memory and decoded at the same time


class PageEvents:
    """The functions behind the page's components. Their arguments are the values of a browser, checked by the proxy."""

    def __init__(self, engine: Engine, options: Options, pictures: Pictures, uploads: Uploads):
        self.engine, self.options, self.pictures, self.uploads = engine, options, pictures, uploads
        self.conversations = Conversations()
        self._reading = threading.Semaphore(_READING)

    def _read(self, image: dict | None, request: gr.Request) -> bytes | None:
        """The bytes of an image that this browser has uploaded, within the limits; None for no image."""
        if image is None:
            return None
        data = self.uploads.read(image["path"], _owner(request))
        protocol.check_image(data, self.options.limits, "image")
        return data

    def _status(self, image: dict | None, request: gr.Request, problem: str = "") -> str:
        """The lines below the question: what went wrong, and how much more fits into the conversation."""
        more, messages = "", [*self.conversations.get(request.session_hash), question_message("?")]
        try:
            with self._reading if image else contextlib.nullcontext():
                more = space_left(self.engine.prompts, record_of(messages, self._read(image, request)))
        except Exception as error:
            problem = problem or problem_text(error)
        return message_lines(problem, more)

    def reply(self, question, image, temperature, length, request: gr.Request):
        """Answers a question.

        Yields the conversation, the input line, words to look for, and the messages below the question and below the
        word: all of them again while the answer grows, because a slow browser sees only the last of several updates.
        """
        messages, text = self.conversations.get(request.session_hash), (question or "").strip()
        drop_unanswered(messages)
        question, answer, problem = question_message(text), answer_message(""), ""
        choices = suggested(text) if image else []
        words, waiting = {"choices": choices, "visible": bool(choices)}, message_lines("", "Answering; Stop ends it.")
        try:
            check(bool(text), "Write a question first.")
            messages.append(question)
            so_far = [*messages]
            yield escaped([*so_far, answer_message("…")]), "", gr.Radio(**words, value=None), waiting, ""
            with self._reading if image else contextlib.nullcontext():
                example = self.engine.prepare(record_of(so_far, self._read(image, request)))
            how = Sampling(max_tokens=int(length), temperature=temperature)
            for piece in self.engine.answer(example, how, self.options.timeout):
                answer["content"] += piece
                # Of two simultaneous questions on one page the later one is kept, so that roles alternate.
                if messages and messages[-1] is question:
                    messages.append(answer)
                yield escaped([*so_far, answer]), "", gr.Radio(**words), waiting, ""
            answer["content"] = answer["content"] or "(no words)"
            if messages and messages[-1] is question:
                messages.append(answer)
        except Exception as error:
            problem = problem_text(error)
        # A question without an answer is moved from the conversation back to the line, to be changed or sent again.
        line = drop_unanswered(messages, question)
        if line:
            choices = suggested((self.conversations.questions(request.session_hash) or [""])[-1]) if image else []
            words = {"choices": choices, "visible": bool(choices)}
        yield escaped(messages), line, gr.Radio(**words), self._status(image, request, problem), ""

    def settle(self, image, request: gr.Request):
        """Brings the page after Stop into the state in which `reply` leaves it."""
        messages = self.conversations.get(request.session_hash)
        line = drop_unanswered(messages)
        return escaped(messages), line or gr.skip(), self._status(image, request), ""

    def look(self, word, image, request: gr.Request):
        """Draws the picture of a word of the last question. Returns it with the messages."""
        problem, shown = "", gr.skip()
        try:
            questions, word = self.conversations.questions(request.session_hash), (word or "").strip()
            check(bool(image), "Upload an image first.")
            check(bool(questions), "Ask a question first.")
            check(bool(word), "Write a word of your last question first.")
            drawn = self.pictures.draw(self._read(image, request), questions[-1], word)
            # The picture counts as an upload, so that this browser alone can load it.
            file = io.BytesIO()
            Image.fromarray(drawn).save(file, "PNG")
            path = self.uploads.path(self.uploads.add(_owner(request), file.getvalue()), _owner(request))
            shown = gr.Image(str(path), visible=True, alt_text=f"Where the model looks for {word}")
        except Exception as error:
            problem = problem_text(error)
        return shown, self._status(image, request), message_lines(problem)

    def changed(self, image, request: gr.Request):
        """Removes the picture after another image was chosen."""
        return gr.Image(None, visible=False), None, self._status(image, request), ""

    def forget(self, image, request: gr.Request):
        """Clears the conversation and keeps the image."""
        self.conversations.clear(request.session_hash)
        return self._status(image, request), ""

    def begin_again(self, request: gr.Request):
        """Clears the conversation and the image."""
        self.conversations.clear(request.session_hash)
        return [], None, "", gr.Radio([], value=None, visible=False), self._status(None, request), ""


def _owner(request: gr.Request) -> str:
    """The browser of a request, by the name that the proxy gives it."""
    return browser(request.session_hash)


def record_of(messages: list[dict[str, str]], image: bytes | None) -> Record:
    """The conversation on the page as a prompt, with the image before its first question."""
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    return Record("page", None, turns, "the page", () if image is None else (image,), literal=True)
