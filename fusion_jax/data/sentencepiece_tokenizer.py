"""Runs a SentencePiece model (`tokenizer.model`) as Llama's tokenizers do."""

from pathlib import Path

import sentencepiece

from fusion_jax.data.pieces import NO_DUMMY_PREFIX, SPACE, Added, Pieces
from fusion_jax.data.tokenizer_base import VISION_END, VISION_START, Tokenizer, is_words
from fusion_jax.data.tokenizer_files import (
    added_tokens,
    declared_tokens,
    read_config,
    special_tokens,
)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, `model`, with added tokens: see `Pieces`."""

    def __init__(self, folder: Path, model: bytes):
        """Raises RuntimeError or ValueError if `model` is not a SentencePiece model."""
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        config, names = read_config(folder)
        self._pieces = {self.model.id_to_piece(i): i for i in range(len(self.model))}
        names.setdefault("unk_token", self.model.id_to_piece(self.model.unk_id()))
        added, special, strips = {}, set(), {}
        for i, token in declared_tokens(folder, config):
            added[token["content"]] = i
            strips[token["content"]] = (token["lstrip"], token["rstrip"])
            if token["special"]:
                special.add(token["content"])
        for token, i in added_tokens(folder).items():
            added.setdefault(token, i)
        for token in (*names.values(), *special_tokens(folder, config)):
            if token in self._pieces or token in added:
                added.setdefault(token, self._pieces.get(token))
                special.add(token)
        size = max([len(self.model) - 1, *added.values()]) + 1
        for token in (VISION_START, VISION_END):
            if token not in added:
                added[token] = self._pieces.get(token, size)
                size = max(size, added[token] + 1)
            special.add(token)
        self._strips = strips
        specials = {added[token] for token in special}
        entries = {token: Added(i, i in specials, *strips.get(token, (False, False))) for token, i in added.items()}
        self._text = Pieces(self.model, entries, names["unk_token"])
        self._bytes = [_piece_bytes(self.model, i) for i in range(len(self.model))]
        self.longest = max(map(len, [*self._bytes, *(token.encode() for token in added)]))
        # Symbols that the trainer was configured to keep whole; learned pieces have a score, and words are not marks.
        ids = [i for i in range(len(self.model)) if self.model.get_score(i) == 0 and self._bytes[i]]
        marks = {self.model.id_to_piece(i): i for i in ids if not self.model.is_byte(i)}
        marks = {piece: i for piece, i in marks.items() if len(piece) > 2 and not is_words(piece.replace(SPACE, " "))}
        first = added.get(names.get("bos_token", ""))
        super().__init__(folder, added, special, size, config, names, first, marks)

    @property
    def added(self) -> dict[str, int]:
        """Every added token's id."""
        return dict(self._added)

    def strips(self, token: str) -> tuple[bool, bool]:
        """Returns whether an added token takes the white space at its left, and at its right."""
        return self._strips.get(token, (False, False))

    def is_special(self, token: str) -> bool:
        """Returns whether an added token is a special one."""
        return self._added[token] in self._special_ids

    def _find(self, token: str | None) -> int | None:
        return self._added.get(token, self._pieces.get(token))

    def _encode(self, text: str) -> list[int]:
        return self._text.encode(text)

    def _decode(self, ids: list[int], skip_special: bool, inside: bool) -> str:
        out, first = bytearray(), not inside
        for i in ids:
            if i in self._added_names or i >= len(self._bytes) or not self._bytes[i]:
                if skip_special and (i in self._special_ids or i not in self._added_names):
                    continue
                out += self.token_bytes(i)
            else:
                # The first word's prefix is not a space of the text.
                strip = first and self.model.id_to_piece(i).startswith(SPACE)
                out += self._bytes[i][1:] if strip else self._bytes[i]
            first = False
        return out.decode("utf-8", errors="replace")

    def token_bytes(self, i: int) -> bytes:
        if i in self._added_names:
            return self._added_names[i].encode()
        if i >= len(self._bytes):  # ids of added tokens may leave a gap after those of the model
            return b""
        return self._bytes[i] or self.model.id_to_piece(i).encode()

    def is_control(self, i: int) -> bool:
        return super().is_control(i) or (i not in self._added_names and i < len(self._bytes) and not self._bytes[i])


def _piece_bytes(model: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    """Returns the UTF-8 bytes that id `i` stands for; empty for control and unknown pieces."""
    piece = model.id_to_piece(i)
    if model.is_byte(i):
        return bytes([int(piece[1:-1], 16)])
    return b"" if model.is_control(i) or model.is_unknown(i) else piece.replace(SPACE, " ").encode()
