"""Opens files without waiting for pipes, writes them whole, locks them, and parses JSON within limits.

Exported folders carry this file, so it imports the standard library alone.
"""

import errno
import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where exported folders are loaded and nothing is locked
    fcntl = None

DEEPEST = 100  # levels of lists and objects in JSON: far more than any record has, far fewer than parsers can take
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)


def open_file(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading. Anything else is refused: reading a pipe or a device might never end.

    Raises:
      OSError: it cannot be opened, is not a file, or no file can have such a name. `strerror` says which.
    """
    try:
        _check_regular(os.stat(path), path)  # opening some devices has side effects
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as e:
        raise FileNotFoundError(errno.ENOENT, "no file can have this name", str(path)) from e
    try:
        _check_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def new_file(path: str | Path) -> BinaryIO:
    """Opens a new file for writing. An existing file, link or pipe of that name is removed first.

    So the target of a link is never written to, and the call never waits for the other end of a pipe.

    Raises:
      OSError: it cannot be made, or a folder has this name.
    """
    Path(path).unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


@contextmanager
def whole_file(path: Path, part: Path | None = None, sync: bool = False) -> Iterator[BinaryIO]:
    """Yields a file to write that takes its name at the end of the block; where the block raises, it is removed.

    Args:
      part: its path until then, in the same file system; by default beside it, with the ending .tmp.
      sync: whether it must be on the disk before it appears, so that it also survives a failure of the machine.

    Raises:
      OSError: it cannot be written.
    """
    part = path.with_suffix(".tmp") if part is None else part
    with new_file(part) as file:
        try:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise


def write_whole(path: Path, data: bytes | str, part: Path | None = None, sync: bool = False) -> None:
    """Writes a file that appears at once or not at all; arguments and errors as for `whole_file`.

    Args:
      data: its contents; texts in UTF-8.
    """
    with whole_file(path, part, sync) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def open_lock(path: str | Path) -> int:
    """Opens a lock file, which is made if needed, and returns its descriptor. It follows no link and waits for no pipe.

    Raises:
      OSError: it cannot be opened or made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def try_lock(descriptor: int) -> bool:
    """Locks an open file and returns whether that worked: another process may hold the lock. It does not wait.

    The operating system releases the lock when the descriptor is closed, however its process ends.

    Raises:
      OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_at(descriptor: int, path: str | Path) -> bool:
    """Whether the open file still has this path: a process that has just ended may have removed what it had locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: str | Path) -> Iterator[bool]:
    """Locks a lock file for a block and yields whether that worked: another process may hold the lock.

    Raises:
      OSError: as for `open_lock` and `try_lock`.
    """
    descriptor = open_lock(path)
    try:
        yield try_lock(descriptor) and _is_at(descriptor, path)
    finally:
        os.close(descriptor)


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EPERM, "it is a pipe, a device or a socket, not a file", str(path))


def read_file(path: str | Path, limit: int | None = None) -> bytes:
    """Reads a regular file. Raises OSError as `open_file` does, and for a file of more than `limit` bytes."""
    with open_file(path) as file:
        data = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return data


def read_text(path: str | Path, encoding: str = "utf-8", limit: int | None = None) -> str:
    """Reads a regular file's text. Raises OSError as `read_file` does, UnicodeDecodeError for another encoding."""
    return read_file(path, limit).decode(encoding)


def parse_json(data: bytes | str, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parses one JSON value in UTF-8.

    Args:
      data: with or without a byte order mark. hook: json's `object_pairs_hook`.

    Raises:
      ValueError: it is not JSON, is nested deeper than DEEPEST, or has integers of thousands of digits; or whatever
        `hook` raises.
    """
    text = data if isinstance(data, str) else data.decode("utf-8-sig")
    if _too_deep(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")):
        raise ValueError(f"lists and objects are nested more than {DEEPEST} levels deep")
    try:
        return json.loads(text, object_pairs_hook=hook)
    except ValueError as e:
        if type(e) is ValueError:  # raised by int() itself
            raise ValueError("an integer has thousands of digits") from e
        raise


def _too_deep(data: bytes) -> bool:
    if data.count(b"[") + data.count(b"{") <= DEEPEST:
        return False
    depth = 0
    for mark in _MARKS.finditer(data):
        first = mark[0]
        if first in (b"[", b"{"):
            depth += 1
            if depth > DEEPEST:
                return True
        elif first in (b"]", b"}"):
            depth -= 1
    return False


def shown(value: Any, most: int = 200) -> str:
    """A value from a file as one printable line for messages and logs; where it is cut, its whole size follows."""
    text = str(value)
    line = printable(text[: most + 1])
    if len(line) <= most:
        return line
    size = f"{len(text) / 1000:.0f} KB" if len(text) >= 1000 else f"{len(text)} characters"
    return f"{line[:most]}... ({size})"


def printable(text: str) -> str:
    """Escapes invisible characters, which might move a terminal's cursor or hide the rest of the text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(value: Any) -> str:
    """Returns the `repr` of a value from a file for messages; nested lists are cut after their beginning."""
    return shown(_REPR.repr(value))
