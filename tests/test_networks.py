"""common/networks.py against float64 NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.networks import (
    MLP,
    Critic,
    GaussianPolicy,
    NoisePredictor,
    TanhPolicy,
    Value,
    init_twin_critics,
    mish,
    time_embedding,
    twin_q,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

OBS_DIM, ACT_DIM = 5, 3
MODULES = {
    "policy": lambda key: NoisePredictor(OBS_DIM, ACT_DIM, key),
    "tanh": lambda key: TanhPolicy(OBS_DIM, ACT_DIM, key),
    "gaussian": lambda key: GaussianPolicy(OBS_DIM, ACT_DIM, key),
    "critic": lambda key: Critic(OBS_DIM, ACT_DIM, key),
    "value": lambda key: Value(OBS_DIM, key),
}
# Widths of every linear layer, (fan_in, fan_out), as Sec. 5 gives them.
LAYERS = {
    "policy": [(16, 32), (32, 16), (OBS_DIM + ACT_DIM + 16, 256), (256, 256), (256, 256), (256, ACT_DIM)],
    "tanh": [(OBS_DIM, 256), (256, 256), (256, 256), (256, ACT_DIM)],
    "gaussian": [(OBS_DIM, 256), (256, 256), (256, 256), (256, ACT_DIM)],
    "critic": [(OBS_DIM + ACT_DIM, 256), (256, 256), (256, 256), (256, 1)],
    "value": [(OBS_DIM, 256), (256, 256), (256, 256), (256, 1)],
}


def numpy_mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


def numpy_mish_derivative(x):
    gate = np.tanh(np.log1p(np.exp(x)))
    return gate + x * (1 - gate**2) / (1 + np.exp(-x))


def numpy_mlp(mlp, x):
    for i, layer in enumerate(mlp.layers):
        x = np.asarray(layer.weight, np.float64) @ (x if i == 0 else numpy_mish(x)) + np.asarray(layer.bias, np.float64)
    return x


def numpy_embedding(k):
    angles = [k * np.exp(-np.log(10_000.0) * i / 8) for i in range(8)]
    return np.array([np.cos(angle) for angle in angles] + [np.sin(angle) for angle in angles])


def example(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=OBS_DIM).astype(np.float32), rng.normal(size=ACT_DIM).astype(np.float32)


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-6), (True, 1e-13)])
def test_mish_and_its_derivative_are_those_of_the_definition(x64, tolerance):
    """Mish(x) = x tanh(softplus(x)), whose derivative the code writes by hand with one exponential."""
    with jax.enable_x64(x64):
        x = jnp.concatenate([jnp.linspace(-100, 100, 4001), jnp.linspace(-2, 2, 1001), jnp.array([1e4, -1e4])])
        value, derivative = map(np.asarray, (mish(x), jax.vmap(jax.grad(mish))(x)))
        x = np.asarray(x, np.float64)
    assert value.dtype == derivative.dtype == (np.float64 if x64 else np.float32)
    middle = slice(None, -2)  # NumPy's definition overflows at the last two
    scale = np.maximum(1, np.abs(x[middle]))
    assert np.all(np.abs(value[middle] - numpy_mish(x[middle])) <= tolerance * scale)
    assert np.all(np.abs(derivative[middle] - numpy_mish_derivative(x[middle])) <= 4 * tolerance)
    np.testing.assert_allclose(value[-2:], [1e4, 0])
    np.testing.assert_allclose(derivative[-2:], [1, 0], atol=1e-12)


def test_mish_has_a_relative_accuracy_for_small_results():
    """Mish(x) -> x e^x for x -> -inf, not 0 times something lost to rounding."""
    x = np.linspace(-80, -1, 500).astype(np.float32)
    np.testing.assert_allclose(mish(jnp.asarray(x)), numpy_mish(x.astype(np.float64)), rtol=1e-5)


def test_mish_can_be_differentiated_twice():
    """Its second derivative is the slope of the analytic first one, finite everywhere."""
    with jax.enable_x64(True):
        x = jnp.linspace(-100, 100, 4001)
        second = np.asarray(jax.vmap(jax.grad(jax.grad(mish)))(x))
        h = 1e-5
        difference = (numpy_mish_derivative(np.asarray(x) + h) - numpy_mish_derivative(np.asarray(x) - h)) / (2 * h)
    np.testing.assert_allclose(second, difference, atol=1e-8)
    assert np.isfinite(jax.vmap(jax.grad(jax.grad(mish)))(jnp.linspace(-100, 100, 4001))).all()


def test_mlp_maps_the_concatenation_of_its_parts():
    """The first weight is split by columns; the sum is that of the concatenated input."""
    mlp = MLP((7, 16, 4), jax.random.key(0))
    parts = [np.random.default_rng(i).normal(size=size).astype(np.float32) for i, size in enumerate((2, 4, 1))]
    expected = numpy_mlp(mlp, np.concatenate(parts).astype(np.float64))
    np.testing.assert_allclose(mlp(*map(jnp.asarray, parts)), expected, atol=1e-6)
    np.testing.assert_allclose(mlp(jnp.asarray(np.concatenate(parts))), expected, atol=1e-6)


@pytest.mark.parametrize("k", [0, 1, 617, 999, 0.37, 412.625])
def test_time_embedding_is_eight_cosines_then_eight_sines(k):
    """Frequencies exp(-ln(10000) i / 8); k may be fractional, for the solver asks between steps."""
    expected = numpy_embedding(k)
    for argument in (jnp.asarray(k), k if isinstance(k, float) else jnp.asarray(float(k))):
        result = time_embedding(argument)
        assert result.shape == (16,)
        np.testing.assert_allclose(result, expected, atol=1e-4)  # an angle of 999 is rounded by 6e-5 in float32


@pytest.mark.parametrize("k", [0, 999, 412.625])
def test_noise_predictor_is_the_mlp_of_observation_action_and_embedding(k):
    """eps_theta(a^k, k; s): [s, a^k, MLP(embedding of k)] -> 3 x 256 -> action (Sec. 5)."""
    policy = NoisePredictor(OBS_DIM, ACT_DIM, jax.random.key(1))
    obs, action = example()
    inputs = np.concatenate([obs, action, numpy_mlp(policy.time_mlp, numpy_embedding(k))])
    result = policy(jnp.asarray(obs), jnp.asarray(action), jnp.asarray(k))
    np.testing.assert_allclose(result, numpy_mlp(policy.mlp, inputs), atol=2e-5)


def test_critic_and_value_are_the_scalars_of_their_mlps():
    """Q_phi(s, a) and V_psi(s)."""
    obs, action = example()
    critic, value = MODULES["critic"](jax.random.key(2)), MODULES["value"](jax.random.key(3))
    expected = numpy_mlp(critic.mlp, np.concatenate([obs, action]).astype(np.float64))
    np.testing.assert_allclose(critic(jnp.asarray(obs), jnp.asarray(action)), expected[0], atol=1e-6)
    np.testing.assert_allclose(value(jnp.asarray(obs)), numpy_mlp(value.mlp, obs.astype(np.float64))[0], atol=1e-6)


@pytest.mark.parametrize("name", ["tanh", "gaussian"])
def test_feed_forward_policies_act_by_the_tanh_of_their_mlps(name):
    """pi(s), or the Gaussian's mean."""
    policy, (obs, _) = MODULES[name](jax.random.key(6)), example()
    expected = np.tanh(numpy_mlp(policy.mlp, obs.astype(np.float64)))
    np.testing.assert_allclose(policy(jnp.asarray(obs)), expected, atol=1e-6)


