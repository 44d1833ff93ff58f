"""Updates, optimizers, seeds, acting and checkpoints.

Where algorithm files share their text (tests/test_siblings.py compares it), one of them stands for all.
"""

import dataclasses
from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import make_args as args_of

from algorithms import bc, crr, dql_baseline, edp_crr, edp_iql, edp_td3bc, iql, td3bc
from common import networks
from common.harness import Dataset, load_run
from common.harness.run import save_checkpoint, seed_keys
from common.networks import twin_q

OBS_DIM, ACT_DIM, SIZE, SEEDS = 3, 2, 300, (0, 1, 2)
MAX_GRAD_NORM = 0.01  # every gradient here is larger
SMALL = {
    "batch_size": 32,
    "num_diffusion_steps": 50,
    "num_solver_calls": 3,
    "num_updates": 10,
    "learning_rate": 1e-3,
    "max_grad_norm": MAX_GRAD_NORM,
    "num_eval_actions": 1,
    "init_noise_scale": 0.001,  # of untrained networks: with 1, every action is clipped to a corner
    "eta": 1.0,
    "expectile": 0.7,
    "temperature": 1.0,
}
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", autouse=True)
def shallow_networks():
    """Depth changes no property that is tested here, only the time that every program takes to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "NUM_HIDDEN", 1)
        yield


def over(*modules):
    return pytest.mark.parametrize("algorithm", modules, ids=lambda module: module.__name__.split(".")[-1])


def make_args(algorithm, **changes):
    return args_of(algorithm, SMALL, **changes)


@lru_cache
def make_dataset():
    rng = np.random.default_rng(0)
    arrays = Dataset(
        obs=rng.normal(size=(SIZE, OBS_DIM)),
        action=rng.uniform(-1, 1, (SIZE, ACT_DIM)),
        reward=rng.normal(size=SIZE),
        next_obs=rng.normal(size=(SIZE, OBS_DIM)),
        terminal=rng.integers(0, 2, SIZE).astype(float),
    )
    return jax.tree.map(jnp.float32, arrays)


@lru_cache
def compiled(function):
    """`function`, compiled once for all tests."""
    return jax.jit(function)


@lru_cache
def init_of(algorithm):
    return jax.jit(jax.vmap(lambda key: algorithm.init_state(key, OBS_DIM, ACT_DIM, make_args(algorithm))))


def start(algorithm, seeds=SEEDS):
    """(state, training keys) of some seeds, as the algorithms' `train` makes them."""
    init_keys, train_keys, _ = seed_keys(list(seeds), 3)
    return init_of(algorithm)(init_keys), train_keys


def one(tree, index=0):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def start_one(algorithm):
    """(state, key) of one seed, with targets that differ from their networks, so that it shows what is taken."""
    state, keys = start(algorithm)
    targets = {name: value for name, value in one(state)._asdict().items() if name.startswith("target_")}
    return one(state)._replace(**jax.tree.map(lambda leaf: 1.3 * leaf + 0.01, targets)), keys[0]


def scaled(module, factor):
    """`module` with its output scaled."""
    layer = lambda module: (module.mlp.layers[-1].weight, module.mlp.layers[-1].bias)
    return eqx.tree_at(layer, module, replace_fn=lambda leaf: factor * leaf)


def centred(critics, dataset):
    """`critics` with outputs of mean 0 over the data, so that neither is the smaller one everywhere."""
    mean = twin_q(critics, dataset.obs, dataset.action).mean(axis=1, keepdims=True)
    return eqx.tree_at(lambda critics: critics.mlp.layers[-1].bias, critics, replace_fn=lambda bias: bias - mean)


