"""common/diffusion.py against closed forms and float64 NumPy; Eq. 8, corruption, is in test_equations.py."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.diffusion import ddpm_sample, make_schedule

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")


# ------------------------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("num_steps", [21, 100, 1000])
def test_linear_schedule(num_steps):
    """beta from 1e-4 to 0.02 in K steps, times 1000 / K."""
    beta = [(1e-4 + (0.02 - 1e-4) * i / (num_steps - 1)) * 1000 / num_steps for i in range(num_steps)]
    np.testing.assert_allclose(make_schedule("linear", num_steps).beta, beta, rtol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 5, 1000])
def test_vp_schedule_is_that_of_the_variance_preserving_sde(num_steps):
    """The betas telescope: alpha_bar^k = exp(-b_min k / K - (b_max - b_min) k^2 / (2 K^2)), b from 0.1 to 10."""
    k = np.arange(1, num_steps + 1) / num_steps
    alpha_bar = np.exp(-0.1 * k - (10 - 0.1) * k**2 / 2)
    np.testing.assert_allclose(make_schedule("vp", num_steps).alpha_bar, alpha_bar, rtol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 50, 1000])
def test_cosine_schedule(num_steps):
    """alpha_bar^k = f(k) / f(0), f = cos^2((k/K + 0.008) / 1.008 pi/2), but beta <= 0.999 (improved DDPM)."""
    schedule = make_schedule("cosine", num_steps)
    level = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alpha_bar[:-1], level[1:-1] / level[0], rtol=1e-9)
    assert schedule.beta[-1] == 0.999 == schedule.beta.max()


@pytest.mark.parametrize(("name", "num_steps"), [("linear", 1000), ("vp", 5), ("cosine", 1000)])
def test_the_fields_of_a_schedule_belong_together(name, num_steps):
    """All in float64, for products of 1000 factors lose digits in float32."""
    schedule = make_schedule(name, num_steps)
    assert all(array.dtype == np.float64 and array.shape == (num_steps,) for array in schedule)
    products = [np.prod(1 - schedule.beta[: i + 1]) for i in range(num_steps)]
    expected = [schedule.beta, 1 - schedule.beta, products, [1, *products[:-1]]]
    expected += [np.sqrt(products), np.sqrt(1 - np.array(products))]
    for array, numbers in zip(schedule, expected, strict=True):
        np.testing.assert_allclose(array, numbers, rtol=1e-10)


def test_impossible_schedules_are_refused():
    """Linear of few steps, whose largest beta, 20 / K, reaches 1; no steps; an unknown name, past the type check."""
    for num_steps in (1, 5, 20):
        with pytest.raises(ValueError, match="'vp'"):
            make_schedule("linear", num_steps)
    with pytest.raises(ValueError, match="at least 1"):
        make_schedule("vp", 0)
    with pytest.raises(ValueError, match="sqrt"):
        inspect.unwrap(make_schedule)("sqrt", 50)


# ------------------------------------------------------------------------------------------------------------ DDPM
def numpy_step(schedule, i, x, predicted_noise, noise, clip):
    """One ancestral step from a^k to a^{k-1} at index i = k - 1, from alpha_bar and beta alone."""
    beta, alpha_bar = schedule.beta[i], schedule.alpha_bar[i]
    previous = schedule.alpha_bar[i - 1] if i else 1.0
    x0 = (x - np.sqrt(1 - alpha_bar) * predicted_noise) / np.sqrt(alpha_bar)
    if clip:
        x0 = np.clip(x0, -1, 1)
    mean = np.sqrt(previous) * beta * x0 + np.sqrt(1 - beta) * (1 - previous) * x
    return mean / (1 - alpha_bar) + np.sqrt(beta * (1 - previous) / (1 - alpha_bar)) * noise


def numpy_chain(noise_fn, schedule, x, noise, clip):
    """The whole chain, k = K, ..., 1."""
    x = np.asarray(x, np.float64)
    for i in reversed(range(len(schedule.beta))):
        x = numpy_step(schedule, i, x, noise_fn(x, i), noise[i], clip)
    return x


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_chain_and_its_gradient(clip):
    """k goes K-1, ..., 0 with fresh noise, and the predictor sees it; central differences have no checkpoint. Of each
    step: the posterior's mean at the (clipped) implied a0, its variance, and at the last no noise.
    """
    schedule, key = make_schedule("vp", 5), jax.random.key(0)
    x, weights = np.random.default_rng(1).normal(size=(16, 2)), np.array([0.7, -0.4, 0.2])
    noise = [np.asarray(jax.random.normal(jax.random.fold_in(key, i), x.shape)) for i in range(5)]

    def noise_fn(module, weights):
        return lambda x, k: weights[0] * x + weights[1] * module.sin(2 * x) + weights[2] * module.cos(1.7 * k)

    def loss(weights):
        samples = ddpm_sample(noise_fn(jnp, weights), schedule, jnp.asarray(x), key, clip)
        return jnp.sum(samples**2), samples

    numpy_samples = lambda weights, clip=clip: numpy_chain(noise_fn(np, weights), schedule, x, noise, clip)
    assert np.abs(numpy_samples(weights) - numpy_samples(weights, not clip)).max() > 1e-3  # so the clip is seen
    gradient, samples = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(weights))
    np.testing.assert_allclose(samples, numpy_samples(weights), rtol=1e-10, atol=1e-10)
    assert not clip or np.abs(samples).max() <= 1  # the last mean is the clipped a0 itself
    numpy_loss = lambda weights: np.sum(numpy_samples(weights) ** 2)
    expected = [(numpy_loss(weights + step) - numpy_loss(weights - step)) / 2e-6 for step in 1e-6 * np.eye(3)]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)  # the differences' own error
    assert np.all(np.abs(expected) > 1e-2)
