"""How algorithms compare: numbers of rliable 1.2.0, and closed forms."""

import itertools

import numpy as np
import pairs
import pytest
from scipy import stats

# The last scores of two algorithms, five seeds, by dataset.
OURS = [[100.4, 98.4, 97.9, 93.0, 98.4], [39.2, 42.2, 32.4, 38.7, 38.1], [0.6, 1.3, 0.0, 0.0, 0.4]]
OURS += [[57.1, 73.9, 55.8, 40.4, 75.9]]
THEIRS = [[94.2, 100.4, 92.3, 94.0, 91.1], [43.7, 30.9, 32.2, 35.4, 28.7], [0.0, 0.0, 0.0, 0.2, 0.8]]
THEIRS += [[65.3, 46.2, 56.9, 65.3, 82.4]]
OURS, THEIRS = (list(map(np.array, scores)) for scores in (OURS, THEIRS))


@pytest.mark.parametrize(
    ("statistic", "value", "low", "high", "resamples"),
    [
        (pairs.less(pairs.iqm), 0.67, -7.59, 8.58, 20_000),
        (pairs.less(pairs.mean), 1.205, -3.045, 5.37, 20_000),
        (pairs.improvement, 0.645, 0.465, 0.81, 4_000),
    ],
)
def test_estimates_are_those_of_rliable(statistic, value, low, high, resamples):
    """Within four standard errors of both programs' ends, sqrt(p (1 - p) (1 / n + 1 / m)) / density."""
    found = pairs.estimate(statistic, OURS, THEIRS, resamples=20_000)
    assert found.value == pytest.approx(value, abs=1e-9)
    rng = np.random.default_rng(1)
    draw = lambda scores: [rng.choice(of, (20_000, len(of))) for of in scores]
    resampled = statistic(draw(OURS), draw(THEIRS))
    for end, p, expected in ((found.low, 0.025, low), (found.high, 0.975, high)):
        around = np.quantile(resampled, [p - 0.01, p + 0.01])
        standard_error = np.sqrt(p * (1 - p) * (1 / resamples + 1 / 20_000)) * np.diff(around)[0] / 0.02
        assert end == pytest.approx(expected, abs=4 * standard_error)


@pytest.mark.parametrize(("num_seeds", "expected"), [(2, 0.5), (200, 0.95)])
def test_coverage_of_known_intervals(num_seeds, expected):
    """Of two seeds the interval reaches from one to the other, and holds the mean every second time; of many, 95 %."""
    found = pairs.coverage([50.0], [3.0], num_seeds, trials=200)
    assert found == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 200))


def test_the_best_of_k_policies_by_trying_all_choices():
    scores = np.array([3.0, -1.0, 4.0, 4.0, 10.0])
    best = [np.mean([max(chosen) for chosen in itertools.combinations(scores, k)]) for k in range(1, 6)]
    np.testing.assert_allclose(pairs.expected_online_performance(scores), best, rtol=1e-12)


def test_the_profile_is_the_share_of_runs_above():
    scores = [np.array([0.0, 10.0]), np.array([5.0, 5.0, 5.0, 20.0])]
    np.testing.assert_allclose(pairs.profile(scores, np.array([-1.0, 5.0, 15.0])), [1.0, 0.375, 0.125])


def test_the_range_without_one_dataset():
    ours, theirs = [np.full(3, value) for value in (1.0, 2.0, 9.0)], [np.zeros(3)] * 3
    assert pairs.without_one(pairs.less(pairs.mean), ours, theirs) == (1.5, 5.5)


def test_ahead_and_behind_by_welch_and_holm():
    """Of four comparisons the smallest p is held against 0.05 / 4, the next against 0.05 / 3, and so on."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 4, 5))
    ours, theirs = list(noise[0] + [[9], [-9], [0], [1.5]]), list(noise[1])
    p = np.array([stats.ttest_ind(x, y, equal_var=False).pvalue for x, y in zip(ours, theirs)])
    adjusted = np.maximum.accumulate(np.sort(p) * [4, 3, 2, 1])[np.argsort(np.argsort(p))]
    expected = [int(np.sign(x.mean() - y.mean())) * (a <= 0.05) for x, y, a in zip(ours, theirs, adjusted)]
    assert pairs.verdicts([(ours[:2], theirs[:2]), (ours[2:], theirs[2:])]) == [expected[:2], expected[2:]]
    assert expected[:3] == [1, -1, 0]
    same = [np.full(3, 100.0)]
    for more in range(1, 30):  # comparisons to come are like equal ones
        assert pairs.verdicts([(ours, theirs)], len(ours) + more) == [
            pairs.verdicts([(ours, theirs), (same * more, same * more)])[0]
        ]
    assert pairs.verdicts([(same, same)]) == [[0]] and pairs.verdicts([(same, [np.zeros(3)])]) == [[1]]
