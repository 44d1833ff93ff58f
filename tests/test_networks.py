"""common/networks.py against float64 NumPy."""

from functools import lru_cache

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
    twin_q,
)

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")
TINY = 1e-12  # rounding of some hundred sums is 1e-14

OBS_DIM, ACT_DIM = 5, 3
HIDDEN = [(256, 256), (256, 256)]
# Of each module how it is made, and (fan_in, fan_out) of every linear layer, as Sec. 5 gives them.
MODULES = {
    "policy": lambda key: NoisePredictor(OBS_DIM, ACT_DIM, key),
    "tanh": lambda key: TanhPolicy(OBS_DIM, ACT_DIM, key),
    "gaussian": lambda key: GaussianPolicy(OBS_DIM, ACT_DIM, key),
    "critic": lambda key: Critic(OBS_DIM, ACT_DIM, key),
    "value": lambda key: Value(OBS_DIM, key),
}
LAYERS = {
    "policy": [(16, 32), (32, 16), (OBS_DIM + ACT_DIM + 16, 256), *HIDDEN, (256, ACT_DIM)],
    "tanh": [(OBS_DIM, 256), *HIDDEN, (256, ACT_DIM)],
    "gaussian": [(OBS_DIM, 256), *HIDDEN, (256, ACT_DIM)],
    "critic": [(OBS_DIM + ACT_DIM, 256), *HIDDEN, (256, 1)],
    "value": [(OBS_DIM, 256), *HIDDEN, (256, 1)],
}


@lru_cache
def make(name):
    return jax.jit(MODULES[name])(jax.random.key(4))


def numpy_mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


def numpy_mish_derivative(x):
    gate = np.tanh(np.log1p(np.exp(x)))
    return gate + x * (1 - gate**2) / (1 + np.exp(-x))


def numpy_mlp(mlp, x, layer_norm=False):
    for i, layer in enumerate(mlp.layers):
        if i and layer_norm:
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        x = np.asarray(layer.weight) @ (numpy_mish(x) if i else x) + np.asarray(layer.bias)
    return x


def numpy_embedding(k):
    angles = [k * np.exp(-np.log(10_000.0) * i / 8) for i in range(8)]
    return np.array([np.cos(angle) for angle in angles] + [np.sin(angle) for angle in angles])


def example(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=OBS_DIM)), jnp.asarray(rng.normal(size=ACT_DIM))


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_mish_and_its_derivative_are_those_of_the_definition(x64):
    """Mish(x) = x tanh(softplus(x)), which the code computes with one exponential, up to some units of rounding."""
    with jax.enable_x64(x64):
        x = jnp.concatenate([jnp.linspace(-100, 100, 4001), jnp.linspace(-2, 2, 1001), jnp.array([1e4, -1e4])])
        value, derivative = map(np.asarray, (mish(x), jax.vmap(jax.grad(mish))(x)))
        x = np.asarray(x, np.float64)
    assert value.dtype == derivative.dtype == (np.float64 if x64 else np.float32)
    eps, middle = np.finfo(value.dtype).eps, slice(None, -2)  # NumPy's definition overflows at the last two
    scale = np.maximum(1, np.abs(x[middle]))
    np.testing.assert_allclose(value[middle] / scale, numpy_mish(x[middle]) / scale, rtol=0, atol=40 * eps)
    scale = np.clip(np.abs(x[middle]), 1, 20)  # terms of size x cancel in the derivative
    expected = numpy_mish_derivative(x[middle])
    np.testing.assert_allclose(derivative[middle] / scale, expected / scale, rtol=0, atol=40 * eps)
    np.testing.assert_allclose(value[-2:], [1e4, 0])
    np.testing.assert_allclose(derivative[-2:], [1, 0], atol=1e-12)


