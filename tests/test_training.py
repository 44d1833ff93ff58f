"""Updates, optimizers, seeds, acting and checkpoints of every algorithm."""

import dataclasses
from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms import dql_baseline, edp_crr, edp_iql, edp_td3bc
from common.data import Dataset
from common.networks import twin_q
from common.run import load_checkpoint, save_checkpoint

ALGORITHMS = [edp_td3bc, edp_crr, edp_iql, dql_baseline]
OBS_DIM, ACT_DIM, SIZE = 3, 2, 300


def over(modules):
    return pytest.mark.parametrize("algorithm", modules, ids=lambda module: module.__name__.split(".")[-1])


def make_args(algorithm, **changes):
    """Small and quick arguments, of those that the algorithm has."""
    common = {
        "batch_size": 32,
        "beta_schedule": "vp",
        "num_diffusion_steps": 5 if algorithm is dql_baseline else 50,
        "num_solver_calls": 3,
        "num_updates": 10,
        "learning_rate": 3e-4,
        "eta": 1.0,
        "expectile": 0.7,
    }
    names = {field.name for field in dataclasses.fields(algorithm.Args)}
    return algorithm.Args(**{name: value for name, value in common.items() if name in names} | changes)


def make_dataset(reward_scale=1.0):
    rng = np.random.default_rng(0)
    arrays = Dataset(
        obs=rng.normal(size=(SIZE, OBS_DIM)),
        action=rng.uniform(-1, 1, (SIZE, ACT_DIM)),
        reward=reward_scale * rng.normal(size=SIZE),
        next_obs=rng.normal(size=(SIZE, OBS_DIM)),
        terminal=rng.integers(0, 2, SIZE).astype(float),
    )
    return jax.tree.map(jnp.float32, arrays)


@lru_cache
def init_of(algorithm):
    return jax.jit(jax.vmap(lambda key: algorithm.init_state(key, OBS_DIM, ACT_DIM, make_args(algorithm))))


def start(algorithm, seeds):
    """(state, training keys) of some seeds, as the algorithms' `train` makes them."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.array(seeds))
    return init_of(algorithm)(keys[:, 0]), keys[:, 1]


def one(tree, index=0):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def perturbed(state):
    """Targets that differ from their networks, so that what is taken from which shows."""
    fields = {name: value for name, value in state._asdict().items() if name.startswith("target_")}
    return state._replace(**jax.tree.map(lambda leaf: 1.3 * leaf + 0.01, fields))


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@lru_cache
def step_of(algorithm):
    return jax.jit(algorithm.train_step)


# --------------------------------------------------------------------------------------------------- one update
@over(ALGORITHMS)
def test_targets_move_by_polyak_averaging_of_the_new_weights(algorithm):
    """Critic targets at every update; the policy's at update n if and only if n > 1000 and n % 5 == 0."""
    state, keys = start(algorithm, [0])
    state, args = perturbed(one(state)), make_args(algorithm)
    moved_at = []
    for step in (1, 5, 999, 1000, 1001, 1004, 1005, 1010):
        new, _ = step_of(algorithm)(state, step, keys[0], make_dataset(), args)
        expected = jax.tree.map(lambda n, t: 0.005 * n + 0.995 * t, new.critics, state.target_critics)
        assert_trees_close(new.target_critics, expected, rtol=1e-6, atol=1e-8)
        if hasattr(new, "target_policy"):
            expected = jax.tree.map(lambda n, t: 0.005 * n + 0.995 * t, new.policy, state.target_policy)
            if np.array_equal(new.target_policy.mlp.layers[0].weight, state.target_policy.mlp.layers[0].weight):
                assert_trees_equal(new.target_policy, state.target_policy)
            else:
                assert_trees_close(new.target_policy, expected, rtol=1e-6, atol=1e-8)
                moved_at.append(step)
    assert moved_at == ([1005, 1010] if hasattr(state, "target_policy") else [])


