"""Attention pictures: `python -m fusion_jax.visualize --checkpoint DIR --image FILE --question TEXT --word WORD`.

Writes OUT.png and OUT.svg: where the model looks for that word, level by level (see `inference/attention_maps.py`
and docs/pictures.md). With --compare the model as trained stands above itself with a part switched off, or above
another checkpoint.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from fusion_jax.command_line.cli import run_main
from fusion_jax.errors import UserError, check
from fusion_jax.inference.attention_maps import Levels, levels
from fusion_jax.inference.attention_pictures import PARTS, draw, draw_side_by_side, save
from fusion_jax.models import config as model_config
from fusion_jax.models.fusion import Fusion
from fusion_jax.training import checkpoint

log = logging.getLogger("fusion_jax")


def look(
    folder: str, image: str, question: str, word: str, latents: int = 0, compare: Sequence[str] = ()
) -> dict[str, Levels]:
    """The levels of a checkpoint, and of what it is compared with, by the name that `draw_side_by_side` prints.

    Args:
      compare: A or C, switched off on the same weights; anything else is another checkpoint.

    Raises:
      UserError: as for `levels.levels` and `checkpoint.load_model`; the model was trained without A or C.
    """
    loaded = checkpoint.load_model(folder)

    def ask(loaded, exchange=True, **changes):
        model = Fusion(model_config.replace(loaded.config.model, **changes), jnp.dtype(loaded.config.dtype))
        return levels(
            model, loaded.params, loaded.config, loaded.tokenizer, image, question, word, latents, exchange=exchange
        )

    found = {"as trained": ask(loaded)}
    for other in compare:
        if other == "A":
            check(loaded.config.model.text_guided, "--compare A: this model was trained without text guidance.")
            found[PARTS["A"]] = ask(loaded, text_guided=False)
        elif other == "C":
            check(loaded.config.model.exchange_layers > 0, "--compare C: this model was trained without exchange.")
            found[PARTS["C"]] = ask(loaded, exchange=False)
        elif other == "B":
            raise UserError(
                "--compare B: the mapping loss acts in training alone; give a checkpoint that was trained without it."
            )
        else:
            found[f"other checkpoint: {other}"] = ask(checkpoint.load_model(other))
    return found


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "step folder, stage folder or workdir")
    flags.DEFINE_string("image", None, "image file")
    flags.DEFINE_string("question", None, "what to ask about the image")
    flags.DEFINE_multi_string("word", None, "a word of the question; several times: one figure each")
    flags.DEFINE_string("out", "figure", "OUT.png and OUT.svg are written; with several words OUT-1, OUT-2, ...")
    flags.DEFINE_string("layers", "all", "early, late, all, or numbers such as 0,3: layers of the encoder and the LLM")
    flags.DEFINE_string("heads", "mean", "mean, or numbers such as 0,3")
    flags.DEFINE_integer("latents", 0, "l^2, one of the trained; 0 for the middle one", lower_bound=0)
    flags.DEFINE_list("compare", [], "A, C: switched off on the same weights; or other checkpoints")


def main(argv: list[str]) -> None:
    del argv
    f = flags.FLAGS
    given = all((f.checkpoint, f.image, f.question, f.word))
    check(given, "Give --checkpoint DIR, --image FILE, --question TEXT and --word WORD.")
    for number, word in enumerate(f.word, 1):
        found = look(f.checkpoint, f.image, f.question, word, f.latents, f.compare)
        if f.compare:
            figure = draw_side_by_side(found, f.layers, f.heads)
        else:
            figure = draw(found["as trained"], f.layers, f.heads)
        out = Path(f.out)
        out = out if len(f.word) == 1 else out.with_name(f"{out.stem}-{number}")
        for path in save(figure, out):
            log.info("written: %s", path)


if __name__ == "__main__":
    _define_flags()
    run_main(main)
