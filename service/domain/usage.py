"""Owns what is asked and answered about usage: the query, a window's value from its measures, and the limits."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from service.domain import quantities
from service.domain.metrics import Aggregation, BillableMetric
from service.domain.windows import Windows
from service.errors import Reason, invalid

WINDOWS_MAX = 10_000_000
IDS_MAX = 1_000
GROUP_VALUES_MAX = 200
PAGE_SIZE_DEFAULT = 1_000
PAGE_SIZE_MAX = 10_000
# A page is cut when its windows reach about this size on the wire.
PAGE_BYTES_MAX = 1024 * 1024


class GroupBy(NamedTuple):
    """Split by one property; no values = the first 200 in byte order."""

    key: str
    values: tuple[str, ...] = ()


class MetricSelector(NamedTuple):
    """A metric to list, by id."""

    id: uuid.UUID
    group_by: GroupBy | None = None


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What ListUsage asks. None = all (of the kind that "all" means); given ids are in the request's order."""

    windows: Windows
    customers: tuple[uuid.UUID, ...] | None = None
    metrics: tuple[MetricSelector, ...] | None = None
    omit_empty: bool = False


class Position(NamedTuple):
    """Where a page begins: the first pair, and the index of its first window."""

    customer_id: uuid.UUID
    metric_id: uuid.UUID
    window: int


class Measures(NamedTuple):
    """What the cells of one window add up to. `counted` of a UNIQUE metric is the number of different values."""

    counted: int
    skipped: int
    sum: Decimal | None
    min: Decimal | None
    max: Decimal | None
    latest_value: Decimal | None
    updated_at: datetime | None


@dataclass(frozen=True, slots=True)
class UsageWindow:
    """The usage of one customer by one metric in `[start, end)`. `value` None = no usage.

    `groups` is None unless the metric was grouped.
    """

    customer_id: uuid.UUID
    metric: BillableMetric
    start: datetime
    end: datetime
    value: str | None = None
    groups: Mapping[str, str | None] | None = None
    groups_truncated: bool = False
    skipped: int = 0
    updated_at: datetime | None = None

    @property
    def size(self) -> int:
        """Roughly how many bytes the window takes on the wire."""
        size = 140 + 4 * len(self.metric.name) + len(self.value or "")
        if self.groups:
            size += sum(12 + 4 * len(key) + len(value or "") for key, value in self.groups.items())
        return size


class UsagePage(NamedTuple):
    """Windows in the order of (customer id, metric id, start), and where the next page begins; None = the end."""

    windows: Sequence[UsageWindow]
    following: Position | None


def value(aggregation: Aggregation, measures: Measures) -> str | None:
    """Return the aggregate as a plain decimal; None when nothing was counted."""
    if not measures.counted:
        return None
    number: Decimal | None
    match aggregation:
        case Aggregation.COUNT | Aggregation.UNIQUE:
            return str(measures.counted)
        case Aggregation.SUM:
            number = measures.sum
        case Aggregation.AVG:
            number = None if measures.sum is None else quantities.average(measures.sum, measures.counted)
        case Aggregation.MIN:
            number = measures.min
        case Aggregation.MAX:
            number = measures.max
        case Aggregation.LATEST:
            number = measures.latest_value
    return None if number is None else quantities.plain(number)


def check_groups(selectors: Sequence[MetricSelector], metrics: Sequence[BillableMetric]) -> None:
    """Check that every group key is a declared simple key of its metric; raises InvalidArgument."""
    for i, (selector, metric) in enumerate(zip(selectors, metrics, strict=True)):
        declared = sorted(key[0] for key in metric.group_keys if len(key) == 1)
        if selector.group_by is not None and selector.group_by.key not in declared:
            known = f"it has {', '.join(declared)}" if declared else "it has none"
            message = f"{selector.group_by.key!r} is not a simple group key of the metric; {known}"
            raise invalid(f"billable_metrics[{i}].group_by.key", Reason.GROUP_KEY_NOT_DECLARED, message)


def check_window_count(query: UsageQuery, customers: int, metrics: int) -> None:
    """Refuse a query that could give more than 10 million windows unless it omits empty ones."""
    number = len(query.windows) * customers * metrics
    if number > WINDOWS_MAX and not query.omit_empty:
        message = (
            f"{len(query.windows):,} windows for {customers:,} customers and {metrics:,} metrics are {number:,}; "
            f"at most {WINDOWS_MAX:,} are allowed: narrow the range or the ids, or set omit_empty_windows"
        )
        raise invalid("window_size", Reason.WINDOW_COUNT, message)
