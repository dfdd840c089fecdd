"""What every command shares: user errors end in one sentence and exit code 2, not in a traceback.

Exit codes: 0 done; 2 a user error; 75 stopped on request and saved, start again to go on; 1 any other failure, with a
traceback; 128 + N ended by signal N.
"""

import logging
import sys
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging

from fusion_jax.errors import AGAIN, RunAgain, UserError


def run_main(main: Callable[[list[str]], None]) -> None:
    """`absl.app.run` for a command. Our own log goes to standard output; libraries say errors only."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    log = logging.getLogger("fusion_jax")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

    def guarded(argv: list[str]) -> int:
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except RunAgain as stopped:
            print(stopped, file=sys.stderr)
            return AGAIN
        return 0

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except (flags.Error, UserError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            # Config files are read while flags are parsed: unknown keys come as KeyError, wrong types as ValueError.
            # Their texts are representations of strings, some over several lines: one plain sentence for the terminal.
            text = str(error).replace("\\n", " ").replace("\\'", "'").strip("'\"")
            print("error: " + " ".join(text.split()), file=sys.stderr)
            sys.exit(2)

    app.run(guarded, flags_parser=parse)
