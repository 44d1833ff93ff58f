"""Runs that are stopped, at any moment and by anything, and go on: nothing lost, nothing done twice."""

import importlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import minari
import numpy as np
import pytest
from helpers import ALGORITHMS, SCRIPTS, damaged, fill, flags_of, record_hopper, rows_of, run_script, tiny

from algorithms import bc, td3bc
from common.harness import Evaluator, Run, load_run
from common.harness.checkpoint import CheckpointError, checkpoints, newest_header, save_checkpoint

SHORT = {"num_updates": 12, "eval_every": 3, "dataset_id": "test/hopper/random-v0", "preset": "fast"}
SETTINGS = [a if a == "td3bc" else pytest.param(a, marks=pytest.mark.slow) for a in ALGORITHMS]


def same_run(one: Path, other: Path) -> None:
    """Returns, metrics (but for the rate) and the newest training state are equal to the bit."""
    assert (one / "eval.csv").read_bytes() == (other / "eval.csv").read_bytes()
    metrics = [[row | {"updates_per_second": ""} for row in rows_of(folder / "metrics.csv")] for folder in (one, other)]
    assert metrics[0] == metrics[1]
    (header, stream), (other_header, other_stream) = map(newest_header, (one, other))
    assert header["update"] == other_header["update"]
    assert stream.read() == other_stream.read()


@pytest.fixture
def train(datasets, tmp_path, monkeypatch, quick_networks):
    """`train(algorithm, folder, stop, **changes)` trains here; the evaluation of update `stop` is interrupted."""
    monkeypatch.chdir(tmp_path)
    record_hopper()
    evaluate = Evaluator.__call__

    def call(module, folder="", stop=0, **changes):
        def evaluations(self, policy, keys, update):
            if update == stop:
                raise KeyboardInterrupt
            return evaluate(self, policy, keys, update)

        monkeypatch.setattr(Evaluator, "__call__", evaluations)
        given = changes if "resume" in changes else tiny(module.__name__.split(".")[1]) | SHORT | changes
        return module.train(module.Args(**given | ({"run_dir": str(folder)} if folder else {})))

    return call


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(algorithm, train, tmp_path, capsys):
    """Stopped in its second evaluation, and again in its third; then made longer (without decay: its end is known)."""
    module = importlib.import_module(f"algorithms.{algorithm}")
    results = train(module, tmp_path / "whole", preset="paper")
    with pytest.raises(KeyboardInterrupt):
        train(module, tmp_path / "parts", stop=6, preset="paper", num_updates=9)
    assert f"--resume {tmp_path / 'parts'}" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        train(module, stop=9, resume=str(tmp_path / "parts"))
    resumed = train(module, resume=str(tmp_path / "parts"), num_updates=12)
    same_run(tmp_path / "whole", tmp_path / "parts")
    for name, values in results.items():
        np.testing.assert_array_equal(values, resumed[name])
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["checkpoint-12.eqx", "checkpoint-9.eqx"]
    for seed in (0, 1):
        assert len(list((tmp_path / "parts" / "tensorboard" / f"seed_{seed}").iterdir())) == 3
    assert train(module, resume=str(tmp_path / "parts"))["last"].tolist() == results["last"].tolist(), (
        "already finished"
    )
    same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_so_it_is_on_two_devices_that_share_the_seeds():
    """The test above, where XLA makes two devices of one CPU."""
    test = f"{__file__}::{test_a_run_that_goes_on_is_the_run_that_was_never_stopped.__name__}[td3bc]"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run([sys.executable, "-m", "pytest", test], env=env, capture_output=True, text=True)
    assert "1 passed" in process.stdout, process.stdout


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train, tmp_path, capsys, exit_sentence):
    train(td3bc, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    newest, _ = checkpoints(tmp_path / "damaged")
    newest.write_bytes(newest.read_bytes()[:-1])
    train(td3bc, resume=str(tmp_path / "damaged"))
    assert re.search(r"checkpoint-12.eqx is damaged: .*checksum. Using checkpoint-9.eqx", capsys.readouterr().out)
    same_run(tmp_path / "whole", tmp_path / "damaged")
    for path in checkpoints(tmp_path / "damaged"):
        path.write_bytes(b"")
    assert "Cannot resume" in exit_sentence(train, td3bc, resume=str(tmp_path / "damaged"))


def test_a_run_that_cannot_be_this_one_is_refused(train, tmp_path, exit_sentence):
    train(td3bc, tmp_path / "run")
    resume = str(tmp_path / "run")
    assert "it is a run of td3bc, not of bc" in exit_sentence(train, bc, resume=resume)
    assert "batch_size is 16" in exit_sentence(train, td3bc, resume=resume, batch_size=32)
    assert "only be larger" in exit_sentence(train, td3bc, resume=resume, num_updates=3)
    assert "there is no run" in exit_sentence(train, td3bc, resume=str(tmp_path / "nothing"))
    assert "not empty: go on with its run by --resume" in exit_sentence(train, td3bc, resume)
    minari.delete_dataset("test/hopper/random-v0")
    record_hopper(seed=1)
    assert "data have changed" in exit_sentence(train, td3bc, resume=resume)


def test_what_was_written_after_the_checkpoint_is_written_once(train, tmp_path, capsys):
    """Rows of later updates, a row cut off in the middle, an evaluation cut off in the middle, a block of zeros."""
    train(td3bc, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    checkpoints(tmp_path / "cut")[0].unlink()
    for name in ("eval", "metrics"):
        file = tmp_path / "cut" / f"{name}.csv"
        file.write_bytes(file.read_bytes()[:-4] + (bytes(99) + b"\n") * (name == "metrics"))
    train(td3bc, resume=str(tmp_path / "cut"))
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert "has lost" not in capsys.readouterr().out
    (tmp_path / "cut" / "eval.csv").unlink()
    train(td3bc, resume=str(tmp_path / "cut"))
    assert "eval.csv has lost 3 evaluation(s)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_goes_on_may_begin_to_film(train, tmp_path):
    pytest.importorskip("moviepy", reason="requirements-dev.txt has it")
    train(td3bc, tmp_path / "whole", num_updates=9)
    with pytest.raises(KeyboardInterrupt):
        train(td3bc, tmp_path / "filmed", stop=6, num_updates=9)
    train(td3bc, resume=str(tmp_path / "filmed"), capture_video=True)
    same_run(tmp_path / "whole", tmp_path / "filmed")
    videos = {path.name for path in (tmp_path / "filmed" / "videos").iterdir()}
    assert videos == {"update-6.mp4", "update-9.mp4"}


@pytest.mark.slow
def test_memory_does_not_grow_with_evaluations(train, tmp_path, monkeypatch):
    """Resident memory after 50 evaluations is within 5 % of that after 5."""
    used, log = [], Run.log_evaluation

    def measured(self, update, episodes):
        log(self, update, episodes)
        used.append(int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]))

    monkeypatch.setattr(Run, "log_evaluation", measured)
    train(td3bc, tmp_path / "run", num_updates=50, eval_every=1)
    assert used[49] < 1.05 * used[4], used


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    header = {"update": 1, "dataset": {}}
    with pytest.raises(CheckpointError, match="not finite"):
        save_checkpoint(tmp_path, {"weights": np.array([1.0, np.nan])}, header)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ damaged checkpoints


