"""What runs came to, beside the paper's own numbers: tables, CSV files and pictures.

    python benchmarks/report.py runs/reproduce                         # all runs, and its tables and figures anew
    python benchmarks/report.py runs/reproduce --condense benchmarks/results/mine      # keep it, without checkpoints
    python benchmarks/report.py benchmarks/results/*/ --quiet          # = make figures

A folder has runs below it, or condensed: runs.json (the args.json of each), returns.csv (its eval.csv) and acting.csv.
artefacts.json, if there is one, says which run is which cell; <name>.md, .csv and .png are made from it.
"""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from matplotlib.figure import Figure
from runner import other_settings, read_acting, read_csv
from scipy import stats

from common.harness.run import RAT_WINDOW, mean_and_deviation

PAPER = read_csv(Path(__file__).with_name("paper.csv"))
METRICS = {  # by the paper's names, of scores (evaluations, seeds)
    "last": lambda scores: scores[-1],
    "OMS": lambda scores: scores.max(axis=0),
    "RAT": lambda scores: scores[-RAT_WINDOW:].mean(axis=0),
}
DOMAINS = {"halfcheetah": "locomotion", "hopper": "locomotion", "walker2d": "locomotion", "pen": "adroit"}


class Result(NamedTuple):
    """What is recorded of one run."""

    header: dict  # args.json
    updates: np.ndarray  # (evaluations,)
    scores: np.ndarray  # (evaluations, seeds): means over episodes
    acting: dict[frozenset, np.ndarray]  # scores (seeds,) of the last policy, by the settings that differ

    def samples(self, settings: dict) -> dict[str, np.ndarray]:
        """Scores (seeds,) by metric, if it has finished; with other settings of acting only the last."""
        changed = other_settings(self.header["args"], settings)
        if changed:
            return {"last": self.acting[changed]} if changed in self.acting else {}
        if not len(self.updates) or self.updates[-1] != self.header["args"]["num_updates"]:
            return {}
        return {name: metric(self.scores) for name, metric in METRICS.items() if not settings or name == "last"}


# ------------------------------------------------------------------------------------------------------------ reading


def read_raw(folder: Path) -> dict[str, tuple[dict, list[dict], list[dict]]]:
    """(args.json, rows of eval.csv, rows of acting.csv) of runs by name: condensed ones, and those in folders below."""
    found = {}
    if (folder / "runs.json").exists():
        found = {name: (header, [], []) for name, header in json.loads((folder / "runs.json").read_text()).items()}
        for i, file in enumerate(("returns.csv", "acting.csv"), 1):
            for row in read_csv(folder / file):
                found[row.pop("run")][i].append(row)
    for file in sorted(folder.rglob("args.json")):
        tables = (read_csv(file.with_name(name)) for name in ("eval.csv", "acting.csv"))
        found[file.parent.relative_to(folder).as_posix()] = json.loads(file.read_text()), *tables
    return found


def read_runs(folder: Path) -> dict[str, Result]:
    return {name: result_of(*raw) for name, raw in read_raw(folder).items()}


def result_of(header: dict, returns: list[dict], acting: list[dict]) -> Result:
    """Evaluations that were cut off are left out."""
    shape, (low, high) = (
        [header["args"][n] for n in ("num_seeds", "eval_episodes")],
        header["reference_returns"] or (0, 100),
    )
    score = lambda values: 100 * (np.reshape(values, shape).mean(axis=1) - low) / (high - low)
    evaluations: dict[int, list[float]] = {}
    for row in returns:
        evaluations.setdefault(int(row["update"]), []).append(float(row["return"]))
    scores = {update: score(values) for update, values in evaluations.items() if len(values) == np.prod(shape)}
    acted = {key: score(values) for key, values in read_acting(acting, header["args"]).items()}
    return Result(header, np.array(list(scores), int), np.reshape(list(scores.values()), (-1, shape[0])), acted)


def condense(folder: Path, into: Path) -> None:
    """All runs of `folder`, values as they are written there; without what only their checkpoints need."""
    raw = read_raw(folder)
    headers = {name: {k: v for k, v in header.items() if k != "normalization"} for name, (header, *_) in raw.items()}
    into.mkdir(parents=True, exist_ok=True)
    (into / "runs.json").write_text(json.dumps(headers, indent=1) + "\n")
    for i, file in enumerate(("returns.csv", "acting.csv"), 1):
        write_csv(into / file, [{"run": name} | row for name, tables in raw.items() for row in tables[i]])
    for file in (*folder.glob("artefacts.json"), *folder.glob("speed-*.json")):
        shutil.copy(file, into)


