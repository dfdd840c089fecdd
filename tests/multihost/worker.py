"""One process of a small run that goes wrong somewhere: `worker.py WHAT FOLDER ADDRESS PROCESSES PROCESS`.

No model is compiled, so that such runs take seconds. What a part of training would do is called as training calls it.
"""

import json
import os
import time
from pathlib import Path

import jax
import numpy as np
from helpers.fixtures import tiny
from jax.experimental import multihost_utils

from fusion_jax import errors
from fusion_jax.command_line import cli
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import sources
from fusion_jax.data.examples import ExampleLoader
from fusion_jax.data.loader import training_batches
from fusion_jax.data.planner import Planner
from fusion_jax.data.stages import stage_seed
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.devices import board, distributed
from fusion_jax.training import checkpoint, input_check, reports, state
from fusion_jax.training.stopping import end_together

STEPS = 6


def configured(folder: Path, packing: bool) -> tuple[RunConfig, StageConfig]:
    model = tiny(tile_grids=((1, 2), (2, 1), (2, 2)), tile_tokens=4, **{"llm.vocab_size": 640})
    sizes = {"max_length": 200, "max_question_length": 40, "max_rounds": 8, "batch_size": 8, "steps": 100}
    stage = StageConfig("packed" if packing else "one_a_row", str(folder / "data.json"), packing=packing, **sizes)
    return RunConfig(model, (stage,), "", loader_threads=2, max_bad_records=0.2), stage


def feed(folder: Path, process: int, packing: bool):
    """The input of a stage: this process's images lie in a folder of its own."""
    config, stage = configured(folder, packing)
    source = sources.load_source(folder / "data.json", folder / str(process), stage_seed(config, stage))
    input_check.check_same_data(f"stage {stage.name!r}", source.describe())
    tokenizer = load_tokenizer(folder / "tokenizer")
    texts = board.open_board(f"fusion_jax/input/{stage.name}")
    sizes = input_check.agreed_sizes(config, stage, source, tokenizer, 2)
    batches = training_batches(config, stage, source, tokenizer, 2, (process,), texts, sizes)
    (folder / f"out{process}").mkdir(exist_ok=True)
    check = input_check.InputCheck(config, stage, len(source), folder / f"out{process}", (process,))
    return batches, check, texts


def plans(folder: Path, process: int) -> None:
    """Six steps of both kinds; what was planned, what was fed, and where the input stands, into a file."""
    wrote = {}
    for packing in (True, False):
        batches, check, texts = feed(folder, process, packing)
        steps, planned, fed_numbers = [], [], []
        real, load = Planner.next_step, ExampleLoader.load

        def next_step(self, read, real=real, planned=planned):
            step = real(self, read)
            planned.append([[measured.number for measured in row] for row in step.rows])
            return step

        def loaded(self, number, load=load, fed_numbers=fed_numbers):
            example = load(self, number)
            fed_numbers.append((number, isinstance(example, errors.BadRecord)))
            return example

        Planner.next_step, ExampleLoader.load = next_step, loaded
        for step in range(1, STEPS + 1):
            fed, counts = next(batches)
            check.note(step, fed, counts)
            steps.append([fed.plan, fed.batch.crops.shape, fed.batch.latent_count])
        state_then = check.position(STEPS, batches.get_state())
        texts.close()
        batches.close()
        Planner.next_step, ExampleLoader.load = real, load
        wrote["packed" if packing else "one_a_row"] = {
            "steps": steps, "planned": planned[:STEPS], "fed": fed_numbers, "state": state_then,
        }  # fmt: skip
    (folder / f"plans{process}.json").write_text(json.dumps(wrote))


def other_plans(folder: Path, process: int) -> None:
    """Each process measures by itself."""
    board.open_board = lambda prefix: None
    batches, check, _ = feed(folder, process, True)
    for step in range(1, STEPS + 1):
        fed, counts = next(batches)
        check.note(step, fed, counts)
    check.agree(STEPS)


def bad_records(folder: Path, process: int) -> None:
    """Process 1 cannot read half of the images."""
    batches, check, _ = feed(folder, process, False)
    for step in range(1, 100):
        fed, counts = next(batches)
        check.note(step, fed, counts)
        if step % 3 == 0:
            check.agree(step)


def other_data(folder: Path, process: int) -> None:
    """One word of process 1's records is another."""
    config, stage = configured(folder, False)
    source = sources.load_source(folder / str(process) / "data.json", None, stage_seed(config, stage))
    input_check.check_same_data(f"stage {stage.name!r}", source.describe())


def alone_in_a_step(folder: Path, process: int) -> None:
    """The others wait inside a collective."""
    if process == 1:
        raise errors.UserError("the sentence of process 1")
    multihost_utils.process_allgather(np.zeros(3))


def endless(folder: Path, process: int) -> None:
    """Steps, until somebody kills one of them."""
    while True:
        multihost_utils.process_allgather(np.zeros(3))
        (folder / f"lives{process}").touch()


def bug(folder: Path, process: int) -> None:
    """Process 0 fails, with which the coordination service goes, by no mistake of a person."""
    if process == 0:
        raise ValueError("a mistake of ours")
    multihost_utils.process_allgather(np.zeros(3))


def report(folder: Path, process: int) -> None:
    """A report that fails in one process, once behind the collectives and once in the middle."""
    reports._FAILED_PATIENCE = 2.0
    config, stage = configured(folder, False)
    one = reports.Reports(config, stage, None, None, None, None, None, None)
    with one._tolerate(1, "validation"):
        if process == 1:
            raise OSError("survived")
    print("went on", flush=True)
    with one._tolerate(2, "validation"):
        if process == 1:
            raise OSError("not survived")
        multihost_utils.process_allgather(np.zeros(3))


def restore(folder: Path, process: int) -> None:
    """Process 1 can read neither the newest checkpoint's texts nor, later, the arrays of the one before."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    zeros = jax.make_array_from_callback((4,), whole, lambda _: np.zeros(4, np.float32))
    count = jax.make_array_from_callback((), whole, lambda _: np.zeros((), np.int32))
    tree = state.TrainState(step=count, params={"w": zeros}, opt_state=(), skipped=count, skipped_in_row=count)
    kept = checkpoint.Checkpoints(folder / "kept", {"json": "{}"})
    for step in (1, 2):
        kept.finish(step, tree, {"step": step}, 5.0)

    def accept(step, _):
        if process == 1 and step == 2:
            raise ValueError("no position")

    step, _, _ = checkpoint.Checkpoints(folder / "kept", {"json": "{}"}).restore(tree, accept)
    print(f"restored {step}", flush=True)
    checkpoint._READ_PATIENCE = 2.0
    load = checkpoint.Checkpoints._load_state

    def fails(*arguments):
        if process == 1:
            raise OSError("the disk of process 1")
        load(*arguments)
        time.sleep(60)  # as in Orbax, which has its own meetings

    checkpoint.Checkpoints._load_state = fails
    checkpoint.Checkpoints(folder / "kept", {"json": "{}"}).restore(tree)


def main(argv: list[str]) -> None:
    _, what, folder, address, processes, process = argv
    with end_together():
        distributed.start(address, int(processes), int(process))
        globals()[what](Path(folder), int(process))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cli.run_main(main)
