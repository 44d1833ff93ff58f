"""EDP against the policies that it replaces: Table 2 of the paper, on data, seeds and updates of your choice.

    python benchmarks/compare.py --data pointmaze-umaze dapg/pen/expert-v0 --flags="--num-updates 10000 --num-seeds 3"
    python benchmarks/compare.py --data --folder benchmarks/results/comparison   # runs nothing: tables of what is there

Every algorithm runs on every dataset (the name of a task, or the id of a Minari dataset) with the same --flags, each
into <folder>/<dataset>/<algorithm>/. What has run already is not run again, so an interrupted comparison can go on.
`--condense <other folder>` keeps all runs below <folder>/, of whatever name, in three files: runs.json (the args.json
of each), returns.csv (its eval.csv) and acting.csv, if there is one. Such a folder is read like the runs themselves.
On a CPU `--jobs 2` gives each of two runs half of the cores, which is faster than one after the other on all of them:
the networks are small.

Prints the tables of the last score and of RAT (the mean of the last ten evaluations, or of all if there are fewer),
means and deviations over seeds, and draws the learning curves: <folder>/comparison.png.
"""

import csv
import itertools
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

from common.harness.run import RAT_WINDOW, mean_and_deviation
from common.harness.tasks import TASKS

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
    """tasks (`python -m common.harness.tasks` lists them) and ids of Minari datasets"""
    columns: tuple[str, ...] = tuple(COLUMNS)
    """algorithms, by their names in the table"""
    flags: str = ""
    """of every run alike: --flags="--num-updates 1000 ..." with the sign of equality"""
    jobs: int = 1
    """runs at a time, on CPU each on its share of the cores"""
    folder: Path = Path("runs/comparison")
    """where the runs are, and go"""
    condense: Path | None = None
    """a folder to keep all of them in, in three files"""


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
    """Runs what is not there yet, `args.jobs` at a time. A run that fails does not stop the others."""
    there, missing = read_runs(args.folder), []
    for dataset, column in itertools.product(args.data, args.columns):
        name = f"{folder_name(dataset)}/{folder_name(column)}"
        if name not in there and not (args.folder / name).exists():
            missing.append((args.folder / name, column, dataset))
        elif name not in there or result_of(*there[name]) is None:
            raise SystemExit(f"{args.folder / name}/ holds a run that was cut off; delete it to run it again.")

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


def read_csv(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def read_runs(folder: Path) -> dict[str, tuple[dict, list[dict]]]:
    """(args.json, rows of eval.csv) of runs by name: those condensed in `folder`, those with a folder below it."""
    runs = {}
    if (folder / "runs.json").exists():
        runs = {name: (header, []) for name, header in json.loads((folder / "runs.json").read_text()).items()}
        for row in read_csv(folder / "returns.csv"):
            runs[row["run"]][1].append(row)
    for file in sorted(folder.rglob("eval.csv")):
        header = json.loads(file.with_name("args.json").read_text())
        runs[file.parent.relative_to(folder).as_posix()] = header, read_csv(file)
    return runs


def condense(folder: Path, into: Path) -> None:
    """All runs of `folder`, values as they are written there; without what only their checkpoints need."""
    runs, columns = read_runs(folder), ["run", "seed", "update", "episode", "return", "length"]
    headers = {name: {k: v for k, v in header.items() if k != "normalization"} for name, (header, _) in runs.items()}
    tables = {"returns.csv": (columns, [row | {"run": name} for name, (_, rows) in runs.items() for row in rows])}
    files = sorted(folder.rglob("acting.csv"))
    acting = [{"run": file.parent.relative_to(folder).as_posix()} | row for file in files for row in read_csv(file)]
    if acting:
        tables["acting.csv"] = list(acting[0]), acting
    into.mkdir(parents=True, exist_ok=True)
    (into / "runs.json").write_text(json.dumps(headers, indent=1) + "\n")
    for name, (columns, rows) in tables.items():
        with open(into / name, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def result_of(header: dict, rows: list[dict[str, str]]) -> Result | None:
    """The scores of a run, from its args.json and its raw returns; None if it has not finished."""
    args = header["args"]
    if not rows or int(rows[-1]["update"]) != args["num_updates"]:
        return None
    updates = np.unique([int(row["update"]) for row in rows])
    returns = np.reshape([float(row["return"]) for row in rows], (len(updates), args["num_seeds"], -1))
    low, high = header["reference_returns"] or (0, 100)
    scores = 100 * (returns.mean(axis=2) - low) / (high - low)
    settings = {name: args[name] for name in ("num_updates", "batch_size", "seed", "num_seeds")}
    return Result(settings, updates, scores, header["dataset"]["behaviour_score"])


def read_all(folder: Path) -> dict[str, dict[str, Result]]:
    """Finished runs by dataset and column, both in the order of the table; exits if a dataset's are not comparable."""
    results: dict[str, dict[str, Result]] = {}
    for column, (name, run) in itertools.product(COLUMNS, sorted(read_runs(folder).items())):
        dataset, _, last = name.rpartition("/")
        if last == folder_name(column) and (result := result_of(*run)):
            runs = results.setdefault(dataset, {})
            runs[column] = result
            first = next(iter(runs))
            if result.settings != runs[first].settings:
                raise SystemExit(
                    f"In {folder / dataset}/, {first} has {runs[first].settings} and {column} {result.settings}; "
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
    if args.condense is not None:
        condense(args.folder, args.condense)
    results = read_all(args.folder)
    if not results:
        raise SystemExit(f"There is no finished run in {args.folder}/<dataset>/<column>/.")
    print(f"\nLast score\n\n{table(results, lambda result: result.scores[-1])}")
    print(f"\nRAT\n\n{table(results, lambda result: result.scores[-RAT_WINDOW:].mean(axis=0))}")
    draw(results, args.folder / "comparison.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
