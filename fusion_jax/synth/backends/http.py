"""One HTTP endpoint: how many requests at once, how many a second, what is tried again and what ends the run.

    caller thread -> [rate] -> [one of `concurrency` places] -> request -> reply
                       ^                                          |
                       +--------- back-off, place given up <------+  429, 5xx, time-out, cut connection, broken JSON

A request that waits holds no place, so places are busy as long as anybody has something to send. Models behind one
address share its rate; each has places of its own. When the endpoint says 429 all wait for as long as it asks.
"""

import email.utils
import json
import logging
import os
import random
import threading
import time
import urllib.parse
from typing import Any

import httpx2

from fusion_jax.errors import UserError
from fusion_jax.synth.backends.base import Refused, Retryable, Unusable
from fusion_jax.synth.config import ImageConfig, ModelConfig

log = logging.getLogger("fusion_jax")

MAX_REPLY = 1 << 26  # bytes
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds
_DEAD_AFTER = 8  # requests in a row that failed with all their retries
_TURNED_AWAY = 10  # times as many retries after 429, which cost nothing: the endpoint lives


class Rate:
    """When the next request to an address may leave; for all threads and models of a process."""

    def __init__(self):
        self._lock = threading.Lock()
        self._next = 0.0  # monotonic time

    def wait(self, gap: float) -> None:
        """Sleeps until it is this caller's turn; the next one's is `gap` seconds later."""
        with self._lock:
            now = time.monotonic()
            mine = max(self._next, now)
            # Up to a tenth of a second that nobody used may be caught up on.
            self._next = max(self._next, now - 0.1) + gap
        if mine > now:
            time.sleep(mine - now)

    def pause(self, seconds: float) -> None:
        """Nobody's turn comes sooner than that."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Client:
    """Posts JSON to one endpoint; for any number of threads."""

    def __init__(self, config: ModelConfig | ImageConfig, what: str, rates: dict[str, Rate], share: float = 1.0):
        """
        Args:
          what: the config's key, for messages. rates: by address, of all clients in this process; ours is added.
          share: of the configured traffic that this process may make.

        Raises:
          UserError: no or no usable address.
        """
        url = config.base_url or os.environ.get("OPENAI_BASE_URL", "")
        if not url:
            raise UserError(f"Give the endpoint's address in {what}.base_url or OPENAI_BASE_URL: https://HOST/v1.")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{what}.base_url must be http://HOST/v1 or https://HOST/v1.")
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"{what}.base_url must hold no name, password or query: keys come from {config.api_key_env}."
            )
        self.what, self.model, self._key_name = what, config.model, config.api_key_env
        self.address = url.rstrip("/")
        self._key = os.environ.get(config.api_key_env, "")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._retries, self._timeout = config.retries, config.timeout
        concurrency = max(1, round(config.concurrency * share))
        self._places = threading.BoundedSemaphore(concurrency)
        self._rate = rates.setdefault(self.address, Rate())
        self._gap = 1 / (config.requests_per_second * share) if config.requests_per_second else 0.0
        self._dead = 0
        self.counts = {"requests": 0, "retries": 0}
        limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._http = httpx2.Client(headers=headers, timeout=httpx2.Timeout(config.timeout), limits=limits)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply's JSON object. Raises as `LanguageModel.chat`; `Rejected` for a request that it did not like."""
        data = json.dumps(body).encode()
        tries = turned_away = 0
        while True:
            self._rate.wait(self._gap)
            try:
                with self._places:
                    found = self._send("POST", f"{self.address}{path}", data)
                self._dead = 0
                return found
            except Retryable as e:
                if e.reason == "rate_limited":
                    turned_away += 1
                    self._rate.pause(min(e.wait or 0.0, 1.0))
                else:
                    tries += 1
                if tries > self._retries or turned_away > _TURNED_AWAY * self._retries:
                    self._count_dead(e)
                    raise
                self._back_off(tries + min(turned_away, 6), e.wait)

    def check(self) -> None:
        """Asks for the list of models: UserError for no endpoint, a wrong key or a model that is not served."""
        for attempt in range(self._retries + 1):
            try:
                found = self._send("GET", f"{self.address}/models", None)
                break
            except Retryable as e:
                if attempt == self._retries or (e.reason == "no_connection" and attempt == 2):
                    raise UserError(f"No answer from {self.address} ({self.what}.base_url): {e}.") from e
                self._back_off(attempt + 1, e.wait)
            except (Rejected, Unusable):
                return  # an endpoint without such a list; the first request will tell
        listed = found.get("data")
        served = [one.get("id") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        if served and self.model not in served:
            some = ", ".join(sorted(map(str, served))[:8])
            raise UserError(f"{self.address} does not serve {self.what}.model {self.model!r}; it serves {some}.")

    def fetch(self, url: str) -> bytes:
        """What lies at an address that a reply gave, without our key."""
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise Unusable("bad_image", "the reply's address is no web address")
        try:
            with self._places:
                response = httpx2.get(url, timeout=self._timeout, follow_redirects=True)
        except httpx2.HTTPError as e:
            raise Retryable("no_image", self._clean(e)) from e
        if response.status_code != 200:
            raise Retryable("no_image", f"HTTP {response.status_code}")
        return response.content

    def _send(self, method: str, url: str, data: bytes | None) -> dict[str, Any]:
        self.counts["requests"] += 1
        deadline = time.monotonic() + self._timeout
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            with self._http.stream(method, url, content=data, headers=headers) as response:
                chunks, size = [], 0
                for chunk in response.iter_bytes():
                    size += len(chunk)
                    if time.monotonic() > deadline:  # a server that sends a byte now and then
                        raise Retryable("timeout", f"no whole reply within {self._timeout:g} s")
                    if size > MAX_REPLY:
                        raise Unusable("reply_too_long", f"over {MAX_REPLY} bytes")
                    chunks.append(chunk)
        except httpx2.TimeoutException as e:
            raise Retryable("timeout", f"no reply within {self._timeout:g} s") from e
        except httpx2.ConnectError as e:
            raise Retryable("no_connection", self._clean(e)) from e
        except httpx2.HTTPError as e:
            raise Retryable("cut_connection", self._clean(e)) from e
        return self._judge(response.status_code, response.headers, b"".join(chunks))

    def _judge(self, status: int, headers: httpx2.Headers, body: bytes) -> dict[str, Any]:
        try:
            found = json.loads(body)
        except ValueError:
            found = None
        if 200 <= status < 300:
            if not isinstance(found, dict):
                raise Retryable("broken_reply", "the reply is no JSON object")
            return found
        error = found.get("error", found) if isinstance(found, dict) else None
        error = error if isinstance(error, dict) else {"message": error or body[:400].decode(errors="replace")}
        message, code = self._clean(error.get("message") or ""), str(error.get("code") or error.get("type") or "")
        said = f"HTTP {status}: {message}"
        if status in (401, 403) and "policy" not in code:
            why = (
                f"refuses the key in {self._key_name}" if self._key else f"wants a key, and {self._key_name} is not set"
            )
            raise UserError(f"{self.address} {why} ({said}).")
        if status == 402 or code in ("insufficient_quota", "billing_hard_limit_reached"):
            raise UserError(f"{self.address} asks for payment ({said}); the same command goes on from here.")
        if status == 404:
            raise Rejected("not_found", said)
        if "content_policy" in code or "content_filter" in code or "moderation" in code:
            raise Refused("refused", said)
        if status in (408, 409, 425, 429) or status >= 500:
            raise Retryable({429: "rate_limited", 408: "timeout"}.get(status, "server_error"), said, _wait(headers))
        raise Rejected("bad_request", said)

    def _clean(self, text: Any) -> str:
        """A message of the other side: short, printable, and without our key."""
        text = str(text)
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]

    def scrub(self, text: str) -> str:
        """A model's words without our key, should it have got hold of it."""
        return text.replace(self._key, "***") if self._key else text

    def _back_off(self, tries: int, wait: float | None) -> None:
        """Longer from try to try, unless the endpoint said how long; never all at the same moment."""
        self.counts["retries"] += 1
        if wait is None:
            time.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tries - 1)) * random.uniform(0.5, 1.0))
        else:
            time.sleep(wait * random.uniform(1.0, 1.5))

    def _count_dead(self, error: Retryable) -> None:
        self._dead += 1
        if self._dead >= _DEAD_AFTER:
            raise UserError(
                f"{self.address} failed {self._dead} requests in a row, each {self._retries + 1} times "
                f"(last: {error.reason}: {error}); the same command goes on from here."
            )


class Rejected(Unusable):
    """HTTP 4xx: this request, as it is, will never be answered."""


def _wait(headers: httpx2.Headers) -> float | None:
    """Seconds that Retry-After asks for: a number or a date."""
    said = headers.get("retry-after")
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)
