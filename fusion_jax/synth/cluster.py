"""Runs the stages on a cluster with Ray Data.

    first pass    blocks -> [cpu: filter] -> [llm: judge describe refilter] -> [images: draw] -> [scorer: score] ->
    saved second pass   blocks -> [llm: qa] -> [vision: verify] -> saved
    third pass    blocks -> [llm: statement] -> [scorer: rank] -> saved

Each bracket is a pool of workers, whose number is in ray.actors, with ray.gpus and ray.cpus each; blocks pass through
the pools in parallel. No pass has two pools of one model, so that no model is loaded twice. The workers run
`run_stages` as a local run does, so the output is the same. They write images and paid replies into the run's folder,
which must therefore be on a disk that all machines share; a block whose worker is lost is passed to another worker,
which reads the replies that were paid for from the journal. This process saves the blocks after each pass.
"""

import dataclasses
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tqdm

from fusion_jax.errors import UserError
from fusion_jax.synth import blocks
from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.engine import Work, needed, stages_of, threads_for
from fusion_jax.synth.models import Models
from fusion_jax.synth.stages import STAGES, run_stages

log = logging.getLogger("fusion_jax")

# The pool of workers for each stage.
POOLS = {
    "filter": "cpu",
    "judge": "llm",
    "describe": "llm",
    "refilter": "llm",
    "draw": "images",
    "score": "scorer",
    "qa": "llm",
    "verify": "vision",
    "statement": "llm",
    "rank": "scorer",
}


def passes(stages: list[str]) -> list[list[tuple[str, list[str]]]]:
    """Joins neighbouring stages of one pool, and begins a new pass where a pool would repeat: [[(pool, stages)]]."""
    result: list[list[tuple[str, list[str]]]] = [[]]
    for stage in stages:
        pool = POOLS[stage]
        if not result[-1] or result[-1][-1][0] != pool:
            if pool in dict(result[-1]):
                result.append([])
            result[-1].append((pool, []))
        result[-1][-1][1].append(stage)
    return result


class Worker:
    """One worker of a pool, which runs some stages on a block's samples."""

    def __init__(self, config: SynthConfig, out: str, stages: list[str], share: float):
        self._models, self._stages = Models(config, Path(out), share), stages
        self._threads = threads_for(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self._models.journal.refresh()  # another worker may have begun this block and died
        work = json.loads(row["work"])

        def through(line: dict[str, Any]) -> dict[str, Any]:
            todo = [stage for stage in self._stages if stage in line["todo"]]
            return line | {"sample": run_stages(self._models, line["sample"], todo)}

        with ThreadPoolExecutor(self._threads) as pool:
            lines = list(pool.map(through, work))
        return row | {"work": json.dumps(lines)}


def run(config: SynthConfig, out: Path, work: list[Work], progress: bool = True) -> None:
    """Does what `engine.run` does on the cluster at ray.address, or on a local one that ends with this process."""
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise UserError("engine='ray' needs the package ray: pip install -e '.[ray]'.") from e
    models = Models(config, out)
    models.check(tuple(name for name in needed(work) if _is_endpoint(config, name)))  # the others load on the workers
    if not ray.is_initialized():
        ray.init(address=config.ray.address or None, log_to_driver=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    order = passes([stage for stage in STAGES if any(one.again or stage in one.todo for one in work)])
    with tqdm.tqdm(total=len(work) * len(order), unit="block", desc="synthesis", disable=not progress) as bar:
        try:
            for pools in order:
                stages = [stage for _, inside in pools for stage in inside]
                now = [dataclasses.replace(one, todo=[s for s in one.todo if s in stages]) for one in work]
                _one_pass(ray, config, out, now, pools, bar)
        except ray.exceptions.RayError as e:
            cause = getattr(e, "cause", None)
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from e
            raise UserError(f"The cluster could not finish: {str(e).strip().splitlines()[-1]}") from e


def _one_pass(ray, config: SynthConfig, out: Path, work: list[Work], pools: list, bar: tqdm.tqdm) -> None:
    todo = {one.number: one for one in work}
    dataset = ray.data.from_items([{"number": one.number} for one in work], override_num_blocks=len(work))
    dataset = dataset.map(_Reader(out, todo), num_cpus=config.ray.cpus.get("cpu", 0.1))
    for pool, stages in pools:
        count = config.ray.actors.get(pool, 1)
        dataset = dataset.map(
            Worker,
            fn_constructor_args=(config, str(out), stages, 1 / count),
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=config.ray.cpus.get(pool, 0.1),
            num_gpus=config.ray.gpus.get(pool, 0) or None,
        )
    for row in dataset.iter_rows():
        one, done = todo[row["number"]], json.loads(row["done"])
        samples = [line["sample"] for line in json.loads(row["work"])]
        blocks.write_block(out, one.number, [s for s in STAGES if s in done or s in one.todo], samples)
        bar.update(1)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the samples of a block by its number, each with the stages that it still has to pass."""

    out: Path
    work: dict[int, Work]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        done, samples = blocks.read_block(self.out, number)
        lines = [{"todo": stages_of(sample, self.work[number], done), "sample": sample} for sample in samples]
        return {"number": number, "done": json.dumps(done), "work": json.dumps(lines)}


def _is_endpoint(config: SynthConfig, name: str) -> bool:
    part = {"llm": config.llm, "vision": config.vision, "generator": config.images}.get(name)
    return part is not None and part.backend == "endpoint"
