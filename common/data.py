"""Minari datasets as flat float32 arrays.

MINARI_DATASETS_PATH, ~/.minari/datasets    the datasets, in Minari's own format (HDF5 or Arrow)
$XDG_CACHE_HOME/edp, ~/.cache/edp           the flat arrays made from them, rebuilt when a dataset changes
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gymnasium
import h5py
import jax
import jax.numpy as jnp
import minari
import numpy as np
from jaxtyping import Array, Float
from minari.serialization import deserialize_space
from minari.storage.datasets_root_dir import get_dataset_path

from common import pointmaze
from common.tasks import Environment, RewardRule, Task, find_task, normalized_score, task_of_dataset

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edp"
ACTION_LIMIT = 0.999  # dataset actions are clipped to this, as in the official code
NETWORK_TIMEOUT = 8  # seconds


class Dataset(NamedTuple):
    """Transitions on the device, rewards shaped, actions scaled to [-1, 1]."""

    obs: Float[Array, "size obs_dim"]
    action: Float[Array, "size act_dim"]
    reward: Float[Array, " size"]
    next_obs: Float[Array, "size obs_dim"]
    terminal: Float[Array, " size"]  # 1 where the task truly ended; a time-out is no end


class Transitions(NamedTuple):
    """The same as they were recorded, in host memory, episode after episode."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    terminal: np.ndarray
    episode_end: np.ndarray  # index after each episode's last transition


class DatasetInfo(NamedTuple):
    """What acting and reporting need to know of a dataset."""

    statistics: dict  # for people and args.json
    behaviour_score: float  # of the data itself, under the evaluation protocol
    action_low: np.ndarray
    action_high: np.ndarray
    obs_mean: np.ndarray  # 0 and 1 unless observations are normalised
    obs_std: np.ndarray
    positions: list[np.ndarray]  # (x, y) along some episodes, for the picture of a maze


# ------------------------------------------------------------------------------------------------------- finding


def resolve_task(env_id: str, dataset_id: str | None) -> Task:
    """The task of `--env-id`, or that of the environment in which `--dataset-id` was made.

    Finds, makes (pointmaze) or downloads the data. Exits with a sentence if it cannot.
    """
    if dataset_id is None:
        task = find_task(env_id)
        for part in task.dataset_ids:
            _ensure_local(part)
        return task
    _ensure_local(dataset_id)
    return task_of_dataset(dataset_id, _metadata(dataset_id).get("env_spec"))


def _ensure_local(dataset_id: str) -> None:
    try:
        path = get_dataset_path(dataset_id)
    except OSError as error:
        raise SystemExit(f"Cannot read datasets ({error}); set MINARI_DATASETS_PATH.") from None
    if (path / "data" / "metadata.json").exists():
        return
    if dataset_id in pointmaze.DATASETS:
        print(f"Making the dataset {dataset_id} in {path} (once, under a minute) ...", flush=True)
        with _staged(path) as folder:
            pointmaze.make_dataset(dataset_id)
            _check_complete(dataset_id, folder)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            local = sorted(minari.list_local_datasets()) or ["none"]
        except Exception:
            local = ["none"]
    help_text = (
        f"Download it where there is a network with `minari download {dataset_id}`, or choose a local dataset with "
        f"--dataset-id ({', '.join(local[:8])}{', ...' if len(local) > 8 else ''}), or run --env-id pointmaze-umaze, "
        f"which needs no download. Looked in {get_dataset_path()}; MINARI_DATASETS_PATH changes that."
    )
    if (path / "data").exists():
        raise SystemExit(
            f"Dataset {dataset_id} in {path} is incomplete (no data/metadata.json): remove it. {help_text}"
        )
    if not _hub_answers():
        raise SystemExit(
            f"Dataset {dataset_id} is not on this machine and Minari's remote does not answer. {help_text}"
        )
    try:
        with _staged(path):
            minari.download_dataset(dataset_id)
    except Exception as error:  # the hub client's classes differ from version to version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SystemExit(f"Dataset {dataset_id} could not be downloaded ({reason}). {help_text}") from None


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Minari writes into a temporary folder, moved to `path` when complete: no half-made dataset is ever left."""
    root = get_dataset_path()
    before = os.environ.get("MINARI_DATASETS_PATH")
    try:
        temporary = tempfile.TemporaryDirectory(dir=root, prefix=".making-")
    except OSError as error:
        raise SystemExit(f"Cannot write datasets to {root} ({error.strerror}); set MINARI_DATASETS_PATH.") from None
    with temporary as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        try:
            made = Path(folder) / path.relative_to(root)
            yield made
            for namespace in made.relative_to(folder).parents:
                source = Path(folder) / namespace / "namespace_metadata.json"
                target = root / namespace / source.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.exists() and not target.exists():
                    shutil.copy(source, target)
            with contextlib.suppress(FileExistsError, OSError):  # made by another process in the meantime
                made.rename(path)
        finally:
            os.environ.pop("MINARI_DATASETS_PATH")
            if before is not None:
                os.environ["MINARI_DATASETS_PATH"] = before


def _hub_answers() -> bool:
    """Whether the hub can be reached at all; without this question the client retries for half a minute."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers = []

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=NETWORK_TIMEOUT)
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up has no time limit of its own
    thread.start()
    thread.join(NETWORK_TIMEOUT)
    return bool(answers)


