"""Short texts that the processes of a run send each other under names, outside of their collectives.

They are kept by JAX's coordination service, in the memory of process 0, so that any thread can write and read them at
any time, also while the main thread waits inside a compiled step.
"""

import threading
from typing import Any

import jax
from jax._src import distributed as _service  # the public interface has collectives alone

_POLL_MS = 1000  # milliseconds that one call waits for a text before it checks whether the board was closed


class Closed(Exception):
    """The board was closed while a thread waited for a text."""


class Board:
    """Texts from process 0 to all others, each of which reads each text once. Threads may share it."""

    def __init__(self, prefix: str, store: Any, process: int, processes: int):
        """Args: prefix: starts all names. store: JAX's client of the coordination service, or a stand-in for it."""
        self._prefix, self._store = prefix, store
        self.first, self._readers = process == 0, processes - 1
        self._closed = threading.Event()

    def send(self, name: str, text: str) -> None:
        """Sends a text under a new name. Only process 0 calls this."""
        self._store.key_value_set(f"{self._prefix}/{name}", text)

    def receive(self, name: str) -> str:
        """Waits for a text and returns it. All processes but 0 call this. Raises Closed."""
        text = self._wait(name)
        if self._store.key_value_increment(f"{self._prefix}/{name}/readers", 1) == self._readers:
            self._store.key_value_set(f"{self._prefix}/{name}/read", "")
        return text

    def take_down(self, name: str) -> None:
        """Removes a text once all others have read it. Only process 0 calls this. Raises Closed."""
        self._wait(f"{name}/read")
        self._store.key_value_delete(f"{self._prefix}/{name}")  # and everything below the name

    def close(self) -> None:
        """Makes all calls that wait for texts raise Closed."""
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
    """Returns JAX's client of the coordination service; None with one process, or before the processes are joined."""
    state = _service.global_state
    # A client that is used before it is connected aborts the process; the manager exists right after the connection.
    connected = state.preemption_sync_manager is not None
    return state.client if connected and state.num_processes > 1 else None


def process() -> int:
    """Returns the number of this process. Unlike `jax.process_index` it does not wait for the devices of the others."""
    return _service.global_state.process_id


def processes() -> int:
    """Returns the number of processes of the run, for which this does not wait either."""
    return _service.global_state.num_processes


def open_board(prefix: str) -> Board | None:
    """Opens the board of this run under a prefix of its own; None in a run of one process."""
    return None if client() is None else Board(prefix, client(), process(), processes())
