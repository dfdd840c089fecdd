"""Runs one chat request of the API, from its body to the last byte of its whole or streamed answer."""

import asyncio
import contextlib
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from fusion_jax.errors import BadRecord, UserError
from fusion_jax.server import protocol, requests
from fusion_jax.server.engine import Engine
from fusion_jax.server.error import ApiError
from fusion_jax.server.grammar import Grammars
from fusion_jax.server.metrics import Metrics
from fusion_jax.server.options import Options
from fusion_jax.server.request_bodies import Budget, read_body
from fusion_jax.server.thread_pool import ThreadPool
from fusion_jax.web.fetch import FetchError, fetch

FETCH_SECONDS = 10.0  # for all images of a request that are addresses
_GRACE = 1.0  # seconds after the deadline in which a caller may still read what is written


class Shared:
    """What all requests share: the engine, the metrics, the memory budget of bodies, and threads.

    Images are fetched and decoded in threads of their own, and grammars are built in others, so that text never waits
    for a slow host, a large image or a large schema.
    """

    def __init__(self, engine: Engine, options: Options, grammars: Grammars):
        self.engine, self.options, self.grammars = engine, options, grammars
        self.metrics = Metrics(engine)
        self.budget = Budget(options.bodies_bytes)
        self.preparing = ThreadPool("prepare", options.threads)
        self.decoding = ThreadPool("decode", options.threads)
        self.fetching = ThreadPool("fetch", options.fetching, queue=options.fetching)
        self.building = ThreadPool("grammar", options.building, queue=8 * options.building)

    def close(self) -> None:
        """Ends the threads."""
        for pool in (self.preparing, self.decoding, self.fetching, self.building):
            pool.close()


