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

FEW = flags_of(env_id="bandit", num_updates=2000, eval_every=100, eval_episodes=3, batch_size=8, checkpoint_every=1e-4)


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
def home(tmp_path_factory, heeded_signals):
    return tmp_path_factory.mktemp("home")


def start(home, *flags, shell="exec {}", **variables) -> subprocess.Popen:
    """Cloning in a process of its own, as a notebook's child on a terminal that has no more than ASCII."""
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONIOENCODING": "ascii"}
    env |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    command = shell.format(shlex.join([sys.executable, str(SCRIPTS / "bc.py"), *map(str, flags)]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=home, env=os.environ | env | variables, shell=True, **pipes)


def end(process, *statuses) -> str:
    """What the process printed; it ends in one of these ways, and never with a traceback."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode in statuses, output
    assert "Traceback" not in output
    return output


@pytest.fixture(scope="module")
def whole(home):
    """(folder, seconds until it was there) of a run that nothing stopped, most of whose time comes after that."""
    begun, process = time.monotonic(), start(home, *FEW, "--run-dir", "whole")
    wait_for((home / "whole" / "args.json").exists)
    startup = time.monotonic() - begun
    end(process, 0)
    return home / "whole", startup


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_signal_is_followed_by_a_save_and_the_command_that_goes_on_and_kill_9_loses_nothing(home, whole):
    """In one run, whose last part has a closed stderr, whose number a pipe or a file would take."""
    run, process = home / "signals", start(home, *FEW, "--run-dir", "signals")
    wait_for((run / "checkpoint-0.eqx").exists)
    wait_for(lambda: len(checkpoints(run)) > 1)
    process.send_signal(signal.SIGUSR1)
    output = end(process, 128 + signal.SIGUSR1)
    (command,) = re.findall(r"To go on: (.*)", output)
    assert command.endswith("bc.py --resume signals")
    before = checkpoints(run)[0]
    assert before.stem == "checkpoint-" + re.search(r"after update (\d+)", output)[1]
    process = start(home, *shlex.split(command)[2:])
    wait_for(lambda: checkpoints(run)[0] != before)
    process.kill()
    process.communicate()
    end(start(home, "--resume", "signals", shell="exec {} 2>&-"), 0)
    same_run(run, whole[0])


def test_a_second_signal_and_one_before_the_run_leave_at_once(home):
    """Two that come together are one: a parent that is killed sends as many, if it has threads."""
    long = {"num_updates": 1000, "eval_every": 1000, "batch_size": 2**16}  # minutes for one chunk
    begun, process = time.monotonic(), start(home, *flags_of(env_id="bandit", **long, run_dir="twice"))
    wait_for((home / "twice" / "metrics.csv").exists)
    startup = time.monotonic() - begun
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGHUP)
    assert any("another signal, a second later, stops at once" in line for line in process.stdout)
    time.sleep(4)  # a second in which signals count as one, on a busy machine
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    end(process, 130)
    assert [path.name for path in checkpoints(home / "twice")] == ["checkpoint-0.eqx"]
    for share in (0.1, 0.3):  # of the way to the folder: during the imports
        process = start(home, *FEW, "--run-dir", "early")
        time.sleep(share * startup)
        process.send_signal(signal.SIGTERM)
        end(process, 143, -signal.SIGTERM)  # the latter: before Python came to our first line


def test_a_signal_while_a_module_is_imported_raises_nothing_there(tmp_path):
    """jaxlib aborts when an exception comes while its extensions are loaded. What was printed before stays."""
    module = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nfinally:\n    print('raised')\n"
    (tmp_path / "module.py").write_text(module)
    program = "from common.harness import process; process.install(); print('before'); import module"
    environ = os.environ | {"PYTHONPATH": f"{SCRIPTS.parent}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "before\n"), done


def test_a_library_that_exits_in_its_thread_ends_nothing():
    program = "from common.harness import process; import sys, threading; process.install()\n"
    program += "thread = threading.Thread(target=sys.exit, args=(3,)); thread.start(); thread.join(); print('on')"
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_kill_9_at_any_moment_loses_nothing(home, whole, seed):
    """Killed once at a random moment from the first import to the last picture, and resumed."""
    (whole, startup), name = whole, f"killed-{seed}"
    delay = random.Random(seed).uniform(0, 3) * startup
    process = start(home, *FEW, "--run-dir", name)
    time.sleep(delay)
    process.kill()
    process.communicate()
    # or begun, if it had not come to the point of having a folder
    end(start(home, *(["--resume", name] if checkpoints(home / name) else [*FEW, "--run-dir", name])), 0)
    same_run(home / name, whole)
    names, expected = ({path.name for path in folder.iterdir()} for folder in (home / name, whole))
    assert names == expected, f"left behind after {delay:.1f} s"


def test_without_cuda_one_sentence_says_so(home):
    output = end(start(home, "--env-id", "bandit", JAX_PLATFORMS="cuda"), 1)
    assert output.strip().splitlines()[-1].startswith("JAX cannot use the device that JAX_PLATFORMS=cuda")


@pytest.mark.parametrize(
    ("stream", "told"), [("--help | head -1", ""), ("--help >&-", ""), ("> /dev/full", "No space left on device")]
)
def test_a_stream_that_is_closed_or_full_leaves_a_line_at_most(stream, told):
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPTS / 'bc.py'))} --env-id bandit {stream}"
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert told in process.stderr
    assert len(process.stderr.splitlines()) == len(told.splitlines())
