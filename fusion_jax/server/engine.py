"""Continuous batching: one thread owns the device; requests join and leave between chunks of tokens.

The cache has R rows of P + A slots. A new prompt is prefilled alone and copied into slots [0, P) of a free row; all
rows write their next token into the same slot of the ring [P, P + A). A row lives A steps at most, so what it still
needs is never overwritten, wherever in the ring it began:

    slot     0 ......... P-1 | P ... ^ ... P+A-1          ^ written next, by all rows
    row 0    prompt   . . .  | a a a a . . a a a          an answer that went round the end of the ring
    row 1    prompt prompt . | . . a a . . . . .
    row 2    free
"""

import contextlib
import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.data.conversation import IMAGE, LATENTS
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, measure
from fusion_jax.data.sources import Record
from fusion_jax.data.tiles import WHOLE
from fusion_jax.errors import UserError, check
from fusion_jax.inference import generate, sampling
from fusion_jax.inference.sampling import Sampling
from fusion_jax.inference.streaming import TextStream
from fusion_jax.models import llm
from fusion_jax.models.fusion import Fusion
from fusion_jax.server.requests import (
    MOST_LIKELY,
    Closing,
    Constraint,
    Event,
    Failed,
    Full,
    Likely,
    Request,
    Statistics,
)

log = logging.getLogger("fusion_jax")

_COMPILE = "/jax/core/compile/backend_compile_duration"
_compiled = 0
_apart = threading.local()


def _count(event: str, duration: float, **more) -> None:
    global _compiled
    _compiled += event == _COMPILE and not getattr(_apart, "now", False)


jax.monitoring.register_event_duration_secs_listener(_count)


@contextlib.contextmanager
def counted_apart() -> Iterator[None]:
    """For work beside the answers: what this thread compiles meanwhile is not in `Engine.recompilations`."""
    _apart.now = True
    try:
        yield
    finally:
        _apart.now = False


