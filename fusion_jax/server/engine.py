"""Batches continuously: one thread owns the device, and requests join and leave between chunks."""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, LayoutSpec, measure
from fusion_jax.data.sources import Record
from fusion_jax.errors import UserError, check
from fusion_jax.inference.decoding import Logprobs
from fusion_jax.inference.sampling import Sampling
from fusion_jax.inference.streaming import TextStream
from fusion_jax.server import compilations
from fusion_jax.server.requests import (
    MOST_LOGPROBS,
    Closing,
    Constraint,
    Event,
    Failed,
    Full,
    Request,
    Statistics,
    TokenLogprob,
)
from fusion_jax.server.running_batch import RunningBatch

log = logging.getLogger("fusion_jax")


class Engine:
    """Answers many requests at once.

    Args:
      batch: the rows on the device. Only the engine's thread changes them.
      queue_limit: requests that may wait beside those being answered.

    Attributes:
      problem: why the engine's thread has ended, "" while it runs.
    """

    def __init__(self, batch: RunningBatch, queue_limit: int = 64):
        check(queue_limit >= 0, f"--queue={queue_limit} must not be negative.")
        self.batch, self.prompts, self.rows, self.queue_limit = batch, batch.prompts, batch.rows, queue_limit
        self.statistics = Statistics()
        self.problem = ""
        self._active: list[Request | None] = [None] * self.rows
        self._waiting: deque[Request] = deque()
        self._reserved = 0
        self._wake = threading.Condition()
        self._closing = False
        self._compiled_when_warm: int | None = None
        self._thread: threading.Thread | None = None
        self._working_since: float | None = None  # when the thread began to wait for the device

    # ---- Called from any thread.

    def start(self) -> None:
        """Compiles all programs and starts the thread that answers."""
        begun = time.monotonic()
        self.batch.warm_up()
        self._compiled_when_warm = compilations.count()
        log.info("compiled %d shapes in %.0f s", len(self.batch.shapes()), time.monotonic() - begun)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def reserve(self) -> None:
        """Takes a place, which `release` gives back. Raises Full, Closing or Failed."""
        with self._wake:
            self._check_open()
            if self._reserved >= self.rows + self.queue_limit:
                raise Full
            self._reserved += 1

    def release(self) -> None:
        """Gives back a place."""
        with self._wake:
            self._reserved -= 1

    def _check_open(self) -> None:
        if self.problem:
            raise Failed(self.problem)
        if self._closing:
            raise Closing

    def prepare(self, record: Record) -> Example:
        """Tokenizes the text and reads the images. Raises BadRecord where the prompt cannot be used."""
        return self.prompts.example(record)

    def submit(
        self,
        example: Example,
        how: Sampling,
        emit: Callable[[Event], None],
        timeout: float,
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
    ) -> Request:
        """Queues a prompt.

        Args:
          emit: called from the engine's thread with each Event, the last of which has `finish`.
          timeout: seconds from now to the deadline. constraint: see `Request`.
          top_logprobs: see `Request`; at most MOST_LOGPROBS.

        Raises:
          Closing, Failed: no request is accepted any more.
        """
        most = self.batch.max_tokens
        check(how.max_tokens <= most, f"max_tokens={how.max_tokens} is over the limit of {most}.")
        valid = top_logprobs is None or 0 <= top_logprobs <= MOST_LOGPROBS
        check(valid, f"top_logprobs={top_logprobs} must lie in 0..{MOST_LOGPROBS}.")
        prefix = None if constraint is None else constraint.prefix
        stream = TextStream(self.prompts.tokenizer, self.prompts.stop_ids, how.stop, how.max_tokens, prefix)
        spec = layout_spec(self.prompts.config, 1, 1, 1)
        length = measure(example, spec, self.prompts.latents).length
        request = Request(example, how, emit, time.monotonic() + timeout, length, stream, constraint, top_logprobs)
        with self._wake:
            self._check_open()
            if len(self._waiting) > self.rows + self.queue_limit:
                # Cancelled requests have released their places, but stay in the queue while the device hangs.
                self._waiting = deque(one for one in self._waiting if not one.cancelled)
            self._waiting.append(request)
            self._wake.notify()
        return request

    def answer(self, example: Example, how: Sampling, timeout: float = 600.0) -> Iterator[str]:
        """Yields the answer in pieces. Leaving the loop cancels it.

        Raises:
          UserError: the answer ended unfinished. Full, Closing, Failed: as for `reserve` and `submit`.
        """
        events: queue.Queue[Event] = queue.Queue()
        self.reserve()
        try:
            request = self.submit(example, how, events.put, timeout)
            try:
                while True:
                    try:
                        # At the deadline the engine itself sends an event, unless its device hangs.
                        event = events.get(timeout=max(request.deadline - time.monotonic(), 0) + 5)
                    except queue.Empty:
                        event = Event(finish="timeout")
                    if event.text:
                        yield event.text
                    if event.finish in ("stop", "length"):
                        return
                    if event.finish == "error" and self.problem:
                        raise Failed(self.problem)
                    check(event.finish is None, f"The answer was not finished: {event.finish}.")
            finally:
                request.cancel()
        finally:
            self.release()

    @property
    def busy(self) -> int:
        """Requests that are being answered."""
        return sum(request is not None for request in self._active)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def reserved(self) -> int:
        """Places that are taken."""
        return self._reserved

    @property
    def silent(self) -> float:
        """Seconds for which the device has worked on its current task, 0 where it is idle."""
        since = self._working_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def recompilations(self) -> int:
        """Programs that this process has compiled since the warm-up, except for `compilations.uncounted` ones."""
        warm = self._compiled_when_warm
        return 0 if warm is None else compilations.count() - warm

    def refuse(self) -> None:
        """Accepts no new requests from now on."""
        with self._wake:
            self._closing = True

    def give_up(self) -> None:
        """Accepts no new requests, and cancels those that were accepted."""
        self.refuse()
        with self._wake:
            for request in (*self._waiting, *self._active):
                if request is not None:
                    request.cancel()
            self._wake.notify()

    @property
    def closing(self) -> bool:
        """Whether new requests are refused."""
        return self._closing

    def close(self, patience: float = 60.0) -> None:
        """Answers the accepted requests for at most `patience` seconds, then ends the thread."""
        self.refuse()
        end = time.monotonic() + patience
        while (self.busy or self.waiting) and time.monotonic() < end and not self.problem:
            time.sleep(0.02)
        self.give_up()
        with self._wake:
            thread, self._thread = self._thread, None
            self._wake.notify()
        if thread is not None:
            thread.join(patience)
        self.batch.prefills.close()

    # ---- The engine's thread.

    def _run(self) -> None:
        try:
            while self._cycle():
                self._working_since = None
        except BaseException as error:  # the device failed: no request may be left waiting
            detail = " ".join(str(error).split())[:300]
            log.exception("the engine has stopped")
            with self._wake:
                self.problem = f"{type(error).__name__}: {detail}" if detail else type(error).__name__
        with self._wake:
            self._closing = True
            left = [request for request in (*self._active, *self._waiting) if request is not None]
            self._active = [None] * self.rows
            self._waiting.clear()
        for request in left:
            self._end(request, "error" if self.problem else "cancelled")

    def _cycle(self) -> bool:
        """Admits requests, decodes a chunk and emits the new text. Returns False when the engine should end."""
        with self._wake:
            while self._thread is not None and not self._waiting and not self.busy:
                self._wake.wait()
            if self._thread is None and not self._waiting and not self.busy:
                return False
        self._working_since = time.monotonic()
        self._drop_ended()
        self._admit()
        self._decode()
        return True

    def _admit(self) -> None:
        """Gives free rows to the requests that have waited longest; those of one shape are prefilled together."""
        while True:
            free = [row for row, request in enumerate(self._active) if request is None]
            with self._wake:
                new = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
            if not new:
                return
            groups: dict[LayoutSpec | None, list[Request]] = {}
            for request in new:
                shape = None
                with contextlib.suppress(UserError):  # joining says what is wrong
                    shape = self.batch.prefills.shape(request.example)
                groups.setdefault(shape, []).append(request)
            for requests in groups.values():
                self._join(free[: len(requests)], requests)
                free = free[len(requests) :]

    def _join(self, rows: list[int], requests: list[Request]) -> None:
        try:
            self.batch.join(rows, [r.example for r in requests], [r.how for r in requests])
        except (UserError, ValueError) as error:  # a request's fault, not the device's
            if requests[1:]:
                for row, request in zip(rows, requests):
                    self._join([row], [request])
                return
            log.warning("a request failed: %s", " ".join(str(error).split())[:300])
            self._end(requests[0], "error")
            return
        for row, request in zip(rows, requests):
            self.statistics.prefills += 1
            self.statistics.prompt_tokens += request.prompt_tokens
            self._active[row] = request

    def _decode(self) -> None:
        """Decodes a step of all rows: a chunk, or one token where any of them follows a constraint."""
        allowed, report = self._allowed(), None
        if not self.busy:
            return
        if allowed is not None or any(r is not None and r.top_logprobs is not None for r in self._active):
            tokens, report = self.batch.step_reporting(allowed)
        else:
            tokens = self.batch.step(draw=not all(r is None or r.how.greedy for r in self._active))
        self.statistics.chunks += 1
        for row, request in enumerate(self._active):
            if request is not None:
                self._advance(row, request, tokens[row].tolist(), report)

    def _allowed(self) -> np.ndarray | None:
        """The mask of tokens that may come next; None where no row follows a constraint.

        A request whose constraint allows no token ends here.
        """
        allowed = None
        for row, request in enumerate(self._active):
            if request is None or request.constraint is None:
                continue
            allowed = self.batch.all_allowed() if allowed is None else allowed
            try:
                request.constraint.fill(allowed, row)
            except Exception as error:
                log.warning("an answer cannot follow its form: %s", " ".join(str(error).split())[:300])
                allowed[row] = -1
                self._active[row] = None
                self.batch.leave([row])
                self._end(request, "error", problem=f"The answer cannot go on in its form: {error}.")
        return allowed

    def _advance(self, row: int, request: Request, tokens: list[int], report: Logprobs | None) -> None:
        """Adds a step's tokens to a row's answer, emits what is new, and frees the row at the end."""
        before, constraint = request.stream.length, request.constraint
        if constraint is not None:
            constraint.take(tokens[0])
        text = request.stream.add(tokens, last=constraint is not None and constraint.ended)
        new = request.stream.length - before
        self.statistics.answer_tokens += new
        logprobs = ()
        if request.top_logprobs is not None and report is not None:
            logprobs = tuple(
                TokenLogprob(
                    token,
                    float(report.chosen[row, k]),
                    tuple(zip(report.ids[row, k].tolist(), report.values[row, k].tolist()))[: request.top_logprobs],
                )
                for k, token in enumerate(tokens[:new])
                if token not in self.prompts.stop_ids
            )
        if request.stream.finish is not None:
            self._active[row] = None
            # The device does not know that a stop text or a constraint has ended a row.
            if request.stream.length % self.batch.chunk or request.how.stop or constraint is not None:
                self.batch.leave([row])
            self._end(request, request.stream.finish, text, logprobs)
        elif text or logprobs:
            self._emit(request, Event(text, tokens=logprobs))

    def _drop_ended(self) -> None:
        """Ends requests that are cancelled or past their deadline, waiting or running."""
        now, left = time.monotonic(), []
        for row, request in enumerate(self._active):
            if request is not None and (request.cancelled or now > request.deadline):
                self._active[row] = None
                left.append((row, request))
        if left:
            self.batch.leave(row for row, _ in left)
        with self._wake:
            late = [r for r in self._waiting if r.cancelled or now > r.deadline]
            for request in late:
                self._waiting.remove(request)
        for request in [*(request for _, request in left), *late]:
            self._end(request, "cancelled" if request.cancelled else "timeout")

    def _end(self, request: Request, finish: str, text: str = "", tokens=(), problem: str = "") -> None:
        self.statistics.finished[finish] = self.statistics.finished.get(finish, 0) + 1
        self._emit(request, Event(text, finish, tokens, problem))

    def _emit(self, request: Request, event: Event) -> None:
        try:
            request.emit(event)
        except Exception:  # the caller's event loop has ended
            log.debug("a request's listener has ended", exc_info=True)
