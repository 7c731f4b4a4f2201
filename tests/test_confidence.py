"""Bounds and tests against their definitions, or by hand."""

import pytest
from scipy import stats

from harden.confidence import holm, marked_between, mcnemar, most_missed


def test_mcnemar_by_hand():
    plain = dict.fromkeys("abcdefgh", "refuse") | {"h": "comply"}
    attacked = dict.fromkeys("abcdefgh", "comply") | {"g": "degenerate", "h": "refuse"}
    assert mcnemar(attacked, plain) == pytest.approx((1 + 7) / 2**7)  # 6 gained, 1 lost: P(X >= 6), X ~ B(7, 1/2)
    assert mcnemar(plain, plain) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("population", "drawn", "found"), [(40, 10, 0), (40, 10, 2), (500, 60, 1)])
def test_the_bound_is_the_largest_number_that_the_sample_does_not_refute(population, drawn, found):
    def chance(marked):  # of so few in the sample, if so many are marked
        return sum(stats.hypergeom.pmf(x, population, marked, drawn) for x in range(found + 1))

    bound = most_missed(population, drawn, found) + found
    assert chance(bound) >= 0.05 > chance(bound + 1)


@pytest.mark.parametrize(("population", "drawn", "found"), [(60, 20, 5), (60, 20, 0), (60, 20, 20), (300, 30, 4)])
def test_the_interval_is_of_the_numbers_that_the_sample_does_not_refute(population, drawn, found):
    least, most = marked_between(population, drawn, found)
    possible = [
        marked - found
        for marked in range(found, population - drawn + found + 1)
        if stats.hypergeom.cdf(found, population, marked, drawn) >= 0.025
        and stats.hypergeom.sf(found - 1, population, marked, drawn) >= 0.025
    ]
    assert (least, most) == (min(possible), max(possible))
    assert marked_between(9, 9, found=3) == (0, 0)


def test_bounds_at_the_ends():
    assert most_missed(40, 40, 3) == 0 and most_missed(40, 0, 0) == 40 and most_missed(40, 10, 10) == 30
