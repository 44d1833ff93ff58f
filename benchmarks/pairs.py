"""EDP beside its counterparts on the same datasets: differences, and how sure they are, from a few seeds of each.

Scores are lists over the datasets of arrays (seeds,). Intervals are 95 % percentiles of a bootstrap that keeps the
datasets and draws each algorithm's seeds anew within each (Agarwal et al. 2021, whose rliable does the same).
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

RESAMPLES = 2000
Scores = Sequence[np.ndarray]


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def iqm(scores: Scores, axis: int = -1) -> np.ndarray:
    """Interquartile mean: of all seeds of all datasets the middle half."""
    return stats.trim_mean(np.concatenate(scores, axis=axis), 0.25, axis=axis)


def mean(scores: Scores, axis: int = -1) -> np.ndarray:
    return np.mean([of.mean(axis=axis) for of in scores], axis=0)


def improvement(ours: Scores, theirs: Scores, axis: int = -1) -> np.ndarray:
    """Mean over datasets of P(X > Y) + P(X = Y) / 2, X and Y a seed of each (Mann and Whitney's U / nm)."""
    of_dataset = []
    for x, y in zip(ours, theirs):
        x, y = np.moveaxis(x, axis, -1)[..., :, None], np.moveaxis(y, axis, -1)[..., None, :]
        of_dataset.append(((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1)))
    return np.mean(of_dataset, axis=0)


def less(of: Callable) -> Callable:
    """The difference of two algorithms in a mean."""
    return lambda ours, theirs, axis=-1: of(ours, axis) - of(theirs, axis)


def estimate(statistic: Callable, ours: Scores, theirs: Scores, resamples: int = RESAMPLES, rng: int = 0) -> Estimate:
    """A statistic of two algorithms with its interval."""
    num = len(ours)
    of_all = lambda *drawn, axis=-1: statistic(drawn[:num], drawn[num:], axis=axis)
    found = stats.bootstrap((*ours, *theirs), of_all, n_resamples=resamples, method="percentile", rng=rng)
    return Estimate(float(of_all(*ours, *theirs)), *map(float, found.confidence_interval))


def without_one(statistic: Callable, ours: Scores, theirs: Scores) -> tuple[float, float]:
    """(least, most) of a statistic with one dataset left out."""
    left_out = lambda scores, i: [*scores[:i], *scores[i + 1 :]]
    values = [statistic(left_out(ours, i), left_out(theirs, i)) for i in range(len(ours))]
    return float(min(values)), float(max(values))


def verdicts(pairs: Sequence[tuple[Scores, Scores]], planned: int = 0, level: float = 0.05) -> list[list[int]]:
    """By pair and dataset 1 (ahead), -1 (behind) or 0: by Welch's test, at a level for all of them together (Holm).

    Where the seeds of neither algorithm differ, the means decide. Of `planned` comparisons some may be still to come:
    they count as equal, so that what is significant remains so.
    """
    flat = [(x, y) for ours, theirs in pairs for x, y in zip(ours, theirs)]
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):  # of seeds that hardly differ
        p = [float(x.mean() == y.mean()) if x.std() + y.std() == 0 else welch(x, y) for x, y in flat]
    order, rejected = np.argsort(p), np.zeros(len(p), bool)
    for rank, i in enumerate(order):
        if p[i] > level / (max(planned, len(p)) - rank):
            break
        rejected[i] = True
    signs = iter(int(np.sign(x.mean() - y.mean())) * bool(sure) for (x, y), sure in zip(flat, rejected))
    return [list(itertools.islice(signs, len(ours))) for ours, _ in pairs]


def welch(x: np.ndarray, y: np.ndarray) -> float:
    return float(stats.ttest_ind(x, y, equal_var=False).pvalue)


def profile(scores: Scores, thresholds: np.ndarray) -> np.ndarray:
    """(thresholds,): the share of runs that score more, a mean over the datasets."""
    return np.mean([(of[:, None] > thresholds).mean(axis=0) for of in scores], axis=0)


