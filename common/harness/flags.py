"""Bounds of flags, in their types: `batch_size: Positive[int] = 256`."""

from collections.abc import Callable
from typing import Annotated, NamedTuple, TypeVar, get_args, get_type_hints

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
