"""Text while it is being generated: what can be shown of the tokens so far without ever taking anything back."""

from collections.abc import Sequence

from fusion_jax.data.tokenizer import Tokenizer


class TextStream:
    """The text of one answer, token by token.

    Held back until it is certain: the bytes of an unfinished UTF-8 character, white space at the end of what is there
    (it is no part of the answer when nothing follows), and anything that may be the beginning of a stop text. The
    pieces together are the same text however many tokens come at once.

    Args:
      prefix: the answer is exactly what stands behind this text, white space and all. None: what stands between white
        space.

    Attributes:
      tokens: those so far, the stop token left out. finish: None, "stop" or "length".
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
        self.made = 0  # tokens, the stop token included
        self.finish: str | None = None
        self._tokenizer, self._stop_ids, self._stop, self._max = tokenizer, frozenset(stop_ids), tuple(stop), max_tokens
        self._prefix, self._shown = prefix, ""

    @property
    def text(self) -> str:
        """What has been given out so far; after the end, the whole answer."""
        return self._shown

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """Takes the next tokens, those behind the end ignored. Returns the text that has become certain.

        Args:
          last: the answer is whole with these tokens, however many more it might have had.
        """
        new = ""
        for token in tokens:
            if self.finish is not None:
                break
            self.made += 1
            if token in self._stop_ids:
                self.finish = "stop"
            else:
                # Ids behind the tokenizer's last one have no text; an untrained model may give them.
                if token < self._tokenizer.vocab_size:
                    self.tokens.append(token)
                if self.made >= self._max:
                    self.finish = "length"
            if self._stop:
                new += self._more()  # a stop text must be found at its own token
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
        """Length of the longest end of `text` that a stop text begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
