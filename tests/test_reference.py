"""Losses, targets, weights, gradients and samples against the numbers of the authors' JAX release.

edp_reference.npz holds what that release computes for fixed networks, a fixed batch and fixed random draws, and these
draws. The functions of the algorithm files are called as they are; only what they draw is replaced. They compute in
float64 here, so what differs is the release's rounding to float32 alone, the same on every processor. Errors are
measured against the largest entry. Each tolerance is three to four times the error that was measured, so it tells how
far the release is from exact numbers; a wrong factor, sign or index shows in the first digits.

    3e-6   7.4e-7 measured: losses, targets, weights and gradients, unless named here
    6e-6   1.7e-6, the gradient of IQL's policy loss
    1.5e-5 3.9e-6, the target by DDPM: the rounding of 100 steps
    4e-5   1.1e-5, what follows IQL's first step of Adam, which is nearly the sign of the gradient, small entries too
    1.2e-4 3.9e-5, CRR's loss by the ELBO: it divides by 1 - alpha_bar, which loses digits in float32 where k is small

The solver's samples have theirs beside them.
"""

from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms import edp_crr, edp_iql, edp_td3bc
from common.dpm_solver import dpm_solver_sample
from common.harness import Dataset
from common.networks import NoisePredictor, Value, init_twin_critics

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

REFERENCE = np.load(Path(__file__).parent / "edp_reference.npz")
CASES = {
    "td3": (edp_td3bc, {"eta": 2.0}),  # their factor 2 (D9)
    "td3_ddpm100": (edp_td3bc, {"eta": 2.0, "sampler": "ddpm", "num_diffusion_steps": 100}),
    "crr": (edp_crr, {"eta": 1.0}),
    "crr_elbo": (edp_crr, {"eta": 1.0, "likelihood": "elbo"}),
    "iql": (edp_iql, {"eta": 1.0, "temperature": 1 / 3, "expectile": 0.7, "learning_rate": 3e-4}),  # their 3 (D15)
}
KEY = jax.random.key(0)  # what is drawn with it is replaced


def load(name):
    """(algorithm, arguments, the release's numbers) of a case."""
    algorithm, flags = CASES[name]
    numbers = {key.removeprefix(f"{name}/"): REFERENCE[key] for key in REFERENCE.files if key.startswith(f"{name}/")}
    return algorithm, algorithm.Args(**flags), numbers


# ---------------------------------------------------------------------------------------------- batch and networks
OBS_DIM, ACT_DIM, HIDDEN = 11, 3, (256, 256, 256)
NAMES = ("observations", "actions", "rewards", "next_observations", "dones")
BATCH = Dataset(*(np.float64(REFERENCE[f"batch/{name}"]) for name in NAMES))


def weights(widths, seed, gain):
    """Weight and bias, layer after layer, uniform in +-1/sqrt(fan_in), the last layer's times `gain`."""
    random, arrays = np.random.RandomState(seed), []
    for fan_in, fan_out in pairwise(widths):
        arrays += [random.uniform(-1, 1, shape) / np.sqrt(fan_in) for shape in ((fan_out, fan_in), (fan_out,))]
    arrays[-2:] = gain * arrays[-2], gain * arrays[-1]
    return [np.float64(np.float32(array)) for array in arrays]


def with_leaves(init, leaves):
    """The module that `init` makes with these arrays as its leaves."""
    module = jax.eval_shape(init)
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in jax.tree.leaves(module)]
    return jax.tree.unflatten(jax.tree.structure(module), leaves)


def make_policy(seed, time_seed):
    time_leaves = weights((16, 32, 16), time_seed, 1)
    leaves = time_leaves + weights((OBS_DIM + ACT_DIM + 16, *HIDDEN, ACT_DIM), seed, 3)
    return with_leaves(lambda: NoisePredictor(OBS_DIM, ACT_DIM, KEY), leaves)


def make_critics(*seeds):
    pairs = zip(*(weights((OBS_DIM + ACT_DIM, *HIDDEN, 1), seed, 40) for seed in seeds))
    return with_leaves(lambda: init_twin_critics(OBS_DIM, ACT_DIM, KEY), [np.stack(pair) for pair in pairs])


POLICY, TARGET_POLICY = make_policy(0, 1), make_policy(5, 6)
CRITICS, TARGET_CRITICS = make_critics(2, 3), make_critics(7, 8)
VALUE = with_leaves(lambda: Value(OBS_DIM, KEY), weights((OBS_DIM, *HIDDEN, 1), 4, 40))


