"""The record of a run: its folder and what others do to it, what is written, keys, memory, trackers."""

import dataclasses
import errno
import fcntl
import os
import re
import signal
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, make_args, rows_of

from algorithms import bc
from common.harness import Behaviour, Run, process
from common.harness.checkpoint import checkpoints
from common.harness.devices import episode_keys
from common.harness.flags import cli
from common.harness.run import resumed
from common.harness.tasks import TASKS


def begin(folder: Path | None, **changes) -> Run:
    """The record of a tiny run on hopper-medium that has not done anything yet."""
    behaviour = Behaviour({"behaviour_score": 0.0}, np.array([1]), np.zeros(1), np.zeros(11), np.ones(11), [])
    args = make_args(bc, TINY, **changes, run_dir=folder and str(folder))
    return Run("bc.py", args, TASKS["hopper-medium"], behaviour, bc.act)


# --------------------------------------------------------------------------------------------------------------- folder


def test_a_run_whose_folder_was_moved_away_leaves_the_one_in_its_place_alone(tmp_path, exit_sentence):
    weights, metrics = {"weights": np.zeros(3)}, {"policy_loss": jnp.ones((10, 2))}
    with pytest.raises(SystemExit, match="another folder is in its place"), begin(tmp_path / "run") as run:
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with begin(tmp_path / "run", seed=7) as other:
            other.save(10, weights, metrics)
        run.save(10, weights, metrics)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-10.eqx", "checkpoint-0.eqx"]
    assert resumed(bc.Args(resume=str(tmp_path / "run"))).seed == 7


def test_what_resume_may_change_it_changes_to_its_default_too(tmp_path):
    with begin(tmp_path / "run", checkpoint_every=3.0):
        pass
    typed = ["--resume", str(tmp_path / "run"), "--checkpoint-every", "10"]
    assert resumed(cli(bc.Args, typed)).checkpoint_every == bc.Args.checkpoint_every == 10
    assert resumed(cli(bc.Args, typed[:2])).checkpoint_every == 3


