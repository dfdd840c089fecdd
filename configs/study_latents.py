"""How many latents should a round have: always the same number, or a drawn one? Each l^2 alone against drawn ones.

Expected: more latents look at smaller windows, so a fixed number that is too small loses detail, and one that is too
large has windows of a single patch, which the image tokens already are. Drawing the number costs nothing at inference
and makes one model good at every number. In the paper it is best: 74.7 against 73.8, 74.0 and 72.0 for 64, 144, 576.
Answers use the middle one of the drawn numbers, so the drawn variant has seen the number of the evaluation in only a
part of its steps; that it should win all the same is the claim to test.

python -m fusion_jax.study --config configs/study_latents.py --out runs/latents
python -m fusion_jax.study --config configs/study_latents.py:configs/flare.py:l_3b --out runs/latents_3b
"""

from configs import studies

PUBLISHED = {
    "source": "FLARE (ICLR 2026): 1M samples; drawn from 4, 16, 36, 64 and 144.",
    "columns": ("MMBench",),
    "rows": {"64": (73.8,), "144": (74.0,), "576": (72.0,), "drawn": (74.7,)},
}


def get_config(base: str = ""):
    """`base` is another run: `configs/flare.py:l_3b`; the numbers are then the paper's."""
    counts = (64, 144, 576) if base else tuple(studies.model_of(base).latent_counts)
    variants = {"drawn": {}} | {str(count): {"model.latent_counts": (count,)} for count in counts}
    return studies.make(base, __doc__, variants, "drawn", PUBLISHED if base else None)
