"""Opens and checks all inputs of a run before any long work, for training and for the doctor."""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import chat_template
from fusion_jax.data.plan import Sizes
from fusion_jax.data.planner import stage_is_over, stage_steps
from fusion_jax.data.sources import RecordSource
from fusion_jax.data.stages import open_source
from fusion_jax.data.templates import stop_ids
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.devices import distributed, sharding
from fusion_jax.errors import UserError, check
from fusion_jax.evals.registry import find_tasks
from fusion_jax.training import input_check, optim, resume, state, validation
from fusion_jax.training.about import load_text
from fusion_jax.training.checkpoint_folders import FOLDER, steps_in
from fusion_jax.training.init_from import check_initial
from fusion_jax.training.validation import NothingUsable, Validation
from fusion_jax.training.writer import import_wandb

log = logging.getLogger("fusion_jax")


@dataclass
class Inputs:
    """The inputs of a run, opened and checked.

    Attributes:
      config: the run's config, with the values that depend on a checkpoint's weights filled in.
      first: index of the stage to continue with. begun: whether that stage has a checkpoint. over: whether its newest
        checkpoint is that of its last step, so that its data have not been compared.
      accepted: `resume.INPUTS` that may have changed. tokenizer, origin: see `resume.start_from`.
      sources, data: the records of each stage and their description (`RecordSource.describe`), by name of the stage.
      sizes: the batch sizes of each stage that will be trained, by name.
      validation: the validation data of each stage that has some, by name.
    """

    config: RunConfig
    first: int
    begun: bool
    over: bool = False
    accepted: Sequence[str] = ()
    tokenizer: Tokenizer | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None
    sources: dict[str, RecordSource] = field(default_factory=dict)
    data: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sizes: dict[str, Sizes] = field(default_factory=dict)
    validation: dict[str, Validation] = field(default_factory=dict)
    # Holds the files of a tokenizer that comes from a checkpoint.
    scratch: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory)


def check_accepted(accepted: Sequence[str]) -> None:
    """Raises UserError if --accept_changed names something unknown."""
    for name in accepted:
        check(name in resume.INPUTS, f"--accept_changed={name} is unknown; allowed: {', '.join(resume.INPUTS)}.")


def open_inputs(
    config: RunConfig,
    workdir: Path,
    accepted: Sequence[str] = (),
    problems: list[UserError] | None = None,
    devices: int | None = None,
) -> Inputs:
    """Opens and checks the inputs of a run in `workdir`. Nothing is written, compiled or put on a device.

    Args:
      accepted: `resume.INPUTS` that may have changed since the checkpoint.
      problems: None: the first problem is raised. A list: it receives all problems, and checks that depend on a failed
        one are left out.
      devices: the number of devices that the mesh is for, which need not be here; None: those of this machine or run;
        0: unknown.
    """

    @contextlib.contextmanager
    def attempt() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if problems is None:
                raise
            problems.append(error)

    with attempt():
        check_accepted(accepted)
    # ---- Where to continue: the last stage that has a checkpoint.
    begun = [i for i, stage in enumerate(config.stages) if steps_in(checkpoints(workdir, stage))]
    inputs = Inputs(config, begun[-1] if begun else 0, bool(begun), accepted=accepted)
    with attempt():
        if config.init_from:
            source = workdir if begun else Path(config.init_from)
            inputs.config, inputs.tokenizer, inputs.origin = resume.start_from(config, source, inputs.scratch.name)
        else:
            inputs.tokenizer = load_tokenizer(config.tokenizer, own=True)
    config, tokenizer = inputs.config, inputs.tokenizer
    if tokenizer is not None:
        with attempt():
            check_tokenizer(config, tokenizer)
            input_check.check_same_tokenizer(tokenizer)
    # ---- Devices and parameters.
    if devices != 0:
        with attempt():
            inputs.mesh = sharding.make_mesh(config.mesh) if devices is None else described_mesh(config, devices)
            with attempt():
                sharding.check_model(config.model, inputs.mesh)
            for stage in config.stages:
                if not stage.packing:  # packed rows are always a multiple of the number of devices
                    with attempt():
                        rows = stage.batch_size // stage.accumulation
                        sharding.check_rows(rows, inputs.mesh, f"stage {stage.name!r}")
    shapes = state.shapes(config.model)
    for stage in config.stages:
        with attempt():
            optim.labels(stage, shapes)
    if config.init_from and not begun and tokenizer is not None:
        with attempt():
            check_initial(config, shapes)
    # ---- Data.
    for stage in config.stages:
        with attempt():
            source = open_source(config, stage)
            inputs.sources[stage.name] = source
            inputs.data[stage.name] = source.describe()
            input_check.check_same_data(f"stage {stage.name!r}", inputs.data[stage.name])
    if begun and tokenizer is not None:
        check_resume(inputs, workdir, attempt)
    for stage in config.stages[inputs.first :]:
        source = inputs.sources.get(stage.name)
        if source is not None and tokenizer is not None and inputs.mesh is not None:
            with attempt():
                shards = sharding.batch_shards(inputs.mesh)
                sizes = input_check.agreed_sizes(config, stage, source, tokenizer, shards)
                inputs.sizes[stage.name] = sizes
                steps = stage_steps(stage, len(source), sizes.samples)
                optim.check_changes_parameters(stage, steps, shapes)
    with attempt():
        inputs.validation = measure_validation(config, config.stages[inputs.first :], tokenizer)
    # ---- Reports.
    if config.evaluate_every:
        with attempt():
            check_evaluation(config)
    if config.wandb_project:
        with attempt():
            import_wandb()
    return inputs


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError if the model has too few rows for the tokenizer, or the tokenizer lacks a template's token."""
    check(
        tokenizer.vocab_size <= config.model.llm.vocab_size,
        f"config.model.llm.vocab_size={config.model.llm.vocab_size} is smaller than the {tokenizer.vocab_size} "
        f"tokens of {config.tokenizer or config.init_from}.",
    )
    stop_ids(tokenizer, chat_template.find(config.template, tokenizer))


