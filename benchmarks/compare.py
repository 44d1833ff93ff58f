"""EDP against the policies that it replaces: Table 2 of the paper, on data, seeds and updates of your choice.

    python benchmarks/compare.py --data pointmaze-umaze dapg/pen/expert-v0 --flags "--num-updates 10000 --num-seeds 3"
    python benchmarks/compare.py --data --folder benchmarks/results/comparison   # runs nothing: tables of what is there

Every algorithm runs on every dataset (the name of a task, or the id of a Minari dataset) with the same --flags, each
into <folder>/<dataset>/<algorithm>/. What has run already is not run again, so an interrupted comparison can go on.
On a CPU `--jobs 2` gives each of two runs half of the cores, which is faster than one after the other on all of them:
the networks are small.

Prints the tables of the last score and of RAT (the mean of the last ten evaluations, or of all if there are fewer),
means and deviations over seeds, and draws the learning curves: <folder>/comparison.png.
"""

import csv
import json
import os
import queue
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from common.run import RAT_WINDOW, mean_and_deviation
from common.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {  # name in the table: file and its own flags
    "BC": "bc",
    "10% BC": "bc --top-fraction 0.1",
    "TD3+BC": "td3bc",
    "EDP + TD3+BC": "edp_td3bc",
    "CRR": "crr",
    "EDP + CRR": "edp_crr",
    "IQL": "iql",
    "EDP + IQL": "edp_iql",
    "Diffusion-QL, K = 5": "dql_baseline --num-diffusion-steps 5 --beta-schedule vp",
}


@dataclass(frozen=True)
class Args:
    """Compare the algorithms on the same data, updates and seeds."""

    data: tuple[str, ...] = ("pointmaze-umaze", "pointmaze-medium")
    """tasks (see --list-envs of any algorithm) and ids of Minari datasets"""
    columns: tuple[str, ...] = tuple(COLUMNS)
    """algorithms, by their names in the table"""
    flags: str = ""
    """of every run alike, in quotes"""
    jobs: int = 1
    """runs at a time, on CPU each on its share of the cores"""
    folder: Path = Path("runs/comparison")
    """where the runs are, and go"""


class Result(NamedTuple):
    """One finished run."""

    settings: dict[str, int]  # what has to be the same for a fair comparison
    updates: np.ndarray  # (evaluations,)
    scores: np.ndarray  # (evaluations, seeds): means over episodes
    behaviour: float


def folder_name(name: str) -> str:
    """Of a dataset or a column: lower case, and hyphens for what is neither letter nor digit."""
    return "-".join(re.findall("[a-z0-9]+", name.lower()))


