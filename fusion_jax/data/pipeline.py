"""From records to batches: measure, plan, load, encode, lay out. Grain does the reading, shuffling and prefetching.

    RecordSource -> shuffle (seed) -> repeat -> measure (threads) -> agree -> wait -> plan rows
                 -> load + encode (threads) -> lay out -> prefetch

A stage that is counted in epochs reads every record once an epoch and ends once none waits: one epoch flows into the
next, and the last step holds what is left. One that is counted in steps ends behind the last of them.

Records are measured by their texts, and by the sizes in their images' headers where those matter, ahead of the images.
Process 0 alone measures, and the others take what it measured: a file that one machine cannot read, or reads
otherwise, must not change their plan. Each step draws l^2 from the seed and the step number and plans its rows from the
records that wait (data/plan.py). That is the same in every process; each then reads the images of its own rows only.
The state that a checkpoint keeps is the reader's, the step and the waiting list, and holds for any number of processes
and threads. A run that goes on measures the waiting records anew: their file may have been repaired meanwhile.

A bad record is passed on as the BadRecord it raised, so that it can be skipped and counted. One that cannot be measured
is made up for by the next; one whose image turns out to be bad, which only its own process learns, or which takes other
room than was planned, leaves its place empty.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import logging
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grain
import numpy as np

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import chat_template, conversation, image, sources, tiles
from fusion_jax.data.conversation import LATENTS
from fusion_jax.data.layout import Batch, Example, LayoutSpec, check_fits, lay_out_rows, needs
from fusion_jax.data.plan import FixedBatch, Measured, Queue, Sizes, a_crop_each, size_batches
from fusion_jax.data.sources import Record, RecordSource
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.devices.board import Board
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.models.config import QUADRANTS, FusionConfig

log = logging.getLogger("fusion_jax")

_SAMPLE = 512  # records by which rows and crops of a batch are sized
_MOST_SENT = 512  # measured records that process 0 sends at once
_SENT_AHEAD = 8  # so many times before it waits for the others to have read them
_MEASURED = (4, 5)  # numbers of a waiting record in a checkpoint; the oldest lack when it came


def layout_spec(model: FusionConfig, length: int, question_length: int, rounds: int, images: int = 1) -> LayoutSpec:
    """The fixed sizes of batches for a model; rounds are those of a row, images those of a conversation. The crops are
    those of a row with one conversation. Questions may be empty, so there is room for one token."""
    return LayoutSpec(
        length=length,
        question_length=max(question_length, 1) if model.text_guided else 0,
        rounds=rounds if model.semantic_exchange else 0,
        image_tokens=model.tokens_per_image,
        image_size=model.vision.image_size,
        quadrants=QUADRANTS if model.uses_quadrants else 0,
        zero_image_for_text=model.text_only == "zero_image",
        hide_question_id_zero=model.hide_question_id_zero,
        crops=images * model.most_crops,
        images=images,
        grids=model.tile_grids,
        tile_tokens=model.tokens_per_tile,
        image_first=model.image_place == "first",
    )


@dataclass(frozen=True)
class ExampleMaker:
    """Records to examples for one model, tokenizer and template; picklable.

    decode: exact or fast, see `data.image`.
    """

    model: FusionConfig
    tokenizer: Tokenizer
    template: str
    decode: str = "exact"

    def __call__(self, record: Record, prompt: bool = False) -> Example:
        """Encodes a record and its images; with `prompt` the conversation waits for its last answer.

        Raises:
          BadRecord: the conversation or an image cannot be used.
        """
        return self.with_crops(self.text(record, prompt), record)

    def text(self, record: Record, prompt: bool = False) -> Example:
        """The same without its crops, of images at most their sizes being read. BadRecord as above."""
        model = self.model
        encode, more = conversation.encode_conversation, {}
        if prompt:
            encode, more = conversation.encode_prompt, {"literal": record.literal}
        encoded = encode(
            record.turns,
            self.tokenizer,
            chat_template.find(self.template, self.tokenizer),
            len(record.images),
            latents=model.semantic_exchange,
            latents_without_image=model.text_only == "zero_image",
            system=record.system,
            where=record.where,
            **more,
        )
        question = encoded.instructs if record.images and model.text_guided else encoded.instructs[:0]
        tilings = ()
        if model.tile_grids:
            sizes = record.sizes or [image.read_size(one, record.where) for one in record.images]
            tilings = tuple(tiles.choose_tiling(size, model.tile_grids, model.vision.image_size) for size in sizes)
        return Example(encoded.input_ids, encoded.labels, question, None, record.where, tilings)

    def fitting(self, record: Record, spec: LayoutSpec, latents: int) -> Example:
        """`text`, without the last rounds where the conversation is too long for a row: whole rounds go, never an image
        and never part of an answer.

        Raises:
          BadRecord: as above, or nothing fits: `too_long`, `question_too_long`, `too_many_rounds`, `too_many_images`.
        """
        example = self.text(record)
        try:
            check_fits(example, spec, latents)
            return example
        except BadRecord:
            dropped = self._rounds_too_many(example, record, spec, latents)
            if not dropped:
                raise
        example = dataclasses.replace(self._without_last(record, dropped), dropped_rounds=dropped)
        check_fits(example, spec, latents)
        return example

    def _rounds_too_many(self, example: Example, record: Record, spec: LayoutSpec, latents: int) -> int:
        """How many last rounds must go for the conversation to fit; where it never does, how many may go.

        Rounds are tokenized one behind the other, so what fewer of them take is known from the whole conversation. Only
        their questions are tokenized as one text, whose tokens are counted anew for a few numbers of rounds.

        Args:
          example: `text` of the whole record.
        """
        ids, answer = example.input_ids, np.append(example.labels >= 0, False)
        ends = np.flatnonzero(answer[:-1] & ~answer[1:]) + 1  # of each round
        # Never a round with an image. A round is a question and its answer; a model's greeting may stand before.
        turns = record.turns[len(record.turns) - 2 * len(ends) :]
        shown = [i // 2 + 1 for i, turn in enumerate(turns) if conversation.IMAGE_TAG in turn["value"]]
        least = max([1, *shown])
        rounds = np.cumsum(ids == LATENTS)[ends - 1]
        lengths = needs(example, spec, latents).length - (len(ids) - ends) - (rounds[-1] - rounds) * (latents - 1)
        kept = int(np.sum((lengths <= spec.length) & (rounds <= spec.rounds)))

        def asked(kept: int) -> int:
            return len(self._without_last(record, len(ends) - kept).question_ids)

        if kept > least and asked(kept) > spec.question_length:
            kept = least + bisect.bisect_right(range(least, kept), spec.question_length, key=asked) - 1
        return len(ends) - max(kept, least)

    def _without_last(self, record: Record, rounds: int) -> Example:
        """`text` without so many last rounds."""
        return self.text(dataclasses.replace(record, turns=record.turns[: len(record.turns) - 2 * rounds]))

    def with_crops(self, example: Example, record: Record) -> Example:
        """The example of `text` with the crops of the record's images. BadRecord as above."""
        if not record.images:
            return example
        size = self.model.vision.image_size
        if example.tilings:
            crops = [
                image.read_tiles(one, tiling, size, self.decode, record.where)[:, None]
                for one, tiling in zip(record.images, example.tilings)
            ]
            return dataclasses.replace(example, crops=np.concatenate(crops))
        quadrants = self.model.uses_quadrants
        crops = [image.read_crops(one, size, quadrants, self.decode, record.where) for one in record.images]
        return dataclasses.replace(example, crops=np.stack(crops))


