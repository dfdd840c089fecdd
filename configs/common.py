"""Defines the published stages that several configs share: data, batch sizes, lengths and rates.

Published (facts: 1 epoch each, AdamW 0.9/0.999/1e-8, cosine to 0, warm-up 3%, weight decay 0, bfloat16, clip 1.0):

    stage     data  batch  rate, paper  rate / encoder rate, released   max length
    stage1    10M   256    1e-4         2e-5 / 2e-5                     2048
    stage1_5   5M   128    2e-5         2e-5 / 2e-6                     4096
    stage2     7M   128    1e-5         1e-5 / 1e-6                     4096 (3072 for FUSION-X 8B)
"""

import dataclasses

from ml_collections import ConfigDict

from fusion_jax.config import RunConfig, StageConfig, to_dict
from fusion_jax.errors import check_choice
from fusion_jax.models.config import VARIANTS

ENCODER = "^vision/"
STAGES = {
    "stage1": {"batch_size": 256, "max_length": 2048, "paper": 1e-4, "released": 2e-5, "released_encoder": 2e-5},
    "stage1_5": {"batch_size": 128, "max_length": 4096, "paper": 2e-5, "released": 2e-5, "released_encoder": 2e-6},
    "stage2": {"batch_size": 128, "max_length": 4096, "paper": 1e-5, "released": 1e-5, "released_encoder": 1e-6},
}


def stage(name: str, rates: str, data: str) -> dict:
    """Makes one published stage. `rates` is paper or released; the stage's mixture is DATA/<name>.yaml."""
    published = STAGES[name]
    by_path = {ENCODER: published["released_encoder"]} if rates == "released" else {}
    return {
        "name": name,
        "data": f"{data}/{name}.yaml",
        "batch_size": published["batch_size"],
        "max_length": published["max_length"],
        "max_question_length": 1024,
        "max_rounds": 16,
        "packing": True,
        "learning_rate": published[rates],
        "learning_rate_by_path": by_path,
    }


def complete(values: dict) -> ConfigDict:
    """Adds the defaults of `RunConfig` and `StageConfig` to a run's values, so that every key can be overridden."""

    def defaults(kind: type) -> dict:
        return {f.name: to_dict(f.default) for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}

    stages = [defaults(StageConfig) | dict(stage) for stage in values["stages"]]
    return ConfigDict(defaults(RunConfig) | values | {"stages": stages})


def run(variant: str, arguments: str, rates: str, data: str = "data") -> ConfigDict:
    """Makes the configuration of a published run.

    Args:
      variant: key of `models.config.VARIANTS`. rates: paper or released.
      arguments: what follows the colon of --config: a size, then stages (none: all three): "3b,stage1,stage2".
      data: folder with stage1.yaml, stage1_5.yaml, stage2.yaml.
    """
    size, *chosen = [part.removeprefix("l_").removeprefix("x_") for part in (arguments or "3b").split(",")]
    check_choice("config argument: size ", size, VARIANTS[variant])
    for name in chosen:
        check_choice("config argument: stage ", name, STAGES)
    return complete(
        {
            "model": to_dict(VARIANTS[variant][size]),
            "tokenizer": f"{data}/tokenizer_{size}",
            "template": {"3b": "phi3", "8b": "llama3"}[size],
            "stages": [stage(name, rates, data) for name in chosen or STAGES],
            "init_from": "",
            "dtype": "bfloat16",
            "remat": "dots",  # use full on few or small chips: docs/scaling.md
            # Parameters are sharded over all devices; for several slices of a TPU set --config.mesh.data=SLICES.
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        }
    )
