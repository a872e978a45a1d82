"""Window arithmetic against tables of known clock changes and against an oracle that walks the clock."""

import io
import time
import zoneinfo
from bisect import bisect_right
from datetime import UTC, date, datetime, timedelta, timezone
from functools import cache
from importlib import resources
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.domain.windows import (
    CELL,
    EARLIEST,
    LATEST,
    FaultKind,
    WindowFault,
    WindowFaults,
    Windows,
    WindowSize,
    cell_ceil,
    cell_floor,
    first_instant,
    local_date,
)

HOUR, DAY, NONE = WindowSize.HOUR, WindowSize.DAY, WindowSize.NONE
ZONES = sorted(resources.files("tzdata").joinpath("zones").read_text().split())
MINUTE, SECOND, ONE_DAY = timedelta(minutes=1), timedelta(seconds=1), timedelta(days=1)
TICK = timedelta(microseconds=1)

# Every date a zone of tzdata jumped over; links to a zone share its entry.
SKIPPED = {
    "Asia/Manila": date(1844, 12, 31),
    "Pacific/Apia": date(2011, 12, 30),
    "Pacific/Enderbury": date(1994, 12, 31),
    "Pacific/Fakaofo": date(2011, 12, 30),
    "Pacific/Guam": date(1844, 12, 31),
    "Pacific/Kanton": date(1994, 12, 31),
    "Pacific/Kiritimati": date(1994, 12, 31),
    "Pacific/Kosrae": date(1844, 12, 31),
    "Pacific/Kwajalein": date(1993, 8, 21),
    "Pacific/Palau": date(1844, 12, 31),
    "Pacific/Saipan": date(1844, 12, 31),
    "Kwajalein": date(1993, 8, 21),
}


def at(text: str) -> datetime:
    """Instant from ISO 8601 text without a zone, in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@cache
def oracle_zone(name: str) -> ZoneInfo:
    """The zone from the package's file, read apart from the code under test."""
    data = resources.files("tzdata.zoneinfo").joinpath(*name.split("/")).read_bytes()
    return ZoneInfo.from_file(io.BytesIO(data), key=name)


@cache
def oracle_first(name: str, day: date) -> datetime:
    """First instant whose local date is `day` or later, found by walking the clock by minutes and then by seconds."""
    info = oracle_zone(name)
    instant = datetime(day.year, day.month, day.day, tzinfo=UTC) - ONE_DAY
    while instant.astimezone(info).date() < day:
        instant += MINUTE
    instant -= MINUTE
    while instant.astimezone(info).date() < day:
        instant += SECOND
    return instant


def oracle_bounds(name: str, first: date, last: date) -> list[datetime]:
    """Starts of all windows from `first` to `last`, inclusive; a skipped date starts with the next, so it drops out."""
    days = (last - first).days
    return sorted({oracle_first(name, first + timedelta(days=i)) for i in range(days + 1)})


def day_windows(name: str, first: str, last: str) -> Windows:
    """DAY windows from the start of one local date to the start of another."""
    start, end = (first_instant(date.fromisoformat(day), name) for day in (first, last))
    return Windows.of(DAY, start, end, name)


def faults_of(size: WindowSize, start: datetime, end: datetime, zone: str | None = None) -> tuple[WindowFault, ...]:
    """The faults a request is refused with."""
    with pytest.raises(WindowFaults) as refused:
        Windows.of(size, start, end, zone)
    assert refused.value.faults
    return refused.value.faults


def kinds(faults: tuple[WindowFault, ...]) -> list[tuple[str, str]]:
    """Field and kind of each fault."""
    return [(fault.field, fault.kind.value) for fault in faults]