def _metadata(dataset_id: str) -> dict:
    try:
        return json.loads((get_dataset_path(dataset_id) / "data" / "metadata.json").read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(_damaged(dataset_id, error)) from None


def _damaged(dataset_id: str, reason) -> str:
    path = get_dataset_path(dataset_id)
    return f"Dataset {dataset_id} in {path} is damaged ({reason}): remove it and download or make it again."


def _check_complete(dataset_id: str, path: Path) -> None:
    if not (path / "data" / "metadata.json").exists():
        raise SystemExit(_damaged(dataset_id, "it has no metadata"))


# ------------------------------------------------------------------------------------------------------- reading


def read_minari(dataset_id: str, environment: Environment) -> Transitions:
    """All transitions of a local Minari dataset, from the cache if the dataset has not changed since."""
    source = get_dataset_path(dataset_id) / "data"
    files = sorted(path for path in source.rglob("*") if path.is_file())
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    fingerprint = hashlib.sha256(json.dumps([state, environment.obs_keys, 1]).encode()).hexdigest()
    folder = (
        CACHE / "datasets" / f"{dataset_id.replace('/', '-')}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}"
    )
    try:
        if (folder / "fingerprint").read_text() == fingerprint:
            return Transitions(*(np.load(folder / f"{name}.npy") for name in Transitions._fields))
    except (OSError, ValueError, EOFError):
        pass  # no cache yet, or one cut short
    try:
        transitions = _read_files(dataset_id, environment)
    except ImportError as error:
        raise SystemExit(f"Dataset {dataset_id} cannot be read: {error}.") from None
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise SystemExit(_damaged(dataset_id, error)) from None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent))
        for name, array in transitions._asdict().items():
            np.save(new / f"{name}.npy", array)
        (new / "fingerprint").write_text(fingerprint)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    except OSError as error:
        print(f"(The dataset could not be cached in {folder}: {error.strerror}.)")
    return transitions


def _read_files(dataset_id: str, environment: Environment) -> Transitions:
    """Reads HDF5 straight into preallocated arrays; Arrow through Minari."""
    metadata = _metadata(dataset_id)
    size, num_episodes = int(metadata["total_steps"]), int(metadata["total_episodes"])
    hdf5 = metadata.get("data_format", "hdf5") == "hdf5"
    with contextlib.ExitStack() as stack:
        if hdf5:
            file = stack.enter_context(h5py.File(get_dataset_path(dataset_id) / "data" / "main_data.hdf5", "r"))
            # by name: HDF5 lists its groups alphabetically
            episodes = (file[f"episode_{i}"] for i in range(num_episodes))
        else:
            episodes = (vars(episode) for episode in minari.load_dataset(dataset_id).iterate_episodes())
        result, end = None, 0
        ends = []
        for episode in episodes:
            observations = episode["observations"]
            keys = environment.obs_keys or (tuple(observations) if hasattr(observations, "keys") else ())
            parts = [observations[key] for key in keys] if keys else [observations]
            obs = np.concatenate([np.asarray(p, np.float32).reshape(len(p), -1) for p in parts], axis=1)
            action = np.asarray(episode["actions"], np.float32)
            if result is None:
                shapes = {"obs": (size, obs.shape[1]), "action": (size, action.shape[1]), "reward": (size,)}
                shapes |= {"next_obs": shapes["obs"], "terminal": (size,)}
                result = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
            start, end = end, end + len(action)
            result["obs"][start:end] = obs[:-1]
            result["next_obs"][start:end] = obs[1:]  # an episode of L steps has L + 1 observations, the last real
            result["action"][start:end] = action
            result["reward"][start:end] = np.asarray(episode["rewards"])
            result["terminal"][start:end] = np.asarray(episode["terminations"])
            ends.append(end)
    if end != size or not ends:
        raise ValueError(f"it holds {end} of its {size} transitions")
    return Transitions(**result, episode_end=np.array(ends))


