"""Loads a run's models when they are first used, and avoids second requests by journal and images."""

import collections
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from fusion_jax.errors import UserError
from fusion_jax.synth import images
from fusion_jax.synth.backends.base import Refused, Reply, Unusable
from fusion_jax.synth.backends.factory import Factory
from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.journal import Journal, make_key

RECENT = 8  # images kept in memory


class Models:
    """The models of one process, for all its threads.

    Attributes:
      config: the run's config. out: its folder. share: the share of the configured traffic that this process may cause.
    """

    def __init__(self, config: SynthConfig, out: Path, share: float = 1.0):
        self.config, self.out = config, out
        self._factory = Factory(share)
        self.journal = Journal(config.journal or out / "journal")
        self._loading = threading.RLock()
        self._recent: collections.OrderedDict[str, Image.Image] = collections.OrderedDict()
        self._showing = threading.Lock()

    def _load(self, name: str, make: Any) -> Any:
        # Several threads may need a model at the same time, and two copies of it would not fit.
        with self._loading:
            if name not in self.__dict__:
                self.__dict__[name] = make()
            return self.__dict__[name]

    @property
    def llm(self):
        return self._load("_llm", lambda: self._factory.language_model(self.config.llm))

    @property
    def vision(self):
        return self._load("_vision", lambda: self._factory.vision_model(self.config.vision))

    @property
    def generator(self):
        return self._load("_generator", lambda: self._factory.image_generator(self.config.images))

    @property
    def scorer(self):
        return self._load("_scorer", lambda: self._factory.scorer(self.config.scorer))

    def check(self, names: tuple[str, ...]) -> None:
        """Checks in advance whether models (llm, vision, generator, scorer) can be used. Raises UserError if not."""
        for name in names:
            check = getattr(getattr(self, name), "check", None)
            if check is not None:
                check()

    def _clients(self) -> list[Any]:
        models = (self.__dict__.get(name) for name in ("_llm", "_vision", "_generator"))
        return [model.client for model in models if hasattr(model, "client")]

    def stop(self) -> None:
        """Sends no more requests to endpoints and ends all waits; those that have been sent may still be answered."""
        for client in self._clients():
            client.stop()

    def cut(self) -> None:
        """Ends also the requests that have been sent."""
        for client in self._clients():
            client.cut()

    def ask(self, model: Any, purpose: str, request: list[Any], call: Callable[[], Reply]) -> Reply:
        """The reply to a request, read from the journal, or else requested from the model and stored in the journal.

        Args:
          request: everything that decides the reply besides the model and its settings. call: sends the request.

        Raises:
          The errors of the model; `Refused` also where the journal holds a refusal.
        """
        if not model.paid:
            return call()
        key = make_key(purpose, model.name, model.settings, request)
        entry = self.journal.get(key)
        if entry is not None and (kept := _kept_reply(entry)) is not None:
            return kept
        try:
            reply = call()
        except Refused as e:
            self.journal.put(key, {"purpose": purpose, "model": model.name, "refused": str(e)})
            raise
        entry = {"purpose": purpose, "model": model.name, "text": reply.text, "parsed": reply.parsed}
        entry |= {"tokens": [reply.prompt_tokens, reply.completion_tokens], "state": reply.state}
        self.journal.put(key, entry)
        return reply

    def draw(self, description: str, seed: int, data: dict) -> str:
        """The image's path in the run's folder; draws it unless it exists. Raises as `ImageGenerator.draw` does."""
        model, config = self.generator, self.config.images
        size = (config.width, config.height)
        key = make_key("draw", model.name, model.settings, [description, size, seed, data["index"]])
        name = f"images/{key[:2]}/{key}.png"
        path = self.out / name
        entry = self.journal.get(key) if model.paid else None
        if entry is not None and "refused" in entry:
            raise Refused("refused", str(entry["refused"]))
        if not (path.exists() and path.stat().st_size):
            try:
                image = model.draw(description, size, seed, data)
            except Refused as e:
                if model.paid:
                    self.journal.put(key, {"purpose": "draw", "model": model.name, "refused": str(e)})
                raise
            image = image.convert("RGB")
            try:
                images.write_once(path, images.png(image), sync=model.paid)
            except OSError as e:
                raise UserError(f"Cannot write {path}: {e.strerror}; the same command goes on from here.") from e
            self._keep(name, image)
        # The journal entry is written after the file, also for a file that exists: an image is never paid for twice,
        # and its cost is always recorded.
        if model.paid and entry is None:
            self.journal.put(key, {"purpose": "draw", "model": model.name, "image": name})
        return name

    def image(self, name: str) -> Image.Image:
        """A drawn image, RGB; the last few stay in memory, because the stages after drawing open the same ones.

        Raises:
          Unusable: its file is damaged or missing.
        """
        with self._showing:
            image = self._recent.get(name)
        if image is None:
            try:
                image = images.open_file(self.out / name)
            except OSError as e:
                raise Unusable("damaged_image", f"{name} cannot be read") from e
            self._keep(name, image)
        return image

    def _keep(self, name: str, image: Image.Image) -> None:
        with self._showing:
            self._recent[name] = image
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)


def _kept_reply(entry: dict) -> Reply | None:
    """The reply of a journal's entry; None where the entry is not whole. Raises `Refused` for a refusal."""
    if "refused" in entry:
        raise Refused("refused", str(entry["refused"]))
    text, parsed, tokens = entry.get("text"), entry.get("parsed"), entry.get("tokens")
    counted = isinstance(tokens, list) and len(tokens) == 2 and all(isinstance(count, int) for count in tokens)
    if not (isinstance(text, str) and (parsed is None or isinstance(parsed, dict)) and counted):
        return None
    return Reply(text, parsed, *tokens, entry.get("state"))
