"""From records to batches: load, encode, shuffle, collect, lay out. Grain does the reading, shuffling and prefetching.

    RecordSource -> shuffle (seed) -> repeat -> load + encode (threads) -> collect B good ones -> lay out -> prefetch

Packed, the texts of records are measured ahead of their images, and as many wait as fill a few batches:

    ... -> measure (threads) -> wait -> best fit -> the fullest rows -> load + encode (threads) -> lay out -> prefetch

A bad record is passed on as the BadRecord it raised, so that the collecting stage, whose state is saved with every
checkpoint, can skip and count it. l^2 is drawn per batch from the seed and the step number, so every process agrees.
"""

import dataclasses
import logging
import math
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grain
import numpy as np

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import conversation, image, packing, sources
from fusion_jax.data.layout import Batch, Example, LayoutSpec, check_fits, lay_out, lay_out_rows, needs
from fusion_jax.data.sources import Record, RecordSource
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.models.config import QUADRANTS, FusionConfig

log = logging.getLogger("fusion_jax")

WAITING = 4  # batches of samples to choose from when rows are packed


def layout_spec(model: FusionConfig, length: int, question_length: int, rounds: int, images: int = 1) -> LayoutSpec:
    """The fixed sizes of batches for a model; rounds and images are those of a row."""
    return LayoutSpec(
        length=length,
        question_length=question_length if model.text_guided else 0,
        rounds=rounds if model.semantic_exchange else 0,
        image_tokens=model.tokens_per_image,
        image_size=model.vision.image_size,
        quadrants=QUADRANTS if model.uses_quadrants else 0,
        zero_image_for_text=model.text_only == "zero_image",
        hide_question_id_zero=model.hide_question_id_zero,
        images=images,
    )


@dataclass(frozen=True)
class ExampleMaker:
    """Records to examples for one model, tokenizer and template; picklable."""

    model: FusionConfig
    tokenizer: Tokenizer
    template: str

    def __call__(self, record: Record, prompt: bool = False) -> Example:
        """Encodes a record and its images; with `prompt` the conversation waits for its last answer.

        Raises:
          BadRecord: the conversation or an image cannot be used.
        """
        return self.with_crops(self.text(record, prompt), record)

    def text(self, record: Record, prompt: bool = False) -> Example:
        """The same without its crops, no image being read: enough to measure it. BadRecord as above."""
        model = self.model
        encode = conversation.encode_prompt if prompt else conversation.encode_conversation
        encoded = encode(
            record.turns,
            self.tokenizer,
            conversation.find_template(self.template),
            len(record.images),
            latents=model.semantic_exchange,
            latents_without_image=model.text_only == "zero_image",
            where=record.where,
        )
        question = encoded.instructs if record.images and model.text_guided else encoded.instructs[:0]
        return Example(encoded.input_ids, encoded.labels, question, None, record.where)

    def with_crops(self, example: Example, record: Record) -> Example:
        """The example of `text` with the crops of the record's images. BadRecord as above."""
        if not record.images:
            return example
        size, quadrants = self.model.vision.image_size, self.model.uses_quadrants
        crops = [image.read_crops(one, size, quadrants, where=record.where) for one in record.images]
        return dataclasses.replace(example, crops=np.stack(crops))


@dataclass(frozen=True)
class Fed:
    """What the trainer gets for one step: the batch, and the bad records met while collecting it."""

    batch: Batch
    bad: tuple[BadRecord, ...]

    @property
    def samples(self) -> int:
        """Examples in the batch."""
        return int(self.batch.segment_ids.max(axis=1, initial=0).sum())


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
            record = self.source[index]
            example = self.maker.text(record)
            check_fits(example, self.spec, self.longest_latents)
            return self.maker.with_crops(example, record)
        except BadRecord as bad:
            return bad

    def measure(self, index) -> list[int] | BadRecord:
        """[index, positions without latents, image slots, rounds], from the record's text alone."""
        try:
            example = self.maker.text(self.source.text(index))
            check_fits(example, self.spec, self.longest_latents)
            takes = needs(example, self.spec, 0)
            return [int(index), takes.length, takes.images, takes.rounds]
        except BadRecord as bad:
            return bad


@dataclass(frozen=True)
class _Measure(grain.transforms.Map):
    load: _Load

    def map(self, index):
        return self.load.measure(index)


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


def _pack(measured: list[list[int]], spec: LayoutSpec, latents: int, count: int | None = None) -> list[list[int]]:
    """Rows of indices into `measured`, all of them or the `count` that go now."""
    lengths = [length + rounds * latents for _, length, _, rounds in measured]
    others = [([m[2] for m in measured], spec.images), ([m[3] for m in measured], spec.rounds)]
    rows = packing.best_fit(lengths, spec.length, others)
    return rows if count is None else packing.choose(rows, lengths, spec.length, count)


class _PackedBatches(grain.IterDataset):
    """Keeps `waiting` measured records, draws l^2, packs them, loads those of the `rows` fullest rows, lays out."""

    def __init__(self, parent, rows: int, waiting: int, load: _Load, latent_counts, seed: int, threads: int):
        super().__init__(parent)
        self.rows, self.waiting, self.load = rows, waiting, load
        self.latent_counts, self.seed, self.threads = latent_counts, seed, threads

    def __iter__(self):
        return _PackedIterator(iter(self._parent), self)


