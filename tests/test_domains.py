"""Each robot of the paper's tasks: a stand-in for its Minari data, and its real environment.

A stand-in has the id, the layout and the environment of Minari's own dataset, and a few short episodes of random steps.
"""

import gymnasium
import numpy as np
import pytest
from helpers import by_hand, record

from common.harness import load_dataset
from common.harness.datasets import resolve_task
from common.harness.environments import make_env, make_gym_env
from common.harness.tasks import TASKS

# The kitchen's own bounds overflow when cast.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")

ENV_IDS = ["halfcheetah-medium", "hopper-medium-expert", "walker2d-medium", "antmaze-umaze", "antmaze-large-diverse"]
ENV_IDS += ["pen-human", "door-cloned", "hammer-expert", "relocate-human", "kitchen-mixed"]
WIDTHS = {"halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6), "antmaze": (31, 8), "kitchen": (59, 9)}
WIDTHS |= {"pen": (45, 24), "door": (39, 28), "hammer": (46, 26), "relocate": (39, 30)}  # observation, action
KEYS = {"antmaze": ("achieved_goal", "observation", "desired_goal"), "kitchen": ("observation",)}


def prepare(env, episode: int) -> None:
    """Something happens in the first episode: a robot falls, an ant starts at its goal, the light is on."""
    if "AntMaze" in env.spec.id and episode == 0:
        env.unwrapped.goal = env.unwrapped.ant_env.data.qpos[:2].copy()
    elif "Kitchen" in env.spec.id:  # every episode begins with an open microwave
        env.unwrapped.data.qpos[22] = -0.75
        if episode == 0:
            env.unwrapped.data.qpos[17:19] = (-0.69, -0.05)
    elif episode == 0 and env.spec.id in ("Hopper-v5", "Walker2d-v5"):
        position = env.unwrapped.data.qpos.copy()
        position[1] -= 0.8
        env.unwrapped.set_state(position, env.unwrapped.data.qvel.copy())


def recorder_of(env_id: str) -> gymnasium.Env:
    """The environment that the data of a task were recorded in, made as Minari's scripts make it."""
    robot, _, name = env_id.partition("-")
    if robot == "antmaze":
        gym_id = "AntMaze_UMaze-v4" if name == "umaze" else "AntMaze_Large_Diverse_GR-v4"
        return make_gym_env(gym_id, continuing_task=True, reset_target=False)
    if robot == "kitchen":
        goals = ["microwave", "kettle", "bottom burner", "light switch"]
        ends = {"remove_task_when_completed": False, "terminate_on_tasks_completed": False}
        return make_gym_env("FrankaKitchen-v1", tasks_to_complete=goals, max_episode_steps=450, **ends)
    if robot in ("pen", "door", "hammer", "relocate"):
        return make_gym_env(f"AdroitHand{robot.capitalize()}-v1", max_episode_steps=200)
    return make_gym_env({"halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d"}[robot] + "-v5")


def record_stand_in(env_id: str) -> dict[str, np.ndarray]:
    """Writes the data of a task, 24 steps in each dataset; returns all of it by Minari's own iteration."""
    robot, _, name = env_id.partition("-")
    if robot in ("halfcheetah", "hopper", "walker2d"):
        ids = [f"mujoco/{robot}/{part}-v0" for part in name.split("-")]
    else:
        ids = [f"D4RL/{robot}/{name}-v2"]
    raws = []
    for seed, dataset_id in enumerate(ids):
        lengths = (1, 8, 15) if robot in ("hopper", "walker2d") else (6, 8, 10)  # who falls at once ends at once
        record(recorder_of(env_id), dataset_id, lengths, seed=10 * seed, prepare=prepare)
        raws.append(by_hand(dataset_id, *KEYS.get(robot, ())))
    return {column: np.concatenate([raw[column] for raw in raws]) for column in raws[0]}


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_a_task_has_the_data_of_its_minari_datasets_and_an_environment_that_fits_them(env_id, datasets):
    raw, robot = record_stand_in(env_id), env_id.partition("-")[0]
    expected = raw | {"action": np.clip(raw["action"], -0.999, 0.999)}
    if robot == "antmaze":  # the first ant stands at its goal: but for the first, its 6 steps are no part of the task
        np.testing.assert_array_equal(raw["reward"] > 0, [True] * 6 + [False] * 18)
        expected["terminal"] = raw["reward"] > 0
        expected = {name: np.delete(array, range(1, 6), axis=0) for name, array in expected.items() if name != "ends"}
    else:
        falls = {"hopper": 2, "walker2d": 1}.get(robot, 0)
        assert raw["terminal"].sum() == falls, "of each dataset the first episode"
    learned, _ = load_dataset(resolve_task(env_id), "none")  # which plays an episode's first steps
    for column, array in learned._asdict().items():
        np.testing.assert_allclose(array, expected[column], rtol=1e-4, atol=1e-5, err_msg=column)
        assert array.dtype == np.float32, column
    assert (learned.obs.shape[1], learned.action.shape[1]) == WIDTHS[robot]


def test_the_kitchen_pays_a_task_once_at_evaluation_and_in_every_step_of_the_data(datasets):
    data_env, env = recorder_of("kitchen-mixed"), make_env(TASKS["kitchen-mixed"].environment)
    for kitchen, rewards in ((data_env, [2, 2, 2]), (env, [2, 0, 0])):
        kitchen.reset(seed=0)
        prepare(kitchen, 0)
        assert [kitchen.step(np.zeros(9))[1] for _ in range(3)] == rewards
    record(data_env, "D4RL/kitchen/mixed-v2", (3,), prepare=prepare)
    _, behaviour = load_dataset(resolve_task("kitchen-mixed"), "normalize")
    assert behaviour.scores == 100 * 2 / 4
