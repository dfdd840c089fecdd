"""Converts SentencePiece's tokenizer.model to tokenizer.json, which is enough for transformers.

transformers' own conversion yields other ids for runs of white space and for white space next to added tokens. These
are the steps of `SentencePieceTokenizer`, in the terms and in the order of the library `tokenizers`:

    the whole text   "▁" counts as a space; an added token may swallow white space; "▁" is put before a text that begins
                     with a space or with an added token that is not special
    added tokens     are cut out of the result of the first step, the longest first
    the rest         spaces become "▁"; another "▁" is put before the opening piece unless it has one; pairs of pieces
                     are merged, the best score first

This suits models that merge pairs, change no character and keep white space (Llama 2, Phi-3, Mistral). Each model is
tested: tokenizer.json is written only if thousands of difficult texts have the same ids as in the original; otherwise
the folder needs the package sentencepiece. The test leaves out one text, an added token by itself that is not special
(Phi-3's "</s>"), whose "▁" cannot be expressed.
"""

import random
import re
from collections.abc import Iterator

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors

from fusion_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer

TRIALS = 3000
_SPACE = "▁"
_BLANK = r"[\s\x{1c}-\x{1f}]"  # white space that Python strips, in the library's regular expressions


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> str | None:
    """The text of tokenizer.json; None where its ids would differ."""
    try:
        converted = _convert(tokenizer)
    except ValueError:  # ids with gaps
        return None
    alone = {token for token in tokenizer.added if not tokenizer.is_special(token)}
    for text in _trials(tokenizer):
        if text.replace(_SPACE, " ").strip() in alone:
            continue
        if converted.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            return None
    return converted.to_str(pretty=False)


def _convert(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    model, added = tokenizer.model, tokenizer.added
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merged = [i for i in range(len(model)) if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))]
    merges = []
    for i in sorted(merged, key=lambda i: (-model.get_score(i), i)):
        cuts = [(pieces[i][:k], pieces[i][k:]) for k in range(1, len(pieces[i]))]
        merges += sorted((cut for cut in cuts if cut[0] in ids and cut[1] in ids), key=lambda cut: ids[cut[0]])
    unknown = pieces[model.unk_id()]
    converted = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )

    def any_of(tokens) -> str:
        return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))

    steps = [normalizers.Replace(_SPACE, " ")]
    left, right = ([token for token in added if tokenizer.strips(token)[k]] for k in (0, 1))
    if right:
        steps.append(normalizers.Replace(tokenizers.Regex(f"(?<={any_of(right)}){_BLANK}+"), ""))
    if left:
        steps.append(normalizers.Replace(tokenizers.Regex(f"{_BLANK}+(?={any_of(left)})"), ""))
    # A text that begins with a space, or with an added token that is not special, gets another "▁" here; all others get
    # theirs below. The library also normalises each added token by itself, also tokens that are added later: those must
    # not change.
    others = [token for token in added if not tokenizer.is_special(token)]
    opening = [" "] + [f"(?:{any_of(others)})(?!\\z)"] * bool(others)
    steps.append(normalizers.Replace(tokenizers.Regex(rf"\A(?={'|'.join(opening)})"), _SPACE))
    converted.normalizer = normalizers.Sequence(steps)
    converted.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    converted.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for token, i in sorted(added.items(), key=lambda item: item[1]):
        lstrip, rstrip = tokenizer.strips(token)
        one = AddedToken(token, lstrip=lstrip, rstrip=rstrip, normalized=True, special=tokenizer.is_special(token))
        converted.add_special_tokens([one]) if one.special else converted.add_tokens([one])
        if converted.token_to_id(token) != i:
            raise ValueError(f"token {token!r} has id {i}, and the library gives it {converted.token_to_id(token)}")
    if tokenizer.adds_bos:
        name = next(token for token, i in added.items() if i == tokenizer.bos_id)
        converted.post_processor = processors.TemplateProcessing(
            single=f"{name}:0 $A:0", pair=f"{name}:0 $A:0 {name}:1 $B:1", special_tokens=[(name, tokenizer.bos_id)]
        )
    return converted


def _trials(tokenizer: SentencePieceTokenizer) -> Iterator[str]:
    """Difficult texts: runs of white space, added tokens beside it, rare characters and learned pieces."""
    rng = random.Random(0)
    pieces = [tokenizer.model.id_to_piece(i) for i in range(len(tokenizer.model))]
    odd = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\x1c", "\x85", "\x00", _SPACE]
    odd += ["é", "e\u0301", "中文", "ﬁ", "Ⅷ", "😀", "\ufeff", "\u202e", "<0x0A>", "<", "|>", "aaa", "...", "1234567"]
    for _ in range(TRIALS):
        character = chr(rng.choice((rng.randrange(32, 0x250), rng.randrange(1, 0xD800))))
        sources = (odd, list(tokenizer.added), pieces, [character])
        yield "".join(rng.choice(rng.choice(sources)) for _ in range(rng.randrange(1, 12)))