class _PackedIterator(grain.DatasetIterator):
    def __init__(self, parent, dataset: _PackedBatches):
        super().__init__(parent)
        self._dataset, self._step, self._counts = dataset, 0, Counts()
        self._waiting: list[list[int]] = []  # as `_Load.measure` gives them, oldest first

    def __next__(self) -> tuple[Fed, Counts]:
        d, bad = self._dataset, []
        while len(self._waiting) < d.waiting and len(bad) <= 1000 + 100 * d.rows:
            element = next(self._parent)
            self._counts.seen += 1
            if isinstance(element, BadRecord):
                bad.append(element)
            else:
                self._waiting.append(element)
        latents = draw_latent_count(d.latent_counts, d.seed, self._step)
        self._step += 1
        rows = _pack(self._waiting, d.load.spec, latents, d.rows)
        numbers = [[self._waiting[i][0] for i in row] for row in rows]
        taken = {i for row in rows for i in row}
        self._waiting = [element for i, element in enumerate(self._waiting) if i not in taken]
        with ThreadPoolExecutor(d.threads) as pool:
            # A record whose image turns out to be bad leaves a gap in its row.
            loaded = [list(row) for row in [pool.map(d.load.map, row) for row in numbers]]
        bad += [element for row in loaded for element in row if isinstance(element, BadRecord)]
        for element in bad:
            self._counts.bad[element.reason] = self._counts.bad.get(element.reason, 0) + 1
        good = [[element for element in row if not isinstance(element, BadRecord)] for row in loaded]
        batch = lay_out_rows(good + [[]] * (d.rows - len(good)), d.load.spec, latents)
        return Fed(batch, tuple(bad)), dataclasses.replace(self._counts, bad=dict(self._counts.bad))

    def get_state(self):
        counts = dataclasses.asdict(self._counts)
        waiting = [list(element) for element in self._waiting]
        return {"parent": self._parent.get_state(), "step": self._step, "counts": counts, "waiting": waiting}

    def set_state(self, state):
        self._parent.set_state(state["parent"])
        self._step, self._counts = state["step"], Counts(**state["counts"])
        self._waiting = [list(element) for element in state["waiting"]]


def packed_rows(load: _Load, latent_counts: tuple[int, ...], batch_size: int, multiple: int, seed: int) -> int:
    """Rows that `batch_size` samples fill on average, rounded up to a multiple; judged by 512 records' texts."""
    records = len(load.source)
    numbers = np.random.default_rng(seed).choice(records, min(records, 512), replace=False)
    measured = [m for m in map(load.measure, numbers.tolist()) if not isinstance(m, BadRecord)]
    if not measured:
        return multiple  # the first batch will say what is wrong with the records
    rows = np.mean([len(_pack(measured, load.spec, latents)) for latents in latent_counts or (0,)])
    return multiple * max(1, math.ceil(rows / len(measured) * batch_size / multiple))


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
    config: RunConfig, stage: StageConfig, source: RecordSource, tokenizer: Tokenizer, devices: int = 1
) -> grain.DatasetIterator:
    """Endless iterator of (Fed, Counts); its state says exactly which batch comes next.

    With `stage.packing` a batch has as many rows as hold `stage.batch_size` samples on average, dealt evenly over
    microbatches and `devices`.
    """
    model, seed = config.model, stage_seed(config, stage)
    spec = _stage_spec(model, stage)
    counts = model.latent_counts if model.semantic_exchange else ()
    load = _Load(source, ExampleMaker(model, tokenizer, config.template), spec, max(counts, default=0))
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    # Ahead of the step: enough records for two batches, then one finished batch.
    reading = grain.ReadOptions(num_threads=config.loader_threads, prefetch_buffer_size=2 * stage.batch_size)
    if stage.packing:
        rows = packed_rows(load, counts, stage.batch_size, stage.accumulation * devices, seed)
        log.info("%s: %d rows of %d hold %d samples on average", stage.name, rows, spec.length, stage.batch_size)
        measured = order.map(_Measure(load)).to_iter_dataset(reading)
        waiting = WAITING * stage.batch_size
        batches = _PackedBatches(measured, rows, waiting, load, counts, seed, config.loader_threads)
    else:
        batches = _Batches(order.map(load).to_iter_dataset(reading), stage.batch_size, spec, counts, seed)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))


def _stage_spec(model: FusionConfig, stage: StageConfig) -> LayoutSpec:
    return layout_spec(model, stage.max_length, stage.max_question_length, stage.max_rounds, stage.max_images)


def fixed_batches(
    config: RunConfig, stage: StageConfig, source: RecordSource, tokenizer: Tokenizer, batches: int
) -> Iterator[Batch]:
    """The first records in file order at the model's fixed l^2, for validation. Bad records are left out."""
    model = config.model
    spec = _stage_spec(model, stage)
    latents = model.fixed_latent_count
    load = _Load(source, ExampleMaker(model, tokenizer, config.template), spec, latents)
    good, made = [], 0
    for index in range(len(source)):
        element = load.map(index)
        if isinstance(element, BadRecord):
            continue
        good.append(element)
        if len(good) == stage.batch_size:
            yield lay_out(good, _narrow(good, spec), latents)
            good, made = [], made + 1
            if made == batches:
                return
    if good and not made:
        yield lay_out(good, _narrow(good, spec), latents)  # fewer records than one batch: better a small one than none


def _narrow(examples: list[Example], spec: LayoutSpec) -> LayoutSpec:
    """The spec with no more image slots than the examples, one a row, can fill: each costs a pass of the encoder."""
    return dataclasses.replace(spec, images=max(1, *(needs(example, spec, 0).images for example in examples)))


def open_source(config: RunConfig, stage: StageConfig) -> RecordSource:
    """The stage's records. UserError where the file is missing or holds nothing."""
    source = sources.load_source(stage.data, stage.image_folder or None, stage_seed(config, stage))
    if len(source) == 0:
        raise UserError(f"stage {stage.name!r}: {stage.data} has no records.")
    return source
