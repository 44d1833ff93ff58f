"""How far the solver narrows a Gaussian policy, against closed forms."""

from pathlib import Path

import numpy as np
import pytest
import solver

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

PAGE = Path(__file__).parents[1] / "docs" / "short-of-compute.md"
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def of_marginal(deviation, alpha_bar):
    return np.sqrt(alpha_bar * deviation**2 + 1 - alpha_bar)


@pytest.mark.parametrize("spacing", ["time_uniform", "logSNR"])
def test_with_many_calls_the_deviation_is_that_of_the_exact_path(spacing):
    """To the three digits of the table: the exact path keeps the ratio to the marginal's deviation."""
    deviation = solver.DEVIATIONS
    exact = of_marginal(deviation, ALPHA_BAR[0]) / of_marginal(deviation, ALPHA_BAR[-1])
    np.testing.assert_allclose(solver.sample_spread(deviation, 1000, spacing)[0], exact, rtol=0, atol=0.0005)


def test_the_last_of_15_calls_is_what_narrows():
    """From the exact path one step of first order narrows as much: the calls before it err by less than a tenth of it.

    The step goes to sqrt(alpha_bar_1) E[a^0 | a^k] + sigma_1 E[noise | a^k], both linear in a^k.
    """
    deviation = np.array([0.1, 0.2])
    spread, levels = solver.sample_spread(deviation, 15, "time_uniform")
    alpha_bar = 1 - levels[-1] ** 2
    clean = np.sqrt(alpha_bar) * deviation**2 / of_marginal(deviation, alpha_bar)
    noise = levels[-1] / of_marginal(deviation, alpha_bar)
    one_step = np.sqrt(ALPHA_BAR[0]) * clean + np.sqrt(1 - ALPHA_BAR[0]) * noise
    assert np.all(np.abs(spread - one_step) < 0.1 * (deviation - spread))


def test_the_page_has_the_table_that_the_command_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(solver, "IMAGE", tmp_path / "narrowing.png")
    solver.main()
    assert (tmp_path / "narrowing.png").stat().st_size > 0
    assert capsys.readouterr().out.strip() in PAGE.read_text()
