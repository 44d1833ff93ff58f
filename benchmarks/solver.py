"""Why DPM-Solver narrows a policy: docs/images/narrowing.png, and the numbers of its right half as a table.

    python benchmarks/solver.py

The policy is a Gaussian with its exact noise prediction, so that nothing but the solver errs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from common.diffusion import Spacing, make_schedule
from common.dpm_solver import dpm_solver_sample

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "narrowing.png"
SCHEDULE = make_schedule("linear", 1000)
DEVIATIONS = np.array([0.1, 0.2, 0.3, 0.5])
SOLVERS: dict[str, tuple[int, Spacing]] = {
    "15 calls, uniform in time: the paper's": (15, "time_uniform"),
    "30 calls, uniform in time": (30, "time_uniform"),
    "15 calls, by logSNR": (15, "logSNR"),
    "10 calls, by logSNR": (10, "logSNR"),
    "9 calls, by logSNR": (9, "logSNR"),
    "6 calls, by logSNR": (6, "logSNR"),
}


def noise_level(k):
    """sigma^2 = 1 - alpha_bar at a fractional index, where log alpha_bar is linear between two steps."""
    return -np.expm1(np.interp(k, np.arange(len(SCHEDULE.beta)), np.log(SCHEDULE.alpha_bar)))


def sample_spread(deviation: np.ndarray, num_calls: int, spacing: Spacing) -> tuple[np.ndarray, np.ndarray]:
    """(deviation of the samples of N(0, deviation^2), noise's deviation sigma at each call), for initial noise N(0, 1).

    The exact prediction is linear in the sample, and so is the solver: the deviation is what it makes of 1.
    """
    levels = []

    def noise_fn(x, k):
        variance = noise_level(k)
        levels.append(np.sqrt(variance))
        return np.sqrt(variance) / ((1 - variance) * deviation**2 + variance) * x

    ones = jnp.ones_like(jnp.asarray(deviation))
    spread = dpm_solver_sample(noise_fn, SCHEDULE, ones, num_calls, skip=spacing)
    return np.asarray(spread), np.array(levels)


def main() -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    deviations = np.geomspace(0.03, 1, 100)
    print(f"| | {' | '.join(map(str, DEVIATIONS))} |\n|{'---|' * (1 + len(DEVIATIONS))}")
    for name, solver in SOLVERS.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in sample_spread(DEVIATIONS, *solver)[0])} |")
        spread, levels = sample_spread(deviations, *solver)
        color = right.plot(deviations, spread / deviations, "--" if solver[1] == "time_uniform" else "-", label=name)
        if solver[0] == 15:
            levels = [*levels, np.sqrt(noise_level(0))]
            left.plot(range(1, 17), levels, "o-", color=color[0].get_color(), label=name)
    left.set(yscale="log", xlabel="call; 16 is the action", ylabel="deviation of the noise left")
    right.axhline(1, color="gray", linewidth=0.8)
    right.set(xscale="log", xlabel="deviation of the policy", ylabel="deviation of the samples / of the policy")
    for ax in (left, right):
        ax.legend(fontsize="small")
    figure.savefig(IMAGE, dpi=95)


if __name__ == "__main__":
    main()
