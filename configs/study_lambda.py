"""How much weight should the mapping loss have? The paper's 0, 0.01, 0.1, 0.5 and 1.

Expected: a small weight helps a little or changes nothing, and a large one harms, because both sides of the loss can
also agree by leaving out what differs between image and text, which is what the answers need. In the paper 0.01 is best
and 1 is worse than 0. Models that train from random weights should suffer earlier than pretrained ones: nothing keeps
their image tokens from collapsing.

python -m fusion_jax.study --config configs/study_lambda.py --out runs/lambda
python -m fusion_jax.study --config configs/study_lambda.py:configs/flare.py:l_3b --out runs/lambda_3b
"""

from configs import studies

PUBLISHED = {
    "source": "FLARE (ICLR 2026): 1M samples, pretrained encoder and language model.",
    "columns": ("MMBench",),
    "rows": {"0": (73.8,), "0.01": (75.2,), "0.1": (74.9,), "0.5": (74.1,), "1": (72.6,)},
}


def get_config(base: str = ""):
    """`base` is another run: `configs/flare.py:l_3b`."""
    variants = {name: {"model.mapping_loss_weight": float(name)} for name in PUBLISHED["rows"]}
    return studies.make(base, __doc__, variants, "0", PUBLISHED)
