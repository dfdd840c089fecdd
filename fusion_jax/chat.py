"""Chats with a checkpoint in the terminal: `python -m fusion_jax.chat --checkpoint DIR --image FILE`.

/image FILE   show another image and begin a new conversation; /image alone: no image
/reset        begin a new conversation about the same image
/save FILE    write the conversation as a LLaVA record
/quit         end (so does Ctrl-D); Ctrl-C stops an answer
"""

import sys

from absl import flags

from fusion_jax.command_line import interrupts
from fusion_jax.command_line.cli import run_main
from fusion_jax.config import DTYPES
from fusion_jax.errors import UserError
from fusion_jax.inference import generate
from fusion_jax.inference.prompts import drawn_latents
from fusion_jax.inference.sampling import Sampling
from fusion_jax.inference.terminal import Chat
from fusion_jax.models import weights
from fusion_jax.training.loading import load_model


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "checkpoint to load: step folder, stage folder or workdir")
    flags.DEFINE_string("image", None, "image file to talk about (default: none)")
    flags.DEFINE_enum("dtype", None, DTYPES, "dtype to compute in (default: that of training)")
    flags.DEFINE_enum(
        "weights", "full", weights.KINDS, "how to store weights: full, in the dtype of computation, or as int8"
    )
    flags.DEFINE_integer("max_tokens", 512, "longest answer in tokens")
    flags.DEFINE_float("temperature", 0.0, "temperature of sampling; 0 takes the most likely token")
    flags.DEFINE_integer("top_k", 0, "sample from this many of the most likely tokens; 0: from all")
    flags.DEFINE_float("top_p", 1.0, "sample from the most likely tokens that hold this share of the probability")
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1, tokens that have occurred become less likely")
    flags.DEFINE_integer("seed", 0, "seed of sampling, and of the latent count with --latents=-1")
    flags.DEFINE_integer(
        "latents", 0, "latents per round: l^2, one of the model's latent counts (0: its fixed count; -1: drawn by seed)"
    )


def main(argv: list[str]) -> None:
    f = flags.FLAGS
    if len(argv) > 1 or not f.checkpoint:
        raise UserError("Give --checkpoint DIR, and --image FILE to talk about an image.")
    how = Sampling(f.max_tokens, f.temperature, f.top_k, f.top_p, f.repetition_penalty, f.seed)
    loaded = load_model(f.checkpoint, f.dtype, f.weights)
    latents = drawn_latents(loaded.config.model, f.seed) if f.latents == -1 else f.latents or None
    answerer = generate.Answerer(loaded.model, loaded.params, loaded.config, loaded.tokenizer, rows=1, latents=latents)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    chat = Chat(answerer, how, f.image, write)
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
        if not chat.handle(line):
            break


if __name__ == "__main__":
    define_flags()
    run_main(main)
