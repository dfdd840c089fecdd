"""FLARE as the paper describes it, with the giant encoder; L has fixed and X dynamic resolution.

The 3B models are built on Phi-3.5-mini, the 8B models on Llama-3.1-8B.

python -m fusion_jax.train --config configs/flare.py:l_3b --workdir runs/flare_l_3b            # three stages
python -m fusion_jax.train --config configs/flare.py:l_8b,stage1 --workdir runs/flare_l_8b     # one of them
python -m fusion_jax.train --config configs/flare.py:x_3b --workdir runs/flare_x_3b            # tiles, ~1400 tokens
python -m fusion_jax.train --config configs/flare.py:l_3b,stage2 --config.init_from=DIR --workdir runs/stage2
"""

from configs.common import run


def get_config(arguments: str = "l_3b"):
    arguments = arguments or "l_3b"
    return run("flare_x" if arguments.startswith("x_") else "flare_l", arguments, rates="paper")
