"""What a stage's data is like and what its steps hold, measured on a sample; the figures behind `data.inspect`.

The sample is the beginning of the order in which the run itself reads the data (seeded, so a fair draw), and the steps
are planned from it as in training: step n here is step n of the run. Data sets too small to be met often enough get
some records more, which count in their own lines only.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np
import tqdm

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import packing
from fusion_jax.data.conversation import ANSWER_START
from fusion_jax.data.examples import Loader, stage_loader
from fusion_jax.data.layout import Example, LayoutSpec, lay_out_rows, needs
from fusion_jax.data.loader import record_order
from fusion_jax.data.plan import Measured, Queue, Sizes, pool
from fusion_jax.data.planner import (
    draw_latent_count,
    open_source,
    records_to_read,
    stage_seed,
    stage_sizes,
    stage_steps,
)
from fusion_jax.data.sources import RecordSource
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.devices import flops
from fusion_jax.errors import BadRecord

PER_PART = 50  # records looked at of each data set, if it has as many
SHOWN_BAD = 3  # bad records named for each reason
MOST_STEPS = 200  # planned at most

# One record: positions of text and of images, rounds (and those with latents), images, guided passes of the encoder,
# question tokens that guide them, supervised tokens, last rounds left out, FLOPs of its training at the mean over l^2.
_FIELDS = "part good text image rounds latent_rounds images crops question supervised dropped"
RECORD = np.dtype([("number", np.int64), *((name, np.int32) for name in _FIELDS.split()), ("flops", np.float64)])


@dataclass(frozen=True)
class Opened:
    """A stage ready to be looked at. devices: parts that the rows of a microbatch are dealt over."""

    config: RunConfig
    stage: StageConfig
    source: RecordSource
    tokenizer: Tokenizer
    devices: int
    loader: Loader
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


def open_stage(config: RunConfig, stage: StageConfig, tokenizer: Tokenizer, devices: int = 1) -> Opened:
    """Opens a stage's data and sizes its batches as training would. UserError where that cannot be done."""
    source = open_source(config, stage)
    loader = stage_loader(config, stage, source, tokenizer)
    sizes = stage_sizes(config, stage, loader, devices)
    return Opened(config, stage, source, tokenizer, devices, loader, sizes)


@dataclass
class Looked:
    """What was found.

    Attributes:
      records: RECORD array of the sample and, from `sample` on, of what small data sets got on top.
      bad: the bad records by their text, bad_images: of the `decoded` records whose images were read; each with the
        number of its data set.
      decoded: records of each data set whose images were read.
    """

    records: np.ndarray
    sample: int
    bad: list[tuple[int, BadRecord]] = field(default_factory=list)
    bad_images: list[tuple[int, BadRecord]] = field(default_factory=list)
    decoded: Counter = field(default_factory=Counter)


