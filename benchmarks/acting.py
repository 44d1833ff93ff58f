"""How a trained policy acts: finished runs, evaluated again with other settings of acting.

    python benchmarks/acting.py runs/<run> --num-eval-actions 1 10 50 200                     # Fig. 4 of the paper
    python benchmarks/acting.py runs/<run> --num-solver-calls 3 6 9 15 30                     # Fig. 5
    python benchmarks/acting.py runs/<run> --policy-temperature 0.5 1 1.5 2                   # Fig. 6
    python benchmarks/acting.py runs/<run> --num-eval-actions 1 --init-noise-scale 0 0.5 1    # Fig. 7
    python benchmarks/acting.py runs/<run> --critics runs/<other run>    # the other one's critics choose

Every combination is evaluated, all seeds from the starts of the run's last evaluation; what is not given is as the run
had it. Raw returns are added to <run>/acting.csv. Also printed: how far the policy's samples are from their mean at
states of the data, and how far the data's actions are. A policy that cloned the behaviour well has the two alike.
"""

import csv
import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common.data import Dataset, load_dataset, resolve_task
from common.evaluation import Evaluator
from common.run import TrainedRun, load_run, mean_and_deviation, seed_keys, setup
from common.tasks import normalized_score

SETTINGS = ("num_eval_actions", "policy_temperature", "init_noise_scale", "sampler", "num_solver_calls", "solver_order")


@dataclass(frozen=True)
class Args:
    """Evaluate finished runs again with other settings of acting."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs"""
    num_eval_actions: tuple[int, ...] = ()
    """N of energy-based action selection (Alg. 2)"""
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
    critics: Path | None = None
    """the run whose critics choose the actions, in place of the policy's own"""
    episodes: int | None = None
    """of each evaluation, for each seed; by default as many as the run had"""


def open_run(folder: Path) -> TrainedRun:
    """`load_run`, or one sentence for people."""
    try:
        return load_run(folder)
    except OSError:
        raise SystemExit(f"There is no checkpoint.eqx in {folder}/; name the folder of a run.") from None
    except (ImportError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(f"The checkpoint in {folder}/ is damaged, or not of this version: {error}.") from None


def with_critics(run: TrainedRun, folder: Path, other: Path) -> TrainedRun:
    """The run of `folder` with the critics of `other`; exits if they do not fit."""
    critics = getattr(open_run(other).state, "critics", None)
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]
    if critics is None or shapes(critics) != shapes(getattr(run.state, "critics", None)):
        raise SystemExit(f"The critics of {other}/ do not fit {folder}/: other shapes or seeds, or none.")
    return run._replace(state=run.state._replace(critics=critics))


def variants(run: TrainedRun, args: Args) -> list:
    """The run's arguments with every combination of the settings given; exits if the algorithm does not have one."""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name)}
    for name in given:
        if not hasattr(run.args, name):
            raise SystemExit(f"{run.header['algorithm']} has no --{name.replace('_', '-')}.")
    base = dataclasses.replace(run.args, run_dir=None, eval_episodes=args.episodes or run.args.eval_episodes)
    combinations = [dict(zip(given, values)) for values in itertools.product(*given.values())]
    return [dataclasses.replace(base, **combination) for combination in combinations]


def spread(run: TrainedRun, dataset: Dataset, num_states: int = 256, num_samples: int = 32) -> tuple[float, float]:
    """Root mean square distances from the mean of the policy's samples at states of the data: samples', data's.

    Of all action dimensions and seeds, in units of the normalised action; neither is biased by the number of samples.
    """
    args = dataclasses.replace(run.args, num_eval_actions=1) if hasattr(run.args, "num_eval_actions") else run.args
    index = np.random.default_rng(0).integers(0, len(dataset.reward), num_states)
    obs = jnp.repeat(dataset.obs[index], num_samples, axis=0)
    obs = jnp.broadcast_to(obs, (run.args.num_seeds, *obs.shape))
    (keys,) = seed_keys(run.seeds, 1)
    sample = np.asarray(run.act(obs, keys, 0, args)).reshape(run.args.num_seeds, num_states, num_samples, -1)
    mean = sample.mean(axis=2)
    variance = np.mean((sample - mean[:, :, None]) ** 2) * num_samples / (num_samples - 1)
    data_variance = np.mean((np.asarray(dataset.action[index]) - mean) ** 2) - variance / num_samples
    return float(np.sqrt(variance)), float(np.sqrt(max(data_variance, 0)))


def act_again(folder: Path, args: Args) -> None:
    """Evaluates one run with every combination of the settings."""
    run = open_run(folder)
    if args.critics is not None:
        run = with_critics(run, folder, args.critics)
    todo = variants(run, args)
    for variant in todo:
        setup(variant)

    task = resolve_task(run.args.env_id, run.args.dataset_id, run.args.dataset_path)
    rule, top_fraction = getattr(run.args, "reward_rule", "none"), getattr(run.args, "top_fraction", 1.0)
    dataset, info = load_dataset(task, rule, run.args.normalize_obs, top_fraction)
    update = run.header["update"]
    print(f"{folder}/: {run.header['algorithm']}, update {update}; behaviour {info.behaviour_score:.1f}")
    print("  distance from the policy's mean action: samples {:.3f}, data {:.3f}".format(*spread(run, dataset)))

    evaluate = Evaluator(task.environment, run.seeds, todo[0].eval_episodes, info)
    keys = jax.vmap(jax.random.fold_in, (0, None))(seed_keys(run.seeds, 3)[2], update)  # as in the run itself
    try:
        file = open(folder / "acting.csv", "a", newline="")
    except OSError as error:
        raise SystemExit(f"Cannot write to {folder}/acting.csv: {error.strerror}.") from None
    with file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(["update", "critics", *SETTINGS, "seed", "episode", "return", "length"])
        for variant in todo:
            episodes = evaluate(lambda obs, t: run.act(obs, keys, t, variant), update)
            settings = {name: getattr(variant, name, "") for name in SETTINGS}
            for (i, j), value in np.ndenumerate(episodes.returns):
                row = [*settings.values(), run.seeds[i], j, repr(float(value)), episodes.lengths[i, j]]
                writer.writerow([update, args.critics or "", *row])
            file.flush()
            shown = ", ".join(f"{name} {value}" for name, value in settings.items() if getattr(args, name))
            scores = normalized_score(task.environment, episodes.returns).mean(axis=1)
            print(f"  {shown or 'as in the run'}: {mean_and_deviation(scores)}", flush=True)


def main(args: Args) -> None:
    if not args.runs:
        raise SystemExit("Name the folder of a run, or of several: python benchmarks/acting.py runs/<run>.")
    if args.episodes is not None and args.episodes < 1:
        raise SystemExit(f"--episodes must be positive, but is {args.episodes}.")
    for folder in args.runs:
        try:
            act_again(folder, args)
        except KeyboardInterrupt:
            raise SystemExit("Stopped; finished evaluations are in the runs' acting.csv.") from None


if __name__ == "__main__":
    main(tyro.cli(Args))
