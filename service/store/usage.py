"""Every statement that answers usage queries, from cells; raw events are read only where a bound cuts a cell."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.metrics import Aggregation, BillableMetric
from service.domain.usage import (
    GROUP_VALUES_MAX,
    PAGE_BYTES_MAX,
    GroupBy,
    Measures,
    Position,
    UsagePage,
    UsageQuery,
    UsageWindow,
    check_groups,
    check_window_count,
    value,
)
from service.domain.windows import cell_ceil, cell_floor
from service.errors import FailedPrecondition, Reason
from service.store import customers as customer_store
from service.store import metric_sql
from service.store import metrics as metric_store
from service.store.cells import ORGANIZATION, stored_events
from service.store.tables import INSTANT, customer_keys, customers, usage_cells, usage_distinct_values, usage_events

# How many windows one statement may work out, empty ones included; bounds its time and memory.
SLICE_MAX = 50_000
# A window with groups can hold 200 values of 1,024 bytes, so few of them fill a page.
GROUPED_SLICE_MAX = 64
PAIRS_MAX = 1_000

Span = tuple[datetime, datetime]
Bounds = Sequence[Span]
NOTHING = Measures(0, 0, None, None, None, None, None)


class Pair(NamedTuple):
    """One customer and one metric."""

    customer_id: uuid.UUID
    metric_id: uuid.UUID


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
) -> UsagePage:
    """Return up to `limit` windows (and about 1 MiB) of the query from `begin` on. Must run in one snapshot.

    Raises NotFound for unknown ids, FailedPrecondition for a named metric that is still counting its past, and
    InvalidArgument for an undeclared group key or too many windows.
    """
    metrics = await _selected(connection, organization, query)
    reader = _Reader(connection, organization, query, {one.metric.id: one for one in metrics})
    windows: list[UsageWindow] = []
    size = 0
    number = len(query.windows)
    position = begin
    while True:
        pairs = await reader.pairs(position)
        if not pairs:
            return UsagePage(windows, None)
        first = position.window if position and pairs[0] == (position.customer_id, position.metric_id) else 0
        pairs, count = reader.slice(pairs, first, limit - len(windows))
        if query.omit_empty and count < number:
            # One pair, more windows than one statement takes: leap over those that are empty for certain.
            used = await reader.next_used(pairs[0], query.windows.slice(first, 1)[0][0])
            if used is None:
                position = reader.after(pairs[0])
                if position is None:
                    return UsagePage(windows, None)
                continue
            first = query.windows.index_of(used)
            count = min(count, number - first)
        bounds = query.windows.slice(first, count)
        for pair, index, window in await reader.windows(pairs, bounds, first):
            position = Position(*pair, index)
            if len(windows) >= limit or (windows and size + window.size > PAGE_BYTES_MAX):
                return UsagePage(windows, position)
            windows.append(window)
            size += window.size
        following = first + count
        last = pairs[-1]
        # Whether anything follows is for the next round to find out: pairs without usage are passed over there.
        position = Position(*last, following) if following < number else reader.after(last)
        if position is None:
            return UsagePage(windows, None)
        if len(windows) >= limit or size >= PAGE_BYTES_MAX:
            more = following < number or await reader.pairs(position)
            return UsagePage(windows, position if more else None)


async def _selected(connection: AsyncConnection, organization: str, query: UsageQuery) -> list[Selected]:
    """Check what a query names and return its metrics, or all that "all" means."""
    if query.customers is not None:
        missing = await customer_store.missing_customers(connection, organization, query.customers)
        if missing:
            raise customer_store.not_found(missing)
    if query.metrics is None:
        selected = [Selected(metric) for metric in await metric_store.countable_metrics(connection, organization)]
    else:
        found = await metric_store.get_metrics(connection, organization, [one.id for one in query.metrics])
        _require_backfilled(found)
        check_groups(query.metrics, found)
        selected = [Selected(metric, one.group_by) for metric, one in zip(found, query.metrics, strict=True)]
    customers_number = len(query.customers or ())
    # Only a query over all customers needs them counted, and only if their number could matter.
    if query.customers is None and not query.omit_empty:
        customers_number = await customer_store.count_customers(connection, organization)
    check_window_count(query, customers_number, len(selected))
    return selected


def _require_backfilled(metrics: Sequence[BillableMetric]) -> None:
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


@dataclass(frozen=True, slots=True)
class _Reader:
    """The parts of one query that every statement of a page needs."""

    connection: AsyncConnection
    organization: str
    query: UsageQuery
    metrics: dict[uuid.UUID, Selected]

    @staticmethod
    def after(pair: Pair) -> Position | None:
        """The position after every window of a pair; None after the last possible one."""
        if pair.metric_id.int + 1 < 1 << 128:
            return Position(pair.customer_id, uuid.UUID(int=pair.metric_id.int + 1), 0)
        if pair.customer_id.int + 1 < 1 << 128:
            return Position(uuid.UUID(int=pair.customer_id.int + 1), uuid.UUID(int=0), 0)
        return None

    def slice(self, pairs: Sequence[Pair], first: int, wanted: int) -> tuple[Sequence[Pair], int]:
        """Decide how much one statement takes: whole pairs from their first window, or a part of one pair."""
        grouped = any(self.metrics[pair.metric_id].group_by for pair in pairs)
        most = GROUPED_SLICE_MAX if grouped else SLICE_MAX
        # Of windows that may turn out empty take more than are wanted, but not so many that most are thrown away.
        most = min(most, max(1_000, 10 * wanted) if self.query.omit_empty else wanted)
        number = len(self.query.windows)
        if first == 0 and number <= most:
            return pairs[: most // number], number
        return pairs[:1], min(most, number - first)

    async def pairs(self, begin: Position | None) -> Sequence[Pair]:
        """Return the next pairs of the query from `begin` on, in order; those not named need usage in the range."""
        least = Pair(begin.customer_id, begin.metric_id) if begin else Pair(uuid.UUID(int=0), uuid.UUID(int=0))
        if self.query.customers is not None and self.query.metrics is not None:
            metric_ids = sorted(self.metrics)
            found = []
            for customer_id in sorted(one for one in self.query.customers if one >= least.customer_id):
                found += [pair for metric_id in metric_ids if (pair := Pair(customer_id, metric_id)) >= least]
                if len(found) >= PAIRS_MAX:
                    break
            return found[:PAIRS_MAX]
        if not self.metrics:
            return []
        return await self._pairs_with_usage(least)

    async def _pairs_with_usage(self, least: Pair) -> Sequence[Pair]:
        metric = sa.func.unnest(sa.literal(sorted(self.metrics), ARRAY(sa.Uuid))).table_valued("id").render_derived("m")
        keys, cells = customer_keys.c, usage_cells.c
        query = self.query.windows
        owned = [keys.organization_id == ORGANIZATION, keys.customer_id == customers.c.id]
        # Scalar subqueries with a limit: they are probed pair by pair, in order, until the page has enough. As
        # conditions of existence the planner may turn them into a join over every cell there is.
        in_cells = (
            sa.select(sa.true())
            .select_from(customer_keys.join(usage_cells, _same_key(usage_cells)))
            .where(
                *owned,
                cells.metric_id == metric.c.id,
                cells.cell_start >= cell_ceil(query.start),
                cells.cell_start < cell_floor(query.end),
            )
            .limit(1)
        )
        found: list[sa.ColumnElement[bool]] = [in_cells.correlate(customers, metric).scalar_subquery().is_not(None)]
        for one, span in ((one, span) for one in self.metrics.values() for span in _cut([(query.start, query.end)])):
            events = _events_in([span])
            in_events = (
                sa.select(sa.true())
                .select_from(events.join(customer_keys, keys.key == events.c.customer_key))
                .where(*owned, metric_sql.matches(one.metric, events))
                .limit(1)
            )
            used = in_events.correlate(customers, metric).scalar_subquery().is_not(None)
            found.append(sa.and_(metric.c.id == one.metric.id, used))
        statement = (
            sa.select(customers.c.id, metric.c.id)
            .select_from(customers.join(metric, sa.true()))
            .where(
                customers.c.organization_id == ORGANIZATION,
                customers.c.id >= least.customer_id,
                sa.or_(customers.c.id > least.customer_id, metric.c.id >= least.metric_id),
                sa.or_(*found),
            )
            .order_by(customers.c.id, metric.c.id)
            .limit(PAIRS_MAX)
        )
        if self.query.customers is None:
            statement = statement.where(customers.c.archived_at.is_(None))
        else:
            statement = statement.where(customers.c.id == sa.any_(_uuids(self.query.customers)))
        return [Pair(row[0], row[1]) for row in await self._execute(statement)]

    async def next_used(self, pair: Pair, instant: datetime) -> datetime | None:
        """Return the first instant from `instant` on that can hold usage of the pair; None if there is none."""
        cells = usage_cells.c
        query = (
            sa.select(sa.func.min(cells.cell_start))
            .select_from(customer_keys.join(usage_cells, _same_key(usage_cells)))
            .where(
                customer_keys.c.organization_id == ORGANIZATION,
                customer_keys.c.customer_id == pair.customer_id,
                cells.metric_id == pair.metric_id,
                cells.cell_start >= cell_floor(instant),
                cells.cell_start < self.query.windows.end,
            )
        )
        found: datetime | None = (await self._execute(query))[0][0]
        return None if found is None else max(found, instant)

    async def windows(self, pairs: Sequence[Pair], bounds: Bounds, first: int) -> list[tuple[Pair, int, UsageWindow]]:
        """Return the windows of these pairs within these bounds, in order; `first` is the index of the first bound."""
        measures = await self._measures(pairs, bounds)
        groups = await self._groups(pairs, bounds)
        found = []
        for pair in pairs:
            selected = self.metrics[pair.metric_id]
            for i, (start, end) in enumerate(bounds):
                total = measures.get((pair, i))
                if total is None and self.query.omit_empty:
                    continue
                values, truncated = _group_map(selected, groups.get((pair, i), {}))
                total = total or NOTHING
                found.append(
                    (
                        pair,
                        first + i,
                        UsageWindow(
                            customer_id=pair.customer_id,
                            metric=selected.metric,
                            start=start,
                            end=end,
                            value=value(selected.metric.aggregation, total),
                            groups=values,
                            groups_truncated=truncated,
                            skipped=total.skipped,
                            updated_at=total.updated_at,
                        ),
                    )
                )
        return found

    async def _measures(self, pairs: Sequence[Pair], bounds: Bounds) -> dict[tuple[Pair, int], Measures]:
        """Return the measures of every window that holds an event, by pair and position in `bounds`."""
        pieces = self._pieces(pairs, bounds).subquery("pieces")
        key = [pieces.c.customer_id, pieces.c.metric_id, pieces.c.window]
        rows = await self._execute(sa.select(*key, *_totals(pieces)).group_by(*key))
        found = {(Pair(row[0], row[1]), row[2]): Measures(*row[3:]) for row in rows}
        unique = self._distinct(pairs, bounds)
        if unique is not None:
            values = unique.subquery("distinct_values")
            key = [values.c.customer_id, values.c.metric_id, values.c.window]
            number = sa.func.count(values.c.value_digest.distinct())
            for row in await self._execute(sa.select(*key, number).group_by(*key)):
                at = (Pair(row[0], row[1]), row[2])
                found[at] = found[at]._replace(counted=row[3])
        return {at: total for at, total in found.items() if total.counted or total.skipped}

    async def _groups(self, pairs: Sequence[Pair], bounds: Bounds) -> dict[tuple[Pair, int], dict[str, Measures]]:
        """Return the measures per value of the group key of every window that has one; one value more than is shown."""
        found: dict[tuple[Pair, int], dict[str, Measures]] = {}
        for one in self.metrics.values():
            own = [pair for pair in pairs if pair.metric_id == one.metric.id]
            if one.group_by is None or not own:
                continue
            place = one.metric.group_properties.index(one.group_by.key) + 1
            for row in await self._execute(self._group_statement(own, bounds, one, place)):
                at = (Pair(row.customer_id, row.metric_id), row.window)
                found.setdefault(at, {})[row.group_value] = Measures(*row[-len(Measures._fields) :])
        return found

    def _group_statement(self, pairs: Sequence[Pair], bounds: Bounds, selected: Selected, place: int) -> sa.Select[Any]:
        pieces = self._pieces(pairs, bounds).subquery("pieces")
        group_value = pieces.c.group_values[place].collate("C")
        key = [pieces.c.customer_id, pieces.c.metric_id, pieces.c.window]
        wanted: sa.ColumnElement[bool] = group_value.is_not(None)
        if selected.group_by and selected.group_by.values:
            wanted = group_value == sa.any_(sa.literal(list(selected.group_by.values), ARRAY(sa.Text)))
        totals = (
            sa.select(
                *key,
                group_value.label("group_value"),
                sa.func.row_number().over(partition_by=key, order_by=group_value).label("rank"),
                *_totals(pieces),
            )
            .where(wanted)
            .group_by(*key, group_value)
            .subquery("totals")
        )
        names = [column for column in totals.c if column.name != "rank"]
        limited = sa.select(*names).where(totals.c.rank <= GROUP_VALUES_MAX + 1)
        unique = self._distinct(pairs, bounds)
        if unique is None:
            return limited
        values = unique.subquery("distinct_values")
        one_value = values.c.group_values[place].collate("C")
        numbers = (
            sa.select(
                values.c.customer_id,
                values.c.metric_id,
                values.c.window,
                one_value.label("group_value"),
                sa.func.count(values.c.value_digest.distinct()).label("number"),
            )
            .group_by(values.c.customer_id, values.c.metric_id, values.c.window, one_value)
            .subquery("numbers")
        )
        same = [totals.c[name] == numbers.c[name] for name in ("customer_id", "metric_id", "window", "group_value")]
        shown = [
            sa.func.coalesce(numbers.c.number, 0).label("counted") if column.name == "counted" else column
            for column in names
        ]
        return (
            sa.select(*shown)
            .select_from(totals.outerjoin(numbers, sa.and_(*same)))
            .where(totals.c.rank <= GROUP_VALUES_MAX + 1)
        )

    def _pieces(self, pairs: Sequence[Pair], bounds: Bounds) -> sa.CompoundSelect[Any]:
        """Yield the cells of the pairs that lie within one window each, and cells made of the events of cut cells.

        Columns: customer_id, metric_id, window (position in `bounds`), group_values, updated_at and the MEASURES.
        """
        wanted = _pair_rows(pairs)
        cells = usage_cells.c
        cut = _cut(bounds)
        whole = (
            sa.select(
                wanted.c.customer_id,
                cells.metric_id,
                _window(cells.cell_start, bounds).label("window"),
                cells.group_values,
                cells.updated_at,
                *(cells[name] for name in metric_sql.MEASURES),
            )
            .select_from(_with_keys(wanted).join(usage_cells, _same_key(usage_cells)))
            .where(cells.metric_id == wanted.c.metric_id, *_whole_cells(usage_cells, bounds, cut))
        )
        parts: list[sa.Select[Any]] = [whole]
        for metric in self._metrics_of(pairs) if cut else ():
            events = self._cut_events(pairs, cut)
            cell = metric_sql.cells(metric, events, _window(events.c.timestamp, bounds)).subquery()
            parts.append(
                sa.select(
                    customer_keys.c.customer_id,
                    cell.c.metric_id,
                    cell.c.cell_start,
                    cell.c.group_values,
                    cell.c.updated_at,
                    *(cell.c[name] for name in metric_sql.MEASURES),
                ).select_from(cell.join(customer_keys, _owned_by_key(cell)).join(wanted, _wanted_pair(wanted, cell)))
            )
        return sa.union_all(*parts)

    def _distinct(self, pairs: Sequence[Pair], bounds: Bounds) -> sa.CompoundSelect[Any] | None:
        """Yield the different values of the pairs' UNIQUE metrics as `_pieces` does the cells; None if there is none.

        Columns: customer_id, metric_id, window, group_values, value_digest.
        """
        unique = [metric for metric in self._metrics_of(pairs) if metric.aggregation is Aggregation.UNIQUE]
        pairs = [pair for pair in pairs if any(pair.metric_id == metric.id for metric in unique)]
        if not pairs:
            return None
        wanted = _pair_rows(pairs)
        values, cells = usage_distinct_values.c, usage_cells.c
        cut = _cut(bounds)
        cell_of_value = sa.and_(
            cells.organization_id == ORGANIZATION, *(cells[name] == values[name] for name in metric_sql.CELL_KEY)
        )
        source = _with_keys(wanted).join(usage_distinct_values, _same_key(usage_distinct_values))
        whole = (
            sa.select(
                wanted.c.customer_id,
                values.metric_id,
                _window(values.cell_start, bounds).label("window"),
                cells.group_values,
                values.value_digest,
            )
            .select_from(source.join(usage_cells, cell_of_value))
            .where(values.metric_id == wanted.c.metric_id, *_whole_cells(usage_distinct_values, bounds, cut))
        )
        parts: list[sa.Select[Any]] = [whole]
        for metric in unique if cut else ():
            events = self._cut_events(pairs, cut)
            value_rows = metric_sql.distinct_values(metric, events, _window(events.c.timestamp, bounds)).subquery()
            names = ("metric_id", "cell_start", "group_values", "value_digest")
            parts.append(
                sa.select(customer_keys.c.customer_id, *(value_rows.c[name] for name in names)).select_from(
                    value_rows.join(customer_keys, _owned_by_key(value_rows)).join(
                        wanted, _wanted_pair(wanted, value_rows)
                    )
                )
            )
        return sa.union_all(*parts)

    def _cut_events(self, pairs: Sequence[Pair], cut: Bounds) -> sa.Subquery:
        """Return the events of these customers within the parts of cut cells."""
        owners = sorted({pair.customer_id for pair in pairs})
        keys = sa.select(customer_keys.c.key).where(
            customer_keys.c.organization_id == ORGANIZATION, customer_keys.c.customer_id == sa.any_(_uuids(owners))
        )
        return _events_in(cut, usage_events.c.customer_key.in_(keys))

    def _metrics_of(self, pairs: Sequence[Pair]) -> list[BillableMetric]:
        return [self.metrics[metric_id].metric for metric_id in sorted({pair.metric_id for pair in pairs})]

    async def _execute(self, statement: sa.Select[Any]) -> Sequence[Any]:
        rows: Sequence[Any] = (await self.connection.execute(statement, {"organization": self.organization})).all()
        return rows


def _totals(pieces: sa.Subquery) -> list[sa.ColumnElement[Any]]:
    """Aggregate pieces to the fields of Measures."""
    columns = pieces.c
    latest = metric_sql.latest(
        columns.latest_value, columns.latest_at, columns.latest_transaction_id, columns.latest_at.is_not(None)
    )
    return [
        sa.cast(sa.func.sum(columns.counted), sa.BigInteger).label("counted"),
        sa.cast(sa.func.sum(columns.skipped), sa.BigInteger).label("skipped"),
        sa.func.sum(columns.sum).label("sum"),
        sa.func.min(columns.min).label("min"),
        sa.func.max(columns.max).label("max"),
        latest.label("latest_value"),
        sa.func.max(columns.updated_at).label("updated_at"),
    ]


def _group_map(selected: Selected, found: dict[str, Measures]) -> tuple[dict[str, str | None] | None, bool]:
    """Return the groups of one window as shown, and whether some had to be left out."""
    if selected.group_by is None:
        return None, False
    aggregation = selected.metric.aggregation
    if selected.group_by.values:
        return {name: value(aggregation, found.get(name, NOTHING)) for name in selected.group_by.values}, False
    # Postgres ranks by bytes; Python's order of code points is the same for UTF-8.
    shown = sorted(found)[:GROUP_VALUES_MAX]
    return {name: value(aggregation, found[name]) for name in shown}, len(found) > GROUP_VALUES_MAX


def _cut(bounds: Bounds) -> list[Span]:
    """Return the parts of windows that lie in a cell which a bound cuts: what cells cannot answer."""
    spans: list[Span] = []
    for start, end in bounds:
        first, last = min(cell_ceil(start), end), max(cell_floor(end), start)
        if first >= last and (start, end) != (first, last):
            spans.append((start, end))
            continue
        spans += [span for span in ((start, first), (last, end)) if span[0] < span[1]]
    return spans


def _whole_cells(table: sa.Table, bounds: Bounds, cut: Bounds) -> list[sa.ColumnElement[bool]]:
    """Condition that a cell lies within the bounds and no bound cuts it."""
    start, end = bounds[0][0], bounds[-1][1]
    conditions = [table.c.cell_start >= cell_ceil(start), table.c.cell_start < cell_floor(end)]
    inner = sorted({cell_floor(span[0]) for span in cut})
    if inner:
        conditions.append(table.c.cell_start != sa.all_(sa.literal(inner, ARRAY(INSTANT))))
    return conditions


def _window(instant: sa.ColumnElement[Any], bounds: Bounds) -> sa.ColumnElement[int]:
    """Return the position in `bounds`, which adjoin one another, of the window that holds an instant."""
    if len(bounds) == 1:
        return sa.literal_column("0", sa.Integer)
    starts = sa.literal([start for start, _ in bounds], ARRAY(INSTANT))
    return sa.func.width_bucket(instant, starts, type_=sa.Integer) - 1


def _events_in(spans: Bounds, *where: sa.ColumnElement[bool]) -> sa.Subquery:
    """Return the counted events within spans of time."""
    if len(spans) == 1:
        return stored_events(usage_events.c.timestamp >= spans[0][0], usage_events.c.timestamp < spans[0][1], *where)
    span = (
        sa.func.unnest(
            sa.literal([start for start, _ in spans], ARRAY(INSTANT)),
            sa.literal([end for _, end in spans], ARRAY(INSTANT)),
        )
        .table_valued(sa.column("start", INSTANT), sa.column("stop", INSTANT))
        .render_derived("span")
    )
    within = sa.and_(usage_events.c.timestamp >= span.c.start, usage_events.c.timestamp < span.c.stop)
    return stored_events(*where, source=span.join(usage_events, within))


def _pair_rows(pairs: Sequence[Pair]) -> Any:
    return (
        sa.func.unnest(_uuids([pair.customer_id for pair in pairs]), _uuids([pair.metric_id for pair in pairs]))
        .table_valued(sa.column("customer_id", sa.Uuid), sa.column("metric_id", sa.Uuid))
        .render_derived("pair")
    )


def _with_keys(pair: Any) -> sa.Join:
    return sa.join(
        pair,
        customer_keys,
        sa.and_(customer_keys.c.organization_id == ORGANIZATION, customer_keys.c.customer_id == pair.c.customer_id),
    )


def _same_key(table: sa.Table) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.organization_id == ORGANIZATION, table.c.customer_key == customer_keys.c.key)


def _owned_by_key(rows: sa.Subquery) -> sa.ColumnElement[bool]:
    return sa.and_(customer_keys.c.organization_id == ORGANIZATION, customer_keys.c.key == rows.c.customer_key)


def _wanted_pair(pair: Any, rows: sa.Subquery) -> sa.ColumnElement[bool]:
    return sa.and_(pair.c.metric_id == rows.c.metric_id, pair.c.customer_id == customer_keys.c.customer_id)


def _uuids(values: Sequence[uuid.UUID]) -> sa.BindParameter[Any]:
    return sa.literal(list(values), ARRAY(sa.Uuid))