@dataclass(frozen=True)
class Fed:
    """What the trainer gets for one step.

    Attributes:
      batch: the rows of this process. samples: conversations in the step, over all processes, as planned, less those
        whose images this process could not read.
      bad: the bad records met since the step before. broken: how many of them, the last, left a gap in a row: this
        process alone knows of those.
      plan: checksum of this step's plan and all before it since the start; the same in every process.
      done: how much of the stage came before, in steps: of those with as many samples as steps have on average, where
        epochs are counted. last: the stage ends with this step.
    """

    batch: Batch
    samples: int
    bad: tuple[BadRecord, ...]
    broken: int
    plan: int
    done: float = 0.0
    last: bool = False


@dataclass
class Counts:
    """Records looked at so far; how many were skipped, by reason; conversations that lost their last rounds, and those
    rounds. Gaps in rows are counted by the process that had to leave them."""

    seen: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    shortened: int = 0
    dropped_rounds: int = 0

    def add(self, bad: BadRecord) -> None:
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + 1

    def plus(self, bad: dict[str, int]) -> "Counts":
        """A copy with so many more bad records, or fewer, by reason."""
        both = {reason: self.bad.get(reason, 0) + bad.get(reason, 0) for reason in {**self.bad, **bad}}
        return dataclasses.replace(self, bad={reason: count for reason, count in both.items() if count})

    def scalars(self) -> dict[str, int]:
        """For the metrics."""
        named = {"records_seen": self.seen, "shortened": self.shortened, "dropped_rounds": self.dropped_rounds}
        return named | {f"bad/{reason}": count for reason, count in self.bad.items()}

    def too_many(self, allowed: float, records: int) -> bool:
        """Whether more than the allowed share is bad, of the records seen and of the whole data set."""
        return sum(self.bad.values()) > allowed * max(self.seen, records)

    def check(self, allowed: float, records: int) -> None:
        """UserError where there are too many bad records."""
        if self.too_many(allowed, records):
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.bad.items()))
            raise UserError(
                f"{sum(self.bad.values())} of {self.seen} records are bad ({reasons}), more than "
                f"max_bad_records={allowed:g} allows; bad_records.jsonl in the workdir lists them."
            )


