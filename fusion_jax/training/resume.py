"""Compares a run with the checkpoint that it continues from: what may have changed, and what must not."""

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.data.tokenizer_files import TOKENIZER_FILES
from fusion_jax.errors import UserError
from fusion_jax.files import parse_json, read_file
from fusion_jax.models.config import FusionConfig, replace
from fusion_jax.training import integrity, rounding
from fusion_jax.training.about import always_bos, config_of, conversation_ids, load_about, save_tokenizer
from fusion_jax.training.checkpoint_folders import steps_in
from fusion_jax.training.input_check import differences
from fusion_jax.training.loading import find_checkpoint

log = logging.getLogger("fusion_jax")

_VISION_SIZES = ("image_size", "patch_size", "width", "mlp_dim", "layers", "heads")
_LLM_SIZES = ("width", "mlp_dim", "layers", "heads", "kv_heads", "per_head", "qkv_bias", "tied_head")

# Fields whose change would alter the state, or the order of the data, of the stage that continues. All others may
# change between starts: learning rates, schedule length, loss weight, dtype, accumulation, reports, paths, devices.
_RUN = ("seed",)
_STAGE = ("max_length", "max_question_length", "max_rounds", "max_images", "packing", "batch_size", "freeze")
_STAGE += ("learn_rows", "optimizer")
# Moments in eight bits have other arrays; between float32 and bfloat16 they are converted, as are master weights.
_EIGHT_BIT = ("first_moment", "second_moment")
_MODEL_FREE = ("mapping_loss_weight",)
# Inputs that may change on purpose, if named in --accept_changed.
INPUTS = ("data", "tokenizer", "template")


def newest_about(folder: Path) -> dict[str, Any] | None:
    """Returns `about` of the newest readable checkpoint in a stage's checkpoint folder; None if none can be read.

    The log says which are skipped.
    """
    for step in reversed(steps_in(folder)):
        damage = integrity.problem(folder / str(step), parts=("about",))
        try:
            if damage is None:
                return load_about(folder / str(step))
            log.warning("checkpoint %s is damaged: %s; its config is ignored", folder / str(step), damage)
        except UserError as error:
            log.warning("%s", error)
    return None


def raise_unreadable(folder: Path) -> None:
    """Raises the UserError of a checkpoint folder in which `newest_about` finds nothing; it explains the newest."""
    step = steps_in(folder)[-1]
    why = integrity.problem(folder / str(step), parts=("about",))
    if why is None:
        try:
            load_about(folder / str(step))
        except UserError as error:
            why = str(error).rstrip(".")
    raise UserError(
        f"No checkpoint in {folder} is intact (step {step}: {why}); move that folder away to begin the stage again."
    )


def start_from(config: RunConfig, source: Path, scratch: str) -> tuple[RunConfig, Tokenizer, dict]:
    """Prepares a start from a checkpoint.

    If the config names no tokenizer, tokenizer and template are the checkpoint's, and its files are written to
    `scratch`; if it names another one, the log says so.

    Returns:
      The config with the values that depend on the checkpoint's weights, the tokenizer, and the checkpoint's origin.

    Raises:
      UserError: as from `find_checkpoint`, `continue_model` and `load_tokenizer`.
    """
    folder = find_checkpoint(source)
    about = load_about(folder)
    config = dataclasses.replace(config, model=continue_model(config.model, about, str(source)))
    if str(source) == config.init_from:
        other = [
            f"{name}={ours!r} ({theirs!r})"
            for name, ours, theirs in _model_pairs(config.model, config_of(about, folder).model)
            if ours != theirs
        ]
        if other:
            log.info("the model differs from that of %s: %s", folder, ", ".join(other))
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer, own=True)
        different = _text_differences(config, tokenizer, about, folder) if str(source) == config.init_from else {}
        if different:
            log.warning("%s was trained on other tokens: %s", folder, "; ".join(different.values()))
    else:
        template = config_of(about, folder).template
        if template != config.template:
            log.info("the template is the checkpoint's, %s, and not %s", template, config.template)
        config = dataclasses.replace(config, template=template)
        save_tokenizer(about, Path(scratch))
        tokenizer = load_tokenizer(scratch)
    return config, tokenizer, about.get("origin", {})


