"""common/diffusion.py against closed forms and float64 NumPy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.diffusion import Schedule, corrupt, ddpm_sample, make_schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")


def numpy_step(schedule, i, x, predicted_noise, noise, clip):
    """One ancestral step from a^k to a^{k-1} at index i = k - 1, from alpha_bar and beta alone."""
    beta, alpha_bar = schedule.beta[i], schedule.alpha_bar[i]
    previous = schedule.alpha_bar[i - 1] if i else 1.0
    x0 = (x - np.sqrt(1 - alpha_bar) * predicted_noise) / np.sqrt(alpha_bar)
    if clip:
        x0 = np.clip(x0, -1, 1)
    mean = np.sqrt(previous) * beta / (1 - alpha_bar) * x0
    mean = mean + np.sqrt(1 - beta) * (1 - previous) / (1 - alpha_bar) * x
    return mean + np.sqrt(beta * (1 - previous) / (1 - alpha_bar)) * noise


def numpy_chain(noise_fn, schedule, x, key, clip):
    """The whole chain, with the random numbers that ddpm_sample draws."""
    x = np.asarray(x, np.float64)
    for i in reversed(range(len(schedule.beta))):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, i), x.shape), np.float64)
        x = numpy_step(schedule, i, x, noise_fn(x, i), noise, clip)
    return x


def single_step(schedule, i):
    """A chain of step i alone."""
    return Schedule(*(array[i : i + 1] for array in schedule))


@pytest.mark.parametrize("num_steps", [21, 100, 1000])
def test_linear_schedule(num_steps):
    """beta from 1e-4 to 0.02 in K steps, times 1000 / K."""
    schedule = make_schedule("linear", num_steps)
    beta = [(1e-4 + (0.02 - 1e-4) * i / (num_steps - 1)) * 1000 / num_steps for i in range(num_steps)]
    np.testing.assert_allclose(schedule.beta, beta, rtol=1e-12)
    assert schedule.beta.max() < 1


@pytest.mark.parametrize("num_steps", [1, 5, 1000])
def test_vp_schedule_is_that_of_the_variance_preserving_sde(num_steps):
    """The betas telescope: alpha_bar^k = exp(-b_min k / K - (b_max - b_min) k^2 / (2 K^2)), b from 0.1 to 10."""
    k = np.arange(1, num_steps + 1) / num_steps
    np.testing.assert_allclose(
        make_schedule("vp", num_steps).alpha_bar, np.exp(-0.1 * k - (10 - 0.1) * k**2 / 2), rtol=1e-10
    )


@pytest.mark.parametrize("num_steps", [1, 50, 1000])
def test_cosine_schedule(num_steps):
    """alpha_bar^k = f(k) / f(0), f = cos^2((k/K + 0.008) / 1.008 pi/2), but beta <= 0.999 (improved DDPM)."""
    schedule = make_schedule("cosine", num_steps)
    level = [np.cos((k / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2 for k in range(num_steps + 1)]
    np.testing.assert_allclose(schedule.alpha_bar[:-1], np.array(level[1:-1]) / level[0], rtol=1e-9)
    assert schedule.beta[-1] == 0.999 == schedule.beta.max()


@pytest.mark.parametrize(
    ("name", "num_steps", "first_beta", "last_alpha_bar"),
    [
        ("linear", 1000, 1e-4, 4.0358e-5),  # Ho et al. 2020
        ("vp", 5, 1 - np.exp(-0.218), np.exp(-5.05)),  # Diffusion-QL
        ("cosine", 1000, 4.1284e-5, 2.4288e-9),  # Nichol & Dhariwal 2021
    ],
)
def test_schedules_have_the_known_ends(name, num_steps, first_beta, last_alpha_bar):
    """Values that other implementations of these schedules give."""
    schedule = make_schedule(name, num_steps)
    np.testing.assert_allclose([schedule.beta[0], schedule.alpha_bar[-1]], [first_beta, last_alpha_bar], rtol=1e-4)


@pytest.mark.parametrize(("name", "num_steps"), [("linear", 50), ("vp", 5), ("cosine", 50)])
def test_the_fields_of_a_schedule_belong_together(name, num_steps):
    """alpha = 1 - beta; alpha_bar its running product; all in float64, for K = 1000 factors lose digits in float32."""
    schedule = make_schedule(name, num_steps)
    assert all(array.dtype == np.float64 and array.shape == (num_steps,) for array in schedule)
    np.testing.assert_array_equal(schedule.alpha, 1 - schedule.beta)
    products = [np.prod(1 - schedule.beta[: i + 1]) for i in range(num_steps)]
    np.testing.assert_allclose(schedule.alpha_bar, products, rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha_bar_prev, [1, *products[:-1]], rtol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_linear_schedule_of_few_steps_is_refused_and_vp_proposed(num_steps):
    """Its largest beta, 20 / K, reaches 1 at K = 20."""
    with pytest.raises(ValueError, match="'vp'"):
        make_schedule("linear", num_steps)


def test_impossible_schedules_are_refused():
    """No steps, or a name that nobody knows (past the type check, which only the tests have)."""
    with pytest.raises(ValueError, match="at least 1"):
        make_schedule("vp", 0)
    with pytest.raises(ValueError, match="sqrt"):
        inspect.unwrap(make_schedule)("sqrt", 50)


def test_corrupt_is_eq_8_with_each_examples_own_k():
    """a^k = sqrt(alpha_bar^k) a^0 + sqrt(1 - alpha_bar^k) noise."""
    rng = np.random.default_rng(0)
    schedule = make_schedule("linear", 1000)
    k = np.array([0, 1, 500, 999])
    action, noise = rng.uniform(-1, 1, (4, 3)), rng.normal(size=(4, 3))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[k][:, None]
    result = corrupt(schedule, jnp.float32(action), jnp.asarray(k), jnp.float32(noise))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, np.sqrt(alpha_bar) * action + np.sqrt(1 - alpha_bar) * noise, atol=5e-7)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("i", [0, 1, 24, 49])
def test_one_ddpm_step(i, clip):
    """Mean of the posterior at the (clipped) implied a0, variance beta^k (1 - alpha_bar^{k-1}) / (1 - alpha_bar^k)."""
    schedule, key = make_schedule("linear", 50), jax.random.key(i)
    rng = np.random.default_rng(i)
    x, predicted = rng.normal(size=(2, 64, 3)).astype(np.float32)
    noise = jax.random.normal(jax.random.fold_in(key, 0), x.shape)
    result = ddpm_sample(lambda x, k: jnp.asarray(predicted), single_step(schedule, i), jnp.asarray(x), key, clip)
    expected = numpy_step(schedule, i, x.astype(np.float64), predicted, np.asarray(noise, np.float64), clip)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    other = numpy_step(schedule, i, x, predicted, np.asarray(noise), not clip)
    assert np.abs(expected - other).max() > 1e-3  # so the clip is seen


def test_only_the_last_ddpm_step_adds_no_noise():
    """The posterior variance of step k = 1 is 0."""
    schedule, x = make_schedule("linear", 50), jnp.ones((4, 2))
    for i, is_last in ((0, True), (1, False)):
        a, b = (ddpm_sample(lambda x, k: x, single_step(schedule, i), x, jax.random.key(seed)) for seed in range(2))
        assert np.array_equal(a, b) == is_last


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_chain_runs_from_the_last_index_to_the_first_with_fresh_noise(clip):
    """k goes K-1, ..., 0; the predictor sees each k, so that a wrong order or index gives another result."""
    schedule, key = make_schedule("vp", 7), jax.random.key(3)
    x = np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32)
    result = ddpm_sample(lambda x, k: jnp.tanh(x) + 0.3 * jnp.cos(1.7 * k), schedule, jnp.asarray(x), key, clip)
    expected = numpy_chain(lambda x, k: np.tanh(x) + 0.3 * np.cos(1.7 * k), schedule, x, key, clip)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5)
    if clip:
        assert np.abs(result).max() <= 1  # the last mean is the clipped a0 itself


def test_ddpm_reproduces_a_gaussian():
    """For data N(a, b^2) the noise prediction is known, the chain linear, and its mean and variance a recursion."""
    a, b, num_steps, num_samples = np.array([0.5, -0.2]), np.array([0.3, 0.8]), 1000, 20_000
    schedule = make_schedule("linear", num_steps)
    sigma2 = 1 - schedule.alpha_bar
    gain = np.sqrt(sigma2)[:, None] / (schedule.alpha_bar[:, None] * b**2 + sigma2[:, None])  # eps = gain (x - centre)
    centre = np.sqrt(schedule.alpha_bar)[:, None] * a

    # Each step is affine in x: its offset is the step from x = 0, its slope the difference to that from x = 1.
    mean, variance = np.zeros(2), np.ones(2)
    for i in reversed(range(num_steps)):
        offset = numpy_step(schedule, i, np.zeros(2), gain[i] * (0 - centre[i]), 0.0, clip=False)
        slope = numpy_step(schedule, i, np.ones(2), gain[i] * (1 - centre[i]), 0.0, clip=False) - offset
        added = numpy_step(schedule, i, np.zeros(2), 0.0, 1.0, clip=False)
        mean, variance = slope * mean + offset, slope**2 * variance + added**2
    np.testing.assert_allclose(mean, a, atol=0.01)  # what K = 1000 steps and alpha_bar^K > 0 leave of an error
    np.testing.assert_allclose(np.sqrt(variance), b, rtol=0.02)

    gain, centre = jnp.asarray(gain), jnp.asarray(centre)
    x_init = jax.random.normal(jax.random.key(0), (num_samples, 2))
    samples = ddpm_sample(lambda x, k: gain[k][None] * (x - centre[k][None]), schedule, x_init, jax.random.key(1))
    samples = np.asarray(samples, np.float64)
    standard_error = np.sqrt(variance / num_samples)
    assert np.all(np.abs(samples.mean(axis=0) - mean) < 5 * standard_error)
    assert np.all(np.abs(samples.var(axis=0) - variance) < 5 * variance * np.sqrt(2 / num_samples))


@pytest.mark.parametrize("clip", [False, True])
def test_gradient_goes_through_the_whole_ddpm_chain(clip):
    """jax.grad of a sum over the samples against central differences of the NumPy chain (no checkpoint there)."""
    schedule, key = make_schedule("vp", 5), jax.random.key(0)
    x = np.random.default_rng(1).normal(size=(16, 2)).astype(np.float32)
    weights = np.array([0.7, -0.4, 0.2])

    def noise_fn(module, weights):
        return lambda x, k: weights[0] * x + weights[1] * module.sin(2 * x) + weights[2] * module.cos(1.7 * k)

    def loss(weights):
        return jnp.sum(ddpm_sample(noise_fn(jnp, weights), schedule, jnp.asarray(x), key, clip) ** 2)

    def numpy_loss(weights):
        return np.sum(numpy_chain(noise_fn(np, weights), schedule, x, key, clip) ** 2)

    steps = 1e-6 * np.eye(3)
    expected = [(numpy_loss(weights + step) - numpy_loss(weights - step)) / 2e-6 for step in steps]
    gradient = jax.jit(jax.grad(loss))(jnp.asarray(weights))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    assert np.all(np.abs(expected) > 1e-2)