@over([edp_td3bc])
def test_policy_follows_the_critics_from_after_their_update(algorithm):
    """Alg. 1: critics first; their target from the target networks, the guidance from the new critics."""
    args, dataset = make_args(algorithm, learning_rate=1e-2), make_dataset()
    state, keys = start(algorithm, [0])
    state, key = perturbed(one(state)), keys[0]
    new, metrics = jax.jit(algorithm.train_step)(state, 7, key, dataset, args)
    batch_key, target_key, policy_key = jax.random.split(jax.random.fold_in(key, 7), 3)
    index = jax.random.randint(batch_key, (args.batch_size,), 0, SIZE)
    batch = jax.tree.map(lambda array: array[index], dataset)

    target = jax.jit(algorithm.critic_target)(state.target_critics, state.target_policy, batch, target_key, args)
    loss, _ = jax.jit(algorithm.critic_loss)(state.critics, target, batch)
    np.testing.assert_allclose(metrics["critic_loss"], loss, rtol=1e-4)

    policy_loss = jax.jit(algorithm.policy_loss)
    after, before = (policy_loss(state.policy, q, batch, policy_key, args)[1] for q in (new.critics, state.critics))
    assert abs(after["guidance_loss"] - before["guidance_loss"]) > 1e-2
    np.testing.assert_allclose(metrics["guidance_loss"], after["guidance_loss"], rtol=1e-4)


@over([edp_td3bc, edp_iql])
def test_gradients_are_clipped_by_global_norm_of_both_critics_together(algorithm):
    """After the first update Adam's first moment is a tenth of the clipped gradient, whose global norm is the limit."""
    state, keys = start(algorithm, [0])
    state, args = one(state), make_args(algorithm, max_grad_norm=0.01)
    new, _ = step_of(algorithm)(state, 1, keys[0], make_dataset(reward_scale=100.0), args)
    for name in [field for field in state._fields if field.endswith("_opt")]:
        moment = optax.tree_utils.tree_get(getattr(new, name), "mu")
        np.testing.assert_allclose(optax.global_norm(moment), 0.1 * 0.01, rtol=1e-4)
    moment = optax.tree_utils.tree_get(new.critics_opt, "mu")
    shares = [float(optax.global_norm(one(moment, i))) for i in range(2)]
    assert min(shares) > 0
    assert max(shares) < 0.1 * 0.01 * 0.999  # each critic alone is below the limit


def test_gradients_within_the_limit_are_not_touched_and_larger_ones_keep_their_direction():
    """g min(1, max_grad_norm / |g|) with |g| over all leaves: not leaf by leaf, not element by element."""
    _, optimizer = edp_td3bc.make_optimizers(make_args(edp_td3bc, max_grad_norm=5.0))
    for scale, factor in ((1.0, 1.0), (10.0, 0.5)):
        grads = {"a": scale * jnp.array([0.6, 0.0]), "b": scale * jnp.array([[0.8], [0.0]])}
        _, opt_state = optimizer.update(grads, optimizer.init(grads))
        expected = jax.tree.map(lambda g, factor=factor: 0.1 * factor * g, grads)
        assert_trees_close(optax.tree_utils.tree_get(opt_state, "mu"), expected, rtol=1e-5)


@pytest.mark.parametrize("lr_decay", [False, True])
def test_lr_decay_takes_the_policys_rate_along_a_cosine_to_zero(lr_decay):
    """rate (1 + cos(pi n / N)) / 2 after n of N updates; under a constant gradient Adam's step is the rate."""
    args = make_args(edp_td3bc, lr_decay=lr_decay, num_updates=10, max_grad_norm=1e9)
    decayed = 3e-4 * (1 + np.cos(np.pi * np.arange(11) / 10)) / 2
    for optimizer, expected in zip(edp_td3bc.make_optimizers(args), (decayed if lr_decay else 3e-4, 3e-4)):
        gradient = jnp.ones(3)
        opt_state, rates = optimizer.init(gradient), []
        for _ in range(11):
            update, opt_state = optimizer.update(gradient, opt_state)
            rates.append(-float(update[0]))
        np.testing.assert_allclose(rates, np.broadcast_to(expected, 11), rtol=1e-4, atol=1e-10)


