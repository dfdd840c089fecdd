"""Runs the whole system, small enough for two CPU cores, on pictures that the data engine draws.

python -m fusion_jax.synthesize --config configs/quickstart_data.py --out runs/quickstart/data
python -m fusion_jax.train --config configs/quickstart.py --workdir runs/quickstart
"""

from configs.common import complete
from fusion_jax.config import to_dict
from fusion_jax.models.config import PAPER, ExchangeConfig, FusionConfig, LLMConfig, VisionConfig

MODEL = FusionConfig(
    # Each cell of the pictures' grid is one patch.
    vision=VisionConfig(image_size=48, patch_size=16, width=96, mlp_dim=256, layers=4, heads=4),
    llm=LLMConfig(vocab_size=640, width=128, mlp_dim=320, layers=3, heads=4, kv_heads=2),
    exchange=ExchangeConfig(start=0, stride=2, layers=2, heads=4),
    latent_counts=(4, 9),
    # From random weights both sides of the mapping loss can agree by ignoring the image; pretrained models use 0.1.
    mapping_loss_weight=0.01,
    **PAPER,
)


def get_config(data: str = "runs/quickstart/data"):
    """`data` is the data engine's folder: `--config configs/quickstart.py:some/folder`."""
    data = data or "runs/quickstart/data"

    # The last two stages have equal shapes, so that one compiled step per l^2 serves both.
    def stage(name, **changes):
        base = {
            "name": name,
            "data": f"{data}/{name}.yaml",
            "max_length": 100,
            "max_question_length": 38,
            "max_rounds": 2,
            "batch_size": 16,
            "learning_rate": 1.5e-3,
            "b2": 0.98,
            "warmup_ratio": 0.1,
        }
        return base | changes

    return complete(
        {
            "model": to_dict(MODEL),
            "tokenizer": f"{data}/tokenizer",
            "template": "phi3",
            "dtype": "float32",
            "remat": "dots",
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "stages": [
                # Captions have short questions and one round, so that a third less has to be computed.
                stage("stage1", steps=1200, max_length=96, max_question_length=8, max_rounds=1),
                stage("stage1_5", steps=400),
                stage("stage2", steps=1400),
            ],
            "validation_data": f"{data}/validation.json",
            "log_every": 50,
            "validate_every": 500,
            "checkpoint_every": 500,
            "loader_threads": 4,
        }
    )
