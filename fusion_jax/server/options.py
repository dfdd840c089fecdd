"""Defines the options of the HTTP application."""

from collections.abc import Collection
from dataclasses import dataclass, field

from fusion_jax.server.protocol import Limits


@dataclass(frozen=True)
class Options:
    """What the application serves, to whom and within which limits.

    Attributes:
      model: the name of the model. api_key: the key that callers must send; "" for none.
      host_names: public host names under which the server answers without a key, see `origins`.
      origins: origins whose pages may use the API, see `origins.read_origins`.
      fetch_urls: whether image_url may be an http(s) address.
      timeout: seconds for a request, from the end of its headers. body_seconds: how many of these its body may take.
      bodies_bytes: most bytes of all requests together whose prompts are not ready yet.
      threads: threads that prepare prompts, and as many more that decode images.
      fetching: requests whose images are fetched at the same time; as many more may wait.
      building: grammars of answers' forms that are built at the same time; eight times as many may wait.
      streams: most event streams of the page that are open at the same time.
    """

    model: str
    limits: Limits
    api_key: str = field(default="", repr=False)
    host_names: Collection[str] = ()
    origins: tuple[str, ...] = ()
    fetch_urls: bool = False
    timeout: float = 120.0
    body_seconds: float = 60.0
    bodies_bytes: int = 256 << 20
    threads: int = 4
    fetching: int = 8
    building: int = 2
    streams: int = 256
