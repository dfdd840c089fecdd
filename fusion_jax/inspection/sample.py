"""Measures a sample of a stage's records by their texts, and decodes some of their images.

The sample is the beginning of the order in which the run itself reads the data (seeded, so a fair draw). Data sets too
small to occur often enough in it get some records more, which count in their own lines only.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grain
import numpy as np
import tqdm

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.conversation import ANSWER_START
from fusion_jax.data.examples import ExampleLoader
from fusion_jax.data.layout import Example, Measured, measure
from fusion_jax.data.loader import record_order
from fusion_jax.data.plan import Sizes
from fusion_jax.data.sources import RecordSource
from fusion_jax.data.stages import open_source, stage_loader, stage_seed, stage_sizes
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.devices import flops
from fusion_jax.errors import BadRecord

PER_PART = 50  # records measured of each data set, if it has as many
# The fields of one record: the first of its `Measured`; its data set, and whether it is good; text tokens,
# answers, images, question tokens that guide the encoder, supervised tokens, last rounds left out; FLOPs of its
# training, the mean over l^2.
SIZES = Measured._fields[:4]
_CONTENT = ("part", "good", "text", "answers", "images", "question", "supervised", "dropped")
RECORD = np.dtype([*((name, np.int64) for name in SIZES), *((name, np.int32) for name in _CONTENT), ("flops", float)])


@dataclass(frozen=True)
class StageData:
    """A stage with its data opened. devices: parts into which the rows of a microbatch are divided."""

    config: RunConfig
    stage: StageConfig
    source: RecordSource
    tokenizer: Tokenizer
    devices: int
    loader: ExampleLoader
    sizes: Sizes

    @property
    def latent_counts(self) -> tuple[int, ...]:
        return self.config.model.drawn_latent_counts

    @property
    def seed(self) -> int:
        return stage_seed(self.config, self.stage)

    @functools.cached_property
    def order(self) -> grain.MapDataset:
        """Record numbers as the run reads them, epoch after epoch."""
        return record_order(len(self.source), self.seed)


def open_stage(config: RunConfig, stage: StageConfig, tokenizer: Tokenizer, devices: int = 1) -> StageData:
    """Opens a stage's data and sizes its batches as training would. Raises UserError if that cannot be done."""
    source = open_source(config, stage)
    loader = stage_loader(config, stage, source, tokenizer)
    sizes = stage_sizes(config, stage, loader, devices)
    return StageData(config, stage, source, tokenizer, devices, loader, sizes)


@dataclass
class Sample:
    """Records of a stage, measured.

    Attributes:
      records: RECORD array of the sample and, from `count` on, of the extra records of small data sets.
      bad: the records whose text is bad. bad_images: those of the `decoded` records whose images are bad. Each has
        the number of its data set.
      decoded: records of each data set whose images were read.
    """

    records: np.ndarray
    count: int
    bad: list[tuple[int, BadRecord]] = field(default_factory=list)
    bad_images: list[tuple[int, BadRecord]] = field(default_factory=list)
    decoded: Counter = field(default_factory=Counter)


def draw_sample(data: StageData, limit: int, images: int, progress: bool = True) -> Sample:
    """Measures `limit` records (0: all), and decodes the images of the first `images` usable ones that have any."""
    source, records = data.source, len(data.source)
    count = min(limit or records, records)
    numbers = [int(data.order[i]) for i in range(count)]
    counts, known = Counter(source.part(number) for number in numbers), set(numbers)
    for part, (start, size) in enumerate(_spans(source)):
        wanted = min(PER_PART, size) - counts[part]
        if wanted > 0:
            more = np.random.default_rng((data.seed, part)).permutation(min(size, 10 * PER_PART))
            numbers += [n for n in (start + more * (size // len(more))).tolist() if n not in known][:wanted]
    sample = Sample(np.zeros(len(numbers), RECORD), count)
    with ThreadPoolExecutor(data.config.loader_threads) as pool:
        bar = tqdm.tqdm(total=len(numbers), desc=f"{data.stage.name}: texts", unit="record", disable=not progress)
        with bar:
            for i, (number, example) in enumerate(zip(numbers, _mapped(pool, data.loader.text, numbers))):
                part = source.part(number)
                if isinstance(example, BadRecord):
                    sample.bad.append((part, example))
                    sample.records[i]["number"], sample.records[i]["part"] = number, part
                else:
                    sample.records[i] = _row(data, number, part, example)
                bar.update()
        pictured = sample.records[:count]
        chosen = pictured[(pictured["good"] > 0) & (pictured["images"] > 0)][:images]["number"].tolist()
        bar = tqdm.tqdm(total=len(chosen), desc=f"{data.stage.name}: images", unit="record", disable=not progress)
        with bar:
            for number, bad in zip(chosen, _mapped(pool, lambda n: _bad_image(data.loader, n), chosen)):
                sample.decoded[source.part(number)] += 1
                if bad:
                    sample.bad_images.append((source.part(number), bad))
                bar.update()
    return sample


def _spans(source: RecordSource) -> list[tuple[int, int]]:
    """Returns first record and size of each data set."""
    sizes = [size for _, size in source.parts]
    return list(zip(itertools.accumulate(sizes, initial=0), sizes))


def _mapped(pool: ThreadPoolExecutor, function, numbers: list[int], ahead: int = 256) -> Iterator:
    """Does what `pool.map` does, but holds few results at a time."""
    for start in range(0, len(numbers), ahead):
        yield from pool.map(function, numbers[start : start + ahead])


def _bad_image(loader: ExampleLoader, number: int) -> BadRecord | None:
    example = loader.load(number)
    return example if isinstance(example, BadRecord) else None


def _row(data: StageData, number: int, part: int, example: Example) -> tuple:
    """Returns the fields of RECORD for a good record."""
    spec, model = data.loader.spec, data.config.model
    counts = data.latent_counts or (0,)
    cost = float(
        np.mean([flops.step_flops(model, flops.shape_of_examples([example], spec, count)) for count in counts])
    )
    return (
        *measure(example, spec, 0, number)[: len(SIZES)],
        part,
        1,
        int((example.input_ids >= 0).sum()),
        int((example.labels == ANSWER_START).sum()),
        example.images,
        len(example.question_ids) if spec.question_length else 0,
        int((example.labels[1:] >= 0).sum()),
        example.dropped_rounds,
        cost,
    )