def write_csv(file: Path, rows: list[dict]) -> None:
    if rows:
        with open(file, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def paper_numbers(source: str, column: str, field: str) -> dict[str, str]:
    """By metric, of a column of one of its tables; `field` is a task or a domain."""
    rows = (row for row in PAPER if (row["source"], row["column"]) == (source, column))
    return {row["metric"]: row[field] for row in rows if row[field]}


# ------------------------------------------------------------------------------------------------------------- numbers


def summary(samples: list[np.ndarray]) -> dict[str, float | None]:
    """Of scores (seeds,) of some tasks: mean and deviation over seeds of the mean over tasks; interquartile mean with
    its 95 % interval, from a bootstrap that draws seeds anew within each task (Agarwal et al. 2021)."""
    of_seeds = np.mean([sample[: min(map(len, samples))] for sample in samples], axis=0)
    iqm = lambda *drawn, axis=-1: stats.trim_mean(np.concatenate(drawn, axis=axis), 0.25, axis=axis)
    numbers = {"seeds": len(of_seeds), "mean": of_seeds.mean(), "deviation": None, "iqm": iqm(*samples)}
    if len(of_seeds) == 1:
        return numbers | {"iqm_low": None, "iqm_high": None}
    interval = stats.bootstrap(samples, iqm, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return numbers | {"deviation": of_seeds.std(ddof=1), "iqm_low": interval.low, "iqm_high": interval.high}


def cells_of(artefact: dict, runs: dict[str, Result]) -> list[dict[str, Any]]:
    """A row of the CSV for each cell and metric: the datasets', then the means of domains with several tasks."""
    found, domains = [], {}
    for row in artefact["rows"]:
        marked = bool(row["differs"] or artefact["differs"])
        for column, spec in artefact["columns"].items():
            run = runs.get(row["runs"][column])
            for metric, sample in (run.samples(spec.get("acting", {})) if run else {}).items():
                found.append((row["data"], row["task"], column, metric, [sample], marked))
                if row["task"]:
                    domain = domain_of(row["task"])
                    domains.setdefault((domain, column, metric), []).append((sample, marked))
    for (domain, column, metric), parts in domains.items():
        of = sum(domain_of(task) == domain for task in artefact["tasks"])
        if len(parts) > 1 or artefact["kind"] == "means":
            samples, field = [sample for sample, _ in parts], domain if len(parts) == of else None
            name = f"{domain}, mean of {len(parts)} of {of} tasks"
            found.append((name, field, column, metric, samples, any(marked for _, marked in parts)))
    cells = []
    for data, field, column, metric, samples, marked in found:
        paper = paper_numbers(artefact["source"], column, field) if field else {}
        only = (
            next(iter(paper.values()), "") if list(artefact["metrics"]) == [metric] == ["last"] else ""
        )  # of Table 6: RAT
        number = paper.get(metric, only)
        cell = {"data": data, "column": column, "metric": metric, "scale": artefact["scale"]} | summary(samples)
        cells.append(cell | {"paper": number, "source": number and artefact["source"], "differs": number and marked})
    return cells


def domain_of(task: str) -> str:
    robot = task.partition("-")[0]
    return DOMAINS.get(robot, robot)


# ------------------------------------------------------------------------------------------------------------- tables


def markdown(heading: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in (heading, *lines)]
    return "\n".join([rows[0].replace("|  |", "| |"), "|---" * len(heading) + "|", *rows[1:]])


def table(cells: list[dict], behaviour: dict[str, float]) -> str:
    """Of one metric: a row for each dataset; of each column ours, then the paper's number if there are any."""
    columns = {cell["column"]: any(c["paper"] for c in cells if c["column"] == cell["column"]) for cell in cells}
    heading = ["", "behaviour", *(name for c, printed in columns.items() for name in (c, f"{c}, paper")[: 1 + printed])]
    lines = []
    for data in dict.fromkeys(cell["data"] for cell in cells):
        line = [data, f"{behaviour[data]:.1f}" if data in behaviour else ""]
        for column, printed in columns.items():
            cell = next((c for c in cells if (c["data"], c["column"]) == (data, column)), None)
            ours = f"{cell['mean']:.1f}" if cell else ""
            line.append(ours + (f" +- {cell['deviation']:.1f}" if cell and cell["deviation"] is not None else ""))
            line += [cell["paper"] + "*" * bool(cell["differs"]) if cell else ""] * printed
        lines.append(line)
    return markdown(heading, lines)


def interquartile_means(cells: list[dict]) -> str:
    metrics, lines = list(dict.fromkeys(cell["metric"] for cell in cells)), {}
    for cell in cells:
        interval = "" if cell["iqm_low"] is None else f" [{cell['iqm_low']:.1f}, {cell['iqm_high']:.1f}]"
        key = cell["data"], cell["column"], str(cell["seeds"])
        lines.setdefault(key, {})[cell["metric"]] = f"{cell['iqm']:.1f}{interval}"
    return markdown(
        ["", "", "seeds", *metrics], [[*key, *(of.get(m, "") for m in metrics)] for key, of in lines.items()]
    )


def every_run(runs: dict[str, Result]) -> str:
    """All runs with their scores by all metrics, and at each evaluation if they are few."""
    heading = ["run", "algorithm", "data", "updates", "episodes", "behaviour", *METRICS, "at each evaluation"]
    lines = []
    for name, (header, updates, scores, _) in runs.items():
        line = [name, header["algorithm"], header["dataset"]["dataset"], f"{max(updates, default=0):,}"]
        line += [str(header["args"]["eval_episodes"]), f"{header['dataset']['behaviour_score']:.1f}"]
        line += [mean_and_deviation(metric(scores)) if len(scores) else "" for metric in METRICS.values()]
        lines.append([*line, ", ".join(f"{score:.1f}" for score in scores.mean(axis=1)) if len(scores) <= 10 else ""])
    return markdown(heading, lines)


def every_acting(runs: dict[str, Result]) -> str:
    """The last policies of all runs with other settings of acting."""
    named = lambda key: ", ".join(f"{name} {value}" for name, value in sorted(key)) or "as in the run"
    lines = [[name, named(key), mean_and_deviation(s)] for name, run in runs.items() for key, s in run.acting.items()]
    return markdown(["run", "acting", "score"], lines)


def speed_lines(folder: Path) -> list[list[str]]:
    """Fig. 2 and C.5: updates per second, the paper's, environment steps per second, the paper's."""
    found, lines = json.loads(next(folder.glob("speed-*.json")).read_text()), []
    acts_like = {"dql": "edp_no_dpm_100", "edp_no_ap": "edp_td3bc"}
    for entry in ("dql", "edp_no_ap", "edp_no_dpm_100", "edp_td3bc", "td3bc"):
        row, steps = found["updates"][entry], found["acting"][acts_like.get(entry, entry)]["environment"]
        paper = {}
        for source in ("C.5", "Fig. 2"):
            paper |= paper_numbers(source, entry, "walker2d-medium-expert")
        line = [row["label"], f"{row['per_second']:.4g}", paper["updates per second"], f"{steps['per_second']:.4g}"]
        lines.append([*line, paper.get("environment steps per second", "")])
    return lines


# ----------------------------------------------------------------------------------------------------------- pictures


def draw_curves(artefact: dict, runs: dict[str, Result], file: Path) -> None:
    """RAT and, below it, OMS so far against updates, for each dataset; EDP solid, its counterparts dashed."""
    so_far = {
        "RAT": lambda scores: [METRICS["RAT"](scores[: i + 1]) for i in range(len(scores))],
        "OMS": np.maximum.accumulate,
    }
    rows, base = artefact["rows"], lambda column: column.removeprefix("EDP + ")
    colors = list(dict.fromkeys(map(base, artefact["columns"])))
    figure = Figure(figsize=(max(4 * len(rows), 6), 7), layout="constrained")
    axes = figure.subplots(2, len(rows), squeeze=False, sharex="col", sharey="col")
    for axes_of_metric, (metric, curve) in zip(axes, so_far.items()):
        for ax, row in zip(axes_of_metric, rows):
            for column in artefact["columns"]:
                run = runs.get(row["runs"][column])
                if run and len(run.updates):
                    style = {
                        "linestyle": "-" if base(column) != column else "--",
                        "color": f"C{colors.index(base(column))}",
                    }
                    ax.plot(run.updates, np.mean(curve(run.scores), axis=1), label=column, **style)
                    ax.axhline(run.header["dataset"]["behaviour_score"], color="gray", linestyle=":", label="behaviour")
            ax.set(title=f"{row['data']}: {metric}", xlabel="updates", ylabel="score, mean over seeds")
    save(figure, axes, file)


def draw_sweep(artefact: dict, cells: list[dict], file: Path) -> None:
    """Score of the last policies against a setting of acting, with the deviation over seeds."""
    figure, columns = Figure(figsize=(7, 5), layout="constrained"), artefact["columns"]
    ax, setting = figure.subplots(), list(next(iter(columns.values()))["acting"])[-1]
    for data in dict.fromkeys(cell["data"] for cell in cells):
        of = [cell for cell in cells if cell["data"] == data]
        x = [columns[cell["column"]]["acting"][setting] for cell in of]
        ax.errorbar(x, [c["mean"] for c in of], [c["deviation"] or 0 for c in of], marker="o", capsize=3, label=data)
    scale = "log" if setting == "num_eval_actions" else "linear"
    ax.set(xlabel=setting.replace("_", " "), ylabel="score", title=artefact["title"], xscale=scale)
    save(figure, np.array([ax]), file)


def draw_speed(lines: list[list[str]], file: Path) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes, y = figure.subplots(1, 2, sharey=True), np.arange(len(lines))
    for ax, first, name in zip(axes, (1, 3), ("updates per second", "environment steps per second")):
        for i, label in enumerate(("here", "paper, another machine")):
            ax.barh(y + 0.4 * i - 0.2, [float(line[first + i] or "nan") for line in lines], 0.38, label=label)
        ax.set(xscale="log", xlabel=name)
    axes[0].set_yticks(y, [line[0] for line in lines])
    axes[0].invert_yaxis()
    save(figure, axes, file)


def save(figure: Figure, axes: np.ndarray, file: Path) -> None:
    shown = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(file, dpi=110)


# ------------------------------------------------------------------------------------------------------------ reports


def write_report(folder: Path, name: str, artefact: dict, runs: dict[str, Result]) -> str:
    """Writes <name>.md, <name>.csv and <name>.png of an entry of artefacts.json; returns the Markdown."""
    file, parts = folder / name, [f"# {artefact['title']}", f"`{artefact['command']}`"]
    picture, csv_file = file.with_suffix(".png"), file.with_suffix(".csv")
    if artefact["kind"] in ("lines", "speed"):
        lines = speed_lines(folder) if artefact["kind"] == "speed" else artefact["lines"]
        parts.append(markdown(artefact["heading"], lines))
        write_csv(csv_file, [dict(zip(artefact["heading"], line)) for line in lines])
        if artefact["kind"] == "speed":
            draw_speed(lines, picture)
    else:
        cells, behaviour = cells_of(artefact, runs), {}
        for row in artefact["rows"]:
            of = (runs[run].header["dataset"] for run in row["runs"].values() if run in runs)
            behaviour[row["data"]] = next(of, {"behaviour_score": np.nan})["behaviour_score"]
        shown = [c for c in cells if artefact["kind"] != "means" or c["data"] not in behaviour] or cells
        names = {"last": "Last score", "OMS": "OMS, the best evaluation", "RAT": "RAT, the mean of the last ten"}
        for metric in artefact["metrics"]:
            parts += [f"{names[metric]}:", table([cell for cell in shown if cell["metric"] == metric], behaviour)]
        if any(cell["differs"] for cell in cells):
            texts = [*artefact["differs"], *(text for row in artefact["rows"] for text in row["differs"])]
            parts += ["\\* These numbers of the paper are of other data or another protocol than ours:"]
            parts += ["\n".join(f"- {text}" for text in dict.fromkeys(texts))]
        parts += ["Interquartile means over seeds with 95 % bootstrap intervals:", interquartile_means(cells)]
        unfinished = [run for row in artefact["rows"] for run in row["runs"].values() if run not in runs]
        parts += [f"Without {', '.join(unfinished)}: not run, or not to the end."] if unfinished else []
        write_csv(csv_file, cells)
        if artefact["kind"] == "sweep":
            draw_sweep(artefact, cells, picture)
        else:
            draw_curves(artefact, runs, picture)
    parts += [f"![{artefact['title']}]({picture.name})"] if picture.exists() else []
    file.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    return file.with_suffix(".md").read_text()


@dataclass(frozen=True)
class Args:
    """Tables of the runs in folders; the tables and figures of their artefacts."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """with runs, or with condensed ones"""
    condense: Path | None = None
    """a folder to keep the runs of the one folder in"""
    quiet: bool = False
    """print the names of the files that are written, no tables"""


def main(args: Args) -> None:
    if args.condense is not None and len(args.folders) != 1:
        raise SystemExit("--condense takes the runs of one folder.")
    for folder in args.folders:
        runs, manifest = read_runs(folder), folder / "artefacts.json"
        artefacts = json.loads(manifest.read_text()) if manifest.exists() else {}
        if not runs and not artefacts:
            raise SystemExit(f"There are no runs in {folder}/.")
        if args.condense is not None:
            condense(folder, args.condense)
        if not args.quiet:
            print(every_run(runs) + "\n")
            print(every_acting(runs) + "\n" if any(run.acting for run in runs.values()) else "", end="")
        for name, artefact in artefacts.items():
            text = write_report(folder, name, artefact, runs)
            print(f"{folder / name}.md" if args.quiet else text)


if __name__ == "__main__":
    main(tyro.cli(Args))