@dataclass(frozen=True)
class Loader:
    """Records by number, measured or as examples that fit a row even at the largest l^2."""

    source: RecordSource
    maker: ExampleMaker
    spec: LayoutSpec
    longest_latents: int

    def load(self, number: int) -> Example | BadRecord:
        """The example with its crops."""
        try:
            record = self.source[number]
            return self.maker.with_crops(self.maker.fitting(record, self.spec, self.longest_latents), record)
        except BadRecord as bad:
            return bad

    def text(self, number: int) -> Example | BadRecord:
        """The example without its crops."""
        try:
            return self.maker.fitting(self.source.text(number), self.spec, self.longest_latents)
        except BadRecord as bad:
            return bad

    def load_planned(self, planned: Measured) -> Example | BadRecord:
        """The example with its crops, if it takes the room that was planned for it."""
        example = self.load(planned.number)
        if isinstance(example, BadRecord):
            return example
        takes = needs(example, self.spec, 0)
        if planned[:4] != (planned.number, takes.length, takes.crops, takes.rounds):
            detail = "its text or an image has changed since it was measured, or differs from process 0's"
            return BadRecord("changed", example.where, detail)
        return example

    def measure(self, number: int, headers: bool = False) -> tuple[Measured, int] | BadRecord:
        """What the record takes, and how many last rounds it loses.

        headers: a record of whose images the headers cannot be read is bad.
        """
        if number >= len(self.source):
            return BadRecord("changed", f"record {number}", f"the data have {len(self.source)} records by now")
        try:
            record = self.source.text(number)
            example = self.maker.fitting(record, self.spec, self.longest_latents)
            for one in record.images if headers else ():
                if one != b"":  # shards and their sizes were checked when they were written
                    image.read_size(one, record.where)
        except BadRecord as bad:
            return bad
        takes = needs(example, self.spec, 0)
        return Measured(int(number), takes.length, takes.crops, takes.rounds), example.dropped_rounds


@dataclass(frozen=True)
class _Measure(grain.transforms.Map):
    loader: Loader

    def map(self, number):
        return self.loader.measure(number)


class _Agreed(grain.IterDataset):
    """Measured records, as process 0 has measured them, in all processes."""

    def __init__(self, parent, board: Board, together: int):
        """Args: together: records that are sent at once."""
        super().__init__(parent)
        self._board, self._together = board, together

    def __iter__(self):
        return _AgreedIterator(iter(self._parent), self._board, self._together)


class _AgreedIterator(grain.DatasetIterator):
    """Process 0 reads its parent; the others read the board, and their parent stays where it is."""

    def __init__(self, parent, board: Board, together: int):
        super().__init__(parent)
        self._board, self._together = board, together
        self._position, self._measured, self._sent = 0, deque(), deque()

    def __next__(self):
        if not self._measured:
            name = f"measured/{self._position}"
            self._measured.extend(self._send(name) if self._board.first else self._receive(name))
        self._position += 1
        return self._measured.popleft()

    def _send(self, name: str) -> list:
        measured = [next(self._parent) for _ in range(self._together)]
        self._board.send(name, json.dumps([_to_json(element) for element in measured]))
        self._sent.append(name)
        if len(self._sent) > _SENT_AHEAD:
            self._board.take_down(self._sent.popleft())
        return measured

    def _receive(self, name: str) -> list:
        return [_from_json(element) for element in json.loads(self._board.receive(name))]

    def get_state(self):
        return {"next_index": self._position}

    def set_state(self, state):
        self._parent.set_state(state)
        self._position = state["next_index"]
        self._measured.clear()


