"""Whether a value is of the type, and in the interval, that an annotation names. Imports no torch."""

import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
    dict: "a mapping",
    list: "a list",
}


def near(word: str, known: Iterable[object]) -> str:
    """' Did you mean X?' where one of the known words is close to a misspelt one."""
    match = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.55)
    return f" Did you mean {match[0]}?" if match else ""


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A side or [height, width] as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def describe(hint: Any) -> str:
    """A type in plain English."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return describe(args[0])
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(map(describe, args)))
    if origin is list:
        return f"a list, each {describe(args[0])}"
    return TYPE_NAMES[hint]


def conform(value: object, hint: Any) -> object:
    """The value as the type wants it (int -> float, 'None' -> None). Raises TypeError where it is of another type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return conform(value, args[0])
    if origin in (types.UnionType, typing.Union):
        # W&B's agent hands None over as a word
        if types.NoneType in args and (value is None or value in ("None", "null")):
            return None
        for arg in sorted(args, key=lambda a: a is str):
            try:
                return conform(value, arg)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        for arg in args:
            if type(value) is type(arg) and value == arg:
                return value
        raise TypeError
    if origin is list and isinstance(value, list):
        return [conform(item, args[0]) for item in value]
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is dict and isinstance(value, Mapping):
        return dict(value)
    if hint in (int, bool, str, types.NoneType, list) and type(value) is hint:
        return value
    raise TypeError


# ---------------------------------------------------------------- intervals


def interval_of(hint: Any) -> str | None:
    """The interval of a key's numbers, as `Annotated[float, "(0, 1)"]` names it, in whichever place of its type."""
    if typing.get_origin(hint) is Annotated:
        return hint.__metadata__[0]
    intervals = (interval_of(arg) for arg in typing.get_args(hint) if not isinstance(arg, str))
    return next((interval for interval in intervals if interval is not None), None)


def out_of_range(key: str, value: object, interval: str | None) -> Iterator[str]:
    """A sentence for each number of a value that lies outside the interval, or without one is not finite."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from out_of_range(f"{key}.{name}", item, interval)
    elif isinstance(value, list):
        for item in value:
            yield from out_of_range(key, item, interval)
    elif interval is not None and isinstance(value, int | float) and not _inside(value, interval):
        yield f"{key} must {interval_as_text(interval)}, got {value}."
    elif interval is None and isinstance(value, float) and not math.isfinite(value):
        yield f"{key} must be a finite number, got {value}."


def _inside(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below and not math.isnan(value)


def interval_as_text(interval: str) -> str:
    """'(0, inf)' -> 'be greater than 0'; bounded intervals stay as they are."""
    low, high = (bound.strip() for bound in interval[1:-1].split(","))
    if high == "inf":
        return f"be greater than {low}" if interval[0] == "(" else f"be {low} or more"
    return f"lie in {interval}"
