"""Runs a `tokenizer.json` file with the `tokenizers` library."""

import itertools
import re
from pathlib import Path

import tokenizers

from fusion_jax.data.tokenizer_base import VISION_END, VISION_START, Tokenizer
from fusion_jax.data.tokenizer_files import (
    FLAGS,
    MOST_IDS,
    added_tokens,
    declared_tokens,
    read_config,
)
from fusion_jax.errors import UserError
from fusion_jax.files import shown

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how a vocabulary names a byte by itself
# Byte-level vocabularies (GPT-2's and later ones) write a byte as its Latin-1 letter if that is visible, and the others
# in their order as letters from U+0100 on.
_SEEN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_LETTERS = {chr(byte): byte for byte in _SEEN}
_LETTERS |= {chr(0x100 + k): byte for k, byte in enumerate(sorted(set(range(256)) - set(_SEEN)))}


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, folder: Path, data: bytes):
        config, names = read_config(folder)
        added_tokens(folder)  # tokenizer.json has the same tokens; but the file is saved too, and so must be valid
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            # Files may switch both on; they would pad or cut every text.
            self._model.no_padding()
            self._model.no_truncation()
            largest = max(self._model.get_vocab(True).values(), default=0)
            plain, framed = (self._model.encode("What is it?", add_special_tokens=frame).ids for frame in (False, True))
            self._model.decode(plain)
        except BaseException as e:  # the library raises bare Exception, and a BaseException of its own if it panics
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"{folder}/tokenizer.json is not a valid tokenizer file: {shown(e)}.") from e
        if largest >= MOST_IDS:
            raise UserError(f"{folder}/tokenizer.json has the token id {largest}, beyond {MOST_IDS:,}.")
        # Configs may declare tokens that tokenizer.json lacks; they come before ours so that ids agree with the config.
        for i, token in declared_tokens(folder, config):
            if self._model.token_to_id(token["content"]) is None:
                flags = {name: token[name] for name in FLAGS}
                self._model.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
                if self._model.token_to_id(token["content"]) != i:
                    raise UserError(
                        f"{folder}: token {token['content']!r} has id {i} in tokenizer_config.json, "
                        f"but tokenizer.json leaves {self._model.token_to_id(token['content'])} for it."
                    )
        self._model.add_special_tokens(
            [tokenizers.AddedToken(token, special=True, normalized=False) for token in (VISION_START, VISION_END)]
        )
        decoder = self._model.get_added_tokens_decoder()
        added = {token.content: i for i, token in decoder.items()}
        special = {token.content for token in decoder.values() if token.special}
        vocabulary = self._model.get_vocab(True)
        self.longest = max((len(token.encode()) for token in vocabulary), default=1)
        before = next((k for k in range(len(framed)) if framed[k : k + len(plain)] == plain), 0) if plain else 0
        if before > 1:
            raise UserError(f"{folder}/tokenizer.json puts {before} tokens before a text; one is supported.")
        first = framed[0] if before else None
        super().__init__(folder, added, special, max(vocabulary.values()) + 1, config, names, first)
        self._decoder = self._model.decoder
        written = {} if self._decoder is None else {i: _BYTE.fullmatch(name) for name, i in vocabulary.items()}
        falls_back = any(written.values()) and self._decoder.decode(["a", "<0x62>"]) == "ab"
        self._bytes = {i: int(match[1], 16) for i, match in written.items() if match} if falls_back else {}
        self._byte_level = self._decoder is not None and self._decoder.decode(["a", "\u0120"]) == "a "

    def _find(self, token: str | None) -> int | None:
        return None if token is None else self._model.token_to_id(token)

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int], skip_special: bool, inside: bool) -> str:
        if not inside and self._bytes.keys().isdisjoint(ids):
            return self._model.decode(ids, skip_special_tokens=skip_special)
        ids = [i for i in ids if not (skip_special and i in self._special_ids)]
        # The library drops all bytes that follow each other, valid text among them, if one of them is wrong.
        tokens = ["a"] if inside else []
        for is_byte, run in itertools.groupby(ids, self._bytes.__contains__):
            if is_byte:
                text = bytes(self._bytes[i] for i in run).decode("utf-8", errors="replace")
                tokens += [f"<0x{byte:02X}>" for byte in text.encode()]
            else:
                tokens += [name for name in map(self._model.id_to_token, run) if name is not None]
        return self._joined(tokens)[inside:]

    def _joined(self, tokens: list[str]) -> str:
        return " ".join(tokens) if self._decoder is None else self._decoder.decode(tokens)

    def token_bytes(self, i: int) -> bytes:
        name = self._model.id_to_token(i)
        if name is None:
            return b""
        if i in self._added_names:
            return name.encode()
        if i in self._bytes:
            return bytes([self._bytes[i]])
        if self._byte_level and all(letter in _LETTERS for letter in name):
            return bytes(_LETTERS[letter] for letter in name)
        return self._joined(["a", name])[1:].encode()
