"""Runs in processes of their own, which signals, kill -9 and one another get at: nothing lost, nothing done twice."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from helpers import SCRIPTS, flags_of, same_run

from common.harness.checkpoint import checkpoints

FEW = flags_of(env_id="bandit", num_updates=1000, eval_every=100, eval_episodes=3, batch_size=8, checkpoint_every=1e-4)


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
def place(tmp_path_factory, heeded_signals):
    """`place.start(*flags)` begins cloning in a process of its own.

    In the environment that a notebook gives to its children, on a terminal that has no more than ASCII.
    """
    home = tmp_path_factory.mktemp("home")
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONIOENCODING": "ascii"}
    env |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}

    class Place:
        folder = home

        @staticmethod
        def start(*flags, shell="exec {}", **variables):
            command = shell.format(shlex.join([sys.executable, str(SCRIPTS / "bc.py"), *map(str, flags)]))
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            return subprocess.Popen(command, cwd=home, env=os.environ | env | variables, shell=True, **pipes)

        @classmethod
        def begin(cls, name):
            return cls.start(*FEW, "--run-dir", name)

        @classmethod
        def go_on(cls, name):
            """Resumes the run, or begins it if it had not come to the point of having a folder."""
            process = cls.start("--resume", name) if checkpoints(home / name) else cls.begin(name)
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output

    return Place


@pytest.fixture(scope="module")
def whole(place):
    """The folder of a run that nothing stopped; about half of its time is `place.startup`, the seconds up to it."""
    begun, process = time.monotonic(), place.begin("whole")
    wait_for((place.folder / "whole" / "args.json").exists)
    place.startup = time.monotonic() - begun
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    return place.folder / "whole"


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_signal_is_followed_by_a_save_and_the_command_that_goes_on_and_kill_9_loses_nothing(place, whole):
    """In one run, whose last part has a closed stderr, whose number a pipe or a file would take."""
    run = place.folder / "signals"
    process, before = place.begin("signals"), [run / "checkpoint-0.eqx"]
    wait_for(before[0].exists)
    for number in (signal.SIGUSR1, signal.SIGKILL):
        wait_for(lambda: checkpoints(run)[:1] != before)
        process.send_signal(number)
        output, _ = process.communicate(timeout=600)
        before = checkpoints(run)[:1]
        if number != signal.SIGKILL:
            assert process.returncode == 128 + number, output
            assert "Traceback" not in output
            (command,) = re.findall(r"To go on: (.*)", output)
            assert command.endswith("bc.py --resume signals")
            assert before[0].stem == "checkpoint-" + re.search(r"after update (\d+)", output)[1]
            process = place.start(*shlex.split(command)[2:])
    process = place.start("--resume", "signals", shell="exec {} 2>&-")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    same_run(run, whole)


def test_a_second_signal_and_one_before_the_run_leave_at_once(place):
    long = {"num_updates": 1000, "eval_every": 1000, "batch_size": 2**16}  # minutes for one chunk
    begun, process = time.monotonic(), place.start(*flags_of(env_id="bandit", **long, run_dir="twice"))
    wait_for((place.folder / "twice" / "metrics.csv").exists)
    startup = time.monotonic() - begun
    process.send_signal(signal.SIGINT)
    assert any("a second signal stops at once" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert [path.name for path in checkpoints(place.folder / "twice")] == ["checkpoint-0.eqx"]
    for share in (0.1, 0.3):  # of the way to the folder: during the imports
        process = place.begin("early")
        time.sleep(share * startup)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=600)
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_kill_9_at_any_moment_loses_nothing(place, whole, seed):
    """Killed once at a random moment from the first import to the last picture, and resumed."""
    name, delay = f"killed-{seed}", random.Random(seed).uniform(0, 2) * place.startup
    process = place.begin(name)
    time.sleep(delay)
    process.kill()
    process.communicate()
    place.go_on(name)
    same_run(place.folder / name, whole)
    names, expected = ({path.name for path in folder.iterdir()} for folder in (place.folder / name, whole))
    assert names == expected, f"left behind after {delay:.1f} s"


@pytest.mark.slow
def test_of_two_runs_that_want_one_folder_one_gets_it(place, whole):
    """So it is of threads: tests/test_cli.py."""
    for i in range(20):
        processes = [place.begin(f"both-{i}") for _ in range(2)]
        outputs = [process.communicate(timeout=600)[0] for process in processes]
        assert sorted(process.returncode for process in processes) == [0, 1], outputs
        refused = outputs[[process.returncode for process in processes].index(1)].splitlines()[-1]
        assert "not empty" in refused or "Another process is at work" in refused, outputs
        same_run(place.folder / f"both-{i}", whole)


def test_without_cuda_one_sentence_says_so(place):
    process = place.start("--env-id", "bandit", JAX_PLATFORMS="cuda")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert output.strip().splitlines()[-1].startswith("JAX cannot use the device that JAX_PLATFORMS=cuda")
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("stream", "told"), [("--help | head -1", ""), ("--help >&-", ""), ("> /dev/full", "No space left on device")]
)
def test_a_stream_that_is_closed_or_full_leaves_a_line_at_most(stream, told):
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPTS / 'bc.py'))} --env-id bandit {stream}"
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert told in process.stderr
    assert len(process.stderr.splitlines()) == len(told.splitlines())
