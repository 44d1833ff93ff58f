"""Datasets of Minari, D4RL and OGBench: found, read as flat float32 arrays, and made into what the task asks for."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from unittest.mock import patch

import minari
import numpy as np
from gymnasium.spaces import Box
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage, is_image_space
from minari.storage.datasets_root_dir import get_dataset_path
from minari.storage.remotes import DEFAULT_REMOTE, get_cloud_storage

from common import recipes
from common.harness import bandit, ogbench, tasks
from common.harness.d4rl import d4rl_task, hdf5_arrays, open_hdf5, read_d4rl
from common.harness.devices import set_up_jax
from common.harness.environments import check_camera, check_environment, observation_parts, quietly
from common.harness.flags import check_flags
from common.harness.recorded import check_metadata, check_recorded, task_of_dataset
from common.harness.records import ACTION_LIMIT, Behaviour, Dataset, numbers, printable, reason_of
from common.harness.run import resumed
from common.harness.shaping import behaviour_returns, held_back_episodes, relabel, shape_reward
from common.harness.tasks import RewardRule, Task, find_task, normalized_score

LARGEST = 1e10  # of any number in the data: its square is still far from float32's end
FARTHEST = 10  # times its bounds an action may be; D4RL's own data leave them, but not so far


def setup(args):
    """(args, task): checks the flags, finds the data, fills in the domain's defaults.

    Makes or downloads data that are not there. Exits with one sentence if something is impossible.
    """
    check_flags(args)
    args = resumed(args)
    set_up_jax()
    task = resolve_task(args.env_id, args.dataset_id, args.dataset_path, args.trust)
    args = tasks.with_domain_defaults(args, task.environment.domain)  # before any replace: a copy loses what was typed
    if args.dataset_path is not None:
        args = dataclasses.replace(args, dataset_path=str(Path(args.dataset_path).expanduser().absolute()))
    if not task.is_played and (args.capture_video or args.eval_episodes):
        raise SystemExit(f"Dataset {task.data} names no environment: leave --eval-episodes and --capture-video out.")
    if args.capture_video:
        check_camera(task.environment)
    return args, task._replace(is_played=args.eval_episodes > 0)


# ------------------------------------------------------------------------------------------------------- finding


def resolve_task(env_id: str, dataset_id: str | None = None, dataset_path: str | None = None, trust: str = "") -> Task:
    """The task of `--env-id`, with the data of a file if one is given, or that in which `--dataset-id` was made."""
    if dataset_path is not None:
        if dataset_id is not None:
            raise SystemExit("Give --dataset-id (Minari) or --dataset-path (a file of D4RL or OGBench), not both.")
        path = Path(dataset_path).expanduser()
        if not path.is_file():
            raise SystemExit(f"There is no file {path}; --dataset-path names one of D4RL (HDF5) or OGBench (npz).")
        with _reading(f"The file {path}"):
            return ogbench.task_of(env_id, path) if ogbench.knows(env_id) else d4rl_task(find_task(env_id), path)
    if dataset_id is not None:
        dataset_id = _ensure_local(dataset_id)
        with _reading(_name(dataset_id)):
            recording = _open(dataset_id, trust)
            return task_of_dataset(dataset_id, recording.env_spec, recording._eval_env_spec)
    if ogbench.knows(env_id):
        return ogbench.task_of(env_id)
    task = find_task(env_id)
    if not task.dataset_ids and task.environment.domain != tasks.BANDIT:
        raise SystemExit(f"Minari has no data for {env_id}: give D4RL's own file with --dataset-path.")
    for part in map(_ensure_local, task.dataset_ids):
        check_recorded(_name(part), _open(part, trust).env_spec, task.environment)
    return task


def _ensure_local(dataset_id: str) -> str:
    """The local id of a dataset, which may be given as <remote>/<id>; makes or downloads it if it is not there."""
    scheme, is_full, rest = dataset_id.rpartition("://")
    remote, dataset_id = os.environ.get("MINARI_REMOTE", DEFAULT_REMOTE), rest
    if is_full:
        group, _, dataset_id = rest.partition("/")
        remote = f"{scheme}://{group}"
    try:
        parse_dataset_id(dataset_id)
        path = get_dataset_path(dataset_id)
        if (path / "data" / "metadata.json").exists():
            return dataset_id
    except (ValueError, TypeError):  # which leaves no way out of the folder of datasets
        raise SystemExit(f"{dataset_id!r} is no id of a Minari dataset, such as D4RL/pen/human-v2.") from None
    except OSError as error:
        raise SystemExit(f"Cannot read datasets ({error}); set MINARI_DATASETS_PATH.") from None
    if path.exists():
        cause = "its download was cut off, or it was written by Minari 0.4, whose layout Minari reads no more"
        raise SystemExit(f"{_name(dataset_id)} has no data/metadata.json: {cause}; move it away and start again.")
    if dataset_id in recipes.RECIPES:
        print(f"Making the dataset {dataset_id} in {path} (once, some minutes at most) ...", flush=True)
        with _staged(path, float(recipes.RECIPES[dataset_id].megabytes)):
            recipes.make_dataset(dataset_id)
        return dataset_id
    try:
        size = get_cloud_storage(remote).get_dataset_metadata(dataset_id).get("dataset_size") or 0
        print(f"Downloading {dataset_id} from {remote}, {float(size)} MB, into {path} ...", flush=True)
        of_remote = patch.dict(os.environ, MINARI_REMOTE=remote)  # its namespace, too
        with _staged(path, float(size)), of_remote, contextlib.redirect_stdout(None):
            minari.download_dataset(dataset_id)
    except Exception as error:  # the client's classes differ from version to version
        raise SystemExit(
            f"Dataset {dataset_id} is not in {get_dataset_path()} and could not be downloaded from {remote} "
            f"({reason_of(error)}). Download it where there is a network with `minari download {dataset_id}`, give "
            "D4RL's original file with --dataset-path or a local dataset with --dataset-id (`minari list local` shows "
            "them), or run --env-id pointmaze-umaze, which needs no download."
        ) from None
    return dataset_id


@contextlib.contextmanager
def _staged(path: Path, megabytes: float) -> Iterator[None]:
    """Minari writes into a temporary folder, moved to `path` when complete: no half-made dataset is ever left."""
    root = get_dataset_path()
    if (free := shutil.disk_usage(root).free / 1e6) < (needed := 1.1 * megabytes):  # without it HDF5 would crash
        raise SystemExit(f"{root} has {free:.0f} MB left, and {needed:.0f} are needed; set MINARI_DATASETS_PATH.")
    cannot = f"Cannot write datasets to {root} ({{}}); set MINARI_DATASETS_PATH."
    try:
        temporary = tempfile.TemporaryDirectory(dir=root, prefix=".making-")
    except OSError as error:
        raise SystemExit(cannot.format(error.strerror)) from None
    with temporary as folder:
        with patch.dict(os.environ, MINARI_DATASETS_PATH=folder):
            yield
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path.relative_to(root)).rename(path)
        except OSError as error:
            if not path.exists():  # else another process has made it in the meantime
                raise SystemExit(cannot.format(error.strerror)) from None


# ------------------------------------------------------------------------------------------------------- reading


def _name(dataset_id: str) -> str:
    return f"Dataset {dataset_id} in {get_dataset_path(dataset_id)}"


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Exits with a sentence for whatever Minari, Gymnasium, h5py and pyarrow raise; each has its own classes."""
    try:
        yield
    except Exception as error:
        locked = " Wait, or set HDF5_USE_FILE_LOCKING=FALSE." if isinstance(error, BlockingIOError) else ""
        raise SystemExit(f"{name} cannot be read: {reason_of(error)}.{locked}") from None


