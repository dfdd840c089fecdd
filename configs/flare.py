"""FLARE-L by the paper's text, giant encoder, fixed resolution; 3B on Phi-3.5-mini, 8B on Llama-3.1-8B.

python -m fusion_jax.train --config configs/flare.py:l_3b --workdir runs/flare_l_3b            # three stages
python -m fusion_jax.train --config configs/flare.py:l_8b,stage1 --workdir runs/flare_l_8b     # one of them
python -m fusion_jax.train --config configs/flare.py:l_3b,stage2 --config.init_from=DIR --workdir runs/stage2
"""

from configs.common import run


def get_config(arguments: str = "l_3b"):
    return run("flare_l", arguments, rates="paper")
