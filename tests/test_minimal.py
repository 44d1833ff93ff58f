"""The one file that people copy: it computes what edp_td3bc.py computes, reads data as the harness does, and learns."""

import itertools
import re
import subprocess
import sys
import types

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCRIPTS, change_metadata, play, write_dataset
from minari.serialization import serialize_space

from algorithms import edp_td3bc
from common.harness import Dataset
from common.harness.datasets import read_minari

FILE = SCRIPTS.parent / "minimal" / "edp.py"
OBS_DIM, ACT_DIM, SIZE = 5, 3, 64
# Both programs do the same operations in float64, in another order.
TOLERANCE = 1e-10


@pytest.fixture
def minimal():
    """The module, read anew: what a test alters or compiles is gone after it."""
    return read(FILE.read_text())


@pytest.fixture
def brief():
    """The module with 2 calls in place of 15, which compiles in a fraction of the time; the second is at k = 499.5."""
    text = FILE.read_text()
    assert text.count("= 1000, 15, 10 ") == 1
    return read(text.replace("= 1000, 15, 10 ", "= 1000, 2, 10 "))


def read(text: str) -> types.ModuleType:
    module = types.ModuleType("minimal_edp")
    exec(compile(text, FILE, "exec"), module.__dict__)
    return module


def test_it_is_short_and_imports_nothing_of_ours():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 200
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, flags=re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"equinox", "gymnasium", "jax", "minari", "numpy", "optax"}


# ----------------------------------------------------------------------------------------- equal to the long file


@pytest.fixture
def args(brief, monkeypatch):
    """Of edp_td3bc, with the settings of the short file, whose target policy moves with every update."""
    monkeypatch.setattr(brief, "BATCH_SIZE", SIZE)
    names = ("learning_rate", "max_grad_norm", "gamma", "tau", "eta", "num_solver_calls")
    settings = {name: getattr(brief, name.upper()) for name in names}
    settings |= {"policy_target_start": 0, "policy_target_every": 1}
    return edp_td3bc.Args(batch_size=SIZE, num_diffusion_steps=brief.K, solver_order=1, **settings)


@pytest.fixture
def state(float64, args, quick_networks):
    """Of edp_td3bc. Weights are twice the initial ones, so that some a-hat^0 are clipped and some are not."""
    twice = lambda module: jax.tree.map(lambda leaf: 2 * jnp.asarray(leaf, jnp.float64), module)
    state, other = (edp_td3bc.init_state(jax.random.key(seed), OBS_DIM, ACT_DIM, args) for seed in (0, 1))
    policy, critics = twice(state.policy), twice(state.critics)
    of_policy, of_critics = edp_td3bc.make_optimizers(args)
    targets = twice(other.critics), twice(other.policy)
    return edp_td3bc.TrainState(policy, of_policy.init(policy), critics, of_critics.init(critics), *targets)


@pytest.fixture
def batch(float64):
    rng = np.random.default_rng(0)
    shapes = (SIZE, OBS_DIM), (SIZE, ACT_DIM), (SIZE,), (SIZE, OBS_DIM), (SIZE,)
    obs, action, reward, next_obs, terminal = map(rng.standard_normal, shapes)
    return Dataset(*map(jnp.asarray, (obs, np.tanh(action), reward, next_obs, np.float64(terminal > 1))))


@pytest.fixture
def draws(float64):
    rng = np.random.default_rng(1)
    draws = {"index": rng.integers(SIZE, size=SIZE), "k": rng.integers(1000, size=SIZE), "i": rng.integers(2)}
    draws |= {name: rng.standard_normal((SIZE, ACT_DIM)) for name in ("noise", "next_noise")}
    return jax.tree.map(jnp.asarray, draws)


