"""Locks a workdir, so that one run at a time trains there.

The operating system releases it however the process ends. Where a file system shares files but not locks between hosts,
the time stamp of the lock file, which a live run renews, shows whether a run on another host is alive.
"""

import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fusion_jax.errors import UserError
from fusion_jax.files import open_lock, try_lock

log = logging.getLogger("fusion_jax")

FILE = "run.lock"
RENEW = 10.0  # seconds between two renewals of the time stamp
STALE = 45.0  # seconds without a renewal after which a run on another host counts as dead
_LONGEST = 4096  # bytes of a lock file that are read; ours has a hundred
_signed: set[int] = set()  # descriptors of the lock files that this process has signed


class InUse(UserError):
    """A live run holds the lock."""


@contextmanager
def hold(workdir: Path, name: str = FILE) -> Iterator[int]:
    """Keeps other runs out of `workdir`.

    Args:
      name: of the lock file.

    Yields:
      The descriptor of the lock file: a child process that inherits it keeps the lock until it ends, too.

    Raises:
      InUse: a live run holds the lock; the message names it.
      UserError: the lock file cannot be opened or written.
    """
    path = workdir / name
    file = _open(path)
    try:
        try:
            if not try_lock(file):
                raise InUse(_refusal(workdir, _holder(file)))
        except OSError as error:
            log.warning("%s: this file system has no locks (%s)", path, error)
        holder = _holder(file)
        if holder is None:
            log.warning("%s is not the lock file of a run; it is overwritten", path)
        elif holder.get("host", socket.gethostname()) != socket.gethostname():
            _outlive(path, workdir, holder)
        elif holder:
            log.info("%s: the run before (process %s) ended without releasing it", workdir, holder["pid"])
        _sign(file, path)
        done = threading.Event()
        renewer = threading.Thread(target=_renew, args=(path, done), name="workdir-lock", daemon=True)
        renewer.start()
        try:
            yield file
        finally:
            done.set()
            renewer.join()
            _sign_off(file)
    finally:
        os.close(file)


def sign_off() -> None:
    """Removes this process's name from its lock files, before it ends on purpose without unwinding."""
    for file in list(_signed):
        _sign_off(file)


def _open(path: Path) -> int:
    """Returns a descriptor of the lock file. Raises UserError if it is a folder, a link or a pipe."""
    try:
        file = open_lock(path)
        if stat.S_ISREG(os.fstat(file).st_mode):
            return file
        os.close(file)
        reason = "it is not a file"
    except OSError as error:
        reason = error.strerror
    raise UserError(f"The lock file {path} cannot be opened ({reason}); remove it, or give another --workdir.")


def _sign(file: int, path: Path) -> None:
    entry = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(entry).encode(), 0)
    except OSError as error:
        raise UserError(f"The lock file {path} cannot be written ({error.strerror}); make room or repair it.") from None
    _signed.add(file)


def _sign_off(file: int) -> None:
    _signed.discard(file)
    with suppress(OSError):
        os.ftruncate(file, 0)


def _holder(file: int) -> dict[str, str] | None:
    """Returns the process that the lock file names (pid, host, since); empty if none has signed it yet.

    None if the file holds anything else.
    """
    content = os.pread(file, _LONGEST, 0)
    if not content.strip(b"\0"):  # zeros are what a power cut leaves
        return {}
    try:
        entry = json.loads(content)
        signed = isinstance(entry, dict) and all(
            isinstance(entry[name], str | int) for name in ("pid", "host", "since")
        )
    except (ValueError, KeyError, RecursionError):
        return None
    return {name: str(entry[name])[:100] for name in ("pid", "host", "since")} if signed else None


def _refusal(workdir: Path, holder: dict[str, str] | None) -> str:
    run = f"process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder else "another process"
    return f"{workdir} is in use by a live run ({run}); stop it or give another --workdir."


def _outlive(path: Path, workdir: Path, holder: dict[str, str]) -> None:
    """Waits until a run on another host has not renewed the file for STALE seconds. Raises InUse if it does."""
    stamp = path.stat().st_mtime
    log.info("%s was last used on %s: waiting %.0f s to see whether that run is alive", workdir, holder["host"], STALE)
    deadline = time.monotonic() + STALE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE / 10))
        if path.stat().st_mtime != stamp:
            raise InUse(_refusal(workdir, holder))
    log.info("%s: taken over from %s", workdir, holder["host"])


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(RENEW):
        try:
            os.utime(path)
        except OSError:
            continue  # the file system may fail for a while