# Where each local day starts, in UTC, as published for these clock changes.
DAY_STARTS = [
    pytest.param("UTC", "2024-02-28", ["2024-02-28", "2024-02-29", "2024-03-01"], id="utc-leap-day"),
    pytest.param("America/New_York", "2024-03-10", ["2024-03-10T05:00", "2024-03-11T04:00"], id="new-york-23h"),
    pytest.param("America/New_York", "2024-11-03", ["2024-11-03T04:00", "2024-11-04T05:00"], id="new-york-25h"),
    pytest.param("America/New_York", "2150-03-08", ["2150-03-08T05:00", "2150-03-09T04:00"], id="rule-of-the-future"),
    pytest.param("Asia/Kolkata", "2024-01-01", ["2023-12-31T18:30", "2024-01-01T18:30"], id="kolkata-5:30"),
    pytest.param("Asia/Kathmandu", "2024-01-01", ["2023-12-31T18:15", "2024-01-01T18:15"], id="kathmandu-5:45"),
    pytest.param("Asia/Kathmandu", "1986-01-01", ["1985-12-31T18:30", "1986-01-01T18:15"], id="kathmandu-gap-15min"),
    pytest.param("Africa/Cairo", "2014-05-15", ["2014-05-14T22:00", "2014-05-15T22:00"], id="cairo-before-gap"),
    pytest.param("Africa/Cairo", "2014-05-16", ["2014-05-15T22:00", "2014-05-16T21:00"], id="cairo-2014-gap"),
    pytest.param("Africa/Cairo", "2023-04-28", ["2023-04-27T22:00", "2023-04-28T21:00"], id="cairo-2023-gap"),
    pytest.param("Africa/Cairo", "2023-10-26", ["2023-10-25T21:00", "2023-10-26T22:00"], id="cairo-24:00-to-23:00"),
    pytest.param("Africa/Cairo", "2023-10-27", ["2023-10-26T22:00", "2023-10-27T22:00"], id="cairo-2023-back"),
    pytest.param("America/Sao_Paulo", "2018-11-04", ["2018-11-04T03:00", "2018-11-05T02:00"], id="sao-paulo-gap"),
    pytest.param("America/Sao_Paulo", "2018-02-17", ["2018-02-17T02:00", "2018-02-18T03:00"], id="sao-paulo-back"),
    pytest.param("Asia/Beirut", "2024-03-31", ["2024-03-30T22:00", "2024-03-31T21:00"], id="beirut-gap"),
    pytest.param("America/Havana", "2013-11-03", ["2013-11-03T04:00", "2013-11-04T05:00"], id="havana-two-midnights"),
    pytest.param("America/Havana", "2013-03-10", ["2013-03-10T05:00", "2013-03-11T04:00"], id="havana-gap"),
    pytest.param("Atlantic/Azores", "2024-10-27", ["2024-10-27T00:00", "2024-10-28T01:00"], id="azores-two-midnights"),
    pytest.param("Australia/Lord_Howe", "2024-04-07", ["2024-04-06T13:00", "2024-04-07T13:30"], id="lord-howe-24.5h"),
    pytest.param("Australia/Lord_Howe", "2024-10-06", ["2024-10-05T13:30", "2024-10-06T13:00"], id="lord-howe-23.5h"),
    pytest.param("Pacific/Apia", "2011-12-29", ["2011-12-29T10:00", "2011-12-30T10:00"], id="apia-before"),
    pytest.param("Pacific/Apia", "2011-12-31", ["2011-12-30T10:00", "2011-12-31T10:00"], id="apia-after"),
    pytest.param("Pacific/Kwajalein", "1993-08-20", ["1993-08-20T12:00", "1993-08-21T12:00"], id="kwajalein-before"),
    pytest.param("Pacific/Kwajalein", "1993-08-22", ["1993-08-21T12:00", "1993-08-22T12:00"], id="kwajalein-after"),
    # 00:01 -> 23:01: the 4th has begun, so the hour in which the clock shows the 3rd again stays with it.
    pytest.param("America/St_Johns", "2006-10-28", ["2006-10-28T02:30", "2006-10-29T02:30"], id="st-johns-day-before"),
    pytest.param("America/St_Johns", "2006-10-29", ["2006-10-29T02:30", "2006-10-30T03:30"], id="st-johns-0:01"),
    pytest.param("Africa/Monrovia", "1971-12-31", ["1971-12-31T00:44:30", "1972-01-01T00:44:30"], id="monrovia-odd"),
    pytest.param("Africa/Monrovia", "1972-01-07", ["1972-01-07T00:44:30", "1972-01-08T00:00:00"], id="monrovia-change"),
    pytest.param("Asia/Kolkata", "1900-01-01", ["1899-12-31T18:38:50", "1900-01-01T18:38:50"], id="kolkata-1900"),
    pytest.param("Europe/Amsterdam", "1850-01-01", ["1849-12-31T23:42:30", "1850-01-01T23:42:30"], id="lmt"),
]


