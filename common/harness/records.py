"""The records that pass between reading, learning, evaluating and logging."""

import traceback
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

ACTION_LIMIT = 0.999  # dataset actions are clipped to this, as in the official code
DIAGNOSTICS = {  # of offline.py, by the field of the training state that they need
    "critics": ("q_policy", "q_data"),
    "policy": ("action_distance", "nearest_distance", "bounds_policy", "bounds_data"),
    "value": ("value_bias", "value_correlation"),
}
Loss = tuple[Float[Array, ""], dict[str, Any]]  # a loss, and metrics by name


class Dataset(NamedTuple):
    """Transitions, episode after episode."""

    obs: Float[Array | np.ndarray, "size obs_dim"]
    action: Float[Array | np.ndarray, "size act_dim"]
    reward: Float[Array | np.ndarray, " size"]
    next_obs: Float[Array | np.ndarray, "size obs_dim"]
    terminal: Float[Array | np.ndarray, " size"]  # 1 where the task truly ended; a time-out is no end


def numbers(array, name: str) -> Float[np.ndarray, "..."]:
    """As float32. Raises ValueError for what is no array of numbers: NumPy would read those that stand in a text."""
    if np.asarray(array).dtype.kind not in "fiub":
        raise ValueError(f"its {name} are not numbers")
    with np.errstate(over="ignore"):  # infinity is found with the others that are not finite
        return np.asarray(array, np.float32)


def printable(text) -> str:
    """The text of others in one line: without control characters and escapes, and not without end."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:300]


def reason_of(error: Exception) -> str:
    """The first line of what it says, without the full stop."""
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if not said:  # of an assertion
        return printable(f"{type(error).__name__}: {traceback.extract_tb(error.__traceback__)[-1].line}")
    if isinstance(error, KeyError) and " " not in said:
        return printable(f"there is no {said!r} in it")
    return printable(said.splitlines()[0]).rstrip(".")


class Behaviour(NamedTuple):
    """What is known of a dataset before a policy is learned from it."""

    statistics: dict[str, Any]  # for people and args.json
    episode_end: np.ndarray  # (episodes,), index after each one's last transition
    scores: np.ndarray  # (episodes,), under the evaluation protocol
    obs_mean: np.ndarray  # (obs_dim,), subtracted from observations: 0 unless they are standardised
    obs_std: np.ndarray  # (obs_dim,), which they are divided by: 1 unless they are standardised
    paths: list[tuple[np.ndarray, bool]]  # mazes only: (x, y) along some episodes, and whether they reach the goal
    held_back: tuple[Dataset, np.ndarray] | None = None  # without evaluation: other episodes, and their ends


class Episodes(NamedTuple):
    """One evaluation."""

    returns: np.ndarray  # (seeds, episodes)
    lengths: np.ndarray  # (seeds, episodes), steps
    paths: list[np.ndarray]  # mazes only: (x, y) along the episodes of the first seed
    maze: Any = None  # gymnasium-robotics' Maze
