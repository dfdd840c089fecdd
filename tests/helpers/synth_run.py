"""Runs of the data engine with the models of the tile world behind an endpoint."""

from helpers import tile_world

from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.run import synthesize
from fusion_jax.values.dicts import from_dict

# Files of a run that do not depend on how it came about.
OUTPUT = ("stage1.json", "stage1_5.json", "lineage.jsonl", "dropped.jsonl", "stage1.yaml", "stage1_5.yaml")


def make_config(folder, url, count, *, kinds=tuple(KINDS), traffic=None, **more):
    """The mapping of a config: captions of the tile world from a file in `folder`, all models at the endpoint `url`."""
    pool = folder / "captions.txt"
    if not pool.exists():
        pool.write_text("\n".join(tile_world.captions(count)))
    endpoint = {"backend": "endpoint", "base_url": url, "concurrency": 24, "timeout": 5.0} | (traffic or {})
    return {
        "pools": [{"path": str(pool), "source": "tiles", "licence": "CC0"}],
        "kinds": dict.fromkeys(kinds, 1.0),
        "llm": endpoint | {"model": "tile-writer", "price_prompt": 1.0, "price_completion": 2.0},
        "vision": endpoint | {"model": "tile-viewer"},
        "images": endpoint | {"model": "tile-painter", "width": 64, "height": 64},
        "select": {"image_distance": -1, "text_similarity": 1.0},
        "block": 16,
        "shards": False,
    } | more


def run(config, out, **more):
    """The manifest of a run with this mapping as its config."""
    return synthesize(from_dict(SynthConfig, config), out, progress=False, **more)
