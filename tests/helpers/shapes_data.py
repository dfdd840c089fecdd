"""Small data sets as the quickstart's: pictures of plain shapes, made by the data engine."""

from pathlib import Path

from configs.quickstart_data import get_config
from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.run import synthesize
from fusion_jax.values.dicts import from_dict


def make_shapes(out: Path, counts: str, **changes) -> Path:
    """`counts` of stage1, stage1_5, stage2, validation and held_out, 48 pixels wide; returns `out`."""
    config = get_config(counts)
    config.images.width = config.images.height = 48
    config.processes = 1
    config.update(changes)
    synthesize(from_dict(SynthConfig, config.to_dict()), out, progress=False)
    return out
