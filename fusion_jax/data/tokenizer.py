"""Tokenizers from a local folder: SentencePiece (`tokenizer.model`) or `tokenizer.json`; nothing is ever downloaded.

Both kinds give the same small interface, and both end in the two tokens that frame visual slots:

    ids   0 ........................ n-1 |       n              n+1      |
          what the folder defines        | <vision_start>  <vision_end>  |   vocab_size = n + 2

The two are appended after the folder's last id unless the folder already has them.
"""

import hashlib
import itertools
import os
import re
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from fusion_jax.data.pieces import NO_DUMMY_PREFIX, SPACE, Added, Pieces
from fusion_jax.data.tokenizer_files import (
    FLAGS,
    MOST_BYTES,
    MOST_IDS,
    added_tokens,
    adds_bos,
    chat_template,
    check_links,
    declared_tokens,
    present,
    read_config,
    special_tokens,
)
from fusion_jax.errors import UserError
from fusion_jax.files import read_file, shown
from fusion_jax.values.foreign import read_bytes

VISION_START = "<vision_start>"
VISION_END = "<vision_end>"
# Everything that decides what a tokenizer does; these are read, hashed and saved.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how a vocabulary names a byte by itself
# How byte-level vocabularies (GPT-2's and those after it) write bytes: as the Latin-1 letter where that can be seen,
# the others in their order as letters from U+0100 on.
_SEEN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_LETTERS = {chr(byte): byte for byte in _SEEN}
_LETTERS |= {chr(0x100 + k): byte for k, byte in enumerate(sorted(set(range(256)) - set(_SEEN)))}


