"""Bounds of flags, in their types: `batch_size: Positive[int] = 256`."""

from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np


class Bound(NamedTuple):
    allowed: str
    holds: Callable[[float], bool]


T = TypeVar("T")
Positive = Annotated[T, Bound("positive", lambda value: 0 < value < np.inf)]
NonNegative = Annotated[T, Bound("0 or more", lambda value: 0 <= value < np.inf)]
UnitInterval = Annotated[T, Bound("between 0 and 1", lambda value: 0 <= value <= 1)]


def check_flags(args) -> None:
    """Exits with a sentence if a flag is outside the bounds of its type, `Positive[int]` and so on."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if type(value) is int and value >= 2**31:
            raise SystemExit(f"{flag} must be below 2^31, but is {value}.")
        for option in (hint, *get_args(hint)):  # of `Positive[int] | None`
            for bound in getattr(option, "__metadata__", ()):
                if isinstance(bound, Bound) and value is not None and not bound.holds(value):
                    raise SystemExit(f"{flag} must be {bound.allowed}, but is {value}.")
    if args.seed + args.num_seeds > 2**31:
        raise SystemExit(f"--seed must be below 2^31, but is {args.seed}.")


def check_types(args) -> None:
    """Raises TypeError if a field does not hold what its type says: arguments that were not parsed from flags."""
    for name, hint in get_type_hints(type(args)).items():
        if not _is_a(getattr(args, name), hint):
            raise TypeError(f"{name} is {getattr(args, name)!r}")


def _is_a(value: Any, hint) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_is_a(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return type(value) is hint or (hint is float and type(value) is int)
