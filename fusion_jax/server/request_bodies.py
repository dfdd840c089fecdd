"""Reads the bodies of requests, with limits on bytes, seconds and the memory of all bodies together.

A caller who sends slowly holds a connection and the bytes that have arrived, but no place in the queue. The bytes of
all requests whose prompts are not ready yet are counted together, so that many large bodies cannot exhaust the memory.
"""

import asyncio
import io

from fastapi import Request
from starlette.requests import ClientDisconnect

from fusion_jax.server.error import ApiError

FREE = 64 << 10  # bytes of each request that are not counted, so that short ones are read beside many large ones


class Budget:
    """The bytes that all requests together may hold. It is used only from the event loop."""

    def __init__(self, most: int):
        self.most, self.used = most, 0

    def share(self) -> "Share":
        """An empty share, for one request."""
        return Share(self)


class Share:
    """The bytes of a budget that one request holds. `free` gives them back, and may be called twice."""

    def __init__(self, budget: Budget):
        self._budget, self._size, self._counted = budget, 0, 0

    def grow(self, size: int) -> None:
        """Reserves `size` more bytes. Raises ApiError 429 where the budget does not have that many left."""
        more = max(self._size + size - FREE, 0) - self._counted
        if self._budget.used + more > self._budget.most:
            raise ApiError(429, "Too many large requests are being read; try again.", "server_busy")
        self._size += size
        self._counted += more
        self._budget.used += more

    def free(self) -> None:
        """Gives all bytes back."""
        self._budget.used -= self._counted
        self._size = self._counted = 0


def check_plain(request: Request) -> None:
    """Raises ApiError 415 where the body is compressed."""
    if any(one.strip().lower() not in ("", "identity") for one in request.headers.getlist("content-encoding")):
        raise ApiError(415, "The body must not be compressed.", "unsupported_encoding")


async def read_body(request: Request, most: int, seconds: float, share: Share | None = None) -> io.BytesIO:
    """The body of a request, in a buffer that its reader may close to free the memory.

    Args:
      most: the most bytes that are accepted. seconds: limit for the whole body to arrive.
      share: counts the bytes; bodies that are always small need none.

    Raises:
      ApiError: 408 the body did not arrive in time, 413 it is too long, 415 it is compressed, 429 see `Share.grow`, 499
        the caller has disconnected.
    """
    check_plain(request)
    too_large = ApiError(413, f"The request has over {most} bytes.", "request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    body = io.BytesIO()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                if body.tell() + len(piece) > most:
                    raise too_large
                if share is not None:
                    share.grow(len(piece))
                body.write(piece)
    except TimeoutError as error:
        raise ApiError(408, "The request's body did not arrive in time.", "timeout") from error
    except ClientDisconnect as error:
        raise ApiError(499, "The caller has disconnected.", "cancelled") from error
    return body