class RunningRequest:
    """One chat request. `close` gives back everything that it holds, and may be called twice."""

    def __init__(self, shared: Shared):
        self.shared, self.engine, self.options = shared, shared.engine, shared.options
        self.accepted = time.monotonic()
        self.events: asyncio.Queue[requests.Event] = asyncio.Queue()
        self.submitted: requests.Request | None = None
        self._share = shared.budget.share()
        self._reserved = self._has_text = False

    @property
    def left(self) -> float:
        """Seconds until the deadline, negative after it."""
        return self.accepted + self.options.timeout - time.monotonic()

    def close(self) -> None:
        self._share.free()
        if self.submitted is not None:
            self.submitted.cancel()
        if self._reserved:
            self._reserved = False
            self.engine.release()

    async def respond(self, request: Request) -> Response:
        """The answer. Raises ApiError 504 at the deadline, whatever the request is waiting for."""
        try:
            async with asyncio.timeout(max(self.left, 0)):
                return await self._respond(request)
        except TimeoutError as error:
            raise self._late() from error

    async def _respond(self, request: Request) -> Response:
        options = self.options
        seconds = min(options.body_seconds, self.left)
        body = await read_body(request, options.limits.body_bytes, seconds, self._share)
        stream, usage = await self._submit(body)
        name, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        if stream:
            # The first event decides the status: a request that times out in the queue is not a success.
            first = await self._next(request)
            self._check(first)
            pieces = self._stream(first, usage, name, created)
            return _StreamedResponse(
                self, pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        text, tokens, event = "", [], requests.Event()
        while event.finish is None:
            event = await self._next(request)
            self._check(event)
            text += event.text
            tokens += event.tokens
        logprobs = self._logprobs(tokens, True)
        counts = protocol.usage(self.submitted.prompt_tokens, self.submitted.stream.length)
        self.close()
        self.shared.metrics.responses.labels(200).inc()
        return JSONResponse(protocol.completion(name, options.model, created, text, event.finish, counts, logprobs))

    async def _submit(self, body) -> tuple[bool, bool]:
        """Submits the request to the engine. Returns whether to stream, and whether to report the usage in the stream.

        Its place is reserved once everything that the caller sends or links to has arrived.
        """
        options, engine, shared = self.options, self.engine, self.shared
        parsed = await shared.preparing.run(protocol.parse, body, options.model, options.limits, options.fetch_urls)
        if parsed.addresses:
            fetched = await shared.fetching.run(_fetch, parsed.addresses, options.limits.image_bytes)
            self._share.grow(sum(map(len, fetched.values())))
            parsed = await shared.preparing.run(parsed.with_fetched, fetched, options.limits)
        constraint = None
        if parsed.form is not None:
            constraint = await shared.building.run(lambda: shared.grammars.matcher(parsed.form))
        with _as_api_errors():
            engine.reserve()
            self._reserved = True
            pool = shared.decoding if parsed.record.images else shared.preparing
            example = await pool.run(engine.prepare, parsed.record)
            self._share.free()
            loop = asyncio.get_running_loop()

            def emit(event: requests.Event) -> None:
                loop.call_soon_threadsafe(self.events.put_nowait, event)

            more = {"constraint": constraint, "top_logprobs": parsed.top_logprobs}
            self.submitted = engine.submit(example, parsed.how, emit, self.left, **more)
        return parsed.stream, parsed.usage

    async def _next(self, request: Request) -> requests.Event:
        """The next event. Raises ApiError 499 when the caller disconnects."""
        while True:
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(self.events.get(), 0.5)
                if event.text and not self._has_text:
                    self.shared.metrics.first.observe(time.monotonic() - self.accepted)
                    self._has_text = True
                return event
            if await request.is_disconnected():
                raise ApiError(499, "The caller has disconnected.", "cancelled")

    def _logprobs(self, tokens: Sequence[requests.TokenLogprob], whole: bool = False) -> dict | None:
        """The log probabilities of tokens for the answer; None where the request does not want them.

        Args:
          whole: whether this is the whole answer, which carries them even where there are no tokens.
        """
        if self.submitted.top_logprobs is None or not (tokens or whole):
            return None
        return protocol.logprobs_of(tokens, self.engine.prompts.tokenizer)

    def _check(self, event: requests.Event) -> None:
        if event.problem:
            raise ApiError(400, event.problem, "form_not_possible")
        if event.finish == "timeout":
            raise self._late()
        if event.finish == "error" and self.engine.problem:
            raise _failed(self.engine.problem)
        if event.finish == "cancelled" and self.engine.closing:
            raise ApiError(503, "The server is shutting down.", "shutting_down")
        if event.finish in ("error", "cancelled"):
            raise ApiError(500, "The answer was not finished; the server's log says why.", "internal_error")

    def _late(self) -> ApiError:
        return ApiError(504, f"Not finished within {self.options.timeout:g} seconds.", "timeout")

    async def _stream(self, event, usage: bool, name: str, created: int) -> AsyncIterator[bytes]:
        piece = functools.partial(protocol.chunk, name, self.options.model, created)
        status = 499  # unless the answer is sent completely
        try:
            yield _sse(piece({"role": "assistant", "content": ""}, None))
            while True:
                if event.text or event.tokens:
                    yield _sse(piece({"content": event.text}, None, logprobs=self._logprobs(event.tokens)))
                if event.finish is not None:
                    break
                try:
                    try:
                        event = await asyncio.wait_for(self.events.get(), max(self.left, 0))
                    except TimeoutError as error:
                        raise self._late() from error
                    self._check(event)
                except ApiError as error:
                    status = error.status
                    yield _sse(error.body())
                    return
            yield _sse(piece({}, event.finish))
            if usage:
                yield _sse(
                    piece(None, None, protocol.usage(self.submitted.prompt_tokens, self.submitted.stream.length))
                )
            yield b"data: [DONE]\n\n"
            status = 200
        finally:
            self.shared.metrics.responses.labels(status).inc()
            self.close()


class _StreamedResponse(StreamingResponse):
    """Frees what the request holds even where the caller disconnects before the first piece, or does not read."""

    def __init__(self, chat: RunningRequest, *arguments, **named):
        super().__init__(*arguments, **named)
        self.chat = chat

    async def __call__(self, scope, receive, send) -> None:
        try:
            # After the deadline this only waits for the caller to read; then the connection is cut, see `connections`.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(self.chat.left, 0) + _GRACE):
                    await super().__call__(scope, receive, send)
        finally:
            self.chat.close()


def _sse(data: dict) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


@contextlib.contextmanager
def _as_api_errors() -> Iterator[None]:
    """Raises the engine's refusals as errors of the API."""
    try:
        yield
    except requests.Full as error:
        raise ApiError(429, "Too many requests are waiting; try again.", "queue_full") from error
    except requests.Failed as error:
        raise _failed(str(error)) from error
    except requests.Closing as error:
        raise ApiError(503, "The server is shutting down.", "shutting_down") from error
    except BadRecord as error:
        code = "context_length_exceeded" if error.reason == "too_long" else error.reason
        raise ApiError(400, str(error), code, "messages") from error
    except UserError as error:
        raise ApiError(400, str(error), "invalid_value") from error


def _failed(problem: str) -> ApiError:
    return ApiError(503, f"The engine has failed, and the server ends: {problem}", "engine_failed")


def _fetch(addresses: dict[int, str], most: int) -> dict[int, bytes]:
    """The data at the addresses, by their numbers, with one deadline for all of them."""
    end, fetched = time.monotonic() + FETCH_SECONDS, {}
    for number, address in addresses.items():
        try:
            fetched[number] = fetch(address, max_bytes=most, seconds=max(end - time.monotonic(), 0.0))
        except FetchError as error:
            raise ApiError(400, f"image_url: {error}", "invalid_image_url", "messages") from error
    return fetched