def _to_json(element: tuple[Measured, int] | BadRecord) -> list:
    if isinstance(element, BadRecord):
        return [element.reason, element.where[:500], element.detail[:500]]
    measured, dropped = element
    return [*measured, dropped]


def _from_json(element: list) -> tuple[Measured, int] | BadRecord:
    if isinstance(element[0], str):
        return BadRecord(*element)
    return Measured(*element[:-1]), element[-1]


@dataclass(frozen=True)
class _Feeding:
    """What an iterator of batches needs to know.

    Attributes:
      allowed: share of bad records. groups: numbers of this process's groups. board: through which process 0 sends the
        others what it has measured; None where each measures by itself.
    """

    loader: Loader
    stage: StageConfig
    sizes: Sizes
    latent_counts: tuple[int, ...]
    seed: int
    threads: int
    allowed: float
    groups: tuple[int, ...]
    board: Board | None = None

    @property
    def records(self) -> int:
        """How many the stage reads, a record counting once an epoch."""
        return records_to_read(self.stage, len(self.loader.source))

    def queue(self) -> Queue:
        return Queue.of(self.loader.spec, self.sizes)


class _Batches(grain.IterDataset):
    """Measured records to batches."""

    def __init__(self, parent, feeding: _Feeding):
        super().__init__(parent)
        self.feeding = feeding

    def __iter__(self):
        return _BatchIterator(iter(self._parent), self.feeding)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, parent, feeding: _Feeding):
        super().__init__(parent)
        self._feeding, self._plan = feeding, 0
        self._counts = Counts()  # the same in every process
        self._broken: dict[str, int] = {}  # by reason, the gaps that this process has left since it started
        self._queue = feeding.queue()
        self._restored = False  # the waiting records are to be measured anew

    def __next__(self) -> tuple[Fed, Counts]:
        f, queue = self._feeding, self._queue
        if self._is_over():
            raise StopIteration
        bad = self._measure_again() + self._read(queue.enough)
        if not queue.waiting and not bad:
            raise StopIteration
        latents, done = draw_latent_count(f.latent_counts, f.seed, queue.step), self._done()
        rows, crops = queue.take(latents)
        latents = latents if crops else 0  # text alone: the same program whatever was drawn
        self._plan = zlib.crc32(json.dumps([latents, crops, rows]).encode(), self._plan)
        if not f.stage.steps:
            bad += self._read(lambda: bool(queue.waiting))  # whether this is the last step depends on the next record
        last = self._is_over()

        per_group = f.sizes.rows_per_group
        own = [row for g in f.groups for row in rows[g * per_group : (g + 1) * per_group]]
        with ThreadPoolExecutor(f.threads) as pool:
            loaded = [list(row) for row in [pool.map(f.loader.load_planned, row) for row in own]]
        broken = [element for row in loaded for element in row if isinstance(element, BadRecord)]
        for element in broken:
            self._broken[element.reason] = self._broken.get(element.reason, 0) + 1
        # A record whose image turns out to be bad leaves a gap in its row.
        good = [[element for element in row if not isinstance(element, BadRecord)] for row in loaded]
        batch = lay_out_rows(good, dataclasses.replace(f.loader.spec, crops=crops), latents, len(f.groups))
        samples = sum(map(len, rows)) - len(broken)
        fed = Fed(batch, samples, tuple(bad + broken), len(broken), self._plan, done, last)
        return fed, self._counts.plus(self._broken)

    def _is_over(self) -> bool:
        queue = self._queue
        return _is_over(self._feeding.stage, self._feeding.records, queue.step, self._counts.seen, len(queue.waiting))

    def _done(self) -> float:
        if self._feeding.stage.steps:
            return self._queue.step
        return (self._counts.seen - len(self._queue.waiting)) / self._feeding.sizes.samples

    def _read(self, enough: Callable[[], bool]) -> list[BadRecord]:
        """Reads until there is enough, all is read, or too many records have been bad. The bad ones. Nothing that
        differs between processes may decide when it ends."""
        f, bad, in_row = self._feeding, [], 0
        records = len(f.loader.source)
        while self._counts.seen < f.records and not enough():
            element = next(self._parent)
            self._counts.seen += 1
            if isinstance(element, BadRecord):
                bad.append(element)
                in_row += 1
                self._counts.add(element)
                if in_row >= 2 * records or self._counts.too_many(f.allowed, records):
                    break  # none in a whole pass, or too few: hand over what was met, and let the trainer say so
            else:
                in_row = 0
                measured, dropped = element
                self._queue.add(measured)
                self._counts.shortened += dropped > 0
                self._counts.dropped_rounds += dropped
        return bad

    def _measure_again(self) -> list[BadRecord]:
        """The waiting records of a restored state as they are now, the same in every process; those that cannot be used
        any more are taken out and returned."""
        if not self._restored:
            return []
        self._restored = False
        f, old, bad = self._feeding, self._queue.waiting, []
        self._queue.waiting = []
        for first in range(0, len(old), _MOST_SENT):
            part = old[first : first + _MOST_SENT]
            for before, element in zip(part, self._agreed(f"waiting/{self._queue.step}/{first}", part)):
                if isinstance(element, BadRecord):
                    bad.append(element)
                    self._counts.add(element)
                else:
                    self._queue.waiting.append(element[0]._replace(arrived=before.arrived))
        changed = len(set(old) - set(self._queue.waiting))
        if changed:
            what = f"{changed} of the {len(old)} records that were read and waited for their step have changed since"
            log.warning("%s: %s, %d of them beyond use; they are taken as they are now", f.stage.name, what, len(bad))
        return bad

    def _agreed(self, name: str, waiting: Sequence[Measured]) -> list[tuple[Measured, int] | BadRecord]:
        """What process 0 measures."""
        f = self._feeding
        if f.board is not None and not f.board.first:
            return [_from_json(element) for element in json.loads(f.board.receive(name))]
        with ThreadPoolExecutor(f.threads) as pool:
            measured = list(pool.map(f.loader.measure, [one.number for one in waiting]))
        if f.board is not None:
            f.board.send(name, json.dumps([_to_json(element) for element in measured]))
        return measured

    def get_state(self):
        waiting = [list(measured) for measured in self._queue.waiting]
        counts = dataclasses.asdict(self._counts.plus(self._broken))
        return {"parent": self._parent.get_state(), "step": self._queue.step, "counts": counts, "waiting": waiting}

    def set_state(self, state):
        """Goes on where `get_state` was called. ValueError where it is no state of such an iterator."""
        _check_state(state, self._feeding.loader.spec.length)
        self._parent.set_state(state["parent"])
        self._counts, self._broken = Counts(**state["counts"]), {}
        self._queue = self._feeding.queue()
        self._queue.step, self._queue.waiting = state["step"], [Measured(*measured) for measured in state["waiting"]]
        self._restored = True


