"""Owns what is asked and answered about usage: the query, a window's value from its measures, and the limits."""

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from service.domain import quantities
from service.domain.customers import Customer
from service.domain.metrics import Aggregation, BillableMetric
from service.domain.windows import Windows, WindowSize, first_instant, local_date
from service.errors import FailedPrecondition, Reason, invalid
from service.limits import limit

# Queries that leave windows out may span any number: pages and messages are bounded whatever this is.
WINDOWS_MAX = limit(
    "WINDOWS_PER_QUERY",
    10_000_000,
    most=1_000_000_000,
    about="windows, or rows by group, of a usage query that leaves none out",
    field="window_size",
    error="INVALID_ARGUMENT, WINDOW_COUNT",
)
IDS_MAX = limit("IDS_PER_QUERY", 1_000, most=1_000, about="customers, or metrics, that one query names", field="ids")
GROUP_VALUES_MAX = limit(
    "GROUP_VALUES",
    200,
    most=200,
    about="values of group_by in a usage query, and values shown of each window if it names none",
    field="billable_metrics[0].group_by.values",
)
PAGE_SIZE_MAX = limit(
    "USAGE_PAGE_SIZE",
    10_000,
    most=10_000,
    about="windows of a page of usage; who asks for more gets as many",
    field="page_size",
    error="",
)
PAGE_SIZE_DEFAULT = limit(
    "USAGE_PAGE_SIZE_DEFAULT",
    min(1_000, PAGE_SIZE_MAX),
    most=PAGE_SIZE_MAX,
    about="windows of a page of usage if the call does not say",
    field="page_size",
    error="",
)
# A page is cut when its windows reach about this size on the wire.
PAGE_BYTES_MAX = 1024 * 1024
FILTER_VALUES_MAX = limit(
    "GROUP_FILTER_VALUES", 200, most=200, about="values of all filters of a grouped query", field="group_filters"
)
# Each combination can be a row of every window.
COMBINATIONS_MAX = limit(
    "GROUP_FILTER_COMBINATIONS",
    10_000,
    most=10_000,
    about="combinations of values that the filters of a grouped query name",
    field="group_filters",
)


class GroupBy(NamedTuple):
    """Split by one property; no values = the first GROUP_VALUES_MAX in byte order."""

    key: str
    values: tuple[str, ...] = ()


class MetricSelector(NamedTuple):
    """A metric to list, by id."""

    id: uuid.UUID
    group_by: GroupBy | None = None


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What ListUsage asks. None = all (of the kind that "all" means); given ids are in the request's order.

    With `updated_since` only windows whose stored usage changed from then on are wanted.
    """

    windows: Windows
    customers: tuple[uuid.UUID, ...] | None = None
    metrics: tuple[MetricSelector, ...] | None = None
    omit_empty: bool = False
    updated_since: datetime | None = None

    @property
    def sparse(self) -> bool:
        """Whether windows may be left out: those without usage, or without a change."""
        return self.omit_empty or self.updated_since is not None

    def after(self, customer_id: uuid.UUID, metric_id: uuid.UUID, window: int) -> "Position | None":
        """Return the position after a window of a pair, by its index; None after the last possible one."""
        if window + 1 < len(self.windows):
            return Position(customer_id, metric_id, window + 1)
        return Position.after_pair(customer_id, metric_id)


class Position(NamedTuple):
    """Where a page begins: the first pair, and the index of its first window."""

    customer_id: uuid.UUID
    metric_id: uuid.UUID
    window: int

    @classmethod
    def after_pair(cls, customer_id: uuid.UUID, metric_id: uuid.UUID) -> "Position | None":
        """Return the position after every window of a pair; None after the last possible one."""
        if metric_id.int + 1 < 1 << 128:
            return cls(customer_id, uuid.UUID(int=metric_id.int + 1), 0)
        if customer_id.int + 1 < 1 << 128:
            return cls(uuid.UUID(int=customer_id.int + 1), uuid.UUID(int=0), 0)
        return None


@dataclass(frozen=True, slots=True)
class GroupedQuery:
    """What ListUsageWithGroups asks. `windows` None = those of the billing period that holds the present.

    `filters` holds the values wanted of some of the properties in `group_key`, each sorted by bytes.
    """

    customer_id: uuid.UUID
    metric_id: uuid.UUID
    size: WindowSize
    time_zone: str | None
    windows: Windows | None
    group_key: tuple[str, ...] = ()
    filters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    omit_empty: bool = False
    updated_since: datetime | None = None

    @property
    def sparse(self) -> bool:
        """Whether rows may be left out: those without usage, or without a change."""
        return self.omit_empty or self.updated_since is not None

    @property
    def row_bytes(self) -> int:
        """Roughly how many bytes a row takes on the wire beside the values of its group."""
        return 64 + sum(8 + len(name.encode()) for name in self.group_key)

    @property
    def combinations(self) -> int:
        """How many combinations of values the filters name; 1 without filters."""
        return math.prod(len(values) for values in self.filters.values())


Group = tuple[str | None, ...]
"""Values of the properties of a group key, in its order; None = the events lack the property."""


class GroupedPosition(NamedTuple):
    """Where a page of grouped rows begins: after a group of a window, or with the window's first (`group` None)."""

    window: int
    group: Group | None = None


