"""How a script's process ends: imported by it first, so that this holds while the rest is imported, too.

SIGINT, SIGTERM and SIGHUP end it without a traceback and with 128 + their number, as a shell expects. While a run
trains (`waiting`), the first one waits until the run has saved; a second never waits. What the operating system
refuses is told in a line. A closed pipe, as that of `--help | head -1`, is no error, nor is a closed stream, nor a
character that the terminal does not have.
"""

import atexit
import os
import signal
import sys
import threading
from pathlib import Path

waiting = False  # set by a run while it trains
received: list[int] = []  # the signals that wait


def _importing(frame) -> bool:
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _handle(number: int, frame) -> None:
    received.append(number)
    if not waiting:
        if _importing(frame):  # an exception while a C++ extension is loaded may end in abort()
            _leave()
            os._exit(128 + number)
        sys.exit(128 + number)


def _watch(pipe: int) -> None:
    """Python hears of a signal only between two of its own steps; this thread hears of it while XLA computes."""
    os.read(pipe, 1)
    if waiting:
        print("\nStopping when these updates are saved; a second signal stops at once.", file=sys.stderr, flush=True)
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


def _leave_all_the_same(unraisable) -> None:
    """A signal may come where Python cannot raise, as in a callback of its garbage collector."""
    if isinstance(unraisable.exc_value, SystemExit):
        os._exit(unraisable.exc_value.code)
    sys.__unraisablehook__(unraisable)


def install() -> None:
    """Signals that the caller ignores, as `nohup` does, stay ignored."""
    pipe, end = os.pipe()
    os.set_blocking(end, False)
    signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)
    threading.Thread(target=_watch, args=(pipe,), daemon=True).start()
    sys.excepthook, sys.unraisablehook = _leave, _leave_all_the_same
    atexit.register(_leave)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: this takes its number, before a file of the run would
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")
    os.environ.pop("MPLBACKEND", None)  # a notebook's: matplotlib would look for it, and fail


if Path(sys.argv[0]).resolve().parent.name in ("algorithms", "benchmarks"):  # not in a notebook, nor in a test
    install()
