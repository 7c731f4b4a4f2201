"""Intervals, bounds and tests behind the figures: exact ones where there are, at 95% unless another is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scipy import stats

CONFIDENCE = 0.95


def interval_of_rate(count: int, n: int) -> tuple[float, float]:
    """Two-sided 95% Clopper-Pearson interval of the share that `count` of n is."""
    interval = stats.binomtest(count, n).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def interval_of_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of at least two finite values, and its two-sided 95% t interval."""
    mean, error = sum(values) / len(values), stats.sem(values)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, error) if error > 0 else (mean, mean)
    return mean, float(low), float(high)


def most_missed(population: int, drawn: int, found: int, confidence: float = CONFIDENCE) -> int:
    """Upper bound (exact, hypergeometric) of the marked ones left in `population`, not counting those found.

    `drawn` of the population were looked at, drawn at random without replacement, and `found` of them were marked.
    confidence: that the bound holds.
    """
    low, high = found, population - drawn + found  # marked ones in the population: as few, and as many, as can be
    while low < high:
        middle = (low + high + 1) // 2
        if stats.hypergeom.cdf(found, population, middle, drawn) >= 1 - confidence:
            low = middle
        else:
            high = middle - 1
    return low - found


def marked_between(population: int, drawn: int, found: int, unsure: int = 0) -> tuple[int, int]:
    """95% interval (exact, hypergeometric) of the marked ones left in `population`; arguments as of `most_missed`.

    unsure: drawn ones that may be marked or not: they are for the upper end, and are not for the lower.
    """
    confidence = (1 + CONFIDENCE) / 2
    least = population - drawn - most_missed(population, drawn, drawn - found, confidence)
    return least, most_missed(population, drawn, found + unsure, confidence)


def mcnemar(attacked: Mapping[str, str], plain: Mapping[str, str]) -> float:
    """Exact one-sided McNemar test: p of so many more `comply` than the same prompts have in `plain` by chance."""
    gained = sum(outcome == "comply" and plain[name] != "comply" for name, outcome in attacked.items())
    lost = sum(outcome != "comply" and plain[name] == "comply" for name, outcome in attacked.items())
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values that hold for the whole family of tests."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
