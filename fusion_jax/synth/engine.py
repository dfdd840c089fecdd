"""Runs the stages over all blocks, in this process or in several, and lists what is left to do.

Samples of several blocks are processed at the same time, so that no block's last, slow request leaves an endpoint idle;
a block is saved when its last sample is done.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import tqdm

from fusion_jax.command_line.cli import out_of_ctrl_c
from fusion_jax.errors import UserError
from fusion_jax.synth import blocks
from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.models import Models
from fusion_jax.synth.stages import NEEDS, STAGES, Sample, run_stages

log = logging.getLogger("fusion_jax")

_GRACE = 3.0  # seconds for open requests when a run ends early, because their replies are paid for


@dataclasses.dataclass(frozen=True)
class Work:
    """The work on one block.

    Attributes:
      number: the number of the block. size: how many samples it has. todo: stages that they still have to pass.
      again: whether samples that a failing endpoint dropped repeat that stage, and the later ones that are done.
    """

    number: int
    size: int
    todo: list[str]
    again: bool


def remaining(out: Path, count: int, stages: list[str], retry_failed: bool) -> list[Work]:
    """The blocks, of `count`, that have not passed all `stages`. Raises UserError where an earlier stage is missing."""
    left = []
    for number in range(count):
        done = blocks.read_done(out, number)
        todo = blocks.missing(done, stages, number)
        again = retry_failed and any(_failed(sample) for sample in blocks.read_block(out, number)[1])
        if todo or again:
            left.append(Work(number, blocks.size(out, number), todo, again))
    return left


def _failed(sample: Sample) -> bool:
    return sample.get("dropped", {}).get("again", False)


def needed(work: list[Work]) -> tuple[str, ...]:
    """The models that this work needs."""
    stages = set().union(*(STAGES if one.again else one.todo for one in work)) if work else set()
    return tuple(dict.fromkeys(name for stage in STAGES if stage in stages for name in NEEDS[stage]))


def stages_of(sample: Sample, work: Work, done: list[str]) -> list[str]:
    """The stages that one sample passes; a sample that a failing endpoint dropped starts again at the failed stage."""
    if not (work.again and _failed(sample)):
        return work.todo
    failed = sample.pop("dropped")["stage"]
    order = list(STAGES)
    return [stage for stage in order[order.index(failed) :] if stage in done or stage in work.todo]


def run(config: SynthConfig, out: Path, work: list[Work], progress: bool = True) -> None:
    """Does the work block by block; finished blocks stay finished. Raises UserError for errors that end a run."""
    if not work:
        return
    if config.processes > 1 and len(work) > 1:
        context = multiprocessing.get_context("spawn")  # the caller may have threads, which do not survive a fork
        with out_of_ctrl_c():
            pool = context.Pool(min(config.processes, len(work)), _start_process, (config, out))
        with pool:
            done = pool.imap_unordered(_work_in_process, work)
            _follow(done, work, progress)
        return
    models = Models(config, out)
    models.check(needed(work))
    try:
        with contextlib.closing(work_through(models, work)) as done:
            _follow(done, work, progress)
    finally:
        models.journal.close()


def _follow(done: Iterator[int], work: list[Work], progress: bool) -> None:
    """Shows a progress bar of the captions that are done, dropped ones included."""
    sizes = {one.number: one.size for one in work}
    # A terminal gets a live bar, a log file a line every ten seconds.
    slow = {} if sys.stderr.isatty() else {"mininterval": 10.0}
    total = sum(sizes.values())
    with tqdm.tqdm(total=total, unit="caption", desc="synthesis", disable=not progress, **slow) as bar:
        for number in done:
            bar.update(sizes[number])


_models: Models | None = None  # those of a worker process


def _start_process(config: SynthConfig, out: Path) -> None:
    global _models
    _models = Models(config, out, share=1 / config.processes)


def _work_in_process(work: Work) -> int:
    assert _models is not None
    return next(work_through(_models, [work]))


def threads_for(config: SynthConfig) -> int:
    """Twice as many threads as places at the busiest endpoint, because some wait, back off or decode."""
    parts = (config.llm, config.vision, config.images)
    remote = [part.concurrency for part in parts if part.backend in ("endpoint", "vllm")]
    return 2 * max(remote) if remote else 1


def work_through(models: Models, work: list[Work]) -> Iterator[int]:
    """Yields the number of each block once it is saved."""
    threads = threads_for(models.config)
    ahead = 1 + -(-2 * threads // models.config.block)  # blocks in progress
    if threads == 1:
        for one in work:
            done, samples = blocks.read_block(models.out, one.number)
            finished = [run_stages(models, sample, stages_of(sample, one, done)) for sample in samples]
            yield _save(models, one, done, finished)
        return
    under_way: collections.deque[tuple[Work, list[str], list[Future]]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for one in work:
                models.journal.refresh()
                done, samples = blocks.read_block(models.out, one.number)
                futures = [pool.submit(run_stages, models, s, stages_of(s, one, done)) for s in samples]
                under_way.append((one, done, futures))
                if len(under_way) > ahead:
                    yield _finish(models, *under_way[0])
                    under_way.popleft()
            while under_way:
                yield _finish(models, *under_way[0])
                under_way.popleft()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            models.stop()
            try:
                running = [one for _, _, futures in under_way for one in futures if one.running()]
                concurrent.futures.wait(running, _GRACE)
            finally:
                models.cut()
            raise


def _finish(models: Models, work: Work, done: list[str], futures: list[Future]) -> int:
    return _save(models, work, done, [future.result() for future in futures])


def _save(models: Models, work: Work, done: list[str], samples: list[Sample]) -> int:
    with _as_user_error(models.out):
        blocks.write_block(models.out, work.number, [s for s in STAGES if s in done or s in work.todo], samples)
    return work.number


@contextlib.contextmanager
def _as_user_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"Cannot write to {out}: {e.strerror}; the same command goes on from here.") from e
