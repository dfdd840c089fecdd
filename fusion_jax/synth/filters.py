"""Implements the published text filters, each of which compares a ratio of the text with thresholds.

The first filter that a text fails is the reason for dropping it.

    "A red kite over the grey sea."    23 letters or digits of 29 characters: alphanumeric 0.79, special 0.24

The thresholds are those of the papers; the definitions are those of the data-cleaning tool with filters of these names:

- alphanumeric: share of the characters that are letters or digits;
- special: share of the characters that are not letters: punctuation, digits, white space, emoji. White space makes up
  most of it in a sentence; a text below 0.165 hardly consists of words;
- character repetition: the share of the most frequent n-grams among all n-grams of characters; they are as many as the
  square root of the number of different n-grams, without those that occur once;
- word repetition: the share of n-grams of words that occur more than once among all of them;
- perplexity: 10^(-log10 probability / words) by a KenLM model.
"""

import math
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path

from fusion_jax.errors import UserError
from fusion_jax.synth.config import FilterConfig

# Words that make a picture unfit in any context, for runs without a list of their own.
FLAGGED = frozenset(
    {"porn", "porno", "pornography", "pornographic", "xxx", "nude", "nudes", "nudity", "naked", "topless", "nsfw"}
    | {"sex", "sexy", "sexual", "hentai", "erotic", "erotica", "fetish", "orgy", "blowjob", "dildo", "masturbation"}
    | {"fuck", "fucking", "shit", "bitch", "cunt", "slut", "whore", "nigger", "faggot", "gore", "rape", "suicide"}
)


def alphanumeric_ratio(text: str) -> float:
    """Share of letters and digits among the characters."""
    return sum(c.isalnum() for c in text) / max(len(text), 1)


def special_ratio(text: str) -> float:
    """Share of characters that are neither letters nor marks on letters."""
    return sum(unicodedata.category(c)[0] not in "LM" for c in text) / max(len(text), 1)


def character_repetition(text: str, n: int) -> float:
    """Share of the most frequent n-grams of characters; 0 for texts shorter than n."""
    counts = sorted(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), reverse=True)
    if not counts:
        return 0.0
    most = min(math.isqrt(len(counts)), len(counts) - counts.count(1))
    return sum(counts[:most]) / sum(counts)


def word_repetition(text: str, n: int) -> float:
    """Share of n-grams of words that occur more than once; 0 for texts of fewer words than n."""
    words = re.findall(r"\w+", text.lower())
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)).values()
    return sum(count for count in counts if count > 1) / max(sum(counts), 1)


@lru_cache(maxsize=4)
def load_perplexity_model(path: str):
    """Loads a KenLM model. Raises UserError without the package or the file."""
    if not Path(path).is_file():
        raise UserError(f"There is not a KenLM model {path} (filters.perplexity_model).")
    try:
        import kenlm
    except ImportError as e:
        raise UserError(
            "filters.perplexity_model needs the package kenlm: pip install kenlm, or leave it empty."
        ) from e
    try:
        return kenlm.Model(path)
    except OSError as e:
        raise UserError(f"{path} is not a KenLM model: {e}.") from e


def perplexity(text: str, model_path: str) -> float:
    """Perplexity per word of the text in lower case, as in the training of the published models."""
    return load_perplexity_model(model_path).perplexity(" ".join(re.findall(r"\w+|[^\w\s]", text.lower())))


@lru_cache(maxsize=4)
def flagged_words(path: str) -> frozenset[str]:
    """The words of a file, or the built-in ones."""
    if not path:
        return FLAGGED
    try:
        words = Path(path).read_text(encoding="utf-8").lower().split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"Cannot read filters.flagged_words_file {path}: {e}.") from e
    return frozenset(word.strip() for word in words if word.strip())


def check_config(config: FilterConfig) -> None:
    """Raises UserError for missing files, before the run begins."""
    flagged_words(config.flagged_words_file)
    if config.perplexity_model:
        load_perplexity_model(config.perplexity_model)


def failed(text: str, config: FilterConfig) -> tuple[str, str] | None:
    """The reason and detail of the first filter that the text fails; None if it passes all."""
    if config.flagged_words:
        words = set(re.findall(r"\w+", text.lower()))
        if flagged := words & flagged_words(config.flagged_words_file):
            return "flagged_words", sorted(flagged)[0]
    measures = (
        ("alphanumeric", alphanumeric_ratio, config.alphanumeric_min, None),
        ("special_characters", special_ratio, config.special_min, config.special_max),
        (
            "character_repetition",
            lambda t: character_repetition(t, config.ngram),
            None,
            config.character_repetition_max,
        ),
        ("word_repetition", lambda t: word_repetition(t, config.ngram), None, config.word_repetition_max),
    )
    if config.perplexity_model:
        ask = ("perplexity", lambda t: perplexity(t, config.perplexity_model), None, config.perplexity_max)
        measures = (*measures, ask)
    for name, measure, low, high in measures:
        if low is None and high is None:
            continue
        value = measure(text)
        if (low is not None and value < low) or (high is not None and value > high):
            return name, f"{value:.4g}"
    return None
