"""Collects the text of a conversation as ids and labels, in training and in exported folders."""

from collections.abc import Callable, Sequence

IGNORE = -100  # in labels: not supervised


class RowText:
    """A row under construction. It collects unsupervised text, to tokenize it in one piece once something else follows.

    Attributes:
      ids, labels: those of all tokens so far; a label is the id if it is supervised, else IGNORE.
      ends: for each question the index of its last token, after which its answer begins.
      prompt: the readable text in parts.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[tuple[str, bool]], int | None], list[int]],
        first: Sequence[int],
        frame: tuple[str, str],
    ):
        """Args:
        encode: returns the ids of texts that follow each other, each with whether it is literal (without control
          tokens, whatever it contains); its second argument is the id that they follow, None at the start of a piece.
        first: ids at the start. frame: the tokens before and after a placeholder.
        """
        self.encode, self.frame = encode, frame
        self.ids, self.labels, self.ends, self.prompt = [*first], [IGNORE] * len(first), [], []
        self._pending: list[tuple[str, bool]] = []
        self._after: int | None = None

    def text(self, text: str, literal: bool = False) -> None:
        """Adds unsupervised text."""
        self._pending.append((text, literal))
        self.prompt.append(text)

    def placeholder(self, marker: int, tag: str) -> None:
        """Adds a marker in place of visual tokens, and its tag to the readable text."""
        self.text(self.frame[0])
        self.cut()
        self.ids.append(marker)
        self.labels.append(IGNORE)
        self.prompt.append(tag)
        self._after = None
        self.text(self.frame[1])

    def cut(self) -> None:
        """Ends a piece: what follows is tokenized by itself."""
        new = self.encode(self._pending, self._after)
        self.ids += new
        self.labels += [IGNORE] * len(new)
        self._pending, self._after = [], self.ids[-1] if self.ids else None

    def end_question(self) -> None:
        """Ends a piece before an answer."""
        self.cut()
        self.ends.append(len(self.ids) - 1)

    def answer(self, text: str, end: str = "", literal: bool = False) -> None:
        """Adds a supervised answer with its end."""
        self.prompt += [text, end]
        new = self.encode([(text, literal), (end, False)], self._after)
        self.ids += new
        self.labels += new
        self._after = self.ids[-1]
