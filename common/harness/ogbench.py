"""OGBench's single tasks (Park et al. 2025), from `pip install ogbench`: their data and their environments.

Rewards are -1 until the goal, or minus the number of things not done; a transition ends its task where `masks` is 0
(`terminals` of its files mark the ends of episodes). The score is the share of episodes that succeed, in percent.
"""

from pathlib import Path

import gymnasium
import numpy as np

from common.harness.environments import make_gym_env
from common.harness.records import Dataset, numbers, reason_of
from common.harness.tasks import OGBENCH, Environment, Task


def knows(env_id: str) -> bool:
    """Whether it is the name of a single task, such as `cube-single-play-singletask-task2-v0`."""
    return "singletask" in env_id.split("-")


def task_of(env_id: str, path: Path | None = None) -> Task:
    """The task with the data of the file at `path`, by default OGBench's own, which are downloaded if not there.

    Exits if there is no such task, or if it is learned from pictures.
    """
    try:
        import ogbench
    except ImportError:
        raise SystemExit(f"{env_id} is OGBench's: `pip install ogbench -r requirements.txt` first.") from None
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # its spaces warn at every reset
    place, _, rest = env_id.partition("-singletask")
    gym_id = f"{place.rpartition('-')[0]}-singletask{rest}"  # without the kind of data
    dataset = f"{place}-{rest.rpartition('-')[2]}"  # without the task
    if "visual" in gym_id or "powderworld" in gym_id:
        raise SystemExit(f"{env_id} is learned from pictures; these algorithms learn from states.")
    try:
        env = make_gym_env(gym_id)
        if path is None:
            path = Path(ogbench.utils.DEFAULT_DATASET_DIR).expanduser() / f"{dataset}.npz"
            ogbench.download_datasets([dataset], path.parent)
    except Exception as error:
        raise SystemExit(f"OGBench has no {env_id}, or no data for it can be had here: {reason_of(error)}.") from None
    env.close()
    environment = Environment(OGBENCH, gym_id, env.spec.max_episode_steps, (0.0, 1.0), success=True)
    return Task(env_id, environment._replace(return_is_max=True), (), path)


def read(path: Path, gym_id: str) -> tuple[Dataset, np.ndarray]:
    """(transitions, index after each episode's last) of a file, paid for the task. Raises KeyError or ValueError."""
    import ogbench
    from ogbench.relabel_utils import relabel_dataset

    data, env = ogbench.load_dataset(path, add_info=True), make_gym_env(gym_id)
    if len(data["observations"]) != len(data["next_observations"]):
        raise ValueError("its last row has to end an episode, but its `terminals` is 0")
    relabel_dataset(gym_id, env, data)
    env.close()
    names = ("observations", "actions", "rewards", "next_observations", "masks")
    obs, action, reward, next_obs, mask = (numbers(data[name], name) for name in names)
    return Dataset(obs, action, reward, next_obs, 1 - mask), np.flatnonzero(data["terminals"]) + 1
