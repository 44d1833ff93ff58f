"""Every number in docs/results.md and of the README's results, computed again from the returns that are kept; policies.

A sentence stands here once more, with a blank for each number. A number of the page that is in none of them, nor in a
table that is compared, nor a setting of the runs, fails the test.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cards
import numpy as np
import pairs
import pytest
import report
import results_page
from report import METRICS, behaviour_scores, read_csv, read_runs, sample_of, summary

from common.harness.checkpoint import newest_header
from common.harness.tasks import ENVIRONMENTS
from common.recipes import RECIPES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SAME = ("BC", "10% BC", "TD3+BC", "EDP + TD3+BC", "CRR", "EDP + CRR", "IQL", "EDP + IQL")
# rows of the page's table, and columns of the report's
NINE = {name.replace("10%", "10 %"): name for name in SAME} | {"Diffusion-QL": "Diffusion-QL, K = 5"}
ARTEFACTS = ("published", "matched", "four-best")  # of five seeds
PAIRS = [("EDP + CRR", "CRR"), ("EDP + TD3+BC", "TD3+BC"), ("EDP + IQL", "IQL")]


@cache
def runs(folder: str) -> dict:
    return read_runs(RESULTS / folder)


@cache
def ten_thousand() -> dict[str, dict]:
    """By dataset and column, the runs of the headline table."""
    artefact = json.loads((RESULTS / "short-runs" / "artefacts.json").read_text())["ten-thousand"]
    found = {row["data"]: row["runs"] for row in artefact["rows"]}
    return {data: {name: runs("short-runs")[run] for name, run in of.items()} for data, of in found.items()}


@cache
def five_seeds() -> tuple[dict[tuple[str, str], list], dict[str, float]]:
    """Last scores by artefact and column, a sample for each dataset; the behaviour's."""
    artefacts, kept, found = json.loads((RESULTS / "tables" / "artefacts.json").read_text()), runs("tables"), {}
    for name in ARTEFACTS:
        for column, spec in artefacts[name]["columns"].items():
            cells = [(kept[row["runs"][column]], spec.get("acting", {})) for row in artefacts[name]["rows"]]
            found[name, column] = [sample_of(*cell, "last") for cell in cells]
    return found, behaviour_scores(artefacts["published"], kept)


def samples(column: str, metric: str = "last") -> list[np.ndarray]:
    return [METRICS[metric](of[column].scores) for of in ten_thousand().values()]


def at(data: str, column: str) -> str:
    return f"{ten_thousand()[data][column].scores[-1].mean():.0f}"


def lost(of: list[np.ndarray], last: list[np.ndarray]) -> str:
    """From the best evaluation to the last, a mean over datasets and seeds."""
    return f"{np.mean([x - y for x, y in zip(of, last)]):.1f}"