def look(opened: Opened, samples: int, images: int, progress: bool = True) -> Looked:
    """Measures `samples` records (0: all), and decodes the images of the first `images` usable ones that have any."""
    source, records = opened.source, len(opened.source)
    count = min(samples or records, records)
    numbers = [int(opened.order[i]) for i in range(count)]
    met, known = Counter(source.part(number) for number in numbers), set(numbers)
    for part, (start, size) in enumerate(_spans(source)):
        wanted = min(PER_PART, size) - met[part]
        if wanted > 0:
            more = np.random.default_rng((opened.seed, part)).permutation(min(size, 10 * PER_PART))
            numbers += [n for n in (start + more * (size // len(more))).tolist() if n not in known][:wanted]
    found = Looked(np.zeros(len(numbers), RECORD), count)
    with ThreadPoolExecutor(opened.config.loader_threads) as pool:
        bar = tqdm.tqdm(total=len(numbers), desc=f"{opened.stage.name}: texts", unit="record", disable=not progress)
        with bar:
            for i, (number, made) in enumerate(zip(numbers, _mapped(pool, opened.loader.text, numbers))):
                part = source.part(number)
                if isinstance(made, BadRecord):
                    found.bad.append((part, made))
                    found.records[i]["number"], found.records[i]["part"] = number, part
                else:
                    found.records[i] = (number, part, 1, *_measures(opened, made))
                bar.update()
        pictured = found.records[:count]
        chosen = pictured[(pictured["good"] > 0) & (pictured["images"] > 0)][:images]["number"].tolist()
        bar = tqdm.tqdm(total=len(chosen), desc=f"{opened.stage.name}: images", unit="record", disable=not progress)
        with bar:
            for number, bad in zip(chosen, _mapped(pool, lambda n: _bad_image(opened.loader, n), chosen)):
                found.decoded[source.part(number)] += 1
                if bad:
                    found.bad_images.append((source.part(number), bad))
                bar.update()
    return found


def _spans(source: RecordSource) -> list[tuple[int, int]]:
    """First record and size of each data set."""
    sizes = [size for _, size in source.parts]
    return list(zip(itertools.accumulate(sizes, initial=0), sizes))


def _mapped(pool: ThreadPoolExecutor, function, numbers: list[int], ahead: int = 256) -> Iterator:
    """`pool.map` that holds few results at a time."""
    for start in range(0, len(numbers), ahead):
        yield from pool.map(function, numbers[start : start + ahead])


def _bad_image(loader: Loader, number: int) -> BadRecord | None:
    made = loader.load(number)
    return made if isinstance(made, BadRecord) else None


def _measures(opened: Opened, example: Example) -> tuple:
    """The fields of RECORD behind `good`."""
    spec, model = opened.loader.spec, opened.config.model
    takes = needs(example, spec, 0)
    text = int((example.input_ids >= 0).sum())
    counts = opened.latent_counts or (0,)
    cost = float(
        np.mean([flops.step_flops(model, flops.shape_of_examples([example], spec, count)) for count in counts])
    )
    return (
        text,
        takes.length - text,
        int((example.labels == ANSWER_START).sum()),
        takes.rounds,
        takes.images,
        takes.crops,
        len(example.question_ids) if spec.question_length else 0,
        int((example.labels[1:] >= 0).sum()),
        example.dropped_rounds,
        cost,
    )


# Steps.


@dataclass(frozen=True)
class Step:
    """One planned step: its number from 0, l^2 (0 where its rows have none), crops of a group, records by row."""

    number: int
    latents: int
    crops: int
    rows: list[list[Measured]]


def planned_steps(opened: Opened, looked: Looked) -> Iterator[Step]:
    """The steps of the run, from the first to the last. Records that were not looked at are measured on the way.

    Ends early where nothing is usable.
    """
    stage, records = opened.stage, len(opened.source)
    known = {}
    for r in looked.records:
        takes = Measured(int(r["number"]), int(r["text"] + r["image"]), int(r["crops"]), int(r["latent_rounds"]))
        known[takes.number] = takes if r["good"] else None
    queue, at = Queue.of(opened.loader.spec, opened.sizes), 0
    while not stage.steps or queue.step < stage.steps:
        useless = 0
        while at < records_to_read(stage, records) and not queue.enough():
            number, at = int(opened.order[at]), at + 1
            if number not in known:
                measured = opened.loader.measure(number)
                known[number] = None if isinstance(measured, BadRecord) else measured[0]
            if known[number] is not None:
                queue.add(known[number])
                useless = 0
            else:
                useless += 1
                if useless > records:
                    return
        if not queue.waiting:
            return
        step, latents = queue.step, draw_latent_count(opened.latent_counts, opened.seed, queue.step)
        rows, crops = queue.take(latents)
        yield Step(step, latents if crops else 0, crops, rows)


def step_statistics(opened: Opened, looked: Looked) -> dict[str, Any] | None:
    """What the planned steps hold; as many of them as the sample is good for. None where nothing is usable."""
    usable = int(looked.records[: looked.sample]["good"].sum())
    steps = list(itertools.islice(planned_steps(opened, looked), min(MOST_STEPS, max(2, _affordable(opened, usable)))))
    if not usable or not steps:
        return None
    sizes, length = opened.sizes, opened.stage.max_length
    by_step = [[m.length + m.rounds * step.latents for row in step.rows for m in row] for step in steps]
    in_crops = [(step.crops * sizes.groups, sum(m.crops for row in step.rows for m in row)) for step in steps]
    slots, crops = (sum(column) for column in zip(*in_crops))
    return {
        "steps_planned": len(steps),
        "packing": sizes.packing,
        "rows": sizes.rows,
        "groups": sizes.groups,
        "crops_per_group": [min(sizes.crops.values()), max(sizes.crops.values())],
        "samples": sum(map(len, by_step)) / len(steps),
        "empty_rows": sum(not row for step in steps for row in step.rows) / len(steps),
        "text_only_steps": sum(step.crops == 0 for step in steps) / len(steps),
        "positions": sizes.rows * length,
        "filled_positions": sum(map(sum, by_step)) / (len(steps) * sizes.rows * length),
        "filled_crops": crops / slots if slots else None,
        "padded_to_longest": packing.padding_efficiency(list(itertools.chain(*by_step)), opened.stage.batch_size),
    }


def _affordable(opened: Opened, usable: int) -> int:
    """Steps that can be planned from so many usable records."""
    return int((usable - pool(opened.sizes)) / opened.sizes.samples)


# Rows to look at.


@dataclass(frozen=True)
class Rows:
    """Some rows of one step, as training gets them: those of the first groups, or the first of the first group.

    Attributes:
      step: number from 0. batch: these rows alone. examples: of each row, in order. missing: those of their records
        whose images are bad.
    """

    step: int
    batch: Batch
    spec: LayoutSpec
    examples: list[list[Example]]
    missing: list[BadRecord]


def sample_rows(opened: Opened, looked: Looked, rows: int, steps: int = 3) -> list[Rows]:
    """About `rows` rows out of the first steps."""
    found, per_group, share = [], opened.sizes.rows_per_group, -(-rows // steps)
    groups = min(max(1, share // per_group), opened.sizes.groups)
    for step in itertools.islice(planned_steps(opened, looked), steps if rows else 0):
        chosen = step.rows[: groups * min(share, per_group)]
        loaded = [[opened.loader.load(measured.number) for measured in row] for row in chosen]
        examples = [[made for made in row if isinstance(made, Example)] for row in loaded]
        spec = dataclasses.replace(opened.loader.spec, crops=step.crops)
        missing = [made for row in loaded for made in row if isinstance(made, BadRecord)]
        found.append(Rows(step.number, lay_out_rows(examples, spec, step.latents, groups), spec, examples, missing))
    return found


# Sums.


def summary(opened: Opened, looked: Looked) -> dict[str, Any]:
    """All figures of a stage, as JSON can hold them."""
    config, stage, source = opened.config, opened.stage, opened.source
    records = looked.records
    parts, weights = [], []
    for i, (name, size) in enumerate(source.parts):
        of_part = _figures(opened, records[records["part"] == i])
        of_part |= _bad_figures(looked, i)
        parts.append({"name": name, "records": size, "share": size / len(source), **of_part})
        weights.append(size * of_part["usable"] / max(of_part["looked_at"], 1))
    costs = [(part["flops_per_sample"] or 0.0) * weight for part, weight in zip(parts, weights)]
    for part, cost in zip(parts, costs):
        part["share_of_flops"] = cost / sum(costs) if sum(costs) else None
    in_all = {"name": "all", "records": len(source), "share": 1.0, **_figures(opened, records[: looked.sample])}
    in_all |= {**_bad_figures(looked, None), "share_of_flops": 1.0 if sum(costs) else None}
    per_sample = sum(costs) / sum(weights) if sum(weights) else None
    in_all["flops_per_sample"] = per_sample
    steps = stage_steps(stage, len(source), opened.sizes.samples)
    planned = step_statistics(opened, looked)
    if planned:
        planned |= {name: planned["samples"] * in_all[name]["mean"] for name in ("text", "supervised")}
        planned |= {"flops": planned["samples"] * per_sample, "stage_flops": steps * planned["samples"] * per_sample}
    return {
        "stage": stage.name,
        "data": stage.data,
        "max_length": stage.max_length,
        "batch_size": stage.batch_size,
        "steps": steps,
        "epochs": stage.steps * opened.sizes.samples / len(source) if stage.steps else stage.epochs,
        "latent_counts": list(opened.latent_counts),
        "looked_at": looked.sample,
        "images_decoded_of": sum(looked.decoded.values()),
        "bad_share": _bad_share(in_all),
        "max_bad_records": config.max_bad_records,
        "parts": parts,
        "all": in_all,
        "bad_records": _bad_list(looked),
        "step": planned,
    }


def lengths(opened: Opened, records: np.ndarray) -> dict[str, np.ndarray]:
    """Positions of text, of images and latents, and of both, at the largest l^2: of every usable record."""
    records = records[records["good"] > 0]
    visual = records["image"] + records["latent_rounds"] * max(opened.latent_counts, default=0)
    return {"text": records["text"], "visual": visual, "length": records["text"] + visual}


def _figures(opened: Opened, records: np.ndarray) -> dict[str, Any]:
    good = records[records["good"] > 0]
    images = int(good["images"].sum())
    return {
        "looked_at": len(records),
        "usable": len(good),
        **{name: _spread(values) for name, values in lengths(opened, records).items()},
        **{name: _spread(good[name]) for name in ("rounds", "question", "supervised", "images", "crops")},
        "text_only": float((good["images"] == 0).mean()) if len(good) else None,
        "tokens_per_image": float(good["image"].sum()) / images if images else None,
        "shortened": int((good["dropped"] > 0).sum()),
        "dropped_rounds": int(good["dropped"].sum()),
        "flops_per_sample": float(good["flops"].mean()) if len(good) else None,
    }


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    median, high = np.percentile(values, (50, 95), method="nearest").tolist()
    return {"mean": float(values.mean()), "median": median, "p95": high, "max": int(values.max())}


def _bad_figures(looked: Looked, part: int | None) -> dict[str, Any]:
    """Counts of the bad records of one data set; None: of the sample."""
    records = looked.records
    bad = records[records["part"] == part] if part is not None else records[: looked.sample]
    images = sum(part in (None, p) for p, _ in looked.bad_images)
    decoded = looked.decoded[part] if part is not None else sum(looked.decoded.values())
    return {"bad": int((bad["good"] == 0).sum()), "images_decoded_of": decoded, "bad_images": images}


def _bad_share(in_all: dict[str, Any]) -> float:
    """Of all records: those bad by their text, and of the others with images as many as among the ones decoded."""
    by_text = in_all["bad"] / in_all["looked_at"]
    if not in_all["images_decoded_of"]:
        return by_text
    return by_text + (1 - by_text) * (1 - in_all["text_only"]) * in_all["bad_images"] / in_all["images_decoded_of"]


def _bad_list(looked: Looked) -> list[dict[str, Any]]:
    """Reasons, most frequent first: how many, and the first of them."""
    found = []
    for seen_in, every in (("text", looked.bad), ("image", looked.bad_images)):
        for reason, count in Counter(bad.reason for _, bad in every).most_common():
            examples = [str(bad) for _, bad in every if bad.reason == reason][:SHOWN_BAD]
            found.append({"reason": reason, "seen_in": seen_in, "count": count, "examples": examples})
    return found
