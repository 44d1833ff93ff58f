"""Real training on a problem whose answer is known: one step, two modes of behaviour, one of which pays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.data import Dataset

from algorithms import bc, crr, dql_baseline, edp_crr, edp_iql, edp_td3bc, iql, td3bc
from common.networks import twin_q

PAY = 4.0  # large enough for exp(Q) to prefer it clearly in energy-based action selection
ALGORITHMS = [
    pytest.param(edp_td3bc, {"num_solver_calls": 3}, id="edp_td3bc"),
    pytest.param(edp_crr, {"num_solver_calls": 3}, id="edp_crr", marks=pytest.mark.slow),
    pytest.param(edp_iql, {"expectile": 0.7}, id="edp_iql", marks=pytest.mark.slow),
    pytest.param(dql_baseline, {"num_diffusion_steps": 5}, id="dql_baseline", marks=pytest.mark.slow),
]
FEED_FORWARD = [
    pytest.param(td3bc, {}, id="td3bc", marks=pytest.mark.slow),
    pytest.param(crr, {}, id="crr", marks=pytest.mark.slow),
    pytest.param(iql, {"expectile": 0.7, "temperature": 1.0}, id="iql", marks=pytest.mark.slow),
]


def make_dataset(both_pay=False, size=2000):
    """Actions 0.6 and -0.6, equally frequent, with some spread; the first, or both, pay. Observations say nothing."""
    rng = np.random.default_rng(0)
    pays = rng.permutation(np.arange(size) % 2)
    arrays = Dataset(
        obs=rng.normal(size=(size, 2)),
        action=(1.2 * pays - 0.6 + 0.1 * rng.normal(size=size))[:, None],
        reward=PAY * np.maximum(pays, both_pay),
        next_obs=rng.normal(size=(size, 2)),
        terminal=np.ones(size),
    )
    return jax.tree.map(jnp.float32, arrays)


def train(algorithm, flags, both_pay=False):
    """(state of two seeds after 1000 updates, a function from N to 1000 actions of the policy)."""
    settings = {"eta": 1.0, "beta_schedule": "vp", "num_diffusion_steps": 50}
    settings = {name: value for name, value in settings.items() if hasattr(algorithm.Args, name)} | flags
    args = algorithm.Args(num_updates=1000, batch_size=64, learning_rate=2e-3, **settings)
    keys = jax.random.split(jax.random.key(0), 2)
    state = jax.jit(jax.vmap(lambda key: algorithm.init_state(key, 2, 1, args)))(keys)
    state, _ = algorithm.train_chunk(state, 0, keys, make_dataset(both_pay), args, 1000)

    def act(num_actions):
        solver = {"num_solver_calls": 9} if hasattr(args, "num_solver_calls") else {}
        obs = jnp.float32(np.random.default_rng(1).normal(size=(2, 500, 2)))
        if algorithm is bc:
            return np.asarray(bc.select_action(state.policy, obs, keys, 0, dataclasses.replace(args, **solver))).ravel()
        acting = dataclasses.replace(args, num_eval_actions=num_actions, **solver)
        return np.asarray(algorithm.select_action(state.policy, state.critics, obs, keys, 0, acting)).ravel()

    return state, act


@pytest.mark.parametrize(("algorithm", "flags"), ALGORITHMS + FEED_FORWARD)
def test_policy_learns_the_mode_that_pays(algorithm, flags):
    """Guidance alone (N = 1) brings most actions of a diffusion policy there, selection (Alg. 2) the others."""
    state, act = train(algorithm, flags)
    assert np.mean(act(1) > 0) > 0.6
    assert np.mean(act(10) > 0) > 0.9
    obs, action = jnp.zeros((2, 2, 2)), jnp.array([[[0.6], [-0.6]]] * 2)
    q = jax.vmap(twin_q)(state.critics, obs, action)  # (seeds, critics, actions)
    np.testing.assert_allclose(q, np.broadcast_to([PAY, 0.0], q.shape), atol=0.1 * PAY)  # the reward: all is terminal


@pytest.mark.parametrize(("algorithm", "flags"), [*FEED_FORWARD, pytest.param(bc, {}, id="bc")])
def test_where_both_modes_pay_a_feed_forward_policy_acts_between_them(algorithm, flags):
    """As nobody did in the data: the two modes are a single mean's two halves."""
    _, act = train(algorithm, flags, both_pay=True)
    assert np.mean(np.abs(act(1)) < 0.3) > 0.95


@pytest.mark.parametrize(
    ("algorithm", "flags"),
    [
        pytest.param(edp_td3bc, {"num_solver_calls": 3}, id="edp_td3bc"),
        pytest.param(bc, {"policy": "diffusion", "num_solver_calls": 3}, id="bc", marks=pytest.mark.slow),
    ],
)
def test_where_both_modes_pay_a_diffusion_policy_acts_in_them(algorithm, flags):
    """In either, where all of the feed-forward policies fail."""
    _, act = train(algorithm, flags, both_pay=True)
    action = act(1)
    for mode in (0.6, -0.6):
        assert np.mean(np.abs(action - mode) < 0.3) > 0.3
    assert np.mean(np.abs(action) < 0.3) < 0.15


def test_without_guidance_the_policy_is_the_behaviour_with_both_modes():
    """With eta = 0 and N = 1 it is behaviour cloning: a diffusion policy does not average -0.6 and 0.6."""
    _, act = train(edp_td3bc, {"eta": 0.0, "num_solver_calls": 3})
    action = act(1)
    assert abs(np.mean(action > 0) - 0.5) < 0.12
    for mode in (0.6, -0.6):
        assert np.mean(np.abs(action - mode) < 0.3) > 0.3
