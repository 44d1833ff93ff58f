"""Checkpoints: files that are complete or not there, and that are believed only after a look.

checkpoint-<update>.eqx: a line with the format and the SHA-256 of all that follows; a line of JSON, the header; the
leaves of the training state, as Equinox writes them. No pickle. The header's arguments are checked like flags.
"""

import hashlib
import inspect
import io
import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import equinox as eqx
import jax
import numpy as np

from common.harness.flags import check_flags, check_types

FORMAT = b"edp-checkpoint-2"
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
    """Saves the training state after update header["update"], and removes all but the newest `KEPT` checkpoints.

    Raises OSError, and CheckpointError if the state is not finite.
    """
    state = jax.tree.map(np.asarray, state)
    _check_finite(state)
    payload = io.BytesIO()
    payload.write(json.dumps({**header, "structure": str(jax.tree.structure(state))}).encode() + b"\n")
    eqx.tree_serialise_leaves(payload, state)
    parts = b"%s %s\n" % (FORMAT, hashlib.sha256(payload.getbuffer()).hexdigest().encode()), payload.getbuffer()
    write_atomically(folder / f"checkpoint-{header['update']}.eqx", lambda file: file.writelines(parts))
    for old in checkpoints(folder)[KEPT:]:
        old.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """Of a run, the newest first."""
    number = lambda path: path.stem.removeprefix("checkpoint-")
    found = [path for path in folder.glob("checkpoint-*.eqx") if number(path).isdecimal()]
    return sorted(found, key=lambda path: int(number(path)), reverse=True)


def read_header(path: Path) -> tuple[dict, io.BytesIO]:
    """(header, stream of the leaves) of a checkpoint. Raises OSError, and CheckpointError if it is damaged."""
    first, _, content = path.read_bytes().partition(b"\n")
    if first.split(b" ")[0] != FORMAT:
        raise CheckpointError(f"{path} is damaged, or of another version: it does not begin with {FORMAT.decode()}")
    if first != b"%s %s" % (FORMAT, hashlib.sha256(content).hexdigest().encode()):
        raise CheckpointError(f"{path} is damaged: its content does not have its checksum")
    stream = io.BytesIO(content)
    return _header(path, stream.readline()), stream


def _header(path: Path, text: bytes) -> dict:
    try:
        header = json.loads(text)
        if type(header["update"]) is not int or header["update"] < 0 or not isinstance(header["dataset"], dict):
            raise ValueError("it does not say of which update and data it is")
        return header
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def newest_header(folder: Path) -> tuple[dict, io.BytesIO]:
    """(header, stream of the leaves) of a run's newest checkpoint that is whole; says so if it is not the last.

    Before the first checkpoint the header is args.json, and the stream is empty. Raises CheckpointError.
    """
    errors = []
    for path in checkpoints(folder):
        try:
            found = read_header(path)
        except (OSError, CheckpointError) as error:
            errors.append(str(error))
            continue
        if errors:
            print(f"{'; '.join(errors)}. Using {path.name}.")
        return found
    if errors:
        raise CheckpointError("; ".join(errors))
    try:
        return _header(folder / "args.json", (folder / "args.json").read_bytes()), io.BytesIO()
    except OSError:
        raise CheckpointError(f"there is no run in {folder}/") from None


def saved_args(header: dict, kind: type) -> Any:
    """The run's arguments, of the class `kind` (an algorithm's Args). Raises CheckpointError if they are not."""
    algorithm, args, names = header.get("algorithm"), header.get("args"), {field.name for field in fields(kind)}
    expected = Path(inspect.getfile(kind)).stem
    if algorithm != expected:
        raise CheckpointError(f"it is a run of {algorithm}, not of {expected}")
    if not isinstance(args, dict) or set(args) != names:
        differing = sorted(names ^ set(args)) if isinstance(args, dict) else "all"
        raise CheckpointError(f"it was saved by another version of {expected}: arguments {differing} differ")
    try:
        args = kind(**args)
        check_types(args)
        check_flags(args)
    except (ValueError, TypeError, SystemExit) as error:
        raise CheckpointError(f"it has impossible arguments: {str(error).rstrip('.')}") from None
    return args


def load_run(folder: Path | str, algorithm: ModuleType) -> tuple[Any, Any, dict]:
    """(args, state, header) of a run of `algorithm`, a module of algorithms/, at its newest checkpoint.

    If args.normalize_obs, `algorithm.act` takes (obs - mean) / std with (mean, std) = header["normalization"]. Raises
    CheckpointError if there is none that is whole and of this algorithm in this version.
    """
    header, stream = newest_header(Path(folder))
    try:
        args = saved_args(header, algorithm.Args)
        dims = [int(header["dataset"][f"{name}_dim"]) for name in ("observation", "action")]
        init = jax.vmap(lambda seed: algorithm.init_state(jax.random.key(seed), *dims, args))
        like = eqx.filter_eval_shape(init, jax.ShapeDtypeStruct((args.num_seeds,), np.uint32))
        return args, read_state(header, stream, like), header
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"The checkpoint in {folder}/ cannot be used: {error}") from None


def read_state(header: dict, stream: io.BytesIO, like):
    """The training state, with the structure, shapes and dtypes of `like`. Raises CheckpointError."""
    if header.get("structure") != str(jax.tree.structure(like)):  # leaves are stored by position
        raise CheckpointError("it holds another kind of state than this version has")
    try:
        state = eqx.tree_deserialise_leaves(stream, like)
    except (ValueError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"its state does not fit: {error}") from None
    _check_finite(state)
    return state


def _check_finite(state) -> None:
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
        raise CheckpointError("the networks' weights are not finite")
