"""Tries a grammar under limits, in a separate program that loads only llguidance.

Grammars are untrusted. Some of a few hundred bytes would take minutes or gigabytes, and a library that runs out of
memory ends its process; so each grammar is first built and walked through here. The input is a grammar in llguidance's
Lark format; the output is what is wrong with it, or nothing.
"""

import contextlib
import resource
import sys
import time

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

_SECONDS, _BYTES = 2, 1 << 30
_WALK, _WALK_SECONDS = 200, 1.0  # most bytes and seconds of the trial answer
_END, _QUOTE = 256, 0x22


def limits(items: int = 5_000) -> LLParserLimits:
    """Limits for one grammar, far below the library's, which are meant for trusted grammars.

    Args:
      items: parser items of one step. A mask covers the whole vocabulary, so a large vocabulary needs more.
    """
    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=items,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


class _Bytes:
    """A vocabulary of all bytes and an end token."""

    eos_token_id, bos_token_id = _END, None
    tokens = (*(bytes([i]) for i in range(_END)), b"<end>")
    special_token_ids = (_END,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def problem(grammar: str) -> str:
    """Why a grammar cannot be used, "" where it can: it is invalid, nothing satisfies it, or it becomes too complex."""
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(_Bytes())), grammar, log_level=0, limits=limits())
    begun, last = time.monotonic(), None
    for _ in range(_WALK):
        if matcher.is_error() or matcher.is_stopped() or time.monotonic() - begun > _WALK_SECONDS:
            break
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [byte for byte in range(_END) if bits >> byte & 1]
        if not allowed:
            break
        # A quotation mark is taken where possible: the keys and texts of JSON have the most continuations.
        last = _QUOTE if _QUOTE in allowed and last != _QUOTE else allowed[len(allowed) // 2]
        matcher.consume_token(last)
    return matcher.get_error() if matcher.is_error() else ""


def main() -> None:
    for limit, most in ((resource.RLIMIT_CPU, _SECONDS), (resource.RLIMIT_AS, _BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force, or the system has no limits
            resource.setrlimit(limit, (most, most))
    sys.stdout.write(problem(sys.stdin.read()))


if __name__ == "__main__":
    main()
