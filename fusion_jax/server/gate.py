"""What stands before Gradio: the few requests that the page makes pass, checked and written anew; all else is refused.

Gradio serves some eighty routes and takes whatever lies in an event: paths, addresses, other visitors' sessions. Here

    a browser is known by a cookie of its own, and by the key where there is one
    an event is a known function's number and as many values as it has inputs, each of its input's kind
    an image is named by what an upload of the same browser was given; Gradio hears the path from here
    a session is the browser's and the page's, so that nobody reaches another's
    uploads and pictures come and go through `Uploads`; Gradio's own routes for files are closed
    a stream of events is one of few, and ends, see `listeners`
"""

import asyncio
import contextlib
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse

from fusion_jax.errors import BadRecord
from fusion_jax.server.addresses import FILE, GRADIO, is_static, page_methods
from fusion_jax.server.api import Options
from fusion_jax.server.error import ApiError
from fusion_jax.server.intake import check_plain, read_body
from fusion_jax.server.listeners import Listeners
from fusion_jax.server.origins import check_host, check_json, check_origin, media_type
from fusion_jax.server.uploads import NoRoom, Uploads
from fusion_jax.server.visitors import Refused, Visitors

log = logging.getLogger("fusion_jax")

LONGEST_TEXT = 1 << 15  # characters of a question: far more than any model reads
EVENT_BYTES = 1 << 18
UPLOADS = 16  # at once
SLOW = 5.0  # seconds after which an upload that is not here makes room for another where all are taken
KEPT_AT_ONCE = 2  # uploads that are here in full and in memory
FORM_BYTES = 1 << 14  # of an upload beside the file

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it tells what strangers send

