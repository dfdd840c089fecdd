"""A real checkpoint of the tiny run's model, with random weights and the scenes' tokenizer, in a second or two."""

from pathlib import Path

import orbax.checkpoint.experimental.v1 as ocp
from helpers import fixtures, tiny_run

from fusion_jax.config import RunConfig, from_dict
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.training.about import describe_run
from fusion_jax.training.checkpoint_folders import FOLDER


def save(folder: Path, data: Path, seed: int = 0) -> Path:
    """The step folder; `data` is a folder of scenes, for its tokenizer."""
    config = from_dict(RunConfig, tiny_run.get_config(str(data)).to_dict())
    params = fixtures.params(config.model, seed)
    about = describe_run(config, load_tokenizer(data / "tokenizer"))
    step = folder / "stage2" / FOLDER / "8"
    ocp.save_checkpointables(step, {"params": params, "about": about})
    return step
