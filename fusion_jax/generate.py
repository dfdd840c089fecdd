"""Generation: prefill with exchange, then cached decode in one compiled loop."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax import distributed
from fusion_jax.config import RunConfig
from fusion_jax.data import conversation
from fusion_jax.data.layout import Batch, laid_out_length, lay_out, needs
from fusion_jax.data.pipeline import ExampleMaker, layout_spec
from fusion_jax.data.sources import Record
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import BadRecord
from fusion_jax.models import llm
from fusion_jax.models.fusion import Fusion


@dataclass(frozen=True)
class Generated:
    """tokens: (B, steps) int32, filled with the first stop id behind a row's end. logits: (B, steps, V) or None."""

    tokens: np.ndarray
    logits: np.ndarray | None


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def prefill(model: Fusion, params, batch: Batch, capacity: int) -> tuple[jax.Array, jax.Array, llm.Cache]:
    """Runs the prompts and fills a cache with room for `capacity` tokens a row.

    Prompts are right-padded; each row's next token comes from its own last position.

    Returns:
      float32 logits (B, V) of the next token, its position (B,), and the cache.
    """
    rows = batch.tokens.shape[0]
    cache = llm.empty_cache(model.config.llm, rows, capacity, model.dtype)
    hidden, _, cache = model.apply({"params": params}, batch, cache)
    lengths = jnp.sum(batch.segment_ids > 0, axis=1)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.apply({"params": params}, last, method="logits"), lengths, cache


@functools.partial(jax.jit, static_argnames=("model", "steps", "stop_ids", "keep_logits"), donate_argnames=("cache",))
def decode(model: Fusion, params, logits, positions, cache, steps: int, stop_ids: tuple[int, ...], keep_logits: bool):
    """Greedy decode of up to `steps` tokens a row from the prefill's logits; stops early once every row has stopped.

    The cache is given back so that its donated buffers are updated in place.
    """
    rows, vocabulary = logits.shape
    fill = stop_ids[0] if stop_ids else 0
    tokens = jnp.full((rows, steps), fill, jnp.int32)
    kept = jnp.zeros((rows, steps, vocabulary), jnp.float32) if keep_logits else None

    def unfinished(state):
        step, _, _, _, _, done, _ = state
        return (step < steps) & ~jnp.all(done)

    def body(state):
        step, tokens, logits, positions, cache, done, kept = state
        token = jnp.where(done, fill, jnp.argmax(logits, -1).astype(jnp.int32))
        tokens = tokens.at[:, step].set(token)
        if keep_logits:
            kept = kept.at[:, step].set(logits)
        for stop in stop_ids:
            done = done | (token == stop)
        # The last token needs no successor.
        logits, cache = jax.lax.cond(
            step + 1 < steps,
            lambda: model.apply({"params": params}, token, positions, cache, method="decode"),
            lambda: (logits, cache),
        )
        return step + 1, tokens, logits, positions + 1, cache, done, kept

    state = (jnp.int32(0), tokens, logits, positions, cache, jnp.zeros(rows, bool), kept)
    _, tokens, _, _, cache, _, kept = jax.lax.while_loop(unfinished, body, state)
    return tokens, kept, cache


def greedy(
    model: Fusion, params, batch: Batch, steps: int, stop_ids: tuple[int, ...], keep_logits: bool = False
) -> Generated:
    """The most likely continuation of every prompt in the batch, at most `steps` tokens.

    Args:
      batch: prompts laid out by `data.layout` (labels None), one a row.
      stop_ids: tokens that end an answer; they are part of the result.
    """
    logits, positions, cache = prefill(model, params, batch, batch.tokens.shape[1] + steps)
    tokens, kept, _ = decode(model, params, logits, positions, cache, steps, stop_ids, keep_logits)
    return Generated(distributed.whole(tokens), None if kept is None else distributed.whole(kept))


def first_question(record: Record) -> Record:
    """The record cut after its first question: a prompt. Raises BadRecord where no answer follows it."""
    start = 1 if record.turns and record.turns[0].get("from") == "gpt" else 0
    if len(record.turns) < start + 2:
        raise BadRecord("no_answer", record.where, "there is no question with an answer")
    return dataclasses.replace(record, turns=record.turns[start : start + 1])


class Answerer:
    """Answers prompts in batches of fixed shape, so that at most one program per length bucket is compiled.

    Args:
      rows: prompts per batch; the last batch is filled up by repetition.
      max_tokens: longest answer.
    """

    # Prompt lengths are rounded up to these steps: few programs, little padding.
    BUCKET = 32

    def __init__(
        self, model: Fusion, params, config: RunConfig, tokenizer: Tokenizer, rows: int = 16, max_tokens: int = 32
    ):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.rows, self.max_tokens = rows, max_tokens
        self._maker = ExampleMaker(config.model, tokenizer, config.template)
        self._stops = conversation.stop_ids(tokenizer, conversation.find_template(config.template))

    def answer(self, prompts: Sequence[Record]) -> list[str]:
        """Greedy answers. Raises BadRecord for a prompt that cannot be used."""
        answers = []
        for start in range(0, len(prompts), self.rows):
            part = list(prompts[start : start + self.rows])
            answers += self._batch(part + part[-1:] * (self.rows - len(part)))[: len(part)]
        return answers

    def _batch(self, prompts: list[Record]) -> list[str]:
        config = self.model.config
        latents = config.fixed_latent_count
        examples = [self._maker(prompt, prompt=True) for prompt in prompts]
        rounds = max(int((e.input_ids == conversation.LATENTS).sum()) for e in examples)
        question = _round_up(max(len(e.question_ids) for e in examples), self.BUCKET)
        spec = layout_spec(config, 1, question, max(rounds, 1))
        length = _round_up(max(laid_out_length(e, spec, latents) for e in examples), self.BUCKET)
        crops = max(1, *(needs(e, spec, latents).crops for e in examples))
        batch = lay_out(examples, dataclasses.replace(spec, length=length, crops=crops), latents)
        result = greedy(self.model, self.params, batch, self.max_tokens, self._stops)
        return [self._text(row) for row in result.tokens.tolist()]

    def _text(self, tokens: list[int]) -> str:
        end = next((i for i, token in enumerate(tokens) if token in self._stops), len(tokens))
        return self.tokenizer.decode([t for t in tokens[:end] if t < self.tokenizer.vocab_size]).strip()


def _round_up(value: int, step: int) -> int:
    return -(-max(value, 1) // step) * step
