"""Defines the engine's input and output: requests, their events, and the reasons for refusing them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fusion_jax.data.layout import Example
from fusion_jax.inference.sampling import Sampling
from fusion_jax.inference.streaming import TextStream

MOST_LOGPROBS = 20  # alternatives of a token that can be reported


class Full(Exception):
    """No more requests can wait."""


class Closing(Exception):
    """The server is shutting down."""


class Failed(Closing):
    """The engine has stopped, for the reason in the message; only a new process answers again."""


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer with its natural log probability under the model, before any setting.

    Attributes:
      top: the most likely tokens at its place and their log probabilities, in descending order.
    """

    token: int
    value: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """New text of an answer (possibly empty), and at the end how it ended.

    Attributes:
      finish: stop, length, timeout, cancelled or error; None before the end.
      tokens: the new tokens, where the request wants log probabilities.
      problem: why the answer ended, where the request itself is at fault.
    """

    text: str = ""
    finish: str | None = None
    tokens: tuple[TokenLogprob, ...] = ()
    problem: str = ""


class Constraint(Protocol):
    """What the tokens of an answer must follow, such as a `grammar.Matcher`.

    Attributes:
      prefix: the text of the answer's tokens before the answer itself. ended: whether nothing can follow.
    """

    prefix: str
    ended: bool

    def fill(self, bits: np.ndarray, row: int) -> None: ...
    def take(self, token: int) -> None: ...


@dataclass(eq=False)
class Request:
    """A prompt that is waiting or being answered.

    Attributes:
      example, how: the prompt and its settings. emit: called by the engine's thread with each Event.
      deadline: seconds of time.monotonic. prompt_tokens: positions of the prompt, visual ones included.
      stream: the answer so far. constraint: what the answer must follow.
      top_logprobs: how many alternatives of each token to report; None reports no tokens.
    """

    example: Example
    how: Sampling
    emit: Callable[[Event], None]
    deadline: float
    prompt_tokens: int
    stream: TextStream
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Gives the row back at the next chunk. May be called at any time, from any thread."""
        self.cancelled = True


@dataclass
class Statistics:
    """Counts since the engine's start; `finished` by how answers ended."""

    finished: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    answer_tokens: int = 0
    prefills: int = 0
    chunks: int = 0