class Measures(NamedTuple):
    """What the cells of one window add up to. `counted` of a UNIQUE metric is the number of different values.

    `quantity` is the sum (of AVG too), the least, the greatest or the latest value, exact, as `quantities.plain` prints
    it; None for COUNT and UNIQUE.
    """

    counted: int
    skipped: int
    quantity: str | None
    updated_at: datetime | None


# Roughly those of an empty one on the wire, without the metric's name.
WINDOW_BYTES = 140


class UsageWindow(NamedTuple):
    """What is known of the usage of one customer by one metric in a window. `value` None = no usage.

    `groups` is None unless the metric was grouped.
    """

    value: str | None = None
    groups: Mapping[str, str | None] | None = None
    groups_truncated: bool = False
    skipped: int = 0
    updated_at: datetime | None = None

    @property
    def size(self) -> int:
        """Roughly how many bytes this takes on the wire, beyond an empty window."""
        size = len(self.value or "")
        if self.groups:
            size += sum(12 + 4 * len(key) + len(value or "") for key, value in self.groups.items())
        return size


@dataclass(frozen=True, slots=True)
class UsageRun:
    """Some windows of one customer and metric, in order: those at `positions` in `bounds`.

    What is not in `filled` (by position) is empty. Of a long range most windows are, so an empty one must cost nearly
    nothing. Positions are all from 0 on, or exactly those filled. `first` is the index of `bounds[0]` among the windows
    of the query.
    """

    customer_id: uuid.UUID
    metric: BillableMetric
    bounds: Sequence[tuple[datetime, datetime]]
    first: int
    filled: Mapping[int, UsageWindow]
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def index(self, i: int) -> int:
        """Return the index of the i-th window of the run among those of the query."""
        return self.first + self.positions[i]

    def fitting(self, count: int, size: int) -> tuple[int, int]:
        """Return how many windows, from the first on, are at most `count` and about `size` bytes, and their bytes."""
        empty = WINDOW_BYTES + 4 * len(self.metric.name)
        most, more = max(0, min(count, len(self))), 0
        filled = enumerate(self.filled.values()) if len(self.filled) == len(self) else self.filled.items()
        for i, window in filled:
            if i >= most:
                break
            if (i + 1) * empty + more + window.size > size:
                most = i
                break
            more += window.size
        most = max(0, min(most, (size - more) // empty))
        return most, most * empty + more

    def parts(self, count: int) -> Iterator["UsageRun"]:
        """Yield the run in parts of at most so many windows."""
        if len(self) <= count:
            yield self
            return
        for start in range(0, len(self), count):
            positions = self.positions[start : start + count]
            filled = {position: self.filled[position] for position in positions if position in self.filled}
            yield replace(self, positions=positions, filled=filled)

    def cut(self, count: int) -> "UsageRun":
        """Return the run with its first windows only."""
        positions = self.positions[:count]
        last = positions[-1] if positions else -1
        filled = {position: window for position, window in self.filled.items() if position <= last}
        return replace(self, positions=positions, filled=filled)


@dataclass(frozen=True, slots=True)
class GroupedWindow:
    """The usage of one group in `[start, end)`; `group` is in the order of the query's group key.

    Of a row without usage only the values named in the query's filters are set.
    """

    start: datetime
    end: datetime
    group: Group
    value: str | None = None
    skipped: int = 0
    updated_at: datetime | None = None


class GroupedPage(NamedTuple):
    """Rows in the order of (start, group), the windows they were cut from, and where the next page begins.

    `following` None = the end.
    """

    rows: Sequence[GroupedWindow]
    windows: Windows
    following: GroupedPosition | None


class UsagePage(NamedTuple):
    """Windows in the order of (customer id, metric id, start), and where the next page begins; None = the end."""

    runs: Sequence[UsageRun]
    following: Position | None


def value(aggregation: Aggregation, measures: Measures) -> str | None:
    """Return the aggregate as a plain decimal; None when nothing was counted."""
    if not measures.counted:
        return None
    if aggregation in _COUNTING:
        return str(measures.counted)
    if aggregation is Aggregation.AVG and measures.quantity is not None:
        return quantities.plain(quantities.average(Decimal(measures.quantity), measures.counted))
    return measures.quantity


_COUNTING = {Aggregation.COUNT, Aggregation.UNIQUE}


def changed_at(metric: BillableMetric, updated_at: datetime | None) -> datetime | None:
    """Return when usage last changed of which the cells did at `updated_at`; None if there never was any.

    What the backfill of a metric counted could not be read before its end, and so changed then.
    """
    if updated_at is None or metric.backfilled_at is None:
        return updated_at
    return max(updated_at, metric.backfilled_at)


def check_groups(selectors: Sequence[MetricSelector], metrics: Sequence[BillableMetric]) -> None:
    """Check that every group key is a declared simple key of its metric; raises InvalidArgument."""
    for i, (selector, metric) in enumerate(zip(selectors, metrics, strict=True)):
        declared = sorted(key[0] for key in metric.group_keys if len(key) == 1)
        if selector.group_by is not None and selector.group_by.key not in declared:
            known = f"it has {', '.join(declared)}" if declared else "it has none"
            message = f"{selector.group_by.key!r} is not a simple group key of the metric; {known}"
            raise invalid(f"billable_metrics[{i}].group_by.key", Reason.GROUP_KEY_NOT_DECLARED, message)


def check_group_key(query: GroupedQuery, metric: BillableMetric) -> None:
    """Check that the group key is one that the metric declares, in any order; raises InvalidArgument."""
    if query.group_key and frozenset(query.group_key) not in {frozenset(key) for key in metric.group_keys}:
        declared = "; ".join(sorted(", ".join(key) for key in metric.group_keys))
        known = f"it declares {declared}" if declared else "it declares none"
        message = f"{', '.join(query.group_key)!r} is not a group key of the metric; {known}"
        raise invalid("group_key", Reason.GROUP_KEY_NOT_DECLARED, message)


def current_windows(query: GroupedQuery, customer: Customer, now: datetime) -> Windows:
    """Return the windows of the customer's billing period that holds `now`.

    Its dates are midnights of the query's time zone. Raises FailedPrecondition if there is no such period.
    """
    zone = query.time_zone or "UTC"
    period = customer.billing_period.holding(local_date(now, zone)) if customer.billing_period else None
    if period is None:
        what = "no billing period" if customer.billing_period is None else "no billing period that holds the present"
        raise FailedPrecondition(
            Reason.NO_BILLING_PERIOD,
            f"Customer {customer.id} has {what}: give starting_on and ending_before, or set one (SetBillingPeriod).",
            metadata={"id": str(customer.id)},
        )
    start, end = (first_instant(day, zone) for day in period)
    return Windows.of(query.size, start, end, query.time_zone)


def check_row_count(query: GroupedQuery, windows: Windows) -> None:
    """Refuse a grouped query that must give more rows than are allowed unless it leaves some out."""
    number = len(windows) * query.combinations
    if number > WINDOWS_MAX and not query.sparse:
        message = (
            f"{len(windows):,} windows of {query.combinations:,} combinations of values are {number:,} rows; at most "
            f"{WINDOWS_MAX:,} are allowed: narrow the range or the filters, or set omit_empty_windows or updated_since"
        )
        raise invalid("window_size", Reason.WINDOW_COUNT, message)


def check_window_count(query: UsageQuery, customers: int, metrics: int) -> None:
    """Refuse a query that could give more windows than are allowed unless it leaves some out."""
    number = len(query.windows) * customers * metrics
    if number > WINDOWS_MAX and not query.sparse:
        message = (
            f"{len(query.windows):,} windows for {customers:,} customers and {metrics:,} metrics are {number:,}; "
            f"at most {WINDOWS_MAX:,} are allowed: narrow the range or the ids, or set omit_empty_windows or "
            "updated_since"
        )
        raise invalid("window_size", Reason.WINDOW_COUNT, message)
