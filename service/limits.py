"""Owns how much a request may hold: every limit with its default, and what the operator has set it to."""

import difflib
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

PREFIX = "METERING_LIMIT_"
# No limit is near a number of so many digits, and reading one of thousands would take long.
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
_REFUSED = "INVALID_ARGUMENT, LIMIT_EXCEEDED"


class Limit(NamedTuple):
    """One limit. `value` holds in this process; `most` is the highest number that everything behind it is safe with.

    `error` is what answers a call beyond it ("" = nothing does: the limit is taken instead), `field` an example of what
    that names.
    """

    name: str
    value: int
    default: int
    most: int
    about: str
    error: str
    field: str

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return PREFIX + self.name


_limits: dict[str, Limit] = {}


def limit(name: str, default: int, *, most: int, about: str, field: str, error: str = _REFUSED) -> int:
    """Make a limit and return its number: the operator's, if that is valid, or else the default.

    Limits are constants of the modules that hold their rules, and never change while a process runs.
    """
    if name in _limits:
        raise ValueError(f"there are two limits of the name {name}")
    value = _number(os.environ.get(PREFIX + name, ""), most) or default
    _limits[name] = Limit(name, value, default, most, about, error, field)
    return value


def all_limits() -> Sequence[Limit]:
    """Return every limit whose module has been imported; `service.server` imports them all."""
    return list(_limits.values())


def faults() -> list[str]:
    """Say what is wrong with each variable that sets a limit; a server must not start with any.

    Like `all_limits` it knows those of the modules that have been imported.
    """
    found = []
    for variable, text in sorted(os.environ.items()):
        name = variable.removeprefix(PREFIX)
        if name == variable or not text:
            continue
        known = _limits.get(name)
        if known is None:
            close = difflib.get_close_matches(name.upper(), _limits, 1)
            meant = f" Is {PREFIX}{close[0]} meant?" if close else ""
            found.append(f"{variable} names no limit.{meant} `metering limits` lists them all.")
        elif _number(text, known.most) is None:
            found.append(f"{variable} is {text[:40]!r} and must be a whole number, 1 to {known.most}.")
    return found


def _number(text: str, most: int) -> int | None:
    return int(text) if _NUMBER.fullmatch(text) and 1 <= int(text) <= most else None
