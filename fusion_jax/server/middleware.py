"""Normalizes the addresses of requests before the API's routes, and adds the CORS headers."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from fusion_jax.server.addresses import normalized, page_methods
from fusion_jax.server.error import ApiError
from fusion_jax.server.origins import cors_headers, is_preflight, preflight

_ANY = "GET, HEAD, POST"  # where nothing is served, so that the requesting page may read the error


class ApiMiddleware:
    """ASGI middleware before the routes. Requests for the page pass unchanged: other sites must not use it.

    Args:
      origins: origins that may use the API, see `origins.read_origins`.
    """

    def __init__(self, app, origins: tuple[str, ...]):
        self.app, self.origins = app, origins

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or page_methods(scope["path"]):
            return await self.app(scope, receive, send)
        path = normalized(scope["path"])
        if path != scope["path"]:
            scope = {**scope, "path": path, "raw_path": path.encode()}
        headers = Headers(scope=scope)
        more = cors_headers(headers, self.origins)

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                answer_headers = MutableHeaders(raw=[*message.get("headers", ())])
                for name, value in more.items():
                    answer_headers.add_vary_header(value) if name == "vary" else answer_headers.__setitem__(name, value)
                message = {**message, "headers": answer_headers.raw}
            await send(message)

        if not is_preflight(scope["method"], headers):
            return await self.app(scope, receive, send_with_headers)
        try:
            answer = Response(None, 204, preflight(headers, self.origins, _methods(scope)))
        except ApiError as error:
            answer = JSONResponse(error.body(), error.status)
        await answer(scope, receive, send_with_headers)


def _methods(scope) -> str:
    """The methods that an address accepts."""
    for route in scope["app"].routes:
        if route.matches(scope)[0] is not Match.NONE:
            return ", ".join(sorted(route.methods))
    return _ANY