@pytest.fixture
def replace_draws(monkeypatch, draws):
    """`replace_draws("next_noise", ...)`: the file draws `draws`; those of a normal distribution in the order named."""

    def replace(*normals):
        order = itertools.cycle(normals)
        of_randint = {((SIZE,), SIZE): "index", ((SIZE,), 1000): "k", ((), 2): "i"}
        monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: draws[of_randint[shape, high]])
        pair = jnp.stack([draws["noise"], draws["next_noise"]])  # which the short file draws at once
        normal = lambda key, shape: pair if len(shape) == 3 else draws[next(order)]
        monkeypatch.setattr(jax.random, "normal", normal)

    return replace


def networks(minimal, module):
    """The short file's network with these weights."""
    widths = lambda mlp: (mlp.layers[0].weight.shape[-1], *(layer.bias.shape[-1] for layer in mlp.layers))
    make = lambda mlp: minimal.MLP(*widths(mlp), key=jax.random.key(0))
    is_policy = isinstance(module, edp_td3bc.NoisePredictor)
    like = minimal.NoisePredictor(make(module.time_mlp), make(module.mlp)) if is_policy else make(module.mlp)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(module))


def assert_close(result, expected):
    """Leaf by leaf, in any two trees of as many leaves."""
    leaves, expected = jax.tree.leaves(result), jax.tree.leaves(expected)
    assert len(leaves) == len(expected)
    for leaf, truth in zip(leaves, expected):
        assert leaf.dtype == truth.dtype
        np.testing.assert_allclose(leaf, truth, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_networks_are_as_large(minimal, monkeypatch, quick_compilation):
    """As `main` makes them."""
    states = []
    monkeypatch.setattr(minimal, "evaluate", lambda state, env: states.append(state) or 0)
    minimal.main("bandit", seed=0, updates=0)
    args = edp_td3bc.Args(learning_rate=1e-3)
    expected = jax.eval_shape(lambda key: edp_td3bc.init_state(key, 1, 2, args), jax.random.key(0))
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]
    for name in expected._fields:
        assert shapes(getattr(states[0], name)) == shapes(getattr(expected, name)), name


def test_losses_and_gradients(brief, state, batch, draws, args, replace_draws):
    """L_diff and a-hat^0 are terms of the policy's loss; the critics' target is in whole updates, below."""
    key, k, noise, i = jax.random.key(0), draws["k"], draws["noise"], draws["i"]
    replace_draws("noise")
    policy, critics = networks(brief, state.policy), networks(brief, state.critics)
    grad = jax.value_and_grad(edp_td3bc.policy_loss, has_aux=True)
    (expected, metrics), expected_gradient = jax.jit(grad)(state.policy, state.critics, batch, key, args)
    result = jax.jit(jax.value_and_grad(brief.policy_loss))(policy, critics, batch, k, noise, i)
    assert_close(result, (expected, expected_gradient))
    other, _ = jax.jit(jax.value_and_grad(brief.policy_loss))(policy, critics, batch, k, noise, 1 - i)
    assert abs(other - expected) > 1e-3, "which critic guides matters"
    assert 0.02 < metrics["clipped"] < 0.98

    inputs = state.critics, batch.reward, batch  # any target
    (expected, _), expected_gradient = jax.value_and_grad(edp_td3bc.critic_loss, has_aux=True)(*inputs)
    assert_close(jax.value_and_grad(brief.critic_loss)(critics, *inputs[1:]), (expected, expected_gradient))


def test_whole_updates(brief, state, batch, args, replace_draws):
    """Two of them: the draw of the batch, the order of the networks, Adam, its clip and the targets."""
    key = jax.random.key(0)
    replace_draws("next_noise", "noise")  # in the order in which edp_td3bc draws them
    modules = {name: networks(brief, getattr(state, name)) for name in state._fields if not name.endswith("_opt")}
    opts = {f"{name}_opt": brief.optimizer.init(modules[name]) for name in ("policy", "critics")}
    short = brief.TrainState(**modules, **opts)
    step = jax.jit(lambda state, update: edp_td3bc.train_step(state, update, key, batch, args)[0])
    for update in (1, 2):
        state, short = step(state, update), brief.train_step(short, batch, key)
    for name in state._fields:
        assert_close(getattr(short, name), getattr(state, name))