def _check_state(state, length: int) -> None:
    """ValueError where that is no state of an iterator whose rows are so long."""

    def whole(*numbers) -> bool:
        return all(type(number) is int and 0 <= number < 2**63 for number in numbers)

    def named(part, names) -> bool:
        return isinstance(part, dict) and part.keys() == set(names)

    counts = [field.name for field in dataclasses.fields(Counts)]
    known = named(state, ("parent", "step", "counts", "waiting")) and named(state["parent"], ("next_index",))
    known = known and named(state["counts"], counts) and isinstance(state["counts"]["bad"], dict)
    if not known or not isinstance(state["waiting"], list):
        raise ValueError("the state of the input has other entries than this version's")
    numbers = [value for name, value in state["counts"].items() if name != "bad"] + [*state["counts"]["bad"].values()]
    if not whole(state["step"], state["parent"]["next_index"], *numbers):
        raise ValueError("the state of the input has a count that is no whole number")
    for measured in state["waiting"]:
        fits = isinstance(measured, list) and len(measured) in _MEASURED and whole(*measured)
        if not fits or not measured[1] <= length:
            raise ValueError(f"the state of the input lets {measured!r:.80} wait, which is no record's")


def sample_records(loader: Loader, seed: int, count: int = _SAMPLE) -> list[Measured]:
    """Some of the usable records, measured."""
    records = len(loader.source)
    numbers = np.random.default_rng(seed).choice(records, min(records, count), replace=False)
    measured = [loader.measure(number) for number in numbers.tolist()]
    return [element[0] for element in measured if not isinstance(element, BadRecord)]


