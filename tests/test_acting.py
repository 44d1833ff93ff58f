"""Finished runs, acting again: real tiny runs, evaluated as they were and otherwise, or taken away in a file."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import acting
import cards
import export
import jax
import numpy as np
import pytest
import report
from helpers import quickly, record_hopper, rows_of

from algorithms import bc, edp_td3bc
from common.harness.checkpoint import save_checkpoint
from common.harness.environments import check_camera
from common.harness.flags import cli
from common.harness.records import Episodes
from common.harness.tasks import ENVIRONMENTS, LOCOMOTION, normalized_score, with_domain_defaults

TINY = {"dataset_id": "test/hopper/random-v0", "num_updates": 2, "eval_episodes": 2, "num_seeds": 2, "seed": 3}
DIFFUSION = {"num_diffusion_steps": 21, "num_solver_calls": 3, "num_eval_actions": 5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of two runs on Hopper, whose every action shows in the return: EDP + TD3+BC and cloning."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, quickly():  # and all tests: what is compared is made alike
        patch.chdir(folder)  # MuJoCo writes its warnings into the working directory
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        (folder / "minari").mkdir()
        record_hopper()
        shaped = {"normalize_obs": True, "reward_rule": "normalize"}
        edp = edp_td3bc.Args(**TINY, **DIFFUSION, batch_size=8, run_dir=str(folder / "edp"), **shaped)
        edp_td3bc.train(edp)
        bc.train(bc.Args(**TINY, batch_size=8, run_dir=str(folder / "bc"), top_fraction=0.5))
        yield folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A copy of `trained` for one test, and its data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(trained / "minari"))
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def returns_of(file: Path) -> list[tuple[str, ...]]:
    """(seed, episode, return, length), with the return in full."""
    return [tuple(row[name] for name in ("seed", "episode", "return", "length")) for row in rows_of(file)]


@pytest.mark.parametrize("name", ["edp", "bc"])
def test_without_other_settings_the_last_evaluation_is_repeated(runs, name, capsys):
    acting.main(acting.Args((runs / name,)))
    expected = returns_of(runs / name / "eval.csv")
    assert len({row[2] for row in expected}) == 4, "an episode is not like another"
    assert returns_of(runs / name / "acting.csv") == expected
    assert "as in the run" in capsys.readouterr().out


def test_every_combination_is_evaluated_and_added_to_what_is_there(runs, capsys):
    acting.main(acting.Args((runs / "edp",), num_eval_actions=(1, 3), init_noise_scale=(0.0, 1.0), episodes=1))
    acting.main(acting.Args((runs / "edp",), sampler=("ddpm",), episodes=1))
    rows = rows_of(runs / "edp" / "acting.csv")
    seen = [(row["num_eval_actions"], row["init_noise_scale"], row["sampler"], row["seed"]) for row in rows]
    combinations = [(n, scale, "dpm") for n in ("1", "3") for scale in ("0.0", "1.0")] + [("5", "1.0", "ddpm")]
    assert seen == [(*combination, seed) for combination in combinations for seed in ("3", "4")]
    returns = {key[:3]: float(row["return"]) for key, row in zip(seen, rows) if row["seed"] == "3"}
    single = returns.pop(("1", "0.0", "dpm"))
    np.testing.assert_allclose(returns["3", "0.0", "dpm"], single, rtol=1e-6)  # without noise, candidates are alike
    assert np.diff(sorted(returns.values())).min() > 1e-3, "otherwise every setting changes what is done"
    assert "num_eval_actions 3, init_noise_scale 0.0: " in capsys.readouterr().out

    older = [{name: value for name, value in row.items() if name != "average_best"} for row in rows]
    report.write_csv(runs / "edp" / "acting.csv", older)  # of a version with fewer settings
    acting.main(acting.Args((runs / "edp",), average_best=(5,), episodes=1))
    *before, _, last = rows_of(runs / "edp" / "acting.csv")
    assert [row | {"average_best": "0"} for row in before] == rows and last["average_best"] == "5"


def test_every_setting_has_a_video_of_its_own(runs):
    pytest.importorskip("moviepy", reason="requirements-dev.txt brings it")
    try:
        check_camera(ENVIRONMENTS["Hopper"])
    except SystemExit as error:
        pytest.skip(error.code)
    (runs / "edp" / "videos").mkdir()
    (runs / "edp" / "videos" / "update-2.mp4").write_text("of training")
    acting.main(acting.Args((runs / "edp",), num_eval_actions=(1, 2), episodes=1, capture_video=True))
    found = {file.relative_to(runs / "edp" / "videos").as_posix() for file in runs.glob("edp/videos/**/*.mp4")}
    assert found == {"update-2.mp4", *(f"num_eval_actions-{n}/update-2.mp4" for n in (1, 2))}
    assert (runs / "edp" / "videos" / "update-2.mp4").read_text() == "of training"


def test_another_runs_critics_choose(runs):
    """As in a run of the same policy that has these critics itself."""
    run = acting.open_run(runs / "edp")
    opposite = jax.tree.map(lambda leaf: -100 * leaf, run.state.critics)
    shutil.copytree(runs / "edp", runs / "other")
    save_checkpoint(runs / "other", run.state._replace(critics=opposite), run.header)
    acting.main(acting.Args((runs / "edp",), critics=runs / "other"))
    acting.main(acting.Args((runs / "other",)))
    returns = returns_of(runs / "edp" / "acting.csv")
    assert returns == returns_of(runs / "other" / "acting.csv") != returns_of(runs / "edp" / "eval.csv")
    assert {row["critics"] for row in rows_of(runs / "edp" / "acting.csv")} == {str(runs / "other")}


ALONE = """
import sys
sys.path += sys.argv[1:]
import importlib.util, pathlib
assert not any(importlib.util.find_spec(name) for name in ("common", "algorithms"))
import numpy as np
from jax import export
policy = export.deserialize(bytearray(pathlib.Path("policy.jax").read_bytes()))
given = np.load("given.npz")
np.save("action.npy", policy.call(given["obs"], given["seeds"], np.int32(7)))
assert not {"common", "algorithms", "equinox"} & set(sys.modules)
"""


def test_an_exported_policy_acts_without_this_repository_as_it_does_in_it(runs, capsys):
    """In a process without site-packages' .pth files, so that an editable installation does not bring it back."""
    pytest.importorskip("flatbuffers", reason="requirements-dev.txt has it")
    run, rng = acting.open_run(runs / "edp"), np.random.default_rng(0)
    header = run.header | {"args": run.header["args"] | {"prediction": "action"}}  # what it predicts shows, unclipped
    save_checkpoint(runs / "edp", run.state, header)
    run = acting.open_run(runs / "edp")
    export.main(export.Args(runs / "edp", Path("policy.jax"), seed=4))
    assert "edp_td3bc, update 2, seed 4" in capsys.readouterr().out
    mean, std = run.header["normalization"]
    obs = np.float32(rng.normal(mean, std, size=(6, 11)))
    seeds = np.array([5, 5, 8, 9, 10, 2**32 - 1], np.uint32)
    np.savez("given.npz", obs=obs, seeds=seeds)
    packages = [path for path in sys.path if path.endswith("-packages")]
    compiled_alike = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    compiled_alike["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
    command = [sys.executable, "-I", "-S", "-c", ALONE, *packages]
    subprocess.run(command, check=True, timeout=300, env=compiled_alike)
    keys = jax.vmap(jax.vmap(jax.random.key))(np.stack([seeds, seeds]))
    expected = run.act(np.stack([obs, obs]), keys, 7, run.args)  # seeds 3 and 4
    unstandardised = run.module.act(run.state, np.stack([obs, obs]), keys, 7, run.args)
    np.testing.assert_allclose(np.load("action.npy"), expected[1], atol=1e-5)
    for other in (expected[0], unstandardised[1]):
        assert np.abs(expected[1] - other).max() > 0.01, "otherwise a mistake would not show"


# ------------------------------------------------------------------------------------------------------ kept policies


def test_a_kept_policy_acts_without_its_data_and_is_verified_by_its_card(runs, monkeypatch, capsys, exit_sentence):
    monkeypatch.setattr(cards, "FOLDER", Path("policies").absolute())
    monkeypatch.setattr(cards, "CARD_EPISODES", 3)
    run, folder = acting.open_run(runs / "edp"), Path("policies/hopper")
    cards.keep(cards.Keep(runs / "edp", "hopper"))
    card = json.loads((folder / "card.json").read_text())
    returns = {
        seed: [float(row[2]) for row in returns_of(runs / "edp" / "eval.csv") if row[0] == seed] for seed in "34"
    }
    assert card["seed"] == int(min(returns, key=lambda seed: np.mean(returns[seed]))), "the lower of two"
    typed = cli(edp_td3bc.Args, shlex.split(card["command"])[2:])
    assert "--dataset-id test/hopper/random-v0" in card["command"]
    assert dataclasses.replace(with_domain_defaults(typed, LOCOMOTION), run_dir=run.args.run_dir) == run.args
    for sentence, call in {
        "hopper/ is there already": cards.Keep(runs / "edp", "hopper"),
        "has no seed 5": cards.Keep(runs / "edp", "other", seed=5),
        "no critics": cards.Keep(runs / "bc", "other"),
        "is no run that was evaluated": cards.Keep(folder, "other"),
        "must be that of a folder in policies/": cards.Keep(runs / "edp", "../other"),
    }.items():
        assert sentence in exit_sentence(lambda call=call: cards.keep(call))
    files = sorted(folder.iterdir())
    assert "not what training needs" in exit_sentence(lambda: edp_td3bc.train(edp_td3bc.Args(resume=str(folder))))
    assert sorted(folder.iterdir()) == files

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path("nowhere").absolute()))
    half = lambda leaf: np.float32(np.float16(leaf[card["seed"] - 3, None]))
    kept = acting.open_run(folder)
    for name in ("policy", "critics"):
        expected = jax.tree.map(half, getattr(run.state, name))
        jax.tree.map(np.testing.assert_array_equal, getattr(kept.state, name), expected)
    cards.verify(cards.Verify())
    assert re.search(r"hopper: 3 episodes score ([\d.-]+), on the card \1: within", capsys.readouterr().out)
    acting.main(acting.Args((folder,), episodes=2))
    returns = np.array([float(row[2]) for row in returns_of(folder / "acting.csv")])
    np.testing.assert_allclose(normalized_score(ENVIRONMENTS["Hopper"], returns), card["scores"][:2], rtol=1e-6)

    card["scores"] = [50.0 + score for score in card["scores"]]
    (folder / "card.json").write_text(json.dumps(card))
    assert exit_sentence(lambda: cards.verify(cards.Verify(("hopper",)))) == "Not as their cards say: hopper."
    (folder / "card.json").unlink()
    assert "has no card.json" in exit_sentence(lambda: cards.verify(cards.Verify(("hopper",))))


