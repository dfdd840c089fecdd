"""The conversations on the page, of which each browser has a share."""

import threading
from collections import Counter

MOST = 4096  # conversations that are remembered
OWN = 64  # of one browser


def browser(session: str) -> str:
    """The browser of a session, as the gate names both."""
    return session.partition("-")[0]


def drop_unanswered(talk: list[dict[str, str]], asked: dict[str, str] | None = None) -> str:
    """Takes the last message out of a conversation, where it is a question without an answer (and `asked`, if that is
    given). Returns its text, "" for none."""
    if talk and talk[-1]["role"] == "user" and (asked is None or talk[-1] is asked):
        return talk.pop()["content"]
    return ""


class Talks:
    """The conversations, by the page they are on: what was asked and answered here, not what a browser says it was."""

    def __init__(self, most: int = MOST):
        self.most = most
        self._talks: dict[str, list[dict[str, str]]] = {}
        self._lock = threading.Lock()

    def get(self, session: str) -> list[dict[str, str]]:
        """The messages so far, to be appended to. Beyond a browser's share its own oldest conversation goes, beyond
        `most` the oldest one of the browser that has most."""
        with self._lock:
            talk = self._talks[session] = self._talks.pop(session, [])
            own = [one for one in self._talks if browser(one) == browser(session)]
            if len(own) > OWN:
                del self._talks[own[0]]
            if len(self._talks) > self.most:
                ((fullest, _),) = Counter(map(browser, self._talks)).most_common(1)
                del self._talks[next(one for one in self._talks if browser(one) == fullest)]
            return talk

    def asked(self, session: str) -> list[str]:
        """The questions so far."""
        with self._lock:
            return [message["content"] for message in self._talks.get(session, ()) if message["role"] == "user"]

    def clear(self, session: str) -> None:
        """Begins again; an answer that still grows is remembered no more."""
        with self._lock:
            self._talks.pop(session, None)