# ----------------------------------------------------------------------------------------------- draws, comparisons
@pytest.fixture
def replace_draws(monkeypatch):
    """`replace_draws(*arrays)`: a draw is the array of its shape, or, of DDPM's chain at index k, `noise_by_k[k]`."""

    def replace(*arrays, noise_by_k=None):
        of_shape = {array.shape: array for array in arrays}

        def randint(key, shape, low, high):
            assert low <= of_shape[shape].min() and of_shape[shape].max() < high
            return jnp.asarray(of_shape[shape])

        def normal(key_or_k, shape, dtype=float):
            is_k = jnp.issubdtype(key_or_k.dtype, jnp.integer)
            return jnp.asarray(noise_by_k, dtype)[key_or_k] if is_k else jnp.asarray(of_shape[shape], dtype)

        monkeypatch.setattr(jax.random, "randint", randint)
        monkeypatch.setattr(jax.random, "normal", normal)
        monkeypatch.setattr(jax.random, "fold_in", lambda key, k: k)

    return replace


def run(function, *inputs):
    """Compiled anew, for the draws are constants of the program."""
    return jax.jit(lambda *inputs: function(*inputs))(*inputs)


def loss_and_gradient(function, *inputs):
    (loss, metrics), gradient = run(jax.value_and_grad(function, has_aux=True), *inputs)
    return loss, metrics, gradient


def assert_close(result, expected, tolerance=3e-6):
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_gradient_close(gradient, digests, tolerance=3e-6):
    """A digest of the release is an array's norm and its product with (cos 0, cos 1, ...)."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient)]
    assert len(leaves) == len(digests)
    for leaf, digest in zip(leaves, digests):
        assert_close([np.linalg.norm(leaf), leaf @ np.cos(np.arange(leaf.size))], digest, tolerance)


# --------------------------------------------------------------------------------------------------------- samples
# 2.5e-5 measured with 5 calls, up to 8.7e-6 with more: the longer a step is, the more it magnifies its coefficients'
# rounding.
@pytest.mark.parametrize(("calls", "tolerance"), [(5, 8e-5), *((calls, 3e-5) for calls in (10, 15, 16, 17, 30))])
def test_samples_of_the_solver(calls, tolerance, replace_draws):
    """The release's clip at exact time, and the result clipped, as sample_action does (D4)."""
    replace_draws(REFERENCE[f"solver/{calls}/x_K"])
    action = run(edp_td3bc.sample_action, POLICY, BATCH.obs, KEY, edp_td3bc.Args(num_solver_calls=calls))
    assert_close(action, REFERENCE[f"solver/{calls}/action"], tolerance)


def truncating_solver(noise_fn, schedule, x_init, num_calls, order, skip, clip):
    """The release's: it clips with alpha and sigma of the integer part of a fractional k."""

    def bounded(x, k):
        alpha, sigma = float(schedule.sqrt_alpha_bar[int(k)]), float(schedule.sqrt_one_minus_alpha_bar[int(k)])
        return jnp.clip(noise_fn(x, k), (x - alpha) / sigma, (x + alpha) / sigma)

    return dpm_solver_sample(bounded, schedule, x_init, num_calls, order, skip)


# --------------------------------------------------------------------------------------------- targets and critics
def test_critic_target(replace_draws, monkeypatch):
    """With the release's time nothing is left; what exact time changes (D4) is seen in the third digit."""
    algorithm, args, numbers = load("td3")
    replace_draws(numbers["x_K"])
    target = lambda: run(algorithm.critic_target, TARGET_CRITICS, TARGET_POLICY, BATCH, KEY, args)
    difference = np.abs(target() - numbers["target"]).max() / np.abs(numbers["target"]).max()
    assert 1e-3 < difference < 1e-2
    monkeypatch.setattr(algorithm, "dpm_solver_sample", truncating_solver)
    assert_close(target(), numbers["target"])


def test_critic_target_by_ddpm(replace_draws):
    algorithm, args, numbers = load("td3_ddpm100")
    replace_draws(numbers["x_K"], noise_by_k=numbers["noise_by_k"])
    target = run(algorithm.critic_target, TARGET_CRITICS, TARGET_POLICY, BATCH, KEY, args)
    assert_close(target, numbers["target"], 1.5e-5)


