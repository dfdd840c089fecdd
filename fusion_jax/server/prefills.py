"""Compiles the server's prefills: the largest shapes at the start, others beside the answers, as prompts need them.

A prompt has one of few shapes (`prompts.Buckets`), and 2, 4 or 8 prompts of one shape can be prefilled together. Each
shape and number is a program, which takes seconds to minutes to compile. At the start only those of one prompt with the
longest question and most rounds are compiled, one for each length and number of images. A prompt that needs less asks
for a program of its own; a thread compiles it, and until it is ready the prompt is padded to a larger shape.

A prompt that begins with a kept one (`prefixes.py`) asks for a program that runs the rest alone; until that is ready it
is prefilled whole.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.batch import Batch
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, LayoutSpec, lay_out_rows, measure
from fusion_jax.inference import sampling
from fusion_jax.inference.decoding import Encoding, State, begin, prefill
from fusion_jax.inference.prefixes import Prefix, extend, rest_of
from fusion_jax.inference.prompts import Prompts, fit
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models import llm
from fusion_jax.models.fusion import Fusion
from fusion_jax.server import compilations
from fusion_jax.server.prefixes import Prefixes, begins_with

log = logging.getLogger("fusion_jax")

TOGETHER = (8, 4, 2)  # how many prompts of one shape may be prefilled together
RESTS = (32, 128, 512, 1024)  # positions that the rest of a prompt is padded to: an answer and the next question


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextOnly:
    """The part of a `Batch` that `decoding.begin` reads."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    visual_index: np.ndarray


class _Begun(NamedTuple):
    """A prompt that begins with a kept one.

    Attributes:
      program: runs the rest after `prefix`. words: see `text_only`. slots: of the bucket that the whole prompt has.
    """

    program: jax.stages.Compiled
    prefix: Prefix
    rest: Batch
    words: TextOnly
    slots: int


