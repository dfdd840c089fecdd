"""Reads the API key from the environment, checks the open files, and sets up the memory allocator."""

import contextlib
import ctypes
import os
import resource

from fusion_jax.errors import check

_NO_KEY = "FUSION_API_KEY holds white space or control characters, which no request can send."
_FILES = 256  # open files besides the connections
_M_MMAP_THRESHOLD = -3  # of malloc.h


def api_key() -> str:
    """The API key of FUSION_API_KEY, "" for none. Raises UserError where a header cannot hold it."""
    value = os.environ.get("FUSION_API_KEY", "")
    key = value.strip()
    check(bool(key) or not value, "FUSION_API_KEY is set to white space; give a key, or unset it.")
    check(not any(c.isspace() or not c.isprintable() for c in key if not "\udc80" <= c <= "\udcff"), _NO_KEY)
    return key


def check_open_files(connections: int) -> None:
    """Raises UserError where the process may not open so many connections."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    check(
        allowed == resource.RLIM_INFINITY or connections + _FILES <= allowed,
        f"--connections={connections} needs {connections + _FILES} open files and {allowed} are allowed: raise "
        "`ulimit -n`, or lower it.",
    )


def return_large_buffers() -> None:
    """Makes glibc return each buffer of 128 KiB or more to the system when it is freed, and grow it without a copy.

    By default glibc raises that threshold when the first large buffer is freed, and buffers that grow towards a higher
    one leave holes of megabytes in the heap. With other C libraries nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)