class Tokenizer:
    """Text to ids and back. Made by `load_tokenizer`; two are equal when their files are.

    Attributes:
      folder: where the files lie.
      fingerprint: hash of their contents.
      eos_id, pad_id, vision_start_id, vision_end_id: token ids.
      bos_id: of the token that may open a text; None where the files name none (Qwen2).
      adds_bos: whether the files say that it does: `add_bos_token` in tokenizer_config.json, else what tokenizer.json
        puts in front of a text, else true for SentencePiece (as for transformers' Llama class).
      tokens: bos, eos, unk and pad token by role (`bos_token` and so on), those that the files name.
      chat_template: Jinja text of the folder's own chat template, and the file that has it; None without one.
      vocab_size: number of ids, the two vision tokens included.
      longest: bytes of text that one token stands for at most.
    """

    longest: int

    def __init__(
        self,
        folder: Path,
        added: dict[str, int],
        special: set[str],
        size: int,
        config: dict[str, Any],
        names: dict[str, str],
        first: int | None,
        marks: dict[str, int] | None = None,
    ):
        """Args: the folder; every added token's id; which of them are special; number of ids; tokenizer_config.json;
        tokens by role; the id that the model's own file puts in front of a text; control tokens that the model itself
        recognises."""
        self.folder = folder
        self.fingerprint = _fingerprint(folder)
        self._added = added
        self._added_names = {i: token for token, i in added.items()}
        self._special_ids = {added[token] for token in special}
        self.vocab_size = size
        if "eos_token" not in names:
            raise UserError(f"{folder}/tokenizer_config.json must name an eos_token.")
        self.tokens = names
        self.chat_template = chat_template(folder, config)
        asked = adds_bos(folder, config)
        self.adds_bos = first is not None if asked is None else asked
        self.bos_id = self.token_id(names["bos_token"]) if "bos_token" in names else None
        if asked is None and first is not None:
            self.bos_id = first
        if self.adds_bos and self.bos_id is None:
            raise UserError(f"{folder}/tokenizer_config.json says add_bos_token, but names no bos_token.")
        self.eos_id = self.token_id(names["eos_token"])
        self.vision_start_id = self.token_id(VISION_START)
        self.vision_end_id = self.token_id(VISION_END)
        # Padding must be a token that no text contains: the pad_token of many configs is a token that ends answers.
        choices = ("<|reserved_special_token_0|>", names.get("unk_token"), names.get("pad_token"), names["eos_token"])
        self.pad_id = next(i for i in map(self._find, choices) if i is not None)
        control = {token: i for token, i in added.items() if token in special or not _is_words(token)} | (marks or {})
        control.pop("", None)  # it would be everywhere
        self._control = re.compile("|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)))
        self._known: dict[str, list[int]] = {}
        # Ordinary text may come out as the token for unknown characters.
        self._control_ids = {i for token, i in control.items() if token != names.get("unk_token")}

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Ids of `text`; special tokens written in it are recognised, and no BOS is put in front.

        Args:
          text: any text.
          after: the id of the token that `text` follows. Behind an added token there is no SentencePiece word
            prefix, and some added tokens swallow the white space behind them. None: `text` stands alone.
        """
        name = self._added_names.get(after)
        if name is None:
            return self._encode(text)
        return self._encode(name + text)[len(self._encode(name)) :]

    def encode_parts(self, parts: Sequence[tuple[str, bool]], after: int | None = None) -> list[int]:
        """Ids of texts that follow each other, as `encode` gives them for all of it in one piece, except that control
        tokens which are written in a literal part are text there: special tokens, and others that are no words.

        Args:
          parts: texts, and whether each is literal.
          after: as in `encode`.
        """
        parts = [("".join(text for text, _ in some), literal) for literal, some in itertools.groupby(parts, _second)]
        ids = self.encode("".join(text for text, _ in parts), after)
        if not any(literal for _, literal in parts):
            return ids
        own = [i for text, literal in parts if not literal for i in self._marks(text)]

        def clean(ids: list[int]) -> bool:
            return [i for i in ids if i in self._control_ids] == own

        if clean(ids) and not any(literal and self._control.search(text) for text, literal in parts):
            return ids
        # The second time for what is a control token only once the tokenizer has folded its characters.
        folded = [(unicodedata.normalize("NFKC", text) if literal else text, literal) for text, literal in parts]
        for some in (parts, folded):
            runs = self._cut(some)
            ids = [i for k, run in enumerate(runs) for i in self.encode(run, self.vision_end_id if k else after)]
            if clean(ids):
                return ids
        ids = []  # some other normalisation: without them
        for text, literal in parts:
            new = self.encode(text, self.vision_end_id if ids else after)
            ids += [i for i in new if not (literal and i in self._control_ids)]
        return ids

    def _marks(self, text: str) -> list[int]:
        """The control tokens of a text, one of the few that templates are made of."""
        if text not in self._known:
            self._known[text] = [i for i in self.encode(text) if i in self._control_ids]
        return self._known[text]

    def _cut(self, parts: Sequence[tuple[str, bool]]) -> list[str]:
        """The whole text, cut inside every control token of a literal part: no half of one is recognised."""
        runs, run = [], []
        for text, literal in parts:
            at = 0
            while literal and (found := self._control.search(text, at)):
                runs.append("".join([*run, text[at : found.start() + 1]]))
                run, at = [], found.start() + 1
            run.append(text[at:])
        return [*runs, "".join(run)]

    def decode(self, ids: Sequence[int], skip_special: bool = True, inside: bool = False) -> str:
        """The text of `ids`: the inverse of `encode` for ordinary sentences. Bytes that are no UTF-8 become U+FFFD, and
        the text goes on behind them: more ids change nothing of it but U+FFFD at its end.

        Args:
          inside: the ids follow others, so that a space in front of their first word belongs to the text.

        Raises:
          ValueError: an id outside 0 .. vocab_size - 1 (a placeholder or a padded logit, which is a caller's mistake).
        """
        ids = [int(i) for i in ids]
        if any(not 0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"token ids must lie in 0..{self.vocab_size - 1}, got {ids}")
        return self._decode(ids, skip_special, inside)

    def token_bytes(self, i: int) -> bytes:
        """What one id adds to a text behind others, for control tokens their names; empty where it has no text."""
        raise NotImplementedError

    def is_control(self, i: int) -> bool:
        """Whether an id is that of a control token, which no text contains."""
        return i in self._special_ids or i in self._control_ids

    def token_id(self, token: str) -> int:
        """The id of one token. UserError when the tokenizer does not have it."""
        found = self._find(token)
        if found is None:
            raise UserError(f"The tokenizer in {self.folder} has no token {token!r}.")
        return found

    def has_token(self, token: str) -> bool:
        """Whether `token_id(token)` would find it."""
        return self._find(token) is not None

    def first_control(self, text: str) -> tuple[int, int] | None:
        """Where the first control token of a text begins and ends; None without one."""
        found = self._control.search(text)
        return found.span() if found else None

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer's files into `folder` (made if needed); `load_tokenizer(folder)` then equals this one.

        Raises:
          UserError: the files have gone or changed since loading.
        """
        folder = Path(folder)
        if _fingerprint(self.folder) != self.fingerprint:
            raise UserError(f"The tokenizer files in {self.folder} changed or vanished since they were loaded.")
        folder.mkdir(parents=True, exist_ok=True)
        if folder.samefile(self.folder):
            return
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)  # a leftover of another tokenizer would mix with this one
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def __eq__(self, other) -> bool:
        return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self):
        # The libraries' own objects do not all survive pickling; a worker process reads the folder again.
        return load_tokenizer, (str(self.folder), True)  # its links were looked at when it was loaded

    def _find(self, token: str | None) -> int | None:
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int], skip_special: bool, inside: bool) -> str:
        raise NotImplementedError


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
        # Symbols that its trainer was told to keep whole; learnt pieces have a score, and words are no marks.
        ids = [i for i in range(len(self.model)) if self.model.get_score(i) == 0 and self._bytes[i]]
        marks = {self.model.id_to_piece(i): i for i in ids if not self.model.is_byte(i)}
        marks = {piece: i for piece, i in marks.items() if len(piece) > 2 and not _is_words(piece.replace(SPACE, " "))}
        first = added.get(names.get("bos_token", ""))
        super().__init__(folder, added, special, size, config, names, first, marks)

    @property
    def added(self) -> dict[str, int]:
        """Every added token's id."""
        return dict(self._added)

    def strips(self, token: str) -> tuple[bool, bool]:
        """Whether an added token takes the white space at its left, and at its right."""
        return self._strips.get(token, (False, False))

    def is_special(self, token: str) -> bool:
        """Whether an added token is a special one."""
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
                # The first word's prefix is no space of the text.
                strip = first and self.model.id_to_piece(i).startswith(SPACE)
                out += self._bytes[i][1:] if strip else self._bytes[i]
            first = False
        return out.decode("utf-8", errors="replace")

    def token_bytes(self, i: int) -> bytes:
        if i in self._added_names:
            return self._added_names[i].encode()
        if i >= len(self._bytes):  # ids of added tokens may leave a gap behind the model's own
            return b""
        return self._bytes[i] or self.model.id_to_piece(i).encode()

    def is_control(self, i: int) -> bool:
        return super().is_control(i) or (i not in self._added_names and i < len(self._bytes) and not self._bytes[i])


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, folder: Path, data: bytes):
        config, names = read_config(folder)
        added_tokens(folder)  # tokenizer.json says the same itself; but the file is kept, and must be one
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            # Files may ask for both; they would fill up or cut every text.
            self._model.no_padding()
            self._model.no_truncation()
            largest = max(self._model.get_vocab(True).values(), default=0)
            plain, framed = (self._model.encode("What is it?", add_special_tokens=given).ids for given in (False, True))
            self._model.decode(plain)
        except BaseException as e:  # the library raises bare Exception, and a BaseException of its own where it panics
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"{folder}/tokenizer.json is no valid tokenizer file: {shown(e)}.") from e
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
            raise UserError(f"{folder}/tokenizer.json puts {before} tokens in front of a text; one is supported.")
        first = framed[0] if before else None
        super().__init__(folder, added, special, max(vocabulary.values()) + 1, config, names, first)
        self._decoder = self._model.decoder
        written = {} if self._decoder is None else {i: _BYTE.fullmatch(name) for name, i in vocabulary.items()}
        falls_back = any(written.values()) and self._decoder.decode(["a", "<0x62>"]) == "ab"
        self._bytes = {i: int(found[1], 16) for i, found in written.items() if found} if falls_back else {}
        self._byte_level = self._decoder is not None and self._decoder.decode(["a", "\u0120"]) == "a "

    def _find(self, token: str | None) -> int | None:
        return None if token is None else self._model.token_to_id(token)

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int], skip_special: bool, inside: bool) -> str:
        if not inside and self._bytes.keys().isdisjoint(ids):
            return self._model.decode(ids, skip_special_tokens=skip_special)
        ids = [i for i in ids if not (skip_special and i in self._special_ids)]
        # The library gives up all bytes that follow each other, and so what was text before, for one that is wrong.
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


