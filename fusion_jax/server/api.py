"""The HTTP API: chat completions, models, health and metrics over one engine."""

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

import fastapi
import prometheus_client as prometheus
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from fusion_jax.errors import BadRecord, UserError
from fusion_jax.server import addresses, engine, protocol
from fusion_jax.server.error import ApiError
from fusion_jax.server.front import Front
from fusion_jax.server.grammar import Grammars
from fusion_jax.server.intake import Budget, Pool, read_body
from fusion_jax.server.origins import check_host, check_json, check_origin, cors_headers, from_browser
from fusion_jax.server.protocol import Limits
from fusion_jax.web.fetch import FetchError, fetch

FETCH_SECONDS = 10.0  # for all images of a request that are addresses
_GRACE = 1.0  # seconds behind its deadline in which a caller may still take what is written for him

log = logging.getLogger("fusion_jax")


@dataclass(frozen=True)
class Options:
    """What the application is to do.

    Attributes:
      model: the name that is served. api_key: what callers must show; "" for nothing. host_names: public ones under
        which the server answers without a key, see `origins`. fetch_urls: whether image_url may be an http(s) address.
        timeout: seconds for a request, from the end of its headers. body_seconds: of these, for its body.
        bodies_bytes: of all requests together whose prompts are not ready. threads: that prepare prompts, and as many
        more that decode images; fetching: requests whose images are fetched at once, and as many more that wait for it.
        building: grammars of answers' forms that are built at once, and eight times as many that wait for it.
        streams: of the page's events, at once.
    """

    model: str
    limits: Limits
    api_key: str = field(default="", repr=False)
    host_names: Collection[str] = ()
    origins: tuple[str, ...] = ()
    fetch_urls: bool = False
    timeout: float = 120.0
    body_seconds: float = 60.0
    bodies_bytes: int = 256 << 20
    threads: int = 4
    fetching: int = 8
    building: int = 2
    streams: int = 256


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
        core, counts = self.core, self.core.statistics
        for name, what, value in (
            ("fusion_rows", "Requests answered at once at most", core.rows),
            ("fusion_rows_busy", "Requests being answered", core.busy),
            ("fusion_requests_waiting", "Requests that wait for a row", core.waiting),
            ("fusion_requests_open", "Requests accepted and not finished", core.reserved),
            ("fusion_recompilations", "Programs compiled since the warm-up", core.recompilations),
        ):
            yield GaugeMetricFamily(name, what, value=value)
        for name, what, value in (
            ("fusion_prompt_tokens", "Positions prefilled, visual ones included", counts.prompt_tokens),
            ("fusion_answer_tokens", "Tokens generated", counts.answer_tokens),
            ("fusion_prefills", "Prompts prefilled", counts.prefills),
            ("fusion_decode_chunks", "Chunks decoded", counts.chunks),
        ):
            yield CounterMetricFamily(name, what, value=value)
        ended = CounterMetricFamily("fusion_answers", "Answers by how they ended", labels=["finish"])
        for finish, count in counts.finished.copy().items():
            ended.add_metric([finish], count)
        yield ended


