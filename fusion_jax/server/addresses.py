"""Distinguishes the API's addresses from the page's, and refuses requests for any others."""

import re

from fastapi import Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from fusion_jax.server.error import ApiError

GRADIO = "/gradio_api"
# The addresses that Gradio's page requests, with their methods. All other routes of Gradio are closed.
PAGE = {
    "/": "GET",
    "/login": "GET, POST",
    f"{GRADIO}/upload": "POST",
    f"{GRADIO}/queue/join": "POST",
    f"{GRADIO}/cancel": "POST",
    f"{GRADIO}/reset": "POST",
    f"{GRADIO}/queue/data": "GET",
}
FILE = f"{GRADIO}/file="
_LONGEST = 200  # characters of a file's path: none of Gradio's files has a longer one, and file systems refuse those
_STATIC = re.compile(r"/theme\.css|/manifest\.json|/favicon\.ico|/(assets|static)(/\w[\w@-]*)*/\w[\w.@-]*\.[a-z]\w*")


def normalized(path: str) -> str:
    """Removes trailing and repeated slashes from paths of the API, because clients join addresses in many ways."""
    plain = "/" + "/".join(filter(None, path.split("/")))
    return plain if plain in ("/health", "/metrics", "/v1") or plain.startswith("/v1/") else path


def is_static(path: str) -> bool:
    """Whether the path may be one of Gradio's own files."""
    return len(path) <= _LONGEST and _STATIC.fullmatch(path) is not None


def page_methods(path: str) -> str:
    """The methods that the page accepts at an address; "" where the address is not the page's."""
    return PAGE.get(path) or ("GET" if is_static(path) or path.startswith(FILE) else "")


def refusal(request: Request, error: HTTPException) -> JSONResponse:
    """An error in the API's form: 404 lists what is served, 405 the methods that the address accepts."""
    request_line = f"{request.method} {request.scope['path'][:200]}"
    if error.status_code == 405:
        allowed = ", ".join(sorted(error.headers["Allow"].split(", ")))
        text = f"{request_line}: this address takes {allowed} only."
        return JSONResponse(ApiError(405, text, "method_not_allowed").body(), 405, {"Allow": allowed})
    routes = [route for route in request.app.routes if isinstance(route, APIRoute)]
    served = [f"{min(route.methods)} {route.path.replace(':path}', '}')}" for route in routes]
    text = f"{request_line} is not an address of this server; its addresses are {', '.join(served)}."
    return JSONResponse(ApiError(404, text, "not_found").body(), 404)
