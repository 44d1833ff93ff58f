"""Updates, optimizers, seeds, acting and checkpoints.

Where algorithm files share their text (tests/test_siblings.py compares it), one of them stands for all. Numbers that
should be equal are compared in float64, where another order of sums changes the last of sixteen digits.
"""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ALGORITHMS, SCRIPTS, one, over

from algorithms import bc, crr, edp_iql, edp_td3bc, td3bc
from common.harness import Dataset, load_run
from common.harness.checkpoint import CheckpointError, save_checkpoint
from common.harness.devices import seed_keys, to_devices
from common.networks import twin_q

OBS_DIM, ACT_DIM, SIZE, SEEDS = 3, 2, 300, (0, 1, 2)
SMALL = {"batch_size": 32, "num_updates": 10, "learning_rate": 1e-3, "eta": 1.0, "expectile": 0.7, "temperature": 1.0}
SMALL |= {"num_diffusion_steps": 50, "num_solver_calls": 2, "solver_order": 1, "num_eval_actions": 1}
SMALL |= {"max_grad_norm": 0.01}  # every gradient here is larger
SMALL |= {"init_noise_scale": 0.001}  # of untrained networks: with 1, every action is clipped to a corner
pytestmark = pytest.mark.usefixtures("float64", "quick_networks")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
make_args = partial(helpers.make_args, common=SMALL)


@cache
def make_dataset():
    rng = np.random.default_rng(0)
    obs, next_obs = rng.normal(size=(2, SIZE, OBS_DIM))
    terminal = rng.integers(0, 2, SIZE)
    dataset = Dataset(obs, rng.uniform(-1, 1, (SIZE, ACT_DIM)), rng.normal(size=SIZE), next_obs, terminal)
    return jax.tree.map(lambda array: jnp.asarray(array, float), dataset)


@cache
def compiled(function):
    """`function`, compiled once for all tests."""
    return jax.jit(function)


@cache
def init_of(algorithm):
    return jax.jit(jax.vmap(lambda key: algorithm.init_state(key, OBS_DIM, ACT_DIM, make_args(algorithm))))


def start(algorithm, seeds=SEEDS):
    """(state, training keys) of some seeds, as the algorithms' `train` makes them."""
    init_keys, train_keys, _ = to_devices(seed_keys(list(seeds), 3), over_seeds=True)
    return to_devices(init_of(algorithm)(init_keys), over_seeds=True), train_keys


def start_one(algorithm):
    """(state, key) of one seed, with targets that differ from their networks, so that it shows what is taken."""
    state, keys = start(algorithm)
    targets = {name: value for name, value in one(state)._asdict().items() if name.startswith("target_")}
    return one(state)._replace(**jax.tree.map(lambda leaf: 1.3 * leaf + 0.01, targets)), keys[0]


def step(algorithm, state, update, key, **changes):
    """(state, metrics) after one update."""
    return compiled(algorithm.train_step)(state, update, key, make_dataset(), make_args(algorithm, **changes))


def batch_of(key):
    index = jax.random.randint(key, (SMALL["batch_size"],), 0, SIZE)
    return jax.tree.map(lambda array: array[index], make_dataset())


def scaled(module, factor):
    """`module` with its output scaled."""
    layer = lambda module: (module.mlp.layers[-1].weight, module.mlp.layers[-1].bias)
    return eqx.tree_at(layer, module, replace_fn=lambda leaf: factor * leaf)


def centred(critics):
    """`critics` with outputs of mean 0 over the data, so that neither is the smaller one everywhere."""
    mean = twin_q(critics, make_dataset().obs, make_dataset().action).mean(axis=1, keepdims=True)
    return eqx.tree_at(lambda critics: critics.mlp.layers[-1].bias, critics, replace_fn=lambda bias: bias - mean)


def norm(tree):
    """The global norm over all leaves."""
    return np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree)))


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_polyak(new, before, after):
    """`after` is 0.005 `new` + 0.995 `before`."""
    average = lambda new, target: 0.005 * np.asarray(new, np.float64) + 0.995 * np.asarray(target, np.float64)
    assert_trees_close(after, jax.tree.map(average, new, before), **CLOSE)


