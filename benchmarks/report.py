"""What runs came to, beside the paper's own numbers: tables, CSV files and pictures.

    python benchmarks/report.py runs/reproduce                         # all runs, and its tables and figures anew
    python benchmarks/report.py runs/reproduce --condense benchmarks/results/mine      # keep it, without checkpoints
    make figures                                                       # of all of benchmarks/results/

A folder has runs below it, or condensed: runs.json (the args.json of each), returns.csv (its eval.csv) and acting.csv.
artefacts.json, if there is one, says which run is which cell; <name>.md, .csv and .png are made from it. Where it says
"alone", <name>-<algorithm>.md and .png are made, too: the table and the curves on the page of each algorithm. Of its
"pairs" of columns <name>-pairs.csv and .png tell how they compare.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
import csv
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pairs
import tyro
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from runner import Result, other_settings, read_csv, read_run, result_of

from common.harness.checkpoint import write_atomically
from common.harness.recorder import RAT_WINDOW, mean_and_deviation
from common.harness.tasks import TASKS

PAPER = read_csv(Path(__file__).with_name("paper.csv"))
METRICS = {  # by the paper's names, of scores (evaluations, seeds)
    "last": lambda scores: scores[-1],
    "OMS": lambda scores: scores.max(axis=0),
    "RAT": lambda scores: scores[-RAT_WINDOW:].mean(axis=0),
}
NAMES = {"last": "Last score", "OMS": "OMS, the best evaluation", "RAT": "RAT, the mean of the last ten"}

# ------------------------------------------------------------------------------------------------------------ reading


def read_raw(folder: Path) -> dict[str, tuple[dict, list[dict], list[dict]]]:
    """(args.json, rows of eval.csv, rows of acting.csv) of runs by name: condensed ones, and those in folders below."""
    found = {}
    if (folder / "runs.json").exists():
        found = {name: (header, [], []) for name, header in json.loads((folder / "runs.json").read_text()).items()}
        for i, file in enumerate(("returns.csv", "acting.csv"), 1):
            for row in read_csv(folder / file):
                found[row.pop("run")][i].append(row)
    files = sorted(folder.rglob("args.json"))
    return found | {file.parent.relative_to(folder).as_posix(): read_run(file.parent) for file in files}


def read_runs(folder: Path) -> dict[str, Result]:
    return {name: result_of(*raw) for name, raw in read_raw(folder).items()}


def condense(folder: Path, into: Path) -> None:
    """All runs of `folder`, values as they are written there; without where they were and what checkpoints need."""
    raw, headers = read_raw(folder), {}
    if lacking := read_raw(into).keys() - raw.keys():
        raise SystemExit(f"{into}/ keeps {len(lacking)} runs that {folder}/ does not have; choose another folder.")
    for name, (header, *_) in raw.items():
        headers[name] = {key: value for key, value in header.items() if key != "normalization"}
        path = header["args"].get("dataset_path")
        headers[name]["args"] = header["args"] | {"run_dir": None, "dataset_path": path and Path(path).name}
    into.mkdir(parents=True, exist_ok=True)
    text = json.dumps(headers, indent=1).encode() + b"\n"
    write_atomically(into / "runs.json", lambda stream: stream.write(text))
    for i, file in enumerate(("returns.csv", "acting.csv"), 1):
        write_csv(into / file, [{"run": name} | row for name, tables in raw.items() for row in tables[i]])
    if (folder / "artefacts.json").exists():
        shutil.copy(folder / "artefacts.json", into)


def write_csv(file: Path, rows: list[dict]) -> None:
    """In place of what is there, all at once; a row may lack columns that another has. No rows, no file."""
    if not rows:
        return file.unlink(missing_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(itertools.chain(*rows))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, lambda stream: stream.write(text.getvalue().encode()))


def paper_numbers(source: str, column: str, field: str | None) -> dict[str, str]:
    """By metric, of a column of one of its tables; `field` is a task or a domain."""
    rows = (row for row in PAPER if (row["source"], row["column"]) == (source, column))
    return {row["metric"]: row[field] for row in rows if row.get(field)}


# ------------------------------------------------------------------------------------------------------------ numbers


def sample_of(run: Result | None, settings: dict, metric: str) -> np.ndarray | None:
    """Scores (seeds,) of a finished run; with settings of acting, of its last policy alone."""
    if run is None or (settings and metric != "last"):
        return None
    if changed := other_settings(run.header["args"], settings):
        return run.acting.get(changed)
    return METRICS[metric](run.scores) if run.header["args"]["num_updates"] in run.updates else None


def scores_of(run: Result | None, settings: dict) -> np.ndarray | None:
    """Scores (evaluations, seeds) of a finished run; with settings of acting, of its last policy alone."""
    last = sample_of(run, settings, "last")
    return last if last is None else last[None] if settings else run.scores


def summary(samples: list[np.ndarray]) -> dict[str, float | None]:
    """Of scores (seeds,) of some tasks: mean and deviation over seeds of the mean over tasks; interquartile mean with
    its 95 % interval, from a bootstrap that draws seeds anew within each task (Agarwal et al. 2021), or None of one
    seed, and of fewer than five scores in all, whose range it would be."""
    of_seeds = np.mean([sample[: min(map(len, samples))] for sample in samples], axis=0)
    numbers = {"seeds": len(of_seeds), "mean": of_seeds.mean(), "deviation": None, "iqm": pairs.iqm(samples)}
    if len(of_seeds) > 1:
        numbers["deviation"] = of_seeds.std(ddof=1)
    if len(of_seeds) == 1 or len(of_seeds) * len(samples) < 5:
        return numbers | {"iqm_low": None, "iqm_high": None}
    iqm = pairs.estimate(lambda scores, _, axis: pairs.iqm(scores, axis), samples, [])
    return numbers | {"iqm_low": iqm.low, "iqm_high": iqm.high}


def lines_of(artefact: dict, runs: dict[str, Result]) -> list[tuple[str, str | None, list[dict]]]:
    """(name, the paper's field, rows to take the mean of): the datasets, then the domains with several tasks, or, of
    datasets that are none of the paper's, all of them if they have scores. Of means, these without the datasets."""
    lines = [(row["data"], row["task"], [row]) for row in artefact["rows"]]
    for domain in dict.fromkeys(domain_of(row["task"]) for row in artefact["rows"] if row["task"]):
        rows = [row for row in artefact["rows"] if row["task"] and domain_of(row["task"]) == domain]
        of = [domain_of(task) for task in TASKS if task in PAPER[0]].count(domain)
        if len(rows) > 1 or artefact["kind"] == "means":
            lines.append((f"{domain}, mean of {len(rows)} of {of} tasks", domain if len(rows) == of else None, rows))
    found = [runs[run] for row in artefact["rows"] for run in row["runs"].values() if run in runs]
    local = not any(row["task"] for row in artefact["rows"])
    if local and len(artefact["rows"]) > 1 and all(run.header["reference_returns"] for run in found):
        lines.append((f"all {len(artefact['rows'])}", None, artefact["rows"]))
    return (artefact["kind"] == "means" and lines[len(artefact["rows"]) :]) or lines


def cells_of(artefact: dict, runs: dict[str, Result]) -> list[dict[str, Any]]:
    """A row of the CSV for each line, column and metric."""
    cells = []
    for (data, field, rows), (column, spec) in itertools.product(lines_of(artefact, runs), artefact["columns"].items()):
        paper, differs = paper_numbers(artefact["source"], column, field), [row["differs"] for row in rows]
        if list(artefact["metrics"]) == ["last"]:
            paper["last"] = paper.get("RAT", "")  # of Table 6
        for metric in METRICS:
            samples = [sample_of(runs.get(row["runs"][column]), spec.get("acting", {}), metric) for row in rows]
            if all(sample is not None for sample in samples):
                cell = {"data": data, "column": column, "metric": metric, "scale": artefact["scale"]}
                cell |= summary(samples) | {"paper": paper.get(metric, "")}
                cell["source"] = cell["paper"] and artefact["source"]
                cell["differs"] = cell["paper"] and any([artefact["differs"], *differs])
                cells.append(cell)
    return cells


def behaviour_scores(artefact: dict, runs: dict[str, Result]) -> dict[str, float]:
    names = ((row["data"], run) for row in artefact["rows"] for run in row["runs"].values())
    return {data: runs[run].header["dataset"]["behaviour_score"] for data, run in names if run in runs}


def domain_of(task: str) -> str:
    return TASKS[task].environment.domain.name


# ------------------------------------------------------------------------------------------------------------- tables


def markdown(lines: list[dict[str, str]]) -> str:
    rows = ["| " + " | ".join(row) + " |" for row in (lines[0], *(line.values() for line in lines))]
    return "\n".join([rows[0].replace("|  |", "| |"), "|---" * len(lines[0]) + "|", *rows[1:]])


def table(cells: list[dict], behaviour: dict[str, float], text: Callable[[dict], str]) -> str:
    """A row for each dataset; of each column `text`, then the paper's number if there are any."""
    blank = {"behaviour": ""} if any(cell["data"] in behaviour for cell in cells) else {}
    for column in dict.fromkeys(cell["column"] for cell in cells):
        printed = any(cell["paper"] for cell in cells if cell["column"] == column)
        blank |= {column: ""} | ({f"{column}, paper": ""} if printed else {})
    lines = {cell["data"]: {"": cell["data"]} | blank for cell in cells}
    for data in behaviour.keys() & lines.keys():
        lines[data]["behaviour"] = f"{behaviour[data]:.1f}"
    for cell in cells:
        lines[cell["data"]][cell["column"]] = text(cell)
        if cell["paper"]:
            lines[cell["data"]][f"{cell['column']}, paper"] = cell["paper"] + "*" * bool(cell["differs"])
    return markdown(list(lines.values()))


def tables(artefact: dict, cells: list[dict], behaviour: dict[str, float]) -> list[str]:
    """Of each metric the means and the interquartile means; what is not as in the paper."""
    if artefact["kind"] == "sweep":  # a row for each setting
        cells = [cell | {"data": cell["column"], "column": cell["data"]} for cell in cells]
    parts = []
    for metric in artefact["metrics"]:
        if of := [cell for cell in cells if cell["metric"] == metric]:
            parts += [f"{NAMES[metric]}, mean and deviation over seeds:", table(of, behaviour, mean)]
            parts.append(f"{NAMES[metric]}, interquartile mean over seeds with its 95 % bootstrap interval:")
            parts.append(table([cell | {"paper": ""} for cell in of], behaviour, interquartile_mean))
    if texts := [*artefact["differs"], *(text for row in artefact["rows"] for text in row["differs"])]:
        parts.append("Not as in the paper (a star marks its numbers that do not compare):")
        parts.append("\n".join(f"- {text}" for text in dict.fromkeys(texts)))
    return parts


def mean(cell: dict) -> str:
    return f"{cell['mean']:.1f}" + ("" if cell["deviation"] is None else f" ± {cell['deviation']:.1f}")


def interquartile_mean(cell: dict) -> str:
    return f"{cell['iqm']:.1f}" + ("" if cell["iqm_low"] is None else " [{iqm_low:.1f}, {iqm_high:.1f}]".format(**cell))


def every_run(runs: dict[str, Result]) -> str:
    """All runs with their scores by all metrics, and at each evaluation if they are few; then with other acting."""
    lines = []
    for name, (header, updates, scores, acting) in runs.items():
        about = {"run": name, "acting": "", "algorithm": header["algorithm"], "data": header["dataset"]["dataset"]}
        about |= {"updates": f"{max(updates, default=0):,}", "episodes": str(header["args"]["eval_episodes"])}
        about |= {"behaviour": f"{header['dataset']['behaviour_score']:.1f}"}
        about |= dict.fromkeys([*METRICS, "at each evaluation"], "")
        results = {metric: mean_and_deviation(of(scores)) for metric, of in METRICS.items() if updates}
        each = ", ".join(f"{score:.1f}" for score in scores.mean(axis=1)) if len(scores) <= 10 else ""
        lines.append(about | results | {"at each evaluation": each})
        for changed, of_seeds in acting.items():
            settings = ", ".join(map(" ".join, sorted(changed))) or "again"
            lines.append(about | {"acting": settings, "last": mean_and_deviation(of_seeds)})
    return markdown(lines)


# ----------------------------------------------------------------------------------------------------------- pictures


def groups_of(columns: Iterable[str]) -> list[list[str]]:
    """What is compared in a panel: EDP and its counterpart, and all that have none; without a pair, each column with
    the first one."""
    by_base = {}
    for column in columns:
        by_base.setdefault(column.removeprefix("EDP + "), []).append(column)
    pairs = [pair for pair in by_base.values() if len(pair) == 2]
    if pairs:
        rest = [column for group in by_base.values() if len(group) == 1 for column in group]
        return pairs + [rest] * bool(rest)
    first, *others = columns
    return [[first, other] for other in others] or [[first]]


def draw_curves(artefact: dict, runs: dict[str, Result], behaviour: dict[str, float], file: Path) -> None:
    """RAT so far against updates, a row for each dataset or, of means, for each mean, and a panel for each group of
    columns, EDP solid; the other columns are thin and gray. Of a single dataset or mean whose columns have "seconds",
    the processor time of an update: a second row, against that."""
    rat = lambda scores: [METRICS["RAT"](scores[: i + 1]) for i in range(len(scores))]
    lines = lines_of(artefact, runs)[: None if artefact["kind"] == "means" else len(artefact["rows"])]
    rows = [(line, "updates") for line in lines]
    if len(lines) == 1 and any("seconds" in spec for spec in artefact["columns"].values()):
        rows.append((lines[0], "processor seconds"))
    names = [name for name, spec in artefact["columns"].items() if "acting" not in spec]
    begun = [name for name in names if any(row["runs"][name] in runs for row in artefact["rows"])]
    groups = groups_of(begun or names)
    chunks = -(-len(groups) // 4)  # at most four panels side by side
    width = -(-len(groups) // chunks)
    size = max(4.5, min(7.4, 2.4 * width)), chunks * (0.35 + 1.75 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(chunks * len(rows), width, squeeze=False, sharey="row")
    for i, j in np.ndindex(*axes.shape):
        ax, row, at = axes[i, j], i % len(rows), i // len(rows) * width + j
        if at >= len(groups):
            ax.set_axis_off()
            continue
        (name, _, of), unit = rows[row]
        for column, spec in artefact["columns"].items():
            found = [run for one in of if (run := runs.get(one["runs"][column])) and run.updates]
            each = 1 if unit == "updates" else spec.get("seconds")
            together = len(found) == len(of) and all(run.updates == found[0].updates for run in found)
            if together and each and "acting" not in spec:
                scores = np.mean([np.mean(rat(run.scores), axis=1) for run in found], axis=0)
                style = {"color": "0.8", "linewidth": 0.7, "zorder": 1}
                if column in groups[at]:
                    place = groups[at].index(column)
                    dashed = len(groups[at]) == 2 and f"EDP + {column}" in groups[at]
                    style = {"color": f"C{place}", "linestyle": "--" if dashed else "-", "label": column}
                ax.plot(np.multiply(found[0].updates, each), scores, **style)
        of_data = [behaviour.get(one["data"]) for one in of]
        if None not in of_data:
            ax.axhline(np.mean(of_data), color="gray", linestyle=":", linewidth=1)
        ax.tick_params(labelsize=7)
        ax.locator_params(nbins=4)
        if row == len(rows) - 1 and (shown := labelled(axes[i - row : i + 1, j])):  # a run may be missing in the first
            style = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "frameon": False, "borderpad": 0.1}
            axes[i - row, j].legend(shown.values(), shown.keys(), fontsize=8, **style)
        if row == len(rows) - 1 or unit != rows[row + 1][1]:
            ax.set_xlabel(unit, fontsize=8)
        if j == 0:
            ax.set_ylabel("\n".join([*name.rsplit("/", 1), "RAT"]), fontsize=8)
    save(figure, axes, file, legend=False)


def draw_alone(artefact: dict, of: list[str], runs: dict[str, Result], behaviour: dict[str, float], file: Path) -> None:
    """Score against updates, a panel for each dataset: the columns `of` with the range of their seeds; others gray."""
    figure = Figure(figsize=(6.4, 0.6 + 2 * -(-len(artefact["rows"]) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(artefact["rows"]) // 3), 3, sharex=True, sharey=True, squeeze=False)
    for ax, row in zip(axes.flat, artefact["rows"]):
        begun = {column: run for column in artefact["columns"] if (run := runs.get(row["runs"][column]))}
        for column, (_, updates, scores, _) in begun.items():
            thousands = np.divide(updates, 1000)
            style = {"color": "0.65", "linewidth": 0.8, "zorder": 1, "label": "all others"}
            if column in of:
                style = {"color": f"C{(1 - of.index(column)) % 10}", "marker": "o", "markersize": 4, "label": column}
                ax.fill_between(thousands, *np.quantile(scores, [0, 1], axis=1), color=style["color"], alpha=0.2)
            ax.plot(thousands, scores.mean(axis=1), **style)
        if row["data"] in behaviour:
            ax.axhline(behaviour[row["data"]], color="black", linestyle=":", linewidth=1, label="the data")
        ax.set_title(short(row["data"], "\n"), fontsize=11.5)
        ax.tick_params(labelsize=11.5)
    figure.supxlabel("thousand updates", fontsize=11.5)
    figure.supylabel("score", fontsize=11.5)
    save(figure, axes, file, loc="outside upper center", ncols=4, fontsize=11.5, labelcolor="linecolor", frameon=False)


def draw_sweep(artefact: dict, cells: list[dict], behaviour: dict[str, float], file: Path) -> None:
    """Score of the last policies against a setting of acting, with the deviation over seeds."""
    figure, columns = Figure(figsize=(7, 5), layout="constrained"), artefact["columns"]
    ax, setting = figure.subplots(), list(next(iter(columns.values()))["acting"])[-1]
    for i, (data, of) in enumerate(itertools.groupby(cells, key=lambda cell: cell["data"])):
        points = [(columns[c["column"]]["acting"][setting], c["mean"], c["deviation"] or 0) for c in of]
        ax.errorbar(*zip(*points), color=f"C{i}", marker="o", capsize=3, label=data)
        if data in behaviour:
            ax.axhline(behaviour[data], color=f"C{i}", linestyle=":", label=f"behaviour of {data}")
    scale = "log" if setting == "num_eval_actions" else "linear"
    ax.set(xlabel=setting.replace("_", " "), ylabel="score", title=artefact["title"], xscale=scale)
    values = [spec["acting"][setting] for spec in columns.values()]
    ax.set_xticks(values, map(str, values))
    ax.minorticks_off()
    save(figure, np.array([ax]), file)


def draw_speed(lines: list[dict[str, str]], file: Path) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes, y = figure.subplots(1, 2, sharey=True), np.arange(len(lines))
    for ax, unit in zip(axes, ("updates per second", "environment steps per second")):
        for i, (name, label) in enumerate({unit: "here", f"{unit}, paper": "paper, another machine"}.items()):
            bars = ax.barh(y + 0.4 * i - 0.2, [float(line[name] or "nan") for line in lines], 0.38, label=label)
            ax.bar_label(bars, [line[name] for line in lines], padding=2)
        ax.set(xscale="log", xlabel=unit, xmargin=0.2)
        ax.xaxis.set_minor_formatter("")
    axes[0].set_yticks(y, [line[""] for line in lines])
    axes[0].invert_yaxis()
    save(figure, axes, file)


def short(data: str, between: str) -> str:
    """edp/hopper/medium-v1 and pointmaze-large in two lines."""
    return re.sub(r"[/-]", between, re.sub(r"^edp/|-v\d+$", "", data), count=1)


def labelled(axes: Iterable[Axes]) -> dict[str, Artist]:
    """What a legend of all these shows."""
    return {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels())}


def save(figure: Figure, axes: np.ndarray, file: Path, legend: bool = True, **style) -> None:
    if legend:
        shown = labelled(axes.flat)
        style = {"loc": "outside lower center", "ncols": 3, "fontsize": "small"} | style
        figure.legend(shown.values(), shown.keys(), **style)
    figure.savefig(file, dpi=150)


# ------------------------------------------------------------------------------------------------------------ reports


def write_report(folder: Path, name: str, artefact: dict, runs: dict[str, Result]) -> str:
    """Writes <name>.md, <name>.csv and <name>.png of an entry of artefacts.json; returns the Markdown."""
    parts = [f"# {artefact['title']}", f"`{artefact['command']}`"]
    picture, kind = folder / f"{name}.png", artefact["kind"]
    if "lines" in artefact:
        rows = artefact["lines"]
        parts.append(markdown(rows))
    else:
        rows, behaviour = cells_of(artefact, runs), behaviour_scores(artefact, runs)
        parts += tables(artefact, rows, behaviour)
        columns = [(name, spec.get("acting", {})) for name, spec in artefact["columns"].items()]
        cells = [(runs.get(row["runs"][name]), acting) for row in artefact["rows"] for name, acting in columns]
        finished = sum(sample_of(*cell, "last") is not None for cell in cells)
        if finished < len(cells):
            parts.append(f"{finished} of {len(cells)} cells are finished; the others have no numbers.")
    write_csv(folder / f"{name}.csv", rows)
    if kind == "speeds":
        draw_speed(rows, picture)
    elif kind == "sweep":
        draw_sweep(artefact, rows, behaviour, picture)
    elif kind != "hyperparameters":
        draw_curves(artefact, runs, behaviour, picture)
    if artefact.get("alone"):
        write_alone(folder, name, artefact, rows, runs)
    if artefact.get("pairs"):
        parts += write_pairs(folder, name, artefact, runs)
    parts += [f"![{artefact['title']}]({picture.name})"] if picture.exists() else []
    (folder / f"{name}.md").write_text(text := "\n\n".join(parts) + "\n")
    return text


def write_alone(folder: Path, name: str, artefact: dict, cells: list[dict], runs: dict[str, Result]) -> None:
    """Writes <name>-<algorithm>.md and .png, the last scores and the curves of each algorithm, for its page."""
    behaviour, columns = behaviour_scores(artefact, runs), {}
    finished = dict.fromkeys(cell["column"] for cell in cells)
    for column in (column for column in artefact["columns"] if column in finished):
        (run, *_) = (row["runs"][column] for row in artefact["rows"] if row["runs"][column] in runs)
        columns.setdefault(runs[run].header["algorithm"], []).append(column)
    for algorithm, of in columns.items():
        rows = [cell for cell in cells if cell["column"] in of and cell["metric"] == "last"]
        (folder / f"{name}-{algorithm}.md").write_text(table(rows, behaviour, mean) + "\n")
        draw_alone(artefact, of, runs, behaviour, folder / f"{name}-{algorithm}.png")


def write_pairs(folder: Path, name: str, artefact: dict, runs: dict[str, Result]) -> list[str]:
    """Writes <name>-pairs.csv and .png, of each pair on the datasets where both are there; returns the Markdown.

    They need two seeds, and two datasets with scores, of which one is left out in turn. If one of a pair acts with
    other settings than in training, last policies alone are compared: no others were evaluated so.
    """
    found = {}
    for pair in artefact["pairs"]:
        specs = [(column, artefact["columns"][column].get("acting", {})) for column in pair]
        first = -1 if any(acting for _, acting in specs) else 0
        cells = ([(runs.get(row["runs"][name]), acting) for name, acting in specs] for row in artefact["rows"])
        scored = (of for of in cells if all(run and run.header["reference_returns"] for run, _ in of))
        both = ([scores_of(*cell) for cell in of] for of in scored)
        there = (of for of in both if all(scores is not None and scores.shape[1] > 1 for scores in of))
        both = [[scores[first:] for scores in of] for of in there]
        found |= {tuple(pair): [*zip(*both)]} if len(both) > 1 else {}
    if not found:
        for file in folder.glob(f"{name}-pairs.*"):
            file.unlink()
        return []
    last = {pair: [[scores[-1] for scores in of] for of in both] for pair, both in found.items()}
    policies = {pair: [[scores.ravel() for scores in of] for of in both] for pair, both in found.items()}
    rows = pairs.rows_of(last, planned=len(artefact["pairs"]) * len(artefact["rows"]))
    write_csv(folder / f"{name}-pairs.csv", rows)
    pairs.draw(last, policies).savefig(folder / f"{name}-pairs.png", dpi=150)
    picture = f"![share of runs above a score; expected score of the best of some policies]({name}-pairs.png)"
    return ["Differences of the last scores:", markdown(pairs.lines_of(rows)), picture]


def write_reports(folder: Path, names: Iterable[str] | None = None) -> None:
    """Of all artefacts of a folder, or of those named."""
    manifest, runs = folder / "artefacts.json", read_runs(folder)
    artefacts = json.loads(manifest.read_text()) if manifest.exists() else {}
    for name in artefacts if names is None else names:
        write_report(folder, name, artefacts[name], runs)
        print(f"{folder / name}.md")


@dataclass(frozen=True)
class Args:
    """Tables of the runs in folders; the tables and figures of their artefacts."""

    folders: tyro.conf.Positional[tuple[Path, ...]]  # with runs, or with condensed ones
    condense: Path | None = None  # a folder to keep the runs of the one folder in


def main(args: Args) -> None:
    if not args.folders:
        raise SystemExit("Name a folder with runs, such as runs/ or benchmarks/results/tables.")
    if args.condense is not None and len(args.folders) != 1:
        raise SystemExit("--condense takes the runs of one folder.")
    for folder in args.folders:
        if runs := read_runs(folder):
            print(every_run(runs))
        elif not (folder / "artefacts.json").exists():
            raise SystemExit(f"There are no runs in {folder}/.")
        write_reports(folder)
        if args.condense is not None:
            condense(folder, args.condense)
            write_reports(args.condense)


if __name__ == "__main__":
    main(tyro.cli(Args))