def norm(tree):
    """The global norm over all leaves."""
    return np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree)))


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --------------------------------------------------------------------------------------------------- one update
@over(edp_td3bc, edp_iql)
def test_targets_move_by_polyak_averaging_of_the_new_weights(algorithm):
    """Critic targets at every update; the policy's at update n if and only if n > 1000 and n % 5 == 0."""
    state, key = start_one(algorithm)
    moved_at = []
    for step in (1, 5, 1000, 1001, 1004, 1005, 1010):
        new, _ = compiled(algorithm.train_step)(state, step, key, make_dataset(), make_args(algorithm))
        average = lambda new, target: 0.005 * np.asarray(new, np.float64) + 0.995 * np.asarray(target, np.float64)
        expected = jax.tree.map(average, new.critics, state.target_critics)
        assert_trees_close(new.target_critics, expected, rtol=1e-6, atol=1e-8)
        if algorithm is edp_td3bc:
            before, after = state.target_policy, new.target_policy
            if np.array_equal(before.mlp.layers[0].weight, after.mlp.layers[0].weight):
                assert_trees_equal(after, before)
            else:
                assert_trees_close(after, jax.tree.map(average, new.policy, before), rtol=1e-6, atol=1e-8)
                moved_at.append(step)
    assert moved_at == ([1005, 1010] if algorithm is edp_td3bc else [])


def test_td3bc_moves_policy_and_targets_at_every_second_update_and_the_critics_at_every_one():
    """n % policy_every == 0; between, the policy's optimizer waits too, and the loss is reported without a step."""
    args, (state, key) = make_args(td3bc), start_one(td3bc)
    average = lambda new, target: 0.005 * np.asarray(new, np.float64) + 0.995 * np.asarray(target, np.float64)
    for step in (1, 2, 3):
        new, metrics = compiled(td3bc.train_step)(state, step, key, make_dataset(), args)
        assert norm(jax.tree.map(jnp.subtract, new.critics, state.critics)) > 0
        batch = batch_of(jax.random.split(jax.random.fold_in(key, step))[0])
        loss, _ = compiled(td3bc.policy_loss)(state.policy, new.critics, batch, args)  # the new critics, as Alg. 1
        np.testing.assert_allclose(metrics["policy_loss"], loss, rtol=1e-4)
        if step == 2:
            assert norm(jax.tree.map(jnp.subtract, new.policy, state.policy)) > 0
            for name in ("critics", "policy"):
                before, after = getattr(state, f"target_{name}"), getattr(new, f"target_{name}")
                expected = jax.tree.map(average, getattr(new, name), before)
                assert_trees_close(after, expected, rtol=1e-6, atol=1e-8)
        else:
            for name in ("policy", "policy_opt", "target_policy", "target_critics"):
                assert_trees_equal(getattr(new, name), getattr(state, name))


def test_td3bc_computes_no_gradient_of_the_policy_where_it_waits():
    """A condition on a seed's own data would become a choice between two results that are both computed."""
    states, keys = start(td3bc)
    step_of_all_seeds = jax.vmap(td3bc.train_step, in_axes=(0, None, 0, None, None))
    jaxpr = jax.make_jaxpr(step_of_all_seeds, static_argnums=4)(states, 1, keys, make_dataset(), make_args(td3bc))
    assert sum(equation.primitive.name == "cond" for equation in jaxpr.eqns) == 1


def batch_of(key, size=32):
    index = jax.random.randint(key, (size,), 0, SIZE)
    return jax.tree.map(lambda array: array[index], make_dataset())


def test_policy_follows_the_critics_from_after_their_update():
    """Alg. 1: the critics go first, to the target networks' targets; the guidance comes from the new critics."""
    args, (state, key) = make_args(edp_td3bc), start_one(edp_td3bc)
    state = state._replace(critics=centred(state.critics, make_dataset()))  # else every guidance is 1 or -1
    new, metrics = compiled(edp_td3bc.train_step)(state, 7, key, make_dataset(), args)
    batch_key, target_key, policy_key = jax.random.split(jax.random.fold_in(key, 7), 3)
    batch = batch_of(batch_key)
    target = jax.jit(edp_td3bc.critic_target)(state.target_critics, state.target_policy, batch, target_key, args)
    loss, _ = jax.jit(edp_td3bc.critic_loss)(state.critics, target, batch)
    np.testing.assert_allclose(metrics["critic_loss"], loss, rtol=1e-4)
    losses = [
        compiled(edp_td3bc.policy_loss)(state.policy, critics, batch, policy_key, args)[1]["guidance_loss"]
        for critics in (new.critics, state.critics)
    ]
    assert abs(losses[0] - losses[1]) > 1e-2
    np.testing.assert_allclose(metrics["guidance_loss"], losses[0], rtol=1e-3)