# ------------------------------------------------------------------------------------------------------- refusals


def acting_of(folder: Path, **changes):
    return lambda: acting.main(acting.Args(**{"runs": (folder,)} | changes))


def export_of(folder: Path, file="policy.jax", **changes):
    return lambda: export.main(export.Args(folder, Path(file), **changes))


def test_what_cannot_be_done_gets_one_sentence_and_writes_nothing(runs, monkeypatch, exit_sentence):
    edp, bc_run, nothing = runs / "edp", runs / "bc", runs / "nothing"
    run = acting.open_run(edp)
    other = {"normalization": run.header["normalization"][::-1], "args": run.header["args"] | {"eval_episodes": 0}}
    (runs / "scaled").mkdir()
    save_checkpoint(runs / "scaled", run.state, run.header | other)
    cases = {
        "There is no run in .*nothing/": acting_of(nothing),
        "bc has no --num-eval-actions.": acting_of(bc_run, num_eval_actions=(3,)),
        "Impossible settings: .* order 3": acting_of(edp, num_solver_calls=(1,)),
        "Impossible settings: --average-best 6 of --num-eval-actions 5": acting_of(edp, average_best=(6,)),
        "--init-noise-scale must be 0 or more": acting_of(edp, init_noise_scale=(1.0, -1.0)),
        "--episodes must be positive, but is 0.": acting_of(edp, episodes=0),
        "The critics of .*bc/ do not fit .*edp/": acting_of(edp, critics=bc_run),
        "scaled/ do not fit .* on another scale": acting_of(edp, critics=runs / "scaled"),
        "trained without evaluations: add --episodes": acting_of(runs / "scaled"),
        "Name the folder of a run": acting_of(edp, runs=()),
        "edp/ has no seed 5; it has 3, 4.": export_of(edp, seed=5),
        "Cannot write missing/policy.jax: No such file": export_of(bc_run, "missing/policy.jax"),
    }
    for sentence, call in cases.items():
        assert re.search(sentence, exit_sentence(call))
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.delitem(sys.modules, "jax._src.export.serialization", raising=False)
    assert "pip install flatbuffers" in exit_sentence(export_of(bc_run))
    assert not [*runs.rglob("acting.csv"), *Path.cwd().glob("*.jax")]


def test_an_interrupted_evaluation_keeps_what_is_finished(runs, monkeypatch, exit_sentence):
    def evaluations():
        yield Episodes(np.zeros((2, 1)), np.ones((2, 1), int), [])
        raise KeyboardInterrupt

    each = evaluations()
    monkeypatch.setattr(acting.Evaluator, "__call__", lambda *_: next(each))
    with pytest.raises(KeyboardInterrupt):
        acting_of(runs / "edp", num_eval_actions=(1, 2), episodes=1)()
    assert [row["num_eval_actions"] for row in rows_of(runs / "edp" / "acting.csv")] == ["1", "1"]
    (runs / "bc" / "acting.csv").mkdir()
    assert "Cannot write" in exit_sentence(acting_of(runs / "bc"))
