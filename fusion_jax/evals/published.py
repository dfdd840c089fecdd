"""Figures published for models of this kind, to stand beside one's own: arXiv 2504.09925 and the FLARE paper."""

MODELS = ("FLARE-L 3B", "FLARE-X 3B", "FLARE-X 8B")

# In the order of MODELS. The text does not say which of POPE's figures it quotes.
FIGURES: dict[str, tuple[float, float, float]] = {
    "mmbench_en_dev": (79.6, 81.4, 83.6),
    "pope": (88.8, 88.6, 89.1),
    "mmvet": (59.1, 61.9, 62.8),
    "seed_image": (74.2, 76.3, 78.7),
    "textvqa": (73.3, 77.2, 79.7),
    "ai2d": (79.4, 81.2, 83.6),
    "cv_bench": (78.2, 80.1, 81.5),
}
