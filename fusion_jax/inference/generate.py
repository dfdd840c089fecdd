"""Generation: prefill with exchange, then cached decode in one compiled loop."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig
from fusion_jax.data import chat_template
from fusion_jax.data.examples import ExampleMaker, layout_spec
from fusion_jax.data.layout import Example, LayoutSpec, Measured, check_fits, lay_out_rows, measure
from fusion_jax.data.planner import draw_latent_count
from fusion_jax.data.sources import Record
from fusion_jax.data.templates import stop_ids
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.devices import distributed, sharding
from fusion_jax.errors import BadRecord, check
from fusion_jax.inference import sampling
from fusion_jax.inference.streaming import TextStream
from fusion_jax.models import llm
from fusion_jax.models.config import FusionConfig
from fusion_jax.models.fusion import Fusion

CHUNK = 8  # tokens between two looks at what has been generated
BETWEEN = "\n\n"  # between texts that were said one after the other and are one turn


@dataclass(frozen=True)
class Generated:
    """tokens: (B, steps) int32, filled with the first stop id behind a row's end. logits: (B, steps, V) or None."""

    tokens: np.ndarray
    logits: np.ndarray | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that decoding carries from token to token, B rows that may be at different places of their answers.

    Attributes:
      logits: (B, V) float32 of the next token. positions: (B,) int32, that of the next token.
      cache: rows share the slot that is written next. Answers lie behind the prompts in a ring of slots, so a row may
        take up a new prompt at any time; no row may live longer than the ring is long.
      ring: int32 scalar, the first slot of the ring.
      done: (B,) bool, nothing more is wanted of the row. made, limit: (B,) int32, tokens of the answer so far, at most.
      seen: (B, V) bool, tokens of the prompt and the answer. settings: how each row's tokens are chosen.
    """

    logits: jax.Array
    positions: jax.Array
    cache: llm.Cache
    ring: jax.Array
    done: jax.Array
    made: jax.Array
    limit: jax.Array
    seen: jax.Array
    settings: sampling.Settings


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def prefill(model: Fusion, params, batch: Batch, capacity: int, limit) -> tuple[jax.Array, jax.Array, llm.Cache]:
    """Runs the prompts and fills a cache with room for `capacity` tokens a row.

    limit: (B,) int32, the longest answer of each row, which with LongRoPE decides its factors together with its prompt.
    Prompts may be padded on the right, as `data.layout` does, or on the left: each row's next token comes from its own
    last real one. What an empty row gets is finite, and nobody's.

    Returns:
      float32 logits (B, V) of the next token, its position (B,), and the cache.
    """
    place = batch.tokens.shape[1] - 1 - jnp.argmax(batch.segment_ids[:, ::-1] > 0, axis=1)
    positions = jnp.take_along_axis(batch.positions, place[:, None], axis=1)[:, 0] + 1
    reach = positions + jnp.maximum(limit, 1) - 1  # nothing is read behind an answer's last token
    cache = llm.empty_cache(model.config.llm, reach, capacity, model.dtype)
    hidden, _, cache = model.apply({"params": params}, batch, cache)
    last = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
    return model.apply({"params": params}, last, method="logits"), positions, cache


@jax.jit
def begin(logits, positions, cache: llm.Cache, batch: Batch, limit, settings: sampling.Settings) -> State:
    """The state behind a prefill of `batch`. limit: (B,) int32; a row with 0 is done before it begins."""
    rows = jnp.arange(len(logits))[:, None]
    words = (batch.segment_ids > 0) & (batch.visual_index < 0)
    seen = (
        jnp.zeros(logits.shape, bool).at[rows, jnp.where(words, batch.tokens, logits.shape[1])].set(True, mode="drop")
    )
    none = jnp.zeros_like(limit)
    return State(logits, positions, cache, jnp.int32(batch.tokens.shape[1]), limit <= 0, none, limit, seen, settings)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Likely:
    """How likely the model thought tokens to be, before any setting and any mask: natural logarithms, float32.

    Attributes:
      chosen: (B, steps) of the tokens that were taken. ids: (B, steps, K) int32, the likeliest ones, falling; values:
      (B, steps, K), theirs.
    """

    chosen: jax.Array
    ids: jax.Array
    values: jax.Array


@functools.partial(
    jax.jit, static_argnames=("model", "steps", "stop_ids", "draw", "keep_logits", "likely"), donate_argnames=("state",)
)
def decode(
    model: Fusion,
    params,
    state: State,
    steps: int,
    stop_ids: tuple[int, ...],
    draw: bool,
    keep_logits: bool = False,
    likely: int = 0,
    allowed=None,
):
    """Up to `steps` tokens a row; stops early once every row is done.

    Args:
      draw: whether rows follow their settings; without it all are greedy, and nothing else is computed.
      likely: K, how many of the likeliest tokens to report at each step; 0: no report. Not with `keep_logits`.
      allowed: (B, ceil(V / 32)) int32, a bit for each token, the lowest one first: whether a row may take it. At least
        one of each row; the same at every step. None: all.

    Returns:
      tokens (B, steps) int32, filled with the first stop id behind a row's end; float32 logits (B, steps, V) that they
      were chosen from, or `Likely`, or None; the state behind them. The old state's buffers are updated in place.
    """
    rows, vocabulary = state.logits.shape
    fill = stop_ids[0] if stop_ids else 0
    tokens = jnp.full((rows, steps), fill, jnp.int32)
    kept = jnp.zeros((rows, steps, vocabulary), jnp.float32) if keep_logits else None
    if likely:
        none = jnp.zeros((rows, steps, likely), jnp.float32)
        kept = Likely(none[..., 0], none.astype(jnp.int32), none)
    if allowed is not None:
        words = jnp.arange(vocabulary)
        allowed = (allowed[:, words // 32] >> (words % 32)) & 1 > 0
    capacity = state.cache.segments.shape[1]

    def unfinished(carry):
        step, _, _, now = carry
        return (step < steps) & ~jnp.all(now.done)

    def forward(now: State, token):
        logits, cache = model.apply({"params": params}, token, now.positions, now.cache, method="decode")
        following = jnp.where(cache.length >= capacity, now.ring, cache.length)
        return logits, dataclasses.replace(cache, length=following)

    def body(carry):
        step, tokens, kept, now = carry
        logits = now.logits if allowed is None else jnp.where(allowed, now.logits, -jnp.inf)
        chosen = jnp.argmax(logits, -1).astype(jnp.int32)
        seen = now.seen
        if draw:
            chosen = sampling.choose(logits, now.settings, seen, now.made)
            seen = seen.at[jnp.arange(rows), chosen].set(True)
        token = jnp.where(now.done, fill, chosen)
        tokens = tokens.at[:, step].set(token)
        if keep_logits:
            kept = kept.at[:, step].set(now.logits)
        if likely:
            shares = jax.nn.log_softmax(now.logits, axis=-1)
            values, ids = jax.lax.top_k(shares, likely)
            own = jnp.take_along_axis(shares, token[:, None], axis=-1)[:, 0]
            new = Likely(own, ids, values)
            kept = jax.tree.map(lambda old, one: old.at[:, step].set(one.astype(old.dtype)), kept, new)
        made = now.made + ~now.done
        done = now.done | (made >= now.limit)
        for stop in stop_ids:
            done = done | (token == stop)
        # Also where no row goes on: a condition here would copy the whole cache at every step.
        logits, cache = forward(now, token)
        # A row that is done stays where it is: its position must not grow for ever.
        positions = now.positions + ~done
        return (
            step + 1,
            tokens,
            kept,
            State(logits, positions, cache, now.ring, done, made, now.limit, seen, now.settings),
        )

    _, tokens, kept, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), tokens, kept, state))
    return tokens, kept, state


def first_state(model: Fusion, params, batch: Batch, samplings: Sequence[sampling.Sampling]) -> State:
    """Prefills the batch; the state has room for the longest answer that is wanted, `sampling.max_tokens` each.

    Rows behind those of `samplings` are done before they begin.
    """
    empty = len(batch.tokens) - len(samplings)
    limit = np.array([one.max_tokens for one in samplings] + [0] * empty, np.int32)
    logits, positions, cache = prefill(model, params, batch, batch.tokens.shape[1] + int(limit.max()), limit)
    settings = sampling.settings([*samplings, *[sampling.Sampling()] * empty])
    return begin(logits, positions, cache, batch, limit, settings)


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


def first_question(record: Record) -> Record:
    """The record cut after its first question: a prompt. Raises BadRecord where no answer follows it."""
    start = 1 if record.turns and record.turns[0].get("from") == "gpt" else 0
    if len(record.turns) < start + 2:
        raise BadRecord("no_answer", record.where, "there is no question with an answer")
    return dataclasses.replace(record, turns=record.turns[start : start + 1])


@dataclass(frozen=True)
class Buckets:
    """The shapes that prompts are padded to: each combination that occurs is one compiled prefill.

    Attributes:
      lengths: positions of a prompt, ascending. questions: question tokens that the encoder reads, ascending.
      rounds: of a conversation. images: of a conversation, ascending, 0 for text alone.
    """

    lengths: tuple[int, ...]
    questions: tuple[int, ...]
    rounds: tuple[int, ...] = (1,)
    images: tuple[int, ...] = (0, 1)

    def __post_init__(self):
        for name in ("lengths", "questions", "rounds", "images"):
            sizes = getattr(self, name)
            check(sizes and tuple(sorted(set(sizes))) == tuple(sizes), f"buckets.{name}={sizes} must ascend.")

    def spec(self, config: FusionConfig, takes: Measured, images: int, question: int) -> LayoutSpec:
        """The smallest shape for what prompts take; where nothing is large enough, the largest."""

        def up(size: int, sizes: tuple[int, ...]) -> int:
            return next((known for known in sizes if known >= size), sizes[-1])

        images = up(images, self.images)
        spec = layout_spec(
            config, up(takes.length, self.lengths), up(question, self.questions), up(takes.rounds, self.rounds), images
        )
        return dataclasses.replace(spec, crops=max(spec.crops, min(takes.crops, 1)))


@dataclass(frozen=True)
class Steps:
    """For batch work: lengths and question tokens rounded up to multiples of `step`, the rest as the prompts are."""

    step: int = 32

    def spec(self, config: FusionConfig, takes: Measured, images: int, question: int) -> LayoutSpec:
        length, question = (_round_up(size, self.step) for size in (takes.length, question))
        spec = layout_spec(config, length, question, max(takes.rounds, 1), max(images, 1))
        return dataclasses.replace(spec, crops=takes.crops)


def fit(examples: Sequence[Example], config: FusionConfig, latents: int, buckets: Buckets | Steps) -> LayoutSpec:
    """The smallest shape that holds all of the prompts.

    Raises:
      BadRecord: `too_long`, `question_too_long`, `too_many_rounds`, `too_many_images`: one fits no bucket.
    """
    rough = layout_spec(config, 1, 1, 1)
    most = Measured(*map(max, zip(*(measure(example, rough, latents) for example in examples))))
    images = max(example.images for example in examples)
    spec = buckets.spec(config, most, images, max(len(example.question_ids) for example in examples))
    for example in examples:
        check_fits(example, spec, latents)
    return spec


class Prompts:
    """Records to batches of prompts for one model.

    Args:
      latents: l^2, one of the model's `latent_counts`; None for its fixed one. See `drawn_latents`.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, buckets: Buckets | Steps, latents: int | None = None):
        self.config, self.tokenizer, self.buckets = config.model, tokenizer, buckets
        self.latents = self.config.fixed_latent_count if latents is None else latents
        allowed = self.config.drawn_latent_counts or (0,)
        check(
            self.latents in allowed,
            f"l^2 = {self.latents} is none of the model's latent counts; allowed: {', '.join(map(str, allowed))}.",
        )
        self.template = chat_template.find(config.template, tokenizer)
        self.stop_ids = stop_ids(tokenizer, self.template)
        self._maker = ExampleMaker(config.model, tokenizer, config.template)

    @property
    def text_bytes(self) -> int | None:
        """More bytes than a prompt's texts may have in any case: a token for each position, all of them the longest."""
        return self.buckets.lengths[-1] * self.tokenizer.longest if isinstance(self.buckets, Buckets) else None

    def example(self, record: Record) -> Example:
        """BadRecord where the record cannot be used or fits no bucket; images are read only after that is known, and
        text is tokenized only where it is not far too long. Somebody's own system text joins the first question where
        the template has no place for it."""
        if self.text_bytes is not None:
            texts = [record.system or "", *(turn["value"] for turn in record.turns)]
            said = sum(len(text.encode(errors="replace")) for text in texts)
            detail = f"the texts have {said} bytes, and no prompt has over {self.text_bytes}"
            if said > self.text_bytes:
                raise BadRecord("too_long", record.where, detail)
        if record.literal and record.system and self.template.system_frame is None:
            record = _system_in_question(record)
        example = self._maker.text(record, prompt=True)
        fit([example], self.config, self.latents, self.buckets)
        return self._maker.with_crops(example, record)

    def takes(self, record: Record) -> tuple[Measured, int]:
        """What a prompt takes, whether or not that fits a bucket, and its question tokens; of images at most the sizes
        are read. BadRecord where it cannot be used."""
        example = self._maker.text(record, prompt=True)
        return measure(example, layout_spec(self.config, 1, 1, 1), self.latents), len(example.question_ids)

    def batch(self, examples: Sequence[Example], rows: int = 0) -> Batch:
        """One example a row, in the smallest bucket that holds them; empty rows fill up to `rows`."""
        spec = fit(examples, self.config, self.latents, self.buckets)
        filled = [[example] for example in examples] + [[]] * (rows - len(examples))
        # Without a crop there are no latents: the same program whatever l^2 is.
        return lay_out_rows(filled, spec, self.latents if spec.crops else 0)


