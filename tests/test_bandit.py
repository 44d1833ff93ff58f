"""The toy: its data and its environment by hand, and what a learner makes of it."""

import gymnasium
import numpy as np
import pytest

from algorithms import edp_td3bc
from common.harness import bandit
from common.harness.datasets import load_dataset, resolve_task


def test_the_environment_pays_around_one_mode_and_ends_after_one_step():
    env = gymnasium.make("common.harness.bandit:Bandit-v0")
    # 0.29 and 0.31 from (0.6, 0.6), the other three modes, the mean of all four
    actions = [[0.6, 0.6], [0.89, 0.6], [0.91, 0.6], [-0.6, 0.6], [-0.6, -0.6], [0.6, -0.6], [0, 0]]
    for action, pay in zip(actions, (1, 1, 0, 0, 0, 0, 0)):
        env.reset(seed=0)
        _, reward, terminated, truncated, _ = env.step(np.float32(action))
        assert (reward, terminated, truncated) == (pay, True, False)


def test_the_data_are_four_equal_modes_with_a_quarter_of_the_pay():
    dataset, behaviour = load_dataset(resolve_task("bandit"), "none")
    near = np.argmin(np.linalg.norm(dataset.action[:, None] - bandit.MODES, axis=-1), axis=1)
    assert np.bincount(near) / len(near) == pytest.approx(0.25, abs=0.02)
    assert (dataset.action - bandit.MODES[near]).std(axis=0) == pytest.approx(0.1, rel=0.03)
    # of a mode's actions, exp(-3^2 / 2) are three deviations away or more
    assert behaviour.statistics["behaviour_score"] == pytest.approx(25 * (1 - np.exp(-4.5)), abs=2)
    assert (dataset.terminal == 1).all()


def test_edp_finds_the_mode_that_pays(tmp_path, quick_networks):
    """Shallow networks, small batches and few network calls are enough."""
    few = {"env_id": "bandit", "batch_size": 64, "num_updates": 250, "eval_every": 250}
    edp = edp_td3bc.train(edp_td3bc.Args(**few, num_solver_calls=3, run_dir=str(tmp_path / "edp")))
    assert edp["last"] > 90