@pytest.mark.parametrize(("zone", "first", "bounds"), DAY_STARTS)
def test_days_start_where_the_clock_says(zone: str, first: str, bounds: list[str]) -> None:
    """Known local days start and end at the published instants, and are valid requests."""
    expected = [at(bound) for bound in bounds]
    windows = Windows.of(DAY, expected[0], expected[-1], zone)
    assert windows.slice(0, 9) == tuple(pairwise(expected))
    assert len(windows) == len(expected) - 1
    assert first_instant(date.fromisoformat(first), zone) == expected[0]
    assert local_date(expected[0], zone) == date.fromisoformat(first)


@pytest.mark.parametrize(("zone", "first", "bounds"), DAY_STARTS)
def test_tables_agree_with_the_oracle(zone: str, first: str, bounds: list[str]) -> None:
    """The oracle itself finds the published starts, so that it can be trusted elsewhere."""
    assert oracle_first(zone, date.fromisoformat(first)) == at(bounds[0])


def test_apia_has_no_thirtieth() -> None:
    """The skipped date is no window: it counts in no length, has no index, and its neighbours touch."""
    windows = day_windows("Pacific/Apia", "2011-12-28", "2012-01-02")
    starts = [at(f"2011-12-{day}T10:00") for day in (28, 29, 30, 31)]
    assert len(windows) == 4
    assert [start for start, _ in windows.slice(0, 99)] == starts
    assert windows.slice(2, 1) == ((starts[2], starts[3]),)
    assert [windows.index_of(start) for start in starts] == [0, 1, 2, 3]
    assert windows.index_of(starts[2] - TICK) == 1
    assert first_instant(date(2011, 12, 30), "Pacific/Apia") == first_instant(date(2011, 12, 31), "Pacific/Apia")
    assert local_date(starts[2], "Pacific/Apia") == date(2011, 12, 31)


@pytest.mark.parametrize(("zone", "skipped"), SKIPPED.items())
def test_skipped_dates_are_left_out(zone: str, skipped: date) -> None:
    """Each known skipped date is missing from its zone: the days around it number one less than the dates."""
    windows = day_windows(zone, str(skipped - 5 * ONE_DAY), str(skipped + 5 * ONE_DAY))
    assert len(windows) == 9
    assert [bound for bound, _ in windows.slice(0, 99)] + [windows.end] == oracle_bounds(
        zone, skipped - 5 * ONE_DAY, skipped + 5 * ONE_DAY
    )


def test_no_other_date_is_skipped() -> None:
    """Over all zones and 8,000 years the number of windows is the number of dates, less the known skipped ones."""
    dates = (date(9000, 1, 1) - date(1000, 1, 1)).days
    short = {name for name in ZONES if len(day_windows(name, "1000-01-01", "9000-01-01")) != dates}
    same = {name for name in ZONES for known in SKIPPED if _same_data(name, known)}
    assert short == same
    assert {len(day_windows(name, "1000-01-01", "9000-01-01")) for name in short} == {dates - 1}


