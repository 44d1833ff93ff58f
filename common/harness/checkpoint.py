"""Checkpoints: files that are complete or not there, and that are believed only after a look.

checkpoint-<update>.eqx: a line with the format and the SHA-256 of all that follows; a line of JSON, the header; the
leaves of the training state, as Equinox writes them. No pickle. The first, of update 0, has a header alone.
"""

import hashlib
import inspect
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import equinox as eqx
import jax
import numpy as np

FORMAT = b"edp-checkpoint-3"
KEPT = 2  # checkpoints of a run


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text says why."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """A file at `path` is replaced by a complete one, which is on the disk when this returns, or stays as it is."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def save_checkpoint(folder: Path, state, header: dict) -> None:
    """Saves the training state after update header["update"], and removes all others but the `KEPT - 1` before it.

    Raises OSError, and CheckpointError if the state is not finite.
    """
    state = jax.tree.map(np.asarray, state)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
        raise CheckpointError("the networks' weights are not finite")
    payload = io.BytesIO()
    payload.write(json.dumps({**header, "structure": str(jax.tree.structure(state))}).encode() + b"\n")
    eqx.tree_serialise_leaves(payload, state)
    parts = b"%s %s\n" % (FORMAT, hashlib.sha256(payload.getbuffer()).hexdigest().encode()), payload.getbuffer()
    path = folder / f"checkpoint-{header['update']}.eqx"
    write_atomically(path, lambda file: file.writelines(parts))
    paths = checkpoints(folder)
    at = paths.index(path)
    for other in paths[:at] + paths[at + KEPT :]:  # later ones were damaged
        other.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """Of a run, the newest first. Raises OSError if the folder may not be read, which `Path.glob` would not."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    updates = {int(found[1]): name for name in names if (found := re.fullmatch(r"checkpoint-(\d+)\.eqx", name))}
    return [folder / updates[update] for update in sorted(updates, reverse=True)]


def read_header(path: Path) -> tuple[dict, io.BytesIO]:
    """(header, stream of the leaves) of a checkpoint. Raises OSError, and CheckpointError if it is damaged."""
    first, _, content = path.read_bytes().partition(b"\n")
    if first.split(b" ")[0] != FORMAT:
        raise CheckpointError(f"{path} is damaged, or of another version: it does not begin with {FORMAT.decode()}")
    if first != b"%s %s" % (FORMAT, hashlib.sha256(content).hexdigest().encode()):
        raise CheckpointError(f"{path} is damaged: its content does not have its checksum")
    stream = io.BytesIO(content)
    return json.loads(stream.readline()), stream


def newest_header(folder: Path) -> tuple[dict, io.BytesIO]:
    """(header, stream of the leaves) of a run's newest checkpoint that is whole; says so if it is not the last.

    Raises CheckpointError if there is none, or none that may be read.
    """
    errors = []
    try:
        paths = checkpoints(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}/ cannot be read ({error.strerror})") from None
    for path in paths:
        try:
            found = read_header(path)
        except (OSError, CheckpointError) as error:
            errors.append(str(error))
            continue
        if errors:
            print(f"{'; '.join(errors)}. Using {path.name}.")
        return found
    raise CheckpointError("; ".join(errors) or f"there is no run in {folder}/")


def saved_args(header: dict, kind: type) -> Any:
    """The run's arguments, of the class `kind` (an algorithm's Args). Raises CheckpointError if they are not."""
    algorithm, args, names = header["algorithm"], header["args"], {field.name for field in fields(kind)}
    expected = Path(inspect.getfile(kind)).stem
    if algorithm != expected:
        raise CheckpointError(f"it is a run of {algorithm}, not of {expected}")
    if set(args) != names:
        raise CheckpointError(f"another version of {expected} saved it: arguments {sorted(names ^ set(args))} differ")
    return kind(**args)


def read_state(header: dict, stream: io.BytesIO, like):
    """The training state, with the structure, shapes and dtypes of `like`. Raises CheckpointError."""
    if header["structure"] != str(jax.tree.structure(like)):  # leaves are stored by position
        what = "another kind of state than this version has" if header["update"] else "no state yet"
        raise CheckpointError(f"it holds {what}")
    try:
        return eqx.tree_deserialise_leaves(stream, like)
    except (ValueError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"its state does not fit: {error}") from None
