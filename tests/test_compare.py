"""The comparison: real runs side by side, read back from their raw returns."""

import importlib.util
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "compare.py"
spec = importlib.util.spec_from_file_location("compare", FILE)
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)

FLAGS = "--num-updates 4 --eval-every 2 --eval-episodes 2 --batch-size 8 --num-seeds 2"


@pytest.fixture
def write_run(tmp_path):
    def write(dataset, column, returns, reference=(-20.0, 30.0), num_updates=20, batch_size=64):
        """A run's files, with returns (evaluations, seeds, episodes) after 10, 20, ... updates."""
        folder = tmp_path / dataset / compare.folder_name(column)
        folder.mkdir(parents=True)
        settings = {"num_updates": num_updates, "batch_size": batch_size, "seed": 0, "num_seeds": len(returns[0])}
        header = {"args": settings, "reference_returns": reference}
        (folder / "args.json").write_text(json.dumps(header | {"dataset": {"behaviour_score": 7.25}}))
        rows = [f"{10 * (i + 1)},{seed},{j},{float(value)!r},5" for (i, seed, j), value in np.ndenumerate(returns)]
        (folder / "eval.csv").write_text("\n".join(["update,seed,episode,return,length", *rows]) + "\n")

    return write


def test_scores_are_those_of_the_raw_returns(tmp_path, write_run):
    returns = np.random.default_rng(0).normal(size=(2, 3, 4))
    write_run("hopper", "EDP + IQL", returns)
    result = compare.read_run(tmp_path / "hopper" / "edp-iql")
    np.testing.assert_array_equal(result.updates, [10, 20])
    np.testing.assert_allclose(result.scores, 40 + 2 * returns.mean(axis=2))  # -20 scores 0 and 30 scores 100


def test_without_reference_a_score_is_the_return(tmp_path, write_run):
    write_run("own-data", "BC", np.array([[[3.0, 5.0]], [[6.0, 8.0]]]), reference=None)
    np.testing.assert_allclose(compare.read_run(tmp_path / "own-data" / "bc").scores, [[4.0], [7.0]])


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


def test_a_comparison_runs_what_is_missing_and_nothing_twice(pointmaze_datasets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "comparison"
    args = compare.Args(("pointmaze-umaze",), ("BC", "10% BC"), FLAGS, jobs=2, folder=folder)
    compare.main(args)
    output = capsys.readouterr().out
    assert "10% BC on pointmaze-umaze: done" in output and "| pointmaze-umaze |" in output
    assert matplotlib.image.imread(folder / "comparison.png").std() > 0
    arguments = [json.loads((folder / f"pointmaze-umaze/{name}/args.json").read_text()) for name in ("bc", "10-bc")]
    assert [header["args"]["top_fraction"] for header in arguments] == [1.0, 0.1]
    assert all(header["args"]["num_updates"] == 4 and header["args"]["num_seeds"] == 2 for header in arguments)

    compare.main(args)
    assert "done" not in capsys.readouterr().out

    (folder / "pointmaze-umaze/bc/eval.csv").write_text("update,seed,episode,return,length\n")
    with pytest.raises(SystemExit, match="bc/ holds a run that was cut off"):
        compare.main(args)


def test_a_run_that_fails_is_named_and_the_others_go_on(pointmaze_datasets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(compare.COLUMNS, "BC", "bc --num-diffusion-steps")
    args = compare.Args(("pointmaze-umaze",), ("BC", "10% BC"), FLAGS, folder=tmp_path / "comparison")
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        compare.main(args)
    assert "BC on pointmaze-umaze: failed" in capsys.readouterr().out
    assert "--num-diffusion-steps" in (tmp_path / "comparison/pointmaze-umaze/bc.log").read_text()
    assert compare.read_all(tmp_path / "comparison")["pointmaze-umaze"].keys() == {"10% BC"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"columns": ("SAC",)}, "No column is named 'SAC'"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"data": ()}, "no finished run"),
        ({"flags": "--seed '1"}, "cannot be read: No closing quotation"),
        ({"folder": FILE}, "Cannot write to"),
    ],
)
def test_bad_arguments_get_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(SystemExit, match=sentence):
        compare.main(compare.Args(**{"columns": ("BC",), "folder": tmp_path} | changes))
