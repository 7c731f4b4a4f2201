import json
import math

import pytest
from conftest import ROOT

from harden.errors import MeasurementError
from harden.results import Certificate, Mean, Rate, Results, SuiteResults
from harden.verdict import GateResults, Verdict


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [(0, 100, 0.0, 0.0362), (66, 100, 0.5585, 0.7518), (100, 100, 0.9638, 1.0), (1, 20, 0.0013, 0.2487)],
)
def test_rates_have_clopper_pearson_intervals(count, n, low, high):
    """Values of the exact interval as tabulated; 0 of n has the closed form 1 - 0.025^(1/n)."""
    rate = Rate.of(count, n)
    assert (rate.low, rate.high) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))
    assert rate.rate == count / n
    if count == 0:
        assert rate.high == pytest.approx(1 - 0.025 ** (1 / n))


def test_a_mean_has_a_t_interval():
    mean = Mean.of([1.0, 2.0, 3.0])
    half = 4.302653 * math.sqrt(1 / 3)  # t(0.975, 2 degrees of freedom) x standard error
    assert (mean.low, mean.high) == (pytest.approx(2 - half, abs=1e-4), pytest.approx(2 + half, abs=1e-4))
    assert Mean.of([0.0, 0.0]).high == 0.0


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_no_mean_of_nothing(values):
    with pytest.raises(MeasurementError):
        Mean.of(values)


def test_no_rate_of_nothing():
    with pytest.raises(MeasurementError):
        Rate.of(0, 0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("results", Results),
        ("attack", SuiteResults),
        ("certificate", Certificate),
        ("gate", GateResults),
        ("verdict", Verdict),
    ],
)
def test_the_published_schema_is_the_one_of_the_code(name, kind):
    schema = json.loads((ROOT / f"docs/{name}.schema.json").read_text())
    schema.pop("$schema")
    assert schema == kind.model_json_schema(), "run scripts/write_results_schema.py docs"
