"""tests/helpers/tiny_run.py cut down to one stage of four steps, for runs of several processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import tiny_run


def get_config(arguments: str = "data"):
    """`arguments`: the folder of the data and, after commas, the number of steps and "packed": rows of several records,
    and a benchmark behind the last step."""
    data, steps, packed = f"{arguments},,".split(",")[:3]
    config = tiny_run.get_config(data)
    config.model.latent_counts = (4,)
    stage = {**config.stages[1], "steps": int(steps or 4), "accumulation": 1}
    config.update({"checkpoint_every": 2, "validate_every": 4, "sample_answers": 1})
    if packed:
        stage |= {"packing": True, "batch_size": 12, "max_length": 200, "max_rounds": 6}
        config.update({"evaluate_every": 4, "evaluation_tasks": ("held_out",), "evaluation_data": data})
    config.stages = [stage]
    return config