# --------------------------------------------------------------------------------------------------- one update
@over(edp_td3bc, edp_iql)
def test_targets_move_by_polyak_averaging_of_the_new_weights(algorithm):
    """Critic targets at every update; the policy's at update n if and only if n > 1000 and n % 5 == 0."""
    state, key = start_one(algorithm)
    for update in (1, 5, 1000, 1001, 1004, 1005, 1010):
        new, _ = step(algorithm, state, update, key)
        assert_polyak(new.critics, state.target_critics, new.target_critics)
        if algorithm is edp_td3bc and update in (1005, 1010):
            assert_polyak(new.policy, state.target_policy, new.target_policy)
        elif algorithm is edp_td3bc:
            assert_trees_equal(new.target_policy, state.target_policy)


def test_td3bc_moves_policy_and_targets_at_every_second_update_and_the_critics_at_every_one():
    """n % policy_every == 0; between, the policy's optimizer waits too, and the loss is reported without a step."""
    args, (state, key) = make_args(td3bc), start_one(td3bc)
    for update in (1, 2, 3):
        new, metrics = step(td3bc, state, update, key)
        assert norm(jax.tree.map(jnp.subtract, new.critics, state.critics)) > 0
        batch = batch_of(jax.random.split(jax.random.fold_in(key, update))[0])
        loss, _ = compiled(td3bc.policy_loss)(state.policy, new.critics, batch, args)  # the new critics, as Alg. 1
        np.testing.assert_allclose(metrics["policy_loss"], loss, **CLOSE)
        if update == 2:
            assert norm(jax.tree.map(jnp.subtract, new.policy, state.policy)) > 0
            assert_polyak(new.critics, state.target_critics, new.target_critics)
            assert_polyak(new.policy, state.target_policy, new.target_policy)
        else:
            for name in ("policy", "policy_opt", "target_policy", "target_critics"):
                assert_trees_equal(getattr(new, name), getattr(state, name))


def test_td3bc_computes_no_gradient_of_the_policy_where_it_waits():
    """A condition on a seed's own data would become a choice between two results that are both computed."""
    states, keys = start(td3bc)
    step_of_all_seeds = jax.vmap(td3bc.train_step, in_axes=(0, None, 0, None, None))
    jaxpr = jax.make_jaxpr(step_of_all_seeds, static_argnums=4)(states, 1, keys, make_dataset(), make_args(td3bc))
    assert sum(equation.primitive.name == "cond" for equation in jaxpr.eqns) == 1


def test_policy_follows_the_critics_from_after_their_update():
    """Alg. 1: the critics go first, to the target networks' targets; the guidance comes from the new critics."""
    args, (state, key) = make_args(edp_td3bc), start_one(edp_td3bc)
    state = state._replace(critics=centred(state.critics))  # else every guidance is 1 or -1
    new, metrics = step(edp_td3bc, state, 7, key)
    batch_key, target_key, policy_key = jax.random.split(jax.random.fold_in(key, 7), 3)
    batch = batch_of(batch_key)
    target = jax.jit(edp_td3bc.critic_target)(state.target_critics, state.target_policy, batch, target_key, args)
    loss, _ = edp_td3bc.critic_loss(state.critics, target, batch)
    np.testing.assert_allclose(metrics["critic_loss"], loss, **CLOSE)
    guidance = lambda critics: compiled(edp_td3bc.policy_loss)(state.policy, critics, batch, policy_key, args)[1]
    after, before = (guidance(critics)["guidance_loss"] for critics in (new.critics, state.critics))
    assert abs(after - before) > 1e-2
    np.testing.assert_allclose(metrics["guidance_loss"], after, **CLOSE)


def test_iql_updates_the_value_first():
    """The weight and the critics' target use the new V; V and the weight use the target critics from before."""
    args, (state, key) = make_args(edp_iql), start_one(edp_iql)
    new, metrics = step(edp_iql, state, 7, key)
    batch = batch_of(jax.random.split(jax.random.fold_in(key, 7))[0])
    value_loss, _ = edp_iql.value_loss(state.value, state.target_critics, batch, args)
    np.testing.assert_allclose(metrics["value_loss"], value_loss, **CLOSE)
    for value, is_used in ((new.value, True), (state.value, False)):
        weight = edp_iql.advantage_weight(value, state.target_critics, batch, args).mean()
        assert np.isclose(metrics["weight"], weight, rtol=1e-4) == is_used
        loss, _ = edp_iql.critic_loss(state.critics, edp_iql.critic_target(value, batch, args), batch)
        assert np.isclose(metrics["critic_loss"], loss, rtol=1e-4) == is_used