# ------------------------------------------------------------------------------------------- seeds and chunks
@pytest.fixture(scope="module", params=ALGORITHMS, ids=lambda module: module.__name__.split(".")[-1])
def runs(request):
    """One algorithm, and 10 updates of it: seeds 0, 1, 2 together in chunks of 5, and the number of compilations."""
    algorithm = request.param
    args, dataset = make_args(algorithm), make_dataset()
    compiled = algorithm.train_chunk._cache_size()
    state, keys = start(algorithm, [0, 1, 2])
    metrics = []
    for first in (0, 5):
        state, chunk_metrics = algorithm.train_chunk(state, first, keys, dataset, args, 5)
        metrics.append(chunk_metrics)
    compiled = algorithm.train_chunk._cache_size() - compiled
    return algorithm, args, dataset, state, jax.tree.map(lambda *parts: np.concatenate(parts), *metrics), compiled


def test_a_run_compiles_its_training_once(runs):
    """The second chunk, whose state comes from the first and not from init_state, is the same program."""
    *_, compiled = runs
    assert compiled == 1


def test_metrics_are_by_update_and_seed_and_finite(runs):
    """One row an update: (updates, seeds)."""
    *_, metrics, _ = runs
    assert all(value.shape == (10, 3) and np.isfinite(value).all() for value in metrics.values())
    assert {"critic_loss", "q", "policy_loss", "diffusion_loss", "guidance_loss"} <= metrics.keys()


def test_seeds_differ_in_their_weights(runs):
    """Every seed has initial weights of its own (a scan of states that share them would still run)."""
    algorithm, *_ = runs
    state, _ = start(algorithm, [0, 1, 2])
    for leaf in jax.tree.leaves((state.policy, state.critics)):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert not np.any(np.asarray(leaf[i]) == np.asarray(leaf[j]))


def test_chunk_size_does_not_change_the_result(runs):
    """Randomness is fold_in(key, update): 2 chunks of 5 updates are 1 of 10."""
    algorithm, args, dataset, state, metrics, _ = runs
    initial, keys = start(algorithm, [0, 1, 2])
    whole, whole_metrics = algorithm.train_chunk(initial, 0, keys, dataset, args, 10)
    assert_trees_equal(whole, state)
    assert_trees_equal(whole_metrics, metrics)


def test_a_seed_trained_alone_is_the_seed_trained_with_others(runs):
    """Up to float32 rounding: the batched matrix products of 3 seeds sum in another order than those of 1."""
    algorithm, args, dataset, state, metrics, _ = runs
    initial, keys = start(algorithm, [1])
    solo, solo_metrics = algorithm.train_chunk(initial, 0, keys, dataset, args, 10)
    print({name: np.abs(solo_metrics[name][:, 0] - metrics[name][:, 1]).max() for name in metrics})
    print(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one(solo), one(state, 1)))
    assert_trees_close(one(solo), one(state, 1), rtol=1e-4, atol=1e-5)
    for name, values in metrics.items():
        np.testing.assert_allclose(solo_metrics[name][:, 0], values[:, 1], rtol=1e-4, atol=1e-5)


@over([edp_td3bc])
def test_seeds_and_updates_differ_in_their_batches(algorithm):
    """Seeds of equal weights, and the same update under another number: another mean Q(s, a) over the batch."""
    args, dataset = make_args(algorithm), make_dataset()
    state, keys = start(algorithm, [0, 1, 2])
    q = [float(step_of(algorithm)(one(state), step, key, dataset, args)[1]["q"]) for key in keys for step in (1, 2)]
    assert len(set(q)) == 6
    again = step_of(algorithm)(one(state), 1, keys[0], dataset, args)[1]["q"]
    assert float(again) == q[0]


