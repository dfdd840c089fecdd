"""The benchmark model: `python -m fusion_jax.benchmark step|prefill|decode --config configs/benchmark_cpu.py`.

Small widths over the published layout (so400m tower with 27 layers at 384/14, five crops an image), so that a CPU
shows what the arithmetic costs. float32, preset `released`, l^2 = 16.
"""

import dataclasses

from ml_collections import ConfigDict

from fusion_jax.config import to_dict
from fusion_jax.errors import check_choice
from fusion_jax.models.config import RELEASED, ExchangeConfig, FusionConfig, LLMConfig, VisionConfig

MODEL = FusionConfig(
    vision=VisionConfig(image_size=384, patch_size=14, width=192, mlp_dim=512, layers=26, heads=6),
    llm=LLMConfig(vocab_size=8192, width=256, mlp_dim=704, layers=8, heads=16, kv_heads=4),
    exchange=ExchangeConfig(start=0, stride=3, layers=3),
    latent_counts=(16,),
    **RELEASED,
)


# 1.2 GiB of state (parameters and AdamW) and a step of only about a second, so that the cost of saving is visible.
LARGE_STATE = dataclasses.replace(
    MODEL,
    vision=VisionConfig(image_size=48, patch_size=16, width=192, mlp_dim=512, layers=4, heads=6),
    llm=LLMConfig(vocab_size=64_000, width=768, mlp_dim=2048, layers=2, heads=16, kv_heads=4),
    exchange=ExchangeConfig(start=0, stride=1, layers=1),
    latent_counts=(9,),
)


def get_config(what: str = ""):
    if what:
        check_choice("config argument ", what, ("checkpoint",))
    return ConfigDict(
        {
            "model": to_dict(LARGE_STATE if what == "checkpoint" else MODEL),
            "dtype": "float32",
            "remat": "attention",
            "batch_size": 2,
            "accumulation": 1,
            "question_tokens": 40,
            "answer_tokens": 80,
            "decode_tokens": 32,
            "decode_rows": 1,
            "repeats": 7,
            "steps_between": 5,  # checkpoint: undisturbed steps before each save
        }
    )
