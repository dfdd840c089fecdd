"""What should image and question see of each other in the early half of the encoder? The paper's mask, or others.

`paper`: the image does not see the text. `released`: it does, and the text attends uniformly, as in the published code.
`none`: no mask.

Expected: small differences. The paper's mask lets early layers find edges and colours undisturbed, which should help a
pretrained encoder, whose early layers have never seen text, more than one that trains from random weights. The released
mask gives the image a question whose tokens are averages, which can only be noise early on. Without a mask the question
acts over twice as many layers, so in small encoders `none` may win.

python -m fusion_jax.study --config configs/study_mask.py --out runs/mask
python -m fusion_jax.study --config configs/study_mask.py:configs/flare.py:l_3b --out runs/mask_3b
"""

from configs import studies


def get_config(base: str = ""):
    """`base` is another run: `configs/flare.py:l_3b`."""
    variants = {mask: {"model.mask": mask} for mask in ("paper", "released", "none")}
    return studies.make(base, __doc__, variants, "paper")
