"""The paper redone by command: the paper's numbers, keys, reports, and sweeps that are killed and go on."""

import fcntl
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import jax
import numpy as np
import pairs
import pytest
import report
import reproduce
from helpers import rows_of
from runner import ROOT, Execution, Job, execute, gpu_share, next_command, read_csv, run_all

FLAGS = "--eval-episodes 1 --batch-size 8 --num-updates 20 --eval-every 20"
DOMAIN_TASKS = {
    domain: [task for task in reproduce.PAPER_TASKS if report.domain_of(task) == domain]
    for domain in ("locomotion", "antmaze", "adroit", "kitchen")
}


def test_the_papers_numbers_are_whole_and_their_averages_those_of_the_cells_but_for_four_misprints():
    """An independent check of what was copied: 20 columns, printed with one decimal."""
    wrong = set()
    for row in report.PAPER:
        for domain, tasks in DOMAIN_TASKS.items():
            cells = [row[task] for task in tasks]
            if all(cells) and row[domain] and abs(np.mean(list(map(float, cells))) - float(row[domain])) > 0.0501:
                wrong.add((row["source"], row["metric"], row["column"], domain))
    td3bc = {("Table 5", "OMS", "EDP + TD3+BC", domain) for domain in ("antmaze", "adroit", "kitchen")}
    assert wrong == td3bc | {("Table 5", "OMS", "EDP + IQL", "antmaze")}
    assert sum(map(len, DOMAIN_TASKS.values())) == 20
    for artefact in reproduce.ARTEFACTS.values():
        for column in artefact.columns if artefact.source else ():
            fields = DOMAIN_TASKS if artefact.kind == "means" else artefact.tasks
            assert all(report.paper_numbers(artefact.source, column, field) for field in fields), artefact.title


def test_table_3_is_what_the_paper_has():
    lines = list(reproduce.hyperparameters(None))
    assert [line[""] for line in lines] == list(DOMAIN_TASKS)
    assert {"eta", "num_updates"} < lines[0].keys()
    assert all(line[name] == line[f"{name}, paper"] for line in lines for name in list(line)[1::2])


# ------------------------------------------------------------------------------------------------------------ reports


@pytest.fixture
def write_run(tmp_path):
    def write(name, returns, reference=(-20.0, 30.0), num_updates=20, acting=()):
        """A run's files, with returns (evaluations, seeds, episodes) after 10, 20, ... updates."""
        folder = tmp_path / name
        folder.mkdir(parents=True)
        args = {"num_updates": num_updates, "num_seeds": len(returns[0]), "eval_episodes": len(returns[0][0])}
        args |= {"num_eval_actions": 10, "seed": 0}
        header = {"algorithm": "bc", "args": args, "reference_returns": reference, "normalization": [[0.0], [1.0]]}
        header["dataset"] = {"behaviour_score": 7.25, "dataset": "some/data-v0"}
        (folder / "args.json").write_text(json.dumps(header))
        rows = [f"{10 * (i + 1)},{seed},{j},{float(value)!r},5" for (i, seed, j), value in np.ndenumerate(returns)]
        (folder / "eval.csv").write_text("\n".join(["update,seed,episode,return,length", *rows]) + "\n")
        if acting:
            rows = [f"20,,{n},{seed},{j},{value},5" for n, seed, j, value in acting]
            heading = "update,critics,num_eval_actions,seed,episode,return,length"
            (folder / "acting.csv").write_text("\n".join([heading, *rows]) + "\n")

    return write


def row_of(name, task=None, columns=("EDP + IQL",)):
    return {"data": name, "task": task, "runs": dict.fromkeys(columns, name), "differs": []}


def artefact_of(*rows, **changes):
    plain = {"title": "T", "command": "c", "source": "Table 5", "metrics": ["RAT"], "kind": "table", "differs": []}
    plain |= {"tasks": list(reproduce.PAPER_TASKS), "columns": {"EDP + IQL": {"flags": "edp_iql"}}, "scale": 1.0}
    return plain | {"rows": list(rows)} | changes


def test_scores_and_metrics_are_those_of_the_raw_returns(tmp_path, write_run):
    returns = np.random.default_rng(0).normal(size=(2, 3, 4))
    write_run("a", returns)
    result = report.read_runs(tmp_path)["a"]
    np.testing.assert_allclose(result.scores, 40 + 2 * returns.mean(axis=2))  # from -20 to 30
    for metric, expected in {"OMS": "max", "RAT": "mean"}.items():
        np.testing.assert_allclose(report.sample_of(result, {}, metric), getattr(result.scores, expected)(axis=0))
    np.testing.assert_allclose(report.sample_of(result, {}, "last"), result.scores[1])


