"""How a trained policy acts: finished runs, evaluated again with other settings of acting.

    python benchmarks/acting.py runs/<run> --num-eval-actions 1 10 50 200                     # Fig. 4 of the paper
    python benchmarks/acting.py runs/<run> --num-eval-actions 32 --average-best 1 4           # of the best, of four
    python benchmarks/acting.py runs/<run> --num-solver-calls 3 6 9 15 30                     # Fig. 5
    python benchmarks/acting.py runs/<run> --policy-temperature 0.5 1 1.5 2                   # Fig. 6
    python benchmarks/acting.py runs/<run> --num-eval-actions 1 --init-noise-scale 0 0.5 1    # Fig. 7
    python benchmarks/acting.py runs/<run> --critics runs/<other run>    # the other one's critics choose
    python benchmarks/acting.py policies/hopper-medium --episodes 1 --capture-video           # nothing to train or make

Every combination is evaluated, all seeds from the starts of the run's last evaluation; what is not given is as the run
had it. Raw returns are added to <run>/acting.csv after each evaluation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
import dataclasses
import importlib
import itertools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from report import read_csv, write_csv

from common.diffusion import Spacing
from common.harness import Evaluator, load_run, setup
from common.harness.checkpoint import CheckpointError, newest_header
from common.harness.devices import episode_keys, seed_keys
from common.harness.environments import check_camera
from common.harness.flags import check_flags
from common.harness.recorder import mean_and_deviation
from common.harness.records import Episodes
from common.harness.tasks import ENVIRONMENTS, Task, normalized_score

ALGORITHMS = [path.stem for path in (Path(__file__).parents[1] / "algorithms").glob("[!_]*.py")]
SETTINGS = ("num_eval_actions", "average_best", "policy_temperature", "init_noise_scale", "sampler", "num_solver_calls")
SETTINGS += ("solver_order", "solver_spacing")


@dataclass(frozen=True)
class Args:
    """Evaluate finished runs again with other settings of acting."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs"""
    num_eval_actions: tuple[int, ...] = ()
    """N of energy-based action selection (Alg. 2)"""
    average_best: tuple[int, ...] = ()
    """act by the mean of so many of the N, those with the largest Q"""
    policy_temperature: tuple[float, ...] = ()
    """scales the predicted noise (C.4)"""
    init_noise_scale: tuple[float, ...] = ()
    """scales the initial noise a^K (C.4)"""
    sampler: tuple[Literal["dpm", "ddpm"], ...] = ()
    """DPM-Solver, or all K steps of DDPM"""
    num_solver_calls: tuple[int, ...] = ()
    """network calls of DPM-Solver"""
    solver_order: tuple[int, ...] = ()
    """order of DPM-Solver"""
    solver_spacing: tuple[Spacing, ...] = ()
    """how its steps are spaced"""
    critics: Path | None = None
    """the run whose critics choose the actions, in place of the policy's own"""
    episodes: int | None = None
    """episodes of each evaluation, for each seed; by default as many as the run had"""
    capture_video: bool = False
    """an MP4 of the first episode of each evaluation, in the run's folder videos/<settings>/"""
    trust: str = ""
    """packages, a,b,..., whose code the data may run as their environment, as in training"""


class Trained(NamedTuple):
    """A finished run."""

    module: Any  # the algorithm's
    args: Any
    state: Any
    header: dict  # args.json, and the update of the state

    @property
    def seeds(self) -> list[int]:
        return list(range(self.args.seed, self.args.seed + self.args.num_seeds))

    def act(self, obs, keys, step, args):
        """Actions in [-1, 1] for observations (seeds, batch, obs_dim) as the environment gives them, keys for each."""
        mean, std = np.float32(self.header["normalization"])[:, None, None]
        return self.module.act(self.state, (obs - mean) / std, keys, step, args)


def open_run(folder: Path) -> Trained:
    """Exits with one sentence if there is no run, or a damaged one."""
    try:
        algorithm = newest_header(folder)[0].get("algorithm")
        if algorithm not in ALGORITHMS:
            raise CheckpointError(f"{folder}/ holds a run of {algorithm}, which is not in algorithms/")
        module = importlib.import_module(f"algorithms.{algorithm}")
        args, state, header = load_run(folder, module)
        return Trained(module, dataclasses.replace(args, trust=""), state, header)  # whom to trust no file can say
    except CheckpointError as error:
        sentence = str(error)
        raise SystemExit(f"{sentence[0].upper()}{sentence[1:]}.") from None