@pytest.mark.parametrize("name", ["td3", "td3_ddpm100", "iql"])
def test_critic_loss_and_its_gradient(name):
    """At the release's own target, which is the same for td3 and crr."""
    algorithm, _, numbers = load(name)
    loss, _, gradient = loss_and_gradient(algorithm.critic_loss, CRITICS, numbers["target"], BATCH)
    if name != "iql":  # whose loss the file does not hold
        assert_close(loss, numbers["critic_loss"])
    for i in range(2):
        assert_gradient_close(jax.tree.map(lambda leaf: leaf[i], gradient), numbers[f"critic_gradient_{i}"])


# -------------------------------------------------------------------------------------------------- value, weights
def test_iql_value_loss_and_what_follows_from_the_updated_value():
    """Its gradient; after Adam with the clip of the norm, the critics' target and the weight."""
    algorithm, args, numbers = load("iql")
    loss, _, gradient = loss_and_gradient(algorithm.value_loss, VALUE, TARGET_CRITICS, BATCH, args)
    assert_close(loss, numbers["value_loss"])
    assert_gradient_close(gradient, numbers["value_gradient"])

    def update(value, gradient):
        _, optimizer = algorithm.make_optimizers(args)
        return optax.apply_updates(value, optimizer.update(gradient, optimizer.init(value))[0])

    value = run(update, VALUE, gradient)
    assert_close(run(algorithm.critic_target, value, BATCH, args), numbers["target"], 4e-5)
    weight = run(algorithm.advantage_weight, value, TARGET_CRITICS, BATCH, args)
    assert_close(weight, numbers["weight"], 4e-5)


def test_crr_weight(replace_draws):
    """Around the approximated actions, which are computed here too."""
    algorithm, args, numbers = load("crr")
    replace_draws(numbers["k"], numbers["noise"], numbers["advantage_noise"])

    def weight(policy, critics, batch):
        _, corruption = algorithm.diffusion_loss(policy, batch, KEY, args)
        return algorithm.advantage_weight(critics, algorithm.approximate_action(corruption, args), batch, KEY, args)

    assert_close(run(weight, POLICY, CRITICS, BATCH), numbers["weight"])


# ---------------------------------------------------------------------------------------------------------- policy
@pytest.mark.parametrize(
    ("name", "tolerance"), [("td3", 3e-6), ("td3_ddpm100", 3e-6), ("crr", 3e-6), ("iql", 6e-6), ("crr_elbo", 1.2e-4)]
)
def test_policy_loss_and_its_gradient(name, tolerance, replace_draws):
    """Diffusion loss, guidance and their sum. The release computes its schedule in float32, where 1 - alpha_bar loses
    digits for small k; the ELBO's weights divide by it.
    """
    algorithm, args, numbers = load(name)
    replace_draws(*(numbers[key] for key in ("k", "noise", "critic_index", "advantage_noise") if key in numbers))
    guide = numbers["weight"] if name == "iql" else CRITICS
    loss, metrics, gradient = loss_and_gradient(algorithm.policy_loss, POLICY, guide, BATCH, KEY, args)
    assert loss.dtype == jnp.float64
    guidance, constant = metrics["guidance_loss"], 0
    if algorithm is edp_td3bc:
        guidance = 2 * guidance  # theirs holds the factor that is in our eta
    elif name != "crr_elbo":  # theirs holds the constant of the Gaussian's log-density
        constant = numbers["weight"].mean() * ACT_DIM * np.log(2 * np.pi) / 2
    assert_close(metrics["diffusion_loss"], numbers["diffusion_loss"])
    assert_close(guidance + constant, numbers["guidance_loss"], tolerance)
    assert_close(loss + constant, numbers["policy_loss"], tolerance)
    assert_gradient_close(gradient, numbers["policy_gradient"], tolerance)


def test_in_float32_as_runs_compute(replace_draws):
    """Our rounding comes to the release's: up to 2.4e-6 in these losses, summed in another order by each processor."""
    algorithm, args, numbers = load("td3")
    replace_draws(*(numbers[key] for key in ("k", "noise", "critic_index")))
    with jax.enable_x64(False):
        inputs = jax.tree.map(np.float32, (POLICY, CRITICS, BATCH))
        loss, _, gradient = loss_and_gradient(algorithm.policy_loss, *inputs, KEY, args)
    assert loss.dtype == jnp.float32
    assert_close(loss, numbers["policy_loss"], 1e-5)
    assert_gradient_close(gradient, numbers["policy_gradient"], 1e-5)