def check(config: RunConfig, stage: StageConfig, about: dict[str, Any], where: Path) -> None:
    """Compares a config with that of the checkpoint from which its stage continues.

    Args:
      where: the checkpoint, for the error.

    Raises:
      UserError: values on which the state depends differ; names them all.
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
        moments = [(name, getattr(stage, name), getattr(old, name)) for name in _EIGHT_BIT]
        pairs += [(f"{stage.name}.{name}", *values) for name, *values in moments if rounding.INT8 in values]
    different = [f"{name}={ours!r} (checkpoint: {theirs!r})" for name, ours, theirs in pairs if ours != theirs]
    if different:
        raise UserError(
            f"{where} is of another config: {', '.join(different)}; give another --workdir, and with init_from the "
            "parameters alone are taken over."
        )


def check_inputs(
    config: RunConfig,
    stage: StageConfig,
    data: list[dict[str, Any]] | None,
    tokenizer: Tokenizer,
    about: dict[str, Any],
    where: Path,
    accepted: Sequence[str] = (),
) -> None:
    """Compares the inputs of a run with those of the checkpoint from which its stage continues.

    Args:
      data: the stage's data, from `RecordSource.describe`; None if the stage is over.
      accepted: those of `INPUTS` that may differ; the log says how they do.

    Raises:
      UserError: another input has changed; names all that have.
    """
    different = _text_differences(config, tokenizer, about, where)
    if data is not None:
        changed = _data_differences(stage, data, about, where)
        if changed:
            different["data"] = f"{stage.data} has {', '.join(changed)}"
    for name in accepted:
        if name in different:
            log.warning("%s goes on with a change (--accept_changed): %s", where, different.pop(name))
    if different:
        raise UserError(
            f"{where} was trained on something else: {'; '.join(different.values())}; put back what was there, give "
            f"another --workdir, or go on with what is there now by --accept_changed={','.join(different)}."
        )


def _data_differences(stage: StageConfig, data: list[dict[str, Any]], about: dict[str, Any], where: Path) -> list[str]:
    if stage.name in about.get("data", {}):
        return differences(data, about["data"][stage.name], "checkpoint")
    log.info("%s is of an earlier version, whose data are known by their number of records alone", where)
    records = sum(part["drawn"] for part in data)
    known = about.get("records", {}).get(stage.name, records)
    return [f"{records:,} records (checkpoint: {known:,})"] if records != known else []


def _text_differences(config: RunConfig, tokenizer: Tokenizer, about: dict[str, Any], where: Path) -> dict[str, str]:
    """Describes what would turn the same texts into other tokens, by the key in `INPUTS`."""
    different = {}
    theirs = config_of(about, where).template
    if config.template != theirs:
        different["template"] = f"template={config.template!r} (checkpoint: {theirs!r})"
    names = _other_files(tokenizer, about) if config.tokenizer and about["tokenizer"] else []
    if names:
        different["tokenizer"] = f"the tokenizer in {tokenizer.folder} has another {' and '.join(names)}"
    same = about.get("conversation") in (None, [], conversation_ids(tokenizer, config.template))
    if not different and not same:
        different["template"] = f"the template {config.template!r} makes other tokens of the same conversation"
    return different


def _other_files(tokenizer: Tokenizer, about: dict[str, Any]) -> list[str]:
    """Names the tokenizer's files that differ from the checkpoint's, as `about.save_tokenizer` writes them."""
    with tempfile.TemporaryDirectory() as scratch:
        save_tokenizer(about, Path(scratch))
        folders = tokenizer.folder, Path(scratch)
        known = [name for name in TOKENIZER_FILES if about.get("format", 1) >= 2 or not name.endswith(".jinja")]
        pairs = {name: [read_file(f / name) if (f / name).is_file() else None for f in folders] for name in known}
        return [name for name, (ours, theirs) in pairs.items() if not _same_content(ours, theirs)]


def _same_content(ours: bytes | None, theirs: bytes | None) -> bool:
    """Returns whether two files have equal contents; JSON may be formatted differently."""
    if ours is None or theirs is None or ours == theirs:
        return ours == theirs
    try:
        return parse_json(ours) == parse_json(theirs)
    except (ValueError, RecursionError):
        return False


def _model_pairs(ours: Any, theirs: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Returns (path, value, value) of all leaves of two dataclasses of the same type."""
    pairs = []
    for field in dataclasses.fields(ours):
        a, b, name = getattr(ours, field.name), getattr(theirs, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            pairs += _model_pairs(a, b, f"{name}.")
        elif name not in _MODEL_FREE:
            pairs.append((name, a, b))
    return pairs


def continue_model(config: FusionConfig, about: dict[str, Any], where: str) -> FusionConfig:
    """Returns the model config of a run that takes over the vision tower and decoder of a checkpoint.

    A config for a published size need not have the numbers that come with the weights (vocabulary, rotary factors).

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
