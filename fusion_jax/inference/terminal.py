"""Holds the conversation of `fusion_jax.chat`, and carries out its lines and commands."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from fusion_jax.command_line import interrupts
from fusion_jax.data import conversation, image
from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.inference import generate
from fusion_jax.inference.sampling import Sampling

# Control characters, which a terminal obeys rather than shows; line breaks and tabs are text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Chat:
    """A conversation about an image. `handle` takes a line and returns False at the end."""

    def __init__(self, answerer: generate.Answerer, how: Sampling, picture: str | None, write: Callable[[str], None]):
        self.answerer, self.how, self.write = answerer, how, write
        self.picture: Path | None = None
        self.turns: list[dict[str, str]] = []
        self.begin(picture)

    def begin(self, picture: str | None) -> None:
        """Begins a new conversation about an image, or without one. Raises UserError where the image cannot be read."""
        path = Path(picture).expanduser() if picture else None
        if path is not None:
            try:
                image.load_image(path)
            except BadRecord as error:
                raise UserError(f"{error}.") from error
        self.picture, self.turns = path, []

    def handle(self, line: str) -> bool:
        line = line.strip()
        command, _, rest = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return False
            if command == "/image":
                self.begin(rest.strip() or None)
                self.write(f"[{self.picture or 'no image'}; new conversation]\n")
            elif command == "/reset":
                self.turns = []
                self.write("[new conversation]\n")
            elif command == "/save":
                self.save(rest.strip())
            elif command.startswith("/"):
                self.write("Commands: /image FILE, /reset, /save FILE, /quit.\n")
            elif line:
                self.answer(line)
        except (UserError, BadRecord) as error:
            self.write(f"error: {error}\n")
        return True

    def answer(self, question: str) -> None:
        """Writes the answer while it is generated. An answer that Ctrl-C stops stays in the conversation unfinished."""
        turns = [*self.turns, {"from": "human", "value": question}]
        record = Record("chat", self.picture, turns, "the conversation", literal=True)
        answer = ""
        try:
            for piece in self.answerer.stream(record, self.how):
                self.write(_CONTROL.sub("", piece))
                answer += piece
        except KeyboardInterrupt:
            interrupts.answered()
            self.write(" [stopped]")
        self.write("\n")
        self.turns = [*turns, {"from": "gpt", "value": answer}]

    def save(self, name: str) -> None:
        if not name:
            raise UserError("Name the file: /save FILE")
        # In a record the tag always stands for an image, so typed ones are removed.
        turns = [turn | {"value": turn["value"].replace(conversation.IMAGE_TAG, "")} for turn in self.turns]
        record = {"id": "chat", "conversations": turns}
        if self.picture is not None and record["conversations"]:
            record["image"] = str(self.picture.absolute())
            first = record["conversations"][0]
            first["value"] = f"{conversation.IMAGE_TAG}\n{first['value']}"
        try:
            text = json.dumps([record], indent=2, ensure_ascii=False)  # typed text may not be valid UTF-8
            Path(name).expanduser().write_text(text, encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"Cannot write {name}: {error.strerror}.") from error
        self.write(f"[{len(self.turns)} turns saved in {name}]\n")
