"""The published filters measure what they say and cut where they should."""

import dataclasses

import pytest

from fusion_jax.errors import UserError
from fusion_jax.synth import filters
from fusion_jax.synth.config import FilterConfig

GOOD = "A red kite flies over the grey sea near an old harbour town."


def test_defaults_are_the_published_thresholds():
    config = FilterConfig()
    assert (config.alphanumeric_min, config.perplexity_max, config.ngram) == (0.60, 5500, 10)
    assert (config.character_repetition_max, config.word_repetition_max) == (0.0937, 0.0309)
    assert (config.special_min, config.special_max) == (0.165, 0.420)
    assert (config.blip_min, config.clip_min) == (0.8, 0.28)
    assert filters.failed(GOOD, config) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("*** >>> a b c <<< ***", "alphanumeric"),
        ("Antidisestablishmentarianism", "special_characters"),
        ("Room 1234567 and 98765432", "special_characters"),
        ("the same words again " * 6, "character_repetition"),
        ("A naked man on a beach at dawn", "flagged_words"),
    ],
)
def test_reasons(text, reason):
    assert filters.failed(text, FilterConfig())[0] == reason


def test_ratios():
    assert filters.alphanumeric_ratio("ab 1!") == pytest.approx(3 / 5)
    assert filters.special_ratio("ab 1!") == pytest.approx(3 / 5)
    assert filters.special_ratio("naïve") == 0
    assert filters.alphanumeric_ratio("") == 0


def test_character_repetition():
    # "abababab" has five runs of four characters, of two kinds: abab three times, baba twice.
    assert filters.character_repetition("abababab", 4) == pytest.approx(3 / 5)
    assert filters.character_repetition("abcdefgh", 4) == 0
    assert filters.character_repetition("abc", 4) == 0


def test_word_repetition():
    said = "one two three one two three four"
    # Runs of three: (1 2 3) twice, (2 3 1), (3 1 2), (2 3 4): two of five are repeated.
    assert filters.word_repetition(said, 3) == pytest.approx(2 / 5)
    assert filters.word_repetition("one two", 3) == 0


def test_none_turns_a_filter_off():
    off = dataclasses.replace(FilterConfig(), special_min=None, special_max=None)
    assert filters.failed("Antidisestablishmentarianism", off) is None
    assert filters.failed("A naked man on a beach", dataclasses.replace(off, flagged_words=False)) is None


def test_own_flagged_words(tmp_path):
    (tmp_path / "words.txt").write_text("Kite\n\nsea\n")
    config = FilterConfig(flagged_words_file=str(tmp_path / "words.txt"))
    assert filters.failed(GOOD, config) == ("flagged_words", "kite")
    assert filters.failed("A naked man on a beach at dawn", config) is None
    with pytest.raises(UserError, match="nowhere"):
        filters.check_config(FilterConfig(flagged_words_file="nowhere.txt"))


# log10: "a" and the end have 1/4, "a" after "a" has 1/2, anything else 1/1024.
ARPA = """\\data\\
ngram 1=4
ngram 2=1

\\1-grams:
-3.0103\t<unk>\t0
-99\t<s>\t0
-0.60206\t</s>\t0
-0.60206\ta\t0

\\2-grams:
-0.30103\ta a

\\end\\
"""


def test_perplexity(tmp_path):
    pytest.importorskip("kenlm")
    path = tmp_path / "tiny.arpa"
    path.write_text(ARPA)
    assert filters.perplexity("a a a", str(path)) == pytest.approx((4 * 2 * 2 * 4) ** (1 / 4), rel=1e-4)
    config = FilterConfig(perplexity_model=str(path), perplexity_max=100.0)
    filters.check_config(config)
    loose = dataclasses.replace(config, special_max=None, alphanumeric_min=None)
    assert filters.failed("a a a a", loose) is None
    assert filters.failed(GOOD, config)[0] == "perplexity"
    (tmp_path / "bad.arpa").write_text("no model")
    for bad in ("nowhere.arpa", "bad.arpa"):
        with pytest.raises(UserError, match=bad):
            filters.check_config(FilterConfig(perplexity_model=str(tmp_path / bad)))
