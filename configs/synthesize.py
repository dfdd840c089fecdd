"""Runs the data engine without network or weights: it invents scenes, draws them and asks about them.

python -m fusion_jax.synthesize --config configs/synthesize.py --out runs/synthesis
python -m fusion_jax.synthesize --config configs/synthesize.py:20000 --out runs/synthesis --config.images.width=512

The argument after the colon is the number of captions.
"""

from ml_collections import ConfigDict

# The papers' numbers of samples, in thousands; each caption becomes a sample of one kind, in these proportions.
PUBLISHED = {
    "caption_color": 250.0,
    "caption_count": 300.0,
    "caption_spatial": 300.0,
    "caption_scene": 250.0,
    "caption_text": 400.0,
    "multi_choice": 200.0,
    "conv_long": 200.0,
    "conv_short": 200.0,
    "reasoning": 100.0,
    "text_qa": 150.0,
    "contrast_short": 70.0,
    "contrast_long": 70.0,
}


def get_config(count: str = "1000"):
    config = {
        "pools": [{"path": f"embedded:{count or 1000}"}],
        "kinds": PUBLISHED,
        "stages": {},
        "seed": 0,
        "filters": {},
        "llm": {"backend": "embedded"},
        "vision": {"backend": "embedded"},
        "images": {"backend": "embedded", "width": 384, "height": 384},
        "scorer": {},
        # Simple scenes look alike without being the same, so their texts decide.
        "select": {"image_distance": -1, "validation": 0.02},
        "processes": 2,
        "block": 64,
        "shards": True,
        "engine": "local",
        "journal": "",
    }
    return ConfigDict(config)
