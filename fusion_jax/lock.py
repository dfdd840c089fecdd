"""One run per workdir: a lock file that says who trains there.

The operating system holds the lock and lets go of it however the process ends. Where a file system shares files but not
locks between hosts, the file's time stamp, renewed while the run lives, says whether another host's run is alive.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusion_jax.errors import UserError

log = logging.getLogger("fusion_jax")

FILE = "run.lock"
RENEW = 10.0  # seconds between two signs of life
STALE = 45.0  # without one for that long, a run on another host is dead


@contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir`.

    Raises:
      UserError: a live run has it; names its process and host.
    """
    path = workdir / FILE
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(_refusal(workdir, _holder(path))) from None
        log.warning("%s: this file system has no locks (%s)", path, error)
    try:
        holder = _holder(path)
        if holder.get("host", socket.gethostname()) != socket.gethostname():
            _outlive(path, workdir, holder)
        elif holder:
            log.info("%s: the run that had it (process %s) ended without a word", workdir, holder.get("pid"))
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}))
        file.flush()
        done = threading.Event()
        renewer = threading.Thread(target=_renew, args=(path, done), name="workdir-lock", daemon=True)
        renewer.start()
        try:
            yield
        finally:
            done.set()
            renewer.join()
            file.truncate(0)
    finally:
        file.close()


def _holder(path: Path) -> dict:
    """Who wrote the lock file; empty where nobody has it, or in the moment before its owner has signed."""
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError):
        return {}


def _refusal(workdir: Path, holder: dict) -> str:
    who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder else "another process"
    return f"{workdir} is in use by a live run ({who}); stop it or give another --workdir."


def _outlive(path: Path, workdir: Path, holder: dict) -> None:
    """Waits until a run on another host has given no sign of life for long enough. UserError as soon as it does."""
    stamp = path.stat().st_mtime
    log.info("%s was last used on %s: looking for %.0f s whether that run lives", workdir, holder["host"], STALE)
    deadline = time.monotonic() + STALE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE / 10))
        if path.stat().st_mtime != stamp:
            raise UserError(_refusal(workdir, holder))
    log.info("%s: taken over from %s", workdir, holder["host"])


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(RENEW):
        try:
            os.utime(path)
        except OSError:
            continue  # a folder that fails for a while
