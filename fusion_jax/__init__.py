"""fusion_jax: vision-language models whose vision encoder reads the question (FLARE, FUSION), in JAX."""

import signal
import sys

from fusion_jax.command_line.interrupts import ended_early

__version__ = "0.1.0"

# Where a command is started by `-m`, this file runs while Python still looks for it, and sys.argv begins with "-m". So
# the handler is set for this package's commands, not for other programs that import it. `cli.run_main` replaces it.
if (
    sys.argv[:1] == ["-m"]
    and any(word.removeprefix("-m").startswith("fusion_jax.") for word in sys.orig_argv)
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, ended_early)
