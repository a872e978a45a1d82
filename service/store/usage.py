"""Answers usage queries page by page: which pairs of customer and metric, which windows, and how much at a time.

What is asked of Postgres for that is in `usage_sql`.
"""

import asyncio
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.metrics import Aggregation, BillableMetric
from service.domain.usage import (
    GROUP_VALUES_MAX,
    PAGE_BYTES_MAX,
    WINDOW_BYTES,
    GroupBy,
    Measures,
    Position,
    UsagePage,
    UsageQuery,
    UsageRun,
    UsageWindow,
    changed_at,
    check_groups,
    check_window_count,
    value,
)
from service.errors import FailedPrecondition, Reason
from service.store import customers as customer_store
from service.store import metrics as metric_store
from service.store import usage_sql
from service.store.usage_sql import Bounds, Pair

# How many windows one statement may work out, empty ones included; bounds its time and memory.
SLICE_MAX = 50_000
# A window with groups can hold 200 values of up to 16 KiB (a property may be an object), so very few fill a page.
GROUPED_SLICE_MAX = 16
# A client takes messages of 4 MiB, and a value can be an object of 16 KiB.
GROUPS_BYTES_MAX = 2 * 1024 * 1024
# A page is cut when it took this long, so that no call holds a connection for as long as its query is large.
PAGE_S = 2.0
PAIRS_MAX = 1_000
# How many candidates one statement looks at for pairs with usage, or with changes.
PAIRS_PROBED = 5_000
CHANGES_PROBED = 200

NOTHING = Measures(0, 0, None, None)


@dataclass(frozen=True, slots=True)
class Selected:
    """A metric of the query, as stored, with how to group it."""

    metric: BillableMetric
    group_by: GroupBy | None = None


async def usage_page(
    connection: AsyncConnection,
    organization: str,
    query: UsageQuery,
    begin: Position | None,
    limit: int,
    bytes_max: int = PAGE_BYTES_MAX,
) -> UsagePage:
    """Return up to `limit` windows (and about `bytes_max` bytes) of the query from `begin` on, in one snapshot.

    Raises NotFound for unknown ids, FailedPrecondition for a named metric that is still counting its past, and
    InvalidArgument for an undeclared group key or too many windows.
    """
    metrics = await _selected(connection, organization, query, first_page=begin is None)
    reader = _Reader(connection, organization, query, {one.metric.id: one for one in metrics})
    page = Page(limit, bytes_max)
    number = len(query.windows)
    least = WINDOW_BYTES + 4 * min((len(one.metric.name) for one in metrics), default=0)
    position = begin
    found = Pairs((), begin)
    pairs: Sequence[Pair] = ()
    clock = asyncio.get_running_loop().time
    late = clock() + PAGE_S
    while True:
        if not pairs:
            found = await reader.pairs(position)
            pairs = found.pairs
        if not pairs and found.following is None:
            return UsagePage(page.runs, None)
        if not pairs:
            position = found.following
        if page.is_nearly_full or (position != begin and clock() > late):
            return UsagePage(page.runs, position)
        if not pairs:
            continue
        first = position.window if position and pairs[0] == (position.customer_id, position.metric_id) else 0
        # What does not fit would be made for nothing.
        chunk, count = reader.slice(pairs, first, page.room(least))
        if query.sparse and count < number:
            # One pair, more windows than one statement takes: leap over those that are empty for certain.
            used = await reader.next_used(chunk[0], query.windows.slice(first, 1)[0][0])
            first = number if used is None else query.windows.index_of(used)
            count = min(count, number - first)
        for run in await reader.runs(chunk, query.windows.slice(first, count), first):
            if (fits := page.add(run)) < len(run):
                return UsagePage(page.runs, Position(run.customer_id, run.metric.id, run.index(fits)))
        if first + count < number:
            position = Position(*chunk[0], first + count)
        else:
            pairs = pairs[len(chunk) :]
            position = Position.after_pair(*chunk[-1]) if pairs else found.following
            if position is None:
                return UsagePage(page.runs, None)


async def watermark(connection: AsyncConnection) -> datetime:
    """Return an `updated_since` that misses nothing which a snapshot taken after this call does not show.

    Not in that snapshot's own transaction: what commits in between must be seen by one of the two.
    """
    found: datetime = (await connection.execute(usage_sql.watermark())).scalar_one()
    return found


async def _selected(
    connection: AsyncConnection, organization: str, query: UsageQuery, *, first_page: bool
) -> list[Selected]:
    """Check what a query names and return its metrics, or all that "all" means.

    What was small enough for a first page stays so: customers made since must not end a walk over its pages.
    """
    if query.customers is not None:
        missing = await customer_store.missing_customers(connection, organization, query.customers)
        if missing:
            raise customer_store.not_found(missing)
    if query.metrics is None:
        countable = await metric_store.countable_metrics(connection, organization, query.updated_since)
        selected = [Selected(metric) for metric in countable]
    else:
        found = await metric_store.get_metrics(connection, organization, [one.id for one in query.metrics])
        require_backfilled(found)
        check_groups(query.metrics, found)
        selected = [Selected(metric, one.group_by) for metric, one in zip(found, query.metrics, strict=True)]
    customers_number = len(query.customers or ())
    # Only a query over all customers needs them counted, and only if their number could matter.
    if first_page and query.customers is None and not query.sparse:
        customers_number = await customer_store.count_customers(connection, organization)
    if first_page:
        check_window_count(query, customers_number, len(selected))
    return selected


