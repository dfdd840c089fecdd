"""Writes the tokenizer in a GGUF file's metadata as the files of a tokenizer folder.

The metadata hold the tokens and merges of a byte-level BPE, but only the name of the rule by which it splits texts
(`tokenizer.ggml.pre`); this file has the known rules. For SentencePiece tokenizers the metadata do not say which added
tokens swallow the white space after them (Phi), so the tokenizer's own files must be in the folder of the GGUF file.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fusion_jax.errors import UserError, check, first_line
from fusion_jax.files import brief
from fusion_jax.values.foreign import flag, sequence, text, whole

_BESIDE = (
    "lay the model's own tokenizer files (tokenizer.json or tokenizer.model, tokenizer_config.json) beside it and "
)
_BESIDE += "name their folder"
_CONTROL, _ADDED, _UNUSED = 3, 4, 5  # tokenizer.ggml.token_type
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_SPLITS = {
    **dict.fromkeys(_LLAMA3, lambda: _split(_WORDS.format(digits="{1,3}"))),
    "qwen2": lambda: _split(_WORDS.format(digits="")),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def write_tokenizer(values: dict[str, Any], folder: Path, where: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
      values: the metadata. folder: an existing folder. where: the GGUF file, for messages.

    Raises:
      UserError: there is no tokenizer, it is of another kind, or it contradicts itself.
    """
    named = str(where)
    kind = text(values, "tokenizer.ggml.model", named, "")
    check(kind != "", f"{where} holds no tokenizer; {_BESIDE}.")
    check(kind == "gpt2", f"{where}: a tokenizer of type {brief(kind)} cannot be read from GGUF; {_BESIDE}.")
    pre = text(values, "tokenizer.ggml.pre", named, "default")
    check(pre in _SPLITS, f"{where}: it is not known how its tokenizer ({brief(pre)}) splits texts; {_BESIDE}.")
    words, kinds = (
        _of(str, values, "tokenizer.ggml.tokens", named),
        _of(int, values, "tokenizer.ggml.token_type", named),
    )
    check(len(words) > 0, f"{where}: tokenizer.ggml.tokens is missing or empty.")
    check(
        len(kinds) == len(words), f"{where}: tokenizer.ggml.token_type has {len(kinds)} values for {len(words)} tokens."
    )
    while kinds and kinds[-1] == _UNUSED:  # rows of the embedding without a token
        words, kinds = words[:-1], kinds[:-1]
    vocabulary = {word: i for i, word in enumerate(words)}
    check(len(vocabulary) == len(words), f"{where}: tokenizer.ggml.tokens names a token twice.")
    merges = [tuple(merge.split(" ")) for merge in _of(str, values, "tokenizer.ggml.merges", named)]
    check(all(len(merge) == 2 for merge in merges), f"{where}: tokenizer.ggml.merges holds values that are not pairs.")
    try:
        model = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _LLAMA3))
    except Exception as error:  # the library has no narrower class of errors
        raise UserError(f"{where}: tokenizer.ggml.merges: {first_line(error)}.") from error
    if pre == "qwen2":
        model.normalizer = normalizers.NFC()
    model.pre_tokenizer, model.decoder = _SPLITS[pre](), decoders.ByteLevel()
    model.add_tokens(
        [
            tokenizers.AddedToken(word, special=kind == _CONTROL, normalized=False)
            for word, kind in zip(words, kinds)
            if kind in (_CONTROL, _ADDED) and word
        ]
    )
    model.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"add_bos_token": flag(values, "tokenizer.ggml.add_bos_token", named, pre in _LLAMA3)}
    for key, role in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        i = whole(values, f"tokenizer.ggml.{key}_token_id", named, 0, len(words) - 1, -1)
        if i >= 0:
            config[f"{role}_token"] = words[i]
    check("eos_token" in config, f"{where} lacks tokenizer.ggml.eos_token_id.")
    template = text(values, "tokenizer.chat_template", named, "")
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")


def _of(kind: type, values: dict[str, Any], key: str, where: str) -> list:
    items = sequence(values, key, where)
    check(all(isinstance(one, kind) for one in items), f"{where}: {key} must hold {kind.__name__} values.")
    return items
