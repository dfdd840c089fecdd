"""Encodes text with a SentencePiece model and added tokens, in training and in exported folders."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

SPACE = "▁"  # SentencePiece's visible stand-in for a space
# A protobuf message may be continued by appending: these bytes are `normalizer_spec { add_dummy_prefix: false }`
# (field 3, two bytes long; inside it field 3, value 0), and the last value of a field wins.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Added(NamedTuple):
    """An added token: its id, whether it is special, and whether it swallows white space before and after it."""

    id: int
    special: bool
    lstrip: bool
    rstrip: bool


class Pieces:
    """A SentencePiece model as Llama's tokenizers use it.

    Added tokens are cut out of the text first, the longest match first. The model adds no word prefix of its own; one
    "▁" goes before each text, and is dropped if a special token opens the text:

        "<|user|>\\n two cats<|end|>"   ->   <|user|>  two  ▁cats  <|end|>        (<|user|> takes the space after it)
        "two cats"                     ->   ▁two  ▁cats
    """

    def __init__(self, model: Any, added: Mapping[str, Added], guard: str):
        """Args:
        model: a `SentencePieceProcessor` whose file was continued by NO_DUMMY_PREFIX.
        added: all added tokens. guard: a token that the model knows, such as the one for unknown characters.
        """
        self.model, self.added, self.guard = model, added, guard
        self.splitter = re.compile("(" + "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) + ")")
        self.guard_length = len(model.encode(guard))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`."""
        if not text:
            return []
        # Odd items are added tokens, even items the text between them, which may be empty.
        parts = self.splitter.split(SPACE + text.replace(SPACE, " "))
        for k in range(1, len(parts), 2):
            token = self.added[parts[k]]
            if token.lstrip:
                parts[k - 1] = parts[k - 1].rstrip()
            if token.rstrip:
                parts[k + 1] = parts[k + 1].lstrip()
        if len(parts) > 1 and parts[0] == SPACE and self.added[parts[1]].special:
            parts[0] = ""
        ids = []
        for k, part in enumerate(parts):
            if k % 2:
                ids.append(self.added[part].id)
            elif part.startswith((SPACE, " ")):
                # Some models trim white space at the start of their input: begin it with something else.
                ids += self.model.encode(self.guard + part)[self.guard_length :]
            elif part:
                ids += self.model.encode(part)
        return ids
