"""Checkpoints with Orbax: parameters, optimizer, input iterator, config and tokenizer in one atomic folder a step.

    WORKDIR/<stage>/checkpoints/<step>/{params, train, data, about}

`about` (JSON: the run's config with the model's in it, the tokenizer's files) makes a step folder self-describing:
`load_model` needs nothing else.
"""

import base64
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from fusion_jax.config import RunConfig, from_dict, to_dict
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.models import fusion
from fusion_jax.models.config import FusionConfig, replace
from fusion_jax.state import TrainState

FOLDER = "checkpoints"


_VISION_SIZES = ("image_size", "patch_size", "width", "mlp_dim", "layers", "heads")
_LLM_SIZES = ("width", "mlp_dim", "layers", "heads", "kv_heads", "per_head", "qkv_bias", "tied_head")


def _abstract(tree):
    """Shapes, dtypes and shardings; what has no sharding yet goes to the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), tree)


def _split(state: TrainState) -> tuple[dict, dict]:
    """Parameters apart from the rest, so that they can be read alone."""
    rest = {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
    return state.params, rest


class Checkpoints:
    """The checkpoints of one stage. Saving is asynchronous; `close` waits for the last one."""

    def __init__(self, folder: Path, keep: int, about: dict[str, Any]):
        # Policy objects of Orbax are about when; the training loop decides that itself, here only how many are kept.
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._about = about

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: TrainState, data) -> None:
        """Starts saving. `data` is the input iterator, which must not have moved since the batch of this step."""
        params, train = _split(state)
        items = {"params": params, "train": train, "data": data, "about": self._about}
        self._checkpointer.save_checkpointables_async(step, items, force=True)

    def restore(self, state: TrainState, data) -> TrainState:
        """The newest checkpoint in the shapes and shardings of `state`; puts the iterator where it was."""
        params, train = _split(_abstract(state))
        items = self._checkpointer.load_checkpointables(None, {"params": params, "train": train, "data": data})
        return TrainState(params=items["params"], **items["train"])

    def close(self) -> None:
        self._checkpointer.close()


def describe(config: RunConfig, tokenizer: Tokenizer | None, origin: dict[str, Any] | None = None) -> dict[str, str]:
    """The `about` entry of a checkpoint: one JSON text, because Orbax writes a file entry per leaf.

    `origin` is what an import keeps of the folder it read, for the way back (see `interop.importing.Plan`).
    """
    files = {}
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in sorted(Path(folder).iterdir())}
    return {"json": json.dumps({"config": to_dict(config), "tokenizer": files, "origin": origin or {}})}


@dataclass(frozen=True)
class Loaded:
    """A trained model: its run config, parameters (float32, nested dict), tokenizer and step folder."""

    config: RunConfig
    params: dict
    tokenizer: Tokenizer
    folder: Path
    step: int


def find(path: str | Path) -> Path:
    """The step folder that `path` means: a step folder, a stage's folder, or a workdir (its newest stage and step).

    Raises:
      UserError: there is no checkpoint.
    """
    path = Path(path).absolute()
    if (path / "params").is_dir():
        return path
    for pattern in ("[0-9]*", f"{FOLDER}/[0-9]*", f"*/{FOLDER}/[0-9]*"):
        steps = [p for p in path.glob(pattern) if p.name.isdigit() and (p / "params").is_dir()]
        if steps:
            return max(steps, key=lambda p: (p.parent.stat().st_mtime, int(p.name)))
    raise UserError(f"{path} holds no checkpoint; give a step folder, a stage's folder or a workdir.")


def load_about(folder: Path) -> dict[str, Any]:
    """The `about` entry of a step folder. UserError where it has none: something else, or damaged."""
    try:
        return json.loads(ocp.load_checkpointables(folder, {"about": None})["about"]["json"])
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} is no whole checkpoint: {reason}") from error


def load_params(folder: Path, like) -> dict:
    """Parameters alone, in the shapes and dtypes of `like`, whatever mesh wrote them.

    Raises:
      UserError: the checkpoint holds other parameters than `like`.
    """
    try:
        return ocp.load_checkpointables(folder, {"params": _abstract(like)})["params"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder} holds parameters of another model: {str(error).splitlines()[0]}") from error


def save_tokenizer(about: dict[str, Any], folder: Path) -> None:
    """Writes the tokenizer's files of an `about` entry. UserError where the checkpoint has none."""
    if not about["tokenizer"]:
        raise UserError(
            "The checkpoint holds no tokenizer: the folder it was imported from had none; put tokenizer files "
            "into that folder and import it again."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in about["tokenizer"].items():
        (folder / name).write_bytes(base64.b64decode(content))


def load_model(path: str | Path) -> Loaded:
    """Everything that generation and evaluation need, from a checkpoint alone."""
    folder = find(path)
    about = load_about(folder)
    config = from_dict(RunConfig, about["config"])
    with tempfile.TemporaryDirectory() as files:
        save_tokenizer(about, Path(files))
        tokenizer = load_tokenizer(files)
    like = jax.eval_shape(lambda: fusion.init(config.model, jax.random.key(0)))
    return Loaded(config, load_params(folder, like), tokenizer, folder, step_of(folder))


def step_of(folder: Path) -> int:
    """The training step of a step folder; 0 for an import, whose folder has a name of the user's."""
    return int(folder.name) if folder.name.isdigit() else 0


def continue_model(config: FusionConfig, about: dict[str, Any], where: str) -> FusionConfig:
    """The model that a run of `config` trains when it starts from a checkpoint: tower and decoder are the checkpoint's.

    A config for a published size need not know the numbers that come with the weights (vocabulary, rotary factors).

    Raises:
      UserError: their sizes differ; names the values.
    """
    saved = from_dict(FusionConfig, about["config"]["model"])
    different = []
    for part, names in (("vision", _VISION_SIZES), ("llm", _LLM_SIZES)):
        ours, theirs = getattr(config, part), getattr(saved, part)
        for name in names:
            if getattr(ours, name) != getattr(theirs, name):
                different.append(f"{part}.{name}={getattr(ours, name)} (checkpoint: {getattr(theirs, name)})")
    if different:
        raise UserError(f"config.model does not fit {where}: {', '.join(different)}.")
    return replace(config, vision=saved.vision, llm=saved.llm)
