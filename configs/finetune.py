"""Fine-tunes any checkpoint, with its own tokenizer and template, on one accelerator or more.

python -m fusion_jax.convert import --vision SIGLIP-FOLDER --llm LLM-FOLDER --out weights/start
python -m fusion_jax.train --config configs/finetune.py:weights/start,runs/pictures --workdir runs/finetune
python -m fusion_jax.train --config configs/finetune.py:runs/finetune,my.json --workdir runs/mine
python -m fusion_jax.train --config configs/finetune.py:runs/finetune,my.json,all --workdir runs/mine_all

The arguments are CHECKPOINT,DATA[,PARTS]. DATA may be a folder as the data engine writes it: each of its stage1.yaml,
stage1_5.yaml and stage2.yaml becomes a stage, and its validation.json is used for validation. Or DATA is anything that
a stage's `data` may be (.json, .jsonl, .yaml, a folder of shards, tfds:NAME:SPLIT): then there is one stage of one
epoch; --config.stages[0].epochs=3 makes it three epochs.

PARTS is `connectors` (default) or `all`. With `connectors` the encoder and the language model are frozen and take 4
bytes of memory for each parameter; the projectors, latents, exchange layers and the embeddings of the two tokens that
frame an image are trained. `all` trains everything and takes 16 bytes for each parameter.
"""

import tempfile
from pathlib import Path

from configs.common import STAGES, complete
from fusion_jax.config import from_dict, to_dict
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError, check_choice
from fusion_jax.models.config import FusionConfig
from fusion_jax.training.about import load_about, save_tokenizer
from fusion_jax.training.loading import find_checkpoint

FROZEN = ("^vision/", "^llm/(?!.*/exchange/)")  # the exchange layers are among the language model's
PARTS = ("connectors", "all")
CONVERSATIONS, WORDS = 4, 128  # conversations that a row has room for, and text tokens of each


def get_config(arguments: str = ""):
    values = (arguments or "").split(",")
    if len(values) not in (2, 3) or not all(values):
        raise UserError("give --config configs/finetune.py:CHECKPOINT,DATA or :CHECKPOINT,DATA,all.")
    start, data, parts = (*values, "connectors")[:3]
    check_choice("config argument: PARTS ", parts, PARTS)
    about = load_about(find_checkpoint(start))
    sizes = from_dict(FusionConfig, about["config"]["model"], "config.model")
    image = sizes.tokens_per_image + sizes.most_tile_tokens
    visual = image + max(sizes.latent_counts, default=0)
    alone = parts == "connectors"

    def stage(name, data, **changes):
        return {
            "name": name,
            "data": str(data),
            "max_length": CONVERSATIONS * (visual + WORDS),
            "max_question_length": 128,
            "max_rounds": 16,
            "packing": True,
            "batch_size": 32,
            "accumulation": 2,
            "learning_rate": 2e-4 if alone else 2e-5,
            "freeze": FROZEN if alone else (),
            "learn_rows": framing_tokens(about) if alone else (),
            **changes,
        }

    folder = Path(data)
    present = [name for name in STAGES if (folder / f"{name}.yaml").is_file()]
    if present:
        # New projectors are trained first, at a higher rate.
        changes = {
            "stage1": {"steps": 200, "learning_rate": 1e-3 if alone else 1e-4},
            "stage1_5": {"steps": 200},
            "stage2": {"steps": 400},
        }
        stages = [stage(name, folder / f"{name}.yaml", **changes[name]) for name in present]
    elif folder.is_dir() and not (folder / "manifest.json").is_file():
        names = ", ".join(f"{name}.yaml" for name in STAGES)
        raise UserError(f"config argument {data!r} is a folder without {names}; name one of your files instead.")
    else:
        stages = [stage("finetune", data)]
    validation = folder / "validation.json"
    return complete(
        {
            "model": to_dict(sizes),
            "init_from": start,
            "tokenizer": "",  # the checkpoint's
            "dtype": "bfloat16",
            "remat": "full",
            "stages": stages,
            "validation_data": str(validation) if present and validation.is_file() else "",
            "validate_every": 200,
            "checkpoint_every": 200,
            "keep_checkpoints": 1,
            "loader_threads": 4,
        }
    )


def framing_tokens(about: dict) -> tuple[int, int]:
    """Ids of the two tokens around an image, which language models do not have by themselves."""
    with tempfile.TemporaryDirectory() as files:
        save_tokenizer(about, Path(files))
        tokenizer = load_tokenizer(files)
    return tokenizer.vision_start_id, tokenizer.vision_end_id
