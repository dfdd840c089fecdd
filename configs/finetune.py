"""Fine-tuning of any checkpoint on one accelerator (or more); the model, tokenizer and template are the checkpoint's.

python -m fusion_jax.convert import --vision SIGLIP-FOLDER --llm LLM-FOLDER --to weights/start
python -m fusion_jax.train --config configs/finetune.py:weights/start,runs/pictures --workdir runs/finetune
python -m fusion_jax.train --config configs/finetune.py:runs/finetune,data,all --workdir runs/finetune_all

CHECKPOINT,DATA[,PARTS]: DATA holds stage1.yaml, stage2.yaml and validation.json, as the data engine writes them. PARTS
is `connectors` (default: encoder and language model stay as they are, 4 bytes of memory for each of their parameters)
or `all` (16 bytes).
"""

from configs.common import complete
from fusion_jax import checkpoint
from fusion_jax.errors import UserError

FREEZE = {"connectors": ["^vision/", "^llm/"], "all": []}
TEXT = 256  # positions for words beside the image's tokens and latents


def get_config(arguments: str = ""):
    given = (arguments or "").split(",")
    if len(given) not in (2, 3) or given[-1:] == [""]:
        raise UserError("give --config configs/finetune.py:CHECKPOINT,DATA or :CHECKPOINT,DATA,all.")
    start, data, parts = (*given, "connectors")[:3]
    if parts not in FREEZE:
        raise UserError(f"config argument {parts!r} is unknown; allowed: {', '.join(FREEZE)}.")
    model = checkpoint.load_about(checkpoint.find(start))["config"]["model"]
    patches = (model["vision"]["image_size"] // model["vision"]["patch_size"]) ** 2

    def stage(name, **changes):
        return {
            "name": name,
            "data": f"{data}/{name}.yaml",
            "max_length": (model["image_tokens"] or patches) + max(model["latent_counts"]) + TEXT,
            "max_question_length": 128,
            "max_rounds": 4,
            "batch_size": 16,
            "accumulation": 2,
            "freeze": FREEZE[parts],
            **changes,
        }

    return complete(
        {
            "model": model,
            "init_from": start,
            "tokenizer": "",  # the checkpoint's
            "dtype": "bfloat16",
            "remat": "full",
            "stages": [
                stage("stage1", steps=200, learning_rate=1e-3),
                stage("stage2", steps=400, learning_rate=2e-4 if parts == "connectors" else 2e-5),
            ],
            "validation_data": f"{data}/validation.json",
            "validate_every": 200,
            "checkpoint_every": 200,
            "keep_checkpoints": 1,
            "loader_threads": 4,
        }
    )