@over(edp_td3bc, edp_iql)
def test_gradients_are_clipped_by_the_global_norm_of_each_network_and_of_both_critics_together(algorithm):
    """Adam's first moment is then a tenth of the gradient, if that is within the limit, else of one with that norm."""
    state, key = start_one(algorithm)
    new, _ = step(algorithm, state, 1, key)
    optimizers = {name: value for name, value in new._asdict().items() if name.endswith("_opt")}
    moments = {name: optax.tree_utils.tree_get(value, "mu") for name, value in optimizers.items()}
    assert len(moments) == (3 if algorithm is edp_iql else 2)
    for moment in moments.values():
        np.testing.assert_allclose(norm(moment), 0.1 * 0.01, **CLOSE)
    shares = [norm(one(moments["critics_opt"], i)) for i in range(2)]
    assert 0 < min(shares) <= max(shares) < 0.1 * 0.01 * 0.999
    for optimizer in algorithm.make_optimizers(make_args(algorithm, max_grad_norm=5.0)):
        _, opt_state = jax.jit(optimizer.update)(jnp.array([0.6, 0.8]), optimizer.init(jnp.zeros(2)))
        np.testing.assert_allclose(optax.tree_utils.tree_get(opt_state, "mu"), [0.06, 0.08], **CLOSE)


@over(edp_td3bc, td3bc)
@pytest.mark.parametrize("lr_decay", [False, True])
def test_lr_decay_takes_the_policys_rate_along_a_cosine_to_zero(algorithm, lr_decay):
    """After n of N updates (TD3+BC's policy makes half of them): under a constant gradient Adam's step is the rate."""
    args = make_args(algorithm, lr_decay=lr_decay, num_updates=10, learning_rate=3e-4, max_grad_norm=1e9)
    num = 10 if algorithm is edp_td3bc else 5
    decayed = 3e-4 * (1 + np.cos(np.pi * np.arange(num + 1) / num)) / 2
    for optimizer, expected in zip(algorithm.make_optimizers(args), (decayed if lr_decay else 3e-4, 3e-4)):
        update = lambda opt_state, gradient: optimizer.update(gradient, opt_state)[::-1]
        _, steps = jax.lax.scan(update, optimizer.init(jnp.zeros(())), jnp.ones(num + 1))
        # Adam divides by |g| + 1e-8
        np.testing.assert_allclose(-steps, np.broadcast_to(expected, num + 1), rtol=1e-7, atol=1e-15)


# -------------------------------------------------------------------------------------------- seeds and chunks
@pytest.mark.parametrize(
    ("name", "flags"),
    [*((name, {}) for name in ALGORITHMS), ("bc", {"policy": "diffusion"}), ("edp_iql", {"critic_layer_norm": True})],
)
def test_an_update_keeps_shapes_and_types_and_reports_scalars_that_the_docs_explain(name, flags):
    """Else the second chunk of a run would compile anew: its state comes from an update, not from init_state."""
    algorithm = importlib.import_module(f"algorithms.{name}")
    args, dataset = make_args(algorithm, **flags), make_dataset()
    state = jax.eval_shape(lambda: algorithm.init_state(jax.random.key(0), OBS_DIM, ACT_DIM, args))
    update = lambda state: algorithm.train_step(state, jnp.int32(1), jax.random.key(0), dataset, args)
    new, metrics = jax.eval_shape(update, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new)):
        assert (before.shape, before.dtype, before.weak_type) == (after.shape, after.dtype, after.weak_type)
    assert {"policy_loss"} | ({"critic_loss", "q"} if name != "bc" else set()) <= metrics.keys()
    assert all(metric.shape == () for metric in metrics.values())
    table = re.findall(r"^\| (`.+?`) \|", (SCRIPTS.parent / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)
    assert metrics.keys() <= set(re.findall(r"`(\w+)`", " ".join(table)))


def train(chunk):
    """edp_td3bc's (state, metrics) after 10 updates of all seeds in chunks of some length, on all devices."""
    state, keys = start(edp_td3bc)
    dataset, args, parts = to_devices(make_dataset()), make_args(edp_td3bc), []
    for last in range(chunk, 11, chunk):
        state, metrics = edp_td3bc.train_chunk(state, last, keys, dataset, args, chunk)
        parts.append(metrics)
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *parts)