def _concatenate(parts: list[Transitions]) -> Transitions:
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0, *(len(part.reward) for part in parts[:-1])])
    ends = np.concatenate([part.episode_end + offset for part, offset in zip(parts, offsets)])
    arrays = (np.concatenate(arrays) for arrays in zip(*(part[:-1] for part in parts)))
    return Transitions(*arrays, episode_end=ends)


# ----------------------------------------------------------------------------------------------- from data to task


def relabel(transitions: Transitions, environment: Environment) -> Transitions:
    """Rewards and terminals as the evaluation task has them."""
    if environment.fixed_goal:
        goal = pointmaze.cell_centre(environment.gym_id, environment.cells[1])
        distance = np.linalg.norm(transitions.next_obs[:, :2] - goal, axis=1)
        transitions = transitions._replace(reward=np.float32(distance <= pointmaze.GOAL_RADIUS))
    if environment.sparse:  # Minari's mazes pay 1 a step at the goal and never terminate
        transitions = transitions._replace(terminal=np.float32(transitions.reward > 0))
    return transitions


def behaviour_returns(transitions: Transitions, environment: Environment) -> np.ndarray:
    """Each episode's return under the evaluation protocol: its horizon, its end by a drop, what it counts."""
    returns = []
    starts = np.append(0, transitions.episode_end[:-1])
    for start, end in zip(starts, transitions.episode_end):
        if environment.max_steps is not None:
            end = min(end, start + environment.max_steps)
        if environment.drop_below is not None:
            coordinate, threshold = environment.drop_below
            dropped = transitions.next_obs[start:end, coordinate] < threshold
            if dropped.any():
                end = start + np.argmax(dropped) + 1
        reward = transitions.reward[start:end]
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


def load_dataset(task: Task, reward_rule: RewardRule, normalize_obs: bool = False) -> tuple[Dataset, DatasetInfo]:
    """The task's data, ready to learn from. Prints its statistics; exits with a sentence if it is damaged."""
    environment = task.environment
    try:
        space = deserialize_space(_metadata(task.dataset_ids[0])["action_space"])
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(_damaged(task.dataset_ids[0], error)) from None
    if not isinstance(space, gymnasium.spaces.Box) or not space.is_bounded():
        raise SystemExit(f"Dataset {task.dataset_ids[0]} has the action space {space}; a bounded Box is needed.")
    transitions = relabel(_concatenate([read_minari(part, environment) for part in task.dataset_ids]), environment)

    returns = behaviour_returns(transitions, environment)
    behaviour_score = float(normalized_score(environment, returns).mean())
    statistics = {
        "dataset": " + ".join(task.dataset_ids),
        "transitions": len(transitions.reward),
        "episodes": len(returns),
        "observation_dim": transitions.obs.shape[1],
        "action_dim": transitions.action.shape[1],
        "return_mean": float(returns.mean()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "behaviour_score": behaviour_score,
        "terminations": int(transitions.terminal.sum()),
        "action_min": float(transitions.action.min()),
        "action_max": float(transitions.action.max()),
        "reward_rule": reward_rule,
    }
    print(
        "Dataset: " + ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in statistics.items())
    )

    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    action = 2 * (transitions.action - low) / (high - low) - 1
    episode_returns = np.add.reduceat(transitions.reward, np.append(0, transitions.episode_end[:-1]), dtype=np.float64)
    obs, next_obs = transitions.obs, transitions.next_obs
    mean, std = np.zeros(obs.shape[1], np.float32), np.ones(obs.shape[1], np.float32)
    if normalize_obs:
        mean, std = obs.mean(0, dtype=np.float64).astype(np.float32), obs.std(0, dtype=np.float64).astype(np.float32)
        std = std + 1e-3  # as TD3+BC; coordinates that never change stay finite
        obs, next_obs = (obs - mean) / std, (next_obs - mean) / std
    positions = []
    if environment.cells is not None:
        ends = transitions.episode_end[:30]
        positions = [transitions.obs[start:end, :2] for start, end in zip([0, *ends], ends)]
    dataset = Dataset(
        obs=obs,
        action=np.clip(action, -ACTION_LIMIT, ACTION_LIMIT),
        reward=shape_reward(transitions.reward, episode_returns, reward_rule),
        next_obs=next_obs,
        terminal=transitions.terminal,
    )
    info = DatasetInfo(statistics, behaviour_score, low, high, mean, std, positions)
    return jax.tree.map(jnp.asarray, dataset), info
