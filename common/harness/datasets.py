"""Datasets, Minari's and D4RL's, found, read as flat float32 arrays, and made into what the task asks for.

MINARI_DATASETS_PATH, ~/.minari/datasets    the datasets, in Minari's own format (HDF5 or Arrow)
<cache>/edp/datasets                        the flat arrays made from them, made again when a dataset changes;
                                            <cache> is the user's cache folder, on Linux XDG_CACHE_HOME or ~/.cache
"""

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import minari
import numpy as np
from gymnasium.spaces import Box
from minari.dataset.minari_storage import is_image_space
from minari.storage.datasets_root_dir import get_dataset_path

from common.harness import bandit, pointmaze
from common.harness.d4rl import d4rl_task, read_d4rl
from common.harness.environments import make_env, make_gym_env, observation_parts
from common.harness.flags import check_flags
from common.harness.records import Behaviour, Dataset
from common.harness.run import CACHE, set_up_jax
from common.harness.tasks import (
    GOAL_RADIUS,
    Environment,
    RewardRule,
    Task,
    find_task,
    normalized_score,
    task_of_dataset,
    with_domain_defaults,
)

ACTION_LIMIT = 0.999  # dataset actions are clipped to this, as in the official code


def setup(args, iql: bool = False):
    """(args, task): checks the flags, finds the data, fills in the domain's defaults (`iql`: with IQL's reward rule).

    Makes (pointmaze) or downloads data that are not there. Exits with one sentence if something is impossible.
    """
    check_flags(args)
    set_up_jax()
    task = resolve_task(args.env_id, args.dataset_id, args.dataset_path)
    return with_domain_defaults(args, task.environment.domain, iql), task


# ------------------------------------------------------------------------------------------------------- finding


def resolve_task(env_id: str, dataset_id: str | None = None, dataset_path: str | None = None) -> Task:
    """The task of `--env-id`, with D4RL's own data if a file is given, or that in which `--dataset-id` was made."""
    if dataset_path is not None:
        if dataset_id is not None:
            raise SystemExit("Give --dataset-id (Minari) or --dataset-path (an original D4RL file), not both.")
        task, path = find_task(env_id), Path(dataset_path).expanduser()
        if not path.is_file():
            raise SystemExit(f"There is no file {path}; --dataset-path names an original D4RL file (HDF5).")
        with _refusing_damage(f"The file {path}"):
            return d4rl_task(task, path)
    if dataset_id is None:
        task = find_task(env_id)
        for part in task.dataset_ids:
            _ensure_local(part)
        return task
    _ensure_local(dataset_id)
    return task_of_dataset(dataset_id, _open(dataset_id).env_spec)


def _ensure_local(dataset_id: str) -> None:
    try:
        path = get_dataset_path(dataset_id)
    except OSError as error:
        raise SystemExit(f"Cannot read datasets ({error}); set MINARI_DATASETS_PATH.") from None
    if (path / "data" / "metadata.json").exists():
        return
    if dataset_id in pointmaze.DATASETS:
        print(f"Making the dataset {dataset_id} in {path} (once, under a minute) ...", flush=True)
        with _staged(path):
            pointmaze.make_dataset(dataset_id)
        return
    replay = " (Minari's remote may have no medium-replay data)" if "replay" in dataset_id else ""
    help_text = (
        f"Download it where there is a network with `minari download {dataset_id}`, or give D4RL's original file with "
        f"--dataset-path{replay}, or choose a local dataset with --dataset-id (`minari list local` shows them), or run "
        "--env-id pointmaze-umaze, which needs no download. Looked in "
        f"{get_dataset_path()}; MINARI_DATASETS_PATH changes that."
    )
    if (path / "data").exists():
        raise SystemExit(
            f"Dataset {dataset_id} in {path} is incomplete (no data/metadata.json): remove it. {help_text}"
        )
    try:  # the client alone would retry for half a minute
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=8)
        with _staged(path):
            minari.download_dataset(dataset_id)
    except Exception as error:  # the client's classes differ from version to version
        raise SystemExit(
            f"Dataset {dataset_id} is not on this machine and could not be downloaded ({_reason(error)}). {help_text}"
        ) from None


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[None]:
    """Minari writes into a temporary folder, moved to `path` when complete: no half-made dataset is ever left."""
    root = get_dataset_path()
    try:
        temporary = tempfile.TemporaryDirectory(dir=root, prefix=".making-")
    except OSError as error:
        raise SystemExit(f"Cannot write datasets to {root} ({error.strerror}); set MINARI_DATASETS_PATH.") from None
    with temporary as folder:
        with patch.dict(os.environ, MINARI_DATASETS_PATH=folder):
            yield
        made, namespace = Path(folder) / path.relative_to(root), path.relative_to(root).parent
        with contextlib.suppress(ValueError):  # it exists
            minari.namespace.create_namespace(namespace.as_posix())
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # made by another process in the meantime
            made.rename(path)


