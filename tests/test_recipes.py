"""Datasets that are made: what they hold, that they depend on their seed alone, and that a fresh clone can use them."""

import make_data
import minari
import mujoco
import numpy as np
import pytest

from algorithms import bc
from common import recipes
from common.harness import setup
from common.harness.datasets import load_dataset, resolve_task
from common.harness.tasks import find_task
from common.recipes import recording

SMALL = {  # how many steps here, and a task of the same protocol
    "edp/hopper/medium-v1": (300, "hopper-medium"),
    "edp/hopper/medium-replay-v1": (600, "hopper-medium-replay"),
    "edp/halfcheetah/medium-v1": (100, "halfcheetah-medium"),
    "edp/halfcheetah/medium-replay-v1": (100, "halfcheetah-medium-replay"),
    "edp/pen/mixed-v1": (300, "pen-cloned"),
    "edp/pen/expert-v1": (100, "pen-expert"),
    "edp/antmaze/umaze-play-v1": (300, "antmaze-umaze"),
    "edp/antmaze/medium-play-v1": (300, "antmaze-medium-play"),
    "edp/pointmaze/umaze-v0": (600, "pointmaze-umaze"),
    "edp/pointmaze/medium-v0": (100, "pointmaze-medium"),
    "edp/pointmaze/large-v0": (100, "pointmaze-large"),
}
ROBOTS = [dataset_id for dataset_id in SMALL if "pointmaze" not in dataset_id]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small dataset of each recipe."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        for dataset_id, (num_steps, _) in SMALL.items():
            recipes.make_dataset(dataset_id, num_steps)
    return root


@pytest.fixture
def small(made, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made))


def test_every_recipe_is_tried_here():
    assert set(SMALL) == set(recipes.RECIPES)


@pytest.mark.parametrize("dataset_id", SMALL)
def test_the_protocol_and_the_settings_of_the_task_apply(small, dataset_id, capsys):
    task, known = resolve_task("", dataset_id), find_task(SMALL[dataset_id][1])
    assert task.environment == known.environment
    assert capsys.readouterr().out == "", "no note that it is evaluated otherwise"
    dataset = minari.load_dataset(dataset_id)
    metadata = dataset.storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == known.environment.reference
    assert dataset.env_spec.id == dataset._eval_env_spec.id == known.environment.gym_id
    load_dataset(task, "none")  # which compares it with its environment


@pytest.mark.parametrize("dataset_id", ROBOTS)
def test_actions_are_on_the_grid_and_episodes_end_where_they_should(small, dataset_id):
    dataset = minari.load_dataset(dataset_id)
    episodes, horizon = list(dataset.iterate_episodes()), dataset.env_spec.max_episode_steps
    assert sum(map(len, episodes[:-1])) < SMALL[dataset_id][0] <= sum(map(len, episodes)), "whole episodes"
    for episode in episodes:
        assert np.abs(episode.actions).max() <= 1
        np.testing.assert_array_equal(episode.actions * recording.GRID % 1, 0)
        is_last = np.arange(len(episode)) == len(episode) - 1
        np.testing.assert_array_equal(episode.terminations | episode.truncations, is_last)
        fell = "hopper" in dataset_id and len(episode) < horizon
        assert episode.terminations[-1] == fell
        assert fell or len(episode) == horizon or ("antmaze" in dataset_id and episode.rewards[-1] == 1)


def test_the_noise_of_the_pen_is_scaled_by_episode(small):
    """Actions of noise 16 are at their bounds half of the time, those of the expert one time in ten."""
    (expert,) = minari.load_dataset("edp/pen/expert-v1").iterate_episodes()
    at_bounds = [(np.abs(episode.actions) == 1).mean() for episode in minari.load_dataset("edp/pen/mixed-v1")]
    assert max(at_bounds) > (np.abs(expert.actions) == 1).mean()


@pytest.mark.parametrize(
    "dataset_id",
    ["edp/hopper/medium-replay-v1", "edp/pen/expert-v1", "edp/antmaze/umaze-play-v1", "edp/pointmaze/umaze-v0"],
)
def test_a_dataset_is_a_function_of_its_seed_alone(made, tmp_path, monkeypatch, dataset_id):
    for name, seed in (("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / name))
        recipes.make_dataset(dataset_id, SMALL[dataset_id][0], seed)
    crcs = []
    for root in (made, tmp_path / "again", tmp_path / "other"):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
        crcs.append(load_dataset(resolve_task("", dataset_id), "none")[1].statistics["crc32"])
    assert crcs[0] == crcs[1] != crcs[2]


def test_medium_replay_goes_from_the_first_snapshot_to_that_of_medium():
    """Its last third falls later than its first: one step in 30 of the first snapshot's, one in 500 of the last's."""
    _, replay = recipes.RECIPES["edp/hopper/medium-replay-v1"].record(3_000, 0)
    lengths = np.array([len(episode.rewards) for episode in replay])
    starts = np.cumsum(lengths) - lengths
    assert lengths[starts >= 2_000].mean() > 2 * lengths[starts < 1_000].mean()


def test_a_fresh_clone_makes_what_it_is_asked_for(datasets, monkeypatch, capsys):
    making = recipes.make_dataset
    monkeypatch.setattr(recipes, "make_dataset", lambda dataset_id: making(dataset_id, 300))
    make_data.main(make_data.Args())
    assert "hopper-medium " in capsys.readouterr().out
    assert not list(datasets.iterdir()), "a list makes nothing"
    make_data.main(make_data.Args(("pen-expert",)))
    assert "edp/pen/expert-v1" in (printed := capsys.readouterr().out)
    assert f"not {recipes.RECIPES['edp/pen/expert-v1'].crc32}" in printed, "a small one is not the full one"
    args, task = setup(bc.Args(dataset_id="edp/hopper/medium-v1", num_updates=1))
    assert (args.learning_rate, task.environment.domain.name) == (3e-4, "locomotion")
    assert len(list(minari.list_local_datasets())) == 2


@pytest.mark.slow
def test_hopper_medium_is_that_of_the_table(datasets, capsys):
    """The CRC holds on the versions in constraints.txt, its score on all."""
    make_data.main(make_data.Args(("hopper-medium",)))
    assert "as it should be" in capsys.readouterr().out or mujoco.__version__ != "3.3.7"
    _, behaviour = load_dataset(resolve_task("", "edp/hopper/medium-v1"), "none")
    assert behaviour.statistics["behaviour_score"] == pytest.approx(48.0, abs=3)  # 4 times 14.6 / sqrt(429 episodes)
