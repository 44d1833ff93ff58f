"""Datasets, Minari's, D4RL's and OGBench's, found, read as flat float32 arrays, and made into what the task asks for.

MINARI_DATASETS_PATH, ~/.minari/datasets    the datasets, in Minari's own format (HDF5 or Arrow)
<cache>/edp/datasets                        the flat arrays made from them, made again when a dataset changes;
                                            <cache> is the user's cache folder, on Linux XDG_CACHE_HOME or ~/.cache
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache, reduce
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import minari
import numpy as np
from gymnasium.spaces import Box
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage, is_image_space
from minari.storage.datasets_root_dir import get_dataset_path
from minari.storage.remotes import DEFAULT_REMOTE, get_cloud_storage

from common.harness import bandit, ogbench, pointmaze
from common.harness.checkpoint import write_atomically
from common.harness.d4rl import d4rl_task, read_d4rl
from common.harness.environments import (
    check_camera,
    make_env,
    make_gym_env,
    observation_parts,
    reason_of,
    refuse_untrusted,
    task_of_dataset,
)
from common.harness.flags import check_flags
from common.harness.records import Behaviour, Dataset, numbers
from common.harness.run import CACHE, resumed, set_up_jax
from common.harness.tasks import (
    BANDIT,
    GOAL_RADIUS,
    Environment,
    RewardRule,
    Task,
    find_task,
    normalized_score,
    with_domain_defaults,
)

ACTION_LIMIT = 0.999  # dataset actions are clipped to this, as in the official code
LARGEST = 1e10  # of any number in the data: its square is still far from float32's end
FARTHEST = 10  # times its bounds an action may be; D4RL's own data leave them, but not so far
OLD = 24 * 3600  # seconds after which what a killed run left is removed


def setup(args, iql: bool = False):
    """(args, task): checks the flags, finds the data, fills in the domain's defaults (`iql`: with IQL's reward rule).

    Makes (pointmaze) or downloads data that are not there. Exits with one sentence if something is impossible.
    """
    check_flags(args)
    args = resumed(args)
    set_up_jax()
    if args.dataset_path is not None:
        args = dataclasses.replace(args, dataset_path=str(Path(args.dataset_path).expanduser().absolute()))
    task = resolve_task(args.env_id, args.dataset_id, args.dataset_path, args.trust)
    if args.capture_video:
        check_camera(task.environment)
    return with_domain_defaults(args, task.environment.domain, iql), task


# ------------------------------------------------------------------------------------------------------- finding


def resolve_task(env_id: str, dataset_id: str | None = None, dataset_path: str | None = None, trust: str = "") -> Task:
    """The task of `--env-id`, with the data of a file if one is given, or that in which `--dataset-id` was made."""
    if dataset_path is not None:
        if dataset_id is not None:
            raise SystemExit("Give --dataset-id (Minari) or --dataset-path (a file of D4RL or OGBench), not both.")
        path = Path(dataset_path).expanduser()
        if not path.is_file():
            raise SystemExit(f"There is no file {path}; --dataset-path names one of D4RL (HDF5) or OGBench (npz).")
        with _refusing_damage(f"The file {path}", "download it again"):
            return ogbench.task_of(env_id, path) if ogbench.knows(env_id) else d4rl_task(find_task(env_id), path)
    if dataset_id is not None:
        dataset_id = _ensure_local(dataset_id)
        recording = _open(dataset_id, trust)
        return task_of_dataset(dataset_id, recording.env_spec, recording._eval_env_spec)
    if ogbench.knows(env_id):
        return ogbench.task_of(env_id)
    task = find_task(env_id)
    if not task.dataset_ids and task.environment.domain != BANDIT:
        raise SystemExit(f"Minari has no data for {env_id}: give D4RL's own file with --dataset-path.")
    task = task._replace(dataset_ids=tuple(map(_ensure_local_or_older, task.dataset_ids)))
    for part in task.dataset_ids:
        _open(part, trust)
    return task


def _ensure_local_or_older(dataset_id: str) -> str:
    older = dataset_id.replace("-v2", "-v1")
    try:
        return _ensure_local(dataset_id)
    except SystemExit as error:
        reason = str(error.code).partition(". ")[0]
        if not ("antmaze" in dataset_id and (get_dataset_path(older) / "data" / "metadata.json").exists()):
            raise
    print(f"{reason}. Note: {older}, which it supersedes, is used.")
    return older


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
    if dataset_id in pointmaze.DATASETS:
        print(f"Making the dataset {dataset_id} in {path} (once, under a minute) ...", flush=True)
        with _staged(path, pointmaze.MEGABYTES):
            pointmaze.make_dataset(dataset_id)
        return dataset_id
    help_text = (
        f"Download it where there is a network with `minari download {dataset_id}`, or give D4RL's original file with "
        "--dataset-path, or choose a local dataset with --dataset-id (`minari list local` shows them), or run "
        "--env-id pointmaze-umaze, which needs no download. Looked in "
        f"{get_dataset_path()}; MINARI_DATASETS_PATH changes that."
    )
    if (path / "data").exists():
        raise SystemExit(
            f"Dataset {dataset_id} in {path} has no data/metadata.json: its download was cut off, or it was written by "
            f"Minari 0.4, whose layout Minari reads no more; move it away and download it again. {help_text}"
        )
    try:
        storage = get_cloud_storage(remote)
        _ask(remote)
        size = storage.get_dataset_metadata(dataset_id).get("dataset_size")
        print(f"Downloading {dataset_id} from {remote}, {size or '?'} MB, into {path} ...", flush=True)
        with _staged(path, float(size or 0)), patch.dict(os.environ, MINARI_REMOTE=remote):  # also of its namespace
            minari.download_dataset(dataset_id)
    except ImportError:  # of Google's client
        raise SystemExit(f"{remote} needs a package: `pip install google-cloud-storage` first.") from None
    except Exception as error:  # the client's classes differ from version to version
        raise SystemExit(
            f"Dataset {dataset_id} is not on this machine and could not be downloaded from {remote} "
            f"({reason_of(error)}). {help_text}"
        ) from None
    return dataset_id


def _ask(remote: str) -> None:
    """Whether the remote answers, at once: its client alone would retry for half a minute."""
    google = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
    try:
        url = google if remote.startswith("gcp://") else huggingface_hub.constants.ENDPOINT
        huggingface_hub.get_session().head(url, timeout=8)
    except Exception as error:
        if "CERTIFICATE" not in str(error):  # of somebody who answered
            raise


@contextlib.contextmanager
def _staged(path: Path, megabytes: float) -> Iterator[None]:
    """Minari writes into a temporary folder, moved to `path` when complete: no half-made dataset is ever left."""
    root = get_dataset_path()
    for folder in root.glob(".making-*"):  # of a run that was killed
        if time.time() - folder.stat().st_mtime > OLD:
            shutil.rmtree(folder, ignore_errors=True)
    free, needed = shutil.disk_usage(root).free / 1e6, 1.1 * megabytes  # without it HDF5 would crash
    if free < needed:
        raise SystemExit(f"{root} has {free:.0f} MB left, and {needed:.0f} are needed; set MINARI_DATASETS_PATH.")
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


def _open(dataset_id: str, trust: str | None = None) -> minari.MinariDataset:
    """With `trust`, its first opening: what it would have Minari, and later us, run is checked before."""
    path = get_dataset_path(dataset_id)
    with _refusing_damage(name := f"Dataset {dataset_id} in {path}"):
        metadata = MinariStorage.read_raw_metadata(path / "data") if trust is not None else {}
        for spec in filter(None, (metadata.get("env_spec"), metadata.get("eval_env_spec"))):
            refuse_untrusted(name, json.loads(spec), trust)
        return minari.load_dataset(dataset_id)


# ------------------------------------------------------------------------------------------------------- reading


def read_transitions(task: Task) -> tuple[Dataset, np.ndarray]:
    """All of the task's recorded transitions, and the index after each episode's last one."""
    if task.file is not None:
        path, is_ogbench = task.file.resolve(), ogbench.knows(task.env_id)
        read, setting = (ogbench.read, task.env_id) if is_ogbench else (read_d4rl, task.environment.max_steps)
        with _refusing_damage(f"The file {path}", "download it again"):
            return _cached(path, [setting], lambda: read(path, setting))
    if task.environment.domain == BANDIT:
        return bandit.make_dataset()
    parts = [read_minari(dataset_id, task.environment.obs_keys) for dataset_id in task.dataset_ids]
    if len(parts) == 1:
        return parts[0]
    datasets, ends = zip(*parts)
    offsets = np.cumsum([0, *(end[-1] for end in ends[:-1])])
    return Dataset(*map(np.concatenate, zip(*datasets))), np.concatenate([e + o for e, o in zip(ends, offsets)])


def read_minari(dataset_id: str, obs_keys: tuple[str, ...] = ()) -> tuple[Dataset, np.ndarray]:
    """The transitions of a local Minari dataset, and the index after each episode's last one."""
    path = get_dataset_path(dataset_id)

    def read():
        recording, columns = minari.load_dataset(dataset_id), [[] for _ in Dataset._fields]
        spaces = observation_parts(recording.observation_space, obs_keys)
        for episode in recording.iterate_episodes():
            parts = [numbers(part, "observations") for part in observation_parts(episode.observations, obs_keys)]
            action, steps = numbers(episode.actions, "actions"), len(episode.actions)
            recorded = [part.shape for part in parts], action.shape
            if recorded != ([(steps + 1, *space.shape) for space in spaces], (steps, *recording.action_space.shape)):
                raise ValueError(f"an episode's observations and actions have the shapes {recorded}")
            # an episode of L steps has L + 1 observations, the last one real
            obs = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
            reward, terminal = (np.ravel(column) for column in (episode.rewards, episode.terminations))
            if {len(reward), len(terminal)} != {steps}:
                raise ValueError("an episode's columns do not fit together")
            arrays = obs[:-1], action, numbers(reward, "rewards"), obs[1:], numbers(terminal, "terminations")
            for column, array in zip(columns, arrays):
                column.append(array)
        ends = np.cumsum([len(reward) for reward in columns[2]])
        if not len(ends) or ends[-1] != recording.total_steps:
            raise ValueError(f"it does not hold its {recording.total_steps} transitions")
        return Dataset(*map(np.concatenate, columns)), ends

    with _refusing_damage(f"Dataset {dataset_id} in {path}"):
        return _cached(path / "data", obs_keys, read)


