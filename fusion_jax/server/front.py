"""What requests pass first: the API's addresses in one spelling, and what browsers ask and hear about origins."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from fusion_jax.server.addresses import page_methods, tidied
from fusion_jax.server.error import ApiError
from fusion_jax.server.origins import cors_headers, is_preflight, preflight

_ANY = "GET, HEAD, POST"  # where nothing is served: the page that asks may read that


class Front:
    """Middleware before the routes. The page's addresses pass as they are: other sites never use them.

    Args:
      origins: that may use the API, see `origins.read_origins`.
    """

    def __init__(self, app, origins: tuple[str, ...]):
        self.app, self.origins = app, origins

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or page_methods(scope["path"]):
            return await self.app(scope, receive, send)
        path = tidied(scope["path"])
        if path != scope["path"]:
            scope = {**scope, "path": path, "raw_path": path.encode()}
        headers = Headers(scope=scope)
        more = cors_headers(headers, self.origins)

        async def tell(message) -> None:
            if message["type"] == "http.response.start":
                kept = MutableHeaders(raw=[*message.get("headers", ())])
                for name, value in more.items():
                    kept.add_vary_header(value) if name == "vary" else kept.__setitem__(name, value)
                message = {**message, "headers": kept.raw}
            await send(message)

        if not is_preflight(scope["method"], headers):
            return await self.app(scope, receive, tell)
        try:
            answer = Response(None, 204, preflight(headers, self.origins, _methods(scope)))
        except ApiError as error:
            answer = JSONResponse(error.body(), error.status)
        await answer(scope, receive, tell)


def _methods(scope) -> str:
    """What may be asked at an address."""
    for route in scope["app"].routes:
        if route.matches(scope)[0] is not Match.NONE:
            return ", ".join(sorted(route.methods))
    return _ANY
