"""Answers prompts in batches: `Answerer` returns texts, `greedy` returns tokens and logits."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig
from fusion_jax.data.sources import Record
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.devices import distributed, sharding
from fusion_jax.inference import sampling
from fusion_jax.inference.decoding import CHUNK, decode, first_state
from fusion_jax.inference.prompts import Prompts, Steps, round_up
from fusion_jax.inference.streaming import TextStream
from fusion_jax.models import weights
from fusion_jax.models.fusion import Fusion


@dataclass(frozen=True)
class Generated:
    """tokens: (B, steps) int32, filled with the first stop id after a row's end. logits: (B, steps, V) or None."""

    tokens: np.ndarray
    logits: np.ndarray | None


def greedy(
    model: Fusion, params, batch: Batch, steps: int, stop_ids: tuple[int, ...], keep_logits: bool = False
) -> Generated:
    """The most likely continuation of every prompt in the batch, at most `steps` tokens.

    Args:
      batch: prompts laid out by `data.layout` (labels None), one a row.
      stop_ids: tokens that end an answer; they are part of the result.
    """
    state = first_state(model, params, batch, [sampling.Sampling(max_tokens=steps)] * len(batch.tokens))
    tokens, kept, _ = decode(model, params, state, steps, stop_ids, False, keep_logits)
    return Generated(distributed.whole(tokens), None if kept is None else distributed.whole(kept))


class Answerer:
    """Answers prompts in batches of fixed shape, so that at most one program per length bucket is compiled.

    Args:
      rows: prompts per batch; the last batch is filled up with empty rows.
      max_tokens: longest answer.
      latents: l^2, see `Prompts`.
      mesh: devices that `params` are sharded over (as by `state.abstract_parameters`); `rows` are rounded up to a
        multiple of its batch shards. Every process passes the same prompts and gets all answers. None: one device.
    """

    def __init__(
        self,
        model: Fusion,
        params,
        config: RunConfig,
        tokenizer: Tokenizer,
        rows: int = 16,
        max_tokens: int = 32,
        latents: int | None = None,
        mesh: Mesh | None = None,
    ):
        self.model, self.params, self.tokenizer = model, weights.as_read(params, model.dtype), tokenizer
        self.rows = rows if mesh is None else round_up(rows, sharding.batch_shards(mesh))
        self.max_tokens = max_tokens
        # The model's own config applies, not the one of its training: an ablation may have replaced parts.
        self.prompts = Prompts(dataclasses.replace(config, model=model.config), tokenizer, Steps(), latents)
        self._mesh = mesh

    def answer(self, prompts: Sequence[Record], how: sampling.Sampling | None = None) -> list[str]:
        """The answers, greedy by default. Raises BadRecord for a prompt that cannot be used."""
        how = how or sampling.Sampling(max_tokens=self.max_tokens)
        answers = []
        for start in range(0, len(prompts), self.rows):
            part = prompts[start : start + self.rows]
            streams = [self._text(how) for _ in part]
            for new in self._chunks(part, [how] * len(part), how.max_tokens if not how.stop else CHUNK, streams):
                del new
            answers += [stream.text for stream in streams]
        return answers

    def stream(self, prompt: Record, how: sampling.Sampling | None = None) -> Iterator[str]:
        """Yields the answer to one prompt in pieces, as they become certain. Leaving the loop ends the work."""
        how = how or sampling.Sampling(max_tokens=self.max_tokens)
        for new in self._chunks([prompt], [how], CHUNK, [self._text(how)]):
            if new[0]:
                yield new[0]

    def _text(self, how: sampling.Sampling) -> TextStream:
        return TextStream(self.tokenizer, self.prompts.stop_ids, how.stop, how.max_tokens)

    def _devices(self):
        return contextlib.nullcontext() if self._mesh is None else sharding.use(self._mesh)

    def _chunks(self, prompts, samplings, steps: int, streams: list[TextStream]) -> Iterator[list[str]]:
        """Decodes `steps` tokens at a time until every stream has ended. Yields the new text of each stream."""
        batch = self.prompts.batch([self.prompts.example(prompt) for prompt in prompts], self.rows)
        draw = not all(how.greedy for how in samplings)
        if self._mesh is not None:
            batch = sharding.put_batch(sharding.local_rows(batch, self._mesh), self._mesh)
        with self._devices():
            state = first_state(self.model, self.params, batch, samplings)
        while any(stream.finish is None for stream in streams):
            with self._devices():
                tokens, _, state = decode(self.model, self.params, state, steps, self.prompts.stop_ids, draw)
            rows = distributed.whole(tokens).tolist()
            yield [stream.add(row) for stream, row in zip(streams, rows)]
