"""Finds the tokens of a word in a tokenized question."""

import re
from collections.abc import Sequence

from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import UserError


def word_tokens(tokenizer: Tokenizer, ids: Sequence[int], question: str, word: str) -> list[int]:
    """Indices of the tokens that hold any part of the word, at all its occurrences in the question.

    Args:
      ids: tokens of a text that holds the question, such as a prompt.

    Raises:
      UserError: the word is not in the question.
    """
    text, spans = _spans(tokenizer, ids)
    first = max(text.find(question), 0)
    last = first + len(question) if question in text else len(text)
    places = [(first + a, first + b) for a, b in _occurrences(text[first:last], word)]
    tokens = [i for i, (a, b) in enumerate(spans) if any(a < end and b > start for start, end in places)]
    if not tokens:
        known = ", ".join(words(question))
        raise UserError(f"The word {word.strip()!r} is not in the question; its words are: {known}.")
    return tokens


def words(text: str) -> list[str]:
    """The different words of a text, in the order of their first occurrence."""
    return list(dict.fromkeys(re.findall(r"\w+(?:['’-]\w+)*", text)))


def _spans(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of `ids`, and for each token the span of characters that it contributes to."""
    spans = []
    for i in range(len(ids)):
        # A character may be spread over tokens: its first bytes decode to U+FFFD, which is where the span begins.
        start = len(tokenizer.decode(ids[:i]).rstrip("\ufffd"))
        spans.append((start, len(tokenizer.decode(ids[: i + 1]))))
    return tokenizer.decode(ids), spans


def _occurrences(text: str, word: str) -> list[tuple[int, int]]:
    """The spans of the word in the text. Case and the amount of white space between several words do not matter."""
    parts = [re.escape(part) for part in word.split()]
    if not parts:
        return []
    pattern = r"\s+".join(parts)
    spans = [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)]
    # Scripts without spaces have no word boundaries.
    if not spans and not word.isascii():
        spans = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
    return spans
