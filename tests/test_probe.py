"""Real training on a problem whose answer is known: one step, two modes of behaviour, one of which pays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import bc, crr, dql_baseline, edp_crr, edp_iql, edp_td3bc, iql, td3bc
from common.harness import Dataset
from common.networks import twin_q

PAY = 4.0  # large enough for exp(Q) to prefer it clearly in energy-based action selection


def case(algorithm, slow=True, **flags):
    name = algorithm.__name__.split(".")[-1]
    return pytest.param(algorithm, flags, id=name, marks=[pytest.mark.slow] if slow else [])


over = lambda *cases: pytest.mark.parametrize(("algorithm", "flags"), cases)
FEED_FORWARD = [case(td3bc), case(crr), case(iql, expectile=0.7, temperature=1.0)]
DIFFUSION = [case(edp_td3bc), case(edp_crr), case(edp_iql, expectile=0.7), case(dql_baseline, num_diffusion_steps=5)]


def make_dataset(both_pay, size=2000):
    """Actions 0.6 and -0.6, equally frequent, with some spread; the first, or both, pay. Observations say nothing."""
    rng = np.random.default_rng(0)
    pays = rng.permutation(np.arange(size) % 2)
    action, reward = 1.2 * pays - 0.6 + 0.1 * rng.normal(size=size), PAY * np.maximum(pays, both_pay)
    obs, next_obs = rng.normal(size=(2, size, 2))
    return jax.tree.map(jnp.float32, Dataset(obs, action[:, None], reward, next_obs, np.ones(size)))


def train(algorithm, flags, both_pay=False):
    """(state of two seeds after 1000 updates, a function from N to 1000 actions of the policy)."""
    settings = {"eta": 1.0, "beta_schedule": "vp", "num_diffusion_steps": 50, "num_solver_calls": 3}
    settings = {name: value for name, value in settings.items() if hasattr(algorithm.Args, name)} | flags
    args = algorithm.Args(num_updates=1000, batch_size=64, learning_rate=2e-3, **settings)
    keys = jax.random.split(jax.random.key(0), 2)
    state = jax.jit(jax.vmap(lambda key: algorithm.init_state(key, 2, 1, args)))(keys)
    state, _ = algorithm.train_chunk(state, 1000, keys, make_dataset(both_pay), args, 1000)

    def act(num_actions=1):
        acting = {"num_eval_actions": num_actions, "num_solver_calls": 9}
        acting = {name: value for name, value in acting.items() if hasattr(args, name)}
        obs = jnp.float32(np.random.default_rng(1).normal(size=(2, 500, 2)))
        episode_keys = jax.random.split(jax.random.key(1), (2, 500))
        return np.ravel(algorithm.act(state, obs, episode_keys, 0, dataclasses.replace(args, **acting)))

    return state, act


@over(*DIFFUSION, *FEED_FORWARD)
def test_policy_learns_the_mode_that_pays(algorithm, flags):
    """Guidance alone (N = 1) brings most actions of a diffusion policy there, selection (Alg. 2) the others."""
    state, act = train(algorithm, flags)
    assert np.mean(act() > 0) > 0.6
    assert np.mean(act(10) > 0) > 0.9
    obs, action = jnp.zeros((2, 2, 2)), jnp.array([[[0.6], [-0.6]]] * 2)
    q = jax.vmap(twin_q)(state.critics, obs, action)  # (seeds, critics, actions)
    np.testing.assert_allclose(q, np.broadcast_to([PAY, 0.0], q.shape), atol=0.1 * PAY)  # the reward: all is terminal


@over(*FEED_FORWARD, case(bc, slow=False))
def test_where_both_modes_pay_a_feed_forward_policy_acts_between_them(algorithm, flags, quick_networks):
    """As nobody did in the data: the two modes are a single mean's two halves."""
    _, act = train(algorithm, flags, both_pay=True)
    assert np.mean(np.abs(act()) < 0.3) > 0.95


@over(case(edp_td3bc), case(bc, policy="diffusion"))
def test_where_both_modes_pay_a_diffusion_policy_acts_in_them(algorithm, flags):
    """In either, where all of the feed-forward policies fail."""
    action = train(algorithm, flags, both_pay=True)[1]()
    assert min(np.mean(np.abs(action - mode) < 0.3) for mode in (0.6, -0.6)) > 0.3
    assert np.mean(np.abs(action) < 0.3) < 0.15
