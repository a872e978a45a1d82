"""Translates between wire messages and domain values; with the servicers, the only code that knows both.

Reading collects every fault of a request, never only the first, with field paths as the caller wrote them. Here is
what every kind of message shares; each noun has its module.
"""

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from service.domain import checks
from service.domain.events import instant
from service.errors import InvalidArgument, Reason, Violation

T = TypeVar("T")
R = TypeVar("R")

# How long one call may keep the event loop from the others.
_SLICE_S = 0.01
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def timestamp(instant: datetime | None) -> Timestamp | None:
    """Return an aware instant as a Timestamp, exact to the microsecond."""
    if instant is None:
        return None
    seconds, micros = divmod((instant - _EPOCH) // _MICROSECOND, 1_000_000)
    return Timestamp(seconds=seconds, nanos=micros * 1000)


def one_id(field: str, value: str) -> uuid.UUID:
    """Read a required UUID; raises InvalidArgument."""
    found = checks.as_uuid(field, value)
    if isinstance(found, Violation):
        raise InvalidArgument([found])
    return found


async def in_slices(translate: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """Translate many values, letting other calls have the event loop now and then."""
    translated: list[R] = []
    clock = asyncio.get_running_loop().time
    began = clock()
    for value in values:
        if clock() - began > _SLICE_S:
            await asyncio.sleep(0)
            began = clock()
        translated.append(translate(value))
    return translated


def raise_any(faults: Iterable[Violation | None]) -> None:
    """Raise InvalidArgument with all the faults, if there are any."""
    found = [fault for fault in faults if fault]
    if found:
        raise InvalidArgument(found)


def read_instant(message: Message, field: str, faults: list[Violation], *, required: bool = False) -> datetime | None:
    """Read a Timestamp field of a message, None if it is unset; notes what is wrong with it."""
    if not message.HasField(field):
        if required:
            text = "is required: a timestamp such as 2026-01-31T00:00:00Z"
            faults.append(Violation(field, Reason.FIELD_REQUIRED, text))
        return None
    sent: Timestamp = getattr(message, field)
    found = instant(sent.seconds, sent.nanos)
    if found is None:
        faults.append(Violation(field, Reason.WINDOW_RANGE, "must lie in 0001-01-02T00:00:00Z to 9999-12-30T23:59:59Z"))
    return found


def enum_value(field: str, number: Any, names: Mapping[Any, T], faults: list[Violation]) -> T | None:
    """Read a required enum value by its number; notes what is wrong with it."""
    found = names.get(number)
    if found is None:
        reason = Reason.FIELD_INVALID if number else Reason.FIELD_REQUIRED
        choices = ", ".join(getattr(name, "name", str(name)) for name in names.values())
        faults.append(Violation(field, reason, f"must be one of {choices}"))
    return found


def new_id(path: str, sent: str, faults: list[Violation]) -> uuid.UUID:
    """Read the UUID that a caller chose for something new, or make one."""
    if not sent:
        return uuid.uuid4()
    found = checks.as_uuid(path, sent)
    if isinstance(found, Violation):
        faults.append(found)
        return uuid.uuid4()
    return found


def check_mask(paths: Iterable[str], known: Sequence[str]) -> None:
    """Refuse an update mask that names something which cannot be updated."""
    unknown = [path for path in paths if path not in known]
    if unknown:
        text = f"names {', '.join(unknown)}, which cannot change; allowed are {', '.join(known)}"
        raise InvalidArgument([Violation("update_mask", Reason.FIELD_INVALID, text)])
