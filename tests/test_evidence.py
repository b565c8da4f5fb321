"""common/evidence.py: intervals and the rule of significance against scipy's t distribution."""

import math

import pytest
from scipy import stats

from common.evidence import T_95, T_975, Paired, digits_of, is_below, paired_difference, quantile


@pytest.mark.parametrize("degrees", range(1, 11))
def test_quantiles_match_scipys(degrees):
    assert quantile(T_95, degrees + 1) == pytest.approx(stats.t.ppf(0.95, degrees), abs=5e-4)
    assert quantile(T_975, degrees + 1) == pytest.approx(stats.t.ppf(0.975, degrees), abs=5e-4)


def test_quantiles_beyond_the_table_are_no_smaller_than_scipys():
    assert quantile(T_975, 100) >= stats.t.ppf(0.975, 99)


@pytest.mark.parametrize("target", [1.9, 2.0, 2.05, 2.1, 2.2])
def test_rule_of_significance_matches_scipys_one_sided_test(target):
    losses = [1.9, 2.0, 2.1]
    p = stats.ttest_1samp(losses, target, alternative="less").pvalue
    assert is_below(target, losses) == (p <= 0.05)


def test_one_seed_is_below_a_target_that_it_reaches():
    assert is_below(2.0, [2.0]) and not is_below(2.0, [2.1])
    assert is_below(2.0, [1.5, 1.5, 1.5]) and not is_below(2.0, [2.5, 2.5])


def test_paired_difference_matches_scipys_interval_over_shared_seeds():
    ours, others = {1: 1.0, 2: 1.2, 3: 1.1, 4: 9.0}, {1: 1.1, 2: 1.25, 3: 1.3, 5: 0.0}
    found = paired_difference(ours, others)
    low, high = stats.ttest_rel([1.0, 1.2, 1.1], [1.1, 1.25, 1.3]).confidence_interval(0.95)
    assert found.mean == pytest.approx((low + high) / 2)
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-3)
    assert found.seeds == 3
    assert found.is_beyond_noise == (low > 0 or high < 0)


def test_fewer_than_two_finite_pairs_have_no_interval():
    assert paired_difference({1: 1.0, 2: 1.0}, {1: 2.0}) is None
    assert paired_difference({1: 1.0, 2: math.inf}, {1: 2.0, 2: 2.0}) is None
    assert Paired(0.1, 0.2, 3).is_beyond_noise is False


@pytest.mark.parametrize(
    "spread, decimals", [(0.0056, 3), (0.0011, 4), (0.158, 2), (0.021, 3), (0.44, 1), (12.0, 0), (0.0, 3), (1e-9, 4)]
)
def test_decimals_match_a_spread_of_two_digits_or_one(spread, decimals):
    assert digits_of(spread) == decimals