def _open(dataset_id: str, trust: str | None = None) -> minari.MinariDataset:
    """With `trust`, its first opening: what it would have Minari, and later us, run is checked before."""
    if trust is not None:
        with _reading(f"The metadata.json (JSON in UTF-8) of dataset {dataset_id} in {get_dataset_path(dataset_id)}"):
            metadata = MinariStorage.read_raw_metadata(get_dataset_path(dataset_id) / "data")
            check_metadata(f"Dataset {dataset_id}", metadata, trust)
    with _reading(_name(dataset_id)), quietly():
        return minari.load_dataset(dataset_id)


def read_transitions(task: Task) -> tuple[Dataset, np.ndarray]:
    """All of the task's recorded transitions, and the index after each episode's last one."""
    if task.environment.domain == tasks.BANDIT:
        return bandit.make_dataset()
    if task.file is not None:
        with _reading(f"The file {task.file}"):
            if ogbench.knows(task.env_id):
                return _checked(*ogbench.read(task.file, task.environment.gym_id))
            return _checked(*read_d4rl(task.file, task.environment.max_steps))
    datasets, ends = zip(*(read_minari(dataset_id, task.environment.obs_keys) for dataset_id in task.dataset_ids))
    lengths = [np.diff(of_part, prepend=0) for of_part in ends]
    return Dataset(*map(np.concatenate, zip(*datasets))), np.cumsum(np.concatenate(lengths))


