"""fusion_jax: vision-language models whose vision encoder reads the question (FLARE, FUSION), in JAX."""

import signal
import sys

from fusion_jax.command_line.interrupts import ended_early

__version__ = "0.1.0"

# Python calls a command `-m` for as long as it looks for it, which is when this file is read: of this package's
# commands, not of another program's that imports it. `cli.run_main` takes the handler off again.
if (
    sys.argv[:1] == ["-m"]
    and any(word.removeprefix("-m").startswith("fusion_jax.") for word in sys.orig_argv)
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, ended_early)
