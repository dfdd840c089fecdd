"""Draws where a model looks for a word of a question.

    python -m fusion_jax.visualize --checkpoint DIR --image FILE --question TEXT --word WORD

Writes OUT.png and OUT.svg: where the model looks for that word, level by level (see `inference/attention_maps.py`
and docs/pictures.md). With --compare the model as trained stands above itself with a part switched off, or above
another checkpoint.
"""

import logging
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from fusion_jax.command_line.cli import run_main
from fusion_jax.errors import check
from fusion_jax.inference import attention_maps
from fusion_jax.inference.attention_maps import PARTS, without_part
from fusion_jax.inference.attention_pictures import draw, draw_side_by_side, save
from fusion_jax.models.fusion import Fusion
from fusion_jax.training.loading import load_model

log = logging.getLogger("fusion_jax")


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "checkpoint to load: step folder, stage folder or workdir")
    flags.DEFINE_string("image", None, "image file")
    flags.DEFINE_string("question", None, "question about the image")
    flags.DEFINE_multi_string("word", None, "word of the question to look for; repeat the flag for several figures")
    flags.DEFINE_string("out", "figure", "figure to write as OUT.png and OUT.svg; with several words OUT-1, OUT-2, ...")
    flags.DEFINE_string("layers", "all", "layers of the encoder and the LLM: early, late, all, or numbers such as 0,3")
    flags.DEFINE_string("heads", "mean", "attention heads: mean, or numbers such as 0,3")
    flags.DEFINE_integer(
        "latents", 0, "latents per round: l^2, one of the model's latent counts (0: its fixed count)", lower_bound=0
    )
    flags.DEFINE_list("compare", [], "models to draw below: A or C for that part switched off, or other checkpoints")


def main(argv: list[str]) -> None:
    del argv
    f = flags.FLAGS
    complete = all((f.checkpoint, f.image, f.question, f.word))
    check(complete, "Give --checkpoint DIR, --image FILE, --question TEXT and --word WORD.")

    loaded = load_model(f.checkpoint)
    levels: dict[str, dict[str, attention_maps.Levels]] = {word: {} for word in f.word}
    for other in ("", *f.compare):
        part = other if other in PARTS else ""
        shown = loaded if part == other else load_model(other)
        config, exchange = without_part(shown.config.model, part)
        model = Fusion(config, jnp.dtype(shown.config.dtype))
        name = PARTS[part] if part == other else f"other checkpoint: {other}"
        for word in f.word:
            levels[word][name] = attention_maps.levels(
                model, shown.params, shown.config, shown.tokenizer, f.image, f.question, word, f.latents, exchange
            )

    for number, one in enumerate(map(levels.get, f.word), 1):
        figure = draw_side_by_side(one, f.layers, f.heads) if f.compare else draw(*one.values(), f.layers, f.heads)
        out = Path(f.out)
        out = out if len(f.word) == 1 else out.with_name(f"{out.stem}-{number}")
        for path in save(figure, out):
            log.info("written: %s", path)


if __name__ == "__main__":
    define_flags()
    run_main(main)
