"""Talk to a checkpoint in the terminal: `python -m fusion_jax.chat --checkpoint DIR --image FILE`.

/image FILE   show another image and begin a new conversation; /image alone: none
/reset        begin a new conversation about the same image
/save FILE    write the conversation as a LLaVA record
/quit         end (so does Ctrl-D); Ctrl-C stops an answer
"""

import sys

import jax.numpy as jnp
from absl import flags

from fusion_jax.command_line import interrupts
from fusion_jax.command_line.cli import run_main
from fusion_jax.config import DTYPES
from fusion_jax.errors import UserError
from fusion_jax.inference import generate
from fusion_jax.inference.sampling import Sampling
from fusion_jax.inference.terminal import Chat
from fusion_jax.models.fusion import Fusion
from fusion_jax.training import checkpoint

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "step folder, stage folder or workdir")
_IMAGE = flags.DEFINE_string("image", None, "image to talk about")
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "compute; by default the training's")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 512, "longest answer in tokens")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the likeliest words")
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw among so many tokens, 0 for all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "draw among the likeliest tokens that hold this share")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "above 1: say new words")
_SEED = flags.DEFINE_integer("seed", 0, "of the draws")
_LATENTS = flags.DEFINE_integer("latents", 0, "l^2, one of the model's latent counts; 0: its fixed one, -1: by seed")


def main(argv: list[str]) -> None:
    if len(argv) > 1 or not _CHECKPOINT.value:
        raise UserError("Give --checkpoint DIR, and --image FILE to talk about an image.")
    how = Sampling(
        _MAX_TOKENS.value, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _PENALTY.value, _SEED.value
    )  # fmt: skip
    loaded = checkpoint.load_model(_CHECKPOINT.value)
    model = Fusion(loaded.config.model, jnp.dtype(_DTYPE.value or loaded.config.dtype))
    latents = _LATENTS.value or None
    if _LATENTS.value == -1:
        latents = generate.drawn_latents(loaded.config.model, _SEED.value)
    answerer = generate.Answerer(model, loaded.params, loaded.config, loaded.tokenizer, rows=1, latents=latents)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    chat = Chat(answerer, how, _IMAGE.value, write)
    write(f"{loaded.folder}; the first answer compiles. /image FILE, /reset, /save FILE, /quit.\n")
    while True:
        try:
            line = input("> ")
        except EOFError:
            break
        except KeyboardInterrupt:
            interrupts.answered()
            write("\n")
            continue
        if not chat.say(line):
            break


if __name__ == "__main__":
    run_main(main)