def stage_loader(config: RunConfig, stage: StageConfig, source: RecordSource, tokenizer: Tokenizer) -> Loader:
    """The stage's loader: of records that fit at the largest l^2, so that none depends on the draw."""
    model = config.model
    maker = ExampleMaker(model, tokenizer, config.template, config.decode)
    return Loader(source, maker, _stage_spec(model, stage), max(_latent_counts(model), default=0))


def stage_sizes(config: RunConfig, stage: StageConfig, loader: Loader, shards: int = 1) -> Sizes:
    """The sizes of the stage's batches; `shards`: parts that the rows of a microbatch are sharded into."""
    model = config.model
    if not stage.packing and stage.max_images == 1 and model.most_crops == 1:
        return a_crop_each(stage.batch_size, _latent_counts(model))
    return size_batches(
        sample_records(loader, stage_seed(config, stage)),
        loader.spec,
        stage.batch_size,
        shards * stage.accumulation,
        _latent_counts(model),
        stage.max_images * model.most_crops,
        stage.packing,
    )


def draw_latent_count(counts: tuple[int, ...], seed: int, step: int) -> int:
    """l^2 of a step: uniform over the set, a function of seed and step alone. 0 without latents."""
    return int(np.random.default_rng((seed, step)).choice(counts)) if counts else 0


def record_order(records: int, seed: int) -> grain.MapDataset:
    """Record numbers as a run reads them, epoch after epoch, each shuffled in its own way."""
    return grain.MapDataset.range(records).seed(seed).shuffle().repeat()


def stage_seed(config: RunConfig, stage: StageConfig) -> int:
    """Stages differ in their order of data even where they share it."""
    return (config.seed * 1_000_003 + zlib.crc32(stage.name.encode())) % 2**31


def stage_steps(stage: StageConfig, records: int, samples: float) -> int:
    """Optimizer steps of a stage over so many records: `steps`, or as many as hold every record once an epoch, the last
    of which may hold fewer than the others. An estimate where steps hold so many `samples` on average (`Sizes`)."""
    return stage.steps or math.ceil(records * stage.epochs / samples)


def records_to_read(stage: StageConfig, records: int) -> int | float:
    """Records that a stage reads, a record counting once an epoch; without end where steps are counted."""
    return math.inf if stage.steps else records * stage.epochs


def stage_is_over(stage: StageConfig, records: int, state: dict) -> bool:
    """Whether a state of `training_batches`, over so many records, is that behind the stage's last step."""
    in_all = records_to_read(stage, records)
    return _is_over(stage, in_all, state["step"], state["counts"]["seen"], len(state["waiting"]))


def _is_over(stage: StageConfig, in_all: int | float, step: int, seen: int, waiting: int) -> bool:
    # Behind the last epoch nothing waits, but where an earlier version has read beyond it.
    return step >= stage.steps if stage.steps else seen - waiting >= in_all


