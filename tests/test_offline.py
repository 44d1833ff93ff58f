"""Logs without an environment: what is held back, what it tells of a policy, and a run."""

import importlib
import json
import re
from typing import NamedTuple

import acting
import equinox as eqx
import gymnasium
import jax
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box
from helpers import TINY, change_metadata, make_args, record_hopper, rows_of, same_run
from minari.data_collector import EpisodeBuffer

from algorithms import bc
from common import networks
from common.harness import Dataset, load_dataset, offline, setup
from common.harness.shaping import held_back_episodes

DATASET_ID, GAMMA = "test/logs/random-v0", 0.9


class State(NamedTuple):
    policy: None
    critics: networks.Critic
    value: networks.Value


def linear(u, w, v) -> State:
    """Of seeds i, Q_j(s, a) is u[i, j].s + w[i, j].a, and V(s) is v[i].s: networks without a hidden layer."""
    key, obs_dim, act_dim = jax.random.key(0), u.shape[-1], w.shape[-1]
    critics, value = networks.init_twin_critics(obs_dim, act_dim, key), networks.Value(obs_dim, key)

    def weigh(network, weight):
        of = lambda network: (network.mlp.layers[-1].weight, network.mlp.layers[-1].bias)
        bias = np.zeros((*weight.shape[:-1], 1), np.float32)
        return eqx.tree_at(of, network, (np.float32(weight)[..., None, :], bias))

    return State(None, weigh(critics, np.concatenate([u, w], axis=-1)), weigh(value, v))


@pytest.fixture
def episodes():
    """Of 5, 1 and 4 steps; the first ends by time."""
    rng, ends = np.random.default_rng(0), np.array([5, 6, 10])
    obs, next_obs = rng.normal(size=(2, 10, 3)).astype(np.float32)
    action, terminal = rng.uniform(-1, 1, (10, 2)).astype(np.float32), np.zeros(10, np.float32)
    terminal[[5, 9]], action[[2, 7], 0] = 1, [0.999, -0.999]
    return Dataset(obs, action, rng.normal(size=10).astype(np.float32), next_obs, terminal), ends


def test_diagnostics_are_those_of_a_numpy_transcription(episodes, monkeypatch):
    monkeypatch.setattr(networks, "NUM_HIDDEN", 0)
    dataset, ends = episodes
    rng, seeds, samples = np.random.default_rng(1), 2, 4
    u, w, of_v = (rng.normal(size=shape).astype(np.float32) for shape in ((seeds, 2, 3), (seeds, 2, 2), (seeds, 3)))
    acted = np.clip(rng.normal(size=(samples, seeds, 10, 2)), -1, 1).astype(np.float32)
    state, each = linear(u, w, of_v), iter(acted)
    keys = jax.random.split(jax.random.key(0), (seeds, samples, 10))  # which the policy here does not need
    held = offline.held_back_states(dataset, ends, GAMMA)
    found = offline.diagnose(state, lambda obs, keys: next(each), held, keys)

    expected = {name: np.zeros(seeds) for name in offline.columns(state)}
    for seed in range(seeds):
        q = lambda s, a, i=seed: min(u[i, j] @ s + w[i, j] @ a for j in (0, 1))
        v = lambda s, i=seed: of_v[i] @ s
        values, returns, distances = [], [], []
        for t, (s, a) in enumerate(zip(dataset.obs, dataset.action)):
            expected["q_data"][seed] += q(s, a) / 10
            expected["q_policy"][seed] += np.mean([q(s, draw) for draw in acted[:, seed, t]]) / 10
            distances.append([np.sqrt(((draw - a) ** 2).sum()) for draw in acted[:, seed, t]])
            last = next(end for end in ends if end > t) - 1
            g = 0 if dataset.terminal[last] else v(dataset.next_obs[last])
            for reward in dataset.reward[t : last + 1][::-1]:  # G_t = r_t + gamma G_(t+1)
                g = reward + GAMMA * g
            values.append(v(s))
            returns.append(g)
        expected["action_distance"][seed] = np.mean(distances)
        expected["nearest_distance"][seed] = np.mean(np.min(distances, axis=1))
        expected["bounds_policy"][seed] = np.mean(np.abs(acted[:, seed]) == 1)
        expected["bounds_data"][seed] = 2 / 20
        expected["value_bias"][seed] = np.mean(np.subtract(values, returns))
        expected["value_correlation"][seed] = np.corrcoef(values, returns)[0, 1]
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # sums of some ten float32 numbers of size 1: 10 x 2^-24
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)
    assert (found["nearest_distance"] < found["action_distance"] - 0.1).all(), "otherwise one may be the other"


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def logs(datasets, tmp_path, monkeypatch):
    """Twenty episodes of arrays, of 6 steps each: the first observation names the episode."""
    monkeypatch.chdir(tmp_path)
    rng, buffers = np.random.default_rng(0), []
    for i in range(20):
        obs, ends = rng.normal(size=(7, 3)), np.arange(6) == 5
        obs[:, 0] = i
        action, reward = rng.uniform(0, 2, (6, 2)).astype(np.float32), rng.normal(size=6)
        both = {"terminations": ends & (i % 2 == 0), "truncations": ends & (i % 2 == 1)}
        buffers.append(EpisodeBuffer(observations=obs, actions=action, rewards=reward, **both))
    spaces = {"observation_space": Box(-np.inf, np.inf, (3,), np.float64), "action_space": Box(0, 2, (2,))}
    return minari.create_dataset_from_buffers(DATASET_ID, buffers, **spaces)


