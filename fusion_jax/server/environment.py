"""What the server takes from its environment: the API key, and how many files it may open."""

import os
import resource

from fusion_jax.errors import check

_NO_KEY = "FUSION_API_KEY holds white space or control characters, which no request can send."
_FILES = 256  # open files besides the connections


def api_key() -> str:
    """The API key of FUSION_API_KEY, "" for none. UserError where it cannot be sent in a header."""
    given = os.environ.get("FUSION_API_KEY", "")
    key = given.strip()
    check(bool(key) or not given, "FUSION_API_KEY is set to white space; give a key, or unset it.")
    check(not any(c.isspace() or not c.isprintable() for c in key if not "\udc80" <= c <= "\udcff"), _NO_KEY)
    return key


def check_open_files(connections: int) -> None:
    """UserError where the process may not have so many connections open."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    check(
        allowed == resource.RLIM_INFINITY or connections + _FILES <= allowed,
        f"--connections={connections} needs {connections + _FILES} open files and {allowed} are allowed: raise "
        "`ulimit -n`, or lower it.",
    )