def _same_data(name: str, other: str) -> bool:
    files = [resources.files("tzdata.zoneinfo").joinpath(*each.split("/")) for each in (name, other)]
    return files[0].read_bytes() == files[1].read_bytes()


def test_a_jump_of_a_day_is_found_only_where_listed() -> None:
    """Yearly samples of the offset, without the code under test, show a jump of a day in the listed zones alone."""
    samples = [datetime(year, 6, 15, tzinfo=UTC) for year in range(1800, 2060)]

    def jumps(name: str) -> bool:
        offsets = [sample.astimezone(oracle_zone(name)).utcoffset() or timedelta(0) for sample in samples]
        return any(after - before >= timedelta(hours=23) for before, after in pairwise(offsets))

    assert {name for name in ZONES if jumps(name)} == {n for n in ZONES for known in SKIPPED if _same_data(n, known)}


def test_a_repeated_date_is_one_long_window() -> None:
    """Where the date line moved over Alaska in 1867 a date came twice: windows still partition time."""
    windows = day_windows("America/Sitka", "1867-10-15", "1867-10-25")
    bounds = oracle_bounds("America/Sitka", date(1867, 10, 15), date(1867, 10, 25))
    assert windows.slice(0, 99) == tuple(pairwise(bounds))
    assert max(end - start for start, end in windows.slice(0, 99)) > timedelta(hours=40)
    for index, (start, end) in enumerate(windows.slice(0, 99)):
        probes = [start + (end - start) * part / 16 for part in range(16)]
        assert {windows.index_of(probe) for probe in probes} == {index}


def test_hours_are_hours_of_utc() -> None:
    """HOUR windows are whole UTC hours, counted, sliced and found without a walk."""
    windows = Windows.of(HOUR, at("2024-03-10T05:00"), at("2024-03-11T04:00"), None)
    assert len(windows) == 23
    assert list(windows.slice(21, 5)) == [
        (at("2024-03-11T02:00"), at("2024-03-11T03:00")),
        (at("2024-03-11T03:00"), at("2024-03-11T04:00")),
    ]
    assert windows.index_of(at("2024-03-10T07:00") - TICK) == 1
    assert windows.index_of(at("2024-03-10T07:00")) == 2


def test_none_is_one_window_of_any_instants() -> None:
    """NONE takes any instants, to the microsecond, and gives them back as the one window."""
    start, end = at("2024-03-10T05:00:00.000001"), at("2024-03-10T05:00:00.000002")
    windows = Windows.of(NONE, start, end, None)
    assert (len(windows), windows.slice(0, 5), windows.slice(1, 5)) == (1, ((start, end),), ())
    assert windows.index_of(start) == 0
    assert Windows.of(NONE, start, end, "Asia/Tokyo").zone == "Asia/Tokyo"


@pytest.mark.parametrize("size", WindowSize)
@pytest.mark.parametrize(
    ("start", "end"),
    [("0001-01-02", "0001-01-04"), ("9999-12-28", "9999-12-30"), ("0001-01-02", "9999-12-30")],
)
def test_far_past_and_future(size: WindowSize, start: str, end: str) -> None:
    """The ends of the calendar work like any other time, in all sizes, and nothing overflows."""
    windows = Windows.of(size, at(start), at(end), None)
    first, last = windows.slice(0, 1)[0], windows.slice(len(windows) - 1, 5)[-1]
    assert (first[0], last[1]) == (at(start), at(end))
    assert windows.index_of(at(end) - TICK) == len(windows) - 1
    assert windows.slice(len(windows), 1) == ()