def test_a_folder_that_is_used_otherwise_is_refused_and_left_alone(tmp_path, exit_sentence):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert "--run-dir" in exit_sentence(begin, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
    for folder in (tmp_path / "run" / "mine.txt", tmp_path / "run" / "mine.txt" / "below"):
        assert str(folder) in exit_sentence(begin, folder)


def test_a_folder_that_may_not_be_used_is_not_called_missing(tmp_path, exit_sentence):
    """Nor by root, who goes on as nobody."""
    with begin(tmp_path / "run"):
        pass
    (tmp_path / "run").chmod(0)
    user = os.geteuid()
    try:
        os.seteuid(65534 if user == 0 else user)
        for folder in (tmp_path / "run", tmp_path / "run" / "below"):
            assert "Permission denied" in exit_sentence(begin, folder)
        assert "Permission denied" in exit_sentence(resumed, bc.Args(resume=str(tmp_path / "run")))
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_gets_a_note(number, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with begin(tmp_path / "run"):
        pass
    assert "cannot be locked" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../x", "a/b", "two\nlines", "\x1b[31mred"])
def test_a_name_stays_in_its_place(name, tmp_path, monkeypatch, exit_sentence):
    monkeypatch.chdir(tmp_path)
    assert "--exp-name" in exit_sentence(begin, None, exp_name=name)
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_goes_on_says_whom_to_trust(tmp_path):
    """A file does not."""
    assert begin(tmp_path / "run", trust="mine").command.endswith("--resume " + str(tmp_path / "run") + " --trust mine")


# -------------------------------------------------------------------------------------------------- what is recorded


def test_oms_and_rat_are_the_best_and_the_last_ten_evaluations_of_each_seed(tmp_path):
    """Of 12 after training began."""
    scores = np.random.default_rng(0).normal(size=(13, 2))
    with begin(tmp_path / "run") as run:
        run.recorder.scores = dict(enumerate(scores))
        results = run.recorder.results()
    for name, expected in {"last": scores[12], "OMS": scores[1:].max(axis=0), "RAT": scores[3:].mean(axis=0)}.items():
        np.testing.assert_array_equal(results[name], expected)


def test_divergence_is_traced_to_its_update_and_seed(tmp_path, exit_sentence):
    losses = np.ones((10, 2), np.float32)  # (updates, seeds)
    with begin(tmp_path / "run", seed=5) as run:
        run.save(10, {"weights": np.zeros(3)}, {"policy_loss": jnp.asarray(losses)})
        losses[3, 1] = np.nan
        sentence = exit_sentence(run.save, 20, {"weights": np.zeros(3)}, {"policy_loss": jnp.asarray(losses)})
    assert "policy_loss is nan at update 14 of seed 6; a lower --learning-rate" in sentence
    assert [row["update"] + row["seed"] for row in rows_of(tmp_path / "run" / "metrics.csv")] == ["105", "106"]


def test_of_several_runs_that_want_one_folder_one_gets_it(tmp_path):
    """Of four threads, each of which opens and locks the folder as a process does."""

    def outcome(folder):
        try:
            return os.close(begin(folder).lock)
        except SystemExit as error:
            return error.code

    with ThreadPoolExecutor(4) as pool:
        for i in range(10):
            outcomes = [*pool.map(outcome, [tmp_path / str(i)] * 4)]
            assert outcomes.count(None) == 1, outcomes
            assert all(re.search("not empty|Another process is at work", text) for text in outcomes if text)


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    assert [begin(None).folder.name.rpartition("__")[2] for _ in range(3)] == ["now", "now-1", "now-2"]


@pytest.mark.parametrize(
    ("eval_every", "row", "chunk"),
    [(10, 10, 10), (200, 200, 100), (2000, 1000, 100), (1500, 750, 125), (1009, 1009, 1009)],
)
def test_chunks_divide_rows_which_divide_the_evaluation_interval(tmp_path, eval_every, row, chunk):
    run = begin(tmp_path / "run", num_updates=eval_every, eval_every=eval_every)
    assert (run.row, run.chunk) == (row, chunk)


def test_a_row_is_the_mean_of_its_chunks_and_a_signal_waits_for_one_of_them_alone(tmp_path, monkeypatch):
    save = lambda run, update, loss: run.save(update, {"w": np.zeros(3)}, {"policy_loss": jnp.full((100, 2), loss)})
    with pytest.raises(SystemExit) as left, begin(tmp_path / "run", num_updates=2000, eval_every=200) as run:
        monkeypatch.setattr(process, "received", [signal.SIGTERM])
        save(run, 100, 1.0)
    assert left.value.code == 143
    monkeypatch.setattr(process, "received", [])
    with begin(None, num_updates=2000, eval_every=200, resume=str(tmp_path / "run")) as run:
        save(run, 200, 4.0)
    rows = rows_of(tmp_path / "run" / "metrics.csv")
    assert [(row["update"], row["policy_loss"]) for row in rows] == [("200", "2.5")] * 2


def test_every_seed_update_and_episode_acts_by_a_key_of_its_own(tmp_path):
    """A key depends on nothing else: not on the other seeds, not on how many episodes there are."""
    runs = begin(tmp_path / "a", eval_episodes=3), begin(tmp_path / "b", seed=1, num_seeds=1, eval_episodes=2)
    keys = [[episode_keys(run.act_keys, update, run.args.eval_episodes) for update in (1, 2)] for run in runs]
    data = jax.tree.map(jax.random.key_data, keys)
    assert len(np.unique(np.reshape(data[0], (12, -1)), axis=0)) == 12
    np.testing.assert_array_equal(np.array(data[0])[:, 1, :2], np.array(data[1])[:, 0])


def test_what_else_of_jax_decides_digits_is_recorded_and_a_run_that_goes_on_without_it_says_so(tmp_path, capsys):
    with jax.default_matmul_precision("bfloat16"), begin(tmp_path / "run") as run:
        assert run.header["jax_settings"]["jax_default_matmul_precision"] == "bfloat16"
    begin(tmp_path / "run", resume=str(tmp_path / "run"))
    assert "Note: jax_settings differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    "ask", [lambda run: run.restore(np.broadcast_to(np.float32(0), 10**14)), lambda run: jnp.zeros(10**14).sum().item()]
)
def test_what_does_not_fit_into_memory_ends_with_a_sentence(ask, tmp_path, exit_sentence):
    def start():
        with begin(tmp_path / "run") as run:
            ask(run)

    assert "not enough memory: lower --batch-size" in exit_sentence(start)


# --------------------------------------------------------------------------------------------- Weights & Biases


@pytest.mark.filterwarnings("ignore")  # its own
def test_each_seed_is_tracked_by_a_run_of_its_own_which_resume_goes_on_with(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is an optional install")
    settings = {"MODE": "offline", "DIR": str(tmp_path), "PROJECT": "mine", "ENTITY": "us", "SILENT": "true"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    ids = []
    for change in {}, {"resume": str(tmp_path / "run")}:
        with begin(tmp_path / "run", seed=5, track=True, **change) as run:
            run.recorder.metrics(10, {"policy_loss": np.array([1.0, 2.0])}, {})
            ids.append([tracker.id for tracker in run.recorder.trackers])
            for tracker, seed, loss in zip(run.recorder.trackers, (5, 6), (1, 2), strict=True):
                assert (tracker.project, tracker.entity, tracker.group) == ("mine", "us", "run")
                config = {"algorithm": "bc", **dataclasses.asdict(run.args), "seed": seed}
                assert tracker.config.as_dict() == config
                logged = dict(tracker.summary)
                assert (logged["update"], logged["train/policy_loss"]) == (10, loss)
                assert logged["charts/updates_per_second"] > 0
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


def test_what_is_called_wandb_and_is_not_weights_and_biases_leaves_no_folder(tmp_path, monkeypatch, exit_sentence):
    other = types.ModuleType("wandb")  # as Python makes one of a folder beside the script
    monkeypatch.setitem(sys.modules, "wandb", other)
    assert "pip install wandb" in exit_sentence(begin, tmp_path / "run", track=True)
    other.init = None
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-agent")
    assert "leave --num-seeds out" in exit_sentence(begin, tmp_path / "run", track=True)
    monkeypatch.delenv("WANDB_RUN_ID")
    other.init = lambda **_: 1 / 0  # as without a login, or a network
    assert "division by zero" in exit_sentence(begin, tmp_path / "run", track=True)
    assert not (tmp_path / "run").exists()
