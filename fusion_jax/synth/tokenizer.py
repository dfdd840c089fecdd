"""Trains a small SentencePiece vocabulary and writes it as a Phi-3 tokenizer folder.

The ids are those of the released tokenizers, but fewer:

    0 <unk>   1 <s>   2 </s>   3..258 single bytes   259.. pieces   V <|endoftext|>   V+1 <|assistant|> ... V+4 <|user|>

The chat marks come after SentencePiece's own vocabulary of V pieces: SentencePiece does not know them, and loaders of
the folder split the text at them first.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterable

import sentencepiece

# Order of ids, and whether the white space to the right of the mark belongs to it.
ADDED_TOKENS = (
    ("<|endoftext|>", False),
    ("<|assistant|>", True),
    ("<|system|>", True),
    ("<|end|>", False),
    ("<|user|>", True),
)
EOS = "<|endoftext|>"
# Part of every row of the Phi-3 template: it is repeated so often that it becomes few tokens.
_SYSTEM = ["You are a helpful AI assistant."] * 20


def train_tokenizer(texts: Iterable[str], folder: str | os.PathLike, vocab_size: int) -> pathlib.Path:
    """Trains on `texts` and writes `tokenizer.model` and the three JSON files of a Phi-3 tokenizer.

    The result depends only on the texts and their order.

    Args:
      texts: training texts.
      folder: the folder for the files; created where missing.
      vocab_size: the number of pieces, 259 of which are the bytes and the three control pieces. Where the texts are too
        small to fill it, the vocabulary is smaller.

    Returns:
      The folder.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A line break is a byte piece; SentencePiece reads its training text line by line anyway.
    lines = [line for text in itertools.chain(_SYSTEM, texts) for line in text.split("\n") if line.strip()]
    model = folder / "tokenizer.model"
    with model.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=stream,
            # On so few different sentences, Unigram splits common words, while merging pairs ends with whole words.
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            # Decoding restores the text exactly: no characters are folded and no spaces are joined.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            shuffle_input_sentence=False,
            input_sentence_size=0,
            minloglevel=2,
        )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    added = {token: pieces + i for i, (token, _) in enumerate(ADDED_TOKENS)}
    _write_json(folder / "added_tokens.json", dict(sorted(added.items())))
    extra = [token for token, _ in ADDED_TOKENS if token != EOS]
    rstrip = dict(ADDED_TOKENS)
    _write_json(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": [_token(token, rstrip[token]) for token in extra],
            "bos_token": _token("<s>"),
            "eos_token": _token(EOS),
            "pad_token": _token(EOS),
            "unk_token": _token("<unk>"),
        },
    )
    decoder = {0: "<unk>", 1: "<s>", **{i: token for token, i in added.items()}}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": True,
            "added_tokens_decoder": {
                str(i): _token(token, rstrip.get(token, False)) | {"special": True}
                for i, token in sorted(decoder.items())
            },
            "additional_special_tokens": extra,
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "legacy": False,
            "model_max_length": 4096,
            "pad_token": EOS,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )
    return folder


def _token(content: str, rstrip: bool = False) -> dict:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": rstrip, "single_word": False}


def _write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