def test_chunk_size_does_not_change_the_result_and_one_size_compiles_once():
    """Randomness is fold_in(key, update): 2 chunks of 5 updates are exactly 1 of 10."""
    before = edp_td3bc.train_chunk._cache_size()
    state, metrics = train(5)
    assert edp_td3bc.train_chunk._cache_size() == before + 1
    assert all(value.shape == (10, 3) and np.isfinite(value).all() for value in metrics.values())
    assert_trees_equal(train(10), (state, metrics))


def test_a_seed_trained_alone_is_the_seed_trained_with_others():
    """Up to rounding: batched matrix products sum in another order, and 10 updates of Adam amplify that."""
    (state, metrics), (solo, keys) = train(5), start(edp_td3bc, [1])
    solo = one(solo)
    for update in range(1, 11):
        solo, of_update = step(edp_td3bc, solo, update, keys[0])
        for name, value in of_update.items():
            np.testing.assert_allclose(value, metrics[name][update - 1, 1], **CLOSE)
    for name in ("policy", "critics", "target_policy", "target_critics"):
        assert_trees_close(getattr(solo, name), one(getattr(state, name), 1), **CLOSE)


def test_three_devices_give_what_one_gives(tmp_path):
    """Three seeds are shared out over three devices, which XLA makes of one CPU; two cannot be: each trains both."""
    program = f"""
import jax, numpy as np, test_training
from common import networks
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_enable_x64", True)
networks.NUM_HIDDEN = 1
state, metrics = test_training.train(5)
assert test_training.edp_td3bc.train_chunk._cache_size() == 1
shards = state.critics.mlp.layers[0].bias.addressable_shards
assert [(shard.device.id, shard.data.shape[0]) for shard in shards] == [(0, 1), (1, 1), (2, 1)]
two = test_training.to_devices(np.arange(2.0), over_seeds=True)
assert [shard.data.shape for shard in two.addressable_shards] == [(2,)] * 3
np.savez({str(tmp_path / "metrics.npz")!r}, **metrics)
"""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=3"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPTS.parent)}
    subprocess.run([sys.executable, "-c", program], env=env, cwd=Path(__file__).parent, check=True)
    with np.load(tmp_path / "metrics.npz") as metrics:
        assert_trees_close(dict(metrics), train(5)[1], **CLOSE)


def test_seeds_differ_in_every_initial_weight_and_targets_start_as_copies():
    state, _ = start(edp_iql)
    for leaf in jax.tree.leaves((state.policy, state.critics, state.value)):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert not np.any(np.asarray(leaf[i]) == np.asarray(leaf[j]))
    assert_trees_equal(state.target_critics, state.critics)
    state, _ = start(edp_td3bc)
    assert_trees_equal((state.target_policy, state.target_critics), (state.policy, state.critics))


def test_seeds_and_updates_differ_in_their_batches():
    """From equal weights, every seed and every update has another mean Q(s, a) over its batch."""
    (state, _), (_, keys) = start_one(edp_td3bc), start(edp_td3bc)
    q = [float(step(edp_td3bc, state, update, key)[1]["q"]) for key in keys for update in (1, 2)]
    assert len(set(q)) == 6
    assert float(step(edp_td3bc, state, 1, keys[0])[1]["q"]) == q[0]


# ------------------------------------------------------------------------------------------------------- acting
def acting(algorithm=edp_td3bc, num_obs=16):
    """A state of three seeds whose policies act inside (-1, 1) and whose critics are not flat; observations; keys."""
    state, keys = start(algorithm)
    if algorithm is edp_td3bc:
        critics = scaled(jax.vmap(centred)(scaled(state.critics, 100.0)), 5.0)
        state = state._replace(policy=scaled(state.policy, 0.005), critics=critics)
    obs = np.random.default_rng(0).normal(size=(3, num_obs, OBS_DIM))
    return state, jnp.asarray(obs), jax.vmap(lambda key: jax.random.split(key, num_obs))(keys)


