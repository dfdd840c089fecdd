"""The HTTP API: chat completions, models, health and metrics over one engine."""

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import fastapi
import prometheus_client as prometheus
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fusion_jax.errors import BadRecord, UserError
from fusion_jax.serve import engine, protocol
from fusion_jax.serve.fetch import fetch
from fusion_jax.serve.protocol import ApiError, Limits

log = logging.getLogger("fusion_jax")


@dataclass(frozen=True)
class Options:
    """model: the name that is served. api_key: what callers must show; "" for nothing. fetch_urls: whether image_url
    may be an http(s) address. timeout: seconds for a request, from its acceptance."""

    model: str
    limits: Limits
    api_key: str = field(default="", repr=False)
    fetch_urls: bool = False
    timeout: float = 120.0


class _Metrics:
    """Everything that /metrics tells; read from the engine when asked."""

    def __init__(self, core: engine.Engine):
        self.core, self.registry = core, prometheus.CollectorRegistry()
        self.responses = prometheus.Counter(
            "fusion_responses", "Chat requests by HTTP status; 499: the caller left", ["status"], registry=self.registry
        )
        self.first = prometheus.Histogram(
            "fusion_first_text_seconds", "From acceptance to the first text", registry=self.registry
        )
        prometheus.ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def collect(self):
        core, told = self.core, self.core.statistics
        for name, what, value in (
            ("fusion_rows", "Requests answered at once at most", core.rows),
            ("fusion_rows_busy", "Requests being answered", core.busy),
            ("fusion_requests_waiting", "Requests that wait for a row", core.waiting),
            ("fusion_requests_open", "Requests accepted and not finished", core.reserved),
            ("fusion_recompilations", "Programs compiled since the warm-up", core.recompilations),
        ):
            yield GaugeMetricFamily(name, what, value=value)
        for name, what, value in (
            ("fusion_prompt_tokens", "Positions prefilled, visual ones included", told.prompt_tokens),
            ("fusion_answer_tokens", "Tokens generated", told.answer_tokens),
            ("fusion_prefills", "Prompts prefilled", told.prefills),
            ("fusion_decode_chunks", "Chunks decoded", told.chunks),
        ):
            yield CounterMetricFamily(name, what, value=value)
        ended = CounterMetricFamily("fusion_answers", "Answers by how they ended", labels=["finish"])
        for finish, count in told.finished.copy().items():
            ended.add_metric([finish], count)
        yield ended