def with_critics(run: Trained, folder: Path, other: Path) -> Trained:
    """The run of `folder` with the critics of `other`; exits if they do not fit."""
    theirs = open_run(other)
    critics = getattr(theirs.state, "critics", None)
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]
    if critics is None or shapes(critics) != shapes(getattr(run.state, "critics", None)):
        raise SystemExit(f"The critics of {other}/ do not fit {folder}/: other shapes or seeds, or none.")
    if theirs.header["normalization"] != run.header["normalization"]:
        raise SystemExit(f"The critics of {other}/ do not fit {folder}/: they see observations on another scale.")
    return run._replace(state=run.state._replace(critics=critics))


def variants(run: Trained, args: Args) -> list:
    """The run's arguments with every combination of the settings given; exits if the algorithm does not have one."""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name)}
    for name in given:
        if not hasattr(run.args, name):
            raise SystemExit(f"{run.header['algorithm']} has no --{name.replace('_', '-')}.")
    of_all = {"eval_episodes": args.episodes or run.args.eval_episodes, "capture_video": args.capture_video}
    of_all["trust"] = args.trust
    if not of_all["eval_episodes"]:
        raise SystemExit(f"The run of {run.header['algorithm']} was trained without evaluations: add --episodes.")
    base = dataclasses.replace(run.args, run_dir=None, **of_all)
    combinations = [dict(zip(given, values)) for values in itertools.product(*given.values())]
    try:
        todo = [dataclasses.replace(base, **combination) for combination in combinations]
    except ValueError as error:
        raise SystemExit(f"Impossible settings: {error}.") from None
    for variant in todo:
        check_flags(variant)
    return todo


def task_of(run: Trained, variant) -> Task:
    """Of a policy in policies/ it is known without its data; of a run they are opened, and made if they are gone."""
    if "environment" not in run.header:
        return setup(variant)[1]
    data, environment = run.header["dataset"]["dataset"], ENVIRONMENTS[run.header["environment"]]
    if variant.capture_video:
        check_camera(environment)
    return Task(data.replace("/", "-"), environment, (data,))


def play(run: Trained, evaluate: Evaluator, variant) -> Episodes:
    """The episodes that the run's last evaluation began with, played by its policy with the arguments `variant`."""
    update = run.header["update"]
    keys = episode_keys(seed_keys(run.seeds, 3)[2], update, variant.eval_episodes)  # as in the run itself
    return evaluate(lambda obs, keys, step: run.act(obs, keys, step, variant), keys, update)


def act_again(folder: Path, args: Args) -> None:
    """Evaluates one run with every combination of the settings."""
    run = open_run(folder)
    if args.critics is not None:
        run = with_critics(run, folder, args.critics)
    todo, update = variants(run, args), run.header["update"]
    task = task_of(run, todo[0])
    print(f"{folder}/: {run.header['algorithm']}, update {update}")
    file = folder / "acting.csv"
    try:
        file.open("ab").close()  # before the first evaluation is played
    except OSError as error:
        raise SystemExit(f"Cannot write to {file}: {error.strerror}.") from None
    evaluate = Evaluator(task.environment, run.seeds, todo[0].eval_episodes)
    for variant in todo:
        settings = {name: getattr(variant, name, "") for name in SETTINGS}
        shown = ", ".join(f"{name} {value}" for name, value in settings.items() if getattr(args, name))
        if args.capture_video:
            videos = folder / "videos" / (shown or "as in the run").replace(", ", "_").replace(" ", "-")
            evaluate = Evaluator(task.environment, run.seeds, variant.eval_episodes, videos)
        episodes, rows = play(run, evaluate, variant), read_csv(file)
        for (i, j), value in np.ndenumerate(episodes.returns):
            row = {"update": update, "critics": args.critics or "", **settings, "seed": run.seeds[i], "episode": j}
            rows.append(row | {"return": repr(float(value)), "length": episodes.lengths[i, j]})
        write_csv(file, rows)
        scores = normalized_score(task.environment, episodes.returns).mean(axis=1)
        print(f"  {shown or 'as in the run'}: {mean_and_deviation(scores)}", flush=True)


def main(args: Args) -> None:
    if not args.runs:
        raise SystemExit("Name the folder of a run, or of several: python benchmarks/acting.py runs/<run>.")
    if args.episodes is not None and args.episodes < 1:
        raise SystemExit(f"--episodes must be positive, but is {args.episodes}.")
    for folder in args.runs:
        act_again(folder, args)


if __name__ == "__main__":
    main(tyro.cli(Args))