def run(folder: Path, column: str, dataset: str, flags: str, share: set[int]) -> bool:
    """Runs one algorithm as a user would, on the cores of `share`, output to `folder`.log; whether it went well."""
    script, *own = shlex.split(COLUMNS[column])
    chosen = ["--env-id" if dataset in TASKS else "--dataset-id", dataset]
    command = [sys.executable, str(ROOT / "algorithms" / f"{script}.py"), *chosen, *own, *shlex.split(flags)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen([*command, "--run-dir", str(folder)], stdout=log, stderr=subprocess.STDOUT)
        if share:
            os.sched_setaffinity(process.pid, share)  # at once: threads that it starts later inherit it
        succeeded = process.wait() == 0
    print(f"{column} on {dataset}: {'done' if succeeded else f'failed, {folder}.log says why'}", flush=True)
    return succeeded


def run_all(args: Args) -> None:
    """Runs what has no folder yet, `args.jobs` at a time. A run that fails does not stop the others."""
    runs = [(args.folder / folder_name(d) / folder_name(c), c, d) for d in args.data for c in args.columns]
    missing = [run for run in runs if not run[0].exists()]
    for folder, *_ in runs:
        if folder.exists() and read_run(folder) is None:
            raise SystemExit(f"{folder}/ holds a run that was cut off; delete it to run it again.")

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = queue.SimpleQueue()
    for i in range(args.jobs):
        shares.put(set(cores[i :: args.jobs]))

    def run_on_a_share(which: tuple[Path, str, str]) -> bool:
        share = shares.get()
        try:
            return run(*which, args.flags, share)
        finally:
            shares.put(share)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            succeeded = list(pool.map(run_on_a_share, missing))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise SystemExit(f"Stopped; finished runs are in {args.folder}/.") from None
    if not all(succeeded):
        raise SystemExit(f"{succeeded.count(False)} of {len(missing)} runs failed; the others are in {args.folder}/.")


def read_run(folder: Path) -> Result | None:
    """The scores of a run, from its args.json and the raw returns of its eval.csv; None if it has not finished."""
    if not (folder / "eval.csv").exists():
        return None
    header = json.loads((folder / "args.json").read_text())
    with open(folder / "eval.csv", newline="") as file:
        rows = [(int(row["update"]), int(row["seed"]), float(row["return"])) for row in csv.DictReader(file)]
    if not rows or rows[-1][0] != header["args"]["num_updates"]:
        return None
    updates, seeds, returns = zip(*rows)
    low, high = header["reference_returns"] or (0, 100)
    shape = len(set(updates)), len(set(seeds)), -1
    scores = 100 * (np.reshape(returns, shape).mean(axis=2) - low) / (high - low)
    settings = {name: header["args"][name] for name in ("num_updates", "batch_size", "seed", "num_seeds")}
    return Result(settings, np.unique(updates), scores, header["dataset"]["behaviour_score"])


def read_all(folder: Path) -> dict[str, dict[str, Result]]:
    """Finished runs by dataset and column, both in the order of the table; exits if a dataset's are not comparable."""
    results: dict[str, dict[str, Result]] = {}
    for column in COLUMNS:
        for file in sorted(folder.glob(f"*/{folder_name(column)}/args.json")):
            if result := read_run(file.parent):
                runs = results.setdefault(file.parts[-3], {})
                runs[column] = result
                first = next(iter(runs))
                if result.settings != runs[first].settings:
                    raise SystemExit(
                        f"In {file.parents[1]}/, {first} has {runs[first].settings} and {column} {result.settings}; "
                        "choose another --folder, or delete what does not belong there."
                    )
    return dict(sorted(results.items()))


def table(results: dict[str, dict[str, Result]], score: Callable[[Result], np.ndarray]) -> str:
    """Markdown: a row for each dataset, a column for each algorithm, mean +- deviation of `score` over seeds."""
    columns = [column for column in COLUMNS if any(column in runs for runs in results.values())]
    lines = ["| | behaviour | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for dataset, runs in results.items():
        cells = [f"{next(iter(runs.values())).behaviour:.1f}"]
        cells += [mean_and_deviation(score(runs[column])) if column in runs else "" for column in columns]
        lines.append(f"| {dataset} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Result]], file: Path) -> None:
    """Learning curves: a panel for each dataset; EDP solid, others dashed, what it replaces in the same colour."""
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 4.5), layout="constrained", squeeze=False)
    for ax, (dataset, runs) in zip(axes[0], results.items()):
        for column, result in runs.items():
            color = f"C{list(COLUMNS).index(column.removeprefix('EDP + '))}"
            style = "-" if column.startswith("EDP") else "--"
            ax.plot(result.updates, result.scores.mean(axis=1), style, color=color, label=column)
        ax.axhline(next(iter(runs.values())).behaviour, color="gray", linestyle=":", label="behaviour")
        ax.set(title=dataset, xlabel="updates")
    axes[0, 0].set_ylabel("score, mean over seeds")
    shown = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(args: Args) -> None:
    if unknown := [column for column in args.columns if column not in COLUMNS]:
        raise SystemExit(f"No column is named {unknown[0]!r}; there are {', '.join(map(repr, COLUMNS))}.")
    if args.jobs < 1:
        raise SystemExit(f"--jobs is {args.jobs}; it has to be at least 1.")
    try:
        shlex.split(args.flags)
        args.folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise SystemExit(f"--flags {args.flags!r} cannot be read: {error}.") from None
    except OSError as error:
        raise SystemExit(f"Cannot write to {args.folder}: {error.strerror}.") from None
    run_all(args)
    results = read_all(args.folder)
    if not results:
        raise SystemExit(f"There is no finished run in {args.folder}/<dataset>/<column>/.")
    print(f"\nLast score\n\n{table(results, lambda result: result.scores[-1])}")
    print(f"\nRAT\n\n{table(results, lambda result: result.scores[-RAT_WINDOW:].mean(axis=0))}")
    draw(results, args.folder / "comparison.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
