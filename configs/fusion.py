"""FUSION with the released arithmetic and hyperparameters: so400m encoder, 384/14, 729 image tokens.

python -m fusion_jax.train --config configs/fusion.py:3b --workdir runs/fusion_3b
python -m fusion_jax.train --config configs/fusion.py:x_8b --workdir runs/fusion_x_8b    # giant encoder
python -m fusion_jax.train --config configs/fusion.py:l_3b --workdir runs/fusion_l_3b    # image tokens resized to 16x16
"""

from configs.common import run


def get_config(arguments: str = "3b"):
    arguments = arguments or "3b"
    variant = {"x_": "fusion_x", "l_": "fusion_l"}.get(arguments[:2], "fusion")
    config = run(variant, arguments, rates="released")
    if variant == "fusion_x" and "8b" in arguments:
        for stage in config.stages:
            stage["max_length"] = min(stage["max_length"], 3072)
    return config
