"""Owns the arithmetic of usage windows: which instants bound an hour, a local day or a whole range.

Instants come in and go out as aware UTC datetimes with microseconds. Windows are half-open, `[start, end)`, never of
zero length, and those of one request partition its range. Zone data is that of the `tzdata` package, never the host's.
"""

import enum
import functools
import io
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from importlib import resources
from itertools import pairwise
from typing import Literal
from zoneinfo import ZoneInfo

CELL = timedelta(hours=1)
"""Width of the stored aggregate cell. Cells start at multiples of it in UTC."""

EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
"""First instant a bound may have: a day above `datetime.min`, so that no local time of it can overflow."""
LATEST = datetime(9999, 12, 30, 23, 59, 59, 999999, tzinfo=UTC)
"""Last instant a bound may have: a day below `datetime.max`, for the same reason."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY = _EPOCH.toordinal()
_HOUR = timedelta(hours=1)
_SECOND = timedelta(seconds=1)
_DAY_SECONDS = 86_400


class WindowSize(enum.Enum):
    """How a range is cut: UTC hours, local days of a zone, or not at all."""

    HOUR = "HOUR"
    DAY = "DAY"
    NONE = "NONE"


class FaultKind(enum.StrEnum):
    """What is wrong with a requested range."""

    MISALIGNED = "misaligned"
    RANGE = "range"
    ZONE = "zone"
    OUT_OF_RANGE = "out_of_range"


FaultField = Literal["starting_on", "ending_before", "time_zone"]


class WindowFault(ValueError):
    """One thing the user got wrong: the request's `field`, the `kind`, and a `message` in plain words."""

    def __init__(self, field: FaultField, kind: FaultKind, message: str) -> None:
        super().__init__(field, kind, message)
        self.field: FaultField = field
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


