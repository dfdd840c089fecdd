"""Receives the images that browsers upload as forms, with a bounded number at a time."""

import asyncio
import contextlib
import logging

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from fusion_jax.errors import BadRecord
from fusion_jax.server.options import Options
from fusion_jax.server.origins import media_type
from fusion_jax.server.request_bodies import check_plain
from fusion_jax.server.uploads import NoRoom, Uploads
from fusion_jax.server.visitors import Refused

AT_ONCE = 16  # uploads that may arrive at the same time
SLOW = 5.0  # seconds after which an unfinished upload is dropped for another where all places are taken
IN_MEMORY = 2  # complete uploads that are in memory at the same time
FORM_BYTES = 1 << 14  # bytes of an upload besides the file

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it logs untrusted input


class UploadForms:
    """Extracts images from forms and keeps them in `uploads`."""

    def __init__(self, uploads: Uploads, options: Options):
        self.uploads, self.options = uploads, options
        self._uploading = asyncio.Semaphore(AT_ONCE)
        self._arriving: dict[asyncio.Timeout, float] = {}  # unfinished uploads and when they began, the oldest first
        self._reading = asyncio.Semaphore(IN_MEMORY)

    async def add(self, request: Request, owner: str) -> str:
        """Keeps the image that a form holds and returns its name. Raises Refused where it is not accepted."""
        if media_type(request) != "multipart/form-data":
            raise Refused(415, "An upload must be a form with one file.")
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
            async with self._reading:
                data = await file.read(most + 1)
                if len(data) > most:
                    raise Refused(413, f"The image has over {most} bytes.")
                try:
                    return await run_in_threadpool(self.uploads.add, owner, data)
                except NoRoom as error:
                    raise Refused(507, "The server has no room for another image; try again later.") from error
                except BadRecord as error:
                    raise Refused(415, f"This image cannot be used: {error.detail}.") from error

    async def _received(self, request: Request, stack: contextlib.AsyncExitStack) -> UploadFile:
        """The one file of a form, which is read only up to the allowed size.

        A file over 1 MiB is kept on disk, until `stack` closes.
        """
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
            async with asyncio.timeout(min(self.options.timeout, self.options.body_seconds)) as deadline:
                self._arriving[deadline] = asyncio.get_running_loop().time()
                file = (await stack.enter_async_context(form)).get("files")
        except TimeoutError as error:
            raise Refused(408, "The image did not arrive in time.") from error
        except (HTTPException, MultiPartException, ValueError, KeyError) as error:
            raise Refused(400, "An upload must be a form with one file.") from error
        finally:
            self._arriving.pop(deadline, None)
        if file is None or isinstance(file, str):
            raise Refused(400, "An upload must be a form with one file.")
        return file
