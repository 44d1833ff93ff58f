"""common/dpm_solver.py against its authors' implementation (the fixture), DDIM in NumPy, and exact solutions."""

import inspect
import json
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.diffusion import make_schedule
from common.dpm_solver import dpm_solver_sample

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

REFERENCE = np.load(Path(__file__).parent / "dpm_solver_reference.npz")
CASES = json.loads(str(REFERENCE["cases"]))
SCHEDULE = make_schedule("linear", 1000)
skips = pytest.mark.parametrize("skip", ["time_uniform", "logSNR"])


def alpha_sigma(k, schedule=SCHEDULE):
    """alpha_t and sigma_t at a fractional index k = t K - 1: log alpha_t is linear between the knots."""
    log_alpha = np.interp(k, np.arange(len(schedule.beta)), 0.5 * np.log(np.cumprod(1 - schedule.beta)))
    return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))


def gaussian_noise(a, b):
    """The exact noise prediction for data N(a, b^2)."""

    def noise_fn(x, k):
        alpha, sigma = alpha_sigma(k)
        centre, gain = alpha * a, sigma / (alpha**2 * b**2 + sigma**2)
        centre, gain = np.broadcast_to(centre, x.shape), np.broadcast_to(gain, x.shape)
        return (x - jnp.asarray(centre, x.dtype)) * jnp.asarray(gain, x.dtype)

    return noise_fn


def gaussian_exact(a, b, x):
    """The exact solution for it at t = 1/K: the ODE keeps (x - alpha a) / sqrt(alpha^2 b^2 + sigma^2) constant."""
    (alpha, sigma), (alpha_0, sigma_0) = alpha_sigma(999), alpha_sigma(0)
    scale = np.sqrt((alpha_0**2 * b**2 + sigma_0**2) / (alpha**2 * b**2 + sigma**2))
    return alpha_0 * a + scale * (x - alpha * a)


def smooth_noise(a, b):
    time = lambda k: np.cos(5 * (k + 1) / 1000) * b
    return lambda x, k: jnp.tanh(x @ jnp.asarray(a, x.dtype) + jnp.asarray(time(k), x.dtype)[None])


def wild_noise(x, k):
    """A predictor whose implied clean samples leave [-1, 1] at every step."""
    return 3 * jnp.sin(4 * x + 0.01 * k)


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 3e-5), (True, 1e-9)], ids=["float32", "float64"])
@pytest.mark.parametrize("i", range(len(CASES)))
def test_solver_agrees_with_its_authors_implementation(i, x64, tolerance):
    """Orders 1 to 3, both spacings, 15 to 17 calls, at K = 1000 of the linear schedule; and the fixture with itself."""
    case, expected = CASES[i], REFERENCE[f"x_0_{i}"]
    assert case["K"] == 1000
    a, b = np.array(case["a"]), np.array(case["b"])
    noise_fn = {"gaussian": gaussian_noise, "smooth": smooth_noise}[case["model"]](a, b)
    with jax.enable_x64(x64):
        x_init = jnp.asarray(REFERENCE[f"x_T_{i}"], jnp.float64 if x64 else jnp.float32)
        result = dpm_solver_sample(noise_fn, SCHEDULE, x_init, case["steps"], case["order"], case["skip"])
        assert result.dtype == x_init.dtype
        np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    if case["model"] == "gaussian":  # so that the closed form may stand in where the fixture has no case
        np.testing.assert_allclose(gaussian_exact(a, b, REFERENCE[f"x_T_{i}"]), REFERENCE[f"exact_{i}"], atol=1e-9)


@lru_cache
def gaussian_error(num_calls, order, skip):
    """Largest error of the sample, in float64."""
    a, b = np.array([0.4, -0.7, 0.1]), np.array([0.5, 0.8, 1.3])
    x_init = np.random.default_rng(0).normal(size=(4, 3))
    result = dpm_solver_sample(gaussian_noise(a, b), SCHEDULE, jnp.asarray(x_init), num_calls, order, skip)
    return np.abs(np.asarray(result) - gaussian_exact(a, b, x_init)).max()


def test_error_falls_as_the_order_promises():
    """Twice the calls divide the error by 2^order; logSNR spacing, where every step is alike."""
    for order in (1, 2, 3):
        errors = np.array([gaussian_error(num_calls, order, "logSNR") for num_calls in (24, 48, 96)])
        assert np.all(np.log2(errors[:-1] / errors[1:]) > order - 0.35), (order, errors)


