"""Defines the HTTP API over one engine: chat completions, models, health and metrics."""

import contextlib
import hmac
import time
from collections.abc import AsyncIterator

import fastapi
import prometheus_client as prometheus
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from fusion_jax.server import addresses
from fusion_jax.server.engine import Engine
from fusion_jax.server.error import ApiError
from fusion_jax.server.grammar import Grammars
from fusion_jax.server.middleware import ApiMiddleware
from fusion_jax.server.options import Options
from fusion_jax.server.origins import check_host, check_json, check_origin, cors_headers, from_browser
from fusion_jax.server.running_request import RunningRequest, Shared


def make_app(engine: Engine, options: Options, grammars: Grammars) -> fastapi.FastAPI:
    """The application. The engine must have been started; it is drained when the application ends.

    Args:
      grammars: makes the grammars of answers' forms. Call `Grammars.load` before, or the first such request waits.
    """
    shared, created = Shared(engine, options, grammars), int(time.time())
    key = options.api_key.encode(errors="surrogateescape")  # from the environment: may not be valid UTF-8

    @contextlib.asynccontextmanager
    async def lifespan(app) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)
        shared.close()

    # No redirects: they would lead to any host that the caller names.
    app = fastapi.FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(ApiMiddleware, origins=options.origins)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return addresses.refusal(request, error)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        problem = ApiError(500, "The server failed; its log says why.", "internal_error")
        # This handler runs outside of all middleware.
        return JSONResponse(problem.body(), 500, cors_headers(request.headers, options.origins))

    def authorize(request: Request) -> None:
        check_origin(request, options.origins)
        if not key:
            check_host(request, options.host_names)
        else:
            # Headers are decoded as Latin-1; encoding them in it restores the bytes that were sent.
            scheme, key_sent = [*request.headers.get("authorization", "").split(maxsplit=1), "", ""][:2]
            matches = hmac.compare_digest(key_sent.strip().encode("latin-1"), key)
            if scheme.lower() != "bearer" or not matches:
                raise ApiError(401, "Missing or wrong API key.", "invalid_api_key")

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        if engine.problem:
            return JSONResponse({"status": "failed", "problem": engine.problem}, 503)
        if engine.silent > options.timeout:
            return JSONResponse(
                {"status": "stuck", "problem": f"no answer of the device for {engine.silent:.0f} s"}, 503
            )
        return JSONResponse({"status": "ok"})

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        return Response(prometheus.generate_latest(shared.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

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
                404, f"The model {name[:80]!r} does not exist; this server has {options.model!r}.", "model_not_found"
            )
        return JSONResponse(card)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        running = RunningRequest(shared)
        try:
            authorize(request)
            if from_browser(request):  # other programs may leave out the content type
                check_json(request)
            return await running.respond(request)
        except BaseException as error:
            running.close()
            if isinstance(error, Exception):
                shared.metrics.responses.labels(error.status if isinstance(error, ApiError) else 500).inc()
            raise

    return app
