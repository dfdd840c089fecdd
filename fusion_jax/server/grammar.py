"""Constrains answers to a grammar by the tokens that can still lead to an answer that it allows.

The grammars are those of llguidance (https://github.com/guidance-ai/llguidance), which works on bytes: each token
represents the bytes that it adds to a text, and control tokens are excluded.
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

_TRY_SCRIPT = Path(__file__).with_name("try_grammar.py")
_SECONDS = 20  # for one trial of a grammar
_REMEMBERED = 256  # grammars that are known to be valid
_ITEMS = 100_000  # parser items of one step; 200 optional keys take over 5,000 with a vocabulary of 49,000 tokens


class GrammarError(Exception):
    """An answer cannot continue; the message is a clause that says why."""


class Matcher:
    """The state of one answer in its grammar."""

    def __init__(self, library, matcher, prefix: str):
        """prefix: the text of the answer's tokens before the answer itself, see `_opens_with_space`."""
        self._library, self._matcher, self.prefix = library, matcher, prefix

    def fill(self, bits: np.ndarray, row: int) -> None:
        """Writes the tokens that may come next into `bits[row]`. Raises GrammarError where there are none.

        Args:
          bits: (R, ceil(V / 32)) int32, one bit a token, the lowest bit first.
        """
        self._library.fill_next_token_bitmask(self._matcher, bits, row)
        if self._matcher.is_error() or not bits[row].any():
            raise GrammarError(self._matcher.get_error().partition("\n")[0] or "no token can come next")

    def take(self, token: int) -> None:
        """Advances by a token of the answer."""
        self._matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


class Grammars:
    """Makes the matchers of answers for one model.

    Args:
      vocabulary: V, the width of the logits, which may exceed the tokenizer's vocabulary.
    """

    def __init__(self, prompts: Prompts, vocabulary: int):
        self._tokenizer, self._vocabulary = prompts.tokenizer, vocabulary
        self._stop_ids = prompts.stop_ids
        self._prefix = " " if _opens_with_space(prompts) else ""
        self._good: OrderedDict[str, None] = OrderedDict()

    @functools.cached_property
    def _words(self):
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocabulary)), eos_token=[*self._stop_ids]
        )

    def load(self) -> None:
        """Reads the vocabulary, which takes a second and would block other threads later.

        Without llguidance nothing happens; requests that want a form get an error.
        """
        with contextlib.suppress(ImportError):
            _ = self._words

    def matcher(self, form: Form) -> Matcher:
        """A matcher for one answer; may take seconds. Raises ApiError: 400 impossible form, 501 no llguidance."""
        try:
            import llguidance
            import llguidance.numpy as masks

            from fusion_jax.server.try_grammar import limits
        except ImportError as error:
            missing = f"{form.key} needs the package llguidance on the server: pip install -e '.[serve]'."
            raise ApiError(501, missing, "unsupported_value", form.key) from error
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
            if not self._can_spell(choice):
                raise _refusal(form, f"the model's tokens cannot spell {choice[:80]!r}")
        self._good[grammar] = None
        while len(self._good) > _REMEMBERED:
            self._good.popitem(last=False)
        return Matcher(masks, matcher, self._prefix)

    def _check(self, form: Form, grammar: str) -> None:
        """Tries the grammar in a process of its own. Raises ApiError where it cannot be used."""
        try:
            tried = subprocess.run(
                [sys.executable, "-P", str(_TRY_SCRIPT)], input=grammar.encode(), capture_output=True, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise _refusal(form, "it takes too long to prepare") from error
        if tried.returncode in (
            -signal.SIGINT,
            -signal.SIGTERM,
        ):  # signals reach all processes of a server that is shutting down
            raise ApiError(503, "The server is shutting down.", "shutting_down")
        if tried.returncode:
            raise _refusal(form, "it takes too much time or memory to prepare")
        if tried.stdout:
            raise _refusal(form, tried.stdout.decode(errors="replace"))

    def _can_spell(self, text: str) -> bool:
        """Whether tokens can spell the text, either as the tokenizer splits it or byte by byte."""
        data = text.encode()
        spelled = b"".join(map(self._tokenizer.token_bytes, _Vocabulary.ids(self._tokenizer, text)))
        return spelled == data or all(bytes([byte]) in self._single for byte in data)

    @functools.cached_property
    def _single(self) -> frozenset[bytes]:
        spoken = (i for i in range(self._tokenizer.vocab_size) if not self._tokenizer.is_control(i))
        return frozenset(word for word in map(self._tokenizer.token_bytes, spoken) if len(word) == 1)


class _Vocabulary:
    """The tokenizer's vocabulary in the form that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int):
        known = tokenizer.vocab_size
        self.tokens = [tokenizer.token_bytes(i) if i < known else b"" for i in range(vocabulary)]
        # An answer cannot contain ids that have no text.
        self.special_token_ids = [i for i, word in enumerate(self.tokens) if not word or tokenizer.is_control(i)]
        for i in self.special_token_ids:
            self.tokens[i] = self.tokens[i] or f"<id {i}>".encode()
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self.ids(self._tokenizer, text if isinstance(text, str) else text.decode(errors="replace"))

    @staticmethod
    def ids(tokenizer: Tokenizer, text: str) -> list[int]:
        """The tokens of a text inside an answer, without the prefix of a first word."""
        return tokenizer.encode_parts([(text, True)], after=tokenizer.vision_end_id)


def _opens_with_space(prompts: Prompts) -> bool:
    """Whether the tokens of an answer begin with a space before its first word, as in training.

    SentencePiece puts a space before each text, and so before an answer where no control token precedes it.
    """
    tokenizer = prompts.tokenizer
    last = tokenizer.encode(prompts.template.answer)[-1]
    first = tokenizer.encode_parts([("Yes", True)], after=last)[0]
    return tokenizer.token_bytes(first).startswith(b" ")


def _refusal(form: Form, problem: str) -> ApiError:
    """The error for a form. problem: llguidance's message, from which dumps of grammar and state are removed."""
    problem = re.split(r"\n\s*\d+ \||\n<", problem)[0]
    problem = " ".join(
        re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: |Enable 'coerce_one_of'.*", "", problem).split()
    )
    problem = problem.replace("Unimplemented keys:", "not supported are the keywords")
    problem = "nothing satisfies it" if problem.startswith("NoExtension") else problem[:300].rstrip(". ")
    return ApiError(400, f"{form.key} cannot be used: {problem}.", "invalid_value", form.key)
