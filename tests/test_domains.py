"""The paper's twenty tasks, each learned from a stand-in for its Minari data and evaluated in its real environment.

A stand-in has the id, the layout and the environment of Minari's own dataset, and a few short episodes of random steps.
"""

import importlib
import json
from collections.abc import Callable
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
from helpers import ALGORITHMS, by_hand, evaluated, goal_here, make_args, record, rows_of

from common.harness import Evaluator, load_dataset
from common.harness.datasets import resolve_task
from common.harness.environments import make_env, make_gym_env
from common.harness.shaping import shape_reward
from common.harness.tasks import TASKS, normalized_score

# The kitchen's own bounds overflow when cast.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")

# medium-replay is D4RL's alone: tests/test_d4rl.py
ENV_IDS = [env_id for env_id, task in TASKS.items() if task.dataset_ids and not env_id.startswith("pointmaze")]


def fall(env, episode: int) -> None:
    """A robot that can fall ends its first episode with its first step."""
    if episode == 0 and env.spec.id != "HalfCheetah-v5":
        position = env.unwrapped.data.qpos.copy()
        position[1] -= 0.8
        env.unwrapped.set_state(position, env.unwrapped.data.qvel.copy())


def drop_pen(env, episode: int) -> None:
    if episode == 0:
        env.unwrapped.data.qpos[-6] += 0.3  # the axis of this joint points down


def complete_tasks(env, episode: int) -> None:
    """Every episode begins with an open microwave, the first with the light on as well."""
    env.unwrapped.data.qpos[22] = -0.75
    if episode == 0:
        env.unwrapped.data.qpos[17:19] = (-0.69, -0.05)


class Kind(NamedTuple):
    """What is known of the tasks of one robot."""

    obs_dim: int
    act_dim: int
    horizon: int
    prepare: Callable  # makes something happen in the first of the recorded episodes
    algorithm: str  # that learns its tasks here
    rules: tuple[str, str]  # of rewards, IQL's second
    obs_keys: tuple[str, ...] = ()


LOCOMOTION, NORMALIZED, MAZE = ("none", "iql_locomotion"), ("normalize", "normalize"), ("cql_antmaze", "iql_antmaze")
KINDS = {
    "halfcheetah": Kind(17, 6, 1000, fall, "iql", LOCOMOTION),
    "hopper": Kind(11, 3, 1000, fall, "td3bc", LOCOMOTION),
    "walker2d": Kind(17, 6, 1000, fall, "iql", LOCOMOTION),
    "antmaze": Kind(31, 8, 1000, goal_here, "edp_td3bc", MAZE, ("achieved_goal", "observation", "desired_goal")),
    "pen": Kind(45, 24, 100, drop_pen, "crr", NORMALIZED),
    "door": Kind(39, 28, 200, lambda *_: None, "crr", NORMALIZED),
    "hammer": Kind(46, 26, 200, lambda *_: None, "crr", NORMALIZED),
    "relocate": Kind(39, 30, 200, lambda *_: None, "crr", NORMALIZED),
    "kitchen": Kind(59, 9, 280, complete_tasks, "td3bc", NORMALIZED, ("observation",)),
}


def recorded_lengths(env_id: str) -> dict[str, tuple[int, ...]]:
    """The lengths of the episodes in each of a task's datasets: 24 steps in all, so that tasks share programs."""
    kind, _, name = env_id.partition("-")
    if kind not in ("halfcheetah", "hopper", "walker2d"):
        return {f"D4RL/{kind}/{name}-v2": (6, 8, 10)}
    first, ids = 5 if kind == "halfcheetah" else 1, f"mujoco/{kind}/{{}}-v0".format
    if name == "medium-expert":
        return {ids("medium"): (first, 9 - first), ids("expert"): (first, 7, 8 - first)}
    return {ids(name): (first, 8, 7, 9 - first)}