def test_iql_updates_the_value_first():
    """The weight and the critics' target use the new V; V and the weight use the target critics from before."""
    args, (state, key) = make_args(edp_iql), start_one(edp_iql)
    new, metrics = compiled(edp_iql.train_step)(state, 7, key, make_dataset(), args)
    batch = batch_of(jax.random.split(jax.random.fold_in(key, 7))[0])
    value_loss, _ = jax.jit(edp_iql.value_loss)(state.value, state.target_critics, batch, args)
    np.testing.assert_allclose(metrics["value_loss"], value_loss, rtol=1e-4)
    for value, is_used in ((new.value, True), (state.value, False)):
        weight = jax.jit(edp_iql.advantage_weight)(value, state.target_critics, batch, args).mean()
        assert np.isclose(metrics["weight"], weight, rtol=1e-4) == is_used
        target = jax.jit(edp_iql.critic_target)(value, batch, args)
        loss, _ = jax.jit(edp_iql.critic_loss)(state.critics, target, batch)
        assert np.isclose(metrics["critic_loss"], loss, rtol=1e-4) == is_used


@pytest.mark.parametrize("sampler", ["dpm", "ddpm"])
def test_diffusion_ql_is_edp_without_action_approximation(sampler):
    """One update from the same state, to the last bit; with "dpm", it is Fig. 2's "EDP w/o AP"."""
    (state, key), dataset = start_one(edp_td3bc), make_dataset()
    dql_args = make_args(dql_baseline, sampler=sampler)
    edp_args = edp_td3bc.Args(**dataclasses.asdict(dql_args), action_approx=False)
    dql_state, dql_metrics = compiled(dql_baseline.train_step)(
        dql_baseline.TrainState(*state), 7, key, dataset, dql_args
    )
    edp_state, edp_metrics = compiled(edp_td3bc.train_step)(state, 7, key, dataset, edp_args)
    assert_trees_equal(tuple(dql_state), tuple(edp_state))
    assert_trees_equal(dql_metrics, edp_metrics)


@over(edp_td3bc, edp_iql)
def test_gradients_are_clipped_by_the_global_norm_of_each_network_and_of_both_critics_together(algorithm):
    """After the first update Adam's first moment is a tenth of the clipped gradient, whose norm is the limit."""
    state, key = start_one(algorithm)
    new, _ = compiled(algorithm.train_step)(state, 1, key, make_dataset(), make_args(algorithm))
    moments = {
        name: optax.tree_utils.tree_get(value, "mu") for name, value in new._asdict().items() if name.endswith("_opt")
    }
    assert len(moments) == (3 if algorithm is edp_iql else 2)
    for moment in moments.values():
        np.testing.assert_allclose(norm(moment), 0.1 * MAX_GRAD_NORM, rtol=1e-4)
    shares = [norm(one(moments["critics_opt"], i)) for i in range(2)]
    assert min(shares) > 0
    assert max(shares) < 0.1 * MAX_GRAD_NORM * 0.999


def test_gradients_within_the_limit_are_not_touched_and_larger_ones_keep_their_direction():
    """g min(1, max_grad_norm / |g|) with |g| over all leaves: not leaf by leaf, not element by element."""
    for optimizer in edp_td3bc.make_optimizers(make_args(edp_td3bc, max_grad_norm=5.0)):
        for scale, factor in ((1.0, 1.0), (10.0, 0.5)):
            grads = {"a": scale * jnp.array([0.6, 0.0]), "b": scale * jnp.array([[0.8], [0.0]])}
            _, opt_state = optimizer.update(grads, optimizer.init(grads))
            expected = jax.tree.map(lambda g, factor=factor: 0.1 * factor * g, grads)
            assert_trees_close(optax.tree_utils.tree_get(opt_state, "mu"), expected, rtol=1e-5)