class WindowFaults(ValueError):
    """All that is wrong with one requested range: `faults`, never empty."""

    def __init__(self, faults: Iterable[WindowFault]) -> None:
        self.faults = tuple(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        return " ".join(fault.message for fault in self.faults)


def cell_floor(instant: datetime) -> datetime:
    """Start of the cell that holds the instant; ValueError unless it is aware UTC."""
    return _floor(_utc(instant), CELL)


def cell_ceil(instant: datetime) -> datetime:
    """First cell start at or after the instant; ValueError unless it is aware UTC and has one before year 10000."""
    try:
        return _ceil(_utc(instant), CELL)
    except OverflowError:
        raise ValueError(f"no cell starts after {instant.isoformat()}") from None


def first_instant(day: date, time_zone: str = "UTC") -> datetime:
    """First instant of a local date, or of the next date that exists if the zone skipped it.

    Raises WindowFault if the zone is unknown, ValueError if the instant lies outside EARLIEST to LATEST.
    """
    seconds = _zone(time_zone).first(day.toordinal())
    if not _MIN <= seconds <= _MAX:
        raise ValueError(f"{day} in {time_zone} starts outside {_z(EARLIEST)} to {_z(LATEST)}")
    return _instant(seconds)


def local_date(instant: datetime, time_zone: str = "UTC") -> date:
    """Local date whose DAY window holds the instant.

    Raises WindowFault if the zone is unknown, ValueError unless the instant is aware UTC from EARLIEST to LATEST.
    """
    if not EARLIEST <= _utc(instant) <= LATEST:
        raise ValueError(f"{_z(instant)} is outside {_z(EARLIEST)} to {_z(LATEST)}")
    return date.fromordinal(_zone(time_zone).day_of(_utc(instant)))


def widened(size: WindowSize, start: datetime, end: datetime) -> tuple[datetime, datetime]:
    """Return the bounds of the UTC windows that hold `[start, end]`; an empty NONE range becomes the days that hold it.

    Bounds that are valid stay as they are, and so do those that no widening mends (an end before its start, or windows
    beyond EARLIEST to LATEST): they are for `Windows.of` to refuse. Raises ValueError if a bound is not aware UTC.
    """
    start, end = _utc(start), _utc(end)
    if end < start or (size is WindowSize.NONE and start < end):
        return start, end
    width = _HOUR if size is WindowSize.HOUR else timedelta(days=1)
    if not EARLIEST + width <= start <= end <= LATEST - width:
        return start, end
    first, last = _floor(start, width), _ceil(end, width)
    return first, last if last > first else first + width


def zone_fault(size: WindowSize, time_zone: str | None) -> WindowFault | None:
    """Say what is wrong with the time zone of a request; None if nothing is."""
    if size is WindowSize.HOUR and time_zone is not None:
        message = "time_zone must be unset with HOUR windows, which are hours of UTC."
        return WindowFault("time_zone", FaultKind.ZONE, message)
    try:
        _zone("UTC" if time_zone is None else time_zone)
    except WindowFault as fault:
        return fault
    return None


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of one request, numbered from 0. Build it with `of`, which validates; the constructor does not."""

    size: WindowSize
    start: datetime
    end: datetime
    zone: str = "UTC"
    # Numbers of the first day and of the one that starts at `end`, so that no call works them out again (DAY only).
    _days: tuple[int, int] = field(init=False, repr=False, compare=False, default=(0, 0))

    def __post_init__(self) -> None:
        if self.size is WindowSize.DAY:
            zone = _zone(self.zone)
            days = (zone.number(zone.day_of(self.start)), zone.number(zone.day_of(self.end)))
            object.__setattr__(self, "_days", days)

    @classmethod
    def of(cls, size: WindowSize, start: datetime, end: datetime, time_zone: str | None) -> "Windows":
        """Windows of a request; `time_zone` is None if unset, which means UTC.

        Raises WindowFaults with everything that is wrong with the request, ValueError if a bound is not aware UTC.
        """
        start, end = _utc(start), _utc(end)
        name = "UTC" if time_zone is None else time_zone
        unit = "an hour of UTC" if size is WindowSize.HOUR else f"a day in {name}"
        fault = zone_fault(size, time_zone)
        faults = [fault] if fault else []
        zone = None if fault else _zone(name)
        bounds: tuple[tuple[FaultField, datetime], ...] = (("starting_on", start), ("ending_before", end))
        for which, bound in bounds:
            if not EARLIEST <= bound <= LATEST:
                message = f"{which} {_z(bound)} must lie between {_z(EARLIEST)} and {_z(LATEST)}."
                faults.append(WindowFault(which, FaultKind.OUT_OF_RANGE, message))
            elif bound not in (nearest := _nearest(size, bound, zone)):
                near = " and ".join(_z(each) for each in nearest)
                message = f"{which} {_z(bound)} is not the start of {unit}; the nearest that would do: {near}."
                faults.append(WindowFault(which, FaultKind.MISALIGNED, message))
        if end <= start:
            message = f"ending_before {_z(end)} must be later than starting_on {_z(start)}."
            faults.append(WindowFault("ending_before", FaultKind.RANGE, message))
        if faults:
            raise WindowFaults(faults)
        return cls(size, start, end, name)

    def __len__(self) -> int:
        if self.size is WindowSize.NONE:
            return 1
        if self.size is WindowSize.HOUR:
            return (self.end - self.start) // _HOUR
        return self._days[1] - self._days[0]

    def slice(self, index: int, count: int) -> tuple[tuple[datetime, datetime], ...]:
        """Windows `index` up to, not including, `index + count`, as far as they exist, as (start, end).

        Costs in proportion to `count`, wherever it starts. Raises ValueError for a negative argument.
        """
        # The same few ranges are asked for again and again, of one customer after the other.
        if count <= _KEPT_SLICE_MAX:
            return _kept_slice(self, index, count)
        return self._slice(index, count)

    def _slice(self, index: int, count: int) -> tuple[tuple[datetime, datetime], ...]:
        if index < 0 or count < 0:
            raise ValueError("index and count must not be negative")
        stop = min(index + count, len(self))
        if index >= stop:
            return ()
        if self.size is WindowSize.NONE:
            return ((self.start, self.end),)
        if self.size is WindowSize.HOUR:
            return tuple(pairwise(self.start + _HOUR * i for i in range(index, stop + 1)))
        zone, base = _zone(self.zone), self._days[0]
        return tuple(pairwise(_instant(zone.first(zone.day(base + i))) for i in range(index, stop + 1)))

    def index_of(self, instant: datetime) -> int:
        """Index of the window that holds the instant; ValueError unless it is aware UTC and in `[start, end)`."""
        instant = _utc(instant)
        if not self.start <= instant < self.end:
            raise ValueError(f"{_z(instant)} is outside {_z(self.start)} to {_z(self.end)}")
        if self.size is WindowSize.NONE:
            return 0
        if self.size is WindowSize.HOUR:
            return (instant - self.start) // _HOUR
        zone = _zone(self.zone)
        return zone.number(zone.day_of(instant)) - self._days[0]


_KEPT_SLICE_MAX = 1_000


@functools.lru_cache(maxsize=64)
def _kept_slice(windows: Windows, index: int, count: int) -> tuple[tuple[datetime, datetime], ...]:
    return windows._slice(index, count)


class _Zone:
    """Days of one zone: proleptic ordinals of local dates, and whole seconds since 1970, so that nothing overflows.

    A clock set back over midnight shows the date before once more. Windows must partition time, so day d runs from the
    first instant whose local date is d or later to the first one whose local date is d+1 or later: the hour in which
    the clock shows d-1 again belongs to d. A date the zone skipped would begin where the next one does; it is no day.
    """

    def __init__(self, name: str) -> None:
        data = resources.files("tzdata").joinpath("zoneinfo", *name.split("/")).read_bytes()
        self._info = ZoneInfo.from_file(io.BytesIO(data), key=name)
        self._changes = _listed_changes(data)
        self._skipped = sorted(self._find_skipped())

    def first(self, day: int) -> int:
        """First second whose local date is `day` or later."""
        midnight = (day - _EPOCH_DAY) * _DAY_SECONDS
        # Offsets are less than a day, so a day before midnight UTC the date has not come anywhere. From there go from
        # one change of offset to the next until local midnight comes before the next, or the last one jumped over it.
        second = midnight - _DAY_SECONDS
        while True:
            reached = midnight - self._offset(second)
            if reached <= second:
                return second
            change = self._next_change(second, reached)
            if change is None:
                return reached
            second = change

    def day_of(self, instant: datetime) -> int:
        """Day that holds the instant: the last one that had begun by then. It always exists."""
        second = _seconds(instant)
        day = instant.astimezone(self._info).toordinal()
        while self.first(day + 1) <= second:  # it is a clock set back that shows an earlier date
            day += 1
        return day

    def number(self, day: int) -> int:
        """Position of an existing day among the existing days."""
        return day - bisect_left(self._skipped, day)

    def day(self, number: int) -> int:
        """Day at a position: the inverse of `number`."""
        for skipped in self._skipped:
            if number >= skipped:
                number += 1
        return number

    def _offset(self, second: int) -> int:
        """Seconds by which local time is ahead of UTC."""
        # Beyond the range of bounds no zone changes; clamping keeps local times within what a datetime can hold.
        local = _instant(min(max(second, _MIN), _MAX)).astimezone(self._info)
        return (local.utcoffset() or timedelta(0)) // _SECOND

    def _next_change(self, second: int, until: int) -> int | None:
        """First change of offset after `second`, not later than `until`, which is less than two days away."""
        position = bisect_right(self._changes, second)
        if position < len(self._changes):
            return self._changes[position] if self._changes[position] <= until else None
        # Past the listed changes the zone follows a yearly rule, with at most one change in so short a time.
        before = self._offset(second)
        if self._offset(until) == before:
            return None
        return second + 1 + bisect_left(range(second + 1, until), True, key=lambda at: self._offset(at) != before)

    def _find_skipped(self) -> set[int]:
        """Local dates that never were: it takes a jump by a day or more to skip one, which no yearly rule has."""
        skipped: set[int] = set()
        for change in self._changes:
            before, after = change - 1 + self._offset(change - 1), change + self._offset(change)
            if after - before > _DAY_SECONDS:
                days = range(before // _DAY_SECONDS + _EPOCH_DAY + 1, after // _DAY_SECONDS + _EPOCH_DAY)
                skipped.update(day for day in days if self.first(day) == self.first(day + 1))
        return skipped


def _listed_changes(data: bytes) -> tuple[int, ...]:
    """Seconds since 1970 of the changes a TZif file lists (RFC 9636): `zoneinfo` reads them but does not tell them."""
    counts = struct.Struct(">20x6l")
    utc, standard, leap, times, types, chars = counts.unpack_from(data)
    # A 32-bit block for old readers comes first. The 64-bit one has its own header, and then starts with the times.
    second_header = counts.size + times * 5 + types * 6 + chars + leap * 8 + standard + utc
    times = counts.unpack_from(data, second_header)[3]
    return struct.unpack_from(f">{times}q", data, second_header + counts.size)


@functools.cache
def _zone_names() -> frozenset[str]:
    return frozenset(resources.files("tzdata").joinpath("zones").read_text(encoding="ascii").split())


@functools.cache  # bounded by the list of names, since a refused name is not kept
def _zone(name: str) -> _Zone:
    # The list is the check: a name becomes a path only if tzdata itself has it.
    if name not in _zone_names():
        message = f'time_zone {name[:64]!r} is not a name in the IANA time zone database, such as "America/New_York".'
        raise WindowFault("time_zone", FaultKind.ZONE, message)
    return _Zone(name)


def _nearest(size: WindowSize, bound: datetime, zone: _Zone | None) -> list[datetime]:
    """Valid bounds next to `bound`, below and above; `bound` itself if it is valid or, for lack of a zone, may be."""
    if size is WindowSize.HOUR:
        return [each for each in (_floor(bound, _HOUR), _ceil(bound, _HOUR)) if each <= LATEST]
    if size is WindowSize.NONE or zone is None:
        return [bound]
    day = zone.day_of(bound)
    starts = (zone.first(day), zone.first(zone.day(zone.number(day) + 1)))
    return [_instant(second) for second in starts if _MIN <= second <= _MAX]


def _utc(instant: datetime) -> datetime:
    if instant.utcoffset() != timedelta(0):
        raise ValueError(f"{instant!r} is not an aware UTC datetime")
    return instant.replace(tzinfo=UTC)


def _floor(instant: datetime, width: timedelta) -> datetime:
    return instant - (instant - _EPOCH) % width


def _ceil(instant: datetime, width: timedelta) -> datetime:
    return instant + (_EPOCH - instant) % width


def _seconds(instant: datetime) -> int:
    return (instant - _EPOCH) // _SECOND


def _instant(seconds: int) -> datetime:
    return _EPOCH + timedelta(seconds=seconds)


_MIN, _MAX = _seconds(EARLIEST), _seconds(LATEST)


def _z(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")