@pytest.mark.parametrize(
    "zone", ["Pacific/Kiritimati", "Asia/Manila", "America/Juneau", "Etc/GMT+12", "Asia/Kathmandu"]
)
@pytest.mark.parametrize("size", [DAY, NONE])
def test_no_instant_overflows(zone: str, size: WindowSize) -> None:
    """Bounds at the ends of what a datetime holds are refused or accepted, never an OverflowError."""
    edges = [datetime.min.replace(tzinfo=UTC), EARLIEST, LATEST, datetime.max.replace(tzinfo=UTC)]
    for edge in edges:
        for step in (-TICK, timedelta(0), TICK, CELL):
            if timedelta(0) <= edge - edges[0] + step <= edges[-1] - edges[0]:
                for start, end in ((edge + step, at("2024-01-01")), (at("2024-01-01"), edge + step)):
                    try:
                        Windows.of(size, start, end, zone)
                    except WindowFaults as refused:
                        assert all(each.message for each in refused.faults)  # noqa: PT017


def test_bounds_out_of_range_are_refused() -> None:
    """A bound before 0001-01-02 or after 9999-12-30 is a fault of that bound, and both are told at once."""
    faults = faults_of(NONE, EARLIEST - TICK, LATEST + TICK)
    assert kinds(faults) == [("starting_on", "out_of_range"), ("ending_before", "out_of_range")]
    assert len(Windows.of(NONE, EARLIEST, LATEST, None)) == 1


def test_messages_name_only_bounds_in_range() -> None:
    """At the ends of the calendar the nearest bound named is one that would be accepted."""
    low = faults_of(DAY, EARLIEST, at("2024-01-01"), "Etc/GMT+12")[0]
    assert low.message.endswith("the nearest that would do: 0001-01-02T12:00:00Z.")
    high = faults_of(HOUR, at("2024-01-01"), LATEST)[0]
    assert high.message.endswith("the nearest that would do: 9999-12-30T23:00:00Z.")


MISALIGNED = [
    (HOUR, None, "2024-01-01T05:00:00.000001", "2024-01-01T05:00:00Z and 2024-01-01T06:00:00Z"),
    (HOUR, None, "1969-12-31T23:30", "1969-12-31T23:00:00Z and 1970-01-01T00:00:00Z"),
    (DAY, None, "2024-01-01T05:00", "2024-01-01T00:00:00Z and 2024-01-02T00:00:00Z"),
    (DAY, "America/New_York", "2024-03-10", "2024-03-09T05:00:00Z and 2024-03-10T05:00:00Z"),
    (DAY, "America/New_York", "2024-03-11T05:00", "2024-03-11T04:00:00Z and 2024-03-12T04:00:00Z"),
    (DAY, "America/Havana", "2013-11-03T05:00", "2013-11-03T04:00:00Z and 2013-11-04T05:00:00Z"),
    (DAY, "America/St_Johns", "2006-10-29T03:30", "2006-10-29T02:30:00Z and 2006-10-30T03:30:00Z"),
    (DAY, "Pacific/Apia", "2011-12-30T09:59:59.999999", "2011-12-29T10:00:00Z and 2011-12-30T10:00:00Z"),
    (DAY, "Africa/Monrovia", "1971-12-31T00:44", "1971-12-30T00:44:30Z and 1971-12-31T00:44:30Z"),
]


@pytest.mark.parametrize(("size", "zone", "bound", "nearest"), MISALIGNED)
def test_misaligned_bounds_name_the_nearest(size: WindowSize, zone: str | None, bound: str, nearest: str) -> None:
    """A bound inside a window is refused, on either side, and the message names valid bounds below and above."""
    for field, start, end in (
        ("starting_on", at(bound), at("2030-01-01")),
        ("ending_before", at("1000-01-01"), at(bound)),
    ):
        fault = next(each for each in faults_of(size, start, end, zone) if each.field == field)
        assert fault.kind is FaultKind.MISALIGNED
        assert fault.message.endswith(f"the nearest that would do: {nearest}.")
        assert fault.message.startswith(field)


