"""D4RL's original files: flat arrays in one HDF5 file, read as D4RL's own `qlearning_dataset` reads them.

Minari's datasets of the same names were recorded anew; the scores of the literature, the EDP paper's among them, are
on these files. What differs from Minari's data, and so in evaluation:

locomotion   recorded in -v2, whose dynamics Gymnasium keeps in -v4 (v5 changed them)
antmaze      observations are 29 wide, without the goal; another ant (actuation, time step, a mirrored maze), which
             Gymnasium does not have: policies are evaluated in Gymnasium's, and their scores do not compare
kitchen      observations are 60 wide: the joints of the robot (9) and of the objects (21), and a constant goal (30)
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from common.harness.records import Dataset, numbers
from common.harness.tasks import ADROIT, ANTMAZE, KITCHEN, LOCOMOTION, Task


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """To be read by `hdf5_arrays`. Raises ValueError if there are links, which could lead to other files."""
    with h5py.File(path, "r") as file:
        if link := file.id.links.visit(lambda name, info: name if info.type != h5py.h5l.TYPE_HARD else None, info=True):
            raise ValueError(f"its {link.decode()} is a link, not data")
        yield file


def hdf5_arrays(part: h5py.Dataset | h5py.Group):
    """An array, or a dict of them. Raises ValueError if its numbers lie in other files."""
    if isinstance(part, h5py.Group):
        return {name: hdf5_arrays(part[name]) for name in part}
    storage = part.id.get_create_plist()
    if storage.get_external_count() or storage.get_layout() == h5py.h5d.VIRTUAL:
        raise ValueError(f"its {part.name} lies in another file")
    return part[()]


def d4rl_task(task: Task, path: Path) -> Task:
    """`task` with the data of the file at `path`, and the environment that fits them. Exits if there is none."""
    environment = task.environment
    if environment.domain == LOCOMOTION:
        environment = environment._replace(gym_id=environment.gym_id.replace("-v5", "-v4"))
    elif environment.domain == ANTMAZE:
        print("Note: D4RL's ant is not Gymnasium's, where the policy is evaluated: its scores do not compare.")
        environment = environment._replace(obs_keys=("achieved_goal", "observation"), sparse=False)
    elif environment.domain == KITCHEN:
        obs = read_d4rl(path, environment.max_steps)[0].obs
        if obs.ndim != 2 or obs.shape[1] != 60 or not len(obs) or not np.allclose(obs[:, 30:], obs[0, 30:]):
            raise ValueError("kitchen observations are 60 wide, the last 30, the goal, the same in all")
        columns = (*range(9), *range(18, 39))  # positions; Gymnasium's 59 hold velocities as well
        environment = environment._replace(obs_columns=columns, obs_constants=tuple(obs[0, 30:].tolist()))
    elif environment.domain != ADROIT:
        raise SystemExit(f"--dataset-path reads D4RL's files of the paper's tasks; --env-id {task.env_id} is not one.")
    return task._replace(environment=environment, dataset_ids=(), file=path)


def read_d4rl(path: Path, max_steps: int) -> tuple[Dataset, np.ndarray]:
    """(transitions, index after each episode's last) of a D4RL file, as `qlearning_dataset` makes them.

    The last sample is dropped, and so is each that ends an episode by time, even a terminal one: it has no successor.
    Files without `timeouts` end an episode by time after `max_steps`; the count starts at 1 after a terminal, as
    D4RL's does. `next_observations` are ignored. Raises OSError, KeyError or ValueError if the file is damaged.
    """
    with open_hdf5(path) as file:
        if "episode_0" in file:
            raise SystemExit(f"The file {path} is part of a Minari dataset, which --dataset-id names.")
        column = lambda name: numbers(hdf5_arrays(file[name]), name)
        obs, action = column("observations"), column("actions")
        reward, terminal = column("rewards").ravel(), column("terminals").ravel()
        timeout = column("timeouts").ravel() if "timeouts" in file else _count_timeouts(terminal > 0, max_steps)
    if not np.isin(np.append(terminal, timeout), (0, 1)).all():
        raise ValueError("its terminals or timeouts are neither 0 nor 1")
    terminal, timeout = terminal > 0, timeout > 0
    lengths = sorted({len(array) for array in (obs, action, reward, terminal, timeout)})
    if len(lengths) > 1:
        raise ValueError(f"its arrays have the lengths {lengths}")
    kept = np.flatnonzero(~timeout[:-1])
    ends = np.flatnonzero((terminal | timeout)[:-1]) + 1
    ends = np.unique(np.append(np.searchsorted(kept, ends), len(kept)))
    dataset = Dataset(obs[kept], action[kept], reward[kept], obs[kept + 1], terminal[kept].astype(np.float32))
    return dataset, ends[ends > 0]


def _count_timeouts(terminal: np.ndarray, max_steps: int) -> np.ndarray:
    timeout, step = np.zeros(len(terminal), bool), 0
    for i, is_terminal in enumerate(terminal):
        timeout[i] = step == max_steps - 1
        step = 0 if timeout[i] else 1 if is_terminal else step + 1
    return timeout