def expected_online_performance(scores: np.ndarray) -> np.ndarray:
    """(policies,): the score to expect of the best of 1, 2, ... policies, drawn from these and tried.

    Kurenkov and Kolesnikov 2022, but without drawing a policy twice: the best of k is the i-th smallest of n with
    probability C(i - 1, k - 1) / C(n, k).
    """
    ordered, num = np.sort(scores), len(scores)
    weight = [[math.comb(i, k - 1) / math.comb(num, k) for i in range(num)] for k in range(1, num + 1)]
    return np.array(weight) @ ordered


def rows_of(pairs: dict[tuple[str, str], tuple[Scores, Scores]], planned: int = 0) -> list[dict[str, str | float]]:
    """For the CSV file and the table: a row for each pair."""
    rows = []
    for ((our_name, their_name), (ours, theirs)), signs in zip(pairs.items(), verdicts(list(pairs.values()), planned)):
        row = {"pair": f"{our_name} less {their_name}", "datasets": len(ours)}
        for name, of in {"iqm": less(iqm), "mean": less(mean), "improvement": improvement}.items():
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), estimate(of, ours, theirs)))
            row |= dict(zip((f"{name}_least", f"{name}_most"), without_one(of, ours, theirs)))
        rows.append(row | {"ahead": signs.count(1), "behind": signs.count(-1)})
    return rows


def lines_of(rows: list[dict]) -> list[dict[str, str]]:
    """The rows, for people."""
    interval = lambda name, form: f"{{{name}:{form}}} [{{{name}_low:{form}}}, {{{name}_high:{form}}}]"
    forms = {
        "": "{pair}",
        "interquartile mean": interval("iqm", ".1f"),
        "one dataset left out": "{iqm_least:.1f} to {iqm_most:.1f}",
        "mean": interval("mean", ".1f"),
        "mean, one left out": "{mean_least:.1f} to {mean_most:.1f}",
        "probability of improvement": interval("improvement", ".2f"),
        "ahead, behind": "{ahead:.0f}, {behind:.0f} of {datasets:.0f}",
    }
    return [{heading: form.format(**row) for heading, form in forms.items()} for row in rows]


def coverage(means: Sequence[float], deviations: Sequence[float], num_seeds: int, trials: int, rng: int = 0) -> float:
    """How often the interval of the interquartile mean holds what it estimates; scores are normal in each dataset."""
    random, hits, datasets = np.random.default_rng(rng), 0, list(zip(means, deviations))
    draw = lambda *shape: [random.normal(mean, deviation, (*shape, num_seeds)) for mean, deviation in datasets]
    expected = iqm(draw(10_000)).mean()
    for sample in (draw() for _ in range(trials)):
        drawn = iqm([of[random.integers(num_seeds, size=(RESAMPLES, num_seeds))] for of in sample])
        hits += np.percentile(drawn, 2.5) <= expected <= np.percentile(drawn, 97.5)
    return hits / trials


def draw(last: dict[Sequence[str], Sequence[Scores]], policies: dict[Sequence[str], Sequence[Scores]]) -> Figure:
    """By pair: the share of runs above a score; and the score of the best policy against how many were tried.

    `last` has the last scores of both of a pair, `policies` those of all evaluations, (evaluations * seeds,).
    """
    figure = Figure(figsize=(2.4 * len(last), 4.4), layout="constrained")
    axes = figure.subplots(2, len(last), sharey="row", squeeze=False)
    thresholds = np.linspace(0, 120, 241)
    for column, pair in enumerate(last):
        for i, (name, scores, tried) in enumerate(zip(pair, last[pair], policies[pair])):
            best = [expected_online_performance(of)[: min(map(len, tried))] for of in tried]
            style = {"color": f"C{i}", "linestyle": "-" if name.startswith("EDP") else "--", "label": name}
            axes[0, column].plot(thresholds, profile(scores, thresholds), **style)
            axes[1, column].plot(np.arange(1, len(best[0]) + 1), np.mean(best, axis=0), **style)
        axes[0, column].legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False)
        axes[0, column].set_xlabel("score", fontsize=8)
        axes[1, column].set_xlabel("policies tried", fontsize=8)
    axes[0, 0].set_ylabel("share of runs above", fontsize=8)
    axes[1, 0].set_ylabel("expected score of the best", fontsize=8)
    for ax in axes.flat:
        ax.tick_params(labelsize=7)
    return figure
