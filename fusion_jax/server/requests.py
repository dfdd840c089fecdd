"""What goes into the engine and comes out of it: requests, what they hear, and why they are turned away."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fusion_jax.data.layout import Example
from fusion_jax.inference.sampling import Sampling
from fusion_jax.inference.streaming import TextStream

MOST_LIKELY = 20  # alternatives of a token that can be reported


class Full(Exception):
    """No more requests can wait."""


class Closing(Exception):
    """The server is shutting down."""


class Failed(Closing):
    """The engine has stopped for the reason that this says; only a new process answers again."""


@dataclass(frozen=True)
class Likely:
    """One token of an answer and the natural logarithm of its probability, as the model gives it before any setting;
    top: the likeliest tokens at its place and theirs, falling."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """What a request hears: new text (possibly empty), and at the end how it ended: stop, length, timeout, cancelled or
    error. tokens: new ones, where it asked for them. problem: why it ended, where that is the request's own fault."""

    text: str = ""
    finish: str | None = None
    tokens: tuple[Likely, ...] = ()
    problem: str = ""


class Constraint(Protocol):
    """What the tokens of an answer must follow, such as a `grammar.Matcher`. prefix: what they say before the answer;
    ended: nothing can follow."""

    prefix: str
    ended: bool

    def fill(self, bits: np.ndarray, row: int) -> None: ...
    def take(self, token: int) -> None: ...


@dataclass(eq=False)
class Request:
    """A prompt on its way.

    Attributes:
      example, how: what to answer. emit: called by the engine's thread with each Event. deadline: of time.monotonic.
      prompt_tokens: places that the prompt takes, visual ones included. stream: the answer so far, once begun.
      constraint: what the answer must follow. likely: how many alternatives of each token to tell; None: no `tokens`.
    """

    example: Example
    how: Sampling
    emit: Callable[[Event], None]
    deadline: float
    prompt_tokens: int
    stream: TextStream
    constraint: Constraint | None = None
    likely: int | None = None
    begun: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def cancel(self) -> None:
        """Gives the row back at the next chunk. May be called at any time, from any thread."""
        self.cancelled = True


@dataclass
class Statistics:
    """Counted since the start."""

    finished: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    answer_tokens: int = 0
    prefills: int = 0
    chunks: int = 0