# ------------------------------------------------------------------------------------------------------- acting
def acting(algorithm, num_obs, seed=0, **changes):
    """(policy, critics) with a leading axis of one seed, observations, a key, arguments."""
    state, _ = start(algorithm, [seed])
    obs = jnp.float32(np.random.default_rng(seed).normal(size=(1, num_obs, OBS_DIM)))
    return state.policy, state.critics, obs, jax.random.split(jax.random.key(100), 1), make_args(algorithm, **changes)


def scale_last_layer(module, factor):
    where = lambda m: (m.mlp.layers[-1].weight, m.mlp.layers[-1].bias)
    return eqx.tree_at(where, module, replace_fn=lambda leaf: factor * leaf)


def candidates(algorithm, policy, obs, keys, step, args):
    """The actions among which select_action chooses, (obs, N, act_dim), from the same random numbers."""
    sample_key, _ = jax.random.split(jax.random.fold_in(keys[0], step))
    repeated = jnp.repeat(obs[0], args.num_eval_actions, axis=0)
    actions = algorithm.sample_action(one(policy), repeated, sample_key, args)
    return repeated, actions, np.asarray(actions).reshape(obs.shape[1], args.num_eval_actions, ACT_DIM)


@over([edp_td3bc])
def test_selection_from_one_action_is_plain_sampling(algorithm):
    """N = 1: the policy's sample, whatever the critics say."""
    policy, critics, obs, keys, args = acting(algorithm, 8, num_eval_actions=1)
    action = algorithm.select_action(policy, critics, obs, keys, 3, args)
    _, _, sampled = candidates(algorithm, policy, obs, keys, 3, args)
    np.testing.assert_allclose(action[0], sampled[:, 0], atol=1e-5)
    assert_trees_equal(algorithm.select_action(policy, scale_last_layer(critics, -100), obs, keys, 3, args), action)
    assert np.abs(algorithm.select_action(policy, critics, obs, keys, 4, args) - action).max() > 0.01


@over([edp_td3bc])
def test_an_action_is_selected_with_probability_proportional_to_exp_of_the_smaller_q(algorithm):
    """Alg. 2 with min(Q_1, Q_2): frequencies by rank, and the mean Q chosen, over 4000 choices among 4."""
    policy, critics, _, keys, args = acting(algorithm, 1, num_eval_actions=4, policy_temperature=1.0)
    policy, critics = scale_last_layer(policy, 10.0), scale_last_layer(critics, 100.0)
    obs = jnp.float32(np.random.default_rng(1).normal(size=(1, 4000, OBS_DIM)))
    action = np.asarray(algorithm.select_action(policy, critics, obs, keys, 0, args))[0]
    repeated, flat, options = candidates(algorithm, policy, obs, keys, 0, args)
    distance = np.abs(options - action[:, None]).max(axis=2)
    assert np.all(distance.min(axis=1) < 1e-4)  # what is chosen is among the candidates
    q = np.asarray(twin_q(one(critics), repeated, flat), np.float64).reshape(2, 4000, 4)
    chosen = distance.argmin(axis=1)[:, None]

    def deviation(values):
        """Of the mean chosen value from its expectation under softmax(values), in standard errors; and by rank."""
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
    print(q.std(axis=2).mean(), z, chi_square, deviation(q.max(axis=0)), deviation(q.mean(axis=0)))
    assert z < 4
    assert chi_square < 3 + 4 * np.sqrt(6)  # 4 ranks
    assert min(deviation(other)[0] for other in (q.max(axis=0), q.mean(axis=0), 2 * q.min(axis=0), q[0])) > 6


