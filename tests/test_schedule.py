"""The learning-rate schedule against its definition."""

import math

import pytest

from common.schedule import multiplier


def test_warmup_rises_by_equal_parts_from_one_over_warmup_to_the_peak():
    values = [multiplier(step, steps=100, warmup=4) for step in range(5)]
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_decay_matches_the_formula_and_ends_at_the_floor(decay):
    steps, warmup, floor = 50, 10, 0.1
    for step in range(warmup, steps + 1):
        progress = (step - warmup) / 40
        shape = 0.5 + 0.5 * math.cos(math.pi * progress) if decay == "cosine" else 1 - progress
        value = multiplier(step, steps=steps, warmup=warmup, decay=decay, floor=floor)
        assert value == pytest.approx(0.1 + 0.9 * shape, abs=1e-12)
    assert multiplier(steps, steps=steps, warmup=warmup, decay=decay, floor=floor) == floor
    assert multiplier(10 * steps, steps=steps, warmup=warmup, decay=decay, floor=floor) == floor


def test_constant_stays_at_the_peak_after_the_warmup():
    assert [multiplier(step, steps=4, warmup=2, decay="constant") for step in range(6)] == [0.5, 1, 1, 1, 1, 1]


def test_no_warmup_starts_at_the_peak():
    assert multiplier(0, steps=10, warmup=0) == 1.0


@pytest.mark.parametrize("warmup", [10, 2000])
def test_run_shorter_than_the_warmup_only_warms_up(warmup):
    assert [multiplier(step, steps=10, warmup=warmup) for step in (0, 9)] == [1 / warmup, 10 / warmup]
    assert multiplier(10, steps=10, warmup=warmup) == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "cosin"}, "decay must be one of cosine, linear, constant; got 'cosin'"),
        ({"floor": 2.0}, "got 2.0"),
        ({"warmup": -1}, "got -1 and"),
        ({"steps": 0}, "got 0 and 0"),
    ],
)
def test_unknown_decay_floor_above_the_peak_and_negative_counts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        multiplier(0, **{"steps": 10, "warmup": 0} | options)