@contextlib.contextmanager
def _refusing_damage(name: str, remedy: str = "remove it and download or make it again") -> Iterator[None]:
    """Exits with a sentence for whatever Minari, Gymnasium, h5py and pyarrow raise; each has its own classes."""
    try:
        yield
    except Exception as error:
        reason = reason_of(error)
        if isinstance(error, BlockingIOError):
            advice = f"is open elsewhere ({reason}): wait, or set HDF5_USE_FILE_LOCKING=FALSE"
        elif "does not support" in reason:  # of a later Minari
            advice = f"cannot be read: {reason}"
        elif isinstance(error, ValueError | EOFError | OSError) and not getattr(error, "errno", None):
            advice = f"is damaged ({reason}): {remedy}"
        else:
            advice = f"cannot be read: {reason}"
        raise SystemExit(f"{name} {advice}.") from None


def _cached(source: Path, settings, read: Callable[[], tuple[Dataset, np.ndarray]]) -> tuple[Dataset, np.ndarray]:
    """`read()`, or what it returned when the files at `source` and the settings were the same."""
    files = sorted(path for path in [source, *source.rglob("*")] if path.is_file())
    state = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    file = CACHE / "datasets" / f"{hashlib.sha256(json.dumps([state, settings, 4]).encode()).hexdigest()}.npz"
    # No cache yet, or a damaged one, is made anew. Of a name alone, NumPy forgets to close.
    with contextlib.suppress(Exception), file.open("rb") as stream, np.load(stream) as arrays:
        return _checked(Dataset(*(arrays[name] for name in Dataset._fields)), arrays["ends"])
    dataset, ends = _checked(*read())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob("*.tmp"):  # by a run that was killed
            if time.time() - left.stat().st_mtime > OLD:
                left.unlink(missing_ok=True)
        write_atomically(file, lambda stream: np.savez(stream, **dataset._asdict(), ends=ends))
    except OSError as error:
        print(f"(The dataset could not be cached in {file.parent}: {error.strerror}.)")
    return dataset, ends


