"""Runs that are interrupted, damaged or refused, and go on: nothing lost, nothing done twice.

In this process; what signals and kill -9 do to a process of its own is in test_process.py.
"""

import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import minari
import numpy as np
import pytest
from helpers import ALGORITHMS, TINY, damaged, make_args, quickly, record_hopper, returns_of, same_run

import common.harness.run
from algorithms import bc, td3bc
from common.harness import Evaluator, load_run
from common.harness.checkpoint import CheckpointError, checkpoints, save_checkpoint
from common.harness.flags import cli

SHORT = {"num_updates": 12, "eval_every": 3, "dataset_id": "test/hopper/random-v0", "preset": "fast"}
SETTINGS = [a if a == "td3bc" else pytest.param(a, marks=pytest.mark.slow) for a in ALGORITHMS]


def args_of(module, folder, **changes):
    return make_args(module, TINY, **SHORT | changes, run_dir=str(folder))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with minari/, small data of Hopper, and whole/, a run of cloning that nothing stopped."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "minari").mkdir()
    with pytest.MonkeyPatch.context() as patch, quickly():
        patch.chdir(folder)  # MuJoCo writes its warnings into the working directory
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        record_hopper()
        bc.train(args_of(bc, folder / "whole"))
    return folder


@pytest.fixture
def train(home, datasets, tmp_path, monkeypatch, quick_networks):
    """`train(module, folder, stop, **changes)` trains here; before the evaluation of update `stop` it calls `halt`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    evaluate = Evaluator.__call__

    def interrupt():
        raise KeyboardInterrupt

    def call(module, folder="", stop=0, halt=interrupt, **changes):
        def evaluations(self, policy, keys, update):
            if update == stop:
                halt()
            return evaluate(self, policy, keys, update)

        monkeypatch.setattr(Evaluator, "__call__", evaluations)
        return module.train(module.Args(**changes) if "resume" in changes else args_of(module, folder, **changes))

    return call


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(algorithm, train, tmp_path, capsys):
    """Stopped in its second evaluation, and again in its third; then made longer (without decay: its end is known)."""
    module, parts = importlib.import_module(f"algorithms.{algorithm}"), tmp_path / "parts"
    results = train(module, tmp_path / "other", preset="paper")
    with pytest.raises(KeyboardInterrupt):
        train(module, parts, stop=6, preset="paper", num_updates=9)
    command = rf"Stopped after update 6. To go on: python .*{algorithm}.py --resume {parts}"
    assert re.search(command, capsys.readouterr().err)
    assert returns_of(parts).shape == (1, 2, 2)
    assert (parts / "learning_curve.png").stat().st_size > 0
    assert load_run(parts, module)[2]["update"] == 6
    with pytest.raises(KeyboardInterrupt):
        train(module, stop=9, resume=str(parts))
    resumed = train(module, resume=str(parts), num_updates=12)
    same_run(tmp_path / "other", parts)
    for name, values in results.items():
        np.testing.assert_array_equal(values, resumed[name])
    assert [path.name for path in checkpoints(parts)] == ["checkpoint-12.eqx", "checkpoint-9.eqx"]
    for seed in (0, 1):
        assert len(list((parts / "tensorboard" / f"seed_{seed}").iterdir())) == 3
    assert train(module, resume=str(parts))["last"].tolist() == results["last"].tolist(), "already finished"
    same_run(tmp_path / "other", parts)


@pytest.mark.slow
def test_so_it_is_on_two_devices_that_share_the_seeds():
    """The test above, where XLA makes two devices of one CPU."""
    test = f"{__file__}::{test_a_run_that_goes_on_is_the_run_that_was_never_stopped.__name__}[td3bc]"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run([sys.executable, "-m", "pytest", test], env=env, capture_output=True, text=True)
    assert "1 passed" in process.stdout, process.stdout


def test_what_a_run_began_with_stays_on_record_and_so_does_what_it_goes_on_with(train, tmp_path, monkeypatch, capsys):
    run, of = tmp_path / "whole", lambda: json.loads((tmp_path / "whole" / "args.json").read_text())
    began = of()
    with monkeypatch.context() as patch:
        patch.setattr(common.harness.run, "git_commit", lambda: "another")
        train(bc, resume=str(run), num_updates=15)
    assert "Note: git_commit differ from those that the run began with" in capsys.readouterr().out
    train(bc, resume=str(run))
    assert of()["git_commit"] == began["git_commit"] and began["continued"] == []
    assert of()["continued"] == [{"update": 12, "git_commit": "another", "num_updates": 15}, {"update": 15}]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train, home, tmp_path, capsys, exit_sentence):
    run = tmp_path / "whole"
    newest, _ = checkpoints(run)
    newest.write_bytes(newest.read_bytes()[:-1])
    train(bc, resume=str(run))
    assert re.search(r"checkpoint-12.eqx is damaged: .*checksum. Using checkpoint-9.eqx", capsys.readouterr().out)
    same_run(home / "whole", run)
    for path in checkpoints(run):
        path.write_bytes(b"")
    assert "Cannot resume" in exit_sentence(train, bc, resume=str(run))


def test_a_run_that_cannot_be_this_one_is_refused(train, tmp_path, exit_sentence):
    resume = str(tmp_path / "whole")
    assert "it is a run of bc, not of td3bc" in exit_sentence(train, td3bc, resume=resume)
    assert "batch_size is 16" in exit_sentence(train, bc, resume=resume, batch_size=32)
    typed = ["--resume", resume, "--batch-size", "256"]  # its default
    assert "batch_size is 16" in exit_sentence(lambda: bc.train(cli(bc.Args, typed)))
    assert "only be larger" in exit_sentence(train, bc, resume=resume, num_updates=3)
    assert "there is no run" in exit_sentence(train, bc, resume=str(tmp_path / "nothing"))
    assert "not empty: go on with its run by --resume" in exit_sentence(train, bc, resume)
    minari.delete_dataset("test/hopper/random-v0")
    record_hopper(seed=1)
    assert "data have changed" in exit_sentence(train, bc, resume=resume)


def test_what_was_written_after_the_checkpoint_is_written_once(train, home, tmp_path, capsys):
    """Rows of later updates, a row cut off in the middle, an evaluation cut off in the middle, a block of zeros."""
    run = tmp_path / "whole"
    checkpoints(run)[0].unlink()
    for name in ("eval", "metrics"):
        file = run / f"{name}.csv"
        file.write_bytes(file.read_bytes()[:-4] + (bytes(99) + b"\n") * (name == "metrics"))
    train(bc, resume=str(run))
    same_run(home / "whole", run)
    assert "not whole" not in capsys.readouterr().out


def test_what_is_damaged_in_the_tables_is_counted_and_all_else_stays(train, tmp_path, capsys):
    run = tmp_path / "whole"
    args, tables = (run / "args.json").read_bytes(), {name: run / f"{name}.csv" for name in ("eval", "metrics")}
    (run / "args.json").write_bytes(b"{}")  # for people: a run goes on by its checkpoint
    eval_rows, metrics_rows = (file.read_text().splitlines(keepends=True) for file in tables.values())
    eval_rows.pop(2)  # of the first of four evaluations
    metrics_rows[3] = metrics_rows[3].replace(".", "?", 1)
    for file, rows in zip(tables.values(), (eval_rows, metrics_rows)):
        file.write_text("".join(rows))
    train(bc, resume=str(run))
    assert [file.read_text() for file in tables.values()] == ["".join(eval_rows), "".join(metrics_rows)]
    assert (run / "args.json").read_bytes() == args
    said = capsys.readouterr().out
    assert "1 evaluation(s) in" in said
    assert "1 row(s) in" in said


@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache")  # it cannot be written either
@pytest.mark.parametrize("said", ["No space left on device", "File too large"])
def test_a_write_that_fails_ends_the_run_with_a_sentence_and_what_was_saved_is_good(said, train, home, tmp_path):
    """On a disk that is full, before anything is written; or in the middle of a checkpoint."""
    usage, limit, run = shutil.disk_usage(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:

        def spoil():
            if said == "File too large":
                resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))  # bytes: half a checkpoint
            else:
                patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))

        try:
            for going_on in ({"folder": run, "stop": 6, "halt": spoil}, {"resume": str(run)}):
                with pytest.raises(SystemExit, match=f"{said}. All that was saved, up to update 6, is good."):
                    train(bc, **going_on)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    run = shutil.copytree(run, tmp_path / "copy")  # a run that was refused keeps its lock
    train(bc, resume=str(run))
    same_run(home / "whole", run)


def test_what_is_saved_takes_the_place_of_later_checkpoints_which_were_damaged(tmp_path):
    for update in (6, 9, 12, 10):
        save_checkpoint(tmp_path, {"weights": np.zeros(1)}, {"update": update})
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10.eqx", "checkpoint-9.eqx"]


def test_a_table_that_another_program_wrote_is_left_alone(train, tmp_path, exit_sentence):
    table = tmp_path / "whole" / "eval.csv"
    table.write_text(text := table.read_text().replace(",", ";"))
    assert "another heading" in exit_sentence(train, bc, resume=str(tmp_path / "whole"))
    assert table.read_text() == text


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    header = {"update": 1, "dataset": {}}
    with pytest.raises(CheckpointError, match="not finite"):
        save_checkpoint(tmp_path, {"weights": np.array([1.0, np.nan])}, header)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ damaged checkpoints


@pytest.fixture
def checkpoint(home, tmp_path, quick_networks):
    path, _ = checkpoints(home / "whole")
    load_run(home / "whole", bc)  # it is good
    return Path(shutil.copy(path, tmp_path))


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_no_damage_to_the_bytes_goes_unseen(checkpoint, count):
    data = checkpoint.read_bytes()  # of which the headers are the first 2,000
    for i in range(count):
        if damaged(data, i) != data:
            checkpoint.write_bytes(damaged(data, i))
            with pytest.raises(CheckpointError):
                load_run(checkpoint.parent, bc)