def test_an_action_is_drawn_as_by_edp_td3bc(brief, state, args, monkeypatch):
    """Of the same N candidates, by the same probabilities."""
    noise, obs = jnp.asarray(np.random.default_rng(2).standard_normal((10, ACT_DIM))), jnp.ones(OBS_DIM)
    median = lambda key, logits: jnp.searchsorted(jnp.cumsum(jax.nn.softmax(logits)), 0.5)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: noise)
    monkeypatch.setattr(jax.random, "categorical", median)
    key, step = jax.random.key(0), jnp.int32(0)
    expected = jax.jit(lambda state: edp_td3bc.select_action(state, obs, key, step, args))(state)
    unused = dict.fromkeys(brief.TrainState._fields)
    short = {name: networks(brief, getattr(state, name)) for name in ("policy", "critics")}
    assert_close(brief.select_action(brief.TrainState(**unused | short), obs, key), expected)


# ----------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def pendulum(datasets):
    """test/pendulum-v0: actions in [-2, 2]; of three episodes the first ends, two are cut off."""
    env = gymnasium.make("Pendulum-v1", max_episode_steps=7)
    episodes = play(env, [5, 7, 3])
    ended = episodes[0]
    ended[3][-1], ended[4][-1] = True, False
    write_dataset("test/pendulum-v0", env, episodes)
    return episodes


def test_minari_data_are_read_as_by_the_harness(minimal, pendulum):
    dataset, returns, env = minimal.load("test/pendulum-v0")
    expected, ends = read_minari("test/pendulum-v0")
    for name in ("obs", "reward", "next_obs", "terminal"):
        np.testing.assert_allclose(getattr(dataset, name), getattr(expected, name), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(dataset.action, expected.action / 2, rtol=1e-6)
    assert list(np.flatnonzero(dataset.terminal)) == [ends[0] - 1], "a time-out is no end"
    np.testing.assert_allclose(returns, [sum(episode[2]) for episode in pendulum], rtol=1e-6)
    np.testing.assert_allclose(env.action(np.float32([-1])), [-2])
    np.testing.assert_allclose(env.action(np.float32([1])), [2])


def test_a_run_on_minari_data(brief, pendulum, monkeypatch, capsys, quick_compilation):
    """Returns are the environment's own: at most 16.3 is lost in each of 7 steps."""
    monkeypatch.setattr(brief, "WIDTH", 16)
    monkeypatch.setattr(brief, "BATCH_SIZE", 16)
    brief.main("test/pendulum-v0", seed=0, updates=2)
    printed = [float(number) for number in re.findall(r"mean return (\S+)", capsys.readouterr().out)]
    assert len(printed) == 4, "of the data, before training, and after each of two updates"
    assert all(-7 * 16.3 < score < 0 for score in printed)


def test_bad_input_gets_a_sentence(minimal, pendulum, hub, exit_sentence):
    assert "Malformed" in exit_sentence(minimal.load, "?")
    assert "no/such-v0" in exit_sentence(minimal.load, "no/such-v0")
    change_metadata("test/pendulum-v0", action_space=serialize_space(gymnasium.spaces.Discrete(2)))
    assert "Discrete(2) is no flat Box" in exit_sentence(minimal.load, "test/pendulum-v0")
    change_metadata("test/pendulum-v0", env_spec=None)
    assert "nvironment" in exit_sentence(minimal.load, "test/pendulum-v0")


# ------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_the_program_learns_the_bandit(tmp_path):
    """As people run it: from the quarter of the data, or nothing of an untrained policy, to nearly always."""
    process = subprocess.run([sys.executable, FILE], cwd=tmp_path, capture_output=True, text=True, check=True)
    data, before, *_, after = (float(number) for number in re.findall(r"mean return (\S+)", process.stdout))
    assert 0.2 < data < 0.25
    assert before < 0.5
    assert after > 0.85


# -------------------------------------------------------------------------------------------------------- its page