def _checked(dataset: Dataset, ends: np.ndarray) -> tuple[Dataset, np.ndarray]:
    """Both as they are. Raises ValueError if they are no episodes that can be learned from."""
    size = len(dataset.reward)
    if not size or not len(ends) or ends[-1] != size or (np.diff(ends, prepend=0) <= 0).any():
        raise ValueError("it has no transitions, or its episodes do not end where they should")
    for name, array in dataset._asdict().items():
        if array.dtype != np.float32 or array.ndim != 1 + (name in ("obs", "action", "next_obs")) or len(array) != size:
            raise ValueError(f"its {name} has the shape {array.shape} and the type {array.dtype}")
        if not (array.min() >= -LARGEST and array.max() <= LARGEST):  # nor if one is not a number
            raise ValueError(f"its {name} is not a finite number everywhere, or beyond {LARGEST:g}")
    if dataset.obs.shape != dataset.next_obs.shape or not ((dataset.terminal == 0) | (dataset.terminal == 1)).all():
        raise ValueError("its terminations are neither 0 nor 1")
    return dataset, ends


# ----------------------------------------------------------------------------------------------- from data to task


def load_dataset(task: Task, reward_rule: RewardRule) -> tuple[Dataset, Behaviour]:
    """The task's data, ready to learn from: rewards shaped, actions scaled to [-1, 1]. Prints their statistics.

    Exits with a sentence if they are damaged or do not fit their environment.
    """
    environment = task.environment
    low, high = _action_bounds(task)
    dataset, ends = relabel(*read_transitions(task), environment)
    _check_environment(task, dataset, low, high)
    action = 2 * (dataset.action - low) / (high - low) - 1
    if (farthest := np.abs(action).max()) > FARTHEST:
        raise SystemExit(f"{_name(task)} has actions up to {farthest:.3g} times as large as its action space allows.")
    if farthest > 1.001:
        share = (np.abs(action) > 1.001).any(axis=1).mean()
        print(f"Note: {share:.1%} of the actions leave their bounds, by up to {farthest:.3g} times, and are clipped.")

    returns = behaviour_returns(dataset, ends, environment)
    scores = normalized_score(environment, returns)
    mean, std = (f(dataset.obs, axis=0, dtype=np.float64).astype(np.float32) for f in (np.mean, np.std))
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
    print("Dataset: " + ", ".join(f"{k} {v:.6g}" if type(v) is float else f"{k} {v}" for k, v in statistics.items()))
    is_maze, starts = environment.cells is not None, np.append(0, ends[:-1])
    paths = [dataset.obs[start:end, :2] for start, end in zip(starts[:30], ends)] if is_maze else []
    recorded_returns = np.add.reduceat(dataset.reward, starts, dtype=np.float64)
    dataset = dataset._replace(
        action=np.clip(action, -ACTION_LIMIT, ACTION_LIMIT),
        reward=shape_reward(dataset.reward, recorded_returns, reward_rule),
    )
    return dataset, Behaviour(statistics, ends, scores, mean, std + np.float32(1e-3), paths)


