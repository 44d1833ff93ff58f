"""Datasets that are made and not downloaded, without a network.

    python benchmarks/make_data.py    # lists them

They follow D4RL's recipes, at a fifth of the size or less. They are not D4RL's data.
"""

from functools import partial
from typing import NamedTuple

import minari

from common.harness.environments import quietly
from common.harness.tasks import ENVIRONMENTS
from common.recipes import pointmaze, robots

ALL, LAST = slice(None), slice(-1, None)  # of a run's snapshots


class Recipe(NamedTuple):
    record: partial  # of (num_steps, seed): (environment, episodes)
    num_steps: int
    megabytes: int  # of the dataset
    crc32: int  # of its arrays as a run prints them, on the versions in constraints.txt


RECIPES = {
    "edp/hopper/medium-v1": Recipe(partial(robots.walk, "Hopper", LAST), 200_000, 30, 869897117),
    "edp/hopper/medium-replay-v1": Recipe(partial(robots.walk, "Hopper", ALL), 160_000, 32, 1984523528),
    "edp/halfcheetah/medium-v1": Recipe(partial(robots.walk, "HalfCheetah", LAST), 200_000, 42, 4033223410),
    "edp/halfcheetah/medium-replay-v1": Recipe(partial(robots.walk, "HalfCheetah", ALL), 80_000, 17, 3809232513),
    "edp/pen/mixed-v1": Recipe(partial(robots.turn_pen, (1, 4, 8, 16)), 100_000, 56, 2566941837),
    "edp/pen/expert-v1": Recipe(partial(robots.turn_pen, (1,)), 50_000, 28, 1179645420),
    "edp/antmaze/umaze-play-v1": Recipe(partial(robots.cross_maze, "UMaze"), 200_000, 78, 3452339658),
    "edp/antmaze/medium-play-v1": Recipe(partial(robots.cross_maze, "Medium"), 200_000, 70, 630446750),
    "edp/pointmaze/umaze-v0": Recipe(partial(pointmaze.walk, "UMaze"), 100_000, 13, 915029912),
    "edp/pointmaze/medium-v0": Recipe(partial(pointmaze.walk, "Medium"), 100_000, 13, 1008140670),
    "edp/pointmaze/large-v0": Recipe(partial(pointmaze.walk, "Large"), 100_000, 13, 1410145032),
}


def make_dataset(dataset_id: str, num_steps: int | None = None, seed: int = 0) -> minari.MinariDataset:
    """Writes one of `RECIPES`, of as many steps as it names unless others are given, with D4RL's reference returns."""
    record, usual_steps, *_ = RECIPES[dataset_id]
    env, episodes = record(num_steps or usual_steps, seed)
    low, high = ENVIRONMENTS[env.spec.name].reference
    described = {"algorithm_name": record.func.__name__, "description": str(record.func.__doc__).partition("\n")[0]}
    about = described | {"ref_min_score": low, "ref_max_score": high}
    with quietly(), env:  # Minari warns of the author and the licence, which a local dataset need not have
        return minari.create_dataset_from_buffers(dataset_id, episodes, env=env, eval_env=env, **about)
