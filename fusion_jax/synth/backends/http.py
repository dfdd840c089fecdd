"""Sends requests to an HTTP endpoint: limits their number and rate, retries them, or ends the run.

    caller thread -> [rate] -> [one of `concurrency` places] -> request -> reply
                       ^                                          |
                       +--------- back-off, place released <------+  429, 5xx, time-out, cut connection, broken JSON

A waiting request holds no place, so all places are busy while there are requests. Models at one address share its rate;
each has its own places. After a 429 all requests wait for as long as the endpoint demands.
"""

import json
import logging
import os
import random
import threading
import time
import urllib.parse
from typing import Any

from fusion_jax.errors import UserError, check
from fusion_jax.synth.backends.base import Refused, Retryable, Unusable
from fusion_jax.synth.backends.config import ImageConfig, ModelConfig
from fusion_jax.web.client import Answer, Web, WebError, is_endpoint, is_key, proxy_for, read_json, retry_after
from fusion_jax.web.fetch import PORTS, FetchError, fetch

log = logging.getLogger("fusion_jax")

MAX_TEXT = 1 << 23  # bytes of a reply of a language or vision model
MAX_IMAGE = 1 << 26  # bytes of a reply with an image, or of the image that it names
_REDIRECTS = 3  # most redirects on the way to an image
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds
_DEAD_AFTER = 8  # requests in a row that failed with all their retries
_TURNED_AWAY = 10  # times as many retries after 429, which cost nothing and show that the endpoint is alive
_REASONS = {"timeout": "timeout", "cut": "cut_connection", "encoded": "broken_reply"}


