"""JAX's coordination service as far as `devices.board` uses it, for several processes' parts in one process."""

import threading

import jax


class Store:
    """Texts in a dict, with the methods and errors of JAX's client."""

    def __init__(self):
        self.texts: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, name: str, text: str) -> None:
        with self._changed:
            if name in self.texts:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {name} already exists.")
            self.texts[name] = text
            self._changed.notify_all()

    def blocking_key_value_get(self, name: str, timeout_ms: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: name in self.texts, timeout_ms / 1000):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {name}")
            return self.texts[name]

    def key_value_increment(self, name: str, by: int) -> int:
        with self._changed:
            self.texts[name] = f"{int(self.texts.get(name, 0)) + by}"
            return int(self.texts[name])

    def key_value_delete(self, name: str) -> None:
        with self._changed:
            for known in [known for known in self.texts if known == name or known.startswith(f"{name}/")]:
                del self.texts[known]
