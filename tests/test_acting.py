"""Finished runs, acting again: real tiny runs, evaluated as they were and otherwise."""

import csv
import importlib.util
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import bc, edp_td3bc
from common.data import Dataset
from common.run import TrainedRun, load_run, save_checkpoint

FILE = Path(__file__).parents[1] / "benchmarks" / "acting.py"
spec = importlib.util.spec_from_file_location("acting", FILE)
acting = importlib.util.module_from_spec(spec)
spec.loader.exec_module(acting)

TINY = {"num_updates": 2, "eval_episodes": 2, "num_seeds": 2, "seed": 3, "batch_size": 8}
DIFFUSION = {"num_diffusion_steps": 21, "num_solver_calls": 3, "num_eval_actions": 2}


@pytest.fixture(scope="module")
def trained(made_pointmaze, tmp_path_factory):
    """The folders of two runs, EDP + TD3+BC and cloning with a Gaussian."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(made_pointmaze))
        edp_td3bc.train(edp_td3bc.Args(**TINY, **DIFFUSION, run_dir=str(folder / "edp")))
        bc.train(bc.Args(**TINY, run_dir=str(folder / "bc")))
    return folder


@pytest.fixture
def runs(trained, pointmaze_datasets, tmp_path):
    """A copy of `trained`, and its data, for one test."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("name", ["edp", "bc"])
def test_without_other_settings_the_last_evaluation_is_repeated(runs, name, capsys):
    acting.main(acting.Args((runs / name,)))
    names = ("seed", "episode", "return", "length")
    repeated = [[row[n] for n in names] for row in rows_of(runs / name / "acting.csv")]
    assert repeated == [[row[n] for n in names] for row in rows_of(runs / name / "eval.csv")]
    assert "as in the run" in capsys.readouterr().out


def test_every_combination_is_evaluated_and_added_to_what_is_there(runs, capsys):
    acting.main(acting.Args((runs / "edp",), num_eval_actions=(1, 3), init_noise_scale=(0.0, 1.0), episodes=1))
    acting.main(acting.Args((runs / "edp",), sampler=("ddpm",), episodes=1))
    rows = rows_of(runs / "edp" / "acting.csv")
    seen = [(row["num_eval_actions"], row["init_noise_scale"], row["sampler"], row["seed"]) for row in rows]
    combinations = [(n, scale, "dpm") for n in ("1", "3") for scale in ("0.0", "1.0")] + [("2", "1.0", "ddpm")]
    assert seen == [(*combination, seed) for combination in combinations for seed in ("3", "4")]
    assert "num_eval_actions 3, init_noise_scale 0.0: " in capsys.readouterr().out


def test_another_runs_critics_choose(runs):
    shutil.copytree(runs / "edp", runs / "other")
    run = load_run(runs / "edp")
    opposite = jax.tree.map(lambda leaf: -leaf, run.state.critics)
    save_checkpoint(runs / "other" / "checkpoint.eqx", run.state._replace(critics=opposite), run.header)
    mixed = acting.with_critics(run, runs / "edp", runs / "other")
    jax.tree.map(np.testing.assert_array_equal, mixed.state, run.state._replace(critics=opposite))

    acting.main(acting.Args((runs / "edp",), critics=runs / "other"))
    assert {row["critics"] for row in rows_of(runs / "edp" / "acting.csv")} == {str(runs / "other")}


def test_spread_is_that_of_the_samples_and_of_the_data_around_their_mean():
    """Samples N(0.1, 0.3^2) and data N(0.5, 0.2^2): 0.3, and sqrt(0.4^2 + 0.2^2)."""
    rng = np.random.default_rng(0)
    dataset = Dataset(*jnp.float32(rng.normal(size=(2000, 5, 1)).transpose(1, 0, 2)))
    dataset = dataset._replace(action=0.5 + 0.2 * dataset.action, reward=dataset.reward[:, 0])
    draw = lambda policy, obs, keys, step, args: 0.1 + 0.3 * jax.random.normal(keys[0], obs.shape)
    run = TrainedRun(SimpleNamespace(select_action=draw), bc.Args(num_seeds=2), SimpleNamespace(policy=None), {})
    samples, data = acting.spread(run, dataset, num_states=2000)
    np.testing.assert_allclose(samples, 0.3, rtol=0.01)
    np.testing.assert_allclose(data, np.sqrt(0.4**2 + 0.2**2), rtol=0.02)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("nothing", {}, "There is no checkpoint.eqx in .*nothing/; name the folder of a run."),
        ("bc", {"num_eval_actions": (3,)}, "bc has no --num-eval-actions."),
        ("edp", {"num_solver_calls": (1,)}, "Impossible diffusion: .* order 3"),
        ("edp", {"init_noise_scale": (1.0, -1.0)}, "--init-noise-scale must be 0 or more"),
        ("edp", {"episodes": 0}, "--episodes must be positive, but is 0."),
        ("edp", {"critics": "bc"}, "The critics of .*bc/ do not fit .*edp/"),
    ],
)
def test_what_cannot_be_done_gets_one_sentence_and_writes_nothing(runs, name, changes, sentence, exit_sentence):
    changes = {key: runs / value if key == "critics" else value for key, value in changes.items()}
    assert re.search(sentence, exit_sentence(acting.main, acting.Args((runs / name,), **changes)))
    assert not (runs / name / "acting.csv").exists()


def test_no_run_at_all_gets_one_sentence(exit_sentence):
    assert "Name the folder of a run" in exit_sentence(acting.main, acting.Args(()))


@pytest.mark.parametrize("damage", ["header", "leaves", "flags"])
def test_a_damaged_checkpoint_gets_one_sentence(runs, damage, exit_sentence):
    file = runs / "edp" / "checkpoint.eqx"
    header, leaves = file.read_bytes().split(b"\n", 1)
    damaged = {
        "header": header[:50] + b"\n" + leaves,
        "leaves": header + b"\n" + leaves[:1000],
        "flags": header.replace(b'"batch_size"', b'"size_of_batch"') + b"\n" + leaves,
    }
    file.write_bytes(damaged[damage])
    assert "is damaged, or not of this version" in exit_sentence(acting.main, acting.Args((runs / "edp",)))
