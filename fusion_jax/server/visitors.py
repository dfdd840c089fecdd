"""Identifies the browsers on the page by a cookie, and logs them in where there is an API key."""

import asyncio
import hashlib
import hmac
import html
import re
import secrets
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from fusion_jax.server.error import ApiError
from fusion_jax.server.options import Options
from fusion_jax.server.request_bodies import read_body

LOGIN_BYTES = 1 << 14
LOGIN_SECONDS = 5.0  # for the form with the key to arrive
WRONG_KEY_SECONDS = 1.0
WRONG_KEYS = 8  # that are checked at the same time

_BYTES = "surrogateescape"  # keys are bytes, both in the environment and in the form
_TOKEN = re.compile(r"[\w-]{43}", re.ASCII)
_LOGIN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{font: 16px sans-serif; margin: 0; min-height: 90vh; display: grid; place-items: center}}
form {{display: grid; gap: 12px; width: min(320px, 90vw)}}
h1 {{font-size: 20px; margin: 0}} p {{margin: 0; color: #c00}}
input, button {{font: inherit; padding: 8px; box-sizing: border-box; width: 100%}}
</style></head><body><form method="post" action="login"><h1>{title}</h1>
<label>API key <input type="password" name="password" autocomplete="current-password" autofocus required></label>
<button>Log in</button><p role="alert">{problem}</p></form></body></html>
"""


class Refused(ApiError):
    """A refusal by the page, in one sentence for the user."""

    def __init__(self, status: int, text: str):
        super().__init__(status, text, {404: "not_found", 405: "method_not_allowed"}.get(status, "refused"))


class Visitors:
    """Browsers by cookies, which last until the browser is closed."""

    def __init__(self, options: Options):
        self.options = options
        self._secret = secrets.token_bytes(32)
        self._refusing = asyncio.Semaphore(WRONG_KEYS)

    def owner(self, request: Request) -> str:
        """The name of a browser, which its uploads and sessions belong to; "" where it has no cookie yet."""
        token = self._token(request)
        return token and self._mark("owner", token)[:32]

    def welcome(self, request: Request) -> str | None:
        """The cookie to set for a browser that has none; None where it has one."""
        return None if self._token(request) else self._header(request, "", secrets.token_urlsafe(32))

    def known(self, request: Request) -> bool:
        """Whether the browser is logged in, or there is no key."""
        if not self.options.api_key:
            return True
        mark = request.cookies.get(self._cookie(request, "key"), "")
        return hmac.compare_digest(mark.encode(), self._mark("key", self._token(request)).encode())

    def _cookie(self, request: Request, purpose: str = "") -> str:
        """The name of a cookie, with the port: browsers keep one set of cookies for all ports of a host."""
        port = (request.scope.get("server") or ("", 0))[1]
        return f"fusion-page-{port}{purpose and '-'}{purpose}"

    def _header(self, request: Request, purpose: str, value: str) -> str:
        """The Set-Cookie header of a cookie."""
        secure = "; Secure" if request.url.scheme == "https" else ""
        return f"{self._cookie(request, purpose)}={value}; Path=/; HttpOnly; SameSite=Lax{secure}"

    def _mark(self, purpose: str, token: str) -> str:
        """A value that only this process can make of a browser's token."""
        return hmac.new(self._secret, f"{purpose}:{token}".encode(), hashlib.sha256).hexdigest()

    async def log_in(self, request: Request) -> Response:
        """Answers the form with the key: with cookies, or after a second with the form again."""
        body = await read_body(request, LOGIN_BYTES, min(LOGIN_SECONDS, self.options.body_seconds))
        try:
            key = parse_qs(body.getvalue().decode(), max_num_fields=8, errors=_BYTES).get("password", [""])[0]
        except ValueError:
            key = ""
        if not hmac.compare_digest(key.encode(errors=_BYTES), self.options.api_key.encode(errors=_BYTES)):
            if self._refusing.locked():
                raise Refused(429, "Too many wrong keys at once; try again.")
            async with self._refusing:
                await asyncio.sleep(WRONG_KEY_SECONDS)
            return self.login_page(401, "That is not the key.")
        # The token is new, so that somebody who planted the old one in this browser is not logged in with it.
        token, answer = secrets.token_urlsafe(32), RedirectResponse("./", 303)
        answer.headers.append("set-cookie", self._header(request, "", token))
        answer.headers.append("set-cookie", self._header(request, "key", self._mark("key", token)))
        return answer

    def login_page(self, status: int, problem: str = "") -> Response:
        """The form that takes the key."""
        text = _LOGIN.format(title=html.escape(self.options.model), problem=html.escape(problem))
        policy = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'self'"
        return HTMLResponse(text, status, {"content-security-policy": policy, "cache-control": "no-store"})

    def _token(self, request: Request) -> str:
        token = request.cookies.get(self._cookie(request), "")
        return token if _TOKEN.fullmatch(token) else ""
