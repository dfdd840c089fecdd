"""Forwards the few requests of the page to Gradio, and refuses all others.

Gradio serves some eighty routes and accepts anything in an event: paths, addresses, other visitors' sessions. This
proxy checks and rewrites requests:

    a browser is identified by a cookie of its own, and by the key where there is one
    an event is the number of a known function and one value for each of its inputs, of the input's kind
    an image is identified by the name that its upload returned to the same browser; Gradio gets its path from here
    a session belongs to one browser and one page, so that visitors cannot reach each other's
    uploads and pictures are transferred through `Uploads`; Gradio's own routes for files are closed
    event streams are limited in number and time, see `event_streams`
"""

import json
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlencode

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from fusion_jax.errors import BadRecord
from fusion_jax.server.addresses import FILE, GRADIO, is_static, page_methods
from fusion_jax.server.error import ApiError
from fusion_jax.server.event_streams import EventStreams
from fusion_jax.server.gradio_forward import SECURITY_HEADERS, forward, refusal
from fusion_jax.server.options import Options
from fusion_jax.server.origins import check_host, check_json, check_origin
from fusion_jax.server.request_bodies import read_body
from fusion_jax.server.upload_forms import UploadForms
from fusion_jax.server.uploads import Uploads
from fusion_jax.server.visitors import Refused, Visitors

LONGEST_TEXT = 1 << 15  # characters of a question: far more than any model reads
EVENT_BYTES = 1 << 18

_PIECE = 1 << 18  # bytes of a file that are read at a time
_SESSION = re.compile(r"\w{1,40}", re.ASCII)
_EVENT = re.compile(r"[0-9a-f]{32}")


