"""Decodes an answer while it is generated, and holds back text that later tokens may still change."""

from collections.abc import Sequence

from fusion_jax.data.tokenizer import Tokenizer


class TextStream:
    """The text of one answer, token by token.

    Three things are held back: the bytes of an unfinished UTF-8 character, white space at the end (it is not part of
    the answer when nothing follows), and anything that may be the beginning of a stop text. The pieces add up to the
    same text however many tokens come at once.

    Args:
      prefix: the answer is exactly the text that follows this one, white space included. None: the answer is the text
        without surrounding white space.

    Attributes:
      tokens: the tokens so far without the stop token. length: their number, the stop token included.
      finish: None, "stop" or "length".
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        stop: Sequence[str],
        max_tokens: int,
        prefix: str | None = None,
    ):
        self.tokens: list[int] = []
        self.length = 0
        self.finish: str | None = None
        self._tokenizer, self._stop_ids, self._stop, self._max = tokenizer, frozenset(stop_ids), tuple(stop), max_tokens
        self._prefix, self._shown = prefix, ""

    @property
    def text(self) -> str:
        """The text that has been returned so far; after the end, the whole answer."""
        return self._shown

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """Adds the next tokens and returns the text that has become certain. Tokens after the end are ignored.

        Args:
          last: whether the answer ends with these tokens although more could follow.
        """
        new = ""
        for token in tokens:
            if self.finish is not None:
                break
            self.length += 1
            if token in self._stop_ids:
                self.finish = "stop"
            else:
                # Ids beyond the tokenizer's vocabulary have no text; an untrained model may produce them.
                if token < self._tokenizer.vocab_size:
                    self.tokens.append(token)
                if self.length >= self._max:
                    self.finish = "length"
            if self._stop:
                new += self._more()  # a stop text ends the answer at its own token
        if last:
            self.finish = "stop"
        return new + self._more()

    def _more(self) -> str:
        exact = self._prefix is not None
        text = self._tokenizer.decode(self.tokens, inside=exact)
        text = text.removeprefix(self._prefix) if exact else text.lstrip()
        if self.finish is None:
            text = text.rstrip("\ufffd")  # possibly the beginning of a character
        cuts = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if cuts:
            text, self.finish = text[: min(cuts)], "stop"
        if self.finish is None:
            text = text[: len(text) - self._doubtful(text)]
        if not exact:
            text = text.rstrip()
        new = text[len(self._shown) :]
        self._shown += new
        return new

    def _doubtful(self, text: str) -> int:
        """The length of the longest suffix of `text` that is a prefix of a stop text."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