def test_mish_is_accurate_for_small_results_and_can_be_differentiated_twice():
    """Mish(x) -> x e^x for x -> -inf, not 0 times something lost to rounding; the second derivative is finite."""
    second_derivative = jax.vmap(jax.grad(jax.grad(mish)))
    x, h = np.linspace(-100, 100, 4001), 1e-5
    difference = (numpy_mish_derivative(x + h) - numpy_mish_derivative(x - h)) / (2 * h)
    np.testing.assert_allclose(second_derivative(jnp.asarray(x)), difference, atol=1e-8)  # h^2, and rounding / h
    with jax.enable_x64(False):
        assert np.isfinite(second_derivative(jnp.float32(x))).all()
        x = np.float32(np.linspace(-80, -1, 500))
        np.testing.assert_allclose(mish(jnp.asarray(x)), numpy_mish(np.float64(x)), rtol=1e-5)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_mlp_maps_the_concatenation_of_its_parts(layer_norm):
    """The first weight is split by columns; the sum is that of the concatenated input. Layers may be normalised."""
    mlp = MLP((7, 16, 8, 4), jax.random.key(0), layer_norm)
    parts = [jnp.asarray(np.random.default_rng(i).normal(size=size)) for i, size in enumerate((2, 4, 1))]
    expected = numpy_mlp(mlp, np.concatenate(parts), layer_norm)
    np.testing.assert_allclose(mlp(*parts), expected, atol=TINY)
    np.testing.assert_allclose(mlp(jnp.concatenate(parts)), expected, atol=TINY)


@pytest.mark.parametrize("k", [0, 999, 412.625])
def test_noise_predictor_is_the_mlp_of_observation_action_and_embedding(k):
    """eps_theta(a^k, k; s): [s, a^k, MLP(embedding of k)] -> 3 x 256 -> action (Sec. 5)."""
    policy, (obs, action) = make("policy"), example()
    inputs = np.concatenate([obs, action, numpy_mlp(policy.time_mlp, numpy_embedding(k))])
    np.testing.assert_allclose(policy(obs, action, jnp.asarray(k)), numpy_mlp(policy.mlp, inputs), atol=TINY)


def test_other_modules_are_their_mlps():
    """Q_phi(s, a) and V_psi(s) are scalars; feed-forward policies act by the tanh, the Gaussian's is its mean."""
    obs, action = example()
    expected = numpy_mlp(make("critic").mlp, np.concatenate([obs, action]))
    np.testing.assert_allclose(make("critic")(obs, action), expected[0], atol=TINY)
    np.testing.assert_allclose(make("value")(obs), numpy_mlp(make("value").mlp, np.asarray(obs))[0], atol=TINY)
    for policy in (make("tanh"), make("gaussian")):
        np.testing.assert_allclose(policy(obs), np.tanh(numpy_mlp(policy.mlp, np.asarray(obs))), atol=TINY)


def test_the_gaussians_deviation_stays_between_e_to_the_minus_10_and_e_to_the_2():
    """Beyond the bounds log_std has no effect and no gradient. It starts at 1."""
    np.testing.assert_array_equal(make("gaussian").std, np.ones(ACT_DIM))
    policy = eqx.tree_at(lambda policy: policy.log_std, make("gaussian"), jnp.array([-11.0, 0.5, 2.5]))
    np.testing.assert_allclose(policy.std, np.exp([-10, 0.5, 2]), rtol=TINY)
    gradient = jax.grad(lambda policy: policy.std.sum())(policy).log_std
    np.testing.assert_allclose(gradient, [0, np.exp(0.5), 0], rtol=TINY)


@pytest.mark.parametrize("name", MODULES)
def test_leaves_are_the_papers_weights_uniform_within_one_over_root_fan_in(name):
    """Nothing else is a leaf, so that jax.grad and Optax take a module as it is; ~ U(+-1/sqrt(fan_in))."""
    with jax.enable_x64(False):  # as runs make them
        module, layers = jax.jit(MODULES[name])(jax.random.key(4)), LAYERS[name]
    leaves = jax.tree.leaves(module)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)
    expected = [shape for fan_in, fan_out in layers for shape in ((fan_out, fan_in), (fan_out,))]
    log_std = [(ACT_DIM,)] if name == "gaussian" else []
    assert [leaf.shape for leaf in leaves] == expected + log_std
    for i, leaf in enumerate(leaves[: len(expected)]):
        scaled = np.float64(leaf).ravel() * np.sqrt(layers[i // 2][0])
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
    obs, action = map(jnp.stack, zip(*(example(seed) for seed in range(4))))
    q = twin_q(critics, obs, action)
    for i in range(2):
        one = jax.tree.map(lambda leaf: leaf[i], critics)
        expected = [numpy_mlp(one.mlp, np.concatenate(pair, dtype=np.float64))[0] for pair in zip(obs, action)]
        np.testing.assert_allclose(q[i], expected, atol=TINY)
