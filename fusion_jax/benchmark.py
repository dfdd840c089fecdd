"""Benchmarks: `python -m fusion_jax.benchmark step|prefill|decode --config configs/benchmark_cpu.py`.

Random weights and random tokens; what is measured is the compiled program that training and generation run. The last
line is one JSON object. Times are wall-clock medians after compilation.

`python -m fusion_jax.benchmark step --config configs/flare.py:l_3b,stage1` times a run's step at its real shapes on the
devices that are there; `--trace` adds which operations its time goes to (op_times.py). `prefill` and `decode` take a
run's configuration too, with `--rows` prompts at once.

`python -m fusion_jax.benchmark checkpoint --config configs/benchmark_cpu.py:checkpoint` measures what saving costs.

`python -m fusion_jax.benchmark input [--workers N] [--decode exact|fast]` measures what comes before: image files to
crops, packing, memory; see data/input_benchmark.py.
"""

import dataclasses
import functools
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from fusion_jax.batch import Batch
from fusion_jax.command_line.cli import check_config, define_config, run_main
from fusion_jax.config import DTYPES, MeshConfig, RunConfig, StageConfig, from_dict
from fusion_jax.data import image, input_benchmark
from fusion_jax.data.conversation import ANSWER_START, IGNORE, IMAGE, LATENTS
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, lay_out
from fusion_jax.devices import flops, op_times, sharding
from fusion_jax.errors import UserError, check_choice
from fusion_jax.inference import generate
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models import fusion
from fusion_jax.models.config import QUADRANTS, FusionConfig
from fusion_jax.models.limits import within
from fusion_jax.planning import typical
from fusion_jax.training import checkpoint, optim, state
from fusion_jax.training.memory import explain_memory_errors, memory_in_use
from fusion_jax.training.step import compile_step

_CONFIG = define_config("benchmark configuration", "configs/benchmark_cpu.py", new_keys=False)
_WORKERS = flags.DEFINE_integer("workers", 1, "input: threads that make crops")
_DECODE = flags.DEFINE_enum("decode", "exact", image.DECODES, "input: how images become crops")
_LATENTS = flags.DEFINE_integer("latents", None, "step of a run's configuration: l^2; by default the largest")
_TRACE = flags.DEFINE_boolean("trace", False, "step: list the dearest operations")
_ROWS = flags.DEFINE_integer("rows", 1, "prefill and decode of a run's configuration: prompts at once", lower_bound=1)
RUN_REPEATS = 5
RUN_QUESTION, RUN_DECODE = 64, 64  # tokens, for prefill and decode of a run's configuration
TRACED = 2  # steps
KINDS = ("step", "prefill", "decode", "checkpoint", "input")


def random_batch(model: FusionConfig, rows: int, question: int, answer: int, seed: int = 0) -> Batch:
    """One-round image conversations of exactly this size; `answer` 0 gives prompts."""
    rng = np.random.default_rng(seed)
    size, latents = model.vision.image_size, max(model.drawn_latent_counts, default=0)
    quadrants = QUADRANTS if model.uses_quadrants else 0

    def words(count):
        return rng.integers(3, model.llm.vocab_size, count)

    examples = []
    for _ in range(rows):
        asked = words(question)
        visual = [IMAGE] if not latents else [LATENTS, *words(2), IMAGE]
        ids = np.array([*words(6), *visual, *words(1), *asked, *words(4), *words(answer)], np.int32)
        labels = None
        if answer:
            labels = np.full(len(ids), IGNORE, np.int32)
            labels[-answer:], labels[-answer - 1] = ids[-answer:], ANSWER_START
        crops = rng.integers(0, 256, (quadrants + 1, size, size, 3), np.uint8)
        examples.append(Example(ids, labels, np.asarray(asked, np.int32), crops))
    text = len(examples[0].input_ids) - (2 if latents else 1)
    spec = layout_spec(model, text + model.tokens_per_image + latents, question, 1)
    return lay_out(examples, spec, latents)


def _times(run, repeats: int) -> list[float]:
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
        print(f"run {i + 1}/{repeats}: {times[-1]:.4f} s", file=sys.stderr)
    return times


