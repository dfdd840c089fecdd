"""Does the vision encoder really read the question? The same models, guided at inference by other texts.

The language model always reads the question itself. The encoder reads it too (`right question`), another question of
the benchmark (`another question`), or nothing (`no question`).

Expected: if the encoder uses the question, another one sends it to the wrong thing, and accuracy falls on questions
about one of several things; without a question it should fall less, as nothing misleads it, although training has never
shown it an image alone. If the encoder ignores the question, all three are equal, whatever text-guided encoding gained
in `study_components`.

python -m fusion_jax.study --config configs/study_guide.py --out runs/guide
python -m fusion_jax.study --config configs/study_guide.py:configs/flare.py:l_3b --out runs/guide_3b
"""

from configs import studies

GUIDES = {"right question": "question", "another question": "other", "no question": "none"}


def get_config(base: str = ""):
    """`base` is another run: `configs/flare.py:l_3b`."""
    variants = {name: {"evaluation.guide": guide} for name, guide in GUIDES.items()}
    return studies.make(base, __doc__, variants, "right question")
