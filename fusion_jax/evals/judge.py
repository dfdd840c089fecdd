"""Grades answers with a language model at an OpenAI-compatible endpoint.

JUDGE_MODEL      name of the model; without it nothing is sent anywhere
JUDGE_BASE_URL   for example https://api.openai.com/v1
JUDGE_API_KEY    sent as a bearer token and nowhere else; may be missing for a local server
"""

import functools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusion_jax.errors import UserError
from fusion_jax.web.client import Web, WebError, is_endpoint, is_key, proxy_for, read_json, retry_after

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses after which a request is repeated
_LONGEST_WAIT = 60.0
_MAX_REPLY = 1 << 23  # bytes
_MAX_TEXT = 10_000  # characters; a verdict is a word or a line
_CONNECTIONS = 32


@dataclass(frozen=True)
class Judge:
    """The endpoint and the model that grade.

    Attributes:
      attempts: most attempts for a request. pause: seconds before the second attempt, doubled after each.
      timeout: seconds for a whole request.
    """

    base_url: str
    model: str
    key: str = field(default="", repr=False)
    attempts: int = 6
    pause: float = 2.0
    timeout: float = 60.0

    def ask(self, prompt: str, max_tokens: int, temperature: float = 0.0) -> str:
        """The model's reply to one message.

        Raises:
          UserError: the endpoint refuses, or stays unreachable for all attempts.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json", "User-Agent": "fusion_jax"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        for attempt in range(self.attempts):
            wait = min(self.pause * 2 ** min(attempt, 20), _LONGEST_WAIT)
            try:
                answer = _web(proxy_for(url)).send("POST", url, headers, data, self.timeout, _MAX_REPLY)
                if 200 <= answer.status < 300:
                    return _text_of(read_json(answer.body))
                problem = f"status {answer.status}"
                if 300 <= answer.status < 400:
                    problem += ", a redirect, which is not followed: give the place itself in JUDGE_BASE_URL"
                if answer.status not in _AGAIN:
                    break
                wait = max(wait, retry_after(answer.headers, _LONGEST_WAIT) or 0.0)
            except WebError as error:
                problem = str(error)
                if error.reason == "invalid":
                    break
            except (ValueError, KeyError, IndexError, TypeError):
                problem = "an answer that is not in the form of chat completions"
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        # The server's text may repeat the request, so only the status is shown.
        raise UserError(f"The judge {self.model} at {self.base_url} does not answer: {problem}.")


def _text_of(reply: Any) -> str:
    text = reply["choices"][0]["message"]["content"]
    if not (text is None or isinstance(text, str)):
        raise TypeError("the content is not a text")
    # JSON can hold half of a surrogate pair, and no file can.
    return (text or "")[:_MAX_TEXT].encode(errors="replace").decode()


@functools.cache
def _web(proxy: str) -> Web:
    return Web(_CONNECTIONS, proxy=proxy)


def from_environment(environment: Mapping[str, str] = os.environ) -> Judge | None:
    """The configured judge; None without JUDGE_MODEL. Raises UserError where the address is missing or not a URL."""
    model = environment.get("JUDGE_MODEL", "")
    if not model:
        return None
    url, key = environment.get("JUDGE_BASE_URL", ""), environment.get("JUDGE_API_KEY", "")
    if not is_endpoint(url):
        raise UserError("JUDGE_MODEL is set, so JUDGE_BASE_URL must be too: http(s)://host/v1.")
    if not is_key(key):
        raise UserError("JUDGE_API_KEY holds a line break, a space or another character that no key has.")
    return Judge(url, model, key)