@pytest.mark.parametrize("lr_decay", [False, True])
def test_lr_decay_takes_the_policys_rate_along_a_cosine_to_zero(lr_decay):
    """rate (1 + cos(pi n / N)) / 2 after n of N updates; under a constant gradient Adam's step is the rate."""
    args = make_args(edp_td3bc, lr_decay=lr_decay, num_updates=10, learning_rate=3e-4, max_grad_norm=1e9)
    decayed = 3e-4 * (1 + np.cos(np.pi * np.arange(11) / 10)) / 2
    for optimizer, expected in zip(edp_td3bc.make_optimizers(args), (decayed if lr_decay else 3e-4, 3e-4)):
        gradient = jnp.ones(3)
        opt_state, rates = optimizer.init(gradient), []
        for _ in range(11):
            update, opt_state = optimizer.update(gradient, opt_state)
            rates.append(-float(update[0]))
        np.testing.assert_allclose(rates, np.broadcast_to(expected, 11), rtol=1e-4, atol=1e-10)


def test_lr_decay_of_a_delayed_policy_ends_at_zero_too():
    """TD3+BC's policy makes half of the updates."""
    args = make_args(td3bc, lr_decay=True, num_updates=10, max_grad_norm=1e9)
    optimizer, gradient = td3bc.make_optimizers(args)[0], jnp.ones(3)
    opt_state = optimizer.init(gradient)
    for _ in range(6):
        update, opt_state = optimizer.update(gradient, opt_state)
    np.testing.assert_allclose(update, 0, atol=1e-10)


# -------------------------------------------------------------------------------------------- seeds and chunks
@pytest.mark.parametrize(
    ("algorithm", "flags", "losses"),
    [
        (edp_td3bc, {}, {"critic_loss", "q", "diffusion_loss", "guidance_loss", "clipped"}),
        (edp_crr, {}, {"critic_loss", "q", "diffusion_loss", "guidance_loss", "clipped", "weight"}),
        (edp_iql, {}, {"critic_loss", "q", "diffusion_loss", "guidance_loss", "clipped", "weight", "value_loss", "v"}),
        (dql_baseline, {}, {"critic_loss", "q", "diffusion_loss", "guidance_loss", "clipped"}),
        (td3bc, {}, {"critic_loss", "q", "bc_loss", "guidance_loss"}),
        (crr, {}, {"critic_loss", "q", "log_likelihood", "weight"}),
        (iql, {"critic_layer_norm": True}, {"critic_loss", "q", "log_likelihood", "weight", "value_loss", "v"}),
        (bc, {}, set()),
        (bc, {"policy": "diffusion", "prediction": "action"}, set()),
    ],
    ids=lambda value: value.__name__.split(".")[-1] if hasattr(value, "__name__") else "",
)
def test_an_update_keeps_shapes_and_types_and_reports_scalars(algorithm, flags, losses):
    """Else the second chunk of a run would compile anew: its state comes from an update, not from init_state."""
    args, dataset = make_args(algorithm, **flags), make_dataset()
    state = jax.eval_shape(lambda: algorithm.init_state(jax.random.key(0), OBS_DIM, ACT_DIM, args))
    step = lambda state: algorithm.train_step(state, jnp.int32(1), jax.random.key(0), dataset, args)
    new, metrics = jax.eval_shape(step, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new)):
        assert (before.shape, before.dtype, before.weak_type) == (after.shape, after.dtype, after.weak_type)
    assert metrics.keys() == losses | {"policy_loss"}
    assert all(metric.shape == () for metric in metrics.values())


def train(seeds, chunk):
    """edp_td3bc's (state, metrics) after 10 updates of some seeds in chunks of some length."""
    state, keys = start(edp_td3bc, seeds)
    parts = []
    for last in range(chunk, 11, chunk):
        state, metrics = edp_td3bc.train_chunk(state, last, keys, make_dataset(), make_args(edp_td3bc), chunk)
        parts.append(metrics)
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *parts)


