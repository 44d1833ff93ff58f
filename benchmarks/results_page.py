"""The tables of docs/results.md, and its figure, from the runs in benchmarks/results/tables/: `make figures` runs it
after report.py, whose tables have a row for each dataset; on the page each algorithm has one.

    python benchmarks/results_page.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
import json
import re
import warnings

import numpy as np
import pairs
from matplotlib.figure import Figure
from report import behaviour_scores, markdown, read_csv, read_runs, sample_of, save, short, summary
from runner import ROOT, Result
from scipy import stats

from common.harness.checkpoint import write_atomically

PAGE, TABLES = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results" / "tables"
COUNTERPARTS = ("TD3+BC", "CRR", "IQL")
STYLES = {  # of each artefact in the figure: where beside the others, how drawn
    "published": (-0.22, {"color": "C1", "marker": "o"}),
    "matched": (0, {"color": "C0", "marker": "s"}),
    "four-best": (0.22, {"color": "C2", "marker": "^"}),
}
Samples = list[np.ndarray]  # last scores (seeds,) of each dataset


def samples_of(artefact: dict, column: str, runs: dict[str, Result]) -> Samples:
    acting = artefact["columns"][column].get("acting", {})
    return [sample_of(runs[row["runs"][column]], acting, "last") for row in artefact["rows"]]


def scores(name: str, data: list[str], of: dict[str, Samples], behaviour: dict[str, float]) -> str:
    """A row for each algorithm."""
    heads = [name, *(short(of_data, "<br>") for of_data in data), "mean", "IQM,<br>95 %"]
    lines = [dict(zip(heads, ["behaviour", *(f"{behaviour[of_data]:.1f}" for of_data in data), "-", "-"]))]
    for title, samples in of.items():
        cells = [f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" for x in samples]
        means = "{mean:.1f} ± {deviation:.1f}|{iqm:.1f} [{iqm_low:.1f}, {iqm_high:.1f}]".format(**summary(samples))
        title = re.sub(r"^(EDP \+ [^,]*)", r"**\1**", title.replace("10%", "10 %"))
        lines.append(dict(zip(heads, [title, *cells, *means.split("|")])))
    return markdown(lines)


def differences(names: list[str]) -> str:
    """What report.py has of each artefact's pairs, in one table."""
    lines = []
    for name in names:
        for row in read_csv(TABLES / f"{name}-pairs.csv"):
            (line,) = pairs.lines_of([{key: text if key == "pair" else float(text) for key, text in row.items()}])
            lines.append(line | {"": line[""] + ("" if "best" in line[""] else f", {name}")})
    return markdown([dict(zip(["difference", *list(line)[1:]], line.values())) for line in lines])


def draw(artefacts: dict[str, dict], runs: dict[str, Result], file: Path) -> None:
    """By dataset the mean of EDP's seeds less that of its counterpart's, with Welch's 95 % interval."""
    series = [(name, *pair) for name in STYLES for pair in artefacts[name]["pairs"] if pair[1] in COUNTERPARTS]
    labels = [short(row["data"], "\n") for row in artefacts["published"]["rows"]]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = dict(zip(COUNTERPARTS, figure.subplots(1, len(COUNTERPARTS), sharex=True, sharey=True)))
    for name, ours, theirs in series:
        offset, style = STYLES[name]
        both = zip(*(samples_of(artefacts[name], column, runs) for column in (ours, theirs)))
        for place, (x, y) in enumerate(both):
            with warnings.catch_warnings(action="ignore"):  # where no seed differs there is no interval
                interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval()
            value = x.mean() - y.mean()
            bar = [[value - interval.low], [interval.high - value]]
            axes[theirs].errorbar(value, place + offset, xerr=bar, label=name, markersize=5, **style)
    for theirs, ax in axes.items():
        ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set_title(f"EDP + {theirs} less {theirs}", fontsize=10)
        ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.invert_yaxis()  # they share it
    figure.supxlabel("difference of the scores", fontsize=10)
    save(figure, np.array(list(axes.values())), file, loc="outside upper center")


def main() -> None:
    artefacts, runs = json.loads((TABLES / "artefacts.json").read_text()), read_runs(TABLES)
    of = {name: {column: samples_of(it, column, runs) for column in it["columns"]} for name, it in artefacts.items()}
    published = {}
    for column, samples in of["published"].items():
        published[column] = samples
        if (best := f"{column}, four best") in of["four-best"]:
            published[best] = of["four-best"][best]
    behaviour, text = behaviour_scores(artefacts["published"], runs), PAGE.read_text()
    data = [row["data"] for row in artefacts["published"]["rows"]]
    columns = {"published": published, "matched": of["matched"]}
    tables = [scores(name, data, of_name, behaviour) for name, of_name in columns.items()]
    for table in [*tables, differences([*STYLES])]:
        head, rest = text.split(table[: table.index("|", 1)], 1)  # the page's table begins with the same cell
        text = head + table + "\n\n" + rest.partition("\n\n")[2]
    write_atomically(PAGE, lambda stream: stream.write(text.encode()))
    draw(artefacts, runs, TABLES / "differences.png")


if __name__ == "__main__":
    main()