def candidates(algorithm, state, obs, keys, step, num, *settings, split=True):
    """The N actions among which `act` chooses, (seeds, observations, N, act_dim), and each one's (Q_1, Q_2)."""

    def sample(state, obs, key):
        key = jax.random.fold_in(key, step)
        key = jax.random.split(key)[0] if split else key  # the other one is for the choice
        obs = jnp.repeat(obs[None], num, axis=0)
        action = algorithm.sample_action(state.policy, obs, key, *settings)
        return action, twin_q(state.critics, obs, action)

    return jax.jit(jax.vmap(jax.vmap(sample, (None, 0, 0))))(state, obs, keys)


def test_what_an_observation_is_answered_does_not_depend_on_what_it_is_asked_with():
    """`act` is `select_action` of each observation with its own key: alone, beside others, in another order."""
    (state, obs, keys), args = acting(), make_args(edp_td3bc, num_eval_actions=3)
    action = edp_td3bc.act(state, obs, keys, 2, args)
    for i, j in ((0, 0), (1, 5), (2, 15)):
        alone = compiled(edp_td3bc.select_action)(one(state, i), obs[i, j], keys[i, j], 2, args)
        np.testing.assert_allclose(alone, action[i, j], **CLOSE)
    others = obs.at[:, 1:].set(-obs[:, 1:])
    np.testing.assert_allclose(edp_td3bc.act(state, others, keys, 2, args)[:, 0], action[:, 0], **CLOSE)
    mixed = edp_td3bc.act(state, obs[:, ::-1], keys[:, ::-1], 2, args)
    np.testing.assert_allclose(mixed[:, ::-1], action, **CLOSE)


def test_episodes_steps_and_seeds_act_by_different_draws_of_one_program():
    """From one observation and one policy, every action is another one."""
    (state, obs, keys), args = acting(), make_args(edp_td3bc)
    state, obs = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 3), state), jnp.zeros_like(obs)
    before = edp_td3bc.act._cache_size()
    actions = [edp_td3bc.act(state, obs, keys, step, args) for step in (0, 1)]
    assert len(np.unique(np.reshape(actions, (-1, ACT_DIM)), axis=0)) == 2 * 3 * 16
    np.testing.assert_array_equal(edp_td3bc.act(state, obs, keys, 0, args), actions[0])
    assert edp_td3bc.act._cache_size() <= before + 1, "it compiles once for all steps"


@over(edp_td3bc, bc)
def test_one_action_is_a_plain_sample_whatever_the_critics_say(algorithm):
    """N = 1, or no critics at all."""
    (state, obs, keys), args = acting(), make_args(edp_td3bc)
    expected, _ = candidates(edp_td3bc, state, obs, keys, 3, 1, args, True, split=algorithm is edp_td3bc)
    state = state._replace(critics=scaled(state.critics, -1))
    if algorithm is bc:
        state, args = bc.TrainState(state.policy, ()), make_args(bc, policy="diffusion")
    np.testing.assert_allclose(algorithm.act(state, obs, keys, 3, args), expected[:, :, 0], **CLOSE)