def test_interquartile_mean_and_interval_of_known_samples():
    """Of 0 ... 7 the middle half is 2 ... 5; the interval holds it."""
    numbers = report.summary([np.arange(8.0)])
    assert (numbers["mean"], numbers["iqm"]) == (3.5, 3.5)
    assert report.summary([np.append(np.arange(7.0), 1e6)])["iqm"] == 3.5
    assert numbers["iqm_low"] < 3.5 < numbers["iqm_high"]
    assert report.summary([np.ones(1)])["deviation"] is None
    for few in ([np.arange(3.0)], [np.ones(1)] * 9):  # three seeds of a dataset, a seed of nine
        assert report.summary(few)["iqm_low"] is report.summary(few)["iqm_high"] is None


def test_the_papers_number_stands_in_a_column_of_its_own_and_is_marked_where_the_data_differ(tmp_path, write_run):
    write_run("hopper-medium", np.array([[[9.0], [9.0]], [[4.0], [8.0]]]), reference=(0.0, 100.0))
    row = row_of("hopper-medium", "hopper-medium")
    text = report.write_report(tmp_path, "t", artefact_of(row), report.read_runs(tmp_path))
    assert "| | behaviour | EDP + IQL | EDP + IQL, paper |" in text
    assert "| hopper-medium | 7.2 | 7.5 ± 1.4 | 63.1 |" in text  # of 6.5 and 8.5; Table 5 has 63.1
    row["differs"] = ["hopper-medium: other data"]
    text = report.write_report(tmp_path, "t", artefact_of(row), report.read_runs(tmp_path))
    assert "| 63.1* |" in text and "- hopper-medium: other data" in text
    (cell,) = [row for row in rows_of(tmp_path / "t.csv") if row["metric"] == "RAT"]
    assert (cell["mean"], cell["paper"], cell["source"], cell["scale"]) == ("7.5", "63.1", "Table 5", "1.0")
    assert (tmp_path / "t.png").stat().st_size > 0