def test_all_faults_are_told_at_once() -> None:
    """Zone, alignment and order are judged together, and the exception's text holds every message."""
    later, earlier = at("2024-01-01T00:30"), at("2023-01-01T00:30")
    expected = [("starting_on", "misaligned"), ("ending_before", "misaligned"), ("ending_before", "range")]
    assert kinds(faults_of(HOUR, later, earlier)) == expected
    assert kinds(faults_of(HOUR, later, earlier, "UTC")) == [("time_zone", "zone"), *expected]
    assert kinds(faults_of(DAY, later, earlier, "Mars/X")) == [("time_zone", "zone"), ("ending_before", "range")]
    with pytest.raises(WindowFaults) as refused:
        Windows.of(DAY, later, earlier, None)
    assert str(refused.value) == " ".join(str(fault) for fault in refused.value.faults)


@pytest.mark.parametrize("size", WindowSize)
def test_an_empty_or_backward_range_is_refused(size: WindowSize) -> None:
    """`ending_before` must be later than `starting_on`; equal is refused too."""
    for end in ("2024-01-02", "2024-01-01"):
        assert kinds(faults_of(size, at("2024-01-02"), at(end))) == [("ending_before", "range")]


@pytest.mark.parametrize(
    "name",
    ["", " ", "Mars/X", "../etc/passwd", "/etc/localtime", "localtime", "posixrules", "zones", "America", "utc",
     "america/new_york", "America/New_York ", "America/New_York\0", "America/New_York\nUTC", "America//New_York",
     "./UTC", "EST5EDT4", "__init__.py", "x" * 100_000, "\u00dcTC", "UTC/../UTC"],
    ids=lambda name: ascii(name[:20]),
)  # fmt: skip
def test_unknown_zones_are_refused(name: str) -> None:
    """Only names that tzdata lists are zones, exactly as it spells them, and the message stays short and printable."""
    for size in (DAY, NONE):
        (fault,) = faults_of(size, at("2024-01-01"), at("2024-01-02"), name)
        assert (fault.field, fault.kind) == ("time_zone", FaultKind.ZONE)
        assert len(fault.message) < 250
        assert fault.message.isprintable()
    with pytest.raises(WindowFault):
        first_instant(date(2024, 1, 1), name)


def test_hours_take_no_zone() -> None:
    """HOUR with a time zone, even UTC or an unknown one, is refused with that one fault."""
    for zone in ("UTC", "Asia/Kolkata", "", "Mars/X"):
        (fault,) = faults_of(HOUR, at("2024-01-01"), at("2024-01-02"), zone)
        assert (fault.field, fault.kind) == ("time_zone", FaultKind.ZONE)


def test_zone_data_is_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Zone files of the host are never read: a false one there changes nothing, even for a zone not yet loaded."""
    host = tmp_path_factory.mktemp("zoneinfo")
    (host / "Antarctica").mkdir()
    false = resources.files("tzdata.zoneinfo").joinpath("Asia", "Kathmandu").read_bytes()
    (host / "Antarctica" / "Troll").write_bytes(false)
    before = zoneinfo.TZPATH
    try:
        zoneinfo.reset_tzpath([host])
        ZoneInfo.clear_cache()
        monkeypatch.setenv("TZ", "Asia/Kathmandu")
        assert first_instant(date(2024, 1, 1), "Antarctica/Troll") == at("2024-01-01")
    finally:
        zoneinfo.reset_tzpath(before)
        ZoneInfo.clear_cache()


def test_naive_and_foreign_datetimes_are_programming_errors() -> None:
    """Datetimes that are not aware UTC raise a ValueError that is no user's fault; an equal UTC tzinfo is accepted."""
    good, naive = at("2024-01-01"), datetime(2024, 1, 1)  # noqa: DTZ001 - naive is the point
    windows = Windows.of(DAY, good, good + ONE_DAY, None)
    foreign = good.astimezone(timezone(CELL))
    for bad in (naive, foreign):
        for call in (
            lambda bad=bad: Windows.of(DAY, bad, good + ONE_DAY, None),
            lambda bad=bad: Windows.of(DAY, good - ONE_DAY, bad, None),
            lambda bad=bad: windows.index_of(bad),
            lambda bad=bad: cell_floor(bad),
            lambda bad=bad: cell_ceil(bad),
            lambda bad=bad: local_date(bad),
        ):
            with pytest.raises(ValueError, match="not an aware UTC") as refused:
                call()
            assert not isinstance(refused.value, WindowFault | WindowFaults)
    other = Windows.of(DAY, good.replace(tzinfo=ZoneInfo("Etc/UTC")), good + ONE_DAY, None)
    assert other == windows
    assert other.start.tzinfo is UTC


