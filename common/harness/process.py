"""How a script's process ends: imported by it first, so that this holds while the rest is imported, too.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 (which SLURM may send before the end) end it with 128 + their number, as a shell
expects. While a run trains, the first one waits until the run has saved; another, a second later, never waits. What
the operating system refuses is told in a line. A closed pipe, as that of `--help | head -1`, is no error, nor is a
closed stream.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

waiting = False  # set by a run while it trains
received: list[int] = []  # the signals that wait


def _handle(number: int, frame) -> None:
    received.append(number)
    if waiting or len(received) > 1:
        return
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave()
            os._exit(128 + number)  # an exception while a C++ extension is loaded may end in abort()
        frame = frame.f_back
    sys.exit(128 + number)


def _watch(pipe: int) -> None:
    """Python hears of a signal only between two of its own steps; this thread hears of it while XLA computes.

    A parent that dies may send one for each of its threads, and a terminal that closes two kinds: these count as one.
    """
    os.read(pipe, 1)
    if waiting:
        text = "\nStopping when these updates are saved; another signal, a second later, stops at once."
        print(text, file=sys.stderr, flush=True)
    time.sleep(1)
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        os.read(pipe, 4096)  # what has come since then
    os.set_blocking(pipe, True)
    os._exit(128 + os.read(pipe, 1)[0])


def _leave(kind=None, error=None, traceback=None) -> None:
    if kind is not None and not issubclass(kind, OSError):
        return sys.__excepthook__(kind, error, traceback)
    if kind is not None and kind is not BrokenPipeError:
        print(f"{error}.", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _of_libraries(ignored) -> None:
    """In their threads and exit hooks: the run itself has said what it could not write. A signal ends it there, too."""
    if isinstance(ignored.exc_value, SystemExit) and received and not waiting:
        os._exit(128 + received[0])
    if not isinstance(ignored.exc_value, (OSError, SystemExit)):
        sys.__excepthook__(ignored.exc_type, ignored.exc_value, ignored.exc_traceback)


def install() -> None:
    """Signals that the caller ignores, as `nohup` does, stay ignored."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: this takes its number, before the pipe or a file of the run would
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
            os.set_inheritable(getattr(sys, name).fileno(), True)
        # a character that the terminal does not have; a line is in the log at once
        getattr(sys, name).reconfigure(errors="replace", line_buffering=True)
    pipe, end = os.pipe()
    os.set_blocking(end, False)
    signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)
    threading.Thread(target=_watch, args=(pipe,), daemon=True).start()
    sys.excepthook, sys.unraisablehook, threading.excepthook = _leave, _of_libraries, _of_libraries
    atexit.register(_leave)
    os.environ.pop("MPLBACKEND", None)  # a notebook's: matplotlib would look for it, and fail


of_ours = Path(sys.argv[0]).resolve().parent.name in ("algorithms", "benchmarks")
if of_ours and "ipykernel" not in sys.modules:  # not in a notebook, nor in a test
    install()
