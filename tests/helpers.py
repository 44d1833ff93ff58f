"""What several tests share: small arguments, files of a run, small real datasets."""

import ast
import contextlib
import csv
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import gymnasium
import jax
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from minari.storage.datasets_root_dir import get_dataset_path

from common.harness import Dataset, Evaluator
from common.harness.checkpoint import newest_header
from common.harness.records import Episodes

SCRIPTS = Path(__file__).parents[1] / "algorithms"
ALGORITHMS = ("edp_td3bc", "edp_crr", "edp_iql", "dql_baseline", "td3bc", "crr", "iql", "bc")

# ----------------------------------------------------------------------------------------------- arguments and runs

TINY = {"num_updates": 20, "eval_every": 10, "eval_episodes": 2, "num_seeds": 2, "batch_size": 16}
TINY |= {"num_diffusion_steps": 50, "num_solver_calls": 3}


def make_args(algorithm, common: dict, **changes):
    """The arguments of a module of algorithms/: those of `common` that it has, and `changes`, which it must have."""
    names = {field.name for field in dataclasses.fields(algorithm.Args)}
    return algorithm.Args(**{name: value for name, value in common.items() if name in names} | changes)


def over(*algorithms):
    """Parametrizes a test by modules of algorithms/."""
    return pytest.mark.parametrize("algorithm", algorithms, ids=lambda module: module.__name__.split(".")[-1])


def one(tree, index=0):
    """Of the first axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def fields_of(algorithm: str) -> dict[str, str]:
    """Each field of `Args` with its text, the comment after it or the docstring under it, from the source."""
    source = (SCRIPTS / f"{algorithm}.py").read_text()
    (args,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = {}
    for field, below in zip(args.body, [*args.body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            comment = source.splitlines()[field.end_lineno - 1].partition("  # ")[2]
            assert comment or isinstance(below, ast.Expr), f"{field.target.id} is not explained"
            fields[field.target.id] = comment or ast.literal_eval(below.value)
    return fields


def flags_of(**args) -> list[str]:
    return [part for name, value in args.items() for part in ("--" + name.replace("_", "-"), str(value))]


@contextlib.contextmanager
def quickly():
    """For whole runs that train for moments, and whose properties do not depend on depth.

    One hidden layer, and none of LLVM's costly passes: the programs compile in a quarter of the time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.networks.NUM_HIDDEN", 1)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def evaluated(evaluate: Evaluator, act, update: int) -> Episodes:
    """The evaluation of a policy `act(obs, step)` that draws nothing."""
    keys = jax.random.split(jax.random.key(0), (len(evaluate.seeds), evaluate.num_episodes))
    return evaluate(lambda obs, keys, step: act(obs, step), keys, update)


def damaged(data: bytes, i: int) -> bytes:
    """Number `i` of a fixed series: every kind of damage, in turn anywhere and among the first 2,000 bytes."""
    rng = random.Random(i)
    at = rng.randrange(len(data) if i % 8 < 4 else min(2000, len(data)))
    flip, zeros, insertion = bytes([data[at] ^ rng.randrange(1, 256)]), bytes(64), rng.randbytes(3)
    patch, replaced = ((flip, 1), (b"", len(data)), (zeros, 64), (insertion, 0))[i % 4]
    return data[:at] + patch + data[at + replaced :]


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def same_run(one: Path, other: Path) -> None:
    """Returns, metrics (but for the rate) and the newest training state are equal to the bit."""
    assert (one / "eval.csv").read_bytes() == (other / "eval.csv").read_bytes()
    metrics = [[row | {"updates_per_second": ""} for row in rows_of(folder / "metrics.csv")] for folder in (one, other)]
    assert metrics[0] == metrics[1]
    (header, stream), (other_header, other_stream) = map(newest_header, (one, other))
    assert header["update"] == other_header["update"]
    assert stream.read() == other_stream.read()


def returns_of(folder: Path) -> np.ndarray:
    """(evaluations, seeds, episodes), from a run's eval.csv."""
    rows = rows_of(folder / "eval.csv")
    names = ("update", "seed", "episode")
    table = {tuple(int(row[name]) for name in names): float(row["return"]) for row in rows}
    shape = [len({key[i] for key in table}) for i in range(3)]
    assert len(table) == len(rows) == np.prod(shape)
    return np.reshape([table[key] for key in sorted(table)], shape)


# --------------------------------------------------------------------------------------------------------- datasets


def play(env: gymnasium.Env, episodes: int | Sequence[int], seed=0, prepare=None) -> list[tuple]:
    """Episodes of random actions: (observations, actions, rewards, terminations, truncations), an entry for each step.

    `episodes` is their number, or the number of steps after which each is cut at the latest; `prepare(env, episode)`
    may alter the environment after a reset.
    """
    rng, played = np.random.default_rng(seed), []
    for episode, limit in enumerate([np.inf] * episodes if isinstance(episodes, int) else episodes):
        observations, steps = [env.reset(seed=seed + episode)[0]], []
        if prepare is not None:
            prepare(env, episode)
        while not steps or not (steps[-1][2] or steps[-1][3]):
            action = rng.uniform(env.action_space.low, env.action_space.high).astype(env.action_space.dtype)
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            steps.append((action, reward, terminated, truncated or len(steps) + 1 == limit))
        played.append((observations, *map(list, zip(*steps))))
    return played


def record(env, dataset_id: str, episodes, data_format="hdf5", seed=0, prepare=None) -> minari.MinariDataset:
    """Writes a dataset of episodes that `play` plays."""
    return write_dataset(dataset_id, env, play(env, episodes, seed, prepare), data_format)


def write_dataset(dataset_id: str, env: gymnasium.Env, episodes: list[tuple], data_format="hdf5"):
    """Writes episodes such as `play` returns."""
    if data_format == "arrow":
        pytest.importorskip("pyarrow", reason="Minari reads Arrow datasets with pyarrow")
    stack = lambda steps: jax.tree.map(lambda *parts: np.stack(parts), *steps)
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    buffers = [EpisodeBuffer(**{name: stack(steps) for name, steps in zip(names, episode)}) for episode in episodes]
    return minari.create_dataset_from_buffers(dataset_id, buffers, env=env, data_format=data_format)


def change_metadata(dataset_id: str, /, **changes) -> None:
    """Overwrites entries of a local dataset's metadata; None removes one."""
    file = get_dataset_path(dataset_id) / "data" / "metadata.json"
    metadata = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))


def record_hopper(dataset_id="test/hopper/random-v0", num_episodes=12, data_format="hdf5", seed=0):
    # A random hopper falls after some 10 to 50 steps: with a limit of 25, episodes end in both ways.
    return record(gymnasium.make("Hopper-v5", max_episode_steps=25), dataset_id, num_episodes, data_format, seed)


def by_hand(dataset_id: str, *keys: str) -> dict[str, np.ndarray]:
    """The fields of `Dataset`, and the `ends` of episodes, by Minari's own iteration."""
    columns = {name: [] for name in (*Dataset._fields, "ends")}
    for episode in minari.load_dataset(dataset_id).iterate_episodes():
        obs = episode.observations
        obs = np.concatenate([obs[key] for key in keys], axis=1) if keys else obs
        arrays = obs[:-1], episode.actions, episode.rewards, obs[1:], episode.terminations, [len(episode.rewards)]
        for column, array in zip(columns.values(), arrays):
            column.append(array)
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    return arrays | {"ends": np.cumsum(arrays["ends"])}