@pytest.fixture
def checkpoint(place, tmp_path):
    path, _ = checkpoints(place.folder / "whole")
    return Path(shutil.copy(path, tmp_path))


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_no_damage_to_the_bytes_goes_unseen(checkpoint, count):
    data = checkpoint.read_bytes()  # of which the headers are the first 2,000
    for i in range(count):
        if damaged(data, i) != data:
            checkpoint.write_bytes(damaged(data, i))
            with pytest.raises(CheckpointError):
                load_run(checkpoint.parent, td3bc)


@pytest.mark.parametrize(
    "change",
    [
        {"update": "3"},
        {"update": -1},
        {"update": 1.5},
        {"dataset": []},
        {"dataset": {}},
        {"dataset": {"observation_dim": 10**30, "action_dim": 3}},
        {"dataset": {"observation_dim": "eleven", "action_dim": 3}},
        {"algorithm": "../td3bc"},
        {"algorithm": None},
        {"args": None},
        {"args": {"batch_size": 3}},
        *({"args": {name: value}} for name, value in {"tau": "fast", "seed": -1, "num_seeds": 2.5, "gamma": 7}.items()),
        {"args": {"num_seeds": 10**9}},
        {"args": {"preset": "slow"}},
        {"args": {"learning_rate": None, "seed": True}},
    ],
)
def test_an_impossible_header_with_a_good_checksum_is_refused(checkpoint, change):
    """Written by another program, or with ill will."""
    _, state, header = load_run(checkpoint.parent, td3bc)
    if "args" in change and change["args"] != {"batch_size": 3} and change["args"]:
        change = {"args": header["args"] | change["args"]}
    checkpoint.unlink()
    save_checkpoint(checkpoint.parent, state, header | change)
    with pytest.raises(CheckpointError):
        load_run(checkpoint.parent, td3bc)


