"""How often should latents look at the image? Exchange layers after every, every second or every third decoder layer.

Expected: one exchange is much better than none, further ones add less and less, and too many leave the decoder no
layers in between to use what they brought. In the paper an interval of 3 is best (74.9 against 73.7 for 2 and 73.6 for
6); its fourth variant, two layers in each exchange, is not one that this model has. A small decoder has few layers, so
its intervals are 1, 2 and 3. The number of exchange layers falls as the interval grows.

python -m fusion_jax.study --config configs/study_exchange.py --out runs/exchange
python -m fusion_jax.study --config configs/study_exchange.py:configs/flare.py:l_3b --out runs/exchange_3b
"""

from configs import studies

PUBLISHED = {
    "source": "FLARE (ICLR 2026): 1M samples, one layer in each exchange.",
    "columns": ("MMBench",),
    "rows": {"every 2": (73.7,), "every 3": (74.9,), "every 6": (73.6,)},
}


def get_config(base: str = ""):
    """`base` is another run: `configs/flare.py:l_3b`; the intervals are then the paper's."""
    depth = studies.model_of(base).llm.layers
    intervals = (2, 3, 6) if base else (1, 2, 3)

    def exchange(interval: int) -> dict:
        layers = len(range(0, depth, interval))
        return {"model.exchange.start": 0, "model.exchange.stride": interval, "model.exchange.layers": layers}

    variants = {f"every {interval}": exchange(interval) for interval in intervals}
    if base:
        variants["every 3"]["model.exchange.layers"] = 10  # as published, without one after the last but one layer
    # Latents without an exchange show what the exchange itself is worth.
    variants["no exchange"] = {"model.exchange.layers": 0}
    return studies.make(base, __doc__, variants, "every 3" if base else "every 2", PUBLISHED if base else None)
