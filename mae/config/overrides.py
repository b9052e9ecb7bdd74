"""Overrides of a command line, read and written in Hydra's grammar. Imports no torch."""

import re
import shlex
from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException


def parsed(argument: str) -> Override | None:
    """The override that a command-line argument is; None for an option, or for what Hydra refuses by itself."""
    if argument.startswith("-"):
        return None
    try:
        (override,) = OverridesParser.create().parse_overrides([argument])
    except HydraException:
        return None
    return override


def by_key(arguments: Iterable[str]) -> dict[str, Override]:
    """Key or group -> override, without those that Hydra cannot read; the last one of a key wins."""
    overrides = (parsed(argument) for argument in arguments)
    return {override.key_or_group: override for override in overrides if override is not None}


def key_of(argument: str) -> str:
    """`task.epochs` of `+task.epochs=3`; what stands before the first `=` where Hydra cannot read the argument."""
    override = parsed(argument)
    return argument.lstrip("+~").partition("=")[0] if override is None else override.key_or_group


def written_value(argument: str) -> str:
    """The value of an override as it is written, quotes included."""
    return argument.partition("=")[2]


def values_of(override: Override) -> list[Any]:
    """The values that an override sets: several in a sweep over choices, else one. Quotes are gone."""
    if override.is_choice_sweep() or override.is_range_sweep():
        return [_plain(value) for value in override.sweep_iterator()]
    return [_plain(override.value())]


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value


def assignment(key: str, value: str) -> str:
    """`key=value` with the value quoted where Hydra would read something else, such as a list of two names."""
    unquoted = parsed(f"{key}={value}")
    if unquoted is not None and not unquoted.is_sweep_override() and unquoted.value() == value and "${" not in value:
        return f"{key}={value}"
    # OmegaConf resolves ${...} between quotes too, unless an odd number of backslashes stands before it
    escaped = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    return f"{key}={QuotedString(escaped, Quote.single).with_quotes()}"


def pasted(key: str, value: str) -> str:
    """`key=value` as it can be typed into a shell."""
    return shlex.quote(assignment(key, value))
