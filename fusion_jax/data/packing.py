"""Decides which examples share a row by best-fit packing, and measures it on a typical length mix.

    lengths    7 5 4 3 3 2        capacity 8
    by length  7 | 5 | 4
    3 -> the fullest row with room: the 5's        7 | 5 3 | 4
    3 -> the 4's                                   7 | 5 3 | 4 3
    2 -> no row has room for it                    7 | 5 3 | 4 3 | 2

Nothing here knows tokens or images: sizes go in, rows of indices come out, the same for the same sizes.
`python -m fusion_jax.benchmark input` reports how full rows of 4096 positions become.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LATENT_COUNTS = (4, 16, 36, 64, 144)  # the published set of l^2
WINDOW = 1024  # examples that are packed together, with one l^2
NEARLY_FULL = 0.95


def best_fit(
    lengths: Sequence[int], capacity: int, others: Sequence[tuple[Sequence[int], int]] = ()
) -> list[list[int]]:
    """Packs by best-fit decreasing: the longest first, each into the fullest row that still has room.

    It takes time in n log(capacity): 100,000 lengths are packed in well under a second. With `others` it passes over
    rows without room for those one by one, which is meant for windows of some thousands.

    Args:
      lengths: size of each example, at least 1. capacity: size of a row.
      others: further (sizes, capacity of a row) that must hold at the same time, such as images and rounds.

    Returns:
      Rows of indices into `lengths`, every index exactly once: ascending in a row, rows by their first index, so that
      the rows follow the order of the examples and not their lengths.

    Raises:
      ValueError: an example that no row can hold.
    """
    sizes = [(np.asarray(lengths, np.int64), capacity), *((np.asarray(s, np.int64), c) for s, c in others)]
    for of_each, limit in sizes:
        too_large = np.flatnonzero(of_each > limit)
        if len(too_large):
            raise ValueError(f"example {too_large[0]} has size {of_each[too_large[0]]}; a row holds {limit}.")
    order = np.argsort(-sizes[0][0], kind="stable").tolist()
    lengths, further = sizes[0][0].tolist(), [of_each.tolist() for of_each, _ in sizes[1:]]
    rows: list[list[int]] = []
    left: list[list[int]] = []  # per row, what is left of each further capacity
    with_room: dict[int, list[int]] = {}  # rows by what is left of their length
    rooms: list[int] = []  # the keys of `with_room`, ascending

    for i in order:
        needs = [of_each[i] for of_each in further]
        row = -1
        k = bisect_left(rooms, lengths[i])
        while row < 0 and k < len(rooms):
            candidates = with_room[rooms[k]]
            for at in range(len(candidates) - 1, -1, -1):
                if all(need <= free for need, free in zip(needs, left[candidates[at]])):
                    row = candidates.pop(at)
                    break
            else:
                k += 1
        if row < 0:
            row, room = len(rows), capacity
            rows.append([])
            left.append([limit for _, limit in sizes[1:]])
        else:
            room = rooms[k]
            if not with_room[room]:
                del with_room[room], rooms[k]
        rows[row].append(i)
        left[row] = [free - need for need, free in zip(needs, left[row])]
        room -= lengths[i]
        if room:
            if room not in with_room:
                with_room[room] = []
                insort(rooms, room)
            with_room[room].append(row)
    return sorted(sorted(row) for row in rows)


def preferred(rows: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Orders `best_fit`'s rows as they should go; examples of the last rows wait for others to share a row with.

    First the row of the first example, so that none waits for ever; then rows that are nearly full; then the others.
    """
    poor = [k > 0 and sum(lengths[i] for i in row) < NEARLY_FULL * capacity for k, row in enumerate(rows)]
    return [list(rows[k]) for k in sorted(range(len(rows)), key=lambda k: (poor[k], k))]


def efficiency(rows: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> float:
    """Returns the share of the rows' positions that hold tokens."""
    return sum(int(lengths[i]) for row in rows for i in row) / (len(rows) * capacity)


def padding_efficiency(lengths: Sequence[int], batch_size: int) -> float:
    """Returns the same share if each example has a row and each batch, the last perhaps smaller, has its longest's."""
    lengths = np.asarray(lengths)
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return float(lengths.sum() / sum(len(batch) * batch.max() for batch in batches))


@dataclass(frozen=True)
class Mix:
    """A synthetic but typical mix of samples: 90% have an image; rounds 1 (60%), 2-3 (25%), 4-8 (15%); a question has
    10-60 tokens, an answer 5-20 (40%), 60-200 (40%) or 200-500 (20%).

    Attributes:
      has_image: (count,) bool. rounds: (count,) int. questions, answers: (count, 8) int, tokens of each round; those
        from `rounds` on are there but do not count.
    """

    has_image: np.ndarray
    rounds: np.ndarray
    questions: np.ndarray
    answers: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int) -> "Mix":
        has_image = rng.random(count) < 0.9
        kind = rng.choice(3, count, p=(0.6, 0.25, 0.15))
        rounds = np.choose(kind, (np.ones(count, int), rng.integers(2, 4, count), rng.integers(4, 9, count)))
        shape = (count, 8)
        questions = rng.integers(10, 61, shape)
        kind = rng.choice(3, shape, p=(0.4, 0.4, 0.2))
        answers = np.choose(
            kind, [rng.integers(low, high + 1, shape) for low, high in ((5, 20), (60, 200), (200, 500))]
        )
        return cls(has_image, rounds, questions, answers)


def length_mix(count: int, seed: int, image_tokens: int = 576, longest: int = 4096, window: int = WINDOW) -> np.ndarray:
    """Returns the positions that the samples of a `Mix` take: (count,) int64.

    With an image each round has l^2 latents, drawn once per `window` samples; without one there are none. Samples
    longer than `longest` lose whole last rounds, none is dropped.
    """
    rng = np.random.default_rng(seed)
    latents = np.repeat(rng.choice(LATENT_COUNTS, -(-count // window)), window)[:count]
    mix = Mix.draw(rng, count)
    # Length after each round; the last one that the sample has and that fits.
    ends = np.cumsum(mix.questions + mix.answers + (mix.has_image * latents)[:, None], axis=1)
    ends += (mix.has_image * image_tokens)[:, None]
    fitting = np.maximum((ends <= longest).sum(1), 1)
    return ends[np.arange(count), np.minimum(mix.rounds, fitting) - 1]


def measure(
    count: int = 100_000, seed: int = 0, capacity: int = 4096, batch_size: int = 128, window: int = WINDOW
) -> dict[str, float]:
    """Measures both efficiencies on the length mix: packed window by window, and padded to each batch's longest."""
    lengths = length_mix(count, seed, longest=capacity, window=window)
    rows = []
    for start in range(0, count, window):
        rows += [[start + i for i in row] for row in best_fit(lengths[start : start + window], capacity)]
    return {
        "packing_efficiency": efficiency(rows, lengths, capacity),
        "padding_efficiency": padding_efficiency(lengths, batch_size),
    }