class Rate:
    """Spaces out the requests to an address, for all threads and models of a process."""

    def __init__(self):
        self._lock = threading.Lock()
        self._next = 0.0  # monotonic time

    def turn(self, gap: float) -> float:
        """Seconds until it is this caller's turn; the next one's is `gap` seconds later."""
        with self._lock:
            now = time.monotonic()
            mine = max(self._next, now)
            # Up to a tenth of a second of unused time may be used later.
            self._next = max(self._next, now - 0.1) + gap
        return mine - now

    def pause(self, seconds: float) -> None:
        """Holds back all requests for so many seconds."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Client:
    """Posts JSON to one endpoint, from any number of threads."""

    def __init__(self, config: ModelConfig | ImageConfig, what: str, rates: dict[str, Rate], share: float = 1.0):
        """
        Args:
          what: the config's key, for messages. rates: by address, for all clients in this process; this one's is added.
          share: the share of the configured traffic that this process may cause.

        Raises:
          UserError: the address is missing or cannot be used.
        """
        self.what, self.model, self._key_name = what, config.model, config.api_key_env
        self.address = _address(config, what)
        self._key = os.environ.get(config.api_key_env, "")
        check(
            is_key(self._key),
            f"The key in {self._key_name} holds a line break, a space or another character that no key may have.",
        )
        self._headers = {"User-Agent": "fusion_jax"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        # Addresses of images may name the endpoint's own host, in any network, and the hosts in the config.
        self._private = [_place(self.address), *map(_place, getattr(config, "image_hosts", ()))]
        self._retries, self._timeout = config.retries, config.timeout
        concurrency = max(1, round(config.concurrency * share))
        self._places = threading.BoundedSemaphore(concurrency)
        self._rate = rates.setdefault(self.address, Rate())
        self._gap = 1 / (config.requests_per_second * share) if config.requests_per_second else 0.0
        self._dead = 0
        self.counts = {"requests": 0, "retries": 0}
        self._web = Web(concurrency, proxy=proxy_for(self.address))
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Sends no more requests and ends all waits; requests that have been sent may still be answered."""
        self._stopped.set()

    def cut(self) -> None:
        """Ends also the requests that have been sent."""
        self._stopped.set()
        self._web.cut()

    def post(self, path: str, body: dict[str, Any], most: int = MAX_TEXT) -> dict[str, Any]:
        """Posts a request and returns the JSON object of the reply.

        Args:
          most: most bytes that the reply may have.

        Raises:
          The errors of `LanguageModel.chat`, and `Rejected` for a request that the endpoint does not accept.
        """
        data = json.dumps(body).encode()
        tries = turned_away = 0
        while True:
            self._sleep(self._rate.turn(self._gap))
            try:
                with self._places:
                    reply = self._send("POST", f"{self.address}{path}", data, most)
                self._dead = 0
                return reply
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
        """Fetches the list of models. Raises UserError for a missing endpoint, a wrong key or a model not served."""
        for attempt in range(self._retries + 1):
            try:
                reply = self._send("GET", f"{self.address}/models", None, MAX_TEXT)
                break
            except Retryable as e:
                if attempt == self._retries or (e.reason == "no_connection" and attempt == 2):
                    raise UserError(f"No answer from {self.address} ({self.what}.base_url): {e}.") from e
                self._back_off(attempt + 1, e.wait)
            except Rejected as e:
                if e.reason == "redirect":
                    raise UserError(
                        f"{self.address} redirects to another address; give that one as {self.what}.base_url."
                    ) from e
                return  # the endpoint has no such list; the first request will show what is wrong
            except (Refused, Unusable):
                return
        listed = reply.get("data")
        served = [one.get("id") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        if served and self.model not in served:
            some = self._clean(", ".join(sorted(map(str, served))[:8]))
            raise UserError(f"{self.address} does not serve {self.what}.model {self.model!r}; it serves {some}.")

    def fetch(self, url: str) -> bytes:
        """Fetches the content of an address in a reply without the key; time and size are limited as for a reply."""
        try:
            with self._places:
                return fetch(
                    url, max_bytes=MAX_IMAGE, seconds=self._timeout, redirects=_REDIRECTS, private=self._private
                )
        except FetchError as e:
            if e.reason in ("timeout", "no_host", "no_connection", "cut", "status"):
                raise Retryable("no_image", str(e)) from e
            raise Unusable("bad_image", f"{e} (the address of the image)") from e

    def _send(self, method: str, url: str, data: bytes | None, most: int) -> dict[str, Any]:
        if self._stopped.is_set():
            raise Stopped()
        self.counts["requests"] += 1
        headers = self._headers | ({"Content-Type": "application/json"} if data is not None else {})
        try:
            answer = self._web.send(method, url, headers, data, self._timeout, most)
        except WebError as e:
            if self._stopped.is_set():
                raise Stopped() from e
            if e.reason == "too_large":
                raise Unusable("reply_too_long", str(e)) from e
            if e.reason == "invalid":
                raise Unusable("bad_request", self._clean(e)) from e
            raise Retryable(_REASONS.get(e.reason, "no_connection"), self._clean(e)) from e
        return self._judge(answer)

    def _judge(self, answer: Answer) -> dict[str, Any]:
        status, body = answer.status, answer.body
        try:
            content = read_json(body)
        except ValueError:
            content = None
        if 200 <= status < 300:
            if not isinstance(content, dict):
                raise Retryable("broken_reply", "the reply is not a JSON object, or is nested too deep")
            return content
        error = content.get("error", content) if isinstance(content, dict) else None
        error = error if isinstance(error, dict) else {"message": error or body[:400].decode(errors="replace")}
        message = self._clean(error.get("message") or "")
        code = str(error.get("code") or error.get("type") or "")[:200]
        summary = f"HTTP {status}: {message}"
        if status in (401, 403) and "policy" not in code:
            why = (
                f"refuses the key in {self._key_name}" if self._key else f"needs a key, and {self._key_name} is not set"
            )
            raise UserError(f"{self.address} {why} ({summary}).")
        if status == 402 or code in ("insufficient_quota", "billing_hard_limit_reached"):
            raise UserError(f"{self.address} asks for payment ({summary}); the same command goes on from here.")
        if status == 404:
            raise Rejected("not_found", summary)
        if "content_policy" in code or "content_filter" in code or "moderation" in code:
            raise Refused("refused", summary)
        if status in (408, 409, 425, 429) or status >= 500:
            reason = {429: "rate_limited", 408: "timeout"}.get(status, "server_error")
            raise Retryable(reason, summary, retry_after(answer.headers, _LONGEST_WAIT))
        # Redirects are not followed: the key and the captions are only for this address.
        raise Rejected("redirect" if 300 <= status < 400 else "bad_request", summary)

    def _clean(self, text: Any) -> str:
        """Makes a message of the endpoint short and printable, and removes the key."""
        text = self.scrub(str(text))[:2000]
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]

    def scrub(self, text: str) -> str:
        """Removes the key from the text."""
        return text.replace(self._key, "***") if self._key else text

    def _back_off(self, tries: int, wait: float | None) -> None:
        """Sleeps longer with each attempt, or as long as the endpoint demands; with jitter, so that retries spread."""
        self.counts["retries"] += 1
        if wait is None:
            self._sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(tries - 1, 20)) * random.uniform(0.5, 1.0))
        else:
            self._sleep(wait * random.uniform(1.0, 1.5))

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Stopped()

    def _count_dead(self, error: Retryable) -> None:
        self._dead += 1
        if self._dead >= _DEAD_AFTER:
            raise UserError(
                f"{self.address} failed {self._dead} requests in a row, each {self._retries + 1} times "
                f"(last: {error.reason}: {error}); the same command goes on from here."
            )


class Rejected(Unusable):
    """The endpoint answered HTTP 4xx: repeating this request cannot succeed."""


class Stopped(Unusable):
    """The run ended before this request was answered."""

    def __init__(self):
        super().__init__("stopped", "the run was stopped")

    def __reduce__(self):
        return Stopped, ()


def _address(config: ModelConfig | ImageConfig, what: str) -> str:
    """The endpoint's address without a slash at its end. Raises UserError where it is missing or cannot be used."""
    url = config.base_url or os.environ.get("OPENAI_BASE_URL", "")
    if not url:
        raise UserError(f"Give the endpoint's address in {what}.base_url or OPENAI_BASE_URL: https://HOST/v1.")
    parts = url.partition("://")[2]
    check(
        not any(mark in parts for mark in "@?#"),
        f"{what}.base_url must hold no name, password or query: keys come from {config.api_key_env}.",
    )
    check(is_endpoint(url), f"{what}.base_url must be http://HOST/v1 or https://HOST/v1.")
    return url.rstrip("/")


def _place(address: str) -> tuple[str, int]:
    """Host and port of an address, or of HOST:PORT."""
    parts = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
    return parts.hostname or "", parts.port or PORTS[parts.scheme]