class Engine:
    """Answers many requests at once.

    Args:
      prompts: with `generate.Buckets`; its longest prompt is P. rows: R. max_tokens: A, the longest answer.
      queue_limit: requests that may wait beside those being answered.
    """

    def __init__(
        self,
        model: Fusion,
        params,
        prompts: generate.Prompts,
        rows: int = 8,
        max_tokens: int = 512,
        queue_limit: int = 64,
        chunk: int = generate.CHUNK,
    ):
        check(rows >= 1, f"--rows={rows} must be at least 1.")
        check(max_tokens >= 1, f"--max_tokens={max_tokens} must be at least 1.")
        check(queue_limit >= 0, f"--queue={queue_limit} must not be negative.")
        self.model, self.params, self.prompts = model, params, prompts
        self.rows, self.max_tokens, self.queue_limit, self.chunk = rows, max_tokens, queue_limit, chunk
        self.capacity = prompts.buckets.lengths[-1]
        self.statistics = Statistics()
        self._active: list[Request | None] = [None] * rows
        self._waiting: deque[Request] = deque()
        self._reserved = 0
        self._wake = threading.Condition()
        self._closing = False
        self._warm: int | None = None
        self._thread: threading.Thread | None = None
        self._state: generate.State | None = None
        self._working_since: float | None = None  # the thread has something to do for the device
        self.problem = ""  # why the engine's thread has ended

    # ---- From any thread.

    def start(self) -> None:
        """Compiles everything and begins to answer."""
        begun = time.monotonic()
        self._state = self._empty()
        self._warm_up()
        self._warm = _compiled
        log.info("compiled %d shapes in %.0f s", len(self.shapes()), time.monotonic() - begun)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def reserve(self) -> None:
        """Takes a place, to be given back by `release`. Raises Full, Closing, Failed."""
        with self._wake:
            self._check_open()
            if self._reserved >= self.rows + self.queue_limit:
                raise Full
            self._reserved += 1

    def release(self) -> None:
        with self._wake:
            self._reserved -= 1

    def _check_open(self) -> None:
        if self.problem:
            raise Failed(self.problem)
        if self._closing:
            raise Closing

    def prepare(self, record: Record) -> Example:
        """Tokenizes and reads the images. BadRecord where the prompt cannot be used."""
        return self.prompts.example(record)

    def submit(
        self,
        example: Example,
        how: Sampling,
        emit: Callable[[Event], None],
        timeout: float,
        constraint: Constraint | None = None,
        likely: int | None = None,
    ) -> Request:
        """Queues a prompt. `emit` is called from the engine's thread, last with an Event that has `finish`. Raises
        Closing, Failed. constraint, likely: see `Request`; at most MOST_LIKELY alternatives."""
        check(how.max_tokens <= self.max_tokens, f"max_tokens={how.max_tokens} is over the limit of {self.max_tokens}.")
        check(likely is None or 0 <= likely <= MOST_LIKELY, f"likely={likely} must lie in 0..{MOST_LIKELY}.")
        prefix = None if constraint is None else constraint.prefix
        stream = TextStream(self.prompts.tokenizer, self.prompts.stop_ids, how.stop, how.max_tokens, prefix)
        spec = layout_spec(self.prompts.config, 1, 1, 1)
        length = measure(example, spec, self.prompts.latents).length
        request = Request(example, how, emit, time.monotonic() + timeout, length, stream, constraint, likely)
        with self._wake:
            self._check_open()
            if len(self._waiting) > self.rows + self.queue_limit:
                # Whoever has left gives his place back; a device that hangs takes nobody out of the queue.
                self._waiting = deque(one for one in self._waiting if not one.cancelled)
            self._waiting.append(request)
            self._wake.notify()
        return request

    def answer(self, example: Example, how: Sampling, timeout: float = 600.0) -> Iterator[str]:
        """The answer in pieces. Leaving the loop cancels it. UserError where it ends without being finished; Full,
        Closing, Failed."""
        events: queue.Queue[Event] = queue.Queue()
        self.reserve()
        try:
            request = self.submit(example, how, events.put, timeout)
            try:
                while True:
                    try:
                        # The engine says so itself, unless its device hangs.
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
        return sum(request is not None for request in self._active)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def reserved(self) -> int:
        return self._reserved

    @property
    def silent(self) -> float:
        """Seconds for which the device has not answered."""
        since = self._working_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def recompilations(self) -> int:
        """Programs that this process compiled since the engine was warm, those of `counted_apart` left out."""
        return 0 if self._warm is None else _compiled - self._warm

    def refuse(self) -> None:
        """No new requests from now on."""
        with self._wake:
            self._closing = True

    def give_up(self) -> None:
        """No new requests, and those that were accepted end as cancelled."""
        self.refuse()
        with self._wake:
            for request in (*self._waiting, *self._active):
                if request is not None:
                    request.cancel()
            self._wake.notify()

    @property
    def closing(self) -> bool:
        return self._closing

    def close(self, patience: float = 60.0) -> None:
        """Answers what has been accepted, for so many seconds at most, then ends the thread."""
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

    # ---- Device.

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Every (length, question tokens, rounds, images) that is compiled."""
        b = self.prompts.buckets
        return [(s, t, r, i) for s in b.lengths for t in b.questions for r in b.rounds for i in b.images]

    def _empty(self) -> generate.State:
        config, rows = self.model.config.llm, self.rows
        none = jnp.zeros(rows, jnp.int32)
        cache = llm.empty_cache(config, none.copy(), self.capacity + self.max_tokens, self.model.dtype)
        return generate.State(
            logits=jnp.zeros((rows, config.vocab_size), jnp.float32),
            positions=none,
            # Copies: steps donate their buffers, which must differ.
            cache=replace(cache, positions=cache.positions.copy(), length=jnp.int32(self.capacity)),
            ring=jnp.int32(self.capacity),
            done=jnp.ones(rows, bool),
            made=none.copy(),
            limit=none.copy(),
            seen=jnp.zeros((rows, config.vocab_size), bool),
            settings=jax.tree.map(jnp.asarray, sampling.settings([Sampling()] * rows)),
        )

    def _warm_up(self) -> None:
        """Runs every program once: prefills of all shapes, joining, leaving, and all ways of decoding.

        A shape that no prompt can have (an image needs more positions than its length) is left out.
        """
        for length, question, rounds, images in self.shapes():
            example = self._longest(length, question, rounds, images)
            if example is not None:
                self._join(0, example, Sampling())
        for how in (Sampling(), Sampling(temperature=1.0)):
            self._join(0, example_of_text(), how)
            self._step(draw=not how.greedy)
        for allowed in (None, self._all_allowed()):
            self._join(0, example_of_text(), Sampling())
            self._step_reporting(allowed)
        self._leave(range(self.rows))
        jax.block_until_ready(self._state)

    def _longest(self, length: int, question: int, rounds: int, images: int) -> Example | None:
        """A prompt that falls into this bucket and no smaller: as long as it, with as few of the rest as still do."""
        b = self.prompts.buckets
        question, rounds, images = (
            max((known + 1 for known in sizes if known < size), default=min(size, 1))
            for size, sizes in ((question, b.questions), (rounds, b.rounds), (images, b.images))
        )
        config, spec = self.prompts.config, layout_spec(self.prompts.config, 1, 1, 1)
        latents = config.semantic_exchange and (images > 0 or config.text_only == "zero_image")
        marks = [IMAGE] * images + [LATENTS] * (rounds if latents else 0)
        crops = None
        if images:
            size, views = config.vision.image_size, 5 if config.uses_quadrants else 1
            crops = np.zeros((images, views, size, size, 3), np.uint8)
        guide = np.ones(question if images and config.text_guided else 0, np.int32)
        tilings = (WHOLE,) * images if config.tile_grids else ()
        probe = Example(np.array([1, *marks, 1], np.int32), None, guide, crops, "warm-up", tilings)
        free = length - measure(probe, spec, self.prompts.latents).length
        if free < 0:
            return None
        return replace(probe, input_ids=np.array([1, *marks, 1, *[1] * free], np.int32))

    def _join(self, row: int, example: Example, how: Sampling) -> None:
        batch = self.prompts.batch([example])
        limit = np.array([how.max_tokens], np.int32)
        logits, positions, cache = generate.prefill(self.model, self.params, batch, self.capacity, limit)
        new = generate.begin(
            logits, positions, cache, _text_only(batch, self.capacity), limit, sampling.settings([how])
        )
        self._state = _insert(self._state, new, np.int32(row))

    def _step(self, draw: bool) -> np.ndarray:
        tokens, _, self._state = generate.decode(
            self.model, self.params, self._state, self.chunk, self.prompts.stop_ids, draw
        )
        return np.asarray(tokens)

    def _step_reporting(self, allowed: np.ndarray | None) -> tuple[np.ndarray, generate.Likely]:
        """As `_step`, with the tokens' probabilities. allowed: the tokens that may come next, for one token a row; they
        depend on the one before, so there is no further one in the same step."""
        steps = self.chunk if allowed is None else 1
        most = min(MOST_LIKELY, self.model.config.llm.vocab_size)
        tokens, report, self._state = generate.decode(
            self.model,
            self.params,
            self._state,
            steps,
            self.prompts.stop_ids,
            True,
            likely=most,
            allowed=allowed,
        )
        return np.asarray(tokens), jax.tree.map(np.asarray, report)

    def _all_allowed(self) -> np.ndarray:
        return np.full((self.rows, -(-self.model.config.llm.vocab_size // 32)), -1, np.int32)

    def _leave(self, rows) -> None:
        gone = np.zeros(self.rows, bool)
        gone[list(rows)] = True
        self._state = _release(self._state, gone)

    # ---- The engine's thread.

    def _run(self) -> None:
        try:
            while self._turn():
                self._working_since = None
        except BaseException as error:  # the device failed: nobody may wait for ever
            said = " ".join(str(error).split())[:300]
            log.exception("the engine has stopped")
            with self._wake:
                self.problem = f"{type(error).__name__}: {said}" if said else type(error).__name__
        with self._wake:
            self._closing = True
            left = [request for request in (*self._active, *self._waiting) if request is not None]
            self._active = [None] * self.rows
            self._waiting.clear()
        for request in left:
            self._end(request, "error" if self.problem else "cancelled")

    def _turn(self) -> bool:
        """Admits, decodes a chunk, tells. False when the engine is to end."""
        with self._wake:
            while self._thread is not None and not self._waiting and not self.busy:
                self._wake.wait()
            if self._thread is None and not self._waiting and not self.busy:
                return False
        self._working_since = time.monotonic()
        self._drop_ended()
        for row in range(self.rows):
            while self._active[row] is None:
                with self._wake:
                    request = self._waiting.popleft() if self._waiting else None
                if request is None:
                    break
                try:
                    self._join(row, request.example, request.how)
                except (UserError, ValueError) as error:  # this one's fault, not the device's
                    log.warning("a request failed: %s", " ".join(str(error).split())[:300])
                    self._end(request, "error")
                    continue
                self.statistics.prefills += 1
                self.statistics.prompt_tokens += request.prompt_tokens
                self._active[row] = request
        self._decode()
        return True

    def _decode(self) -> None:
        """A step of all rows. Where one of them follows a constraint it is of one token."""
        allowed, report = self._allowed(), None
        if not self.busy:
            return
        if allowed is not None or any(r is not None and r.likely is not None for r in self._active):
            tokens, report = self._step_reporting(allowed)
        else:
            tokens = self._step(draw=not all(r is None or r.how.greedy for r in self._active))
        self.statistics.chunks += 1
        for row, request in enumerate(self._active):
            if request is not None:
                self._tell(row, request, tokens[row].tolist(), report)

    def _allowed(self) -> np.ndarray | None:
        """The tokens that may come next, None where no row follows a constraint. Who cannot go on ends here."""
        allowed = None
        for row, request in enumerate(self._active):
            if request is None or request.constraint is None:
                continue
            allowed = self._all_allowed() if allowed is None else allowed
            try:
                request.constraint.fill(allowed, row)
            except Exception as error:
                log.warning("an answer cannot follow its form: %s", " ".join(str(error).split())[:300])
                allowed[row] = -1
                self._active[row] = None
                self._leave([row])
                self._end(request, "error", problem=f"The answer cannot go on in its form: {error}.")
        return allowed

    def _tell(self, row: int, request: Request, tokens: list[int], report: generate.Likely | None) -> None:
        before, constraint = request.stream.made, request.constraint
        if constraint is not None:
            constraint.take(tokens[0])
        text = request.stream.add(tokens, last=constraint is not None and constraint.ended)
        new = request.stream.made - before
        self.statistics.answer_tokens += new
        likely = ()
        if request.likely is not None and report is not None:
            likely = tuple(
                Likely(
                    token,
                    float(report.chosen[row, k]),
                    tuple(zip(report.ids[row, k].tolist(), report.values[row, k].tolist()))[: request.likely],
                )
                for k, token in enumerate(tokens[:new])
                if token not in self.prompts.stop_ids
            )
        if request.stream.finish is not None:
            self._active[row] = None
            # The device does not know that a row is done by a stop text, or by its form.
            if request.stream.made % self.chunk or request.how.stop or constraint is not None:
                self._leave([row])
            self._end(request, request.stream.finish, text, likely)
        elif text or likely:
            self._emit(request, Event(text, tokens=likely))

    def _drop_ended(self) -> None:
        """Takes out what is cancelled or too late, waiting or running."""
        now, gone = time.monotonic(), []
        for row, request in enumerate(self._active):
            if request is not None and (request.cancelled or now > request.deadline):
                self._active[row] = None
                gone.append((row, request))
        if gone:
            self._leave(row for row, _ in gone)
        with self._wake:
            late = [r for r in self._waiting if r.cancelled or now > r.deadline]
            for request in late:
                self._waiting.remove(request)
        for request in [*(request for _, request in gone), *late]:
            self._end(request, "cancelled" if request.cancelled else "timeout")

    def _end(self, request: Request, finish: str, text: str = "", tokens=(), problem: str = "") -> None:
        self.statistics.finished[finish] = self.statistics.finished.get(finish, 0) + 1
        self._emit(request, Event(text, finish, tokens, problem))

    def _emit(self, request: Request, event: Event) -> None:
        try:
            request.emit(event)
        except Exception:  # its listener has gone
            log.debug("a request's listener has gone", exc_info=True)


def example_of_text() -> Example:
    """A prompt of one token, for warming up."""
    return Example(np.array([1], np.int32), None, np.zeros(0, np.int32), None, "warm-up")


def _text_only(batch, capacity: int):
    """What `generate.begin` reads of a batch, in one shape for all buckets."""
    width = capacity - batch.tokens.shape[1]

    def padded(x, fill):
        return np.pad(x, ((0, 0), (0, width)), constant_values=fill)

    return _Words(padded(batch.tokens, 0), padded(batch.segment_ids, 0), padded(batch.visual_index, -1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Words:
    tokens: np.ndarray
    segment_ids: np.ndarray
    visual_index: np.ndarray


@functools.partial(jax.jit, donate_argnames=("state",))
def _insert(state: generate.State, new: generate.State, row) -> generate.State:
    """The state with `new`, a state of one row whose cache holds a prompt, in place of a row."""

    def put(old, one, axis=0):
        return jax.lax.dynamic_update_slice_in_dim(old, one.astype(old.dtype), row, axis)

    def buffer(old, one):  # values (layers, R, G, C, d) and (layers, 1, G, P, d), keys with the last two swapped
        return jax.lax.dynamic_update_slice(old, one.astype(old.dtype), (0, row, 0, 0, 0))

    def slots(old, one):  # (R, C) and (1, P): what an earlier answer left in the ring counts no more
        return put(old, jnp.pad(one, ((0, 0), (0, old.shape[1] - one.shape[1]))))

    cache = replace(
        state.cache,
        keys=buffer(state.cache.keys, new.cache.keys),
        values=buffer(state.cache.values, new.cache.values),
        segments=slots(state.cache.segments, new.cache.segments),
        positions=slots(state.cache.positions, new.cache.positions),
        reach=put(state.cache.reach, new.cache.reach),
    )
    rows = {
        name: put(getattr(state, name), getattr(new, name))
        for name in ("logits", "positions", "done", "made", "limit", "seen")
    }
    return replace(state, cache=cache, settings=jax.tree.map(put, state.settings, new.settings), **rows)


@functools.partial(jax.jit, donate_argnames=("state",))
def _release(state: generate.State, gone) -> generate.State:
    """The state with some rows done."""
    return replace(state, done=state.done | gone, positions=jnp.where(gone, 0, state.positions))