_PIECE = 1 << 18  # bytes of a file that are read at once
_SESSION = re.compile(r"\w{1,40}", re.ASCII)
_EVENT = re.compile(r"[0-9a-f]{32}")
_HEARD = {
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
# Gradio's page needs inline scripts and functions made of text; no address but this one is reached by anything.
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
_ALWAYS = {"x-content-type-options": "nosniff", "referrer-policy": "same-origin"}


class Gate:
    """The application that is mounted in Gradio's place.

    Args:
      inner: Gradio's. events: for each function of the page the kinds of its inputs: textbox, radio, slider or image.
        pending: whether Gradio has anything for a session, or will have.
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
        # An event waits for its turn and is answered, each within the time for a request.
        self.listeners = Listeners(options.streams, 2 * options.timeout + 30, pending)
        self._uploading = asyncio.Semaphore(UPLOADS)
        self._arriving: dict[asyncio.Timeout, float] = {}  # uploads that are not here, and since when; the oldest first
        self._keeping = asyncio.Semaphore(KEPT_AT_ONCE)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except ApiError as error:
            answer = _refusal(request, error)
        except ClientDisconnect:
            return
        if isinstance(answer, Response):
            for name, value in _ALWAYS.items():
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
        if (method, path) == ("GET", "/login"):  # reloaded after a wrong key
            return RedirectResponse("./", 303)
        allowed = page_methods(path)
        if method not in allowed.split(", "):
            raise Refused(405, f"{request.method} {path[:200]}: this address takes {allowed} only.")
        known = self.visitors.known(request)
        if (method, path) == ("GET", "/"):
            if not known:
                return self.visitors.login_page(200)
            return self._pass(request, set_cookie=self.visitors.welcome(request))
        if not known:
            raise Refused(401, "Log in first: reload the page.")
        if method == "GET" and is_static(path):
            return self._pass(request)
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

    # ---- What is asked.

    async def _join(self, request: Request, owner: str):
        data = await _json(request, self.options.timeout)
        number, values, trigger = _get(data, "fn_index", int), _get(data, "data", list), data.get("trigger_id")
        kinds = self.events.get(number)
        if kinds is None or len(values) != len(kinds) or type(trigger) not in (int, type(None)):
            raise Refused(400, "The page has no such event; reload it.")
        written = {
            "fn_index": number,
            "trigger_id": trigger,
            "session_hash": _session(owner, _get(data, "session_hash", str)),
            "data": [self._value(kind, value, owner) for kind, value in zip(kinds, values)],
        }
        self.listeners.extend(written["session_hash"])
        return self._pass(request, json.dumps(written).encode())

    def _value(self, kind: str, value, owner: str):
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
        written = {
            "session_hash": _session(owner, _get(data, "session_hash", str)),
            "fn_index": _get(data, "fn_index", int),
            "event_id": _get(data, "event_id", str),
        }
        if written["fn_index"] not in self.events or not _EVENT.fullmatch(written["event_id"]):
            raise Refused(400, "The page has no such event; reload it.")
        return self._pass(request, json.dumps(written).encode())

    async def _reset(self, request: Request, owner: str) -> Response:
        """What Gradio's page sends after `cancel`; it changes nothing there either."""
        return JSONResponse({"success": True})

    async def _listen(self, request: Request, owner: str):
        session = _session(owner, request.query_params.get("session_hash", ""))
        if not self.listeners.pending(session):
            raise Refused(404, "Nothing is on its way to this page.")
        passed = self._pass(request, query=urlencode({"session_hash": session}))

        async def listened(scope, receive, send) -> None:
            if not await self.listeners.run(passed, owner, session, scope, receive, send):
                await _refusal(request, Refused(503, "Too many pages listen; try again."))(scope, receive, send)

        return listened

    async def _upload(self, request: Request, owner: str) -> Response:
        if media_type(request) != "multipart/form-data":
            raise Refused(415, "An upload is a form with one file.")
        check_plain(request)
        if self._uploading.locked():
            now = asyncio.get_running_loop().time()
            oldest, since = next(iter(self._arriving.items()), (None, now))
            if now - since < SLOW:
                raise Refused(503, "Too many uploads at once; try again.")
            del self._arriving[oldest]
            oldest.reschedule(now)
        most = self.options.limits.image_bytes
        async with self._uploading, contextlib.AsyncExitStack() as stack:
            file = await self._received(request, stack)
            async with self._keeping:
                data = await file.read(most + 1)
                if len(data) > most:
                    raise Refused(413, f"The image has over {most} bytes.")
                try:
                    return JSONResponse([await run_in_threadpool(self.uploads.add, owner, data)])
                except NoRoom as error:
                    raise Refused(507, "The server has no room for another image; try again later.") from error
                except BadRecord as error:
                    raise Refused(415, f"This is no image that can be used: {error.detail}.") from error

    async def _received(self, request: Request, stack: contextlib.AsyncExitStack) -> UploadFile:
        """The one file of a form, of which no more is read than is allowed. It lies on disk where it is over 1 MiB, and
        is gone with the stack."""
        most, read = self.options.limits.image_bytes, 0

        async def receive():
            nonlocal read
            message = await request.receive()
            read += len(message.get("body", b""))
            if read > most + FORM_BYTES:
                raise Refused(413, f"The image has over {most} bytes.")
            return message

        form = Request(request.scope, receive).form(max_files=1, max_fields=0)
        try:
            async with asyncio.timeout(min(self.options.timeout, self.options.body_seconds)) as late:
                self._arriving[late] = asyncio.get_running_loop().time()
                file = (await stack.enter_async_context(form)).get("files")
        except TimeoutError as error:
            raise Refused(408, "The image did not arrive in time.") from error
        except (HTTPException, MultiPartException, ValueError, KeyError) as error:
            raise Refused(400, "An upload is a form with one file.") from error
        finally:
            self._arriving.pop(late, None)
        if file is None or isinstance(file, str):
            raise Refused(400, "An upload is a form with one file.")
        return file

    async def _file(self, request: Request, owner: str) -> Response:
        given = request.scope["path"].removeprefix(FILE)
        try:
            size, kind = self.uploads.about(given, owner)
        except BadRecord as error:
            raise Refused(404, "Not found.") from error
        # Whoever does not read holds a piece of it; and no open file.
        pieces = (self.uploads.read(given, owner, start, _PIECE) for start in range(0, size, _PIECE))
        headers = {
            "content-disposition": "attachment" if kind == "application/octet-stream" else "inline",
            "content-length": str(size),
            "cache-control": "private, no-store",
        }
        return StreamingResponse(pieces, media_type=kind, headers=headers)

    def _pass(self, request: Request, body: bytes = b"", query: str = "", set_cookie: str | None = None):
        """To Gradio, with nothing of the request but its path and what is given here; no cookie among it."""
        headers = [(name, value) for name, value in request.scope["headers"] if name.decode("latin-1") in _HEARD]
        if body:
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

        async def passed(scope, receive, send) -> None:
            heard = False

            async def hear():
                nonlocal heard
                if not heard:
                    heard = True
                    return {"type": "http.request", "body": body, "more_body": False}
                while (message := await receive())["type"] != "http.disconnect":
                    pass
                return message

            begun = ended = missing = False

            async def tell(message) -> None:
                nonlocal begun, ended, missing
                if message.get("status", 200) >= 400 and is_static(scope["path"]):
                    missing = True
                if missing:
                    return
                begun, ended = True, message["type"] == "http.response.body" and not message.get("more_body")
                if message["type"] == "http.response.start":
                    kept = MutableHeaders(raw=[*message.get("headers", ())])
                    for name in {*Headers(raw=kept.raw)}:
                        if name.startswith("access-control-") or name == "set-cookie":
                            del kept[name]
                    kept.update(_ALWAYS | {"content-security-policy": _POLICY})
                    if "cache-control" not in kept and not is_static(scope["path"]):
                        kept["cache-control"] = "no-store"
                    if set_cookie:
                        kept.append("set-cookie", set_cookie)
                    message = {**message, "headers": kept.raw}
                await send(message)

            try:
                # The server sends no body to HEAD.
                asked = {"method": scope["method"].replace("HEAD", "GET"), "query_string": query.encode()}
                await self.inner({**scope, **asked, "headers": headers}, hear, tell)
            except Exception:
                if not begun or ended:
                    raise
                # A stream of no known session, for instance: anybody may ask for one, and the log is not for that.
                log.debug("the page's answer broke off", exc_info=True)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            if missing:
                await _refusal(request, Refused(404, "Not found."))(scope, receive, send)

        return passed


def _refusal(request: Request, error: ApiError) -> Response:
    """In the API's form, with what Gradio's page shows beside it."""
    path = request.scope["path"]
    headers = {"Allow": page_methods(path).replace("GET", "GET, HEAD")} if error.status == 405 else {}
    if path == f"{GRADIO}/upload" and error.status != 405:
        return PlainTextResponse(error.message, error.status)
    return JSONResponse({"detail": error.message, **error.body()}, error.status, headers)


async def _json(request: Request, seconds: float) -> dict:
    check_json(request)
    try:
        data = json.loads((await read_body(request, EVENT_BYTES, seconds)).getvalue())
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The event is not valid JSON.") from error
    if not isinstance(data, dict):
        raise Refused(400, "An event must be a JSON object.")
    return data


def _get(data: dict, key: str, kind: type):
    value = data.get(key)
    if type(value) is not kind:
        raise Refused(400, f"An event needs {key}.")
    return value


def _session(owner: str, given: str) -> str:
    """What Gradio knows a page of a browser by."""
    if not _SESSION.fullmatch(given):
        raise Refused(400, "An event needs session_hash.")
    return f"{owner}-{given}"