@cache
def cell_centre(gym_id: str, cell: tuple[int, int]) -> np.ndarray:
    """(x, y) of the centre of a maze's cell (row, column)."""
    env = make_gym_env(gym_id)
    env.close()
    return env.unwrapped.maze.cell_rowcol_to_xy(np.array(cell))


def relabel(dataset: Dataset, ends: np.ndarray, environment: Environment) -> tuple[Dataset, np.ndarray]:
    """Rewards, terminals and ends as the evaluation task has them."""
    if environment.fixed_goal:
        goal = cell_centre(environment.gym_id, environment.cells[1])
        distance = np.linalg.norm(dataset.next_obs[:, :2] - goal, axis=1)
        dataset = dataset._replace(reward=np.float32(distance <= GOAL_RADIUS))
    if environment.sparse:  # Minari's mazes pay 1 a step at the goal and never terminate
        dataset = dataset._replace(terminal=np.float32(dataset.reward > 0))
    if environment.sparse and not environment.fixed_goal:  # an episode is over at its goal; D4RL's data end there
        starts, paid = np.append(0, ends[:-1]), dataset.reward > 0
        paid_before = np.cumsum(paid) - paid
        kept = paid_before == np.repeat(paid_before[starts], np.diff(ends, prepend=0))
        if not kept.all():
            print(f"Note: {1 - kept.mean():.1%} of the transitions follow an episode's first reward and are left out.")
        dataset, ends = Dataset(*(array[kept] for array in dataset)), np.cumsum(np.add.reduceat(kept, starts))
    return dataset, ends