def test_bad_indexes_and_instants_are_programming_errors() -> None:
    """A negative index or count, an instant outside the range, or a date that no datetime can hold raise ValueError."""
    windows = Windows.of(DAY, at("2024-01-01"), at("2024-01-03"), None)
    for index, count in ((-1, 1), (0, -1)):
        with pytest.raises(ValueError, match="negative"):
            windows.slice(index, count)
    for instant in (windows.start - TICK, windows.end):
        with pytest.raises(ValueError, match="outside"):
            windows.index_of(instant)
    for day in (date.min, date.max):
        with pytest.raises(ValueError, match="outside"):
            first_instant(day)
    for edge in (EARLIEST - TICK, LATEST + TICK):
        with pytest.raises(ValueError, match="outside"):
            local_date(edge)
    assert windows.slice(0, 0) == windows.slice(2, 5) == windows.slice(10**30, 10**30) == ()
    assert len(windows.slice(0, 10**30)) == 2


def test_cells() -> None:
    """Cells start at whole UTC hours, before 1970 too; a start is its own floor and ceiling."""
    for text, floor, ceil in (
        ("2024-01-01T05:00", "2024-01-01T05:00", "2024-01-01T05:00"),
        ("2024-01-01T05:00:00.000001", "2024-01-01T05:00", "2024-01-01T06:00"),
        ("1969-12-31T23:59:59.999999", "1969-12-31T23:00", "1970-01-01T00:00"),
        ("0001-01-01T00:00:01", "0001-01-01T00:00", "0001-01-01T01:00"),
    ):
        assert (cell_floor(at(text)), cell_ceil(at(text))) == (at(floor), at(ceil))
    assert cell_floor(datetime.max.replace(tzinfo=UTC)) == at("9999-12-31T23:00")
    with pytest.raises(ValueError, match="no cell starts after"):
        cell_ceil(datetime.max.replace(tzinfo=UTC))


def test_cost_does_not_depend_on_the_index() -> None:
    """Length, lookup and slices at the far end of millennia take no walk (limits are some 20 times what they need)."""
    huge = day_windows("America/New_York", "0900-01-01", "9900-01-01")
    hours = Windows.of(HOUR, EARLIEST, at("9999-12-30"), None)
    for call, limit in (
        (lambda: [len(huge) for _ in range(100)], 0.01),
        (lambda: Windows.of(DAY, huge.start, huge.end, huge.zone), 0.01),
        (lambda: huge.slice(len(huge) - 366, 366), 0.1),
        (lambda: huge.index_of(huge.end - SECOND), 0.01),
        (lambda: hours.slice(len(hours) - 10_000, 10_000), 0.2),
    ):
        assert min(_seconds_of(call) for _ in range(5)) < limit


def _seconds_of(call: object) -> float:
    assert callable(call)
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


