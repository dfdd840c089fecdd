"""Forwards requests to Gradio with headers of our own, and filters the headers of its answers."""

import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fusion_jax.server.addresses import GRADIO, is_static, page_methods
from fusion_jax.server.error import ApiError
from fusion_jax.server.visitors import Refused

log = logging.getLogger("fusion_jax")

SECURITY_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "same-origin"}
_FORWARDED = {
    "accept",
    "accept-encoding",
    "accept-language",
    "host",
    "if-modified-since",
    "if-none-match",
    "user-agent",
    "x-forwarded-host",
    "x-forwarded-proto",
}
# Gradio's page needs inline scripts and functions made from text; it must not reach any other address.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)


def forward(inner, request: Request, body: bytes = b"", query: str = "", set_cookie: str | None = None):
    """An ASGI application that sends a request to Gradio; it keeps only the path and some headers of the original.

    Neither the cookies of the request nor those of Gradio's answer are passed on.

    Args:
      inner: Gradio's application. body: JSON. set_cookie: a cookie for the browser.
    """
    headers = [(name, value) for name, value in request.scope["headers"] if name.decode("latin-1") in _FORWARDED]
    if body:
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

    async def forwarded(scope, receive, send) -> None:
        body_sent = False

        async def receive_body():
            nonlocal body_sent
            if not body_sent:
                body_sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            while (message := await receive())["type"] != "http.disconnect":
                pass
            return message

        begun = ended = missing = False

        async def send_filtered(message) -> None:
            nonlocal begun, ended, missing
            if message.get("status", 200) >= 400 and is_static(scope["path"]):
                missing = True
            if missing:
                return
            begun, ended = True, message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                kept_headers = MutableHeaders(raw=[*message.get("headers", ())])
                for name in {*Headers(raw=kept_headers.raw)}:
                    if name.startswith("access-control-") or name == "set-cookie":
                        del kept_headers[name]
                kept_headers.update(SECURITY_HEADERS | {"content-security-policy": _POLICY})
                if "cache-control" not in kept_headers and not is_static(scope["path"]):
                    kept_headers["cache-control"] = "no-store"
                if set_cookie:
                    kept_headers.append("set-cookie", set_cookie)
                message = {**message, "headers": kept_headers.raw}
            await send(message)

        try:
            # The server sends no body to HEAD.
            changes = {"method": scope["method"].replace("HEAD", "GET"), "query_string": query.encode()}
            await inner({**scope, **changes, "headers": headers}, receive_body, send_filtered)
        except Exception:
            if not begun or ended:
                raise
            # For instance the stream of an unknown session: anybody may request one, so it is not our error.
            log.debug("an answer of the page broke off", exc_info=True)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        if missing:
            await refusal(request, Refused(404, "Not found."))(scope, receive, send)

    return forwarded


def refusal(request: Request, error: ApiError) -> Response:
    """An error in the API's form, with the key that Gradio's page shows beside it."""
    path = request.scope["path"]
    headers = {"Allow": page_methods(path).replace("GET", "GET, HEAD")} if error.status == 405 else {}
    if path == f"{GRADIO}/upload" and error.status != 405:
        return PlainTextResponse(error.message, error.status)
    return JSONResponse({"detail": error.message, **error.body()}, error.status, headers)
