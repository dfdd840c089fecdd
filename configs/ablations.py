"""The paper's component study: A text-guided encoding, B mapping loss, C semantic exchange; one value each.

python -m fusion_jax.train --config configs/ablations.py:l_3b,A,C --workdir runs/a_c    # A and C on, B off
python -m fusion_jax.train --config configs/ablations.py:l_3b --workdir runs/none       # all off
"""

from configs import flare
from configs.common import STAGES
from fusion_jax.errors import check_choice

OFF = {"A": ("text_guided", False), "B": ("mapping_loss_weight", 0.0), "C": ("semantic_exchange", False)}


def get_config(arguments: str = "l_3b"):
    parts = (arguments or "l_3b").split(",")
    for part in parts[1:]:
        check_choice("config argument: component or stage ", part, (*OFF, *STAGES))
    config = flare.get_config(",".join(part for part in parts if part not in OFF))
    for component, (key, value) in OFF.items():
        if component not in parts:
            config.model[key] = value
    return config