class Prefills:
    """Prefills prompts with the programs that are compiled. Only `pending` and `close` may be used from any thread.

    Args:
      capacity: slots of a prompt in the running batch. rows: most prompts at once.
      prefix_bytes: how much of earlier prompts to keep.
    """

    def __init__(self, model: Fusion, params, prompts: Prompts, capacity: int, rows: int, prefix_bytes: int = 0):
        self._model, self._params, self._prompts, self._capacity = model, params, prompts, capacity
        self._sizes = [size for size in TOGETHER if size <= rows]
        self._ready: dict[tuple[int, LayoutSpec], jax.stages.Compiled] = {}
        self._rests: dict[tuple[int, int, int], jax.stages.Compiled] = {}
        self._cuts: dict[int, jax.stages.Compiled] = {}
        self._compiler = compilations.Compiler()
        self.prefixes = Prefixes(prompts.config, prefix_bytes)

    def shape(self, example: Example) -> LayoutSpec:
        """The smallest shape of a prompt. Raises BadRecord where it fits none."""
        return fit([example], self._prompts.config, self._prompts.latents, self._prompts.buckets)

    def run(self, examples: Sequence[Example], hows: Sequence[Sampling]) -> list[State]:
        """Prefills the first of these prompts, which have one shape: as many as there is a program for.

        One that begins with a kept prompt is continued from there, by itself.

        Returns:
          a state of one row, with a cache of `capacity` slots, for each of them.
        """
        if (begun := self._begun(examples[0], hows[0])) is not None:
            return [self._continue(begun, examples[0], hows[0])]
        # Those behind one that begins with a kept prompt wait until it has had its turn.
        others = range(1, len(examples))
        whole = next((k for k in others if self._begun(examples[k], hows[k]) is not None), len(examples))
        count, spec = self._choose(whole, self.shape(examples[0]))
        batch = self._lay_out(examples[:count], spec, count)
        limit = np.array([how.max_tokens for how in hows[:count]], np.int32)
        logits, positions, cache, encoding = self._ready[count, spec](self._params, batch, limit=limit)
        settings = sampling.settings(hows[:count])
        state = begin(logits, positions, cache, text_only(batch, self._capacity), limit, settings)
        rows = _rows(state, encoding)
        for (one, own), example, how in zip(rows, examples, hows):
            self.prefixes.misses += begins_with(example) > 0
            self._keep(example, how, one.cache, own, spec.length)
        return [one for one, _ in rows]

    def _begun(self, example: Example, how: Sampling) -> _Begun | None:
        """How to continue the kept prompt that this one begins with; None without one, or while that is compiled."""
        prefix = self.prefixes.find(example, how, self._length(example))
        if prefix is None:
            return None
        spec, start = self.shape(example), int(prefix.length)
        length = next((size for size in RESTS if size >= self._length(example) - start), spec.length)
        if length >= spec.length:  # that saves nothing
            return None
        batch = self._lay_out([example], spec, 1)
        rest = rest_of(batch, start, length)
        kind = length, prefix.keys.shape[-1], spec.crops
        if kind not in self._rests:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (rest, prefix))
            self._compiler.want(kind, functools.partial(self._compile_rest, kind, *shapes))
            return None
        return _Begun(self._rests[kind], prefix, rest, text_only(batch, self._capacity), spec.length)

    def _continue(self, begun: _Begun, example: Example, how: Sampling) -> State:
        limit = np.array([how.max_tokens], np.int32)
        results = begun.program(self._params, begun.rest, begun.prefix, limit=limit)
        state = begin(*results, begun.words, limit, sampling.settings([how]))
        self.prefixes.hits += 1
        self._keep(example, how, state.cache, begun.prefix.encoding, begun.slots)
        return state

    def _keep(self, example: Example, how: Sampling, cache: llm.Cache, encoding: Encoding | None, slots: int) -> None:
        if self.prefixes.keeps(example):
            keys, values = self._cuts[slots](cache.keys, cache.values)
            self.prefixes.put(example, how, Prefix(keys, values, np.int32(self._length(example)), encoding))

    def _length(self, example: Example) -> int:
        return measure(example, layout_spec(self._prompts.config, 1, 1, 1), self._prompts.latents).length

    def _choose(self, left: int, spec: LayoutSpec) -> tuple[int, LayoutSpec]:
        """How many prompts of a shape to prefill now, and the shape to pad them to; asks for a better program."""
        fitting = [size for size in self._sizes if size <= left]
        for count in (*fitting, 1):
            if (count, spec) in self._ready:
                break
            self._compiler.want((count, spec), functools.partial(self.compile, count, spec))
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
        compiled = prefill.lower(self._model, self._params, batch, self._capacity, limit=limit, keep=True).compile()
        if count > 1 and not compilations.has_room(compiled, self.prefixes.left):
            log.info("%d prompts of %d positions are not prefilled together: too little memory", count, spec.length)
            return
        if count > 1:  # what else such a number of rows needs
            logits, positions, cache, encoding = compiled(self._params, batch, limit=limit)
            settings = sampling.settings([Sampling()] * count)
            state = begin(logits, positions, cache, text_only(batch, self._capacity), limit, settings)
            jax.block_until_ready(_rows(state, encoding))
        if spec.length not in self._cuts:
            self._cuts[spec.length] = self._compile_cut(spec.length)
        self._ready[count, spec] = compiled

    def _compile_cut(self, slots: int) -> jax.stages.Compiled:
        def cache():
            one = llm.empty_cache(self._model.config.llm, jnp.zeros(1, jnp.int32), self._capacity, self._model.dtype)
            return one.keys, one.values

        return _cut.lower(*jax.eval_shape(cache), slots).compile()

    def _compile_rest(self, kind: tuple[int, int, int], rest, prefix) -> None:
        limit = np.ones(1, np.int32)
        compiled = extend.lower(self._model, self._params, rest, prefix, self._capacity, limit=limit).compile()
        if compilations.has_room(compiled, self.prefixes.left):
            self._rests[kind] = compiled
        else:
            log.info("prompts of %d positions are prefilled whole: too little memory", kind[1])

    def _lay_out(self, examples: Sequence[Example], spec: LayoutSpec, count: int) -> Batch:
        rows = [[example] for example in examples] + [[]] * (count - len(examples))
        # Without a crop there are no latents, so one program serves every l^2.
        return lay_out_rows(rows, spec, self._prompts.latents if spec.crops else 0)

    @property
    def pending(self) -> int:
        """The number of programs that prompts have asked for and that are not compiled yet."""
        return self._compiler.pending

    def close(self, patience: float = 60.0) -> None:
        """Compiles nothing more; see `compilations.Compiler.close`."""
        self._compiler.close(patience)


def _rows(state: State, encoding: Encoding | None) -> list[tuple[State, Encoding | None]]:
    """Divides a state, and what is kept of the images, into those of one row each."""
    count = len(state.limit)
    return [(state, encoding)] if count == 1 else [_row((state, encoding), np.int32(place)) for place in range(count)]


@jax.jit
def _row(rows: tuple[State, Encoding | None], place) -> tuple[State, Encoding | None]:
    def take(path, x):
        if not x.ndim:  # the slot, which all rows share
            return x
        return jax.lax.dynamic_slice_in_dim(x, place, 1, 1 if path[-1].name in ("keys", "values") else 0)

    return jax.tree.map_with_path(take, rows)


@functools.partial(jax.jit, static_argnums=2)
def _cut(keys, values, slots: int):
    """The keys and values of a cache's first slots."""
    return keys[..., :slots], values[..., :slots, :]


def _holds(known: LayoutSpec, spec: LayoutSpec) -> bool:
    """Whether prompts of the shape `spec` can be padded to the shape `known`."""
    same = dataclasses.replace(known, question_length=spec.question_length, rounds=spec.rounds) == spec
    return same and known.question_length >= spec.question_length and known.rounds >= spec.rounds


def text_only(batch: Batch, capacity: int) -> TextOnly:
    """The part of a batch that `decoding.begin` reads, padded to one shape for all buckets: (rows, capacity)."""
    width = capacity - batch.tokens.shape[1]

    def padded(x, fill):
        return np.pad(x, ((0, 0), (0, width)), constant_values=fill)

    return TextOnly(padded(batch.tokens, 0), padded(batch.segment_ids, 0), padded(batch.visual_index, -1))