def text_of(page: Path) -> str:
    """What people read as one line a paragraph: without code and without where links lead."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`", "", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text))
    return re.sub(r"(?<!\n)\n(?![\n|]|\d\. |- )\s*", " ", text.replace("**", ""))


def expect(text: str, sentences: list[str], settings: str) -> None:
    """Every sentence is in it; outside them, and of tables, every number belongs to one of the settings."""
    for sentence in sentences:
        assert sentence in text, f"it is not said: {sentence}"
        text = text.replace(sentence, "")
    text = re.sub(r"^ *\|.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\d\. ", "", re.sub(settings, "", text), flags=re.MULTILINE)  # nor of lists
    left = [line for line in text.splitlines() if re.search(r"(?<![A-Za-z])\d", line)]
    assert not left, f"numbers that nothing computes: {left}"


def rows_of(page: Path, heading: str) -> dict[str, list[str]]:
    """The table whose first line begins so: cells by the name of their row, without bold type."""
    table = page.read_text().partition(heading)[2].partition("\n\n")[0].replace("**", "")
    rows = [[cell.strip() for cell in line.strip(" |").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


# ------------------------------------------------------------------------------------------------------------ results

PAGE, REPRODUCE = ROOT / "docs" / "results.md", ROOT / "docs" / "reproduce.md"
SETTINGS = (
    r"\(D\d+\)|10 % BC|95 %|K = \d+|[\d,]+ updates|\d+( and \d+)? thousand|Five seeds, 10 to 14"
    r"|of 32 candidates|32 candidates in place of 10|EDP 15 times|batch(es of)? \d+|80 % on umaze"
    r"|figures 4 to 7 and table 7"
)


def test_the_table_of_nine_datasets():
    rows = rows_of(ROOT / "docs" / "notes" / "nine-algorithms.md", "| | hopper<br>medium |")
    behaviour = [of["BC"].header["dataset"]["behaviour_score"] for of in ten_thousand().values()]
    assert rows.pop("behaviour") == [f"{score:.1f}" for score in behaviour]
    assert list(rows) == list(NINE)
    for name, (*cells, mean, last) in rows.items():
        of = samples(NINE[name])
        assert cells == [f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" for x in of], name
        assert mean == "{mean:.1f} ± {deviation:.1f}".format(**summary(of)), name
        assert last == "{iqm:.1f} [{iqm_low:.1f}, {iqm_high:.1f}]".format(**summary(of)), name


def test_the_longest_runs_with_the_papers_settings():
    rows = rows_of(ROOT / "docs" / "notes" / "paper-settings.md", "| | 25 | 50 |")
    for title, name in {"EDP + IQL": "edp_iql", "IQL": "iql"}.items():
        of = runs("paper-settings")[name].scores.mean(axis=1)
        assert rows[title] == [f"{score:.1f}" for score in (*of, of.mean())]


def test_the_findings():
    compared = [tuple(map(samples, pair)) for pair in PAIRS]
    difference = pairs.less(pairs.iqm)
    iqm, least = [difference(*of) for of in compared], [pairs.without_one(difference, *of) for of in compared]
    table = rows_of(PAGE, "| EDP less its counterpart |")
    assert table["interquartile mean"] == [f"{value:.1f}" for value in iqm]
    assert table["the same, one dataset left out: least to most"] == ["{:.1f} to {:.1f}".format(*of) for of in least]
    mean = pairs.less(pairs.mean)
    assert table["mean"] == [f"{mean(*of):.1f}" for of in compared]
    least = ["{:.1f} to {:.1f}".format(*pairs.without_one(mean, *of)) for of in compared]
    assert table["the mean, one dataset left out: least to most"] == least

    sure = {sign: np.flatnonzero(np.ravel(pairs.verdicts(compared)) == sign).tolist() for sign in (1, -1)}
    names, lead = list(ten_thousand()), [x.mean() - y.mean() for x, y in zip(*compared[0])]
    places = [names.index(data) for data in ("hopper-medium-replay", "pointmaze-large", "halfcheetah-medium-replay")]
    assert sure == {1: places[:2], -1: places[2:]}, "of CRR, the first pair"
    steady = rows_of(PAGE, "| | CRR | EDP + CRR |")
    order = ("CRR", "EDP + CRR", "TD3+BC", "EDP + TD3+BC", "IQL", "EDP + IQL")
    assert steady["nine datasets, 10,000 updates"] == [lost(samples(name, "OMS"), samples(name)) for name in order]
    files = [name.lower().replace(" + ", "-").replace("td3+bc", "td3bc") for name in order]
    files = [{"edp-td3bc": "edp-td3-bc"}.get(name, name) for name in files]
    longer = [runs("h200")[f"hopper-medium-replay/{name}-fast"].scores for name in files]
    assert [*steady.values()][1] == [lost([of.max(axis=0)], [of[-1]]) for of in longer]
    maze_data = ten_thousand()["pointmaze-medium"]["BC"].header["dataset"]["behaviour_score"]
    wide = re.search(r"with 3 seeds (\d+) to (\d+) % .*with 5 seeds (\d+) to (\d+) %", text_of(REPRODUCE)).groups()
    dql = NINE["Diffusion-QL"]
    slower = pairs.estimate(difference, samples("EDP + TD3+BC"), samples(dql))
    timed = json.loads((RESULTS / "short-runs" / "artefacts.json").read_text())["ten-thousand-mean"]["columns"]
    seconds = {name: of["seconds"] for name, of in timed.items()}
    gpu = json.loads((RESULTS / "speed-nvidia-h200.json").read_text())["updates"]
    umaze = [runs("h200")[f"antmaze-umaze/{name}-fast"].scores[-1].mean() for name in ("edp-iql", "iql", "bc")]
    behind = np.mean(samples(dql)[4]) - np.mean(samples("EDP + TD3+BC")[4])
    said = {  # blanks for numbers
        "With three seeds intervals hold the truth {} to {} % of the time.": wide[:2],
        "with five seeds they hold the truth {} to {} % of the time": wide[2:],
        "finds three significant differences in {},": (sum(len(ours) for ours, _ in compared),),
        "{:.0f} points ahead in the large maze, {:.0f} ahead on hopper medium-replay, {:.0f} behind on halfcheetah": (
            *(abs(lead[place]) for place in (places[1], places[0], places[2])),
        ),
        "than EDP + TD3+BC, by {:.1f} [{:.1f}, {:.1f}];": (-slower.value, -slower.high, -slower.low),
        "and {:.0f} behind on pen mixed": (behind,),
        "it ends at {}, below the data's {:.0f}; Diffusion-QL ends at {}, with two of three": (
            *(at("pointmaze-medium", "EDP + TD3+BC"), maze_data + 1e-9, at("pointmaze-medium", dql)),
        ),
        "{:.0f} times as many updates a second": (gpu["edp_td3bc"]["per_second"] / gpu["dql"]["per_second"],),
        "and {:.1f} times as many as the one that was scored": (seconds[dql] / seconds["EDP + TD3+BC"],),
        "an update of EDP + CRR takes {:.1f} times as long as one of IQL.": (seconds["EDP + CRR"] / seconds["IQL"],),
        "EDP + IQL ends at {:.0f} on hopper medium-replay and IQL at {:.0f}, one seed of each": [
            runs("paper-settings")[name].scores[-1].mean() for name in ("edp_iql", "iql")
        ],
        "umaze in {:.0f} % of its episodes, IQL in {:.0f}, cloning in {:.0f}.": umaze,
    }
    sentences = [sentence.format(*numbers) for sentence, numbers in said.items()]
    expect(text_of(PAGE), sentences + of_five_seeds(), SETTINGS)


def of_five_seeds() -> list[str]:
    """What the page says of them."""
    (found, behaviour), (hopper, halfcheetah, replay, pen, maze, antmaze) = five_seeds(), range(6)
    score = lambda column, data, artefact="published": found[artefact, column][data].mean()
    lead = lambda name, data, artefact="published": score(f"EDP + {name}", data, artefact) - score(name, data, artefact)
    assert significant("published") == {
        "TD3+BC": {halfcheetah: -1, replay: -1},
        "CRR": {},
        "IQL": {hopper: -1, replay: -1},
        "Diffusion-QL": {},
    }
    assert significant("matched") == {
        "TD3+BC": {halfcheetah: 1},
        "CRR": {halfcheetah: 1},
        "IQL": {hopper: 1, halfcheetah: 1, replay: 1},
    }
    assert [data for data in range(6) if lead("CRR", data) > 0] == [maze], "elsewhere it has the lower mean"
    iqms = {column: summary(of)["iqm"] for (artefact, column), of in found.items() if artefact != "matched"}
    highest = sorted(iqms, key=iqms.get)[:-3:-1]
    assert {*highest} == {"EDP + CRR", "IQL"}
    of_both = pairs.estimate(pairs.less(pairs.iqm), *(found["published", column] for column in highest))
    assert of_both.low < 0 < of_both.high, "five seeds do not separate them"
    crr_maze = found["published", "CRR"][maze]
    assert crr_maze.max() > 0.9 * crr_maze.sum(), "mostly one seed"
    behind = {f"{-lead('TD3+BC', data):.0f}" for data in (halfcheetah, replay)}
    rows = json.loads((RESULTS / "tables" / "artefacts.json").read_text())["matched"]["rows"]
    by_mean = lambda row: sample_of(runs("tables")[row["runs"]["IQL"]], {"num_eval_actions": 1}, "last").mean()
    with_temperature = {data: by_mean(rows[data]) for data in (halfcheetah, antmaze)}

    assert sum(score("CRR", data, "matched") < score("CRR", data) for data in range(6)) == 5, "costs points on five"
    assert all(score("IQL", data, "matched") < mean for data, mean in with_temperature.items()), "on both"
    taken = {data: score("TD3+BC", data, "matched") - score("TD3+BC", data) for data in (hopper, halfcheetah, antmaze)}
    assert abs(lead("TD3+BC", replay, "matched")) < 0.05, "level"

    iql, four = found["published", "IQL"], found["four-best", "EDP + IQL, four best"]
    gain = [x.mean() - y.mean() for x, y in zip(four, found["published", "EDP + IQL"])]
    (row,) = (row for row in pairs_of("four-best") if row["pair"].endswith("less EDP + IQL"))
    assert (row["ahead"], row["behind"]) == ("1", "0")
    assert {*found["matched", "IQL"][maze], *found["published", "EDP + IQL"][maze]} == {100.0}, "of both every seed"
    (curve,) = [run.scores for run in runs("tables").values() if np.array_equal(run.scores[-1], iql[maze])]
    low, *_, high = sorted(iql[maze])
    before = curve[-2][iql[maze].argmin()]

    of_dql = [found["published", column] for column in ("EDP + TD3+BC", "Diffusion-QL")]
    (slow,) = (row for row in pairs_of("published") if row["pair"].endswith("less Diffusion-QL"))
    by_themselves = [pairs.welch(*both) for both in zip(*of_dql)]
    assert pairs.verdicts([of_dql]) == [[0, 0, -1, 0, 0, 0]], "halfcheetah medium-replay alone of these six"
    assert of_dql[0][replay].max() < of_dql[1][replay].min(), "each seed beats each"
    assert max(score("EDP + TD3+BC", maze), score("Diffusion-QL", maze)) < behaviour["pointmaze-large"], "both fail"
    artefact = json.loads((RESULTS / "tables" / "artefacts.json").read_text())["published"]
    best_of = lambda column: [runs("tables")[row["runs"][column]].scores.max() for row in artefact["rows"]]
    best = {column: best_of(column) for column in ("EDP + TD3+BC", "TD3+BC", "Diffusion-QL")}
    but_the_maze = [np.mean(np.delete(of, maze)) for of in best.values()]
    to_crr = [pairs.welch(*(found["published", column][data] for column in PAIRS[0])) for data in range(6)]
    assert max(to_crr[data] for data in (halfcheetah, replay, maze)) < 0.005 and sorted(to_crr)[3] > 0.05, "clear"
    (crr_row,) = (row for row in pairs_of("published") if row["pair"] == "EDP + CRR less CRR")

    ants = {name: of[antmaze].mean() for name, of in found.items()}
    cloning = ants.pop(("published", "BC")), ants.pop(("published", "10% BC"))
    assert max(ants.values()) < with_temperature[antmaze], "the best of what learns values"
    assert f"{cloning[0]:.0f}" == f"{cloning[1]:.0f}"
    notes = (ROOT / "docs" / "notes" / "antmaze.md").read_text()
    of_the_ant = re.search(r"the ant that made the data, with its noise / without .* (\d+) / \d+ \|", notes)[1]
    assert four[antmaze].max() == 0
    three = samples("EDP + TD3+BC")[0].mean() - samples("TD3+BC")[0].mean()
    crr = [f"{score('CRR', data):.0f} and {score('CRR', data, 'matched'):.0f}" for data in (hopper, pen, maze)]
    cheetahs = {f"{score('CRR', data):.0f} and {score('CRR', data, 'matched'):.0f}" for data in (halfcheetah, replay)}
    artefacts = json.loads((RESULTS / "tables" / "artefacts.json").read_text())
    planned = [len(artefacts[name]["pairs"]) * len(artefacts[name]["rows"]) for name in ARTEFACTS]
    in_matched = [sign for of in significant("matched").values() for sign in of.values()]
    return [
        f"interquartile means over six datasets, {iqms['EDP + CRR']:.1f} and {iqms['IQL']:.1f}.",
        f"significantly ahead in {sum(in_matched)} of {6 * len(PAIRS)} comparisons and behind in none",
        *to_begin_with(score),
        "5 % for all comparisons of a kind together: {} published, {} matched, {} of the four best.".format(*planned),
        f"CRR crosses it in {score('CRR', maze):.0f} % of its episodes, nearly all by one seed, and EDP + CRR in "
        f"{score('EDP + CRR', maze):.0f}.",
        f"on hopper medium {crr[0]}, on pen expert {crr[1]}, on both halfcheetahs "
        f"{'/'.join(cheetahs)}, in the large maze {crr[2]}.",
        f"where it scores {score('EDP + CRR', maze):.0f} and CRR {score('CRR', maze):.0f}.",
        f"the lead of {lead('CRR', maze):.0f} points in the large maze (p = {to_crr[maze]:.3f}), and CRR's on both "
        f"halfcheetahs, of {-lead('CRR', halfcheetah):.1f} and {-lead('CRR', replay):.1f} points (p = "
        f"{to_crr[halfcheetah]:.3f} and {to_crr[replay]:.3f}). None is significant among all 24. A seed of EDP + CRR "
        f"beats one of CRR in {100 * float(crr_row['improvement']):.0f} % of cases",
        f"EDP + CRR is ahead by {lead('CRR', maze, 'matched'):.0f} points in the large maze, by "
        f"{lead('CRR', hopper, 'matched'):.0f} on hopper medium, by {lead('CRR', pen, 'matched'):.0f} on pen expert, "
        f"and by {lead('CRR', halfcheetah, 'matched'):.0f} on halfcheetah medium, which alone is significant",
        f"behind on both halfcheetahs, by {'/'.join(behind)} points each.",
        f"The gain is {lead('TD3+BC', pen):.0f} points on pen expert",
        f"that three seeds had shown, {three:.0f} points, is {lead('TD3+BC', hopper):.0f} with five seeds",
        f"by {lead('TD3+BC', hopper, 'matched'):.0f} on hopper, and by {lead('TD3+BC', halfcheetah, 'matched'):.0f} on "
        f"halfcheetah, which alone is significant. It is level on halfcheetah medium-replay, and "
        f"{-lead('TD3+BC', antmaze, 'matched'):.0f} behind in antmaze.",
        f"loses {-taken[hopper]:.0f} on hopper medium to these settings, and gains {taken[antmaze]:.0f} in antmaze. On "
        f"halfcheetah medium TD3+BC loses {-taken[halfcheetah]:.1f}, more than EDP's lead there. With its own settings "
        f"TD3+BC is {-lead('TD3+BC', halfcheetah):.1f} ahead.",
        f"by a choice among ten samples it scores {score('IQL', halfcheetah, 'matched'):.1f}, and by their mean the "
        f"same policies score {with_temperature[halfcheetah]:.1f}, where those with IQL's own temperature have "
        f"{score('IQL', halfcheetah):.1f}.",
        f"rises from {score('IQL', antmaze):.0f} to {with_temperature[antmaze]:.0f}, of which a choice among ten "
        f"leaves {score('IQL', antmaze, 'matched'):.0f}, and EDP + IQL has {score('EDP + IQL', antmaze):.0f}.",
        f"one of IQL's five seeds ends at {low:.0f}, from {before:.0f} after 7,500 updates",
        f"the others end at {high:.0f}.",
        f"to {summary(iql)['iqm'] - summary(four)['iqm']:.1f} below that of IQL.",
        f"Hopper medium gains {gain[hopper]:.0f} and halfcheetah medium-replay {gain[replay]:.1f}, of which",
        f"Halfcheetah medium loses {-gain[halfcheetah]:.1f} and antmaze all of its {score('EDP + IQL', antmaze):.1f}.",
        f"less that of Diffusion-QL is {float(slow['mean']):.1f}, with an interval of {float(slow['mean_low']):.1f} to "
        f"{float(slow['mean_high']):.1f}. On halfcheetah medium-replay Diffusion-QL's mean is "
        f"{of_dql[1][replay].mean() - of_dql[0][replay].mean():.1f} higher, and each of its seeds beats each of EDP + "
        f"TD3+BC's (p = {by_themselves[replay]:.3f}: significant among these six comparisons, not among all 24). Over "
        f"all six datasets a seed of EDP + TD3+BC scores more in {100 * float(slow['improvement']):.0f} % of cases.",
        "is {:.0f} for EDP + TD3+BC, {:.0f} for TD3+BC, {:.0f} for Diffusion-QL; without".format(
            *map(np.mean, best.values())
        ),
        "the large maze {:.0f}, {:.0f}, {:.0f}.".format(*but_the_maze),
        f"Cloning crosses in {cloning[0]:.0f} % of the episodes.",
        f"with a temperature of 1, which crosses in {with_temperature[antmaze]:.0f} when it acts by its mean.",
        f"The data's {behaviour['edp/antmaze/umaze-play-v1']:.0f} are of nearer goals; from the evaluation's start the "
        f"ant that made them crosses in {of_the_ant} %",
    ]


def to_begin_with(score: Callable[[str, int], float]) -> list[str]:
    """The sentences of "Where to begin"."""
    hopper, halfcheetah, replay, pen, maze, antmaze = range(6)
    named = lambda place, *columns: [f"{score(column, place):.0f}" for column in columns]
    columns = [column for artefact, column in five_seeds()[0] if artefact == "published"]
    learn = [score(column, hopper) for column in columns if column not in ("BC", "10% BC", "EDP + IQL")]
    best = lambda place: sorted(columns, key=lambda column: -score(column, place))
    highest = {maze: "EDP + IQL, EDP + CRR, IQL", pen: "CRR, EDP + CRR, BC", replay: "10% BC, CRR, TD3+BC"}
    for place, names in highest.items() | {(antmaze, "BC, 10% BC, Diffusion-QL")}:
        assert ", ".join(best(place)[:3]) == names
    return [
        "(large maze): EDP + IQL {}, EDP + CRR {}, IQL {}.".format(*named(maze, "EDP + IQL", "EDP + CRR", "IQL")),
        "(pen expert): CRR {}, EDP + CRR {}, cloning {}.".format(*named(pen, "CRR", "EDP + CRR", "BC")),
        "cloning the best tenth {}, CRR {}, TD3+BC {}.".format(*named(replay, "10% BC", "CRR", "TD3+BC")),
        f"reach {min(learn):.0f} to {max(learn):.0f}, but for EDP + IQL with {score('EDP + IQL', hopper):.0f}.",
        "all end between {:.0f} and {:.0f}.".format(
            *(f(score(column, halfcheetah) for column in columns) for f in (min, max))
        ),
        "(antmaze): cloning {}, of all episodes or of the best tenth; Diffusion-QL {}.".format(
            *named(antmaze, "BC", "Diffusion-QL")
        ),
    ]


def pairs_of(name: str) -> list[dict[str, str]]:
    return read_csv(RESULTS / "tables" / f"{name}-pairs.csv")


def significant(name: str) -> dict[str, dict[int, int]]:
    """By counterpart the datasets where EDP is ahead (1) or behind (-1), by the rule of the page for all together."""
    found, compared = five_seeds()[0], PAIRS + [("EDP + TD3+BC", "Diffusion-QL")] * (name == "published")
    verdicts = pairs.verdicts([(found[name, ours], found[name, theirs]) for ours, theirs in compared])
    return {
        theirs: {place: sign for place, sign in enumerate(signs) if sign}
        for (_, theirs), signs in zip(compared, verdicts)
    }


@pytest.mark.parametrize("name", ["published", "matched"])
def test_the_tables_of_five_seeds(name):
    rows, (found, behaviour) = rows_of(PAGE, f"| {name} |"), five_seeds()
    assert rows.pop("behaviour") == [*(f"{score:.1f}" for score in behaviour.values()), "-", "-"]
    assert f"{len(runs('tables'))} runs, and what they say" in text_of(REPRODUCE)
    expected = {column.replace("10%", "10 %"): of for (artefact, column), of in found.items() if artefact == name}
    if name == "published":
        expected["EDP + IQL, four best"] = found["four-best", "EDP + IQL, four best"]
    assert rows.keys() == expected.keys()
    for column, of in expected.items():
        shown = [f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" for x in of]
        means = "{mean:.1f} ± {deviation:.1f}", "{iqm:.1f} [{iqm_low:.1f}, {iqm_high:.1f}]"
        assert rows[column] == [*shown, *(text.format(**summary(of)) for text in means)], column


def test_the_page_has_what_make_figures_writes(tmp_path, monkeypatch):
    """From the returns alone, on a page whose tables hold nothing yet: also the differences and their intervals."""
    rows, tables = re.compile(r"(\| (?:published|matched|difference) \|).*?\n\n", re.DOTALL), tmp_path / "tables"
    (tmp_path / "page.md").write_text(rows.sub(r"\1\n\n", PAGE.read_text()))
    shutil.copytree(RESULTS / "tables", tables, ignore=shutil.ignore_patterns("*.png", "*-pairs.csv"))
    for name, artefact in json.loads((tables / "artefacts.json").read_text()).items():
        report.write_pairs(tables, name, artefact, runs("tables"))
    monkeypatch.setattr(results_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(results_page, "TABLES", tables)
    results_page.main()
    assert (tmp_path / "page.md").read_text() == PAGE.read_text() and (tables / "differences.png").stat().st_size > 0


def test_make_figures_takes_every_folder_that_has_runs_and_no_other():
    """report.py ends at a folder without any."""
    planned = subprocess.run(["make", "-n", "figures"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {Path(folder) for folder in re.findall(r"benchmarks/results/\S+/", planned)}
    assert named == {file.parent.relative_to(ROOT) for file in RESULTS.glob("*/runs.json")} and len(named) > 5


def test_how_many_settings_were_tried():
    kept = [(name.partition("/")[0], of.header["algorithm"]) for name, of in runs("short-runs").items()]
    page = ROOT / "docs" / "short-of-compute.md"
    names = re.search(r"^\| tried \| (.*) \| elsewhere \|$", page.read_text(), flags=re.MULTILINE)[1].split(" | ")
    for title, (*counts, elsewhere) in rows_of(page, "| tried |").items():
        algorithm = {"Diffusion-QL": "dql_baseline"}.get(title, title.lower().replace(" + ", "_").replace("+", ""))
        tried = [sum(data.startswith(name) for data, of in kept if of == algorithm) for name in names]
        exact = [sum(data == name for data, of in kept if of == algorithm) for name in names[:-1]]
        assert list(map(int, counts)) == [*exact, tried[-1]], title
        rest = [data for data, of in kept if of == algorithm and not data.startswith((*names,))]
        assert elsewhere == "1 each" and len(rest) == len({*rest}) == 3
    runs_of = [sum(of == algorithm for _, of in kept) for algorithm in ("edp_td3bc", "td3bc", "edp_iql", "iql")]
    assert runs_of[0] > 4 * runs_of[1] and runs_of[2] > 4 * runs_of[3], "more than four times as many tries"


def test_the_results_of_the_readme():
    readme, speeds = ROOT / "README.md", {}
    mean_of = lambda column: "{mean:.0f} ± {deviation:.0f}".format(**summary(five_seeds()[0]["published", column]))
    for name in ("nvidia-h200", "amd-epyc-2-cores-avx2"):
        speeds[name] = json.loads((RESULTS / f"speed-{name}.json").read_text())["updates"]
    rows = rows_of(readme, "| | updates/s on one H200 GPU |")
    entries = {  # column of the results, entry of the speeds
        "Diffusion-QL, K = 100": (None, "dql"),
        "Diffusion-QL, K = 5 as in its own code": ("Diffusion-QL", None),
        "EDP + TD3+BC, with Diffusion-QL's losses": ("EDP + TD3+BC", "edp_td3bc"),
        "EDP + CRR": ("EDP + CRR", "edp_crr"),
        "EDP + IQL": ("EDP + IQL", "edp_iql"),
        "TD3+BC": ("TD3+BC", "td3bc"),
        "CRR": ("CRR", None),
        "IQL": ("IQL", None),
        "cloning": ("BC", None),
    }
    assert list(rows) == list(entries)
    for (column, entry), (gpu, cpu, mean) in zip(entries.values(), rows.values()):
        assert mean == (mean_of(column) if column else "-")
        of_gpu, of_cpu = (of[entry]["per_second"] if entry in of else 0 for of in speeds.values())
        assert gpu == (f"{of_gpu:,.0f}" if of_gpu else "-")
        assert cpu == "-" if not of_cpu else float(cpu) == pytest.approx(of_cpu, abs=0.5 if of_cpu > 10 else 0.05)
    found = five_seeds()[0]
    matched = (found["matched", name] for name in ("IQL", "EDP + IQL"))
    assert [np.sign(x.mean() - y.mean()) for x, y in zip(*matched)] == [-1, -1, -1, -1, 0, 1]
    place = 4  # of the large maze
    maze = {column: found["published", column][place].mean() for column, _ in entries.values() if column}
    without = {
        column: np.mean([x.mean() for i, x in enumerate(found["published", column]) if i != place]) for column in maze
    }
    assert (max(without, key=without.get), min(without, key=without.get)) == ("CRR", "EDP + IQL")
    timed = json.loads((RESULTS / "short-runs" / "artefacts.json").read_text())["ten-thousand-mean"]["columns"]
    seconds = [timed[column]["seconds"] for column in (NINE["Diffusion-QL"], "EDP + TD3+BC")]
    sentences = [
        f"an update of Diffusion-QL takes {seconds[0] / seconds[1]:.1f} times as long as one of EDP + TD3+BC",
        f"EDP + IQL crosses it in {maze['EDP + IQL']:.0f} % of the episodes, EDP + CRR in {maze['EDP + CRR']:.0f}, "
        f"IQL in {maze['IQL']:.0f}, CRR in {maze['CRR']:.0f}.",
        f"CRR has the highest mean of all these ({without['CRR']:.0f}), EDP + CRR has {without['EDP + CRR']:.0f}, and "
        f"EDP + IQL the lowest ({without['EDP + IQL']:.0f}).",
        "EDP + IQL has the higher mean on four of the six datasets, and IQL in antmaze.",
    ]
    text = text_of(readme).partition("A dash: not measured in this way.")[2].partition("## Start")[0]
    expect(text, sentences, r"K = 5|10,000 updates|0 for a random policy and 100 for an expert")
    page = text_of(ROOT / "docs" / "questions.md")
    assert f"EDP + IQL on six datasets is {mean_of('EDP + IQL')}, and IQL's with a Gaussian {mean_of('IQL')}" in page


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_how_often_intervals_hold_the_truth(num_seeds):
    """docs/reproduce.md has the range over these algorithms; a rerun is within four standard errors of 300 trials."""
    page = text_of(REPRODUCE)
    low, high = map(float, re.search(rf"with {num_seeds} seeds (\d+) to (\d+) %", page).groups())
    for column in PAIRS[0] + PAIRS[2]:
        of = samples(column)
        found = pairs.coverage([x.mean() for x in of], [x.std(ddof=1) for x in of], num_seeds, trials=300)
        assert low - 8 < 100 * found < high + 8, column


def test_the_policies_that_are_kept():
    """docs/acting.md has what their cards have; their data are made by command; all fit into ten megabytes."""
    rows = rows_of(ROOT / "docs" / "acting.md", "| policy |")
    folders = [path.parent for path in sorted((ROOT / "policies").glob("*/card.json"))]
    assert rows.keys() == {f"`{folder.name}`" for folder in folders}
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 10e6
    for folder in folders:
        card, (header, _) = json.loads((folder / "card.json").read_text()), newest_header(folder)
        algorithm, data, behaviour, trained, score = rows[f"`{folder.name}`"]
        assert trained in {f"{of:.0f}" for of in card["of_scores"]}
        assert algorithm == f"`{header['algorithm']}`" and data == f"`{card['data']['dataset']}`"
        assert card["data"] == header["dataset"] and card["data"]["crc32"] == RECIPES[card["data"]["dataset"]].crc32
        assert behaviour == f"{card['data']['behaviour_score']:.0f}"
        assert np.mean(card["scores"]) == pytest.approx(card["score"])
        assert score == "{:.0f} [{:.0f}, {:.0f}]".format(card["score"], *card["interval"])
        assert header["git_commit"] == card["commit"] and "dirty" not in card["commit"]
        expected = np.array(card["scores"])
        num, spread = cards.episodes_of(expected, ENVIRONMENTS[header["environment"]])
        assert expected[:num].mean() > cards.SURE * spread * np.sqrt(2 / num), "verify finds one that scores 0"