def read_minari(dataset_id: str, obs_keys: tuple[str, ...] = ()) -> tuple[Dataset, np.ndarray]:
    """The transitions of a local Minari dataset, and the index after each episode's last one.

    Exits with a sentence if it is damaged, or if its spaces are not of a kind that can be learned from.
    """
    with _reading(_name(dataset_id)):
        recording, columns = _open(dataset_id), [[] for _ in Dataset._fields]
        obs_spaces, space = observation_parts(recording.observation_space, obs_keys), recording.action_space
        if not obs_spaces or not all(isinstance(part, Box) and not is_image_space(part) for part in obs_spaces):
            found = printable(recording.observation_space)
            raise ValueError(f"a Box or a Dict of them, without images, is needed, not the observation space {found}")
        is_flat = isinstance(space, Box) and len(space.shape) == 1 and space.dtype.kind == "f"
        low, high = bounds_of(space) if is_flat else (np.zeros(1), np.zeros(1))  # refused below
        if not (np.abs([low, high]).max() < LARGEST and (low < high).all()):
            found = printable(space)
            raise ValueError(f"a bounded Box of floats in one dimension is needed, not the action space {found}")
        for episode in _episodes(recording):
            parts = [numbers(part, "observations") for part in observation_parts(episode["observations"], obs_keys)]
            action, reward, terminal = (numbers(episode[name], name) for name in ("actions", "rewards", "terminations"))
            steps = len(action)
            read = [part.shape for part in parts], action.shape, (reward.size,), (terminal.size,)
            shapes = [(steps + 1, *part.shape) for part in obs_spaces], (steps, *space.shape)
            if read != (*shapes, (steps,), (steps,)):
                raise ValueError(f"an episode's columns have the shapes {read}, not {(*shapes, (steps,), (steps,))}")
            # an episode of L steps has L + 1 observations, the last one real
            obs = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
            for column, array in zip(columns, (obs[:-1], action, reward.ravel(), obs[1:], terminal.ravel())):
                column.append(array)
        lengths = [len(reward) for reward in columns[2]]
        if sum(lengths) != recording.total_steps or not lengths:
            raise ValueError(f"{sum(lengths)} transitions were read, and its metadata promise {recording.total_steps}")
        return _checked(Dataset(*map(np.concatenate, columns)), np.cumsum(lengths))


def bounds_of(space: Box) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) in float32, in which a narrow space can be empty."""
    with np.errstate(over="ignore"):
        return np.float32(space.low), np.float32(space.high)


def _episodes(recording: minari.MinariDataset) -> Iterator[dict]:
    """By column. HDF5 is read here, in two thirds of Minari's time, and only where it does not reach elsewhere."""
    data, episodes = recording.storage.data_path, range(recording.total_episodes)
    if recording.storage.FORMAT == "hdf5":
        with open_hdf5(data / "main_data.hdf5") as file:
            for i in episodes:
                names = ("observations", "actions", "rewards", "terminations")
                yield {name: hdf5_arrays(file[f"episode_{i}/{name}"]) for name in names}
        return
    for i in episodes:  # Minari's reader would count a second file, such as a conflicted copy, as the next episode
        files = sorted(path.name for path in (data / str(i)).iterdir() if path.name[0] not in "_.")
        if len(files) != 1 + ("metadata.json" in files):
            raise ValueError(f"episode {i} has to be in one file, but there are {', '.join(files)}")
    yield from recording.storage.get_episodes(episodes)


def _checked(dataset: Dataset, ends: np.ndarray) -> tuple[Dataset, np.ndarray]:
    """Both as they are. Raises ValueError if they are no episodes that can be learned from."""
    size = len(dataset.reward)
    if not size or ends[-1] != size or (np.diff(ends, prepend=0) <= 0).any():
        raise ValueError(f"its {size} transitions are not in episodes of one or more")
    for name, array in dataset._asdict().items():
        if array.ndim != 1 + (name in ("obs", "action", "next_obs")) or len(array) != size:
            raise ValueError(f"its {name} has the shape {array.shape}, for {size} transitions")
        if not (array.min() >= -LARGEST and array.max() <= LARGEST):  # nor if one is not a number
            raise ValueError(f"its {name} is not a finite number everywhere, or beyond {LARGEST:g}")
    if not np.isin(dataset.terminal, (0, 1)).all():
        raise ValueError("its terminations are neither 0 nor 1")
    return dataset, ends