@pytest.fixture(scope="module")
def run():
    """`train` with all seeds and chunks of 5, and how often it compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    before = edp_td3bc.train_chunk._cache_size()
    return *train(SEEDS, 5), edp_td3bc.train_chunk._cache_size() - before


def test_a_run_compiles_its_training_once(run):
    """Every chunk is the same program, and its metrics are (updates, seeds)."""
    _, metrics, compiled = run
    assert compiled == 1
    assert all(value.shape == (10, 3) and np.isfinite(value).all() for value in metrics.values())


def test_chunk_size_does_not_change_the_result(run):
    """Randomness is fold_in(key, update): 2 chunks of 5 updates are exactly 1 of 10."""
    assert_trees_equal(train(SEEDS, 10), run[:2])


def test_a_seed_trained_alone_is_the_seed_trained_with_others(run):
    """Up to float32 rounding: batched matrix products sum in another order, and 10 updates of Adam amplify that."""
    state, metrics, _ = run
    solo, solo_metrics = train([1], 5)
    for name, values in metrics.items():
        np.testing.assert_allclose(solo_metrics[name][:, 0], values[:, 1], rtol=1e-4, atol=1e-5)
    for name in ("policy", "critics", "target_policy", "target_critics"):
        assert_trees_close(one(getattr(solo, name)), one(getattr(state, name), 1), atol=1e-5)


def test_seeds_differ_in_every_initial_weight():
    """Every seed has a key of its own; its targets start as copies."""
    state, _ = start(edp_iql)
    for leaf in jax.tree.leaves((state.policy, state.critics, state.value)):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert not np.any(np.asarray(leaf[i]) == np.asarray(leaf[j]))
    assert_trees_equal(state.target_critics, state.critics)
    state, _ = start(edp_td3bc)
    assert_trees_equal((state.target_policy, state.target_critics), (state.policy, state.critics))


def test_seeds_and_updates_differ_in_their_batches():
    """From equal weights, every seed and every update has another mean Q(s, a) over its batch."""
    state, _ = start_one(edp_td3bc)
    _, keys = start(edp_td3bc)
    step, args = compiled(edp_td3bc.train_step), make_args(edp_td3bc)
    q = [float(step(state, n, key, make_dataset(), args)[1]["q"]) for key in keys for n in (1, 2)]
    assert len(set(q)) == 6
    assert float(step(state, 1, keys[0], make_dataset(), args)[1]["q"]) == q[0]


# ------------------------------------------------------------------------------------------------------- acting
def acting(algorithm=edp_td3bc, num_obs=16):
    """A state of three seeds whose policies act inside (-1, 1) and whose critics are not flat; observations; keys."""
    state, keys = start(algorithm)
    if algorithm is edp_td3bc:
        critics = jax.vmap(centred, (0, None))(scaled(state.critics, 100.0), make_dataset())
        state = state._replace(policy=scaled(state.policy, 0.005), critics=critics)
    obs = np.random.default_rng(0).normal(size=(3, num_obs, OBS_DIM))
    return state, jnp.float32(obs), jax.vmap(lambda key: jax.random.split(key, num_obs))(keys)


def candidates(state, obs, keys, step, args):
    """The actions among which `act` chooses, (seeds, observations, N, act_dim), and each one's (Q_1, Q_2)."""

    def sample(state, obs, key):
        key, _ = jax.random.split(jax.random.fold_in(key, step))
        obs = jnp.repeat(obs[None], args.num_eval_actions, axis=0)
        action = edp_td3bc.sample_action(state.policy, obs, key, args, acting=True)
        return action, twin_q(state.critics, obs, action)

    return jax.jit(jax.vmap(jax.vmap(sample, (None, 0, 0)), (0, 0, 0)))(state, obs, keys)


@over(edp_td3bc, crr)
def test_what_an_observation_is_answered_does_not_depend_on_what_it_is_asked_with(algorithm):
    """`act` is `select_action` of each observation with its own key: alone, in a batch, in another order."""
    (state, obs, keys), args = acting(algorithm), make_args(algorithm, num_eval_actions=3)
    action = algorithm.act(state, obs, keys, 2, args)
    select = jax.jit(algorithm.select_action)
    for i, j in ((0, 0), (1, 5), (2, 15)):
        np.testing.assert_allclose(select(one(state, i), obs[i, j], keys[i, j], 2, args), action[i, j], atol=1e-5)
    others = obs.at[:, 1:].set(-obs[:, 1:])
    np.testing.assert_allclose(algorithm.act(state, others, keys, 2, args)[:, 0], action[:, 0], atol=1e-6)
    mixed = algorithm.act(state, obs[:, ::-1], keys[:, ::-1], 2, args)
    np.testing.assert_allclose(mixed[:, ::-1], action, atol=1e-5)