def behaviour_returns(dataset: Dataset, ends: np.ndarray, environment: Environment) -> np.ndarray:
    """Each episode's return under the evaluation protocol: its horizon, its end by a drop, what it counts."""
    returns = []
    for start, end in zip([0, *ends[:-1]], ends):
        end = min(end, start + environment.max_steps)
        if environment.drop_below is not None:
            coordinate, threshold = environment.drop_below
            dropped = dataset.next_obs[start:end, coordinate] < threshold
            end = start + np.argmax(dropped) + 1 if dropped.any() else end
        reward = (dataset.terminal if environment.success else dataset.reward)[start:end]
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
    low, high = np.full(1, -1, np.float32), np.full(1, 1, np.float32)  # of all files
    for dataset_id in task.dataset_ids:
        recording, keys = _open(dataset_id), task.environment.obs_keys
        space, obs_space = recording.action_space, recording.observation_space
        is_box = isinstance(space, Box) and len(space.shape) == 1 and space.dtype.kind == "f"
        with np.errstate(over="ignore"):
            width = np.float32(space.high) - np.float32(space.low) if is_box else np.zeros(1)
        parts = observation_parts(obs_space, keys) if set(keys) <= set(getattr(obs_space, "keys", tuple)()) else []
        are_boxes = parts and all(isinstance(part, Box) and not is_image_space(part) for part in parts)
        part = f"a Dict with {', '.join(keys)}" if keys else "a Box or a Dict of them, without images,"
        for name, value, fits, needed in (
            ("action", space, ((width > 0) & np.isfinite(width)).all(), "a bounded Box of floats in one dimension"),
            ("observation", obs_space, are_boxes, part),
        ):
            if not fits:
                described = " ".join(str(value).split())
                raise SystemExit(f"Dataset {dataset_id} has the {name} space {described}; {needed} is needed.")
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    return low, high


def _name(task: Task) -> str:
    return f"Dataset {task.data}" if task.dataset_ids else f"The file {task.file}"


def _check_environment(task: Task, dataset: Dataset, low: np.ndarray, high: np.ndarray) -> None:
    """Exits unless the evaluation environment can be played here, with the data's observations and actions."""
    name, env = _name(task), None
    try:
        env = make_env(task.environment)
        obs, _ = env.reset(seed=0)
        next_obs, reward, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
    except Exception as error:  # whatever an environment that is not ours raises
        hint = (
            "; MUJOCO_GL=egl, osmesa or disable may help" if re.search("(?i)egl|glfw|opengl|osmesa", str(error)) else ""
        )
        verb = "cannot be made here" if env is None else "fails"
        raise SystemExit(f"{name} needs an environment that {verb} ({reason_of(error)}{hint}).") from None
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
    if {np.shape(obs), np.shape(next_obs)} != {obs_shape} or not np.isfinite([*obs, *next_obs, reward]).all():
        raise SystemExit(f"{name} needs an environment that fails: its first step returns {next_obs}, reward {reward}.")