def training_batches(
    config: RunConfig,
    stage: StageConfig,
    source: RecordSource,
    tokenizer: Tokenizer,
    shards: int = 1,
    held: Sequence[int] | None = None,
    board: Board | None = None,
    sizes: Sizes | None = None,
) -> grain.DatasetIterator:
    """Iterator of the stage's (Fed, Counts); its state says exactly which batch comes next.

    Args:
      shards: parts that the rows of a microbatch are sharded into: those of the mesh.
      held: numbers of the shards whose rows the batches hold, ascending; by default all.
      board: a new one, through which process 0 sends the others what it has measured; without one each measures by
        itself.
      sizes: the same in every process; by default `stage_sizes`, measured here.
    """
    seed = stage_seed(config, stage)
    loader = stage_loader(config, stage, source, tokenizer)
    sizes = sizes or stage_sizes(config, stage, loader, shards)
    fewest, most = (sizes.groups * pick(sizes.crops.values()) for pick in (min, max))
    if sizes.packing or fewest != sizes.rows:
        crops = f"{fewest} to {most}" if fewest < most else str(most)
        what = f"{sizes.rows} rows of {stage.max_length} and {crops} crops"
        log.info("%s: %s hold %.0f samples on average", stage.name, what, sizes.samples)
    if sizes.samples > 1.1 * stage.batch_size:
        log.warning(
            "%s: steps hold %.0f samples, not batch_size=%d, because each of %d devices and microbatches has as many "
            "rows, so that an epoch has fewer steps; let fewer share the rows (mesh, accumulation) for smaller batches",
            *(stage.name, sizes.samples, stage.batch_size, sizes.groups),
        )
    feeding = _Feeding(
        loader,
        stage,
        sizes,
        _latent_counts(config.model),
        seed,
        config.loader_threads,
        config.max_bad_records,
        _groups_of(range(shards) if held is None else held, sizes.groups // shards),
        board,
    )
    order = record_order(len(source), seed)
    # Ahead of the step: enough measured records for two batches, then two finished batches.
    samples = math.ceil(sizes.samples)
    reading = grain.ReadOptions(num_threads=config.loader_threads, prefetch_buffer_size=2 * samples)
    measured = order.map(_Measure(loader)).to_iter_dataset(reading)
    if board is not None:
        measured = _Agreed(measured, board, min(samples, _MOST_SENT))
    return iter(grain.experimental.ThreadPrefetchIterDataset(_Batches(measured, feeding), prefetch_buffer_size=2))


def _groups_of(held: Sequence[int], per_shard: int) -> tuple[int, ...]:
    """Numbers of the groups, or rows, that lie on some shards."""
    return tuple(shard * per_shard + i for shard in held for i in range(per_shard))


def _latent_counts(model: FusionConfig) -> tuple[int, ...]:
    return model.latent_counts if model.semantic_exchange else ()


def _stage_spec(model: FusionConfig, stage: StageConfig) -> LayoutSpec:
    return layout_spec(model, stage.max_length, stage.max_question_length, stage.max_rounds, stage.max_images)


# Validation: the first records in file order, at the model's fixed l^2.


def fixed_loader(config: RunConfig, stage: StageConfig, source: RecordSource, tokenizer: Tokenizer) -> Loader:
    """The loader of validation, with the stage's sizes."""
    maker = ExampleMaker(config.model, tokenizer, config.template, config.decode)
    return Loader(source, maker, _stage_spec(config.model, stage), config.model.fixed_latent_count)


def first_records(
    loader: Loader, batch_size: int, batches: int, threads: int = 1
) -> tuple[list[Measured], list[BadRecord]]:
    """The first records in file order that can be used, and the bad ones on the way.

    So many batches of them, or all (`batches` 0, or where there are no more). Of an image the header alone is read.
    """
    good: list[Measured] = []
    bad: list[BadRecord] = []
    records = len(loader.source)
    wanted = min(records, batches * batch_size or records)
    next_ = 0
    with ThreadPoolExecutor(threads) as pool:
        while len(good) < wanted and next_ < records:
            numbers = range(next_, min(records, next_ + wanted - len(good)))
            next_ = numbers.stop
            for element in pool.map(functools.partial(loader.measure, headers=True), numbers):
                if isinstance(element, BadRecord):
                    bad.append(element)
                else:
                    good.append(element[0])
    return good, bad


def fixed_batches(
    loader: Loader, planned: Sequence[FixedBatch], threads: int, shards: int = 1, held: Sequence[int] = (0,)
) -> Iterator[tuple[Batch, dict[int, BadRecord]]]:
    """The rows of some shards of validation's batches, and the records among them, by number, whose images cannot be
    read or that are not as they were measured: they leave their places empty.

    Args:
      planned: `plan.plan_all` of `first_records`. shards, held: see `training_batches`.
    """

    for batch in planned:
        own = [batch.rows[i] for i in _groups_of(held, len(batch.rows) // shards)]
        with ThreadPoolExecutor(threads) as pool:
            loaded = [list(row) for row in [pool.map(loader.load_planned, row) for row in own]]
        spec = dataclasses.replace(loader.spec, length=batch.length, crops=batch.crops)
        rows = [[example for example in row if not isinstance(example, BadRecord)] for row in loaded]
        bad = {
            measured.number: example
            for measured, example in zip(itertools.chain(*own), itertools.chain(*loaded))
            if isinstance(example, BadRecord)
        }
        # As in training: without a crop there are no latents.
        yield lay_out_rows(rows, spec, loader.longest_latents if batch.crops else 0, len(held)), bad


def open_source(config: RunConfig, stage: StageConfig) -> RecordSource:
    """The stage's records. UserError where the file is missing or holds nothing."""
    source = sources.load_source(stage.data, stage.image_folder or None, stage_seed(config, stage))
    if len(source) == 0:
        raise UserError(f"stage {stage.name!r}: {stage.data} has no records.")
    return source
