"""OGBench's single tasks, from a small file of the environment's own steps; needs `pip install ogbench`."""

import gymnasium
import numpy as np
import pytest
from helpers import evaluated

from common.harness import Evaluator, load_dataset
from common.harness.datasets import resolve_task

ogbench = pytest.importorskip("ogbench", reason="OGBench is an optional install")
NAME = "cube-single-play-singletask-v0"
pytestmark = pytest.mark.filterwarnings("ignore")  # its own


@pytest.fixture
def file(tmp_path):
    """Two episodes of five random steps; at the end of the second, the cube lies on its target."""
    env, rng, columns = gymnasium.make("cube-single-singletask-v0"), np.random.default_rng(0), [[] for _ in range(5)]
    for episode in range(2):
        obs, _ = env.reset(seed=episode)
        for step in range(6):
            world = env.unwrapped
            qpos = world._data.qpos.copy()
            if (episode, step) == (1, 3):
                qpos[14:17] = world._data.mocap_pos[0]
            action = rng.uniform(-1, 1, 5).astype(np.float32)
            for column, value in zip(columns, (obs, action, step == 5, qpos, world._data.qvel.copy())):
                column.append(value)
            obs, *_ = env.step(action)
    names = ("observations", "actions", "terminals", "qpos", "qvel")
    arrays = {name: np.array(column, np.float32) for name, column in zip(names, columns)}
    for end in ("", "-val"):
        np.savez(tmp_path / f"cube-single-play-v0{end}.npz", **arrays)
    return tmp_path / "cube-single-play-v0.npz"


def test_data_are_ogbenchs_own_and_end_where_their_mask_is_0(file, datasets):
    task = resolve_task(NAME, None, str(file))
    loaded, behaviour = load_dataset(task, "none")
    _, expected, _ = ogbench.make_env_and_datasets(NAME, dataset_path=str(file))
    names = ("observations", "next_observations", "rewards")
    for array, name in zip((loaded.obs, loaded.next_obs, loaded.reward), names):
        np.testing.assert_array_equal(array, expected[name])
    np.testing.assert_array_equal(loaded.terminal, 1 - expected["masks"])
    np.testing.assert_array_equal(np.flatnonzero(loaded.terminal), [8])
    np.testing.assert_array_equal(behaviour.episode_end, [5, 10])
    np.testing.assert_array_equal(behaviour.scores, [0, 100])


def test_an_episode_lasts_200_steps_and_is_paid_for_success_alone(file):
    task = resolve_task(NAME, None, str(file))
    episodes = evaluated(Evaluator(task.environment, [0], 1), lambda obs, step: np.zeros((1, 1, 5), np.float32), 1)
    assert (episodes.returns.item(), episodes.lengths.item()) == (0, 200)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda arrays: arrays.pop("qpos"), "there is no 'qpos' in it"),
        (lambda arrays: arrays["terminals"].__setitem__(-1, 0), "its last row has to end an episode"),
    ],
)
def test_what_the_file_lacks_is_told(change, named, file, exit_sentence):
    arrays = dict(np.load(file))
    change(arrays)
    np.savez(file, **arrays)
    sentence = exit_sentence(load_dataset, resolve_task(NAME, None, str(file)), "none")
    assert f"{file} cannot be read: {named}" in sentence


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("visual-cube-single-play-singletask-v0", "pictures"),
        ("cube-many-play-singletask-v0", "OGBench has no cube-many"),
    ],
)
def test_pictures_and_unknown_tasks_are_refused(name, named, file, exit_sentence):
    assert named in exit_sentence(resolve_task, name, None, str(file))
