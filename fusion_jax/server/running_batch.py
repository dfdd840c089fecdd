"""Keeps the running batch on the device: R rows of prompts and answers, which requests join and leave.

The cache has R rows of P + A slots. New prompts are prefilled (`prefills.py`) and copied into slots [0, P) of free
rows; all rows write their next token into the same slot of the ring [P, P + A). A row lasts at most A steps, so the
tokens that it still needs are never overwritten, wherever in the ring it began:

    slot     0 ......... P-1 | P ... ^ ... P+A-1          ^ written next, by all rows
    row 0    prompt   . . .  | a a a a . . a a a          an answer that wrapped around the end of the ring
    row 1    prompt prompt . | . . a a . . . . .
    row 2    free
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.data.conversation import IMAGE, LATENTS
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, measure
from fusion_jax.data.tiles import WHOLE
from fusion_jax.errors import check
from fusion_jax.inference import sampling
from fusion_jax.inference.decoding import CHUNK, Logprobs, State, decode
from fusion_jax.inference.prompts import Prompts
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models import llm
from fusion_jax.models.fusion import Fusion
from fusion_jax.server.prefills import Prefills
from fusion_jax.server.requests import MOST_LOGPROBS


class RunningBatch:
    """The rows on the device, and the compiled programs that change them. Only one thread may use it at a time.

    Args:
      prompts: with `prompts.Buckets`; its longest prompt is P. rows: R. max_tokens: A, the longest answer.
      chunk: tokens that a step decodes. prefix_bytes: see `Prefills`.
    """

    def __init__(
        self,
        model: Fusion,
        params,
        prompts: Prompts,
        rows: int = 8,
        max_tokens: int = 512,
        chunk: int = CHUNK,
        prefix_bytes: int = 0,
    ):
        check(rows >= 1, f"--rows={rows} must be at least 1.")
        check(max_tokens >= 1, f"--max_tokens={max_tokens} must be at least 1.")
        self.model, self.params, self.prompts = model, params, prompts
        self.rows, self.max_tokens, self.chunk = rows, max_tokens, chunk
        self.capacity = prompts.buckets.lengths[-1]
        self.prefills = Prefills(model, params, prompts, self.capacity, rows, prefix_bytes)
        self.state: State | None = None

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """The shapes that are compiled at the start: (length, question tokens, rounds, images)."""
        b = self.prompts.buckets
        return [(s, b.questions[-1], b.rounds[-1], i) for s in b.lengths for i in b.images]

    def empty(self) -> State:
        """The state with all rows free."""
        config, rows = self.model.config.llm, self.rows
        none = jnp.zeros(rows, jnp.int32)
        cache = llm.empty_cache(config, none.copy(), self.capacity + self.max_tokens, self.model.dtype)
        return State(
            logits=jnp.zeros((rows, config.vocab_size), jnp.float32),
            positions=none,
            # These are copies: steps donate their buffers, which must differ.
            cache=replace(cache, positions=cache.positions.copy(), length=jnp.int32(self.capacity)),
            ring=jnp.int32(self.capacity),
            done=jnp.ones(rows, bool),
            length=none.copy(),
            limit=none.copy(),
            seen=jnp.zeros((rows, config.vocab_size), bool),
            settings=jax.tree.map(jnp.asarray, sampling.settings([Sampling()] * rows)),
        )

    def warm_up(self) -> None:
        """Empties all rows and runs every program once: the largest prefills, joining, leaving, all ways of decoding.

        A shape that no prompt can have (an image needs more positions than its length) is left out.
        """
        self.state = self.empty()
        for length, question, rounds, images in self.shapes():
            example = self._longest(length, question, rounds, images)
            if example is not None:
                self.join([0], [example], [Sampling()])
        for how in (Sampling(), Sampling(temperature=1.0)):
            self.join([0], [example_of_text()], [how])
            self.step(draw=not how.greedy)
        for allowed in (None, self.all_allowed()):
            self.join([0], [example_of_text()], [Sampling()])
            self.step_reporting(allowed)
        self.leave(range(self.rows))
        jax.block_until_ready(self.state)

    def _longest(self, length: int, question: int, rounds: int, images: int) -> Example | None:
        """A prompt that falls into this bucket and no smaller one: of the full length, and just large enough otherwise.

        None where no prompt does.
        """
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

    def join(self, rows: Sequence[int], examples: Sequence[Example], hows: Sequence[Sampling]) -> None:
        """Prefills prompts of one shape, several together where a program is ready, and puts them into free rows."""
        done = 0
        while done < len(rows):
            for new in self.prefills.run(examples[done:], hows[done:]):
                self.state = insert(self.state, new, np.int32(rows[done]))
                done += 1

    def step(self, draw: bool) -> np.ndarray:
        """Decodes a chunk of tokens in all rows, (R, chunk) int32. draw: see `decoding.decode`."""
        tokens, _, self.state = decode(self.model, self.params, self.state, self.chunk, self.prompts.stop_ids, draw)
        return np.asarray(tokens)

    def step_reporting(self, allowed: np.ndarray | None) -> tuple[np.ndarray, Logprobs]:
        """A step with the tokens' log probabilities.

        Args:
          allowed: the tokens that may come next, see `decoding.decode`. They depend on the token before, so the step
            decodes only one token a row. None allows all.
        """
        steps = self.chunk if allowed is None else 1
        most = min(MOST_LOGPROBS, self.model.config.llm.vocab_size)
        stop_ids = self.prompts.stop_ids
        tokens, report, self.state = decode(
            self.model, self.params, self.state, steps, stop_ids, True, top_logprobs=most, allowed=allowed
        )
        return np.asarray(tokens), jax.tree.map(np.asarray, report)

    def all_allowed(self) -> np.ndarray:
        """A mask for `step_reporting` that allows every token, (R, ceil(V / 32)) int32."""
        return np.full((self.rows, -(-self.model.config.llm.vocab_size // 32)), -1, np.int32)

    def leave(self, rows: Iterable[int]) -> None:
        """Frees rows."""
        left = np.zeros(self.rows, bool)
        left[list(rows)] = True
        self.state = release(self.state, left)


def example_of_text() -> Example:
    """A prompt of one token, for warming up."""
    return Example(np.array([1], np.int32), None, np.zeros(0, np.int32), None, "warm-up")


@functools.partial(jax.jit, donate_argnames=("state",))
def insert(state: State, new: State, row) -> State:
    """The state with one row replaced by `new`, a state of one row whose cache holds a prompt."""

    def put(old, one, axis=0):
        return jax.lax.dynamic_update_slice_in_dim(old, one.astype(old.dtype), row, axis)

    def buffer(old, one):  # values (layers, R, G, C, d) and (layers, 1, G, P, d), keys with the last two swapped
        return jax.lax.dynamic_update_slice(old, one.astype(old.dtype), (0, row, 0, 0, 0))

    def slots(old, one):  # (R, C) and (1, P): padding clears what an earlier answer left in the ring
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
        for name in ("logits", "positions", "done", "length", "limit", "seen")
    }
    return replace(state, cache=cache, settings=jax.tree.map(put, state.settings, new.settings), **rows)


@functools.partial(jax.jit, donate_argnames=("state",))
def release(state: State, left) -> State:
    """The state with the rows of the mask `left`, (R,) bool, done."""
    return replace(state, done=state.done | left, positions=jnp.where(left, 0, state.positions))
