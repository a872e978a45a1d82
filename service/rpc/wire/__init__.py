"""Translates between wire messages and domain values; with the servicers, the only code that knows both.

Reading collects every fault of a request, never only the first, with field paths as the caller wrote them. Here is
what every kind of message shares; each noun has its module.
"""

import asyncio
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from service.domain import checks
from service.domain.customers import YEAR_MAX, YEAR_MIN
from service.domain.events import instant
from service.domain.usage import IDS_MAX
from service.errors import InvalidArgument, Reason, Violation

T = TypeVar("T")
R = TypeVar("R")

# How long one call may keep the event loop from the others, and from the transactions under way, which wait for it at
# each of their steps.
_SLICE_S = 0.002
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


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


def read_date(path: str, text: str, faults: list[Violation]) -> date | None:
    """Read a required date; notes what is wrong with it."""
    if not text:
        faults.append(Violation(path, Reason.FIELD_REQUIRED, "is required: a date such as 2026-01-31"))
        return None
    try:
        # fromisoformat alone would also take week dates such as 2026-W01-1.
        found = date.fromisoformat(text) if _DATE.fullmatch(text) else None
    except ValueError:
        found = None
    if found is None or not YEAR_MIN <= found.year <= YEAR_MAX:
        limits = f"must be a date as YYYY-MM-DD, years {YEAR_MIN}..{YEAR_MAX}"
        faults.append(Violation(path, Reason.FIELD_INVALID, limits))
        return None
    return found


def read_dates(first: str, last: str, faults: list[Violation], *, today: date) -> tuple[datetime, datetime] | None:
    """Read the optional `start_date` and `end_date` of a list as the instants that bound their UTC days, half-open.

    The end is today by default, the start 30 days before the end (Suger's usageRecordGroup list).
    """
    end = read_date("end_date", last, faults) if last else today
    start = read_date("start_date", first, faults) if first else end and end - timedelta(days=30)
    if start is None or end is None:
        return None
    if start > end:
        text = f"must not be later than end_date, which is {end}"
        faults.append(Violation("start_date", Reason.WINDOW_RANGE, text))
    bounds = [datetime(day.year, day.month, day.day, tzinfo=UTC) for day in (start, end + timedelta(days=1))]
    return bounds[0], bounds[1]


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


def ids(path: str, sent: Sequence[tuple[str, str]], faults: list[Violation]) -> list[uuid.UUID]:
    """Read UUIDs that stand at path[i] + suffix; without any, or with a fault, an empty list."""
    if len(sent) > IDS_MAX:
        text = f"has {len(sent):,} items; at most {IDS_MAX:,} are allowed"
        faults.append(Violation(path, Reason.LIMIT_EXCEEDED, text))
        return []
    found: dict[uuid.UUID, None] = {}
    for i, (suffix, text) in enumerate(sent):
        one = checks.as_uuid(f"{path}[{i}]{suffix}", text)
        if isinstance(one, Violation):
            faults.append(one)
        elif one in found:
            faults.append(Violation(f"{path}[{i}]{suffix}", Reason.DUPLICATE_ITEM, f"{one} stands twice"))
        else:
            found[one] = None
    return list(found) if len(found) == len(sent) else []


def check_mask(paths: Iterable[str], known: Sequence[str]) -> None:
    """Refuse an update mask that names something which cannot be updated."""
    unknown = [path for path in paths if path not in known]
    if unknown:
        text = f"names {', '.join(unknown)}, which cannot change; allowed are {', '.join(known)}"
        raise InvalidArgument([Violation("update_mask", Reason.FIELD_INVALID, text)])
