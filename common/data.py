"""Datasets, Minari's and D4RL's, as flat float32 arrays.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import jax
import jax.numpy as jnp
import minari
import numpy as np
from gymnasium.spaces import Box
from jaxtyping import Array, Float
from minari.dataset.minari_storage import is_image_space
from minari.serialization import deserialize_space
from minari.storage.datasets_root_dir import get_dataset_path

from common import pointmaze
from common.d4rl import d4rl_task, read_d4rl
from common.devices import replicate
from common.environments import make_env, observation_parts
from common.tasks import Environment, RewardRule, Task, find_task, normalized_score, task_of_dataset
from common.transitions import (
    Transitions,
    behaviour_returns,
    best_episodes,
    concatenate,
    recorded_returns,
    relabel,
    shape_reward,
)

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


class DatasetInfo(NamedTuple):
    """What acting and reporting need to know of a dataset."""

    statistics: dict  # for people and args.json
    behaviour_score: float  # of the data itself, under the evaluation protocol
    obs_mean: np.ndarray  # 0 and 1 unless observations are normalised
    obs_std: np.ndarray
    positions: list[np.ndarray]  # (x, y) along some episodes, for the picture of a maze


# ------------------------------------------------------------------------------------------------------- finding


def resolve_task(env_id: str, dataset_id: str | None = None, dataset_path: str | None = None) -> Task:
    """The task of `--env-id`, with D4RL's own data if a file is given, or that in which `--dataset-id` was made.

    Finds, makes (pointmaze) or downloads the data. Exits with a sentence if it cannot.
    """
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
    env_spec = _metadata(dataset_id).get("env_spec")
    with _refusing_damage(f"Dataset {dataset_id} in {get_dataset_path(dataset_id)}"):
        return task_of_dataset(dataset_id, env_spec)


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
            if not (folder / "data" / "metadata.json").exists():
                raise SystemExit(f"Dataset {dataset_id} could not be made.")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            local = sorted(minari.list_local_datasets()) or ["none"]
        except Exception:
            local = ["none"]
    help_text = (
        f"Download it where there is a network with `minari download {dataset_id}`, or give D4RL's original file with "
        f"--dataset-path{_d4rl_name(dataset_id)}, or choose a local dataset with "
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
        raise SystemExit(f"Dataset {dataset_id} could not be downloaded ({_reason(error)}). {help_text}") from None


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _d4rl_name(dataset_id: str) -> str:
    """For the one kind of data that Minari's remote does not have."""
    namespace, _, name = dataset_id.partition("/")
    if namespace != "mujoco" or "replay" not in name:
        return ""
    return f" ({name.split('/')[0]}_medium_replay-v2.hdf5; Minari's remote may have no medium-replay data)"


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
    path = get_dataset_path(dataset_id)
    with _refusing_damage(f"Dataset {dataset_id} in {path}"):
        return dict(json.loads((path / "data" / "metadata.json").read_text()))


# ------------------------------------------------------------------------------------------------------- reading


def read_transitions(task: Task) -> Transitions:
    """All of the task's recorded transitions, from the cache if their files have not changed since."""
    if task.d4rl_file is not None:
        path = task.d4rl_file.resolve()
        with _refusing_damage(f"The file {path}"):
            max_steps = task.environment.max_steps
            return _cached(path.stem, path, [max_steps], lambda: read_d4rl(path, max_steps))
    return concatenate([read_minari(part, task.environment) for part in task.dataset_ids])


def read_minari(dataset_id: str, environment: Environment) -> Transitions:
    """All transitions of a local Minari dataset, from the cache if the dataset has not changed since."""
    source = get_dataset_path(dataset_id) / "data"
    with _refusing_damage(f"Dataset {dataset_id} in {source.parent}"):
        name, read = dataset_id.replace("/", "-"), lambda: _read_files(dataset_id, environment)
        return _cached(name, source, environment.obs_keys, read)


