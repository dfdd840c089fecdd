"""Answers of a form: at each token, which ones can still lead to an answer that a grammar allows.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance). It works on bytes, so each token is given to
it as the bytes that it adds to a text, and control tokens are none of them.
"""

import contextlib
import functools
import re
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np

from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.inference.prompts import Prompts
from fusion_jax.server.error import ApiError
from fusion_jax.server.structured import Form

_TRIAL = Path(__file__).with_name("try_grammar.py")
_SECONDS = 20
_KNOWN = 256  # forms that are remembered as good
_ITEMS = 100_000  # of one step; 200 optional keys take over 5,000 with a vocabulary of 49,000 words


class GrammarError(Exception):
    """An answer cannot go on: why, as a clause."""


class Matcher:
    """One answer on its way through its grammar."""

    def __init__(self, library, matcher, prefix: str):
        """prefix: what the answer's tokens say before it, see `Grammars`."""
        self._library, self._matcher, self.prefix = library, matcher, prefix

    def fill(self, bits: np.ndarray, row: int) -> None:
        """Writes which tokens may come next into `bits[row]`, (R, ceil(V / 32)) int32. GrammarError where none may."""
        self._library.fill_next_token_bitmask(self._matcher, bits, row)
        if self._matcher.is_error() or not bits[row].any():
            said = self._matcher.get_error().partition("\n")[0] or "no token can come next"
            raise GrammarError(said)

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether the answer is whole, and nothing more can be said."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


class Grammars:
    """Makes matchers for one model.

    Args:
      vocabulary: V, the logits' width, possibly larger than the tokenizer's.
    """

    def __init__(self, prompts: Prompts, vocabulary: int):
        self._tokenizer, self._vocabulary = prompts.tokenizer, vocabulary
        self._stop_ids = prompts.stop_ids
        self._prefix = " " if _opens_with_space(prompts) else ""
        self._good: OrderedDict[str, None] = OrderedDict()

    @functools.cached_property
    def _words(self):
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Words(self._tokenizer, self._vocabulary)), eos_token=[*self._stop_ids])

    def load(self) -> None:
        """Reads the vocabulary, which takes a second and would hold other threads up later. Without llguidance nothing
        happens: requests that want a form hear of it."""
        with contextlib.suppress(ImportError):
            _ = self._words

    def matcher(self, form: Form) -> Matcher:
        """May take seconds. ApiError 400 for a form that cannot be, 501 without the library."""
        try:
            import llguidance
            import llguidance.numpy as masks

            from fusion_jax.server.try_grammar import limits
        except ImportError as error:
            said = f"{form.key} needs the package llguidance on the server: pip install 'fusion_jax[serve]'."
            raise ApiError(501, said, "unsupported_value", form.key) from error
        start = '" " answer' if self._prefix else "answer"
        rule = f"%json {form.schema}"
        if form.regex:
            rule = f"/{llguidance.regex_to_lark(form.regex, use_ascii='d')}/"
        grammar = llguidance.LLMatcher.grammar_from_lark(f"start: {start}\nanswer: {rule}")
        if grammar not in self._good:
            self._check(form, grammar)
        matcher = llguidance.LLMatcher(self._words, grammar, log_level=0, limits=limits(_ITEMS))
        if matcher.is_error():
            raise _refusal(form, matcher.get_error())
        for choice in form.choices:
            if not self._can_say(choice):
                raise _refusal(form, f"the model's tokens cannot spell {choice[:80]!r}")
        self._good[grammar] = None
        while len(self._good) > _KNOWN:
            self._good.popitem(last=False)
        return Matcher(masks, matcher, self._prefix)

    def _check(self, form: Form, grammar: str) -> None:
        try:
            tried = subprocess.run(
                [sys.executable, "-P", str(_TRIAL)], input=grammar.encode(), capture_output=True, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise _refusal(form, "it takes too long to prepare") from error
        if tried.returncode in (-signal.SIGINT, -signal.SIGTERM):  # sent to all processes of a server that is to end
            raise ApiError(503, "The server is shutting down.", "shutting_down")
        if tried.returncode:
            raise _refusal(form, "it takes too much time or memory to prepare")
        if tried.stdout:
            raise _refusal(form, tried.stdout.decode(errors="replace"))

    def _can_say(self, text: str) -> bool:
        """Whether tokens can spell a text: as it is tokenized, or else byte by byte."""
        data = text.encode()
        said = b"".join(map(self._tokenizer.token_bytes, _Words.ids(self._tokenizer, text)))
        return said == data or all(bytes([byte]) in self._single for byte in data)

    @functools.cached_property
    def _single(self) -> frozenset[bytes]:
        spoken = (i for i in range(self._tokenizer.vocab_size) if not self._tokenizer.is_control(i))
        return frozenset(word for word in map(self._tokenizer.token_bytes, spoken) if len(word) == 1)


class _Words:
    """A vocabulary as llguidance takes it."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int):
        known = tokenizer.vocab_size
        self.tokens = [tokenizer.token_bytes(i) if i < known else b"" for i in range(vocabulary)]
        # Ids without a text are none that an answer could have.
        self.special_token_ids = [i for i, word in enumerate(self.tokens) if not word or tokenizer.is_control(i)]
        for i in self.special_token_ids:
            self.tokens[i] = self.tokens[i] or f"<id {i}>".encode()
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self.ids(self._tokenizer, text if isinstance(text, str) else text.decode(errors="replace"))

    @staticmethod
    def ids(tokenizer: Tokenizer, text: str) -> list[int]:
        """Of a text inside an answer: without the first word's prefix."""
        return tokenizer.encode_parts([(text, True)], after=tokenizer.vision_end_id)


def _opens_with_space(prompts: Prompts) -> bool:
    """Whether the first word of an answer has a space before it in its tokens, as in training: SentencePiece puts one
    before each text, and so before an answer wherever no control token stands in front of it."""
    tokenizer = prompts.tokenizer
    last = tokenizer.encode(prompts.template.answer)[-1]
    first = tokenizer.encode_parts([("Yes", True)], after=last)[0]
    return tokenizer.token_bytes(first).startswith(b" ")


def _refusal(form: Form, said: str) -> ApiError:
    """said: the library's words, of which its own grammar and state are left out."""
    said = re.split(r"\n\s*\d+ \||\n<", said)[0]
    said = " ".join(
        re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: |Enable 'coerce_one_of'.*", "", said).split()
    )
    said = said.replace("Unimplemented keys:", "not supported are the keywords")
    said = "nothing satisfies it" if said.startswith("NoExtension") else said[:300].rstrip(". ")
    return ApiError(400, f"{form.key} cannot be used: {said}.", "invalid_value", form.key)
