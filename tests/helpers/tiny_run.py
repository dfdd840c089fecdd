"""A run configuration of the smallest size that still has every part; used by the tests that start processes.

`tiny_run.py:DATA,survival` is a variant for runs that are killed often: two stages that share one compiled program.
Values after it replace those of both stages or of the run: `tiny_run.py:DATA,survival,steps=30,validate_every=4`.
`infinite_loss=True` makes every loss of the process infinite, which no config within the limits does.
"""

import ast

from ml_collections import ConfigDict

from fusion_jax.config import to_dict
from fusion_jax.models.config import PAPER, ExchangeConfig, FusionConfig, LLMConfig, VisionConfig

MODEL = FusionConfig(
    vision=VisionConfig(image_size=24, patch_size=8, width=16, mlp_dim=32, layers=2, heads=2),
    llm=LLMConfig(vocab_size=640, width=32, mlp_dim=48, layers=2, heads=4, kv_heads=2),
    exchange=ExchangeConfig(start=0, stride=2, layers=1, heads=2),
    latent_counts=(1, 4),
    **PAPER,
)


def get_config(argument: str = "data"):
    data, variant, *changes = f"{argument},".split(",")

    def stage(name, **changes):
        sizes = {"max_length": 144, "max_question_length": 56, "max_rounds": 2, "batch_size": 4, "steps": 8}
        return {"name": name, "data": f"{data}/{name}.yaml", "learning_rate": 1e-2, **sizes, **changes}

    config = ConfigDict(
        {
            "model": to_dict(MODEL),
            "tokenizer": f"{data}/tokenizer",
            "stages": [stage("stage1", accumulation=2), stage("stage2", accumulation=2)],
            "validation_data": f"{data}/validation.json",
            "validation_batches": 1,
            "sample_answers": 2,
            "dtype": "float32",
            "remat": "full",
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "log_every": 1,
            "checkpoint_every": 3,
            "validate_every": 4,
            "loader_threads": 2,
            "max_skipped_steps": 3,
            "max_bad_records": 0.5,
        }
    )
    if variant == "survival":
        config.model.latent_counts = (1,)
        config.stages = [stage("stage1", steps=24), stage("stage2", steps=24)]
        config.update({"validate_every": 0, "keep_checkpoints": 2, "remat": "none"})
    if "infinite_loss=True" in changes:
        import jax.numpy as jnp

        from fusion_jax.training import losses

        changes.remove("infinite_loss=True")
        finite = losses.mapping_loss_sums
        losses.mapping_loss_sums = lambda *arguments: tuple(jnp.inf * value for value in finite(*arguments))
    for key, _, value in (change.partition("=") for change in changes if change):
        for part in config.stages if key not in config else [config]:
            part[key] = ast.literal_eval(value)
    return config
