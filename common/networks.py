"""The networks of the EDP paper (Sec. 5), noise predictor, critic and value function, and its feed-forward policies.

Modules act on one example; callers `jax.vmap` over the batch. Every leaf is a trainable array, so plain jax.jit, grad,
scan, vmap and Optax apply to modules as they are. Weights start as in `equinox.nn.Linear`, uniform in ±1/sqrt(fan_in).
"""

from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

HIDDEN_WIDTH = 256
NUM_HIDDEN = 3
EMBEDDING_DIM = 16


class MLP(eqx.Module):
    """Linear layers with Mish, or layer normalisation and Mish, between them."""

    layers: tuple[eqx.nn.Linear, ...]
    norms: tuple[eqx.nn.LayerNorm | eqx.nn.Identity, ...]

    def __init__(self, widths: tuple[int, ...], key: PRNGKeyArray, layer_norm: bool = False):
        keys = jax.random.split(key, len(widths) - 1)
        self.layers = tuple(eqx.nn.Linear(*sizes, key=k) for sizes, k in zip(pairwise(widths), keys))
        self.norms = tuple(eqx.nn.LayerNorm(width) if layer_norm else eqx.nn.Identity() for width in widths[1:-1])

    def __call__(self, *parts: Float[Array, " _"]) -> Float[Array, " out"]:
        """Maps the concatenation of `parts`."""
        first, *rest = self.layers
        # each part meets its own columns, so that what a batch or the solver's calls share is multiplied once
        columns = jnp.split(first.weight, np.cumsum([len(part) for part in parts])[:-1], axis=1)
        x = sum(part @ weight.T for weight, part in zip(columns, parts)) + first.bias
        for norm, layer in zip(self.norms, rest):
            x = mish(norm(x)) @ layer.weight.T + layer.bias
        return x


def time_embedding(k: Real[Array, ""] | float) -> Float[Array, " embedding"]:
    """Sinusoidal embedding of the (possibly fractional) 0-based diffusion step: 8 cosines, then 8 sines."""
    half = EMBEDDING_DIM // 2
    angles = k * np.exp(-np.log(10_000) * np.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


class NoisePredictor(eqx.Module):
    """The diffusion policy, eps_theta(a^k, k; s)."""

    time_mlp: MLP
    mlp: MLP
    act_dim: int = eqx.field(static=True)

    def __init__(self, obs_dim: int, act_dim: int, key: PRNGKeyArray):
        self.act_dim = act_dim
        time_key, key = jax.random.split(key)
        self.time_mlp = MLP((EMBEDDING_DIM, 2 * EMBEDDING_DIM, EMBEDDING_DIM), time_key)
        self.mlp = MLP((obs_dim + act_dim + EMBEDDING_DIM, *[HIDDEN_WIDTH] * NUM_HIDDEN, act_dim), key)

    def __call__(
        self, obs: Float[Array, " obs_dim"], noisy_action: Float[Array, " act_dim"], k: Real[Array, ""] | float
    ) -> Float[Array, " act_dim"]:
        return self.mlp(obs, noisy_action, self.time_mlp(time_embedding(k)))


class TanhPolicy(eqx.Module):
    """pi(s), deterministic, inside [-1, 1]."""

    mlp: MLP

    def __init__(self, obs_dim: int, act_dim: int, key: PRNGKeyArray):
        self.mlp = MLP((obs_dim, *[HIDDEN_WIDTH] * NUM_HIDDEN, act_dim), key)

    def __call__(self, obs: Float[Array, " obs_dim"]) -> Float[Array, " act_dim"]:
        return jnp.tanh(self.mlp(obs))


class GaussianPolicy(TanhPolicy):
    """pi(a | s), a Gaussian whose mean is inside [-1, 1] and whose deviation does not depend on s, as in IQL's code."""

    log_std: Float[Array, " act_dim"]

    def __init__(self, obs_dim: int, act_dim: int, key: PRNGKeyArray):
        super().__init__(obs_dim, act_dim, key)
        self.log_std = jnp.zeros(act_dim)

    @property
    def std(self) -> Float[Array, " act_dim"]:
        return jnp.exp(jnp.clip(self.log_std, -10, 2))

    def log_prob(self, obs: Float[Array, " obs_dim"], action: Float[Array, " act_dim"]) -> Float[Array, ""]:
        z = (action - self(obs)) / self.std  # self(obs) is the mean
        return -jnp.sum(z**2 / 2 + jnp.log(self.std) + np.log(2 * np.pi) / 2)


class Critic(eqx.Module):
    """Q_phi(s, a)."""

    mlp: MLP

    def __init__(self, obs_dim: int, act_dim: int, key: PRNGKeyArray, layer_norm: bool = False):
        self.mlp = MLP((obs_dim + act_dim, *[HIDDEN_WIDTH] * NUM_HIDDEN, 1), key, layer_norm)

    def __call__(self, obs: Float[Array, " obs_dim"], action: Float[Array, " act_dim"]) -> Float[Array, ""]:
        return self.mlp(obs, action)[0]


class Value(eqx.Module):
    """V_psi(s)."""

    mlp: MLP

    def __init__(self, obs_dim: int, key: PRNGKeyArray, layer_norm: bool = False):
        self.mlp = MLP((obs_dim, *[HIDDEN_WIDTH] * NUM_HIDDEN, 1), key, layer_norm)

    def __call__(self, obs: Float[Array, " obs_dim"]) -> Float[Array, ""]:
        return self.mlp(obs)[0]


def init_twin_critics(obs_dim: int, act_dim: int, key: PRNGKeyArray, layer_norm: bool = False) -> Critic:
    """Two independent critics as one `Critic` whose every leaf has a leading axis of 2."""
    return jax.vmap(lambda key: Critic(obs_dim, act_dim, key, layer_norm))(jax.random.split(key, 4))


def twin_q(
    critics: Critic, obs: Float[Array, "batch obs_dim"], action: Float[Array, "batch act_dim"]
) -> Float[Array, "2 batch"]:
    """(Q_1, Q_2) of a batch."""
    return jax.vmap(lambda critic: jax.vmap(critic)(obs, action))(critics)


def mish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Mish (Misra 2019), x tanh(softplus(x)), with one exponential: tanh is w / (w + 2), w = e^x (e^x + 2)."""
    n = jnp.exp(jnp.minimum(x, 20.0))  # beyond 20, tanh(softplus(x)) is 1 in float32 and float64 alike
    w = n * (n + 2)
    return x * (w * (1 / (w + 2)))