def recorder_of(env_id: str) -> gymnasium.Env:
    """The environment that the data of a task were recorded in, made as Minari's scripts make it."""
    kind, _, name = env_id.partition("-")
    if kind == "antmaze":
        size = {"umaze": "UMaze", "medium": "Medium", "large": "Large"}[name.split("-")[0]]
        variant = "_Diverse_GR" if name in ("medium-diverse", "large-diverse") else ""
        return make_gym_env(f"AntMaze_{size}{variant}-v4", continuing_task=True, reset_target=False)
    if kind in ("pen", "door", "hammer", "relocate"):
        return make_gym_env(f"AdroitHand{kind.capitalize()}-v1", max_episode_steps=200)
    if kind == "kitchen":
        goals = ["bottom burner", "light switch"] if name == "mixed" else ["light switch", "slide cabinet"]
        return make_gym_env(
            "FrankaKitchen-v1",
            tasks_to_complete=["microwave", "kettle", *goals],
            remove_task_when_completed=False,
            terminate_on_tasks_completed=False,
            max_episode_steps=280 if name == "complete" else 450,
        )
    return make_gym_env({"halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d"}[kind] + "-v5")


def behaviour_return(kind: str, reward: np.ndarray, next_obs: np.ndarray) -> float:
    """What one recorded episode is worth by D4RL's protocol; none is as long as its horizon."""
    if kind in ("antmaze", "kitchen"):
        return reward.max()
    dropped = np.flatnonzero(next_obs[:, 26] < 0.075) if kind == "pen" else []
    return reward[: dropped[0] + 1].sum() if len(dropped) else reward.sum()


