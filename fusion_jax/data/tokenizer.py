"""Loads a tokenizer from a local folder: SentencePiece or `tokenizer.json`; downloads nothing.

Both kinds give the interface of data/tokenizer_base.py.
"""

import os
from pathlib import Path

from fusion_jax.data.json_tokenizer import JsonTokenizer
from fusion_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from fusion_jax.data.tokenizer_base import Tokenizer
from fusion_jax.data.tokenizer_files import (
    MOST_BYTES,
    TOKENIZER_FILES,
    check_links,
    present,
)
from fusion_jax.errors import UserError
from fusion_jax.files import shown
from fusion_jax.values.foreign import read_bytes


def load_tokenizer(folder: str | Path, own: bool = False) -> Tokenizer:
    """Loads the tokenizer of a local folder; SentencePiece is preferred if the folder has both kinds.

    Args:
      folder: holds `tokenizer.model` or `tokenizer.json`, and beside it `tokenizer_config.json`.
      own: the user's config names the folder, so its files may be links to anywhere, as on clusters.

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
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as e:  # some key holds a value of another type
        detail = f"{type(e).__name__}: {shown(e)}"
        raise UserError(f"The tokenizer files in {folder} do not have the expected form ({detail}).") from e


def _load(folder: Path, own: bool) -> Tokenizer:
    model, data = folder / "tokenizer.model", folder / "tokenizer.json"
    names = {name for name in TOKENIZER_FILES if present(folder, name)}
    if not own:
        check_links(folder, names)
    if model.name in names:
        content = read_bytes(model, MOST_BYTES)
        try:
            return SentencePieceTokenizer(folder, content)
        except (RuntimeError, ValueError) as e:
            # Some Llama-3 folders hold a file of this name that is not a SentencePiece model, next to tokenizer.json.
            if data.name not in names:
                raise UserError(f"{model} is not a SentencePiece model; no tokenizer.json is beside it.") from e
    if data.name in names:
        return JsonTokenizer(folder, read_bytes(data, MOST_BYTES))
    raise UserError(f"The tokenizer folder {folder} holds neither tokenizer.model nor tokenizer.json.")
