"""Talk to a checkpoint in the terminal: `python -m fusion_jax.chat --checkpoint DIR --image FILE`.

/image FILE   show another image and begin a new conversation; /image alone: none
/reset        begin a new conversation about the same image
/save FILE    write the conversation as a LLaVA record
/quit         end (so does Ctrl-D); Ctrl-C stops an answer
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from fusion_jax import checkpoint, generate
from fusion_jax.cli import run_main
from fusion_jax.config import DTYPES
from fusion_jax.data import conversation, image
from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.models.fusion import Fusion
from fusion_jax.sampling import Sampling

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


class Chat:
    """A conversation about an image. `say` takes a line and gives False at the end."""

    def __init__(self, answerer: generate.Answerer, how: Sampling, picture: str | None, write: Callable[[str], None]):
        self.answerer, self.how, self.write = answerer, how, write
        self.picture: Path | None = None
        self.turns: list[dict[str, str]] = []
        self.show(picture)

    def show(self, picture: str | None) -> None:
        """Another image, or none, and a new conversation. UserError where it cannot be read."""
        path = Path(picture).expanduser() if picture else None
        if path is not None:
            try:
                image.load_image(path)
            except BadRecord as error:
                raise UserError(f"{error}.") from error
        self.picture, self.turns = path, []

    def say(self, line: str) -> bool:
        line = line.strip()
        command, _, rest = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return False
            if command == "/image":
                self.show(rest.strip() or None)
                self.write(f"[{self.picture or 'no image'}; new conversation]\n")
            elif command == "/reset":
                self.turns = []
                self.write("[new conversation]\n")
            elif command == "/save":
                self.save(rest.strip())
            elif command.startswith("/"):
                self.write("Commands: /image FILE, /reset, /save FILE, /quit.\n")
            elif line:
                self.ask(line)
        except (UserError, BadRecord) as error:
            self.write(f"error: {error}\n")
        return True

    def ask(self, question: str) -> None:
        """Writes the answer as it comes. An answer that Ctrl-C stops counts as far as it came."""
        turns = [*self.turns, {"from": "human", "value": question.replace(conversation.IMAGE_TAG, "")}]
        answer = ""
        try:
            for piece in self.answerer.stream(Record("chat", self.picture, turns, "the conversation"), self.how):
                self.write(piece)
                answer += piece
        except KeyboardInterrupt:
            self.write(" [stopped]")
        self.write("\n")
        self.turns = [*turns, {"from": "gpt", "value": answer}]

    def save(self, name: str) -> None:
        if not name:
            raise UserError("Say where: /save FILE")
        record = {"id": "chat", "conversations": [dict(turn) for turn in self.turns]}
        if self.picture is not None and record["conversations"]:
            record["image"] = str(self.picture.absolute())
            first = record["conversations"][0]
            first["value"] = f"{conversation.IMAGE_TAG}\n{first['value']}"
        try:
            Path(name).expanduser().write_text(json.dumps([record], indent=2, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write {name}: {error.strerror}.") from error
        self.write(f"[{len(self.turns)} turns saved in {name}]\n")


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
            write("\n")
            continue
        if not chat.say(line):
            break


if __name__ == "__main__":
    run_main(main)
