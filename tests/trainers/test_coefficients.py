"""The controller of Ziegler et al. by its own equation, and by what it does to a quantity that answers."""

import math

import pytest

from contrastive_align.trainers.conditional import AdaptiveCoefficient


@pytest.mark.parametrize(
    ("current", "error"), [(6.0, 0.0), (6.6, 0.1), (5.7, -0.05), (7.2, 0.2), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_update_is_the_equation(current, error, sign):
    c = AdaptiveCoefficient(0.3, target=6.0, horizon=1000, sign=sign)
    assert c.update(current, n=128) == pytest.approx(0.3 * (1 + sign * error * 0.128), rel=1e-12)
    assert c.value == pytest.approx(0.3 * (1 + sign * error * 0.128), rel=1e-12)


def test_without_a_target_it_is_constant():
    c = AdaptiveCoefficient(0.05, horizon=1000)
    assert [c.update(x, n=500) for x in (0.0, 1e9, math.nan)] == [0.05] * 3
    assert AdaptiveCoefficient(0.0, horizon=1).update(1.0, n=9) == 0.0


@pytest.mark.parametrize(("sign", "answer"), [(1, lambda c: 0.01 / c), (-1, lambda c: 3.0 * c)])
def test_it_brings_a_quantity_that_answers_to_its_target(sign, answer):
    """A penalty's coefficient lowers its quantity, a bonus's raises it; the wrong sign would run away."""
    c = AdaptiveCoefficient(0.5, target=0.2, horizon=100, sign=sign)
    for _ in range(1000):
        c.update(answer(c.value), n=50)
    assert answer(c.value) == pytest.approx(0.2, rel=1e-3)


def test_it_resumes_where_it_was():
    def steps(c, n):
        return [c.update(0.1 + 0.03 * i, n=10) for i in range(n)]

    c = AdaptiveCoefficient(0.05, target=0.2, horizon=100)
    steps(c, 5)
    resumed = AdaptiveCoefficient(0.05, target=0.2, horizon=100)
    resumed.load_state_dict(c.state_dict())
    assert resumed.value == c.value != 0.05
    assert steps(resumed, 5) == steps(c, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": -0.1}, "value is -0.1"),
        ({"value": math.nan}, "value is nan"),
        ({"value": 0.0}, "never moves 0"),
        ({"target": 0.0}, "target is 0.0"),
        ({"target": math.inf}, "target is inf"),
        ({"horizon": 0}, "horizon is 0"),
        ({"sign": 0}, "sign is 0"),
    ],
)
def test_it_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveCoefficient(**{"value": 0.05, "target": 0.1, "horizon": 100, **change})


def test_it_refuses_what_it_cannot_learn_from():
    c = AdaptiveCoefficient(0.05, target=0.1, horizon=100)
    with pytest.raises(ValueError, match="quantity is nan"):
        c.update(math.nan, n=1)
    for n in (-1, 500):
        with pytest.raises(ValueError, match="expected from 0 to below 5 x horizon"):
            c.update(0.1, n=n)
    assert c.value == 0.05