def _open(dataset_id: str) -> minari.MinariDataset:
    with _refusing_damage(f"Dataset {dataset_id} in {get_dataset_path(dataset_id)}"):
        return minari.load_dataset(dataset_id)


# ------------------------------------------------------------------------------------------------------- reading


def read_transitions(task: Task) -> tuple[Dataset, np.ndarray]:
    """All of the task's recorded transitions, and the index after each episode's last one."""
    if task.d4rl_file is not None:
        path, max_steps = task.d4rl_file.resolve(), task.environment.max_steps
        with _refusing_damage(f"The file {path}"):
            return _cached(path, [max_steps], lambda: read_d4rl(path, max_steps))
    if not task.dataset_ids:
        return bandit.make_dataset()
    parts = [read_minari(dataset_id, task.environment.obs_keys) for dataset_id in task.dataset_ids]
    if len(parts) == 1:
        return parts[0]
    datasets, ends = zip(*parts)
    offsets = np.cumsum([0, *(end[-1] for end in ends[:-1])])
    return Dataset(*map(np.concatenate, zip(*datasets))), np.concatenate([e + o for e, o in zip(ends, offsets)])


def read_minari(dataset_id: str, obs_keys: tuple[str, ...] = ()) -> tuple[Dataset, np.ndarray]:
    """The transitions of a local Minari dataset, and the index after each episode's last one."""
    recording, path = _open(dataset_id), get_dataset_path(dataset_id)

    def read():
        columns = [[] for _ in Dataset._fields]
        for episode in recording.iterate_episodes():
            parts = observation_parts(episode.observations, obs_keys)
            obs = np.concatenate([np.asarray(part, np.float32).reshape(len(part), -1) for part in parts], axis=1)
            # an episode of L steps has L + 1 observations, the last one real
            arrays = obs[:-1], episode.actions, episode.rewards, obs[1:], episode.terminations
            if len({len(array) for array in arrays}) > 1 or len(obs) < 2:
                raise ValueError("an episode's columns do not fit together")
            for column, array in zip(columns, arrays):
                column.append(np.asarray(array, np.float32))
        ends = np.cumsum([len(reward) for reward in columns[2]])
        if not len(ends) or ends[-1] != recording.total_steps:
            raise ValueError(f"it does not hold its {recording.total_steps} transitions")
        return Dataset(*map(np.concatenate, columns)), ends

    with _refusing_damage(f"Dataset {dataset_id} in {path}"):
        return _cached(path / "data", obs_keys, read)