def test_the_gaussian_has_the_density_of_a_product_of_normals_which_is_not_squashed():
    """log pi(a | s) = -sum_i ((a_i - mean_i)^2 / (2 std_i^2) + log(std_i sqrt(2 pi))), also outside [-1, 1]."""
    policy = MODULES["gaussian"](jax.random.key(7))
    np.testing.assert_array_equal(policy.std, np.ones(ACT_DIM))
    std = np.array([0.1, 1.0, 5.0])
    policy = eqx.tree_at(lambda policy: policy.log_std, policy, jnp.float32(np.log(std)))
    obs, action = example()
    action[0] = 1.7
    z = (action - np.float64(policy(jnp.asarray(obs)))) / std
    density = np.exp(-(z**2) / 2) / (std * np.sqrt(2 * np.pi))
    result = policy.log_prob(jnp.asarray(obs), jnp.asarray(action))
    np.testing.assert_allclose(result, np.log(density).sum(), rtol=1e-4)


def test_the_gaussians_deviation_stays_between_e_to_the_minus_10_and_e_to_the_2():
    """Beyond the bounds log_std has no effect and no gradient."""
    policy = MODULES["gaussian"](jax.random.key(8))
    policy = eqx.tree_at(lambda policy: policy.log_std, policy, jnp.array([-11.0, 0.5, 2.5]))
    np.testing.assert_allclose(policy.std, np.exp([-10, 0.5, 2]), rtol=1e-6)
    gradient = jax.grad(lambda policy: policy.std.sum())(policy).log_std
    np.testing.assert_allclose(gradient, [0, np.exp(0.5), 0], rtol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_every_leaf_is_a_float32_array_and_the_sizes_are_the_papers(name):
    """Nothing but weights and biases is a leaf, so that jax.grad and Optax take a module as it is."""
    leaves = jax.tree.leaves(MODULES[name](jax.random.key(0)))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)
    expected = [shape for fan_in, fan_out in LAYERS[name] for shape in ((fan_out, fan_in), (fan_out,))]
    if name == "gaussian":
        expected.append((ACT_DIM,))  # log_std
    assert sorted(leaf.shape for leaf in leaves) == sorted(expected)