def record_stand_in(env_id: str) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    """Writes the data of a task; returns all of it by Minari's own iteration, and the lengths of the episodes."""
    kind, lengths_of, raws = KINDS[env_id.split("-")[0]], recorded_lengths(env_id), []
    for seed, (dataset_id, lengths) in enumerate(lengths_of.items()):
        env = recorder_of(env_id)
        record(env, dataset_id, lengths, seed=10 * seed, prepare=kind.prepare)
        env.close()
        raws.append(by_hand(dataset_id, *kind.obs_keys))
    return {column: np.concatenate([part[column] for part in raws]) for column in raws[0]}, lengths_of


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_a_task_has_the_data_of_its_minari_datasets_and_d4rls_protocol(env_id, datasets):
    name = env_id.split("-")[0]
    kind = KINDS[name]
    raw, lengths_of = record_stand_in(env_id)
    assert raw["obs"].dtype == np.float64
    if name == "kitchen":
        assert raw["action"].dtype == np.float64
        np.testing.assert_array_equal(raw["reward"], [2] * 6 + [1] * 18, "paid again in every step")
    if name == "pen":
        assert raw["next_obs"][0, 26] < 0.075, "dropped"

    # What is learned from: the recording, its rewards shaped, its terminals the domain's
    task = resolve_task(env_id)
    cuts = np.cumsum([length for lengths in lengths_of.values() for length in lengths])
    if name == "antmaze":  # the first ant stands at its goal: but for the first, its 6 steps are no part of the task
        np.testing.assert_array_equal(raw["reward"] > 0, [True] * 6 + [False] * 18)
        raw, cuts = {k: np.delete(array, range(1, 6), axis=0) for k, array in raw.items() if k != "ends"}, cuts - 5
    episodes = list(zip(np.split(raw["reward"], cuts[:-1]), np.split(raw["next_obs"], cuts[:-1])))
    terminations = {"antmaze": 1, "hopper": len(lengths_of), "walker2d": len(lengths_of)}.get(name, 0)
    for rule in kind.rules:
        learned, behaviour = load_dataset(task, rule)
        expected = raw | {
            "action": np.clip(raw["action"], -0.999, 0.999),
            "reward": shape_reward(raw["reward"], np.array([reward.sum() for reward, _ in episodes]), rule),
            "terminal": raw["reward"] > 0 if name == "antmaze" else raw["terminal"],
        }
        for column, array in learned._asdict().items():
            np.testing.assert_allclose(array, expected[column], rtol=1e-4, atol=1e-5, err_msg=column)
            assert array.dtype == np.float32, column
        returns = np.array([behaviour_return(name, *episode) for episode in episodes])
        np.testing.assert_allclose(behaviour.scores, normalized_score(task.environment, returns), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(behaviour.episode_end, cuts)
        expected = {
            "dataset": " + ".join(lengths_of),
            "transitions": cuts[-1],
            "episodes": len(cuts),
            "reward_rule": rule,
        }
        expected |= {"observation_dim": kind.obs_dim, "action_dim": kind.act_dim, "terminations": terminations}
        assert expected.items() <= behaviour.statistics.items()

    # Where it is evaluated: in episodes as long as D4RL's
    rng, horizon = np.random.default_rng(0), 700 if "umaze" in env_id else kind.horizon
    evaluate = Evaluator(task.environment, [0], 1)
    ((length,),) = evaluated(evaluate, lambda obs, step: rng.uniform(-1, 1, (1, 1, kind.act_dim)), 1).lengths
    assert 0 < length < horizon if name in ("hopper", "walker2d", "pen") else length == horizon


def cases() -> list:
    """A maze and a hand, each with its kind's algorithm; the other tasks, and the other algorithms, take minutes."""
    of_shapes = ("antmaze-umaze", "pen-human", "kitchen-partial", "hopper-medium", "halfcheetah-medium")
    quick = [(env_id, KINDS[env_id.split("-")[0]].algorithm) for env_id in of_shapes[:2]]
    slow = [(env_id, KINDS[env_id.split("-")[0]].algorithm) for env_id in ENV_IDS]
    slow += [(env_id, algorithm) for env_id in of_shapes for algorithm in ALGORITHMS]
    return quick + [pytest.param(*case, marks=pytest.mark.slow) for case in dict.fromkeys(slow) if case not in quick]


@pytest.mark.parametrize(("env_id", "algorithm"), cases())
def test_a_task_is_learned_and_scored(env_id, algorithm, datasets, tmp_path, quick_networks):
    record_stand_in(env_id)
    few = {"num_solver_calls": 1, "solver_order": 1, "num_eval_actions": 1}
    few |= {"num_diffusion_steps": 5, "beta_schedule": "vp"} if algorithm == "dql_baseline" else {}
    module = importlib.import_module(f"algorithms.{algorithm}")
    always = {"num_updates": 4, "eval_episodes": 1, "batch_size": 8}
    results = module.train(make_args(module, few, env_id=env_id, run_dir=str(tmp_path / "run"), **always))
    header = json.loads((tmp_path / "run" / "args.json").read_text())
    rule = "none" if algorithm == "bc" else KINDS[env_id.split("-")[0]].rules[algorithm.endswith("iql")]
    assert header["dataset"]["reward_rule"] == header["args"].get("reward_rule", "none") == rule
    (row,) = rows_of(tmp_path / "run" / "eval.csv")
    score = normalized_score(TASKS[env_id].environment, np.array([float(row["return"])]))
    np.testing.assert_allclose(results["last"], score, rtol=1e-6, atol=1e-9)


def test_the_kitchen_pays_a_task_once_at_evaluation_and_in_every_step_of_the_data(datasets):
    data_env, env = recorder_of("kitchen-partial"), make_env(TASKS["kitchen-partial"].environment)
    for kitchen, rewards in ((data_env, [2, 2, 2]), (env, [2, 0, 0])):
        kitchen.reset(seed=0)
        complete_tasks(kitchen, 0)
        assert [kitchen.step(np.zeros(9))[1] for _ in range(3)] == rewards
    record(data_env, "D4RL/kitchen/partial-v2", (3,), prepare=complete_tasks)
    _, behaviour = load_dataset(resolve_task("kitchen-partial"), "normalize")
    assert behaviour.scores == 100 * 2 / 4
