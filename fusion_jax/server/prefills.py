"""Compiles the server's prefills: the largest shapes at the start, others beside the answers, as prompts need them.

A prompt has one of few shapes (`prompts.Buckets`), and 2, 4 or 8 prompts of one shape can be prefilled together. Each
shape and number is a program, which takes seconds to minutes to compile. At the start only those of one prompt with the
longest question and most rounds are compiled, one for each length and number of images. A prompt that needs less asks
for a program of its own; a thread compiles it, and until it is ready the prompt is padded to a larger shape.
"""

import dataclasses
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, LayoutSpec, lay_out_rows
from fusion_jax.inference import sampling
from fusion_jax.inference.decoding import State, begin, prefill
from fusion_jax.inference.prompts import Prompts, fit
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models.fusion import Fusion
from fusion_jax.server import compilations

log = logging.getLogger("fusion_jax")

TOGETHER = (8, 4, 2)  # how many prompts of one shape may be prefilled together


class Prefills:
    """Prefills prompts with the programs that are compiled. Only `pending` and `close` may be used from any thread.

    Args:
      capacity: slots of a prompt in the running batch. rows: most prompts at once.
    """

    def __init__(self, model: Fusion, params, prompts: Prompts, capacity: int, rows: int):
        self._model, self._params, self._prompts, self._capacity = model, params, prompts, capacity
        self._sizes = [size for size in TOGETHER if size <= rows]
        self._ready: dict[tuple[int, LayoutSpec], jax.stages.Compiled] = {}
        self._wanted: set[tuple[int, LayoutSpec]] = set()
        self._queue: queue.Queue[tuple[int, LayoutSpec] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def shape(self, example: Example) -> LayoutSpec:
        """The smallest shape of a prompt. Raises BadRecord where it fits none."""
        return fit([example], self._prompts.config, self._prompts.latents, self._prompts.buckets)

    def run(self, examples: Sequence[Example], hows: Sequence[Sampling]) -> list[State]:
        """Prefills the first of these prompts, which have one shape: as many as there is a program for.

        Returns:
          a state of one row, with a cache of `capacity` slots, for each of them.
        """
        count, spec = self._choose(len(examples), self.shape(examples[0]))
        batch = self._lay_out(examples[:count], spec, count)
        limit = np.array([how.max_tokens for how in hows[:count]], np.int32)
        logits, positions, cache = self._ready[count, spec](self._params, batch, limit=limit)
        settings = sampling.settings(hows[:count])
        return _rows(begin(logits, positions, cache, text_only(batch, self._capacity), limit, settings))

    def _choose(self, left: int, spec: LayoutSpec) -> tuple[int, LayoutSpec]:
        """How many prompts of a shape to prefill now, and the shape to pad them to; asks for a better program."""
        fitting = [size for size in self._sizes if size <= left]
        for count in (*fitting, 1):
            if (count, spec) in self._ready:
                break
            self._want(count, spec)
        else:
            larger = [known for count, known in self._ready if count == 1 and _holds(known, spec)]
            count = 1
            if not larger:
                larger = [self.largest(spec)]
                self.compile(1, larger[0])
            spec = min(larger, key=lambda known: (known.question_length, known.rounds))
        return count, spec

    def largest(self, spec: LayoutSpec) -> LayoutSpec:
        """The shape with the longest question and most rounds, otherwise like `spec`."""
        if not spec.crops:  # text alone has neither
            return spec
        buckets = self._prompts.buckets
        most = layout_spec(self._prompts.config, 1, buckets.questions[-1], buckets.rounds[-1])
        return dataclasses.replace(spec, question_length=most.question_length, rounds=most.rounds)

    def compile(self, count: int, spec: LayoutSpec) -> None:
        """Compiles a prefill; drops it where the device has no room for it beside what it holds."""
        batch = self._lay_out([], spec, count)
        limit = np.ones(count, np.int32)
        compiled = prefill.lower(self._model, self._params, batch, self._capacity, limit=limit).compile()
        if count > 1 and not _has_room(compiled):
            log.info("%d prompts of %d positions are not prefilled together: too little memory", count, spec.length)
            return
        if count > 1:  # what else such a number of rows needs
            results = compiled(self._params, batch, limit=limit)
            settings = sampling.settings([Sampling()] * count)
            jax.block_until_ready(_rows(begin(*results, text_only(batch, self._capacity), limit, settings)))
        self._ready[count, spec] = compiled

    def _lay_out(self, examples: Sequence[Example], spec: LayoutSpec, count: int):
        rows = [[example] for example in examples] + [[]] * (count - len(examples))
        # Without a crop there are no latents, so one program serves every l^2.
        return lay_out_rows(rows, spec, self._prompts.latents if spec.crops else 0)

    def _want(self, count: int, spec: LayoutSpec) -> None:
        if (count, spec) in self._wanted or self._closed:
            return
        self._wanted.add((count, spec))
        self._queue.put((count, spec))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="compile", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        with compilations.uncounted():
            while (wanted := self._queue.get()) is not None:
                if self._closed:
                    return
                try:
                    self.compile(*wanted)
                except Exception as error:  # prompts are then padded to a larger shape, as before
                    log.warning("a prefill could not be compiled: %s", " ".join(str(error).split())[:300])
                self._queue.task_done()

    @property
    def pending(self) -> int:
        """The number of programs that prompts have asked for and that are not compiled yet."""
        return self._queue.unfinished_tasks

    def close(self, patience: float = 60.0) -> None:
        """Compiles nothing more; waits for the program that is being compiled, which cannot be interrupted."""
        self._closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(patience)


def _rows(state: State) -> list[State]:
    """Divides a state into states of one row each."""
    count = len(state.limit)
    return [state] if count == 1 else [_row(state, np.int32(place)) for place in range(count)]


@jax.jit
def _row(state: State, place) -> State:
    def take(path, x):
        if not x.ndim:  # the slot, which all rows share
            return x
        return jax.lax.dynamic_slice_in_dim(x, place, 1, 1 if path[-1].name in ("keys", "values") else 0)

    return jax.tree.map_with_path(take, state)


def _holds(known: LayoutSpec, spec: LayoutSpec) -> bool:
    """Whether prompts of the shape `spec` can be padded to the shape `known`."""
    same = dataclasses.replace(known, question_length=spec.question_length, rounds=spec.rounds) == spec
    return same and known.question_length >= spec.question_length and known.rounds >= spec.rounds


def _has_room(compiled: jax.stages.Compiled) -> bool:
    plan, used = compiled.memory_analysis(), jax.local_devices()[0].memory_stats()
    if plan is None or not used or "bytes_limit" not in used:
        return True
    return plan.temp_size_in_bytes + plan.output_size_in_bytes < used["bytes_limit"] - used["bytes_in_use"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextOnly:
    """The part of a `Batch` that `decoding.begin` reads."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    visual_index: np.ndarray


def text_only(batch, capacity: int) -> TextOnly:
    """The part of a batch that `decoding.begin` reads, padded to one shape for all buckets: (rows, capacity)."""
    width = capacity - batch.tokens.shape[1]

    def padded(x, fill):
        return np.pad(x, ((0, 0), (0, width)), constant_values=fill)

    return TextOnly(padded(batch.tokens, 0), padded(batch.segment_ids, 0), padded(batch.visual_index, -1))
