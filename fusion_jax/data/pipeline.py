"""From records to batches: load, encode, shuffle, collect, lay out. Grain does the reading, shuffling and prefetching.

    RecordSource -> shuffle (seed) -> repeat -> load + encode (threads) -> collect B good ones -> lay out -> prefetch

A bad record is passed on as the BadRecord it raised, so that the collecting stage, whose state is saved with every
checkpoint, can skip and count it. l^2 is drawn per batch from the seed and the step number, so every process agrees.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import grain
import numpy as np

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import conversation, image, sources
from fusion_jax.data.layout import Batch, Example, LayoutSpec, check_fits, lay_out
from fusion_jax.data.sources import Record, RecordSource
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.models.config import QUADRANTS, FusionConfig


def layout_spec(model: FusionConfig, length: int, question_length: int, rounds: int) -> LayoutSpec:
    """The fixed sizes of batches for a model."""
    return LayoutSpec(
        length=length,
        question_length=question_length if model.text_guided else 0,
        rounds=rounds if model.semantic_exchange else 0,
        image_tokens=model.tokens_per_image,
        image_size=model.vision.image_size,
        quadrants=QUADRANTS if model.uses_quadrants else 0,
        zero_image_for_text=model.text_only == "zero_image",
        hide_question_id_zero=model.hide_question_id_zero,
    )


@dataclass(frozen=True)
class ExampleMaker:
    """Records to examples for one model, tokenizer and template; picklable."""

    model: FusionConfig
    tokenizer: Tokenizer
    template: str

    def __call__(self, record: Record, prompt: bool = False) -> Example:
        """Encodes a record and its image; with `prompt` the conversation waits for its last answer.

        Raises:
          BadRecord: the conversation or the image cannot be used.
        """
        model = self.model
        encode = conversation.encode_prompt if prompt else conversation.encode_conversation
        encoded = encode(
            record.turns,
            self.tokenizer,
            conversation.find_template(self.template),
            record.image_path is not None,
            latents=model.semantic_exchange,
            latents_without_image=model.text_only == "zero_image",
            where=record.where,
        )
        crops, question = None, np.zeros(0, np.int32)
        if record.image_path is not None:
            pixels = image.load_image(record.image_path, record.where)
            crops = image.static_hd_crops(pixels, model.vision.image_size, model.uses_quadrants)
            question = encoded.instructs if model.text_guided else question
        return Example(encoded.input_ids, encoded.labels, question, crops, record.where)


@dataclass(frozen=True)
class Fed:
    """What the trainer gets for one step: the batch, and the bad records met while collecting it."""

    batch: Batch
    bad: tuple[BadRecord, ...]


@dataclass
class Counts:
    """Records looked at so far, and how many were skipped, by reason."""

    seen: int = 0
    bad: dict[str, int] = field(default_factory=dict)

    def check(self, allowed: float, records: int) -> None:
        """UserError once more than the allowed share is bad, of the records seen and of the whole data set."""
        bad = sum(self.bad.values())
        if bad > allowed * max(self.seen, records):
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.bad.items()))
            raise UserError(
                f"{bad} of {self.seen} records are bad ({reasons}), more than max_bad_records={allowed:g} allows; "
                "bad_records.jsonl in the workdir lists them."
            )


@dataclass(frozen=True)
class _Load(grain.transforms.Map):
    source: RecordSource
    maker: ExampleMaker
    spec: LayoutSpec
    longest_latents: int

    def map(self, index):
        try:
            example = self.maker(self.source[index])
            check_fits(example, self.spec, self.longest_latents)
            return example
        except BadRecord as bad:
            return bad


class _Batches(grain.IterDataset):
    """Collects good examples, draws l^2, lays out."""

    def __init__(self, parent, rows: int, spec: LayoutSpec, latent_counts: tuple[int, ...], seed: int):
        super().__init__(parent)
        self.rows, self.spec, self.latent_counts, self.seed = rows, spec, latent_counts, seed

    def __iter__(self):
        return _BatchIterator(iter(self._parent), self)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, parent, dataset: _Batches):
        super().__init__(parent)
        self._dataset, self._step, self._counts = dataset, 0, Counts()

    def __next__(self) -> tuple[Fed, Counts]:
        examples, bad = [], []
        while len(examples) < self._dataset.rows:
            element = next(self._parent)
            self._counts.seen += 1
            if isinstance(element, BadRecord):
                bad.append(element)
                self._counts.bad[element.reason] = self._counts.bad.get(element.reason, 0) + 1
                if len(bad) > 1000 + 100 * self._dataset.rows:
                    break  # nothing usable: hand over what was met, and let the trainer say so
            else:
                examples.append(element)
        latents = draw_latent_count(self._dataset.latent_counts, self._dataset.seed, self._step)
        self._step += 1
        batch = lay_out(examples, self._dataset.spec, latents)
        return Fed(batch, tuple(bad)), dataclasses.replace(self._counts, bad=dict(self._counts.bad))

    def get_state(self):
        counts = dataclasses.asdict(self._counts)
        return {"parent": self._parent.get_state(), "step": self._step, "counts": counts}

    def set_state(self, state):
        self._parent.set_state(state["parent"])
        self._step, self._counts = state["step"], Counts(**state["counts"])


def draw_latent_count(counts: tuple[int, ...], seed: int, step: int) -> int:
    """l^2 of a step: uniform over the set, a function of seed and step alone. 0 without latents."""
    return int(np.random.default_rng((seed, step)).choice(counts)) if counts else 0


def stage_seed(config: RunConfig, stage: StageConfig) -> int:
    """Stages differ in their order of data even where they share it."""
    return (config.seed * 1_000_003 + zlib.crc32(stage.name.encode())) % 2**31


def stage_steps(stage: StageConfig, records: int) -> int:
    """Optimizer steps of a stage."""
    return stage.steps or max(1, records * stage.epochs // stage.batch_size)


def training_batches(
    config: RunConfig, stage: StageConfig, source: RecordSource, tokenizer: Tokenizer
) -> grain.DatasetIterator:
    """Endless iterator of (Fed, Counts); its state says exactly which batch comes next."""
    model, seed = config.model, stage_seed(config, stage)
    spec = layout_spec(model, stage.max_length, stage.max_question_length, stage.max_rounds)
    counts = model.latent_counts if model.semantic_exchange else ()
    load = _Load(source, ExampleMaker(model, tokenizer, config.template), spec, max(counts, default=0))
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().map(load)
    # Ahead of the step: enough records for two batches, then one finished batch.
    reading = grain.ReadOptions(num_threads=config.loader_threads, prefetch_buffer_size=2 * stage.batch_size)
    batches = _Batches(dataset.to_iter_dataset(reading), stage.batch_size, spec, counts, seed)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))


def fixed_batches(
    config: RunConfig, stage: StageConfig, source: RecordSource, tokenizer: Tokenizer, batches: int
) -> Iterator[Batch]:
    """The first records in file order at the model's fixed l^2, for validation. Bad records are left out."""
    model = config.model
    spec = layout_spec(model, stage.max_length, stage.max_question_length, stage.max_rounds)
    latents = model.fixed_latent_count
    load = _Load(source, ExampleMaker(model, tokenizer, config.template), spec, latents)
    good, made = [], 0
    for index in range(len(source)):
        element = load.map(index)
        if isinstance(element, BadRecord):
            continue
        good.append(element)
        if len(good) == stage.batch_size:
            yield lay_out(good, spec, latents)
            good, made = [], made + 1
            if made == batches:
                return
    if good and not made:
        yield lay_out(good, spec, latents)  # fewer records than one batch: better a small one than none


def open_source(config: RunConfig, stage: StageConfig) -> RecordSource:
    """The stage's records. UserError where the file is missing or holds nothing."""
    source = sources.load_source(stage.data, stage.image_folder or None, stage_seed(config, stage))
    if len(source) == 0:
        raise UserError(f"stage {stage.name!r}: {stage.data} has no records.")
    return source
