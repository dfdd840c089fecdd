"""fusion_jax: vision-language models whose vision encoder reads the question (FLARE, FUSION), in JAX."""

import os
import signal
import sys

__version__ = "0.1.0"


def ended_early(*_) -> None:
    """Ctrl-C while a command still loads what it needs, which takes seconds. `cli.run_main` takes this off again."""
    try:
        os.write(2, b"stopped\n")
    finally:  # standard error may be closed, or a file on a full disk
        os._exit(130)


# Python calls a command `-m` for as long as it looks for it, which is when this file is read: of this package's
# commands, not of another program's that imports it.
if (
    sys.argv[:1] == ["-m"]
    and any(word.removeprefix("-m").startswith("fusion_jax.") for word in sys.orig_argv)
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, ended_early)