@pytest.mark.parametrize("clip", [False, True])
def test_first_order_is_ddim(clip):
    """27 calls over K = 1000 meet every 37th index exactly: DDIM with eta = 0, from alpha_bar alone."""
    x = x_init = np.random.default_rng(0).normal(size=(16, 3))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for k, next_k in zip(range(999, 0, -37), range(962, -1, -37)):
        noise = 3 * np.sin(4 * x + 0.01 * k)
        x0 = (x - np.sqrt(1 - alpha_bar[k]) * noise) / np.sqrt(alpha_bar[k])
        if clip:
            assert np.abs(x0).max() > 1
            x0 = np.clip(x0, -1, 1)
            noise = (x - np.sqrt(alpha_bar[k]) * x0) / np.sqrt(1 - alpha_bar[k])
        x = np.sqrt(alpha_bar[next_k]) * x0 + np.sqrt(1 - alpha_bar[next_k]) * noise
    if clip:
        x = np.clip(x, -1, 1)
    result = dpm_solver_sample(wild_noise, SCHEDULE, jnp.asarray(x_init), 27, 1, clip=clip)
    np.testing.assert_allclose(result, x, atol=1e-8 * np.abs(x).max())


@skips
@pytest.mark.parametrize("order", [1, 2, 3])
def test_clip_bounds_the_clean_sample_of_every_prediction_and_the_result(order, skip):
    """The same as a predictor that bounds its own x_0, alpha_t and sigma_t at the solver's own fractional k."""
    outside = []

    def bounded(x, k):
        alpha, sigma = alpha_sigma(k)
        x0 = (x - sigma * wild_noise(x, k)) / alpha
        outside.append(float(jnp.abs(x0).max()) > 1)
        return (x - alpha * jnp.clip(x0, -1, 1)) / sigma

    x_init = jnp.asarray(np.random.default_rng(0).normal(size=(32, 3)))
    expected = dpm_solver_sample(bounded, SCHEDULE, x_init, 15, order, skip)
    result = dpm_solver_sample(wild_noise, SCHEDULE, x_init, 15, order, skip, clip=True)
    assert outside == [True] * 15
    np.testing.assert_allclose(result, np.clip(expected, -1, 1), atol=1e-9)
    assert np.abs(result).max() <= 1


@skips
@pytest.mark.parametrize(("name", "num_steps"), [("linear", 1000), ("linear", 50), ("vp", 5), ("cosine", 2000)])
def test_solver_makes_exactly_the_calls_it_is_given_within_the_index_range(name, num_steps, skip):
    """The first at k = K - 1, then falling from step to step, none outside [0, K - 1]."""
    schedule, x_init = make_schedule(name, num_steps), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    for order in (1, 2, 3):
        for num_calls in {order, *range(3, 8), 15, 16, 17, 30}:
            calls = []
            noise_fn = lambda x, k: calls.append(k) or x
            jax.eval_shape(lambda x: dpm_solver_sample(noise_fn, schedule, x, num_calls, order, skip), x_init)
            assert len(calls) == num_calls
            np.testing.assert_allclose(calls[0], num_steps - 1, atol=1e-9)
            assert np.all(np.diff(calls) < 0) and calls[-1] >= 0 and calls[0] <= num_steps - 1


@pytest.mark.parametrize("t_end", [1e-3, 0.1])
def test_solver_stops_at_t_end_or_the_first_knot(t_end):
    """With eps = 0 a sample is only rescaled, by alpha(t_end) / alpha(1); below the first knot sigma^2 is negative."""
    for name, num_steps in (("linear", 1000), ("linear", 50), ("vp", 5)):
        schedule = make_schedule(name, num_steps)
        last_k = max(t_end * num_steps - 1, 0)
        expected = alpha_sigma(last_k, schedule)[0] / alpha_sigma(num_steps - 1, schedule)[0]
        result = dpm_solver_sample(lambda x, k: jnp.zeros_like(x), schedule, jnp.ones((1, 1)), 6, t_end=t_end)
        np.testing.assert_allclose(result[0, 0], expected, rtol=1e-10)


def test_impossible_settings_are_refused():
    """Orders that do not exist, fewer calls than a step makes, an unknown spacing (past the tests' type check), and
    one step of diffusion: between t = 1 and t = 1 / K = 1 there is nothing to integrate.
    """
    sample = lambda *settings: dpm_solver_sample(lambda x, k: x, SCHEDULE, jnp.zeros((1, 1)), *settings)
    for order in (0, 4):
        with pytest.raises(ValueError, match="orders 1, 2 and 3"):
            sample(15, order)
    for num_calls, order in ((0, 1), (1, 2), (2, 3)):
        with pytest.raises(ValueError, match=f"at least {order}"):
            sample(num_calls, order)
    two, one = (make_schedule("vp", num_steps) for num_steps in (2, 1))
    assert np.isfinite(dpm_solver_sample(lambda x, k: x, two, jnp.ones((1, 1)))).all()
    with pytest.raises(ValueError, match="at least 2 diffusion steps, not 1"):
        dpm_solver_sample(lambda x, k: x, one, jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="quadratic"):
        inspect.unwrap(dpm_solver_sample)(lambda x, k: x, SCHEDULE, jnp.zeros((1, 1)), 15, 3, "quadratic")
