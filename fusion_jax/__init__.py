"""fusion_jax: vision-language models whose vision encoder reads the question (FLARE, FUSION), in JAX."""

import signal
import sys

from fusion_jax.command_line.interrupts import ended_early

__version__ = "0.1.0"

# While Python looks for a command of `-m`, which is when this file runs, sys.argv begins with "-m": so the handler is
# set for this package's own commands, not for other programs that import it. `cli.run_main` replaces it.
if (
    sys.argv[:1] == ["-m"]
    and any(word.removeprefix("-m").startswith("fusion_jax.") for word in sys.orig_argv)
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, ended_early)