@pytest.mark.parametrize("name", MODULES)
def test_initial_weights_are_uniform_within_one_over_root_fan_in(name):
    """Weights and biases ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    module = MODULES[name](jax.random.key(4))
    mlps = [module.time_mlp, module.mlp] if name == "policy" else [module.mlp]
    for layer, (fan_in, _) in zip([layer for mlp in mlps for layer in mlp.layers], LAYERS[name]):
        for leaf in (layer.weight, layer.bias):
            scaled = np.asarray(leaf, np.float64).ravel() * np.sqrt(fan_in)
            assert np.abs(scaled).max() <= 1 + 1e-6
            # the distance of the empirical from the uniform distribution, Kolmogorov's bound for p = 1e-6
            rank = (np.arange(scaled.size) + 0.5) / scaled.size
            distance = np.abs((np.sort(scaled) + 1) / 2 - rank).max()
            assert distance <= np.sqrt(np.log(2e6) / (2 * scaled.size)) + 0.5 / scaled.size


def test_twin_critics_are_two_different_critics():
    """Independent initial weights, and twin_q applies each to the whole batch."""
    critics = init_twin_critics(OBS_DIM, ACT_DIM, jax.random.key(5))
    for leaf in jax.tree.leaves(critics):
        assert leaf.shape[0] == 2
        assert not np.any(np.asarray(leaf[0]) == np.asarray(leaf[1]))
    batch = [np.stack(column) for column in zip(*(example(seed) for seed in range(4)))]
    q = twin_q(critics, *map(jnp.asarray, batch))
    for i in range(2):
        one = jax.tree.map(lambda leaf: leaf[i], critics)
        expected = [numpy_mlp(one.mlp, np.concatenate(pair).astype(np.float64))[0] for pair in zip(*batch)]
        np.testing.assert_allclose(q[i], expected, atol=1e-6)


def test_modules_pass_through_jit_vmap_and_grad():
    """Plain transformations suffice: no filtering of leaves."""
    policy = jax.jit(MODULES["policy"])(jax.random.key(0))
    obs, action = map(jnp.asarray, example())

    def loss(policy):
        return jnp.sum(jax.vmap(policy, (None, None, 0))(obs, action, jnp.arange(3)))

    grads = jax.jit(jax.grad(loss))(policy)
    assert jax.tree.structure(grads) == jax.tree.structure(policy)
    np.testing.assert_allclose(grads.mlp.layers[-1].bias, np.full(ACT_DIM, 3.0), rtol=1e-6)
