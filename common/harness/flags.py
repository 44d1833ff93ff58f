"""Flags: how they are read and explained, and their bounds, in their types (`batch_size: Positive[int] = 256`)."""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from typing import Annotated, NamedTuple, TypeVar, get_args, get_type_hints

import numpy as np
import tyro


class Bound(NamedTuple):
    allowed: str
    holds: Callable[[float], bool]


T = TypeVar("T")
Positive = Annotated[T, Bound("positive", lambda value: 0 < value < np.inf)]
NonNegative = Annotated[T, Bound("0 or more", lambda value: 0 <= value < np.inf)]
UnitInterval = Annotated[T, Bound("between 0 and 1", lambda value: 0 <= value <= 1)]


def cli(args_class: type[T], args: Sequence[str] | None = None, prog: str | None = None) -> T:
    """`tyro.cli(args_class)`, with a box in --help for each section of the class (`# Optimisation`), last ones first.

    tyro has boxes for nested classes only, so each section becomes one. What is returned knows which flags were typed
    (`tasks.given`). Values that the class refuses exit with 1.
    """
    args = sys.argv[1:] if args is None else args
    hints, boxes = get_type_hints(args_class, include_extras=True), []
    parts = re.split(r"^    # ([A-Z]\w+)\n", inspect.getsource(args_class), flags=re.MULTILINE)
    for title, part in zip(["flags", *parts[1::2]], parts[::2]):
        texts = re.findall(r'^    (\w+): .*?(?:  # (.+)|\n    """((?s:.+?))""")?$', part, flags=re.MULTILINE)
        explained = lambda name, *texts: Annotated[hints[name], tyro.conf.arg(help="".join(texts))]
        box = [(n, explained(n, *text), getattr(args_class, n)) for n, *text in texts if n in hints]
        boxes = [(title.lower(), make_dataclass(title, box)), *boxes] if box else boxes
    nested, config = make_dataclass("Args", boxes), (tyro.conf.OmitArgPrefixes,)
    parsed = tyro.cli(nested, prog=prog, args=args, description=args_class.__doc__, config=config)
    try:
        flags = args_class(**{name: value for box in vars(parsed).values() for name, value in vars(box).items()})
    except (ValueError, MemoryError) as error:
        raise SystemExit(f"Impossible flags: {error}.") from None
    typed = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in args if word.startswith("--")}
    # no field, so no setting: copies by `dataclasses.replace` do not have it
    object.__setattr__(flags, "typed", {name for name in hints if {name, f"no_{name}"} & typed})
    return flags


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
        raise SystemExit(f"--seed {args.seed} and --num-seeds {args.num_seeds} must add up to 2^31 at most.")