# ---------------------------------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def heeded_signals():
    """A test run that ignores a signal, as in the background of a shell, would hand that on to its children."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module")
def place(tmp_path_factory, made_pointmaze, heeded_signals):
    """`place.start(*flags)` begins td3bc in a process of its own; `whole` is its run that nothing stopped."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(made_pointmaze, home / "minari")
    env = {"MINARI_DATASETS_PATH": str(home / "minari"), "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    flags = flags_of(num_updates=2000, eval_every=500, eval_episodes=3, batch_size=8, checkpoint_every=1e-4)

    class Place:
        folder = home

        @staticmethod
        def start(*extra):
            command = [sys.executable, str(SCRIPTS / "td3bc.py"), *map(str, extra)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            return subprocess.Popen(command, cwd=home, env=os.environ | env, **pipes)

        @classmethod
        def begin(cls, name):
            return cls.start(*flags, "--run-dir", name)

        @classmethod
        def go_on(cls, name):
            """Resumes the run, or begins it if it had not come to the point of having a folder."""
            process = cls.start("--resume", name) if (home / name / "args.json").exists() else cls.begin(name)
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output

    process = Place.begin("whole")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return Place


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_signal_is_followed_by_a_save_and_the_command_that_goes_on(place):
    """Three times in one run."""
    process, before = place.begin("signals"), []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        wait_for(lambda: checkpoints(place.folder / "signals")[:1] != before)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 128 + number, output
        assert "Traceback" not in output
        (command,) = re.findall(r"To go on: (.*)", output)
        assert command.endswith("td3bc.py --resume signals")
        before = checkpoints(place.folder / "signals")[:1]
        assert before[0].stem == "checkpoint-" + re.search(r"after update (\d+)", output)[1]
        process = place.start(*shlex.split(command)[2:])
    process.communicate(timeout=300)
    same_run(place.folder / "signals", place.folder / "whole")


def test_a_second_signal_and_one_before_the_run_leave_at_once(place):
    process = place.start(*flags_of(num_updates=1000, batch_size=4096, run_dir="twice"))  # minutes for its one chunk
    wait_for(lambda: (place.folder / "twice" / "metrics.csv").exists())
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert not checkpoints(place.folder / "twice")
    for delay in (0.3, 1.0):  # during the imports
        process = place.begin("early")
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode in (143, -signal.SIGTERM)  # the latter: before Python came to our first line
        assert "Traceback" not in output


def test_a_signal_while_a_module_is_imported_raises_nothing_there(tmp_path):
    """jaxlib aborts when an exception comes while its extensions are loaded. What was printed before stays."""
    module = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nfinally:\n    print('raised')\n"
    (tmp_path / "module.py").write_text(module)
    program = "from common.harness import process; process.install(); print('before'); import module"
    environ = os.environ | {"PYTHONPATH": f"{SCRIPTS.parent}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "before\n"), done


def survives_kills(place, name: str, seed: int) -> None:
    """Killed once at a random moment from the first import to the last picture, and resumed."""
    rng = random.Random(seed)
    begun = time.monotonic()
    process = place.begin(name)
    time.sleep(rng.uniform(0, 9))
    process.kill()
    process.communicate()
    place.go_on(name)
    same_run(place.folder / name, place.folder / "whole")
    names = {path.name for path in (place.folder / name).iterdir()}
    whole = {path.name for path in (place.folder / "whole").iterdir()}
    assert names == whole, f"left behind after {time.monotonic() - begun:.1f} s"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 30))])
def test_kill_9_loses_nothing(place, seed):
    survives_kills(place, f"killed-{seed}", seed)


@pytest.mark.parametrize("repeats", [1, pytest.param(19, marks=pytest.mark.slow)])
def test_of_two_runs_that_want_one_folder_one_gets_it(place, repeats):
    for i in range(repeats):
        name = f"both-{repeats}-{i}"
        processes = [place.begin(name) for _ in range(2)]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert sorted(process.returncode for process in processes) == [0, 1], outputs
        refused = outputs[[process.returncode for process in processes].index(1)].splitlines()[-1]
        assert "not empty" in refused or "Another process is at work" in refused, outputs
        same_run(place.folder / name, place.folder / "whole")


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch, train):
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    for _ in range(3):
        train(td3bc, num_updates=3)
    assert {path.name.rpartition("__")[2] for path in (tmp_path / "runs").iterdir()} == {"now", "now-1", "now-2"}


def test_a_full_disk_ends_the_run_with_a_sentence_and_what_was_saved_is_good(place, small_disk):
    run = small_disk / "run"
    process = place.begin(run)
    wait_for(lambda: checkpoints(run))
    ballast = fill(small_disk, free=2**20)
    for attempt in range(2):
        process = place.start("--resume", run) if attempt else process
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1, output
        assert "Traceback" not in output
        assert re.search(r"No space left on device. All that was saved, up to update \d+, is good.", output)
    ballast.unlink()
    place.go_on(run)
    same_run(run, place.folder / "whole")


def test_the_environment_of_a_notebook_or_without_cuda_gets_a_run_or_a_sentence(tmp_path, made_pointmaze):
    few = flags_of(num_updates=2, eval_every=2, eval_episodes=1, batch_size=8)
    env = {"MINARI_DATASETS_PATH": str(made_pointmaze), "PYTHONIOENCODING": "ascii"}
    process = run_script("bc", *few, cwd=tmp_path, MPLBACKEND="module://matplotlib_inline.backend_inline", **env)
    assert process.returncode == 0, process.stderr
    process = run_script("bc", *few, cwd=tmp_path, JAX_PLATFORMS="cuda", **env)
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1].startswith("JAX cannot use the device that JAX_PLATFORMS=cuda")
    assert "Traceback" not in process.stderr
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPTS / 'bc.py'))}"
    for stream, told in (("--help | head -1", ""), ("--help >&-", ""), ("> /dev/full", "No space left on device")):
        process = subprocess.run(f"{command} --env-id bandit {stream}", shell=True, capture_output=True, text=True)
        assert told in process.stderr
        assert len(process.stderr.splitlines()) == len(told.splitlines())
