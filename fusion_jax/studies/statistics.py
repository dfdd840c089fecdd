"""Computes the figures of a study: intervals, differences to the baseline and p-values. NumPy and SciPy alone.

The scores of a variant are an array of (runs, questions), each from 0 to 1; its runs differ in their seeds. The runs
are a sample of all runs that one could train, and the questions of all that one could ask, so an interval resamples
both; with few runs it is somewhat too narrow. Two p-values answer two questions:

    p_runs       would other runs of both variants differ like these? Whole runs change places between the variants.
    p_questions  would these same runs differ on other questions, too? The variants change places question by question.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

DRAWS = 9999
_SEED = 0
_AT_ONCE = 500  # draws of the bootstrap that are held in memory together


def bootstrap_interval(scores: Float[np.ndarray, "R Q"], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the mean score over runs and questions, both drawn with replacement.

    With one run the questions alone are drawn, and the interval says nothing about other runs.
    """
    runs, questions = scores.shape
    rng = np.random.default_rng(_SEED)
    means = []
    for start in range(0, DRAWS, _AT_ONCE):
        count = min(_AT_ONCE, DRAWS - start)
        of_runs, of_questions = _times_drawn(rng, count, runs), _times_drawn(rng, count, questions)
        means.append(np.sum(of_runs @ scores * of_questions, 1) / (runs * questions))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _times_drawn(rng: np.random.Generator, draws: int, size: int) -> Float[np.ndarray, "D N"]:
    """How often each of `size` things comes in `draws` samples of `size` draws with replacement."""
    drawn = rng.integers(size, size=(draws, size)) + size * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * size).reshape(draws, size).astype(float)


def spread(means: Float[np.ndarray, "R"]) -> float | None:
    """The standard deviation of the runs' means, estimated from a sample of runs; None with fewer than two."""
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def p_runs(first: Float[np.ndarray, "R"], second: Float[np.ndarray, "S"]) -> float | None:
    """The two-sided p-value of a difference between the means of two variants' runs; None where each has only one run.

    Every way of assigning the runs to two variants is counted, or DRAWS of them drawn if there are more.
    """
    if min(len(first), len(second)) < 2:
        return None
    result = stats.permutation_test(
        (first, second),
        lambda a, b, axis: np.mean(a, axis) - np.mean(b, axis),
        permutation_type="independent",
        n_resamples=DRAWS,
        vectorized=True,
        rng=np.random.default_rng(_SEED),
    )
    return float(result.pvalue)


def p_questions(differences: Float[np.ndarray, "Q"]) -> float:
    """The two-sided p-value of a mean difference over questions whose signs are changed at random; 1 if all are 0."""
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    result = stats.permutation_test(
        (differences,),
        lambda d, axis: np.mean(d, axis),
        permutation_type="samples",
        n_resamples=DRAWS,
        batch=_AT_ONCE,
        vectorized=True,
        rng=np.random.default_rng(_SEED),
    )
    return float(result.pvalue)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of the p-values of several comparisons; those that are None stay so and do not count."""
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (value, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        corrected[place] = highest
    return corrected


def smallest_p(runs: int, comparisons: int) -> float | None:
    """The smallest corrected `p_runs` that comparisons of so many runs each can give; None with one run."""
    return min(1.0, 2 * comparisons / math.comb(2 * runs, runs)) if runs > 1 else None
