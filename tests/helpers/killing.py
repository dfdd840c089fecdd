"""The second of two processes is killed: what the first makes of it."""

import time
from collections.abc import Callable
from subprocess import Popen

from fusion_jax.errors import AGAIN


def check_the_first_goes_on_later(first: Popen, second: Popen, lives: Callable[[], bool], patience: float) -> None:
    """Kills the second once `lives`, within so many seconds; the first must say so and end with AGAIN."""
    try:
        deadline = time.monotonic() + patience
        while not lives() and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.1)
        second.kill()
        output = first.communicate(timeout=120)[0]
    finally:
        first.kill()
        second.kill()
    assert first.returncode == AGAIN, output[-3000:]
    assert "Another process of this run has ended" in output and "Traceback" not in output
