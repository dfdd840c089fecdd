"""Short texts that the processes of a run leave for each other, under names, beside their collectives.

They lie in JAX's coordination service, in the memory of process 0, so any thread can write and read them at any time,
while the main thread waits inside a compiled step, too.
"""

import threading
from typing import Any

import jax
from jax._src import distributed as _service  # the public interface has collectives alone

_POLL_MS = 1000  # that one call waits for a text; then whether the board was closed is looked at


class Closed(Exception):
    """The board was closed while somebody waited for a text."""


class Board:
    """Texts from process 0 to all others, each read once by everybody. Threads may share it."""

    def __init__(self, prefix: str, store: Any, process: int, processes: int):
        """Args: prefix of all names; store: JAX's client of the coordination service, or what has its methods."""
        self._prefix, self._store = prefix, store
        self.first, self._readers = process == 0, processes - 1
        self._closed = threading.Event()

    def send(self, name: str, text: str) -> None:
        """Process 0: leaves a text under a name that is new."""
        self._store.key_value_set(f"{self._prefix}/{name}", text)

    def receive(self, name: str) -> str:
        """The others: the text, once it is there. Raises Closed."""
        text = self._wait(name)
        if self._store.key_value_increment(f"{self._prefix}/{name}/readers", 1) == self._readers:
            self._store.key_value_set(f"{self._prefix}/{name}/read", "")
        return text

    def take_down(self, name: str) -> None:
        """Process 0: removes a text, once all the others have it. Raises Closed."""
        self._wait(f"{name}/read")
        self._store.key_value_delete(f"{self._prefix}/{name}")  # and what lies below the name

    def close(self) -> None:
        """Whoever waits for a text stops waiting."""
        self._closed.set()

    def _wait(self, name: str) -> str:
        while not self._closed.is_set():
            try:
                return self._store.blocking_key_value_get(f"{self._prefix}/{name}", _POLL_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        raise Closed(name)


def client() -> Any:
    """JAX's client of the coordination service; None in a run of one process, and before the processes are joined."""
    state = _service.global_state
    # Used before it is connected, it aborts the process; this is made right behind the connection.
    connected = state.preemption_sync_manager is not None
    return state.client if connected and state.num_processes > 1 else None


def process() -> int:
    """This process's number. Unlike `jax.process_index` it does not wait for the devices of the others."""
    return _service.global_state.process_id


def processes() -> int:
    """How many processes the run has, likewise."""
    return _service.global_state.num_processes


def open_board(prefix: str) -> Board | None:
    """The board of this run under a prefix of its own; None in a run of one process."""
    return None if client() is None else Board(prefix, client(), process(), processes())
