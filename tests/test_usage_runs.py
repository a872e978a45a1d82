"""Claims about runs of windows: what fits on a page, and what they are on the wire, window by window."""

import uuid
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from metering.v1 import usage_pb2
from service.domain.metrics import Aggregation, BillableMetric
from service.domain.usage import WINDOW_BYTES, UsageRun, UsageWindow
from service.rpc.wire import timestamp
from service.rpc.wire.usage import WindowWriter
from service.store.usage import Page

START = datetime(2026, 1, 1, tzinfo=UTC)
METRIC = BillableMetric(uuid.UUID(int=7), "Größe", Aggregation.SUM, aggregation_key="q")
EMPTY = WINDOW_BYTES + 4 * len(METRIC.name)

instants = st.none() | st.integers(0, 10**15).map(lambda micros: START + timedelta(microseconds=micros))
filled = st.builds(
    UsageWindow,
    value=st.none() | st.sampled_from(["0", "-1.5", "9" * 38, "1" * 127, "1" * 128, "1" * 300]),
    groups=st.none() | st.dictionaries(st.sampled_from(["", "a", "ü"]), st.none() | st.just("2"), max_size=2),
    groups_truncated=st.booleans(),
    skipped=st.integers(0, 2) | st.just(1 << 40),
    updated_at=instants,
)


@st.composite
def runs(draw: st.DrawFn) -> UsageRun:
    """Runs of hours: with empty windows between those filled, or without."""
    number = draw(st.integers(1, 8))
    bounds = tuple((START + timedelta(hours=i), START + timedelta(hours=i + 1)) for i in range(number))
    windows = dict(sorted(draw(st.dictionaries(st.integers(0, number - 1), filled, max_size=number)).items()))
    sparse = bool(windows) and draw(st.booleans())
    positions = list(windows) if sparse else range(number)
    return UsageRun(uuid.UUID(int=9), METRIC, bounds, draw(st.integers(0, 5)), windows, positions)


def sizes(run: UsageRun) -> list[int]:
    """What each window of the run is taken to need."""
    return [EMPTY + (run.filled[one].size if one in run.filled else 0) for one in run.positions]


@given(run=runs(), count=st.integers(0, 9), size=st.integers(-10, 3_000))
def test_as_many_fit_as_their_sizes_add_up_to(run: UsageRun, count: int, size: int) -> None:
    """The most windows from the first on whose sizes stay within the bytes and whose number within the count."""
    expected = max(n for n in range(len(run) + 1) if n == 0 or (n <= count and sum(sizes(run)[:n]) <= size))
    assert run.fitting(count, size) == (expected, sum(sizes(run)[:expected]))


@given(some=st.lists(runs(), min_size=1, max_size=4), limit=st.integers(1, 20), bytes_max=st.integers(1, 3_000))
def test_a_page_holds_what_fits_and_one_at_least(some: list[UsageRun], limit: int, bytes_max: int) -> None:
    """A page takes windows until the next would be too many or too much; the first whatever its size, which counts."""
    page = Page(limit, bytes_max)
    taken = []
    for run in some:
        taken.append(page.add(run))
        if taken[-1] < len(run):
            break
    every = [size for run in some for size in sizes(run)]
    expected = 1
    while expected < min(limit, len(every)) and sum(every[: expected + 1]) <= bytes_max:
        expected += 1
    assert (sum(taken), page.taken, page.size) == (expected, expected, sum(every[:expected]))
    assert sum(map(len, page.runs)) == expected


@given(run=runs(), count=st.integers(0, 9))
def test_a_cut_run_is_the_beginning_of_the_whole(run: UsageRun, count: int) -> None:
    """A cut run has the same windows, sizes and indexes as the whole has at its beginning."""
    cut = run.cut(count)
    kept = min(count, len(run))
    assert [cut.index(i) for i in range(len(cut))] == [run.first + one for one in run.positions][:kept]
    assert sizes(cut) == sizes(run)[:kept]
    written = WindowWriter(START)
    assert (written.write(cut) if kept else []) == written.write(run)[:kept]


@given(run=runs(), count=st.integers(1, 9))
def test_parts_are_the_whole_run(run: UsageRun, count: int) -> None:
    """The parts of a run have at most so many windows each, and written one after the other they are the run."""
    parts = list(run.parts(count))
    assert all(0 < len(part) <= count for part in parts)
    written, whole = WindowWriter(START), WindowWriter(START)
    assert [row for part in parts for row in written.write(part)] == whole.write(run)


@given(run=runs(), hours=st.integers(-1, 9))
def test_windows_on_the_wire_are_the_messages_they_stand_for(run: UsageRun, hours: int) -> None:
    """Each window's bytes are read as exactly the message that its fields make, whatever the shortcut they took."""
    read_time = START + timedelta(hours=hours)
    for row, position in zip(WindowWriter(read_time).write(run), run.positions, strict=True):
        start, end = run.bounds[position]
        known = run.filled.get(position, UsageWindow())
        expected = usage_pb2.UsageWindow(
            customer_id=str(run.customer_id),
            billable_metric_id=str(METRIC.id),
            billable_metric_name=METRIC.name,
            starting_on=timestamp(start),
            ending_before=timestamp(end),
            value=known.value,
            groups_truncated=known.groups_truncated,
            incomplete=end > read_time,
            skipped_count=known.skipped,
            update_time=timestamp(known.updated_at),
        )
        for name, value in (known.groups or {}).items():
            expected.groups[name].CopyFrom(usage_pb2.GroupValue(value=value))
        assert list(usage_pb2.ListUsageResponse.FromString(row).windows) == [expected]