def test_episodes_steps_and_seeds_act_by_different_draws():
    """From one observation and one policy, every action is another one."""
    (state, obs, keys), args = acting(), make_args(edp_td3bc)
    state, obs = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 3), state), jnp.zeros_like(obs)
    actions = [edp_td3bc.act(state, obs, keys, step, args) for step in (0, 1)]
    assert len(np.unique(np.reshape(actions, (-1, ACT_DIM)), axis=0)) == 2 * 3 * 16
    np.testing.assert_array_equal(edp_td3bc.act(state, obs, keys, 0, args), actions[0])


def test_selection_from_one_action_is_plain_sampling():
    """N = 1: the policy's sample, whatever the critics say."""
    (state, obs, keys), args = acting(), make_args(edp_td3bc)
    action = edp_td3bc.act(state, obs, keys, 3, args)
    np.testing.assert_allclose(action, candidates(state, obs, keys, 3, args)[0][:, :, 0], atol=1e-5)
    upside_down = state._replace(critics=scaled(state.critics, -1))
    np.testing.assert_array_equal(edp_td3bc.act(upside_down, obs, keys, 3, args), action)


def test_an_action_is_selected_with_probability_proportional_to_exp_of_the_smaller_q():
    """Alg. 2 with min(Q_1, Q_2): which rank is chosen how often, and how large a Q, over 3000 choices among 4."""
    (state, obs, keys), args = acting(num_obs=1000), make_args(edp_td3bc, num_eval_actions=4)
    state = state._replace(critics=scaled(state.critics, 5.0))
    action = np.asarray(edp_td3bc.act(state, obs, keys, 0, args)).reshape(3000, 1, ACT_DIM)
    options, q = candidates(state, obs, keys, 0, args)
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
    assert min(max(deviation(other)) for other in others) > 30  # which shows that the bounds are narrow


def test_temperature_and_noise_scale_control_the_sampler_when_acting():
    """C.4: a temperature scales the predicted noise as a network's output layer does; without initial noise the solver
    starts from 0, so that the observation alone decides."""
    (state, obs, keys), args = acting(), make_args(edp_td3bc)
    cold = state._replace(policy=scaled(state.policy, 0.5))
    action = edp_td3bc.act(state, obs, keys, 0, dataclasses.replace(args, policy_temperature=0.5))
    np.testing.assert_allclose(action, edp_td3bc.act(cold, obs, keys, 0, args), atol=1e-4)
    assert np.abs(action - edp_td3bc.act(state, obs, keys, 0, args)).max() > 0.01
    silent = dataclasses.replace(args, init_noise_scale=0.0)
    action = edp_td3bc.act(state, obs, keys, 0, silent)
    np.testing.assert_array_equal(edp_td3bc.act(state, obs, keys[::-1], 1, silent), action)
    assert len(np.unique(np.asarray(action).reshape(-1, ACT_DIM), axis=0)) > 10