def test_an_action_is_selected_with_probability_proportional_to_exp_of_the_smaller_q():
    """Alg. 2 with min(Q_1, Q_2): which rank is chosen how often, and how large a Q, over 3000 choices among 4."""
    (state, obs, keys), args = acting(num_obs=1000), make_args(edp_td3bc, num_eval_actions=4)
    action = np.asarray(edp_td3bc.act(state, obs, keys, 0, args)).reshape(3000, 1, ACT_DIM)
    options, q = candidates(edp_td3bc, state, obs, keys, 0, 4, args, True)
    q = np.moveaxis(np.asarray(q, np.float64), 2, 0).reshape(2, 3000, 4)
    distance = np.abs(np.asarray(options).reshape(3000, 4, ACT_DIM) - action).max(axis=2)
    assert distance.min(axis=1).max() < 1e-5  # what is chosen is among the candidates
    chosen = distance.argmin(axis=1)[:, None]

    def deviation(values):
        """From softmax(values): of the mean chosen value, in standard errors; of the ranks chosen, chi-square."""
        p = np.exp(values - values.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        mean = np.sum(p * values, axis=1)
        variance = np.sum(p * values**2, axis=1) - mean**2
        z = np.sum(np.take_along_axis(values, chosen, axis=1)[:, 0] - mean) / np.sqrt(variance.sum())
        rank = np.argsort(np.argsort(values, axis=1), axis=1)
        observed = np.bincount(np.take_along_axis(rank, chosen, axis=1)[:, 0], minlength=4)
        expected = np.array([p[rank == r].sum() for r in range(4)])
        return abs(z), np.sum((observed - expected) ** 2 / expected)

    z, chi_square = deviation(q.min(axis=0))
    assert z < 4
    assert chi_square < 3 + 4 * np.sqrt(6)  # 3 degrees of freedom
    others = (q.max(axis=0), q.mean(axis=0), q[0], q[1], 1.5 * q.min(axis=0), 0.1 * q.min(axis=0))
    assert min(max(deviation(other)) for other in others) > 15  # beyond the bounds, which are narrow enough to tell


def test_the_mean_of_the_best_candidates_acts():
    """`average_best`: the mean of those of the N with the largest min(Q_1, Q_2); of one, it is the best of them."""
    (state, obs, keys), args = acting(), make_args(edp_td3bc, num_eval_actions=6)
    options, q = (np.asarray(array) for array in candidates(edp_td3bc, state, obs, keys, 4, 6, args, True))
    rank = np.argsort(np.argsort(-q.min(axis=2), axis=2), axis=2)[..., None]
    for best in (1, 4, 6):
        expected = np.where(rank < best, options, 0).sum(axis=2) / best
        action = edp_td3bc.act(state, obs, keys, 4, dataclasses.replace(args, average_best=best))
        np.testing.assert_allclose(action, expected, **CLOSE)


@over(td3bc, crr, bc)
def test_a_feed_forward_policy_acts_by_its_mean_or_by_energy_based_selection_around_it(algorithm):
    """N = 1 is the mean, whatever the key; of N samples one is drawn with probability ~ exp(min_i Q_i(s, a))."""
    state, obs, keys = acting(algorithm)
    mean = jax.vmap(jax.vmap(lambda policy, obs: policy(obs), (None, 0)))(state.policy, obs)
    np.testing.assert_allclose(algorithm.act(state, obs, keys, 0, make_args(algorithm)), mean, **CLOSE)
    if algorithm is bc:  # no critics
        return
    args = make_args(algorithm, num_eval_actions=5)
    options, q = candidates(algorithm, state, obs, keys, 7, 5, *((args.eval_noise,) if algorithm is td3bc else ()))
    q = q.min(axis=2)
    steep = state._replace(critics=scaled(state.critics, 1e6))  # so that the largest Q is as good as certain
    action = algorithm.act(steep, obs, keys, 7, args)
    distance = np.abs(options - action[:, :, None]).max(axis=3)
    assert distance.min(axis=2).max() < 1e-5
    chosen_q = np.take_along_axis(q, distance.argmin(axis=2)[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(chosen_q, q.max(axis=2), **CLOSE)
    assert np.mean(q.max(axis=2) - q.mean(axis=2)) > 1e-3
    assert np.abs(action - mean).max() > 0.1


# -------------------------------------------------------------------------------------------------- checkpoints
def test_a_checkpoint_holds_every_leaf_and_one_of_another_kind_is_refused(tmp_path):
    """Leaves are stored by position: another state or other sizes would be filled with the wrong numbers."""
    args = make_args(edp_iql, num_seeds=len(SEEDS))

    def save(state, obs_dim=OBS_DIM, update=7):
        dims = {"observation_dim": obs_dim, "action_dim": ACT_DIM}
        header = {"algorithm": "edp_iql", "args": dataclasses.asdict(args), "dataset": dims, "update": update}
        save_checkpoint(tmp_path, state, header)

    state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + np.ones((), leaf.dtype)), start(edp_iql)[0])
    save(state)  # without a zero
    with pytest.raises(TypeError):
        save(state, update=object())  # and what was there stays
    loaded = load_run(tmp_path, edp_iql)
    assert (loaded[0], loaded[2]["update"]) == (args, 7)
    assert jax.tree.structure(loaded[1]) == jax.tree.structure(state)
    assert_trees_equal(loaded[1], state)
    save(state, obs_dim=OBS_DIM + 1)
    with pytest.raises(CheckpointError, match="state"):
        load_run(tmp_path, edp_iql)
    save(start(edp_td3bc)[0])
    with pytest.raises(CheckpointError, match="another kind of state"):
        load_run(tmp_path, edp_iql)
