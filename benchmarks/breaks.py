"""What breaks if: EDP with one thing changed, on the toy and in a small maze, for docs/breaks.md.

    python benchmarks/breaks.py                                 # every row: about two minutes for each, on one CPU core
    python benchmarks/breaks.py --only as-it-is no-clip         # these rows

A row is a flag, or a line of an algorithm file and what stands there instead. The edited file is never written: its
text is run, and refused if the line is not there exactly once. Three seeds are trained together. Adds the raw returns
to benchmarks/results/breaks/returns.csv and draws benchmarks/results/breaks/<row>.png: on the toy the actions of the
first seed after training, in the maze the score of all seeds against updates.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback

import functools
import itertools
import tempfile
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from report import read_csv, write_csv
from runner import ROOT

from common.harness import load_run
from common.harness.bandit import MODES, RADIUS

COLUMNS = ("row", "update", "seed", "episode", "return")
# The preset "fast" by its flags, so that each of them can be taken back
COMMON = {"preset": "paper", "tau": 0.2, "critic_layer_norm": True, "normalize_obs": True, "lr_decay": True}
COMMON |= {"batch_size": 64, "num_seeds": 3}
BANDIT = COMMON | {"env_id": "bandit", "num_updates": 400, "eval_every": 100, "eval_episodes": 100}
BANDIT |= {"prediction": "action", "num_eval_actions": 1}  # selection by Q would hide what is learned
MAZE = COMMON | {"env_id": "pointmaze-umaze", "num_updates": 2000, "eval_every": 500, "eval_episodes": 20}


class Row(NamedTuple):
    algorithm: str
    base: dict[str, Any]
    flags: dict[str, Any] = {}
    line: str = ""  # of the algorithm's file
    instead: str = ""


on_bandit = functools.partial(Row, "edp_td3bc", BANDIT)
in_maze = functools.partial(Row, "iql", MAZE)
ROWS = {
    "as-it-is": on_bandit(),
    "no-clip": on_bandit(line="return jnp.clip(corruption.prediction, -1, 1)", instead="return corruption.prediction"),
    "k-off-by-one": on_bandit(
        line="prediction = jax.vmap(policy)(batch.obs, noisy_action, k)",
        instead="prediction = jax.vmap(policy)(batch.obs, noisy_action, k + 1)",
    ),
    "ten-candidates": on_bandit({"num_eval_actions": 10}),
    "no-initial-noise": on_bandit({"init_noise_scale": 0.0}),
    "no-imitation": on_bandit(
        line="loss = diffusion + args.eta * guidance", instead="loss = 0 * diffusion + args.eta * guidance"
    ),
    "ten-times-eta": on_bandit({"eta": 10.0}),
    "three-calls": on_bandit({"num_solver_calls": 3}),
    "noise-predicted": on_bandit({"prediction": "noise"}),
    "maze-as-it-is": in_maze(),
    "slow-targets": in_maze({"tau": 0.005}),
    "no-target-networks": in_maze({"tau": 1.0}),
    "a-time-out-is-an-end": in_maze(
        line="dataset, behaviour = load_dataset(task, args.reward_rule, args.normalize_obs)",
        instead="dataset, behaviour = load_dataset(task, args.reward_rule, args.normalize_obs)\n"
        "    dataset.terminal[behaviour.episode_end - 1] = 1",
    ),
    "rewards-not-shifted": in_maze({"reward_rule": "none"}),
}


@dataclass(frozen=True)
class Args:
    only: tuple[Literal[(*ROWS,)], ...] = tuple(ROWS)
    """the rows to make"""
    results_dir: Path = ROOT / "benchmarks" / "results" / "breaks"
    """where returns and pictures go"""


def edited(row: Row) -> ModuleType:
    """The algorithm with the row's edit. Exits if the line is not in its file exactly once."""
    path = ROOT / "algorithms" / f"{row.algorithm}.py"
    text = path.read_text()
    if row.line:
        if text.count(row.line) != 1:
            raise SystemExit(f"{path.name} has {text.count(row.line)} times what is to be changed: {row.line}")
        text = text.replace(row.line, row.instead)
    module = ModuleType(f"edited_{row.algorithm}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def read(path: Path) -> dict[str, list[dict]]:
    """The lines of returns.csv by their row; those of a row stand together."""
    return {row: list(lines) for row, lines in itertools.groupby(read_csv(path), key=lambda line: line["row"])}


def scores(lines: list[dict]) -> tuple[list[int], np.ndarray]:
    """(updates, scores in percent, of shape (evaluations, seeds)) of a row; an episode pays 1 or 0."""
    updates, seeds = (sorted({int(line[name]) for line in lines}) for name in ("update", "seed"))
    returns = np.reshape([float(line["return"]) for line in lines], (len(updates), len(seeds), -1))
    return updates, 100 * returns.mean(axis=2)


def draw_actions(ax: Axes, actions: np.ndarray) -> None:
    ax.add_patch(Circle(MODES[0], RADIUS, color="tab:orange", alpha=0.25, linewidth=0))  # where they pay
    ax.scatter(*actions.T, s=3, alpha=0.4, linewidths=0)
    ax.set(aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[])


def draw_curves(ax: Axes, rows: dict[str, list[dict]], name: str) -> None:
    for row, color in ("maze-as-it-is", "0.7"), (name, "tab:blue"):
        if row in rows:
            ax.plot(*scores(rows[row]), color=color, linewidth=1.2)
    ax.set(ylim=(-3, 103), yticks=[0, 50, 100], xticks=[0, 2000])
    ax.tick_params(labelsize=7)


def main(args: Args) -> None:
    args.results_dir.mkdir(parents=True, exist_ok=True)
    table = args.results_dir / "returns.csv"
    for name in args.only:
        row = ROWS[name]
        module = edited(row)
        with tempfile.TemporaryDirectory() as folder:
            module.train(module.Args(**row.base | row.flags, run_dir=folder))
            lines = [{"row": name} | line for line in read_csv(Path(folder, "eval.csv"))]
            run_args, state, _ = load_run(folder, module)
        rows = read(table) | {name: lines}
        write_csv(table, [{name: line[name] for name in COLUMNS} for key in ROWS for line in rows.get(key, [])])
        figure = Figure(figsize=(1.5, 1.5), layout="constrained")
        if row.base is BANDIT:
            keys = jax.random.split(jax.random.key(1), (run_args.num_seeds, 400))
            actions = module.act(state, jnp.zeros((run_args.num_seeds, 400, 1)), keys, 0, run_args)
            draw_actions(figure.subplots(), np.asarray(actions[0]))
        else:
            draw_curves(figure.subplots(), rows, name)
        figure.savefig(args.results_dir / f"{name}.png", dpi=100)
        print(f"{name}: {np.round(scores(lines)[1][-1], 1)}, into {args.results_dir}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