def described_mesh(config: RunConfig, devices: int) -> jax.sharding.AbstractMesh:
    """Returns the mesh over a number of devices. UserError if its sizes do not fit that number."""
    return jax.sharding.AbstractMesh(sharding.mesh_sizes(config.mesh, devices), sharding.AXES)


def check_resume(inputs: Inputs, workdir: Path, attempt) -> None:
    """Compares config, data and tokenizer with those of the newest checkpoint that can be read."""
    config = inputs.config
    stage = config.stages[inputs.first]
    folder = checkpoints(workdir, stage)
    about = resume.newest_about(folder)
    if about is None:
        with attempt():
            resume.raise_unreadable(folder)
        return
    with attempt():
        resume.check(config, stage, about, folder)
    source = inputs.sources.get(stage.name)
    if source is None:
        return
    inputs.over = distributed.gather(_is_over(stage, len(source), folder))[0]
    data = None if inputs.over else inputs.data.get(stage.name)
    with attempt():
        resume.check_inputs(config, stage, data, inputs.tokenizer, about, folder, inputs.accepted)


def _is_over(stage: StageConfig, records: int, folder: Path) -> bool:
    """Returns whether the newest checkpoint is that of the stage's last step, so that its data will not be read."""
    try:
        position = load_text(folder / str(steps_in(folder)[-1]), "data")
        return stage_is_over(stage, records, position)
    except (OSError, ValueError, KeyError, TypeError):  # damaged: restoring it will say so
        return False


def measure_validation(
    config: RunConfig, stages: Sequence[StageConfig], tokenizer: Tokenizer | None
) -> dict[str, Validation]:
    """Measures the validation data of each stage that has some, by name. A collective.

    Stages of equal sizes share what is measured. Without a tokenizer the data are only opened.

    Raises:
      UserError: the data cannot be opened, are not the same for all processes, or can be used in no stage.
    """
    source = validation.open_data(config)
    if source is None or not config.validate_every or tokenizer is None:
        return {}
    input_check.check_same_data("validation_data", source.describe())
    by_sizes: dict[tuple, Validation | NothingUsable] = {}
    usable: dict[str, Validation] = {}
    without: dict[str, NothingUsable] = {}
    for stage in stages:
        sizes = tuple(getattr(stage, name) for name in validation.SIZES)
        if sizes not in by_sizes:
            try:
                by_sizes[sizes] = validation.measure(config, stage, source, tokenizer)
            except NothingUsable as error:
                by_sizes[sizes] = error
        measured = by_sizes[sizes]
        if isinstance(measured, Validation):
            usable[stage.name] = dataclasses.replace(measured, stage=stage, broken={})
        else:
            without[stage.name] = measured
    # A stage of short rows may have no validation; if none has one, something is wrong.
    if not usable:
        raise next(iter(without.values()))
    for name, reason in without.items():
        log.warning("%s has no validation: %s", name, reason)
    return usable


def check_evaluation(config: RunConfig) -> None:
    """Raises UserError if the benchmarks to run during training are unknown, or their data are missing."""
    check(
        bool(config.evaluation_tasks) and Path(config.evaluation_data).is_dir(),
        f"config.evaluate_every={config.evaluate_every} needs evaluation_tasks (they are "
        f"{list(config.evaluation_tasks)}) and the folder evaluation_data (it is {config.evaluation_data!r}).",
    )
    find_tasks(config.evaluation_tasks)


def checkpoints(workdir: Path, stage: StageConfig) -> Path:
    """Returns the folder of a stage's checkpoints."""
    return workdir / stage.name / FOLDER
