"""Keeps the conversations on the page, with a limit for each browser."""

import threading
from collections import Counter

MOST = 4096  # conversations that are kept
PER_BROWSER = 64


def browser(session: str) -> str:
    """The browser of a session, read from the name that `gradio_proxy` makes for sessions."""
    return session.partition("-")[0]


def drop_unanswered(messages: list[dict[str, str]], question: dict[str, str] | None = None) -> str:
    """Removes the last message of a conversation where it is a question without an answer.

    Args:
      question: removes this message only; None: any.

    Returns:
      The question's text, "" where nothing is removed.
    """
    if messages and messages[-1]["role"] == "user" and (question is None or messages[-1] is question):
        return messages.pop()["content"]
    return ""


class Conversations:
    """Conversations by session. They hold what the server itself received and answered, whatever a browser sends."""

    def __init__(self, most: int = MOST):
        self.most = most
        self._messages: dict[str, list[dict[str, str]]] = {}
        self._lock = threading.Lock()

    def get(self, session: str) -> list[dict[str, str]]:
        """The messages so far, to be appended to.

        A browser with more than PER_BROWSER conversations loses its oldest one; beyond `most` in all, the browser with
        the most conversations does.
        """
        with self._lock:
            messages = self._messages[session] = self._messages.pop(session, [])
            own = [one for one in self._messages if browser(one) == browser(session)]
            if len(own) > PER_BROWSER:
                del self._messages[own[0]]
            if len(self._messages) > self.most:
                ((fullest, _),) = Counter(map(browser, self._messages)).most_common(1)
                del self._messages[next(one for one in self._messages if browser(one) == fullest)]
            return messages

    def questions(self, session: str) -> list[str]:
        """The questions so far."""
        with self._lock:
            return [message["content"] for message in self._messages.get(session, ()) if message["role"] == "user"]

    def clear(self, session: str) -> None:
        """Forgets a session's conversation, and with it an answer that is still being written."""
        with self._lock:
            self._messages.pop(session, None)
