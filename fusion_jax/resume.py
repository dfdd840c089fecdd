"""What a run may change when it goes on from a checkpoint, and what it may not."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from fusion_jax import checkpoint, integrity, loading
from fusion_jax.about import always_bos, config_of
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.models.config import FusionConfig, replace

log = logging.getLogger("fusion_jax")

_VISION_SIZES = ("image_size", "patch_size", "width", "mlp_dim", "layers", "heads")
_LLM_SIZES = ("width", "mlp_dim", "layers", "heads", "kv_heads", "per_head", "qkv_bias", "tied_head")

# The rest may change between two starts: learning rates, schedule length, loss weight, dtype, accumulation, reports,
# places of files, devices. These would make another state, or another order of the data, of what is continued.
_RUN = ("seed", "template")
_STAGE = (
    "max_length",
    "max_question_length",
    "max_rounds",
    "max_images",
    "packing",
    "batch_size",
    "freeze",
    "learn_rows",
)
_MODEL_FREE = ("mapping_loss_weight",)


def newest_about(folder: Path) -> dict[str, Any] | None:
    """`about` of the newest checkpoint in a stage's checkpoint folder that can be read; None where none can.

    The log says which are passed over.
    """
    for step in reversed(checkpoint.steps_in(folder)):
        found = integrity.problem(folder / str(step), parts=("about",))
        try:
            if found is None:
                return checkpoint.load_about(folder / str(step))
            log.warning("checkpoint %s is damaged: %s; its config is not looked at", folder / str(step), found)
        except UserError as error:
            log.warning("%s", error)
    return None


def start_from(config: RunConfig, source: Path, scratch: str) -> tuple[RunConfig, Tokenizer, dict]:
    """Starting from a checkpoint: the config with what its weights decide, the tokenizer, and the checkpoint's origin.

    Without a tokenizer in the config both it and the template are the checkpoint's; its files are put into `scratch`.
    UserError as `checkpoint.find`, `continue_model` and `load_tokenizer`.
    """
    folder = checkpoint.find(source)
    about = checkpoint.load_about(folder)
    config = dataclasses.replace(config, model=continue_model(config.model, about, str(source)))
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer, own=True)
    else:
        config = dataclasses.replace(config, template=config_of(about, folder).template)
        checkpoint.save_tokenizer(about, Path(scratch))
        tokenizer = load_tokenizer(scratch)
    return config, tokenizer, about.get("origin", {})


def initial_parameters(config: RunConfig, like: dict) -> tuple[Path, dict]:
    """The step folder that `config.init_from` means, and its parameters in shapes, dtypes and shardings of `like`.

    With several processes all use the same. UserError as `loading.use` and `load_params`.
    """

    def load(folder: Path) -> tuple[Path, dict]:
        about, params, problem = checkpoint.load_about(folder), None, None
        if continue_model(config.model, about, str(folder)) != config.model:
            raise UserError(f"{folder} is of another model than {config.init_from} has by now; give a step folder.")
        try:
            params = checkpoint.load_params(folder, like)
        except loading.Damaged as error:
            problem = error
        checkpoint.read_by_all(folder, problem)
        if not checkpoint.all_agree(params is not None):
            raise problem or loading.unreadable(folder, "another process says why")
        assert params is not None
        return folder, params

    return loading.use(config.init_from, load)


def check(config: RunConfig, stage: StageConfig, records: int, about: dict[str, Any], where: Path) -> None:
    """Compares a config with that of the checkpoint which its stage goes on from.

    Args:
      records: of the stage's data now. where: the checkpoint, for the message.

    Raises:
      UserError: values differ that the state depends on; names them all.
    """
    saved = config_of(about, where)
    if config.tokenizer and always_bos(about, where) and not load_tokenizer(config.tokenizer, own=True).adds_bos:
        raise UserError(
            f"{where} was trained with a BOS token in front of every conversation, which {config.tokenizer} does not "
            'ask for; to go on, say "add_bos_token": true in its tokenizer_config.json, with the padding token as '
            "bos_token if it names none."
        )
    pairs = [(f"model.{name}", ours, theirs) for name, ours, theirs in _model_pairs(config.model, saved.model)]
    pairs += [(name, getattr(config, name), getattr(saved, name)) for name in _RUN]
    old = next((known for known in saved.stages if known.name == stage.name), None)
    if old is not None:
        pairs += [(f"{stage.name}.{name}", getattr(stage, name), getattr(old, name)) for name in _STAGE]
    known = about.get("records", {}).get(stage.name, records)
    pairs.append((f"records of {stage.data}", records, known))
    different = [f"{name}={ours!r} (checkpoint: {theirs!r})" for name, ours, theirs in pairs if ours != theirs]
    if different:
        raise UserError(
            f"{where} is of another config: {', '.join(different)}; give another --workdir, and with init_from the "
            "parameters alone are taken over."
        )


def _model_pairs(ours: Any, theirs: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(path, value, value) of all leaves of two equal kinds of dataclasses."""
    pairs = []
    for field in dataclasses.fields(ours):
        a, b, name = getattr(ours, field.name), getattr(theirs, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            pairs += _model_pairs(a, b, f"{name}.")
        elif name not in _MODEL_FREE:
            pairs.append((name, a, b))
    return pairs


def continue_model(config: FusionConfig, about: dict[str, Any], where: str) -> FusionConfig:
    """The model that a run of `config` trains when it starts from a checkpoint: tower and decoder are the checkpoint's.

    A config for a published size need not know the numbers that come with the weights (vocabulary, rotary factors).

    Raises:
      UserError: their sizes differ; names the values.
    """
    saved = config_of(about, where).model
    different = []
    for part, names in (("vision", _VISION_SIZES), ("llm", _LLM_SIZES)):
        ours, theirs = getattr(config, part), getattr(saved, part)
        for name in names:
            if getattr(ours, name) != getattr(theirs, name):
                different.append(f"{part}.{name}={getattr(ours, name)} (checkpoint: {getattr(theirs, name)})")
    if different:
        raise UserError(f"config.model does not fit {where}: {', '.join(different)}.")
    return replace(config, vision=saved.vision, llm=saved.llm)