class GradioProxy:
    """The ASGI application that is mounted in Gradio's place.

    Args:
      inner: Gradio's application.
      events: for each function of the page the kinds of its inputs: textbox, radio, slider or image.
      pending: whether Gradio has a message for a session, or an unfinished event of it.
    """

    def __init__(
        self,
        inner,
        uploads: Uploads,
        events: dict[int, Sequence[str]],
        options: Options,
        pending: Callable[[str], bool],
    ):
        self.inner, self.uploads, self.events, self.options = inner, uploads, events, options
        self.visitors = Visitors(options)
        # An event waits in the queue and is then answered; each phase has the time limit of a request.
        self.streams = EventStreams(options.streams, 2 * options.timeout + 30, pending)
        self.forms = UploadForms(uploads, options)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except ApiError as error:
            answer = refusal(request, error)
        except ClientDisconnect:
            return
        if isinstance(answer, Response):
            for name, value in SECURITY_HEADERS.items():
                answer.headers.setdefault(name, value)
            answer.headers.setdefault("content-security-policy", "default-src 'none'; sandbox")
        await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Callable[..., Awaitable[None]]:
        path, method = request.scope["path"], request.method.replace("HEAD", "GET")
        if not self.options.api_key:
            check_host(request, self.options.host_names)
        if (method, path) != ("GET", "/"):
            check_origin(request)
        if (method, path) == ("POST", "/login") and self.options.api_key:
            return await self.visitors.log_in(request)
        if (method, path) == ("GET", "/login"):  # the page reloaded after a wrong key
            return RedirectResponse("./", 303)
        allowed = page_methods(path)
        if method not in allowed.split(", "):
            raise Refused(405, f"{request.method} {path[:200]}: this address takes {allowed} only.")
        known = self.visitors.known(request)
        if (method, path) == ("GET", "/"):
            if not known:
                return self.visitors.login_page(200)
            return self._forward(request, set_cookie=self.visitors.welcome(request))
        if not known:
            raise Refused(401, "Log in first: reload the page.")
        if method == "GET" and is_static(path):
            return self._forward(request)
        handlers = {
            ("POST", f"{GRADIO}/upload"): self._upload,
            ("POST", f"{GRADIO}/queue/join"): self._join,
            ("POST", f"{GRADIO}/cancel"): self._cancel,
            ("POST", f"{GRADIO}/reset"): self._reset,
            ("GET", f"{GRADIO}/queue/data"): self._listen,
        }
        handler = handlers.get((method, path))
        if method == "GET" and path.startswith(FILE):
            handler = self._file
        if handler is None:
            raise Refused(404, "Not found.")
        owner = self.visitors.owner(request)
        if not owner:
            raise Refused(403, "This browser is not known here: allow cookies and reload the page.")
        return await handler(request, owner)

    def _forward(self, request: Request, body: bytes = b"", query: str = "", set_cookie: str | None = None):
        return forward(self.inner, request, body, query, set_cookie)

    # ---- One method for each address.

    async def _join(self, request: Request, owner: str):
        """An event of the page, checked and rewritten."""
        data = await _json(request, self.options.timeout)
        number, values, trigger = _get(data, "fn_index", int), _get(data, "data", list), data.get("trigger_id")
        kinds = self.events.get(number)
        if kinds is None or len(values) != len(kinds) or type(trigger) not in (int, type(None)):
            raise Refused(400, "The page has no such event; reload it.")
        event = {
            "fn_index": number,
            "trigger_id": trigger,
            "session_hash": _session(owner, _get(data, "session_hash", str)),
            "data": [self._value(kind, value, owner) for kind, value in zip(kinds, values)],
        }
        self.streams.extend(event["session_hash"])
        return self._forward(request, json.dumps(event).encode())

    def _value(self, kind: str, value, owner: str):
        """An event's value for an input of this kind, as it is passed to Gradio. Raises Refused for any other value."""
        if value is None and kind != "slider":
            return None
        if kind in ("textbox", "radio") and isinstance(value, str):
            if len(value) > LONGEST_TEXT:
                raise Refused(413, f"The text has over {LONGEST_TEXT} characters.")
            return value.encode("utf-8", "replace").decode()
        if kind == "slider" and type(value) in (int, float) and math.isfinite(value) and abs(value) < 1 << 31:
            return value
        if kind == "image" and isinstance(value, dict) and isinstance(value.get("path"), str):
            try:
                path = self.uploads.path(value["path"], owner)
            except BadRecord as error:
                raise Refused(403, f"{error.detail[0].upper()}{error.detail[1:]}.") from error
            return {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        raise Refused(400, f"A {kind} of the page cannot hold that value.")

    async def _cancel(self, request: Request, owner: str):
        data = await _json(request, self.options.timeout)
        event = {
            "session_hash": _session(owner, _get(data, "session_hash", str)),
            "fn_index": _get(data, "fn_index", int),
            "event_id": _get(data, "event_id", str),
        }
        if event["fn_index"] not in self.events or not _EVENT.fullmatch(event["event_id"]):
            raise Refused(400, "The page has no such event; reload it.")
        return self._forward(request, json.dumps(event).encode())

    async def _reset(self, request: Request, owner: str) -> Response:
        """The request that Gradio's page sends after `cancel`; Gradio itself does nothing for it."""
        return JSONResponse({"success": True})

    async def _listen(self, request: Request, owner: str):
        session = _session(owner, request.query_params.get("session_hash", ""))
        if not self.streams.pending(session):
            raise Refused(404, "No message is pending for this page.")
        stream = self._forward(request, query=urlencode({"session_hash": session}))

        async def limited(scope, receive, send) -> None:
            if not await self.streams.run(stream, owner, session, scope, receive, send):
                await refusal(request, Refused(503, "Too many event streams are open; try again."))(
                    scope, receive, send
                )

        return limited

    async def _upload(self, request: Request, owner: str) -> Response:
        return JSONResponse([await self.forms.add(request, owner)])

    async def _file(self, request: Request, owner: str) -> Response:
        name = request.scope["path"].removeprefix(FILE)
        try:
            size, kind = self.uploads.about(name, owner)
        except BadRecord as error:
            raise Refused(404, "Not found.") from error
        # The file is read in pieces: a browser that does not read holds up one piece, and no open file.
        pieces = (self.uploads.read(name, owner, start, _PIECE) for start in range(0, size, _PIECE))
        headers = {
            "content-disposition": "attachment" if kind == "application/octet-stream" else "inline",
            "content-length": str(size),
            "cache-control": "private, no-store",
        }
        return StreamingResponse(pieces, media_type=kind, headers=headers)


async def _json(request: Request, seconds: float) -> dict:
    """The JSON object of a request. Raises ApiError where it is not one."""
    check_json(request)
    try:
        data = json.loads((await read_body(request, EVENT_BYTES, seconds)).getvalue())
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The event is not valid JSON.") from error
    if not isinstance(data, dict):
        raise Refused(400, "An event must be a JSON object.")
    return data


def _get(data: dict, key: str, kind: type):
    """The value of a key. Raises Refused where it is missing or of another type."""
    value = data.get(key)
    if type(value) is not kind:
        raise Refused(400, f"An event needs {key}.")
    return value


def _session(owner: str, session: str) -> str:
    """The name of a browser's session for Gradio."""
    if not _SESSION.fullmatch(session):
        raise Refused(400, "An event needs session_hash.")
    return f"{owner}-{session}"
