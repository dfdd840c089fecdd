"""Lays out rows of text and visual positions, and collates them into batches, as in training."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature

from .configuration_fusion import IGNORE, NO_IMAGE, QUADRANTS
from .text_fusion import IMAGE, Encoded

PADDINGS = {True: "longest", "longest": "longest", "max_length": "max_length", False: "none", None: "none"}
PADDINGS["do_not_pad"] = "none"


@dataclass(frozen=True)
class Layout:
    """The settings of the model that a batch depends on.

    Attributes:
      pad_id: the id at visual positions and in padding. image_size: side of a view in pixels.
      count: latents in a round. tiled: whether resolution is dynamic. The others are the processor's settings.
    """

    pad_id: int
    image_size: int
    count: int
    quadrants: bool
    text_guided: bool
    hide_question_id_zero: bool
    tiled: bool


@dataclass
class Row:
    """One conversation, laid out from position 0.

    Attributes:
      views: (V, size, size, 3) uint8, the whole view last; None without an image.
      tiling: six numbers with dynamic resolution, see `FusionProcessor.views`; else empty.
      kind: NO_IMAGE, PIXELS or ZERO_IMAGE. closed: whether it ends with a complete answer.
      ids, labels: one for every position. visual: -1 for text, else an index into the row's table, see `fill`.
      start, end: for each round the position of its first latent, and of the last token before its answer.
    """

    encoded: Encoded
    views: np.ndarray | None
    tiling: list[int]
    kind: int
    closed: bool
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    visual: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)

    def image_places(self, image_tokens: int) -> int:
        """Number of positions of its image: the whole view, then row by row the kept tile tokens and a row end."""
        if not self.tiling:
            return image_tokens
        rows, _, top, bottom, left, right = self.tiling
        return image_tokens + ((bottom - top) * (right - left + 1) if rows else 0)

    def fill(self, image_tokens: int, tile_tokens: int, count: int, image_first: bool, pad_id: int) -> None:
        """Lays out the encoded text, with `count` latents in each round.

        The row's visual table holds the image's whole view, as many places as tiles may need, and the latents of the
        rounds.
        """
        # In the published order, the image is at the first visual position of its round, and the latents follow.
        # With `image_first` the image is at the first visual position of the conversation.
        markers = [token for token in self.encoded.ids if token < 0]
        if IMAGE in markers:
            place = markers.index(IMAGE)
            markers.insert(0 if image_first else max(place - 1, 0), markers.pop(place))
        ends = set(self.encoded.ends)
        for i, (token, label) in enumerate(zip(self.encoded.ids, self.encoded.labels)):
            if i in ends:
                self.end.append(len(self.ids))
            places = [-1]
            if token < 0:
                if markers.pop(0) == IMAGE:
                    places = range(self.image_places(image_tokens))
                else:
                    first = image_tokens + tile_tokens + len(self.start) * count
                    self.start.append(len(self.ids))
                    places = range(first, first + count)
                token = pad_id
            self.visual += places
            self.ids += [token] * len(places)
            self.labels += [label] * len(places)

    def cut(self, limit: int) -> None:
        """Cuts the row to `limit` positions, but only within or after an answer.

        Raises:
          ValueError: the image or the last question would be cut.
        """
        if len(self.ids) <= limit:
            return
        if not self.end:
            length = limit  # the row is only an answer
        else:
            needed = [end + 2 for end in self.end if end + 2 <= limit]  # rounds with a part of their answer
            image = self.visual.index(0) if 0 in self.visual else 0
            if not self.closed or not needed or needed[-1] <= image:
                part = "its last question" if not self.closed else "its image and the question after it"
                raise ValueError(
                    f"A conversation has {len(self.ids)} positions with its visual tokens, and cutting it to "
                    f"max_length={limit} would cut {part}: give a larger max_length, or truncation=False."
                )
            rounds = len(needed)
            # The next round is cut together with everything between it and the answer before it.
            answers = [i for i, label in enumerate(self.labels[:limit]) if label >= 0]
            length = limit if rounds == len(self.end) else answers[-1] + 1
            self.end, self.start = self.end[:rounds], self.start[:rounds]
        self.ids, self.labels, self.visual = self.ids[:length], self.labels[:length], self.visual[:length]


def collate(
    rows: list[Row],
    layout: Layout,
    side: str,
    padding: Any,
    max_length: int | None,
    multiple: int | None,
    return_tensors: str | None,
    masks: bool,
) -> BatchFeature:
    """Collates rows into one batch.

    `visual_index`, `round_end` and `latent_start` count from each row's first token, so that they stay valid when rows
    are padded or moved later.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r} is not known; use True, 'longest', 'max_length' or False.")
    if return_tensors not in ("pt", "np", None):
        raise ValueError(f"return_tensors={return_tensors!r} is not supported; use 'pt', 'np' or None.")
    if side not in ("left", "right"):
        raise ValueError(f"padding_side={side!r} is not known; use 'left' or 'right'.")
    lengths, padding = [len(row.ids) for row in rows], PADDINGS[padding]
    length = max(lengths)
    if padding == "max_length":
        if max_length is None:
            raise ValueError("padding='max_length' needs max_length.")
        length = max(length, max_length)
    if multiple and padding != "none":
        length = -(-length // multiple) * multiple
    if padding == "none" and return_tensors is not None and min(lengths) != length:
        raise ValueError("Rows of different lengths make no tensor: give padding=True, or return_tensors=None.")

    def padded(lists: list[list[int]], value: int, width: int | None = None) -> Tensor:
        """Lists as one tensor: from column 0 if there is a width, else aligned with the rows."""
        out = torch.full((len(lists), length if width is None else width), value)
        for line, values in zip(out, lists):
            start = length - len(values) if width is None and side == "left" else 0
            line[start : start + len(values)] = torch.tensor(values, dtype=torch.long)
        return out

    data = {
        "input_ids": padded([row.ids for row in rows], layout.pad_id),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
    }
    if any(row.closed for row in rows):
        data["labels"] = padded([row.labels for row in rows], IGNORE)
    if masks:
        data["assistant_masks"] = padded([[int(label >= 0) for label in row.labels] for row in rows], 0)
    if any(row.kind != NO_IMAGE for row in rows):
        data |= _visual(rows, layout, length, padded)
    if return_tensors is None:
        sizes = dict.fromkeys(("input_ids", "attention_mask", "labels", "assistant_masks"), padding == "none")
        data = {key: _lists(value, lengths if sizes.get(key) else None, side) for key, value in data.items()}
    elif return_tensors == "np":
        data = {key: value.numpy() for key, value in data.items()}
    return BatchFeature(data)


def _lists(values: Tensor, lengths: list[int] | None, side: str) -> list:
    if lengths is None:
        return values.tolist()
    return [line[-n:].tolist() if side == "left" else line[:n].tolist() for line, n in zip(values, lengths)]


def _visual(rows: list[Row], layout: Layout, length: int, padded) -> dict[str, Tensor]:
    size, count = layout.image_size, layout.count
    most = max((len(row.views) for row in rows if row.views is not None), default=1 + QUADRANTS * layout.quadrants)
    pixels = torch.zeros((len(rows), 1, most, 3, size, size))
    for views, row in zip(pixels[:, 0], rows):
        if row.views is not None:
            own = torch.from_numpy(row.views).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            views[: len(own) - 1], views[-1] = own[:-1], own[-1]
    data = {
        "visual_index": padded([row.visual for row in rows], -1, length),
        "pixel_values": pixels,
        "image_kind": torch.tensor([[row.kind] for row in rows]),
    }
    if layout.tiled:
        data["tilings"] = torch.tensor([[row.tiling] for row in rows])
    if layout.text_guided:
        questions = [row.encoded.question_ids for row in rows]
        width = max(1, *map(len, questions))
        question = padded(questions, 0, width)
        mask = padded([[1] * len(one) for one in questions], 0, width).bool()
        # The published code pads with 0 and treats every id 0 as padding.
        data["question_ids"] = question[:, None]
        data["question_mask"] = (mask & (question != 0) if layout.hide_question_id_zero else mask)[:, None]
    if count:
        rounds = max(1, *(len(row.start) for row in rows))
        data["latent_start"] = padded([row.start for row in rows], -1, rounds)
        data["round_end"] = padded([row.end[:rounds] for row in rows], -1, rounds)
        data["round_image"] = torch.where(data["latent_start"] >= 0, 0, -1)
    return data
