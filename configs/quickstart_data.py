"""Makes the quickstart's data: small pictures of plain shapes, by the data engine without a model.

python -m fusion_jax.synthesize --config configs/quickstart_data.py --out runs/quickstart/data
python -m fusion_jax.synthesize --config configs/quickstart_data.py:100,50,100,20,20 --out small

After the colon are the numbers of samples of stage1, stage1_5 and stage2, for validation and for the test. All pictures
of the test have a pair of colour and shape that is in no other picture.
"""

from ml_collections import ConfigDict

from fusion_jax.errors import check

# One question in nine is multiple choice, the same share as among the questions that pictures are drawn for.
SHORT = {"conv_short": 43.0, "multi_choice": 5.0}
POOLS = {
    "stage1": ("train", {"caption_long": 1.0}),
    "stage1_5": ("train", {"conv_long": 1.0}),
    "stage2": ("train", SHORT),
    "validation": ("validation", SHORT),
    "held_out": ("held_out", SHORT),
}


def get_config(counts: str = ""):
    numbers = (counts or "7000,3000,7000,240,480").split(",")
    check(len(numbers) == len(POOLS), f"Give {len(POOLS)} counts after the colon: {', '.join(POOLS)}.")
    pools = []
    for (name, (split, kinds)), count in zip(POOLS.items(), numbers):
        kept = {} if split == "train" else {"split": name}
        pools.append({"path": f"embedded:shapes/{split}:{count}", "kinds": kinds, **kept})
    config = {
        "pools": pools,
        "kinds": {},
        "stages": dict.fromkeys(SHORT, "stage2"),
        "seed": 0,
        # The texts are few and plain on purpose: filters for texts from the web do not apply, texts need not differ,
        # and there is no score to choose by.
        "filters": dict.fromkeys(
            ("alphanumeric_min", "character_repetition_max", "word_repetition_max", "special_min", "special_max")
        ),
        "select": {"image_score_min": None, "text_similarity": None, "image_distance": -1},
        "judge": False,
        "images": {"backend": "embedded", "width": 96, "height": 96},
        "processes": 2,
        "shards": False,
        # Later stages keep some records of the earlier ones: a model from scratch that changes to new data abruptly
        # loses much of what its encoder has learned.
        "mixtures": {"stage1_5": {"stage1": "random:25%", "stage2": "random:50%"}, "stage2": {"stage1": "random:10%"}},
        "tokenizer": 600,
    }
    return ConfigDict(config)
