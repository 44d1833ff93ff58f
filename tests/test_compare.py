"""The comparison: real runs side by side, read back from their raw returns."""

import json

import compare
import matplotlib.image
import numpy as np
import pytest
from helpers import rows_of

FLAGS = "--num-updates 4 --eval-every 2 --eval-episodes 2 --batch-size 8 --num-seeds 2"


@pytest.fixture
def write_run(tmp_path):
    def write(dataset, column, returns, reference=(-20.0, 30.0), num_updates=20, batch_size=64):
        """A run's files, with returns (evaluations, seeds, episodes) after 10, 20, ... updates."""
        folder = tmp_path / dataset / compare.folder_name(column)
        folder.mkdir(parents=True)
        settings = {"num_updates": num_updates, "batch_size": batch_size, "seed": 0, "num_seeds": len(returns[0])}
        header = {"args": settings, "reference_returns": reference, "normalization": [[0.0], [1.0]]}
        (folder / "args.json").write_text(json.dumps(header | {"dataset": {"behaviour_score": 7.25}}))
        rows = [f"{10 * (i + 1)},{seed},{j},{float(value)!r},5" for (i, seed, j), value in np.ndenumerate(returns)]
        (folder / "eval.csv").write_text("\n".join(["update,seed,episode,return,length", *rows]) + "\n")

    return write


def test_scores_are_those_of_the_raw_returns(tmp_path, write_run):
    returns = np.random.default_rng(0).normal(size=(2, 3, 4))
    write_run("hopper", "EDP + IQL", returns)
    write_run("own-data", "BC", np.array([[[3.0, 5.0]], [[6.0, 8.0]]]), reference=None)
    results = compare.read_all(tmp_path)
    np.testing.assert_array_equal(results["hopper"]["EDP + IQL"].updates, [10, 20])
    np.testing.assert_allclose(results["hopper"]["EDP + IQL"].scores, 40 + 2 * returns.mean(axis=2))  # from -20 to 30
    np.testing.assert_allclose(results["own-data"]["BC"].scores, [[4.0], [7.0]])  # without reference, the return


def test_the_table_has_means_and_deviations_and_leaves_out_what_did_not_finish(tmp_path, write_run):
    write_run("b", "BC", np.array([[[9.0], [9.0]], [[4.0], [8.0]]]), reference=(0.0, 100.0))
    write_run("a", "10% BC", np.array([[[1.0]], [[2.0]]]), reference=(0.0, 100.0))
    write_run("a", "IQL", np.array([[[1.0]]]))  # ten updates of twenty
    table = compare.table(compare.read_all(tmp_path), lambda result: result.scores[-1])
    assert table.splitlines() == [
        "| | behaviour | BC | 10% BC |",
        "|---|---|---|---|",
        "| a | 7.2 |  | 2.0 |",
        "| b | 7.2 | 6.0 +- 2.8 |  |",
    ]


def test_runs_of_other_settings_are_not_put_side_by_side(tmp_path, write_run):
    write_run("a", "BC", np.zeros((2, 1, 1)))
    write_run("b", "IQL", np.zeros((2, 1, 1)), batch_size=256)  # another dataset may have its own
    assert len(compare.read_all(tmp_path)) == 2
    write_run("a", "IQL", np.zeros((2, 1, 1)), batch_size=256)
    with pytest.raises(SystemExit, match=r"BC has .*64.* and IQL .*256"):
        compare.read_all(tmp_path)


def test_condensed_runs_hold_every_value_and_give_the_same_tables(tmp_path, write_run, capsys):
    rng = np.random.default_rng(0)
    write_run("a", "BC", rng.normal(size=(2, 3, 4)))
    write_run("a", "IQL", rng.normal(size=(2, 3, 4)))
    (tmp_path / "a/iql/acting.csv").write_text("update,seed,return\n20,0,0.1\n")
    condensed = tmp_path / "elsewhere"
    compare.main(compare.Args(data=(), folder=tmp_path, condense=condensed))
    before = capsys.readouterr().out
    for name, header in json.loads((condensed / "runs.json").read_text()).items():
        written = json.loads((tmp_path / name / "args.json").read_text())
        assert header | {"normalization": written["normalization"]} == written
        rows = [row for row in rows_of(condensed / "returns.csv") if row.pop("run") == name]
        assert rows == rows_of(tmp_path / name / "eval.csv")
    assert rows_of(condensed / "acting.csv") == [{"run": "a/iql", "update": "20", "seed": "0", "return": "0.1"}]
    compare.main(compare.Args(data=("a",), columns=("BC", "IQL"), folder=condensed))
    assert capsys.readouterr().out == before, "nothing runs, and the tables are the same"


def test_a_comparison_runs_what_is_missing_and_nothing_twice(pointmaze_datasets, tmp_path, monkeypatch, capsys):
    """A run that fails is named, and the others go on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(compare.COLUMNS, "IQL", "bc --num-diffusion-steps")
    folder = tmp_path / "comparison"
    args = compare.Args(("pointmaze-umaze",), ("BC", "10% BC", "IQL"), FLAGS, jobs=2, folder=folder)
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        compare.main(args)
    assert "IQL on pointmaze-umaze: failed" in capsys.readouterr().out
    assert "--num-diffusion-steps" in (folder / "pointmaze-umaze/iql.log").read_text()

    args = compare.Args(("pointmaze-umaze",), ("BC", "10% BC"), FLAGS, folder=folder)
    compare.main(args)
    output = capsys.readouterr().out
    assert "done" not in output and "| pointmaze-umaze |" in output
    assert matplotlib.image.imread(folder / "comparison.png").std() > 0
    runs = [header["args"] for header, _ in compare.read_runs(folder).values()]
    assert {(run["top_fraction"], run["num_updates"], run["num_seeds"]) for run in runs} == {(0.1, 4, 2), (1.0, 4, 2)}

    (folder / "pointmaze-umaze/bc/eval.csv").write_text("update,seed,episode,return,length\n")
    with pytest.raises(SystemExit, match="bc/ holds a run that was cut off"):
        compare.main(args)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"columns": ("SAC",)}, "No column is named 'SAC'"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"data": ()}, "no finished run"),
        ({"flags": "--seed '1"}, "cannot be read: No closing quotation"),
        ({"folder": compare.ROOT / "README.md"}, "Cannot write to"),
    ],
)
def test_bad_arguments_get_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(SystemExit, match=sentence):
        compare.main(compare.Args(**{"columns": ("BC",), "folder": tmp_path} | changes))