@over([edp_td3bc, dql_baseline])
def test_policy_temperature_scales_the_predicted_noise_when_acting(algorithm):
    """C.4: the same as a network whose output is scaled."""
    policy, critics, obs, keys, args = acting(algorithm, 16, num_eval_actions=1, policy_temperature=0.5)
    policy = scale_last_layer(policy, 10.0)  # so that it matters
    scaled = algorithm.select_action(policy, critics, obs, keys, 0, args)
    plain = dataclasses.replace(args, policy_temperature=1.0)
    expected = algorithm.select_action(scale_last_layer(policy, 0.5), critics, obs, keys, 0, plain)
    np.testing.assert_allclose(scaled, expected, atol=1e-4)
    assert np.abs(scaled - algorithm.select_action(policy, critics, obs, keys, 0, plain)).max() > 0.01


@over([edp_td3bc])
def test_no_initial_noise_makes_acting_deterministic(algorithm):
    """C.4: with init_noise_scale 0 the solver starts from 0, so that observation alone decides."""
    policy, critics, obs, keys, args = acting(algorithm, 6, init_noise_scale=0.0)
    first, second = (algorithm.select_action(policy, critics, obs, keys, step, args) for step in (0, 1))
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(np.asarray(first[0]), axis=0)) == 6
    noisy = dataclasses.replace(args, init_noise_scale=1.0)
    first, second = (algorithm.select_action(policy, critics, obs, keys, step, noisy) for step in (0, 1))
    assert np.abs(first - second).max() > 0.01


@over([edp_td3bc])
def test_acting_compiles_once_for_all_steps_and_updates(algorithm):
    """Keys, step and networks are arguments of one program."""
    policy, critics, obs, keys, args = acting(algorithm, 5)
    compiled = algorithm.select_action._cache_size()
    for step in range(3):
        algorithm.select_action(policy, critics, obs, keys, step, args)
    state, training_keys = start(algorithm, [7])
    state, _ = algorithm.train_chunk(state, 0, training_keys, make_dataset(), make_args(algorithm), 2)
    algorithm.select_action(state.policy, state.critics, obs, keys, 0, args)
    assert algorithm.select_action._cache_size() == compiled + 1


# -------------------------------------------------------------------------------------------------- checkpoints
@over(ALGORITHMS)
def test_a_checkpoint_restores_every_leaf_exactly(algorithm, tmp_path):
    """Networks, targets and optimizers of all seeds, into a state or into its shapes; the header comes along."""
    state, _ = start(algorithm, [0, 1])
    state = jax.tree.map(lambda leaf: leaf + 1, state)  # Adam's zeros too
    save_checkpoint(tmp_path / "checkpoint.eqx", state, {"update": 7, "args": {"eta": 0.5}})
    for like in (start(algorithm, [3, 4])[0], jax.eval_shape(lambda: state)):
        header, loaded = load_checkpoint(tmp_path / "checkpoint.eqx", like)
        assert header["update"] == 7
        assert header["args"] == {"eta": 0.5}
        assert jax.tree.structure(loaded) == jax.tree.structure(state)
        assert_trees_equal(loaded, state)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    """Leaves are stored by position: other sizes or another algorithm would be filled with the wrong numbers."""
    save_checkpoint(tmp_path / "checkpoint.eqx", start(edp_td3bc, [0])[0], {})
    args = make_args(edp_td3bc)
    other_sizes = jax.eval_shape(lambda: edp_td3bc.init_state(jax.random.key(0), OBS_DIM + 1, ACT_DIM, args))
    for like in (other_sizes, start(edp_iql, [0])[0]):
        with pytest.raises(ValueError, match="another kind of state"):
            load_checkpoint(tmp_path / "checkpoint.eqx", like)


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path):
    """A file is replaced only by a complete one."""
    path, state = tmp_path / "checkpoint.eqx", {"weight": jnp.ones(3)}
    save_checkpoint(path, state, {"update": 1})
    with pytest.raises(TypeError):
        save_checkpoint(path, state, {"update": object()})
    assert load_checkpoint(path, state)[0]["update"] == 1