def _small_step(config):
    """Of a benchmark configuration: a batch of equal conversations, one a row."""
    stage = StageConfig(name="benchmark", data="", batch_size=config.batch_size, accumulation=config.accumulation)
    model = _model(config)
    mesh = sharding.make_mesh(from_dict(MeshConfig, config.get("mesh", {}), "config.mesh"))
    sharding.check_rows(config.batch_size // config.accumulation, mesh, "benchmark")
    return (
        model,
        stage,
        mesh,
        random_batch(model.config, config.batch_size, config.question_tokens, config.answer_tokens),
    )


def _compile_step(model: fusion.Fusion, stage: StageConfig, mesh: Mesh, batch: Batch):
    """The step, its state, batch and learning rates, and the seconds of compiling."""
    sharding.check_model(model.config, mesh)
    params = state.initial_parameters(model.config, 0, mesh)
    tx, labels = optim.optimizer(stage, params), optim.labels(stage, params)
    current = state.begin(params, tx, mesh)
    batch = sharding.put_batch(sharding.local_rows(batch, mesh), mesh)
    start = time.perf_counter()
    rates = optim.learning_rates(stage, 500, 1000)
    step = compile_step(model, stage, tx, labels, mesh).lower(current, batch, rates).compile()
    return step, current, batch, rates, time.perf_counter() - start


def benchmark_step(config) -> dict:
    """One whole optimizer step (AdamW, clipping), loss to update.

    Of a run's configuration it is its first stage's, with typical samples at `--latents` (`planning.typical`); where
    that does not fit into the devices, with more microbatches, until each device has one row at a time.
    """
    if "stages" not in config:
        work = _small_step(config)
        return _time_step(*work, samples=config.batch_size, repeats=config.repeats, trace=_TRACE.value)
    run = from_dict(RunConfig, config.to_dict())
    stage, model = run.stages[0], _model(config)
    mesh = sharding.make_mesh(run.mesh)
    shards = sharding.batch_shards(mesh)
    while True:
        batch, samples = typical.random_batch(run, stage, shards, _LATENTS.value)
        shape = {"rows": len(batch.tokens), "latents": batch.latent_count, "accumulation": stage.accumulation}
        try:
            with explain_memory_errors(run.remat):
                return shape | _time_step(model, stage, mesh, batch, samples, RUN_REPEATS, _TRACE.value)
        except UserError:
            if len(batch.tokens) <= shards * stage.accumulation:
                raise
        stage = dataclasses.replace(stage, accumulation=2 * stage.accumulation)
        print(f"does not fit; with accumulation {stage.accumulation}:", file=sys.stderr)


def _time_step(
    model: fusion.Fusion, stage: StageConfig, mesh: Mesh, batch: Batch, samples: int, repeats: int, trace: bool
) -> dict:
    cost = flops.step_flops(model.config, flops.shape_of(batch))
    step, current, batch, rates, compile_seconds = _compile_step(model, stage, mesh, batch)

    def run():
        nonlocal current
        current, metrics = step(current, batch, rates)
        return metrics

    jax.block_until_ready(run())
    seconds = statistics.median(_times(run, repeats))
    result = {
        "seconds_per_step": seconds,
        "samples_per_second": samples / seconds,
        "compile_seconds": compile_seconds,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **{key: value for key, value in memory_in_use().items() if key == "hbm_peak_gib"},
        "model_tflop_per_step": cost / 1e12,
        "model_gflop_per_second": cost / seconds / 1e9,
        "mfu": cost / seconds / flops.peak(model.dtype),
    }
    if trace:
        print(json.dumps(result), flush=True)  # should the profiler end the process
        result["operations"] = _trace(run, step.as_text())
    return result


def _trace(run, program: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                results = run()
            jax.block_until_ready(results)
        return op_times.summary(op_times.read(folder), TRACED, program)


def benchmark_checkpoint(config) -> dict:
    """What a save costs training: the time that the loop waits, and what it adds to the steps beside the writing.

    `stall_share` is that cost over the time of 500 steps; `write_seconds` is how long the background wrote.
    """
    step, current, batch, rates, _ = _compile_step(*_small_step(config))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(current))

    def timed_step():
        nonlocal current
        start = time.perf_counter()
        current, _ = jax.block_until_ready(step(current, batch, rates))
        return time.perf_counter() - start

    timed_step()
    undisturbed, costs, waits, writes = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = checkpoint.Checkpoints(Path(folder), {"json": "{}"}, keep=1)
        for number in range(1, config.repeats + 1):
            undisturbed += [timed_step() for _ in range(config.steps_between)]
            usual = statistics.median(undisturbed)
            start = time.perf_counter()
            checkpoints.save(number, current, {})
            waits.append(time.perf_counter() - start)
            beside = []
            while checkpoints.writing:
                beside.append(timed_step())
            writes.append(time.perf_counter() - start)
            costs.append(waits[-1] + sum(beside) - usual * len(beside))
            print(f"save {number}: waited {waits[-1]:.2f} s, cost {costs[-1]:.2f} s", file=sys.stderr)
        checkpoints.close()
    seconds, cost = statistics.median(undisturbed), statistics.median(costs)
    return {
        "state_gib": size / 2**30,
        "seconds_per_step": seconds,
        "wait_seconds": statistics.median(waits),
        "write_seconds": statistics.median(writes),
        "cost_seconds": cost,
        "stall_share": cost / (500 * seconds),
    }


def benchmark_prefill(config) -> dict:
    """Every crop encoded, the exchange layers, logits of the first token."""
    rows, question, answer, repeats = _prompts(config, 1)
    model = _model(config)
    params = fusion.init(model.config, jax.random.key(0))
    return time_prefill(model, params, rows, question, answer, repeats)


def time_prefill(model: fusion.Fusion, params, rows: int, question: int, answer: int, repeats: int) -> dict:
    """`rows` prompts with `question` tokens and an image each; the cache has room for `answer` tokens more."""
    batch = jax.tree.map(jnp.asarray, random_batch(model.config, rows, question, 0))
    limit = np.full(rows, answer, np.int32)
    run = functools.partial(generate.prefill, model, params, batch, batch.tokens.shape[1] + answer, limit)
    start = time.perf_counter()
    jax.block_until_ready(run())
    compile_seconds = time.perf_counter() - start
    return {
        "rows": rows,
        "length": batch.tokens.shape[1],
        "seconds": statistics.median(_times(run, repeats)),
        "compile_seconds": compile_seconds,
    }


def benchmark_decode(config) -> dict:
    """Cached greedy decode: the time of `decode_tokens` minus that of one."""
    rows, question, answer, repeats = _prompts(config, config.get("decode_rows", 1))
    model = _model(config)
    params = fusion.init(model.config, jax.random.key(0))
    return time_decode(model, params, rows, question, answer, repeats)


def time_decode(model: fusion.Fusion, params, rows: int, question: int, answer: int, repeats: int) -> dict:
    """`answer` tokens behind each of `rows` prompts, as those of `time_prefill`."""
    batch = jax.tree.map(jnp.asarray, random_batch(model.config, rows, question, 0))
    prefilled = generate.first_state(model, params, batch, [Sampling(max_tokens=answer + 1)] * rows)
    medians = []
    for steps in (answer, 1):

        def run(steps=steps):
            ready = jax.block_until_ready(jax.tree.map(jnp.copy, prefilled))
            start = time.perf_counter()
            jax.block_until_ready(generate.decode(model, params, ready, steps, (), False))
            return time.perf_counter() - start

        run()
        medians.append(statistics.median(run() for _ in range(repeats)))
    seconds = medians[0] - medians[1]
    return {"rows": rows, "tokens_per_second": rows * (answer - 1) / seconds, "seconds": seconds}


def _prompts(config, rows: int) -> tuple[int, int, int, int]:
    """Rows, question tokens, tokens to generate, repeats; `rows` is a benchmark configuration's."""
    if "stages" in config:
        return _ROWS.value, RUN_QUESTION, RUN_DECODE, RUN_REPEATS
    return rows, config.question_tokens, config.decode_tokens, config.repeats


def _model(config) -> fusion.Fusion:
    check_choice("config.dtype=", config.dtype, DTYPES)
    return fusion.Fusion(from_dict(FusionConfig, config.model, "config.model"), jnp.dtype(config.dtype), config.remat)


_COUNTS = ("batch_size", "accumulation", "question_tokens", "answer_tokens", "decode_tokens", "decode_rows", "repeats")
_COUNTS += ("steps_between",)


def check_counts(config) -> None:
    """UserError for a setting of a benchmark configuration that is no count."""
    for name in _COUNTS:
        within(f"config.{name}", config.get(name, 1), 1, 1 << 20)


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in KINDS:
        raise UserError(f"Say what to measure: python -m fusion_jax.benchmark {'|'.join(KINDS)} --config FILE.")
    if argv[1] == "input":
        print(json.dumps({"benchmark": "input", **input_benchmark.measure(_WORKERS.value, _DECODE.value)}))
        return
    config = _CONFIG.value
    check_config(config)
    if argv[1] == "checkpoint" and "stages" in config:
        raise UserError(f"{argv[1]} is measured with a benchmark configuration such as configs/benchmark_cpu.py.")
    check_counts(config)
    measure = {
        "step": benchmark_step,
        "prefill": benchmark_prefill,
        "decode": benchmark_decode,
        "checkpoint": benchmark_checkpoint,
    }[argv[1]]
    result = {"benchmark": argv[1], "device": jax.devices()[0].device_kind, **measure(config)}
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