class _Rooms:
    """What all requests share: the engine, the metrics, memory for bodies, and threads. Those that fetch and decode
    images are apart, and those that build grammars, so that text never waits for a slow host, a large picture or a
    large schema."""

    def __init__(self, core: engine.Engine, options: Options, grammars: Grammars | None):
        self.core, self.options = core, options
        if grammars is not None:
            self.grammars = grammars
        self.measured = _Metrics(core)
        self.budget = Budget(options.bodies_bytes)
        self.preparing = Pool("prepare", options.threads)
        self.decoding = Pool("decode", options.threads)
        self.fetching = Pool("fetch", options.fetching, queue=options.fetching)
        self.building = Pool("grammar", options.building, queue=8 * options.building)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Of the forms that answers have; unless the caller of `make_app` has made them, made when first needed."""
        return Grammars(self.core.prompts, self.core.model.config.llm.vocab_size)


def make_app(core: engine.Engine, options: Options, grammars: Grammars | None = None) -> fastapi.FastAPI:
    """The application; the engine must have been started, and is drained when the application ends. grammars: loaded
    ones; None: they are made when a request first wants a form."""
    rooms = _Rooms(core, options, grammars)
    measured, created = rooms.measured, int(time.time())
    key = options.api_key.encode(errors="surrogateescape")  # from the environment: possibly bytes that are no UTF-8

    @contextlib.asynccontextmanager
    async def lifespan(app) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(core.close)
        for pool in (rooms.preparing, rooms.decoding, rooms.fetching, rooms.building):
            pool.close()

    # A redirect would lead to whatever host the caller names.
    app = fastapi.FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Front, origins=options.origins)

    @app.exception_handler(ApiError)
    async def say(request: Request, error: ApiError) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return addresses.refusal(request, error)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        said = ApiError(500, "The server failed; its log says why.", "internal_error")
        # It is made outside of all middleware.
        return JSONResponse(said.body(), 500, cors_headers(request.headers, options.origins))

    def authorize(request: Request) -> None:
        check_origin(request, options.origins)
        if not key:
            check_host(request, options.host_names)
        else:
            # Headers are read as Latin-1: encoded so, the bytes are those that were sent.
            scheme, given = [*request.headers.get("authorization", "").split(maxsplit=1), "", ""][:2]
            right = hmac.compare_digest(given.strip().encode("latin-1"), key)
            if scheme.lower() != "bearer" or not right:
                raise ApiError(401, "Missing or wrong API key.", "invalid_api_key")

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        if core.problem:
            return JSONResponse({"status": "failed", "problem": core.problem}, 503)
        if core.silent > options.timeout:
            return JSONResponse({"status": "stuck", "problem": f"no answer of the device for {core.silent:.0f} s"}, 503)
        return JSONResponse({"status": "ok"})

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        return Response(prometheus.generate_latest(measured.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    card = {"id": options.model, "object": "model", "created": created, "owned_by": "fusion_jax"}

    @app.api_route("/v1/models", methods=["GET", "HEAD"])
    async def models(request: Request) -> Response:
        authorize(request)
        return JSONResponse({"object": "list", "data": [card]})

    @app.api_route("/v1/models/{name:path}", methods=["GET", "HEAD"])
    async def one_model(request: Request, name: str) -> Response:
        authorize(request)
        if name != options.model:
            raise ApiError(
                404, f"The model {name[:80]!r} does not exist; served is {options.model!r}.", "model_not_found"
            )
        return JSONResponse(card)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        running = _Running(rooms)
        try:
            authorize(request)
            if from_browser(request):  # else no type need be said
                check_json(request)
            return await running.respond(request)
        except BaseException as error:
            running.close()
            if isinstance(error, Exception):
                measured.responses.labels(error.status if isinstance(error, ApiError) else 500).inc()
            raise

    return app


class _Running:
    """One chat request; `close` gives back all that it holds and may be called twice."""

    def __init__(self, rooms: _Rooms):
        self.rooms, self.core, self.options = rooms, rooms.core, rooms.options
        self.accepted = time.monotonic()
        self.events: asyncio.Queue[engine.Event] = asyncio.Queue()
        self.asked: engine.Request | None = None
        self._share = rooms.budget.share()
        self._placed = self._heard = False

    @property
    def left(self) -> float:
        """Seconds until the deadline, possibly below 0."""
        return self.accepted + self.options.timeout - time.monotonic()

    def close(self) -> None:
        self._share.free()
        if self.asked is not None:
            self.asked.cancel()
        if self._placed:
            self._placed = False
            self.core.release()

    async def respond(self, request: Request) -> Response:
        """Whatever takes so long, and whether or not it can be stopped: ApiError 504 at the deadline."""
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
            # The first event decides about the status: a request that times out in the queue is no success.
            first = await self._next(request)
            self._check(first)
            pieces = self._stream(first, usage, name, created)
            return _Streamed(self, pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        text, tokens, event = "", [], engine.Event()
        while event.finish is None:
            event = await self._next(request)
            self._check(event)
            text += event.text
            tokens += event.tokens
        likely = self._likely(tokens, True)
        counts = protocol.usage(self.asked.prompt_tokens, self.asked.stream.made)
        self.close()
        self.rooms.measured.responses.labels(200).inc()
        return JSONResponse(protocol.completion(name, options.model, created, text, event.finish, counts, likely))

    async def _submit(self, body) -> tuple[bool, bool]:
        """Hands the request to the engine, and keeps nothing of it but whether to stream, and to tell the usage then.
        Its place is taken once everything that the caller sends or names is here."""
        options, core, rooms = self.options, self.core, self.rooms
        wanted = await rooms.preparing.run(protocol.parse, body, options.model, options.limits, options.fetch_urls)
        if wanted.addresses:
            fetched = await rooms.fetching.run(_fetch, wanted.addresses, options.limits.image_bytes)
            self._share.grow(sum(map(len, fetched.values())))
            wanted = await rooms.preparing.run(wanted.with_fetched, fetched, options.limits)
        constraint = None
        if wanted.form is not None:
            constraint = await rooms.building.run(lambda: rooms.grammars.matcher(wanted.form))
        with _refusals():
            core.reserve()
            self._placed = True
            pool = rooms.decoding if wanted.record.images else rooms.preparing
            example = await pool.run(core.prepare, wanted.record)
            self._share.free()
            loop = asyncio.get_running_loop()

            def emit(event: engine.Event) -> None:
                loop.call_soon_threadsafe(self.events.put_nowait, event)

            more = {"constraint": constraint, "likely": wanted.likely}
            self.asked = core.submit(example, wanted.how, emit, self.left, **more)
        return wanted.stream, wanted.usage

    async def _next(self, request: Request) -> engine.Event:
        """The next event, while the caller is still there."""
        while True:
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(self.events.get(), 0.5)
                if event.text and not self._heard:
                    self.rooms.measured.first.observe(time.monotonic() - self.accepted)
                    self._heard = True
                return event
            if await request.is_disconnected():
                raise ApiError(499, "The caller has left.", "cancelled")

    def _likely(self, tokens, whole: bool = False) -> dict | None:
        """What the caller hears of tokens: in an answer as a whole something wherever he asked for it, in a piece of
        one only where there are any."""
        if self.asked.likely is None or not (tokens or whole):
            return None
        return protocol.logprobs(tokens, self.core.prompts.tokenizer)

    def _check(self, event: engine.Event) -> None:
        if event.problem:
            raise ApiError(400, event.problem, "form_not_possible")
        if event.finish == "timeout":
            raise self._late()
        if event.finish == "error" and self.core.problem:
            raise _failed(self.core.problem)
        if event.finish == "cancelled" and self.core.closing:
            raise ApiError(503, "The server is shutting down.", "shutting_down")
        if event.finish in ("error", "cancelled"):
            raise ApiError(500, "The answer was not finished; the server's log says why.", "internal_error")

    def _late(self) -> ApiError:
        return ApiError(504, f"Not finished within {self.options.timeout:g} seconds.", "timeout")

    async def _stream(self, event, usage: bool, name: str, created: int) -> AsyncIterator[bytes]:
        piece = functools.partial(protocol.chunk, name, self.options.model, created)
        status = 499  # unless the end is reached
        try:
            yield _sse(piece({"role": "assistant", "content": ""}, None))
            while True:
                if event.text or event.tokens:
                    yield _sse(piece({"content": event.text}, None, likely=self._likely(event.tokens)))
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
                yield _sse(piece(None, None, protocol.usage(self.asked.prompt_tokens, self.asked.stream.made)))
            yield b"data: [DONE]\n\n"
            status = 200
        finally:
            self.rooms.measured.responses.labels(status).inc()
            self.close()


class _Streamed(StreamingResponse):
    """Gives back what the request holds even where the caller leaves before the first piece, or does not read."""

    def __init__(self, running: _Running, *arguments, **named):
        super().__init__(*arguments, **named)
        self.running = running

    async def __call__(self, scope, receive, send) -> None:
        try:
            # Past the deadline it waits for a reader only; the connection is then cut, see `connections`.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(self.running.left, 0) + _GRACE):
                    await super().__call__(scope, receive, send)
        finally:
            self.running.close()


def _sse(data: dict) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


@contextlib.contextmanager
def _refusals():
    """What the engine refuses, as the API says it."""
    try:
        yield
    except engine.Full as error:
        raise ApiError(429, "Too many requests are waiting; try again.", "queue_full") from error
    except engine.Failed as error:
        raise _failed(str(error)) from error
    except engine.Closing as error:
        raise ApiError(503, "The server is shutting down.", "shutting_down") from error
    except BadRecord as error:
        code = "context_length_exceeded" if error.reason == "too_long" else error.reason
        raise ApiError(400, str(error), code, "messages") from error
    except UserError as error:
        raise ApiError(400, str(error), "invalid_value") from error


def _failed(problem: str) -> ApiError:
    return ApiError(503, f"The engine has failed, and the server ends: {problem}", "engine_failed")


def _fetch(addresses: dict[int, str], most: int) -> dict[int, bytes]:
    """What lies behind the addresses, with one deadline for all of them."""
    end, fetched = time.monotonic() + FETCH_SECONDS, {}
    for number, address in addresses.items():
        try:
            fetched[number] = fetch(address, max_bytes=most, seconds=max(end - time.monotonic(), 0.0))
        except FetchError as error:
            raise ApiError(400, f"image_url: {error}", "invalid_image_url", "messages") from error
    return fetched