def require_backfilled(metrics: Sequence[BillableMetric]) -> None:
    """Raise FailedPrecondition if any of the metrics is still counting its past."""
    unfinished = [metric for metric in metrics if metric.backfilled_until is not None]
    if unfinished:
        named = ", ".join(str(metric.id) for metric in unfinished)
        progress = min(metric.backfill_progress or 0.0 for metric in unfinished)
        raise FailedPrecondition(
            Reason.METRIC_BACKFILLING,
            f"Billable metric {named} is still counting events of the past ({progress:.0%} done); ask again soon.",
            metadata={"ids": named, "progress": f"{progress:.2f}"},
            retry_after_s=1,
        )


class Page:
    """The windows of a page on its way: up to `limit`, and about `bytes_max` bytes, but one whatever its size."""

    def __init__(self, limit: int, bytes_max: int) -> None:
        self.runs: list[UsageRun] = []
        self.taken = 0
        self.size = 0
        self._limit = limit
        self._bytes_max = bytes_max

    @property
    def is_nearly_full(self) -> bool:
        """Whether a statement for what still fits would cost more than that does in the next page."""
        return self.taken >= self._limit or (self.taken > 0 and self.size >= self._bytes_max * 7 // 8)

    def room(self, size: int) -> int:
        """Return how many windows of at least this size could still be taken."""
        return min(self._limit - self.taken, (self._bytes_max - self.size) // size + 1)

    def add(self, run: UsageRun) -> int:
        """Take as many windows of a run as fit, from its first on; returns their number."""
        fits, size = run.fitting(self._limit - self.taken, self._bytes_max - self.size)
        if not fits and not self.taken:
            fits, size = run.fitting(1, sys.maxsize)
        if fits:
            self.runs.append(run if fits == len(run) else run.cut(fits))
            self.taken += fits
            self.size += size
        return fits


class Pairs(NamedTuple):
    """Pairs in order, and where to look for more; None = there are none."""

    pairs: Sequence[Pair]
    following: Position | None


@dataclass(frozen=True, slots=True)
class _Reader:
    """The parts of one query that every statement of a page needs."""

    connection: AsyncConnection
    organization: str
    query: UsageQuery
    metrics: dict[uuid.UUID, Selected]

    def slice(self, pairs: Sequence[Pair], first: int, wanted: int) -> tuple[Sequence[Pair], int]:
        """Decide how much one statement takes: whole pairs from their first window, or a part of one pair."""
        grouped = any(self.metrics[pair.metric_id].group_by for pair in pairs)
        most = GROUPED_SLICE_MAX if grouped else SLICE_MAX
        # Of windows that may turn out empty take more than are wanted, but not so many that most are thrown away.
        most = min(most, max(1_000, 10 * wanted) if self.query.sparse else wanted)
        number = len(self.query.windows)
        if first == 0 and number <= most:
            return pairs[: most // number], number
        return pairs[:1], min(most, number - first)

    async def pairs(self, begin: Position | None) -> Pairs:
        """Return the next pairs of the query from `begin` on, in order; those not named need usage in the range.

        Looks at a bounded number of candidates, so it may find few or none of many.
        """
        least = Pair(begin.customer_id, begin.metric_id) if begin else Pair(uuid.UUID(int=0), uuid.UUID(int=0))
        query = self.query
        if query.customers is not None and query.metrics is not None:
            metric_ids = sorted(self.metrics)
            found: list[Pair] = []
            for customer_id in sorted(one for one in query.customers if one >= least.customer_id):
                found += [pair for metric_id in metric_ids if (pair := Pair(customer_id, metric_id)) >= least]
                if len(found) > PAIRS_MAX:
                    break
            return Pairs(found[:PAIRS_MAX], Position.after_pair(*found[PAIRS_MAX - 1]) if found[PAIRS_MAX:] else None)
        if not self.metrics:
            return Pairs((), None)
        # With `updated_since` a candidate is not done with at its first cell: most have none that changed.
        number = max(1, (CHANGES_PROBED if query.updated_since else PAIRS_PROBED) // len(self.metrics))
        following = usage_sql.next_customers(least.customer_id, query.customers, query.updated_since, number)
        customer_ids = [row[0] for row in await self._rows(following)]
        if not customer_ids:
            return Pairs((), None)
        metrics = [one.metric for one in self.metrics.values()]
        span = (query.windows.start, query.windows.end)
        statement = await usage_sql.pairs_with_usage(metrics, span, customer_ids, least, PAIRS_MAX, query.updated_since)
        pairs = [Pair(row[0], row[1]) for row in await self._rows(statement)]
        if len(pairs) == PAIRS_MAX:
            return Pairs(pairs, Position.after_pair(*pairs[-1]))
        if len(customer_ids) < number:
            return Pairs(pairs, None)
        return Pairs(pairs, Position.after_pair(customer_ids[-1], uuid.UUID(int=(1 << 128) - 1)))

    async def next_used(self, pair: Pair, instant: datetime) -> datetime | None:
        """Return the first instant from `instant` on that can hold usage of the pair; None if there is none."""
        statement = usage_sql.next_cell(pair, instant, self.query.windows.end)
        found: datetime | None = (await self._rows(statement))[0][0]
        return None if found is None else max(found, instant)

    async def runs(self, pairs: Sequence[Pair], bounds: Bounds, first: int) -> list[UsageRun]:
        """Return the windows of each of these pairs within these bounds; `first` is the index of the first bound.

        Pairs without any are left out.
        """
        if not bounds:
            return []
        measures = await self._measures(pairs, bounds)
        groups = await self._groups(pairs, bounds)
        query = self.query
        found = []
        for pair, own in zip(pairs, measures, strict=True):
            selected = self.metrics[pair.metric_id]
            metric = selected.metric
            filled = {}
            # An empty window with groups still shows those that were asked for.
            for i in range(len(bounds)) if selected.group_by and not query.sparse else sorted(own):
                total = own.get(i, NOTHING)
                if query.omit_empty and not (total.counted or total.skipped):
                    continue
                values, truncated = None, False
                if selected.group_by is not None:
                    values, truncated = _group_map(metric.aggregation, selected.group_by, groups.get((pair, i), {}))
                updated_at = changed_at(metric, total.updated_at)
                filled[i] = UsageWindow(value(metric.aggregation, total), values, truncated, total.skipped, updated_at)
            shown = list(filled) if query.sparse else range(len(bounds))
            if shown:
                found.append(UsageRun(pair.customer_id, metric, bounds, first, filled, shown))
        return found

    async def _measures(self, pairs: Sequence[Pair], bounds: Bounds) -> list[dict[int, Measures]]:
        """Return, for each pair, the measures of the windows with anything behind them, by position in `bounds`."""
        metrics = [self.metrics[metric_id].metric for metric_id in sorted({pair.metric_id for pair in pairs})]
        rows = await self._rows(await usage_sql.totals(metrics, pairs, bounds, self.query.updated_since))
        found: list[dict[int, Measures]] = [{} for _ in pairs]
        for row in rows:
            found[row[0] - 1][row[1]] = Measures._make(row[2:])
        unique = [metric for metric in metrics if metric.aggregation is Aggregation.UNIQUE]
        if unique:
            ids = {metric.id for metric in unique}
            numbers = [i for i, pair in enumerate(pairs) if pair.metric_id in ids]
            distinct = await usage_sql.distinct_totals(unique, [pairs[i] for i in numbers], bounds)
            for number, window, different in await self._rows(distinct):
                own = found[numbers[number - 1]]
                if window in own:  # else the window did not change since the query's instant
                    own[window] = own[window]._replace(counted=different)
        return found

    async def _groups(self, pairs: Sequence[Pair], bounds: Bounds) -> dict[tuple[Pair, int], dict[str, Measures]]:
        """Return the measures per value of the group key of every window with any; one value more than is shown."""
        found: dict[tuple[Pair, int], dict[str, Measures]] = {}
        for one in self.metrics.values():
            if one.group_by is None:
                continue
            own = [pair for pair in pairs if pair.metric_id == one.metric.id]
            if not own:
                continue
            statement = usage_sql.group_totals(one.metric, one.group_by, GROUP_VALUES_MAX + 1, own, bounds)
            for row in await self._rows(statement):
                found.setdefault((own[row[0] - 1], row[1]), {})[row[2]] = Measures._make(row[3:])
        return found

    async def _rows(self, statement: usage_sql.Statement) -> Sequence[Any]:
        return await statement.rows(self.connection, self.organization)


def _group_map(
    aggregation: Aggregation, group_by: GroupBy, found: dict[str, Measures]
) -> tuple[dict[str, str | None], bool]:
    """Return the groups of one window as shown, and whether some had to be left out."""
    if group_by.values:
        return {name: value(aggregation, found.get(name, NOTHING)) for name in group_by.values}, False
    shown: dict[str, str | None] = {}
    size = 0
    # Postgres ranks by bytes; Python's order of code points is the same for UTF-8.
    for name in sorted(found)[:GROUP_VALUES_MAX]:
        size += len(name.encode())
        if size > GROUPS_BYTES_MAX:
            break
        shown[name] = value(aggregation, found[name])
    return shown, len(shown) < len(found)
