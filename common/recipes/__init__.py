"""Datasets that are made and not downloaded, without a network.

    python benchmarks/make_data.py    # lists them

They follow D4RL's recipes, at a fifth of the size or less. They are not D4RL's data.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import minari

from common.recipes import antmaze, locomotion, pen, pointmaze, recording

ALL, LAST = slice(None), slice(-1, None)  # of a run's snapshots


class Recipe(NamedTuple):
    record: Callable  # of (num_steps, seed): (environment, episodes)
    algorithm: str
    description: str
    num_steps: int
    megabytes: int  # of the dataset
    crc32: int  # of its arrays as a run prints them, on the versions in constraints.txt
    seed: int = 0


def _locomotion(robot: str, snapshots: slice, *numbers) -> Recipe:
    described = f"{robot} with {'one snapshot' if snapshots == LAST else 'a dozen snapshots'} of SAC, stochastic."
    return Recipe(partial(locomotion.walk, robot, snapshots), "SAC", described, *numbers)


def _pen(noise_scales: tuple[int, ...], *numbers) -> Recipe:
    described = f"DAPG's pen policy with its own noise times {' or '.join(map(str, noise_scales))}, by episode."
    return Recipe(partial(pen.turn, noise_scales), "DAPG", described, *numbers)


def _antmaze(name: str, *numbers) -> Recipe:
    described = f"An ant walking along shortest paths between random cells of {name}, with action noise."
    return Recipe(partial(antmaze.walk, name), "SAC and waypoints", described, *numbers)


def _pointmaze(name: str, *numbers) -> Recipe:
    described = "A point mass walking along shortest paths between random goals, with action noise."
    return Recipe(partial(pointmaze.walk, name), "scripted waypoint controller", described, *numbers)


RECIPES = {
    "edp/hopper/medium-v1": _locomotion("Hopper", LAST, 200_000, 30, 869897117),
    "edp/hopper/medium-replay-v1": _locomotion("Hopper", ALL, 160_000, 32, 1984523528),
    "edp/halfcheetah/medium-v1": _locomotion("HalfCheetah", LAST, 200_000, 42, 4033223410),
    "edp/halfcheetah/medium-replay-v1": _locomotion("HalfCheetah", ALL, 80_000, 17, 3809232513),
    "edp/pen/mixed-v1": _pen((1, 4, 8, 16), 100_000, 56, 2566941837),
    "edp/pen/expert-v1": _pen((1,), 50_000, 28, 1179645420),
    "edp/antmaze/umaze-play-v1": _antmaze("UMaze", 200_000, 78, 3452339658),
    "edp/antmaze/medium-play-v1": _antmaze("Medium", 200_000, 70, 630446750),
    "edp/pointmaze/umaze-v0": _pointmaze("UMaze", 100_000, 13, 915029912),
    "edp/pointmaze/medium-v0": _pointmaze("Medium", 100_000, 13, 1008140670),
    "edp/pointmaze/large-v0": _pointmaze("Large", 100_000, 13, 1410145032),
}


def make_dataset(dataset_id: str, num_steps: int | None = None, seed: int | None = None) -> minari.MinariDataset:
    """Writes one of `RECIPES`, of as many steps and with the seed that its recipe names, unless others are given."""
    recipe = RECIPES[dataset_id]
    env, episodes = recipe.record(num_steps or recipe.num_steps, recipe.seed if seed is None else seed)
    metadata = {"algorithm_name": recipe.algorithm, "description": recipe.description}
    return recording.write(dataset_id, episodes, env, **metadata)