def test_a_tenth_of_the_episodes_is_held_back(logs, exit_sentence):
    args, task = setup(make_args(bc, TINY, dataset_id=DATASET_ID, eval_episodes=None))
    dataset, behaviour = load_dataset(task, "none")
    held, ends = behaviour.held_back
    assert (args.eval_episodes, len(ends), len(held.reward)) == (0, 2, 12)
    assert behaviour.statistics["transitions"] == 120
    np.testing.assert_array_equal(behaviour.episode_end, np.arange(1, 19) * 6)
    assert len(behaviour.scores) == 18
    assert sorted({*dataset.obs[:, 0], *held.obs[:, 0]}) == list(range(20))
    assert not {*dataset.obs[:, 0]} & {*held.obs[:, 0]}
    _, behaviour = load_dataset(task, "none", normalize_obs=True)
    np.testing.assert_allclose(behaviour.obs_mean, dataset.obs.mean(axis=0), rtol=1e-5)
    rescaled = behaviour.held_back[0].obs * behaviour.obs_std + behaviour.obs_mean
    np.testing.assert_allclose(rescaled, held.obs, atol=1e-4)
    assert [held_back_episodes(num).sum() for num in (2, 19, 20, 1000)] == [1, 1, 2, 100]
    assert "these data have no other" in exit_sentence(held_back_episodes, 1)
    for flag in ({"eval_episodes": 3}, {"capture_video": True}):
        assert "names no environment" in exit_sentence(setup, bc.Args(dataset_id=DATASET_ID, num_updates=10, **flag))


def test_an_environment_that_is_not_here_is_no_hindrance_without_evaluation(datasets):
    record_hopper(num_episodes=3)
    spec = json.loads(gymnasium.make("Hopper-v5").spec.to_json()) | {"id": "Gone-v0", "entry_point": "gone:Env"}
    change_metadata("test/hopper/random-v0", env_spec=json.dumps(spec))
    args = bc.Args(dataset_id="test/hopper/random-v0", trust="gone", num_updates=10, eval_episodes=0)
    assert load_dataset(setup(args)[1], "none")[1].held_back is not None


@pytest.mark.parametrize("algorithm", ["bc", pytest.param("edp_iql", marks=pytest.mark.slow)])
def test_a_run_logs_its_diagnostics_and_goes_on_as_if_it_had_not_stopped(
    algorithm, logs, tmp_path, monkeypatch, quick_networks, capsys, exit_sentence
):
    module, folder = importlib.import_module(f"algorithms.{algorithm}"), tmp_path / "run"
    args = make_args(module, TINY | {"normalize_obs": True}, dataset_id=DATASET_ID, eval_episodes=None)
    run = lambda folder, **changes: module.train(make_args(module, vars(args) | {"run_dir": str(folder)} | changes))
    results, printed = run(folder), capsys.readouterr().out
    rows, state = rows_of(folder / "metrics.csv"), acting.open_run(folder).state
    names = offline.columns(state)
    assert list(rows[0])[-len(names) :] == list(results) == names
    assert [int(row["update"]) for row in rows] == [10, 10, 20, 20]
    for name in names:
        assert np.isfinite([float(row[name]) for row in rows]).all()
        np.testing.assert_allclose([float(row[name]) for row in rows[2:]], results[name], rtol=1e-4)
        assert re.search(rf"^  {name} +-?[\d.e-]+ \+- ", printed, re.MULTILINE)
    assert (folder / "learning_curve.png").stat().st_size > 0
    assert len(rows_of(folder / "eval.csv")) == 0

    run(tmp_path / "parts", num_updates=10)
    again = module.train(module.Args(resume=str(tmp_path / "parts"), num_updates=20))
    same_run(folder, tmp_path / "parts")
    for name in names:
        np.testing.assert_array_equal(again[name], results[name])
    assert "names no environment" in exit_sentence(acting.main, acting.Args((folder,), episodes=1))

    table = tmp_path / "parts" / "metrics.csv"
    table.write_text(table.read_text().replace("\n20,", "\n2O,", 1))  # one seed's row after 20 updates is damaged
    again = module.train(module.Args(resume=str(tmp_path / "parts")))
    for name in names:
        np.testing.assert_allclose(again[name], [float(row[name]) for row in rows[:2]], rtol=1e-4)