def load_tokenizer(folder: str | Path, own: bool = False) -> Tokenizer:
    """Loads the tokenizer of a local folder; SentencePiece goes first where the folder has both kinds.

    Args:
      folder: holds `tokenizer.model` or `tokenizer.json`, and beside it `tokenizer_config.json`.
      own: the user's config names the folder: its files may be links to anywhere, as clusters make them.

    Raises:
      UserError: the folder or its files are missing or unreadable.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise UserError(
            f"There is no tokenizer folder {shown(folder, 1000)}: it must hold tokenizer.model or tokenizer.json."
        )
    folder = folder.resolve()
    try:
        return _load(folder, own)
    except OSError as e:
        raise UserError(f"Cannot read the tokenizer file {e.filename or folder}: {e.strerror or e}.") from e
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as e:  # some key holds what it should not
        said = f"{type(e).__name__}: {shown(e)}"
        raise UserError(f"The tokenizer files in {folder} are not of the form that is expected ({said}).") from e


def _load(folder: Path, own: bool) -> Tokenizer:
    model, data = folder / "tokenizer.model", folder / "tokenizer.json"
    found = {name for name in TOKENIZER_FILES if present(folder, name)}
    if not own:
        check_links(folder, found)
    if model.name in found:
        content = read_bytes(model, MOST_BYTES)
        try:
            return SentencePieceTokenizer(folder, content)
        except (RuntimeError, ValueError) as e:
            # Some Llama-3 folders hold a file of this name that is no SentencePiece model, next to tokenizer.json.
            if data.name not in found:
                raise UserError(f"{model} is no SentencePiece model, and there is no tokenizer.json beside it.") from e
    if data.name in found:
        return JsonTokenizer(folder, read_bytes(data, MOST_BYTES))
    raise UserError(f"The tokenizer folder {folder} holds neither tokenizer.model nor tokenizer.json.")


def _second(pair: tuple) -> object:
    return pair[1]


def _is_words(token: str) -> bool:
    """Whether a token is of letters, digits and spaces alone: words, or the spaces of an indented line."""
    return all(part.isalnum() for part in token.split())


def _piece_bytes(model: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    """The UTF-8 bytes that id `i` stands for; empty for control and unknown pieces."""
    piece = model.id_to_piece(i)
    if model.is_byte(i):
        return bytes([int(piece[1:-1], 16)])
    return b"" if model.is_control(i) or model.is_unknown(i) else piece.replace(SPACE, " ").encode()


def _fingerprint(folder: Path) -> str:
    """Hash of the names and contents of the tokenizer files in `folder`."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            content = read_file(folder / name)
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()
