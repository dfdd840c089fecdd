"""Which of the paper's three components help, alone and together? Its table of components, with C and B+C besides.

A: text-guided encoding. B: dual-semantic mapping loss. C: context-aware latents with semantic exchange.

Expected: each component helps on questions about one of several things in the picture, and A+B+C is best. A lets the
encoder spend its layers on what the question names. C gives the decoder a second look at windows of the image, which
matters most where the first pass has lost detail. B aligns both spaces, which pretrained parts need; a small model that
trains from random weights has nothing to align, so B alone may change little here. The published differences are 1 to 3
points, about as large as what seeds change in small runs, so several seeds and intervals are needed to see them.

python -m fusion_jax.study --config configs/study_components.py --out runs/components
python -m fusion_jax.study --config configs/study_components.py:configs/flare.py:l_3b --out runs/components_3b
"""

from configs import studies

OFF = {
    "A": {"model.text_guided": False},
    "B": {"model.mapping_loss_weight": 0.0},
    "C": {"model.semantic_exchange": False},
}
VARIANTS = ("none", "A", "B", "C", "A+B", "A+C", "B+C", "A+B+C")
PUBLISHED = {
    "source": "FLARE (ICLR 2026): 1M samples, pretrained encoder and language model; C and B+C were not published.",
    "columns": ("MMBench", "SEED", "CV-Bench", "MMVP"),
    "rows": {
        "none": (72.5, 71.7, 68.3, 66.1),
        "A": (73.5, 72.8, 70.7, 67.6),
        "B": (73.7, 72.8, 70.3, 68.4),
        "A+B": (74.5, 73.7, 70.7, 70.3),
        "A+C": (74.4, 73.7, 71.2, 69.1),
        "A+B+C": (75.3, 74.6, 71.7, 69.8),
    },
}


def get_config(base: str = ""):
    """`base` is another run: `configs/flare.py:l_3b`."""

    def without(missing) -> dict:
        return {key: value for component in missing for key, value in OFF[component].items()}

    variants = {name: without(c for c in OFF if c not in name.split("+")) for name in VARIANTS}
    return studies.make(base, __doc__, variants, "none", PUBLISHED)