def make_app(core: engine.Engine, options: Options) -> fastapi.FastAPI:
    """The application; the engine must have been started, and is drained when the application ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(core.close)

    app = fastapi.FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    measured, created = _Metrics(core), int(time.time())

    @app.exception_handler(ApiError)
    async def say(request: Request, error: ApiError) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(ApiError(error.status_code, text, "not_found").body(), error.status_code)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(500, "The server failed; its log says why.", "internal_error").body(), 500)

    def authorize(request: Request) -> None:
        if options.api_key:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), options.api_key.encode()):
                raise ApiError(401, "Missing or wrong API key.", "invalid_api_key")

    @app.get("/health")
    async def health() -> Response:
        if core.problem:
            return JSONResponse({"status": "failed", "problem": core.problem}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(prometheus.generate_latest(measured.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    card = {"id": options.model, "object": "model", "created": created, "owned_by": "fusion_jax"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        authorize(request)
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name}")
    async def one_model(request: Request, name: str) -> Response:
        authorize(request)
        if name != options.model:
            raise ApiError(404, f"The model {name!r} does not exist; served is {options.model!r}.", "model_not_found")
        return JSONResponse(card)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        try:
            authorize(request)
            try:
                core.reserve()
            except engine.Full as error:
                raise ApiError(429, "Too many requests are waiting; try again.", "queue_full") from error
            except engine.Closing as error:
                raise ApiError(503, "The server is shutting down.", "shutting_down") from error
            running = _Running(core, options, measured)
            try:
                response = await running.respond(request)
            except BaseException:
                running.close()
                raise
        except ApiError as error:
            measured.responses.labels(error.status).inc()
            raise
        return response

    return app


class _Running:
    """One accepted chat request; `close` gives back all that it holds and may be called twice."""

    def __init__(self, core: engine.Engine, options: Options, measured: _Metrics):
        self.core, self.options, self.measured = core, options, measured
        self.accepted = time.monotonic()
        self.events: asyncio.Queue[engine.Event] = asyncio.Queue()
        self.asked: engine.Request | None = None
        self.open = True

    def close(self) -> None:
        if self.open:
            self.open = False
            if self.asked is not None:
                self.asked.cancel()
            self.core.release()

    async def respond(self, request: Request) -> Response:
        options = self.options
        try:
            body = await asyncio.wait_for(_body(request, options.limits.body_bytes), options.timeout)
        except TimeoutError as error:
            raise ApiError(408, "The request's body did not arrive in time.", "timeout") from error
        except ClientDisconnect as error:
            raise ApiError(499, "The caller has left.", "cancelled") from error
        loop, core = asyncio.get_running_loop(), self.core
        read = functools.partial(fetch, max_bytes=options.limits.image_bytes) if options.fetch_urls else None

        def ask() -> protocol.ChatRequest:
            wanted = protocol.parse(body, options.model, options.limits, read)
            try:
                example = core.prepare(wanted.record)
            except BadRecord as error:
                code = "context_length_exceeded" if error.reason == "too_long" else error.reason
                raise ApiError(400, str(error), code, "messages") from error
            left = self.accepted + options.timeout - time.monotonic()
            try:
                self.asked = core.submit(
                    example, wanted.how, lambda event: loop.call_soon_threadsafe(self.events.put_nowait, event), left
                )
            except engine.Closing as error:
                raise ApiError(503, "The server is shutting down.", "shutting_down") from error
            except UserError as error:
                raise ApiError(400, str(error), "invalid_value") from error
            return wanted

        wanted = await run_in_threadpool(ask)
        name, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        if wanted.stream:
            # The first event decides about the status: a request that times out in the queue is no success.
            first = await self._next(request)
            self._check(first)
            pieces = self._stream(first, wanted, name, created)
            return _Streamed(self, pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        text, event = "", engine.Event()
        while event.finish is None:
            event = await self._next(request)
            self._check(event)
            text += event.text
        counts = protocol.usage(self.asked.prompt_tokens, self.asked.stream.made)
        self.close()
        self.measured.responses.labels(200).inc()
        return JSONResponse(protocol.completion(name, options.model, created, text, event.finish, counts))

    async def _next(self, request: Request) -> engine.Event:
        """The next event, while the caller is still there."""
        while True:
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(self.events.get(), 0.5)
                if event.text and self.accepted:
                    self.measured.first.observe(time.monotonic() - self.accepted)
                    self.accepted = 0.0
                return event
            if await request.is_disconnected():
                raise ApiError(499, "The caller has left.", "cancelled")

    def _check(self, event: engine.Event) -> None:
        if event.finish == "timeout":
            raise ApiError(504, f"Not finished within {self.options.timeout:g} seconds.", "timeout")
        if event.finish in ("error", "cancelled"):
            raise ApiError(500, "The answer was not finished; the server's log says why.", "internal_error")

    async def _stream(self, event, wanted, name: str, created: int) -> AsyncIterator[bytes]:
        piece = functools.partial(protocol.chunk, name, self.options.model, created)
        status = 499  # unless the end is reached
        try:
            yield _sse(piece({"role": "assistant", "content": ""}, None))
            while True:
                if event.text:
                    yield _sse(piece({"content": event.text}, None))
                if event.finish is not None:
                    break
                event = await self.events.get()
                try:
                    self._check(event)
                except ApiError as error:
                    status = error.status
                    yield _sse(error.body())
                    return
            yield _sse(piece({}, event.finish))
            if wanted.usage:
                yield _sse(piece(None, None, protocol.usage(self.asked.prompt_tokens, self.asked.stream.made)))
            yield b"data: [DONE]\n\n"
            status = 200
        finally:
            self.measured.responses.labels(status).inc()
            self.close()


class _Streamed(StreamingResponse):
    """Gives back what the request holds even where the caller leaves before the first piece."""

    def __init__(self, running: _Running, *arguments, **named):
        super().__init__(*arguments, **named)
        self.running = running

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.running.close()


def _sse(data: dict) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def _body(request: Request, most: int) -> bytes:
    """The request's body; ApiError as soon as it is longer than allowed."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > most:
            raise ApiError(413, f"The request has over {most} bytes.", "request_too_large")
    return bytes(data)