def test_pairs_of_columns_are_compared(tmp_path, write_run, monkeypatch):
    rows = []
    for data, lead in {"some-data": 40.0, "other-data": 0.0}.items():
        of_seeds = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
        write_run(f"{data}-a", np.stack([of_seeds, of_seeds + lead]), reference=(0.0, 100.0))
        acting = [(3, seed, j, seed + 10) for seed, j in np.ndindex(*of_seeds.shape)]
        write_run(f"{data}-b", np.stack([of_seeds, of_seeds]), reference=(0.0, 100.0), acting=acting)
        runs = {"EDP + IQL": f"{data}-a", "IQL": f"{data}-b", "N = 3": f"{data}-b", "CRR": "not there"}
        rows.append({"data": data, "task": None, "runs": runs, "differs": []})
    rows.append(rows[0] | {"data": "unfinished", "runs": rows[0]["runs"] | {"IQL": "not there", "N = 3": "not there"}})
    for name in "ab":  # has no scores
        write_run(f"raw-{name}", np.full((2, 3, 2), 1000.0), reference=None, acting=[(3, 0, 0, 5.0)])
    runs = rows[0]["runs"] | {"EDP + IQL": "raw-a", "IQL": "raw-b", "N = 3": "raw-b"}
    rows.append(rows[0] | {"data": "raw", "runs": runs})
    columns = {name: {} for name in rows[0]["runs"]} | {"N = 3": {"acting": {"num_eval_actions": 3}}}
    artefact = artefact_of(*rows, columns=columns, pairs=[["EDP + IQL", name] for name in ("IQL", "N = 3", "CRR")])
    drawn, draw = [], pairs.draw
    monkeypatch.setattr(pairs, "draw", lambda *args: drawn.append(args) or draw(*args))
    text = report.write_report(tmp_path, "t", artefact, report.read_runs(tmp_path))
    tried = {pair[1]: [len(of[0]) for of in both] for pair, both in drawn[0][1].items()}
    assert tried == {"IQL": [6, 6], "N = 3": [3, 3]}, "all evaluations, or of both the last ones"
    row, acting_with_three = rows_of(tmp_path / "t-pairs.csv")
    assert [float(acting_with_three[name]) for name in ("mean", "mean_least", "mean_most")] == [10, -10, 30]
    assert [float(row[name]) for name in ("mean", "mean_least", "mean_most")] == [20, 0, 40]
    assert (row["improvement"], row["ahead"], row["behind"]) == ("0.75", "1", "0")
    assert "| EDP + IQL less IQL |" in text and "| 0.0 to 40.0 |" in text and "| 1, 0 of 2 |" in text
    assert "\n\n9 of 16 cells are finished;" in text
    assert (tmp_path / "t-pairs.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["published", "matched", "four-best"])
def test_our_own_tables_have_flags_that_are_accepted(pointmaze_datasets, tmp_path, name):
    """Each column is planned with the settings of the table: 10,000 updates, seeds from 10 on."""
    (data,) = reproduce.find_data(("pointmaze-umaze",), ())
    args, artefact = reproduce.Args(artefacts=(name,), folder=tmp_path), reproduce.ARTEFACTS[name]
    jobs = [reproduce.plan(spec["flags"], artefact.flags, data, args) for spec in artefact.columns.values()]
    assert {job.num_updates for job in jobs} == {10_000}
    assert len({job.folder for job in jobs}) == len({spec["flags"] for spec in artefact.columns.values()})
    assert all("--seed 10 " in " ".join(job.flags) for job in jobs)


def test_an_algorithm_alone_has_its_last_scores_and_its_curves(tmp_path, write_run):
    """Also where the first dataset is still to be run, and another algorithm altogether."""
    write_run("x", np.array([[[9.0], [9.0]], [[4.0], [8.0]]]), reference=(0.0, 100.0))
    rows = [row_of(name, columns=["BC"]) for name in ("w", "x")]
    for row in rows:
        row["runs"]["IQL"] = f"{row['data']}-iql"
    artefact = artefact_of(*rows, columns={"BC": {}, "IQL": {}}, alone=True)
    report.write_report(tmp_path, "t", artefact, report.read_runs(tmp_path))
    assert (tmp_path / "t-bc.md").read_text() == "| | behaviour | BC |\n|---|---|---|\n| x | 7.2 | 6.0 ± 2.8 |\n"
    assert (tmp_path / "t-bc.png").stat().st_size > 0 and len([*tmp_path.glob("t-*")]) == 2


def test_a_mean_has_the_papers_beside_it_when_all_its_tasks_are_there_and_is_none_of_returns(tmp_path, write_run):
    tasks, rows = DOMAIN_TASKS["kitchen"], []
    for i, task in enumerate(tasks):
        write_run(task, np.full((2, 2, 1), 30.0 * i), reference=(0.0, 100.0))
        rows.append(row_of(task, task))
    for count, paper in ((3, "59.4"), (2, "")):
        cells = report.cells_of(artefact_of(*rows[:count], tasks=tasks[:count]), report.read_runs(tmp_path))
        (mean,) = [c for c in cells if c["data"] == f"kitchen, mean of {count} of 3 tasks" and c["metric"] == "RAT"]
        assert (mean["mean"], mean["paper"]) == (15.0 * (count - 1), paper)
    write_run("raw", np.ones((2, 2, 1)), reference=None)
    write_run("unfinished", np.ones((1, 1, 1)))  # ten updates of twenty
    others = [row_of(name) for name in (*tasks[:2], "raw", "unfinished")]
    for count, mean in ((2, {"all 2": 15.0}), (3, {"raw": 1.0})):
        cells = report.cells_of(artefact_of(*others[:count]), report.read_runs(tmp_path))
        means = {cell["data"]: cell["mean"] for cell in cells if cell["metric"] == "RAT"}
        assert means == dict(zip(tasks, (0.0, 30.0))) | mean
    assert not report.cells_of(artefact_of(others[3]), report.read_runs(tmp_path))


def test_curves_of_a_mean_are_the_mean_of_curves_and_against_processor_time_they_are_stretched(
    tmp_path, write_run, monkeypatch
):
    drawn, behaviour = [], {"a": 1.0, "b": 4.0}
    monkeypatch.setattr(report, "save", lambda figure, axes, file, legend: drawn.append(axes))
    for i, name in enumerate(behaviour):
        write_run(name, np.random.default_rng(i).normal(size=(2, 3, 4)), reference=(0.0, 100.0))
    both, timed = [row_of("a"), row_of("b")], {"EDP + IQL": {"flags": "edp_iql", "seconds": 0.5}}
    for artefact in (artefact_of(*both), artefact_of(*both, kind="means"), artefact_of(row_of("a"), columns=timed)):
        report.draw_curves(artefact, report.read_runs(tmp_path), behaviour, tmp_path / "t.png")
    (a, b), (mean,), (_, seconds) = ([axes[i, 0] for i in range(len(axes))] for axes in drawn)
    a, b, of_both, stretched = (axes.lines[0].get_xydata() for axes in (a, b, mean, seconds))
    np.testing.assert_allclose(of_both, (a + b) / 2)
    assert set(mean.lines[1].get_ydata()) == {2.5} and mean.get_ylabel() == "all 2\nRAT"
    np.testing.assert_allclose(stretched, a * [0.5, 1])
    assert seconds.get_xlabel() == "processor seconds"


def test_a_panel_shows_edp_with_its_counterpart_or_a_setting_with_the_first():
    columns = ["BC", "IQL", "EDP + IQL", "TD3+BC", "EDP + TD3+BC", "Diffusion-QL"]
    pairs = [["IQL", "EDP + IQL"], ["TD3+BC", "EDP + TD3+BC"], ["BC", "Diffusion-QL"]]
    assert report.groups_of(columns) == pairs
    assert report.groups_of(["fast", "a", "b"]) == [["fast", "a"], ["fast", "b"]]


def test_condensed_runs_hold_every_value_and_give_the_same_report(tmp_path, write_run, exit_sentence):
    acting = [(3, seed, j, 0.5 * j) for seed in range(3) for j in range(4)]
    write_run("runs/a/x", np.random.default_rng(0).normal(size=(2, 3, 4)), acting=acting)
    columns = {"EDP + IQL": {"flags": "edp_iql"}, "N = 3": {"flags": "edp_iql", "acting": {"num_eval_actions": 3}}}
    artefact = artefact_of(row_of("a/x", columns=columns), columns=columns, metrics=["last"])
    (tmp_path / "runs" / "artefacts.json").write_text(json.dumps({"t": artefact}))
    report.main(report.Args((tmp_path / "runs",), condense=tmp_path / "condensed"))
    report.main(report.Args((tmp_path / "condensed",)))
    before, after = ((tmp_path / name / "t.md").read_text() for name in ("runs", "condensed"))
    assert before == after and "41.5" in after  # N = 3: the mean of 0, 0.5, 1 and 1.5, from -20 to 30
    rows = [row for row in rows_of(tmp_path / "condensed" / "returns.csv") if row.pop("run") == "a/x"]
    assert rows == rows_of(tmp_path / "runs" / "a" / "x" / "eval.csv")

    (tmp_path / "runs" / "a" / "x" / "acting.csv").unlink()
    report.condense(tmp_path / "runs", tmp_path / "condensed")
    assert not report.read_runs(tmp_path / "condensed")["a/x"].acting, "nothing of before is left"
    write_run("others/y", np.ones((2, 3, 4)))
    assert "does not have" in exit_sentence(report.condense, tmp_path / "others", tmp_path / "condensed")


def test_finished_runs_that_are_kept_are_taken_and_not_run_again(tmp_path, write_run, exit_sentence, capsys):
    acting = [(3, seed, j, 0.5) for seed in range(3) for j in range(4)]
    write_run("runs/a/x", np.ones((2, 3, 4)), acting=acting)
    write_run("runs/a/short", np.ones((1, 3, 4)))  # which was stopped at half its updates
    report.condense(tmp_path / "runs", tmp_path / "kept")
    of = lambda name: Job(tmp_path / "new" / "a" / name, "bc", (), 20)
    acted, acts_again = (of("x")._replace(acting=({"num_eval_actions": number},)) for number in (3, 4))
    jobs = {of(name).folder: of(name) for name in ("short", "y")} | {acted.folder: acted}
    reproduce.take_kept(tmp_path / "kept", jobs, tmp_path / "new")
    assert [folder.name for folder in jobs] == ["short", "y"]
    assert f"1 of 3 planned runs are taken from {tmp_path / 'kept'}/, which holds 2." in capsys.readouterr().out
    taken, original = (report.read_runs(tmp_path / name)["a/x"] for name in ("new", "runs"))
    np.testing.assert_array_equal(taken.scores, original.scores)
    ((settings, scores),) = taken.acting.items()
    np.testing.assert_array_equal(scores, original.acting[settings])
    assert next_command(acted) is None and "--run-dir" in next_command(of("y"))

    (acted.folder / "checkpoint-20.eqx").touch()  # a run of this folder's own, which may have acted more often
    (acted.folder / "acting.csv").write_text("its own")
    reproduce.take_kept(tmp_path / "kept", jobs | {acted.folder: acted}, tmp_path / "new")
    assert (acted.folder / "acting.csv").read_text() == "its own"
    again = next_command(acted._replace(acting=acts_again.acting, trust="mine"))
    assert again[1:] == [str(acted.folder), "--num-eval-actions", "4", "--trust", "mine"], "no file says whom to trust"
    (acted.folder / "args.json").unlink()  # as when it is killed before this is written
    assert "--run-dir" in next_command(acted)
    assert [path.name for path in (tmp_path / "new" / "a").iterdir()] == ["x"]
    reproduce.take_kept(tmp_path / "kept", jobs := {acts_again.folder: acts_again}, tmp_path / "new")
    assert jobs, "its policy is needed"
    assert "there is no runs.json" in exit_sentence(reproduce.take_kept, tmp_path / "nowhere", jobs, tmp_path)


def test_published_tables_recompute_from_the_results(tmp_path):
    """Each line of a published table with deviations of the comparison is a line of its report."""
    folder = ROOT / "benchmarks" / "results" / "comparison"
    pages = "\n".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    artefact = json.loads((folder / "artefacts.json").read_text())["comparison"]
    cells = report.cells_of(artefact, runs := report.read_runs(folder))
    behaviour, last = report.behaviour_scores(artefact, runs), [cell for cell in cells if cell["metric"] == "last"]
    lines = report.table(last, behaviour, report.mean).splitlines()
    assert len(lines) == 8 and all(line in pages for line in lines)


# ----------------------------------------------------------------------------------------------------------- planning


def test_local_datasets_and_d4rl_files_are_found_by_their_names(datasets, tmp_path):
    names = "medium-replay-v0", "medium-v9", "medium-v10", "medium-v11.old"
    for name in (*(f"edp/hopper/{name}" for name in names), "x/hopper/medium-v2", "dapg/pen/mixed-v0"):
        (datasets / name / "data").mkdir(parents=True)
        (datasets / name / "data" / "metadata.json").touch()
    found = {data.name: data.task for data in reproduce.find_data(("local",), reproduce.PAPER_TASKS)}
    assert found == {"edp/hopper/medium-v10": "hopper-medium", "edp/hopper/medium-replay-v0": "hopper-medium-replay"}
    task = "cube-single-play-singletask-task2-v0"
    assert next(reproduce.find_data((task,), ())).flags == ("--env-id", task)
    made = {data.name: data.task for data in reproduce.find_data(("made",), ())}
    assert len(made) == 8 and made["edp/hopper/medium-v1"] == "hopper-medium" and made["edp/pen/mixed-v1"] is None
    files = {
        "hopper-medium": "hopper_medium-v2.hdf5",
        "hopper-medium-replay": "hopper_medium_replay-v2.hdf5",
        "pen-human": "pen-human-v1.hdf5",
        "antmaze-umaze": "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse.hdf5",
        "antmaze-large-play": "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
        "kitchen-complete": "mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
        "kitchen-partial": "kitchen_microwave_kettle_light_slider-v0.hdf5",
        "kitchen-mixed": "kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
    }
    for file in files.values():
        (tmp_path / file).touch()
    found = reproduce.find_data((str(tmp_path),), reproduce.PAPER_TASKS)
    assert {data.task: Path(data.flags[-1]).name for data in found} == files


def plan(folder, column="bc", **changes):
    args = reproduce.Args(artefacts=("table2",), num_seeds=1, folder=folder, **{"flags": FLAGS} | changes)
    (data,) = reproduce.find_data(("pointmaze-umaze",), ())
    return reproduce.plan(column, "", data, args)


def test_the_key_changes_with_all_that_decides_the_numbers_and_with_nothing_else(
    pointmaze_datasets, tmp_path, monkeypatch
):
    """Without a device: with JAX's threads a process must not be forked, as Ray forks it; a GPU is for the runs."""
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("JAX was started"))
    reproduce.plan.cache_clear()
    job = plan(tmp_path)
    assert plan(tmp_path, on="ray", jobs=2, watch=True).folder == job.folder
    assert plan(tmp_path, flags=f"{FLAGS} --track").folder == job.folder
    assert plan(tmp_path, "bc --top-fraction 1").folder == job.folder, "a default that is said"
    others = [plan(tmp_path, flags=f"{FLAGS} --batch-size 9"), plan(tmp_path, scale=2)]
    others.append(plan(tmp_path, "bc --top-fraction 0.1"))
    file = pointmaze_datasets / "edp/pointmaze/umaze-v0/data/main_data.hdf5"
    plans = []
    for number_type in (np.float64, np.float32):  # a run reads float32
        with h5py.File(file, "r+") as data:
            first = data["episode_0/observations/observation"]
            first[0, 0] = np.nextafter(number_type(first[0, 0]), number_type(1e3))
        reproduce.task_and_digest.cache_clear()
        reproduce.plan.cache_clear()
        plans.append(plan(tmp_path))
    assert plans[0].folder == job.folder, "files of the same numbers"
    others.append(plans[1])
    reproduce.plan.cache_clear()
    with jax.default_matmul_precision("bfloat16"):
        others.append(plan(tmp_path))
    reproduce.plan.cache_clear()
    assert len({job.folder, *(other.folder for other in others)}) == 6
    job = plan(tmp_path, flags="--num-updates 200000 --eval-every 1000", scale=0.01)
    assert (job.num_updates, job.flags[-1]) == (2000, "200"), "a shorter run has ten evaluations"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"artefacts": ()}, "Name a table or figure"),
        ({"scale": float("nan")}, "have to be positive"),
        ({"gpus": 1.5}, "--gpus has to be"),
        ({"flags": "'"}, "No closing quotation"),
        ({"data": ("nobody/has/this-v0",)}, "Dataset nobody/has/this-v0 is not in "),
        ({"data": ("local",)}, "has none of table2's tasks"),
        ({"data": ("no/such/folder",)}, "--data no/such/folder: there is no such folder"),
        ({"flags": "--dataset-id edp/pen/expert-v1"}, "--data chooses the data"),
        ({"flags": "--num-seeds 3"}, "Leave --num-seeds out of --flags"),
        ({"data": ("pointmaze-umaze",), "flags": "--eval-episodes 0"}, "no environment to evaluate in"),
        (
            {"artefacts": ("fig4",), "data": ("pointmaze-umaze",), "flags": "--average-best 4"},
            "4 of --num-eval-actions 1",
        ),
    ],
)
def test_bad_arguments_get_one_sentence(pointmaze_datasets, tmp_path, changes, sentence):
    args = reproduce.Args(**{"artefacts": ("table2",), "folder": tmp_path / "out"} | changes)
    with pytest.raises(SystemExit, match=sentence):
        reproduce.main(args)