# ----------------------------------------------------------------------------------------------- from data to task


def load_dataset(task: Task, reward_rule: RewardRule, normalize_obs: bool = False) -> tuple[Dataset, Behaviour]:
    """The task's data, ready to learn from: rewards shaped, actions scaled to [-1, 1]. Prints their statistics.

    With `normalize_obs` observations are standardised, as `Run` will standardise those that the policy acts on.
    Exits with a sentence if they are damaged or do not fit their environment.
    """
    environment = task.environment
    dataset, ends = relabel(*read_transitions(task), environment)
    # a file does not state its bounds: D4RL's and OGBench's are [-1, 1]
    low, high = bounds_of(_open(task.dataset_ids[-1]).action_space if task.dataset_ids else Box(-1, 1, (1,)))
    name = f"Dataset {task.data}" if task.dataset_ids else f"The file {task.file}"
    starts = np.append(0, ends[:-1])
    if task.is_played:
        check_environment(name, environment, dataset.obs[starts], low, high, dataset.action.shape[1:])
    action = 2 * (dataset.action - low) / (high - low) - 1
    if (farthest := np.abs(action).max()) > FARTHEST:
        raise SystemExit(f"{name} has actions up to {farthest:.3g} times as large as its action space allows.")
    if farthest > 1.001:
        share = (np.abs(action) > 1.001).any(axis=1).mean()
        print(f"Note: {share:.1%} of the actions leave their bounds, by up to {farthest:.3g} times, and are clipped.")

    returns = behaviour_returns(dataset, ends, environment)
    scores = normalized_score(environment, returns)
    statistics = {
        "dataset": task.data,
        "transitions": len(dataset.reward),
        "episodes": len(ends),
        "observation_dim": dataset.obs.shape[1],
        "action_dim": dataset.action.shape[1],
        **{f"return_{name}": float(getattr(returns, name)()) for name in ("mean", "min", "max")},
        "behaviour_score": float(scores.mean()),
        "terminations": int(dataset.terminal.sum()),
        "crc32": reduce(lambda crc, array: zlib.crc32(np.ascontiguousarray(array), crc), dataset, 0),
        "reward_rule": reward_rule,
    }
    shown = (f"{k} {v:.4g}" if type(v) is float else f"{k} {v}" for k, v in statistics.items() if k != "crc32")
    print(f"Dataset: {', '.join(shown)}")
    some = np.unique(np.linspace(0, len(ends) - 1, 30).astype(int)) if environment.cells else []
    paths = [(dataset.obs[starts[i] : ends[i], :2], bool(scores[i] > 0)) for i in some]
    recorded_returns = np.add.reduceat(dataset.reward, starts, dtype=np.float64)
    dataset = dataset._replace(
        action=np.clip(action, -ACTION_LIMIT, ACTION_LIMIT),
        reward=shape_reward(dataset.reward, recorded_returns, reward_rule),
    )
    held_back = None
    if not task.is_played:
        held, lengths = held_back_episodes(len(ends)), np.diff(ends, prepend=0)
        (dataset, ends), held_back = (
            (Dataset(*(array[np.repeat(chosen, lengths)] for array in dataset)), np.cumsum(lengths[chosen]))
            for chosen in (~held, held)
        )
        scores = scores[~held]
        print(f"No policy is evaluated: {held.sum()} episodes are held back, on which it is diagnosed.")
    mean, std = np.zeros(dataset.obs.shape[1], np.float32), np.ones(dataset.obs.shape[1], np.float32)
    if normalize_obs:  # 1e-3 as in TD3+BC: coordinates that never change stay finite
        mean, std = (f(dataset.obs, axis=0, dtype=np.float64).astype(np.float32) for f in (np.mean, np.std))
        std += np.float32(1e-3)
        scaled = lambda of: of._replace(obs=(of.obs - mean) / std, next_obs=(of.next_obs - mean) / std)
        dataset, held_back = scaled(dataset), held_back and (scaled(held_back[0]), held_back[1])
    return dataset, Behaviour(statistics, ends, scores, mean, std, paths, held_back)