def _system_in_question(record: Record) -> Record:
    """The record with its system text in front of its first question."""
    turns = list(record.turns)
    k = next(k for k, turn in enumerate(turns) if turn["from"] == "human")
    turns[k] = turns[k] | {"value": record.system + BETWEEN + turns[k]["value"]}
    return dataclasses.replace(record, turns=turns, system=None)


def drawn_latents(config: FusionConfig, seed: int) -> int:
    """l^2 drawn from the model's set, as the published code does at inference; a function of the seed."""
    return draw_latent_count(config.drawn_latent_counts, seed, 0)


class Answerer:
    """Answers prompts in batches of fixed shape, so that at most one program per length bucket is compiled.

    Args:
      rows: prompts per batch; the last batch is filled up with empty rows.
      max_tokens: longest answer.
      latents: l^2, see `Prompts`.
      mesh: devices that `params` lie on (`state.abstract_parameters` says how); `rows` are rounded up to a multiple of
        the parts that it shards them into. Every process gives the same prompts and gets all answers. None: one device.
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
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.rows = rows if mesh is None else _round_up(rows, sharding.batch_shards(mesh))
        self.max_tokens = max_tokens
        # The model decides, not the config that it was trained by: an ablation may have replaced parts of it.
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
        """The answer to one prompt in pieces, as they become certain. Leaving the loop ends the work."""
        how = how or sampling.Sampling(max_tokens=self.max_tokens)
        for new in self._chunks([prompt], [how], CHUNK, [self._text(how)]):
            if new[0]:
                yield new[0]

    def _text(self, how: sampling.Sampling) -> TextStream:
        return TextStream(self.tokenizer, self.prompts.stop_ids, how.stop, how.max_tokens)

    def _devices(self):
        return contextlib.nullcontext() if self._mesh is None else sharding.use(self._mesh)

    def _chunks(self, prompts, samplings, steps: int, streams: list[TextStream]) -> Iterator[list[str]]:
        """Decodes until every stream has ended, `steps` tokens at a time; the new texts of each."""
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


def _round_up(value: int, step: int) -> int:
    return -(-max(value, 1) // step) * step
