"""Defines what all tokenizers share: text to ids and back, control tokens, the two vision tokens.

Every tokenizer ends in the two tokens that frame visual slots:

    ids   0 ........................ n-1 |       n              n+1      |
          what the folder defines        | <vision_start>  <vision_end>  |   vocab_size = n + 2

The two are appended after the folder's last id unless the folder already has them.
"""

import itertools
import re
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.data.tokenizer_files import (
    TOKENIZER_FILES,
    adds_bos,
    chat_template,
    fingerprint,
)
from fusion_jax.errors import UserError

VISION_START = "<vision_start>"
VISION_END = "<vision_end>"


class Tokenizer:
    """Turns text into ids and back. `load_tokenizer` creates it; two are equal if their files are.

    Attributes:
      folder: where the files are.
      fingerprint: hash of their contents.
      eos_id, pad_id, vision_start_id, vision_end_id: token ids.
      bos_id: id of the token that may open a text; None if the files name none (Qwen2).
      adds_bos: whether the files say that it does: `add_bos_token` in tokenizer_config.json, else what tokenizer.json
        puts before a text, else true for SentencePiece (as for transformers' Llama class).
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
        tokens by role; the id that the model's own file puts before a text; control tokens that the model itself
        recognises."""
        self.folder = folder
        self.fingerprint = fingerprint(folder)
        self._added = added
        self._added_names = {i: token for token, i in added.items()}
        self._special_ids = {added[token] for token in special}
        self.vocab_size = size
        if "eos_token" not in names:
            raise UserError(f"{folder}/tokenizer_config.json must name an eos_token.")
        self.tokens = names
        self.chat_template = chat_template(folder, config)
        declared = adds_bos(folder, config)
        self.adds_bos = first is not None if declared is None else declared
        self.bos_id = self.token_id(names["bos_token"]) if "bos_token" in names else None
        if declared is None and first is not None:
            self.bos_id = first
        if self.adds_bos and self.bos_id is None:
            raise UserError(f"{folder}/tokenizer_config.json says add_bos_token, but names no bos_token.")
        self.eos_id = self.token_id(names["eos_token"])
        self.vision_start_id = self.token_id(VISION_START)
        self.vision_end_id = self.token_id(VISION_END)
        # Padding must be a token that no text contains: the pad_token of many configs is a token that ends answers.
        choices = ("<|reserved_special_token_0|>", names.get("unk_token"), names.get("pad_token"), names["eos_token"])
        self.pad_id = next(i for i in map(self._find, choices) if i is not None)
        control = {token: i for token, i in added.items() if token in special or not is_words(token)} | (marks or {})
        control.pop("", None)  # it would match everywhere
        self._control = re.compile("|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)))
        self._known: dict[str, list[int]] = {}
        # Ordinary text may come out as the token for unknown characters.
        self._control_ids = {i for token, i in control.items() if token != names.get("unk_token")}

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Returns the ids of `text`; special tokens written in it are recognised, and no BOS is put before it.

        Args:
          text: any text.
          after: the id of the token that `text` follows. After an added token there is no SentencePiece word
            prefix, and some added tokens swallow the white space after them. None: `text` stands alone.
        """
        name = self._added_names.get(after)
        if name is None:
            return self._encode(text)
        return self._encode(name + text)[len(self._encode(name)) :]

    def encode_parts(self, parts: Sequence[tuple[str, bool]], after: int | None = None) -> list[int]:
        """Returns the ids of texts that follow each other, as `encode` does for all in one piece, except that control
        tokens which are written in a literal part are text there: special tokens, and others that are not words.

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
        # The second pass is for text that becomes a control token only when the tokenizer folds its characters.
        folded = [(unicodedata.normalize("NFKC", text) if literal else text, literal) for text, literal in parts]
        for some in (parts, folded):
            runs = self._cut(some)
            ids = [i for k, run in enumerate(runs) for i in self.encode(run, self.vision_end_id if k else after)]
            if clean(ids):
                return ids
        ids = []  # the tokenizer normalises in some other way: leave the control tokens out
        for text, literal in parts:
            new = self.encode(text, self.vision_end_id if ids else after)
            ids += [i for i in new if not (literal and i in self._control_ids)]
        return ids

    def _marks(self, text: str) -> list[int]:
        """Returns the control tokens of a text; templates consist of few texts, so all are kept."""
        if text not in self._known:
            self._known[text] = [i for i in self.encode(text) if i in self._control_ids]
        return self._known[text]

    def _cut(self, parts: Sequence[tuple[str, bool]]) -> list[str]:
        """Returns the whole text, cut inside every control token of a literal part: no half of one is recognised."""
        runs, run = [], []
        for text, literal in parts:
            at = 0
            while literal and (match := self._control.search(text, at)):
                runs.append("".join([*run, text[at : match.start() + 1]]))
                run, at = [], match.start() + 1
            run.append(text[at:])
        return [*runs, "".join(run)]

    def decode(self, ids: Sequence[int], skip_special: bool = True, inside: bool = False) -> str:
        """Returns the text of `ids`: the inverse of `encode` for ordinary sentences. Bytes that are not UTF-8 become
        U+FFFD, and the text continues after them: more ids change nothing of it but a U+FFFD at its end.

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
        """Returns the bytes that one id adds after others, for control tokens their names; empty if it has no text."""
        raise NotImplementedError

    def is_control(self, i: int) -> bool:
        """Returns whether an id is that of a control token, which no text contains."""
        return i in self._special_ids or i in self._control_ids

    def token_id(self, token: str) -> int:
        """Returns the id of one token. Raises UserError if the tokenizer does not have it."""
        i = self._find(token)
        if i is None:
            raise UserError(f"The tokenizer in {self.folder} has no token {token!r}.")
        return i

    def has_token(self, token: str) -> bool:
        """Returns whether the tokenizer has the token, so that `token_id(token)` does not raise."""
        return self._find(token) is not None

    def first_control(self, text: str) -> tuple[int, int] | None:
        """Returns where the first control token of a text begins and ends; None without one."""
        match = self._control.search(text)
        return match.span() if match else None

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer's files into `folder`, creating it; `load_tokenizer(folder)` then equals this one.

        Raises:
          UserError: the files have vanished or changed since loading.
        """
        folder = Path(folder)
        if fingerprint(self.folder) != self.fingerprint:
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
        from fusion_jax.data.tokenizer import load_tokenizer  # which needs the classes below this one

        # The libraries' own objects do not all survive pickling; a worker process reads the folder again.
        return load_tokenizer, (str(self.folder), True)  # its links were checked when it was loaded

    def _find(self, token: str | None) -> int | None:
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int], skip_special: bool, inside: bool) -> str:
        raise NotImplementedError


def _second(pair: tuple) -> object:
    return pair[1]


def is_words(token: str) -> bool:
    """Returns whether a token has letters, digits and spaces alone: words, or the spaces of an indented line."""
    return all(part.isalnum() for part in token.split())