@over(td3bc, crr)
def test_a_feed_forward_policy_acts_by_its_mean_or_by_energy_based_selection_around_it(algorithm):
    """N = 1 is the mean, whatever the key; of N samples one is drawn with probability ~ exp(min_i Q_i(s, a))."""
    (state, obs, keys), args, five = acting(algorithm), *(make_args(algorithm, num_eval_actions=n) for n in (1, 5))
    mean = jax.jit(jax.vmap(jax.vmap(lambda policy, obs: policy(obs), (None, 0))))(state.policy, obs)
    np.testing.assert_allclose(algorithm.act(state, obs, keys, 0, args), mean, atol=1e-6)

    def sample(state, obs, key):
        key, _ = jax.random.split(jax.random.fold_in(key, 7))
        obs = jnp.repeat(obs[None], 5, axis=0)
        action = algorithm.sample_action(state.policy, obs, key, *((five.eval_noise,) if algorithm is td3bc else ()))
        return action, twin_q(state.critics, obs, action).min(axis=0)

    options, q = jax.jit(jax.vmap(jax.vmap(sample, (None, 0, 0))))(state, obs, keys)
    steep = state._replace(critics=scaled(state.critics, 1e6))  # so that the largest Q is as good as certain
    action = algorithm.act(steep, obs, keys, 7, five)
    distance = np.abs(options - action[:, :, None]).max(axis=3)
    assert distance.min(axis=2).max() < 1e-5
    chosen_q = np.take_along_axis(q, distance.argmin(axis=2)[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(chosen_q, q.max(axis=2), atol=1e-4)
    assert np.mean(q.max(axis=2) - q.mean(axis=2)) > 1e-3
    assert np.abs(action - mean).max() > 0.1


def test_bc_acts_by_the_mean_of_the_gaussian_or_by_a_plain_sample_of_the_diffusion_policy():
    """Without critics there is nothing to select by."""
    state, obs, keys = acting(bc)
    mean = jax.jit(jax.vmap(jax.vmap(lambda policy, obs: policy(obs), (None, 0))))(state.policy, obs)
    np.testing.assert_allclose(bc.act(state, obs, keys, 0, make_args(bc)), mean, atol=1e-6)
    (state, obs, keys), args = acting(), make_args(bc, policy="diffusion")
    sample = lambda policy, obs, key: bc.sample_action(policy, obs[None], jax.random.fold_in(key, 3), args, True)[0]
    expected = jax.jit(jax.vmap(jax.vmap(sample, (None, 0, 0))))(state.policy, obs, keys)
    state = bc.TrainState(state.policy, ())
    action = bc.act(state, obs, keys, 3, args)
    np.testing.assert_allclose(action, expected, atol=1e-5)
    assert np.abs(bc.act(state, obs, keys, 4, args) - action).max() > 0.01


def test_acting_compiles_once_for_all_steps_and_updates(run):
    """The state, keys and step are arguments of one program."""
    (state, obs, keys), args = acting(num_obs=5), make_args(edp_td3bc)
    before = edp_td3bc.act._cache_size()
    for step in range(3):
        edp_td3bc.act(state, obs, keys, step, args)
    edp_td3bc.act(run[0], obs, keys, 0, args)
    assert edp_td3bc.act._cache_size() == before + 1


# -------------------------------------------------------------------------------------------------- checkpoints
def save(folder, algorithm, obs_dim=OBS_DIM, state=None, **header):
    """A checkpoint as a run of `algorithm` with some seeds writes it."""
    args = dataclasses.asdict(make_args(algorithm, num_seeds=len(SEEDS)))
    header = {"args": args, "dataset": {"observation_dim": obs_dim, "action_dim": ACT_DIM}, **header}
    save_checkpoint(folder / "checkpoint.eqx", start(algorithm)[0] if state is None else state, header)


@over(edp_td3bc, edp_iql)
def test_a_checkpoint_restores_every_leaf_exactly(algorithm, tmp_path):
    """Networks, targets and optimizers of all seeds; the header comes along."""
    state, _ = start(algorithm)
    state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + np.ones((), leaf.dtype)), state)  # no zeros
    save(tmp_path, algorithm, state=state, update=7)
    args, loaded, header = load_run(tmp_path, algorithm)
    assert args == make_args(algorithm, num_seeds=len(SEEDS))
    assert header["update"] == 7
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert_trees_equal(loaded, state)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    """Leaves are stored by position: another algorithm or other sizes would be filled with the wrong numbers."""
    save(tmp_path, edp_td3bc)
    with pytest.raises(TypeError, match="unexpected keyword"):
        load_run(tmp_path, edp_iql)
    save(tmp_path, edp_td3bc, state=start(edp_iql)[0])
    with pytest.raises(ValueError, match="another kind of state"):
        load_run(tmp_path, edp_td3bc)
    save(tmp_path, edp_td3bc, obs_dim=OBS_DIM + 1)
    with pytest.raises(RuntimeError):
        load_run(tmp_path, edp_td3bc)
    with pytest.raises(OSError):
        load_run(tmp_path / "nowhere", edp_td3bc)


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path):
    """A file is replaced only by a complete one."""
    save(tmp_path, edp_iql, update=1)
    with pytest.raises(TypeError):
        save(tmp_path, edp_iql, update=object())
    assert load_run(tmp_path, edp_iql)[2]["update"] == 1