# -------------------------------------------------------------------------------------------------------------- sweeps


@pytest.fixture
def sweep_env(pointmaze_datasets, tmp_path, monkeypatch):
    """Of child processes: quick compilation, small data, a cache for all."""
    env = {"MINARI_DATASETS_PATH": str(pointmaze_datasets), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "PYTHONPATH": str(ROOT)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def command(*flags):
    return [sys.executable, str(ROOT / "benchmarks" / "reproduce.py"), *flags, "--data", "pointmaze-umaze"]


def clone(folder, seed, num_updates):
    flags = ("--env-id", "pointmaze-umaze", "--seed", str(seed), "--num-updates", str(num_updates))
    flags += ("--eval-every", str(num_updates // 2), "--eval-episodes", "1", "--batch-size", "8")
    return Job(folder / "maze" / f"bc-{seed}", "bc", flags, num_updates)


def wait_until(condition, timeout=600):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_what_is_done_is_not_run_again_and_a_failure_does_not_stop_the_others(sweep_env, tmp_path):
    jobs = [clone(tmp_path, 0, 20), clone(tmp_path, 1, 20)._replace(flags=("--no-such-flag",))]
    failed = run_all(jobs, Execution(jobs=2))
    assert list(failed) == [jobs[1].folder] and "log says why" in failed[jobs[1].folder]
    written = (jobs[0].folder / "eval.csv").stat().st_mtime_ns
    assert run_all(jobs[:1], Execution()) == {} and (jobs[0].folder / "eval.csv").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_command_that_is_killed_repeats_nothing_and_loses_nothing(sweep_env, tmp_path):
    """kill -9 in training, and again between two evaluations of the last policy; then the same command ends the job."""
    flags = "--flags=--preset fast --eval-episodes 1 --batch-size 8 --num-updates 400 --eval-every 200"
    start = lambda: subprocess.Popen([*command("fig7"), "--num-seeds", "1", flags, "--folder", str(tmp_path / "out")])
    for cut in ("checkpoint-200.eqx", "acting.csv"):
        process = start()
        wait_until(lambda: any(file.stat().st_size for file in tmp_path.rglob(cut)))
        process.kill()
        process.wait()
    assert start().wait() == 0
    (log,) = tmp_path.rglob("*.log")
    first, resumed, acting, rest = [line for line in log.read_text().splitlines() if line.startswith("$ python")]
    assert "--run-dir" in first and "--resume" in resumed
    scales = [line.partition("--init-noise-scale ")[2].split() for line in (acting, rest)]
    assert scales[0] == ["0.0", "0.25", "0.5", "0.75", "1.0"] and 0 < len(scales[1]) < 5
    assert [row["update"] for row in read_csv(log.with_suffix("") / "eval.csv")] == ["0", "200", "400"]
    rows = read_csv(log.with_suffix("") / "acting.csv")
    assert [row["init_noise_scale"] for row in rows] == scales[0] and rows_of(tmp_path / "out" / "fig7.csv")[4]


@pytest.mark.slow
def test_a_node_that_dies_costs_no_run(sweep_env, tmp_path, monkeypatch):
    """Two nodes of Ray on this machine; one is killed while it trains, and every number is that of a quiet run."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    jobs, quiet = ([clone(tmp_path / name, seed, 4000) for seed in range(3)] for name in ("ray", "quiet"))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or on a busy machine they get nothing
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        other = cluster.add_node(num_cpus=1)
        with ThreadPoolExecutor(1) as pool:
            sweep = pool.submit(run_all, jobs, Execution(on="ray", address=cluster.address))
            wait_until(lambda: sweep.done() or len(list(tmp_path.rglob("checkpoint-2000.eqx"))) == 2)
            cluster.remove_node(other, allow_graceful=False)
            assert sweep.result() == {}
    finally:
        cluster.shutdown()
    assert any("--resume" in Path(f"{job.folder}.log").read_text() for job in jobs)
    assert run_all(quiet, Execution()) == {}
    for one, another in zip(jobs, quiet):
        assert (one.folder / "eval.csv").read_text() == (another.folder / "eval.csv").read_text()


@pytest.mark.slow
def test_everything_at_a_thousandth(sweep_env, tmp_path):
    """Every table and figure of the paper, on the small maze."""
    flags = "--scale", "0.001", "--num-seeds", "1", "--flags=--eval-episodes 1 --batch-size 8"
    result = subprocess.run([*command("all"), *flags, "--folder", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    of_paper = {name: artefact for name, artefact in reproduce.ARTEFACTS.items() if not artefact.pairs}
    for name, artefact in of_paper.items():
        assert (tmp_path / f"{name}.md").read_text().startswith(f"# {artefact.title}")
    assert len(read_csv(tmp_path / "fig4.csv")) == 8


def test_a_job_waits_for_the_process_that_holds_its_folder(tmp_path):
    """As a child that outlives its command, or another command."""
    job, stop = clone(tmp_path, 0, 20), threading.Event()
    job.folder.parent.mkdir(parents=True)
    with open(f"{job.folder}.lock", "w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(execute, job, {}, "", stop)
        time.sleep(0.5)
        assert waiting.running() and Path(f"{job.folder}.log").read_text() == "", "nothing is begun"
        stop.set()


@pytest.mark.parametrize(
    ("gpus", "given", "devices"),
    [(0.25, "", "00001"), (0.3, "", "00011"), (1, "", "01234"), (2, "", "0,1 2,3 4,5 6,7 8,9"), (1, "4,2", "42")],
)
def test_runs_at_a_time_share_the_gpus_that_there_are(monkeypatch, gpus, given, devices, exit_sentence):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    for i, expected in enumerate(devices.split() if " " in devices else devices):
        env = gpu_share(i, gpus)
        assert env["CUDA_VISIBLE_DEVICES"] == expected
        assert float(env["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == pytest.approx(0.9 * min(gpus, 1), abs=0.01)
    if given:
        assert f"too few for {i + 2} runs at a time" in exit_sentence(gpu_share, i + 1, gpus)