@contextlib.contextmanager
def _refusing_damage(name: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, MemoryError) as error:
        raise SystemExit(f"{name} cannot be read: {_reason(error)}.") from None
    except Exception as error:  # Minari, Gymnasium, h5py and pyarrow each raise their own
        raise SystemExit(f"{name} is damaged ({_reason(error)}): remove it and download or make it again.") from None


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _cached(source: Path, settings, read: Callable[[], tuple[Dataset, np.ndarray]]) -> tuple[Dataset, np.ndarray]:
    """`read()`, or what it returned when the files at `source` and the settings were the same."""
    files = sorted(path for path in [source, *source.rglob("*")] if path.is_file())
    state = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    file = CACHE / "datasets" / f"{hashlib.sha256(json.dumps([state, settings, 3]).encode()).hexdigest()}.npz"
    try:
        with file.open("rb") as stream, np.load(stream) as arrays:  # of a name alone, NumPy forgets to close
            return Dataset(*(arrays[name] for name in Dataset._fields)), arrays["ends"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        pass  # no cache yet, or a damaged one
    dataset, ends = read()
    for name, array in dataset._asdict().items():
        if not np.isfinite(array).all():
            raise ValueError(f"its {name} is not a finite number everywhere")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            new = Path(folder) / file.name
            np.savez(new, **dataset._asdict(), ends=ends)
            new.replace(file)
    except OSError as error:
        print(f"(The dataset could not be cached in {file.parent}: {error.strerror}.)")
    return dataset, ends


# ----------------------------------------------------------------------------------------------- from data to task


def load_dataset(task: Task, reward_rule: RewardRule) -> tuple[Dataset, Behaviour]:
    """The task's data, ready to learn from: rewards shaped, actions scaled to [-1, 1]. Prints their statistics.

    Exits with a sentence if they are damaged or do not fit their environment.
    """
    environment = task.environment
    low, high = _action_bounds(task)
    dataset, ends = read_transitions(task)
    dataset = relabel(dataset, environment)
    _check_environment(task, dataset, low, high)

    returns = behaviour_returns(dataset, ends, environment)
    scores = normalized_score(environment, returns)
    mean, std = (f(dataset.obs, axis=0, dtype=np.float64).astype(np.float32) for f in (np.mean, np.std))
    statistics = {
        "dataset": " + ".join(task.dataset_ids) or getattr(task.d4rl_file, "name", "drawn in memory"),
        "transitions": len(dataset.reward),
        "episodes": len(ends),
        "observation_dim": dataset.obs.shape[1],
        "action_dim": dataset.action.shape[1],
        **{f"return_{name}": float(getattr(returns, name)()) for name in ("mean", "min", "max")},
        "behaviour_score": float(scores.mean()),
        "terminations": int(dataset.terminal.sum()),
        "reward_rule": reward_rule,
    }
    print("Dataset: " + ", ".join(f"{k} {v:.6g}" if type(v) is float else f"{k} {v}" for k, v in statistics.items()))
    is_maze, starts = environment.cells is not None, np.append(0, ends[:-1])
    paths = [dataset.obs[start:end, :2] for start, end in zip(starts[:30], ends)] if is_maze else []
    recorded_returns = np.add.reduceat(dataset.reward, starts, dtype=np.float64)
    dataset = dataset._replace(
        action=np.clip(2 * (dataset.action - low) / (high - low) - 1, -ACTION_LIMIT, ACTION_LIMIT),
        reward=shape_reward(dataset.reward, recorded_returns, reward_rule),
    )
    return dataset, Behaviour(statistics, ends, scores, mean, std + np.float32(1e-3), paths)


@cache
def cell_centre(gym_id: str, cell: tuple[int, int]) -> np.ndarray:
    """(x, y) of the centre of a maze's cell (row, column)."""
    env = make_gym_env(gym_id)
    env.close()
    return env.unwrapped.maze.cell_rowcol_to_xy(np.array(cell))


def relabel(dataset: Dataset, environment: Environment) -> Dataset:
    """Rewards and terminals as the evaluation task has them."""
    if environment.fixed_goal:
        goal = cell_centre(environment.gym_id, environment.cells[1])
        distance = np.linalg.norm(dataset.next_obs[:, :2] - goal, axis=1)
        dataset = dataset._replace(reward=np.float32(distance <= GOAL_RADIUS))
    if environment.sparse:  # Minari's mazes pay 1 a step at the goal and never terminate
        dataset = dataset._replace(terminal=np.float32(dataset.reward > 0))
    return dataset


def behaviour_returns(dataset: Dataset, ends: np.ndarray, environment: Environment) -> np.ndarray:
    """Each episode's return under the evaluation protocol: its horizon, its end by a drop, what it counts."""
    returns = []
    for start, end in zip([0, *ends[:-1]], ends):
        end = min(end, start + (environment.max_steps or end))
        if environment.drop_below is not None:
            coordinate, threshold = environment.drop_below
            dropped = dataset.next_obs[start:end, coordinate] < threshold
            end = start + np.argmax(dropped) + 1 if dropped.any() else end
        reward = dataset.reward[start:end]
        returns.append(reward.max() if environment.return_is_max else reward.sum(dtype=np.float64))
    return np.array(returns)


def shape_reward(reward: np.ndarray, returns: np.ndarray, rule: RewardRule) -> np.ndarray:
    """The reward that is learned from; `returns` are those of the episodes.

    "none": r. "normalize": to [-1, 1] by its minimum and maximum. "cql_antmaze": 4 (r - 0.5). "iql_antmaze": r - 1.
    "iql_locomotion": 1000 r / (max return - min return).
    """
    low, high = reward.min(), reward.max()
    if low == high:
        print(f"Warning: every reward of this dataset is {low:g}; there is nothing to tell good actions from bad.")
    if rule == "normalize":
        return 2 * (reward - low) / (high - low) - 1 if high > low else np.zeros_like(reward)
    if rule == "cql_antmaze":
        return 4 * (reward - 0.5)
    if rule == "iql_antmaze":
        return reward - 1
    if rule == "iql_locomotion" and returns.max() > returns.min():
        return reward * np.float32(1000 / (returns.max() - returns.min()))
    return reward


def _action_bounds(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Of the recorded actions. Exits unless actions and observations are of a kind that can be learned from."""
    low, high = np.full(1, -1, np.float32), np.full(1, 1, np.float32)  # of all D4RL files
    for dataset_id in task.dataset_ids:
        recording, keys = _open(dataset_id), task.environment.obs_keys
        space, obs_space = recording.action_space, recording.observation_space
        is_box = isinstance(space, Box) and len(space.shape) == 1 and space.dtype.kind == "f" and space.is_bounded()
        parts = observation_parts(obs_space, keys) if set(keys) <= set(getattr(obs_space, "keys", tuple)()) else []
        are_boxes = parts and all(isinstance(part, Box) and not is_image_space(part) for part in parts)
        part = f"a Dict with {', '.join(keys)}" if keys else "a Box or a Dict of them, without images,"
        for name, value, fits, needed in (
            ("action", space, is_box and (space.low < space.high).all(), "a bounded Box of floats in one dimension"),
            ("observation", obs_space, are_boxes, part),
        ):
            if not fits:
                described = " ".join(str(value).split())
                raise SystemExit(f"Dataset {dataset_id} has the {name} space {described}; {needed} is needed.")
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    return low, high


def _check_environment(task: Task, dataset: Dataset, low: np.ndarray, high: np.ndarray) -> None:
    """Exits unless the evaluation environment can be made on this machine, with the data's observations and actions."""
    name = f"Dataset {' + '.join(task.dataset_ids)}" if task.dataset_ids else f"The file {task.d4rl_file}"
    try:
        env = make_env(task.environment)
    except Exception as error:  # whatever an environment that is not ours raises
        raise SystemExit(f"{name} needs an environment that cannot be made here ({_reason(error)}).") from None
    env.close()
    space = env.env.action_space  # before it was scaled to [-1, 1]
    obs_shape, act_shape = dataset.obs.shape[1:], dataset.action.shape[1:]
    same_shapes = (obs_shape, act_shape) == (env.observation_space.shape, space.shape)
    if not same_shapes or not (np.allclose(space.low, low) and np.allclose(space.high, high)):
        raise SystemExit(
            f"{name} does not fit its environment {env.unwrapped.spec.id}: observations {obs_shape} and "
            f"{env.observation_space.shape}, actions {act_shape} in [{low.min():g}, {high.max():g}] and "
            f"{space.shape} in [{space.low.min():g}, {space.high.max():g}]."
        )
