"""A run's folder and what others do to it: moved away, unreadable, not to be locked; names, streams, trackers."""

import errno
import fcntl
import os
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY

from algorithms import bc
from common.harness import Behaviour, Run
from common.harness.checkpoint import checkpoints
from common.harness.run import resumed
from common.harness.tasks import TASKS


def begin(folder: Path | None, **changes) -> Run:
    """The record of a tiny run on hopper-medium that has not done anything yet."""
    behaviour = Behaviour({"behaviour_score": 0.0}, np.array([1]), np.zeros(1), np.zeros(11), np.ones(11), [])
    common = {name: value for name, value in TINY.items() if hasattr(bc.Args, name)}
    args = bc.Args(**common | changes, run_dir=folder and str(folder))
    return Run("bc.py", args, TASKS["hopper-medium"], behaviour, bc.act)


def test_a_run_whose_folder_was_moved_away_leaves_the_one_in_its_place_alone(tmp_path, exit_sentence):
    weights, metrics = {"weights": np.zeros(3)}, {"policy_loss": jnp.ones((10, 2))}
    with pytest.raises(SystemExit, match="another folder is in its place"), begin(tmp_path / "run") as run:
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with begin(tmp_path / "run", seed=7) as other:
            other.save(10, weights, metrics)
        run.save(10, weights, metrics)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-10.eqx", "checkpoint-0.eqx"]
    assert resumed(bc.Args(resume=str(tmp_path / "run"))).seed == 7


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_gets_a_note(number, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with begin(tmp_path / "run"):
        pass
    assert "cannot be locked" in capsys.readouterr().out


def test_a_run_that_may_not_be_read_is_not_called_missing(tmp_path, exit_sentence):
    """Nor by root, who goes on as nobody."""
    with begin(tmp_path / "run"):
        pass
    (tmp_path / "run").chmod(0)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        sentence = exit_sentence(resumed, bc.Args(resume=str(tmp_path / "run")))
    finally:
        if is_root:
            os.seteuid(0)
    assert "Permission denied" in sentence


@pytest.mark.parametrize("name", ["../../x", "a/b", "two\nlines", "\x1b[31mred"])
def test_a_name_stays_in_its_place(name, tmp_path, monkeypatch, exit_sentence):
    monkeypatch.chdir(tmp_path)
    assert "--exp-name" in exit_sentence(begin, None, exp_name=name)
    assert list(tmp_path.iterdir()) == []


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