@contextlib.contextmanager
def _refusing_damage(name: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, MemoryError) as error:
        raise SystemExit(f"{name} cannot be read: {_reason(error)}.") from None
    except (OSError, KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise SystemExit(f"{name} is damaged ({_reason(error)}): remove it and download or make it again.") from None


def _cached(name: str, source: Path, settings, read: Callable[[], Transitions]) -> Transitions:
    """`read()`, or what it returned when the files at `source` and the settings were the same."""
    files = sorted(path for path in [source, *source.rglob("*")] if path.is_file())
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    fingerprint = hashlib.sha256(json.dumps([state, settings, 2]).encode()).hexdigest()
    folder = CACHE / "datasets" / f"{name}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}"
    try:
        if (folder / "fingerprint").read_text() == fingerprint:
            return Transitions(*(np.load(folder / f"{name}.npy") for name in Transitions._fields))
    except (OSError, ValueError, EOFError):
        pass  # no cache yet, or one cut short
    transitions = read()
    for field, array in transitions._asdict().items():
        if not np.isfinite(array).all():
            raise ValueError(f"its {field} is not a finite number everywhere")
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
            parts = observation_parts(episode["observations"], environment.obs_keys)
            obs = np.concatenate([np.asarray(p, np.float32).reshape(len(p), -1) for p in parts], axis=1)
            action = np.asarray(episode["actions"], np.float32)
            if result is None:
                shapes = {"obs": (size, obs.shape[1]), "action": (size, action.shape[1]), "reward": (size,)}
                shapes |= {"next_obs": shapes["obs"], "terminal": (size,)}
                result = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
            start, end = end, end + len(action)
            lengths = {len(obs) - 1, len(action), len(episode["rewards"]), len(episode["terminations"])}
            if len(lengths) > 1 or 0 in lengths:
                raise ValueError("an episode's columns do not fit together")  # NumPy would repeat one of length 1
            result["obs"][start:end] = obs[:-1]
            result["next_obs"][start:end] = obs[1:]  # an episode of L steps has L + 1 observations, the last real
            result["action"][start:end] = action
            result["reward"][start:end] = np.asarray(episode["rewards"])
            result["terminal"][start:end] = np.asarray(episode["terminations"])
            ends.append(end)
    if end != size or not ends:
        raise ValueError(f"it holds {end} of its {size} transitions")
    return Transitions(**result, episode_end=np.array(ends))


# ----------------------------------------------------------------------------------------------- from data to task


def load_dataset(
    task: Task, reward_rule: RewardRule, normalize_obs: bool = False, top_fraction: float = 1.0
) -> tuple[Dataset, DatasetInfo]:
    """The task's data, ready to learn from. Prints its statistics; exits with a sentence if it is damaged.

    `top_fraction` keeps that part of the episodes, those worth most in evaluation; statistics are those of all.
    """
    environment = task.environment
    low, high = _action_limits(task)
    transitions = relabel(read_transitions(task), environment)
    _check_environment(task, transitions, low, high)

    returns = behaviour_returns(transitions, environment)
    behaviour_score = float(normalized_score(environment, returns).mean())
    statistics = {
        "dataset": " + ".join(task.dataset_ids) or task.d4rl_file.name,
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
    if top_fraction < 1:
        transitions = best_episodes(transitions, returns, top_fraction)
        statistics |= {"kept_transitions": len(transitions.reward), "kept_episodes": len(transitions.episode_end)}
    print(
        "Dataset: " + ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in statistics.items())
    )

    action = 2 * (transitions.action - low) / (high - low) - 1
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
        reward=shape_reward(transitions.reward, recorded_returns(transitions), reward_rule),
        next_obs=next_obs,
        terminal=transitions.terminal,
    )
    info = DatasetInfo(statistics, behaviour_score, mean, std, positions)
    return replicate(jax.tree.map(jnp.asarray, dataset)), info


def _action_limits(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of the recorded actions. Exits unless actions and observations are of a kind that can be learned."""
    if task.d4rl_file is not None:
        return np.full(1, -1, np.float32), np.full(1, 1, np.float32)  # all of D4RL's
    keys = task.environment.obs_keys
    for dataset_id in task.dataset_ids:
        with _refusing_damage(f"Dataset {dataset_id} in {get_dataset_path(dataset_id)}"):
            metadata = _metadata(dataset_id)
            space, obs_space = (deserialize_space(metadata[name]) for name in ("action_space", "observation_space"))
        is_box = isinstance(space, Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating)
        if not is_box or not space.is_bounded() or not (space.low < space.high).all():
            raise SystemExit(
                f"Dataset {dataset_id} has the action space {' '.join(str(space).split())}; a bounded Box of floats in "
                "one dimension is needed."
            )
        parts = observation_parts(obs_space, keys) if set(keys) <= set(getattr(obs_space, "keys", tuple)()) else []
        if not parts or any(not isinstance(part, Box) or is_image_space(part) for part in parts):
            needed = f"a Dict with {', '.join(keys)}" if keys else "a Box or a Dict of them, without images,"
            raise SystemExit(
                f"Dataset {dataset_id} has the observation space {' '.join(str(obs_space).split())}; {needed} is "
                "needed."
            )
    return space.low.astype(np.float32), space.high.astype(np.float32)


def _check_environment(task: Task, transitions: Transitions, low: np.ndarray, high: np.ndarray) -> None:
    """Exits unless the evaluation environment can be made on this machine, with the data's observations and actions."""
    name = f"Dataset {' + '.join(task.dataset_ids)}" if task.dataset_ids else f"The file {task.d4rl_file}"
    try:
        env = make_env(task.environment)
    except Exception as error:  # whatever an environment that is not ours raises
        raise SystemExit(f"{name} needs an environment that cannot be made here ({_reason(error)}).") from None
    env.close()
    space = env.env.action_space  # before it was scaled to [-1, 1]
    obs_shape, act_shape = transitions.obs.shape[1:], transitions.action.shape[1:]
    same_shapes = (obs_shape, act_shape) == (env.observation_space.shape, space.shape)
    if not same_shapes or not (np.allclose(space.low, low) and np.allclose(space.high, high)):
        raise SystemExit(
            f"{name} does not fit its environment {env.unwrapped.spec.id}: observations {obs_shape} and "
            f"{env.observation_space.shape}, actions {act_shape} in [{low.min():g}, {high.max():g}] and "
            f"{space.shape} in [{space.low.min():g}, {space.high.max():g}]."
        )