# Most clock changes lie where these dates do; the rest of the calendar is drawn too.
DATES = st.dates(date(1840, 1, 1), date(2045, 1, 1)) | st.dates(date(1, 1, 10), date(9999, 12, 1))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ZONES), DATES, st.integers(1, 6), st.data())
def test_days_agree_with_the_oracle(zone: str, first: date, days: int, data: st.DataObject) -> None:
    """In any zone at any time, slices are the oracle's days: a partition that length, slices and lookups agree on."""
    last = first + timedelta(days=days)
    bounds = oracle_bounds(zone, first, last)
    if len(bounds) < 2:  # all of the range was skipped
        return
    windows = Windows.of(DAY, bounds[0], bounds[-1], zone)
    full = windows.slice(0, 10**9)
    assert list(full) == list(pairwise(bounds))
    assert len(windows) == len(full)
    index, count = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 8))
    assert windows.slice(index, count) == full[index : index + count]
    instant = data.draw(st.datetimes(*(b.replace(tzinfo=None) for b in (bounds[0], bounds[-1] - TICK)))).replace(
        tzinfo=UTC
    )
    assert windows.index_of(instant) == bisect_right(bounds, instant) - 1


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ZONES), DATES, st.integers(1, 800), st.data())
@example("Pacific/Apia", date(2011, 1, 1), 800, None)
@example("Asia/Manila", date(1844, 1, 1), 800, None)
@example("America/Juneau", date(1867, 1, 1), 800, None)
def test_slices_partition_a_long_range(zone: str, first: date, days: int, data: st.DataObject | None) -> None:
    """Slices of any length, put together, cover the range with no gap and no empty window; lookups invert them."""
    start = first_instant(first, zone)
    end = first_instant(min(first + timedelta(days=days), date(9999, 12, 29)), zone) if first.year < 9990 else None
    if end is None or end <= start:
        return
    windows = Windows.of(DAY, start, end, zone)
    step = data.draw(st.integers(1, 300)) if data else 7
    slices = [windows.slice(index, step) for index in range(0, len(windows), step)]
    joined = [window for part in slices for window in part]
    assert tuple(joined) == windows.slice(0, len(windows))
    assert len(joined) == len(windows)
    assert (joined[0][0], joined[-1][1]) == (start, end)
    assert all(before[1] == after[0] for before, after in pairwise(joined))
    assert all(begin < finish for begin, finish in joined)
    for index, (begin, finish) in enumerate(joined):
        assert windows.index_of(begin) == windows.index_of(finish - TICK) == index


@settings(max_examples=100, deadline=None)
@given(st.datetimes(EARLIEST.replace(tzinfo=None), LATEST.replace(tzinfo=None)), st.integers(1, 500), st.data())
def test_hours_agree_with_arithmetic(instant: datetime, hours: int, data: st.DataObject) -> None:
    """HOUR windows are a partition into whole hours, and slices and lookups agree on it."""
    start = cell_floor(instant.replace(tzinfo=UTC))
    end = min(start + hours * CELL, cell_floor(LATEST))
    if start >= end:
        return
    windows = Windows.of(HOUR, start, end, None)
    full = windows.slice(0, 10**9)
    assert [begin for begin, _ in full] == [start + i * CELL for i in range(len(windows))]
    assert all(finish - begin == CELL for begin, finish in full)
    assert full[-1][1] == end
    index, count = data.draw(st.integers(0, 500)), data.draw(st.integers(0, 500))
    assert windows.slice(index, count) == full[index : index + count]
    assert all(
        windows.index_of(begin) == windows.index_of(finish - TICK) == i for i, (begin, finish) in enumerate(full)
    )


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ZONES), st.datetimes(datetime(1840, 1, 1), datetime(2045, 1, 1)))  # noqa: DTZ001 - hypothesis takes naive ones
def test_nearest_bounds_are_valid(zone: str, moment: datetime) -> None:
    """The bounds a message names are the start and end of the very window that holds the refused bound."""
    instant = moment.replace(tzinfo=UTC)
    day = local_date(instant, zone)
    bounds = oracle_bounds(zone, day, day + 3 * ONE_DAY)
    below, above = bounds[:2]
    assert below <= instant < above
    if instant == below:
        return
    (fault,) = faults_of(DAY, instant, at("2050-01-01"), zone)[:1]
    named = " and ".join(bound.isoformat().replace("+00:00", "Z") for bound in (below, above))
    assert fault.message.endswith(f"the nearest that would do: {named}.")
    assert len(Windows.of(DAY, below, above, zone)) == 1
