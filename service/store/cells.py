"""Every statement that writes cells: adding new events to them, computing them again from the stored events, and
comparing the two.
"""

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.metrics import Aggregation, BillableMetric
from service.domain.windows import CELL
from service.store import metric_sql
from service.store.tables import (
    INSTANT,
    billable_metrics,
    texts,
    usage_cells,
    usage_distinct_values,
    usage_events,
    uuids,
)

DISTINCT_KEY = (*metric_sql.CELL_KEY, "value_digest")
ORGANIZATION: sa.BindParameter[str] = sa.bindparam("organization", type_=usage_cells.c.organization_id.type)


class CellKey(NamedTuple):
    """What tells one cell of an organization from another."""

    metric_id: uuid.UUID
    customer_key: str
    cell_start: datetime
    group_digest: bytes


class Mismatch(NamedTuple):
    """A cell that differs from what its events say. None stands for a missing side; `note` says what else is wrong."""

    customer_key: str
    cell_start: datetime
    cell_group: list[str | None]
    stored: dict[str, Any] | None = None
    computed: dict[str, Any] | None = None
    note: str = ""


def stored_events(*where: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Select the events that metrics count, of the organization bound as `organization`."""
    columns = usage_events.c
    return sa.select(
        columns.transaction_id,
        columns.customer_key,
        columns.event_type,
        columns.timestamp,
        columns.properties,
        columns.source,
    ).where(columns.organization_id == ORGANIZATION, columns.voided_at.is_(None), *where)


def adding(metrics: Sequence[BillableMetric], events: sa.FromClause) -> sa.Insert | None:
    """Return the statement that adds new events to the cells of the metrics; None if there is no metric."""
    if not metrics:
        return None
    rows = [_cells(metric, events, *_passed(metric, events)) for metric in metrics]
    aggregations = {metric.aggregation for metric in metrics}
    return metric_sql.merge_into_cells(sa.select(sa.union_all(*rows).subquery()), aggregations)


def adding_distinct(metrics: Sequence[BillableMetric], events: sa.FromClause) -> sa.Insert | None:
    """Return the statement that adds new events to the distinct values of UNIQUE metrics; None if there is none.

    It must run after `adding` in the same transaction: the lock on the cell's row then orders it against a
    recomputation of the cell, which deletes values.
    """
    rows = [
        metric_sql.distinct_values(metric, events, _bucket(events), *_passed(metric, events))
        for metric in metrics
        if metric.aggregation is Aggregation.UNIQUE
    ]
    return _insert_distinct(sa.select(sa.union_all(*rows).subquery())) if rows else None


def adding_records(events: sa.FromClause) -> sa.Insert:
    """Return the statement that adds new events, made from records, to the cells of their record metrics."""
    rows = metric_sql.cells(metric_sql.RECORDS, of := of_records(events), _bucket(of))
    return metric_sql.merge_into_cells(rows, {metric_sql.RECORDS.aggregation})


def of_records(events: sa.FromClause) -> sa.Subquery:
    """Join events with the record metrics whose key is their type, as `metric_id`."""
    columns = billable_metrics.c
    of_key = sa.and_(columns.organization_id == ORGANIZATION, columns.record_key == events.c.event_type)
    return sa.select(*events.c, columns.id.label("metric_id")).join(billable_metrics, of_key).subquery("of_records")


async def touched(
    connection: AsyncConnection, organization: str, metric: BillableMetric, transaction_ids: Sequence[str]
) -> list[CellKey]:
    """Return the cells of a metric in which it counts, or before they were voided counted, these events."""
    columns = usage_events.c
    events = (
        sa.select(usage_events)
        .where(columns.organization_id == ORGANIZATION, columns.transaction_id == sa.any_(texts(transaction_ids)))
        .subquery("events")
    )
    rows = _cells(metric, events, *_passed(metric, events)).subquery()
    query = sa.select(*(rows.c[name] for name in metric_sql.CELL_KEY))
    return [CellKey(*row) for row in await connection.execute(query, {"organization": organization})]


async def lock(connection: AsyncConnection, organization: str, keys: Sequence[CellKey]) -> None:
    """Lock cells, in the order in which writers of events do, until this transaction ends."""
    wanted, same = _named(keys, usage_cells)
    query = (
        sa.select(usage_cells.c.metric_id)
        .join(wanted, same)
        .where(usage_cells.c.organization_id == organization)
        .order_by(*metric_sql.in_order(usage_cells))
        .with_for_update(of=usage_cells)
    )
    await connection.execute(query)


async def recompute_cells(
    connection: AsyncConnection, organization: str, metric: BillableMetric, keys: Sequence[CellKey]
) -> None:
    """Compute some cells of a metric again from the stored events. They must be locked, by a statement before.

    What a writer adds to one of them later comes on top; what it added before the lock was granted is among the events.
    """
    bound = {"organization": organization}

    def among(table: sa.Table) -> sa.ColumnElement[bool]:
        wanted, same = _named(keys, table)
        return sa.and_(table.c.organization_id == organization, sa.exists().select_from(wanted).where(same))

    await connection.execute(sa.delete(usage_distinct_values).where(among(usage_distinct_values)))
    await connection.execute(sa.update(usage_cells).where(among(usage_cells)).values(metric_sql.EMPTY_CELL))
    hours = sorted({(key.customer_key, key.cell_start) for key in keys})
    hour = (
        sa.func.unnest(texts([one[0] for one in hours]), sa.literal([one[1] for one in hours], ARRAY(INSTANT)))
        .table_valued("customer_key", sa.column("start", INSTANT))
        .render_derived("hours")
    )
    columns = usage_events.c
    within = (
        columns.customer_key == hour.c.customer_key,
        columns.timestamp >= hour.c.start,
        columns.timestamp < hour.c.start + sa.cast(sa.literal(CELL), sa.Interval),
    )
    events = stored_events(*within).subquery("events")

    def named(rows: sa.Select[Any]) -> sa.Select[Any]:
        found = rows.subquery("found")
        wanted, same = _named(keys, found)
        return sa.select(found).join(wanted, same)

    await connection.execute(metric_sql.replace_cells(named(_cells(metric, events))), bound)
    if metric.aggregation is Aggregation.UNIQUE:
        values = metric_sql.distinct_values(metric, events, _bucket(events))
        await connection.execute(_insert_distinct(named(values)), bound)


async def recompute(
    connection: AsyncConnection, organization: str, metric: BillableMetric, start: datetime, end: datetime | None
) -> None:
    """Compute the metric's cells in `[start, end)` again from the stored events; both bounds are cell starts.

    The organization's exclusive lock must be held. Running it twice changes nothing.
    """
    bound = {"organization": organization}

    def within(table: sa.Table) -> list[sa.ColumnElement[bool]]:
        columns = table.c
        span = [columns.cell_start >= start] + ([columns.cell_start < end] if end else [])
        return [columns.organization_id == organization, columns.metric_id == metric.id, *span]

    await connection.execute(sa.delete(usage_distinct_values).where(*within(usage_distinct_values)))
    # A cell that turns out to hold nothing any more is kept, empty: it tells readers when that came to be.
    columns = usage_cells.c
    filled = sa.or_(columns.counted > 0, columns.skipped > 0)
    await connection.execute(sa.update(usage_cells).where(*within(usage_cells), filled).values(metric_sql.EMPTY_CELL))
    events = _events_between(start, end)
    await connection.execute(metric_sql.replace_cells(_cells(metric, events)), bound)
    if metric.aggregation is Aggregation.UNIQUE:
        await connection.execute(_insert_distinct(metric_sql.distinct_values(metric, events, _bucket(events))), bound)


async def time_span(
    connection: AsyncConnection, organization: str, metric_id: uuid.UUID
) -> tuple[datetime, datetime] | None:
    """Return the starts of the metric's first and last cell."""
    query = sa.select(sa.func.min(usage_cells.c.cell_start), sa.func.max(usage_cells.c.cell_start)).where(
        usage_cells.c.organization_id == organization, usage_cells.c.metric_id == metric_id
    )
    first, last = (await connection.execute(query)).one()
    return None if first is None else (first, last)


async def mismatches(
    connection: AsyncConnection,
    organization: str,
    metric: BillableMetric,
    start: datetime,
    end: datetime,
    *,
    limit: int,
) -> list[Mismatch]:
    """Compare the metric's cells in `[start, end)` with its events, in one statement; both bounds are cell starts."""
    events = _events_between(start, end)
    computed = _cells(metric, events).subquery("computed")
    stored = (
        sa.select(usage_cells)
        .where(
            usage_cells.c.organization_id == ORGANIZATION,
            usage_cells.c.metric_id == metric.id,
            usage_cells.c.cell_start >= start,
            usage_cells.c.cell_start < end,
        )
        .subquery("stored")
    )
    names = list(metric_sql.MEASURES)
    same_key = sa.and_(*(stored.c[name] == computed.c[name] for name in metric_sql.CELL_KEY))
    # A cell that lost its last event is kept, with nothing in it: it remembers when it changed.
    emptied = sa.and_(computed.c.metric_id.is_(None), stored.c.counted == 0, stored.c.skipped == 0)
    query = (
        sa.select(
            sa.func.coalesce(stored.c.customer_key, computed.c.customer_key),
            sa.func.coalesce(stored.c.cell_start, computed.c.cell_start),
            sa.func.coalesce(stored.c.cell_group, computed.c.cell_group),
            stored.c.metric_id.is_not(None),
            computed.c.metric_id.is_not(None),
            *(side.c[name].label(f"{side.name}_{name}") for side in (stored, computed) for name in names),
        )
        .select_from(stored.join(computed, same_key, full=True))
        .where(sa.or_(*(stored.c[name].is_distinct_from(computed.c[name]) for name in names)), sa.not_(emptied))
        .order_by(sa.text("2"), sa.text("1"))
        .limit(limit)
    )
    found = []
    for row in await connection.execute(query, {"organization": organization}):
        values = list(row)
        stored_values = dict(zip(names, values[5 : 5 + len(names)], strict=True)) if values[3] else None
        computed_values = dict(zip(names, values[5 + len(names) :], strict=True)) if values[4] else None
        found.append(Mismatch(values[0], values[1], values[2], stored_values, computed_values))
    if metric.aggregation is Aggregation.UNIQUE:
        found += await _distinct_mismatches(connection, organization, metric, start, end, limit=limit)
    return found


async def _distinct_mismatches(
    connection: AsyncConnection,
    organization: str,
    metric: BillableMetric,
    start: datetime,
    end: datetime,
    *,
    limit: int,
) -> list[Mismatch]:
    """Compare the distinct values of cells with those of events; a mismatch counts those on one side only."""
    events = _events_between(start, end)
    computed = metric_sql.distinct_values(metric, events, _bucket(events)).subquery("computed")
    table = usage_distinct_values
    stored = (
        sa.select(table)
        .where(
            table.c.organization_id == ORGANIZATION,
            table.c.metric_id == metric.id,
            table.c.cell_start >= start,
            table.c.cell_start < end,
        )
        .subquery("stored")
    )
    same_key = sa.and_(*(stored.c[name] == computed.c[name] for name in DISTINCT_KEY))
    only_stored, only_computed = computed.c.metric_id.is_(None), stored.c.metric_id.is_(None)
    key = [sa.func.coalesce(stored.c[name], computed.c[name]) for name in ("customer_key", "cell_start")]
    query = (
        sa.select(*key, *(sa.func.count().filter(one) for one in (only_stored, only_computed)))
        .select_from(stored.join(computed, same_key, full=True))
        .where(sa.or_(only_stored, only_computed))
        .group_by(*key)
        .limit(limit)
    )
    rows = await connection.execute(query, {"organization": organization})
    return [
        Mismatch(row[0], row[1], [], note=f"{row[2]} distinct values have no event, {row[3]} are missing")
        for row in rows
    ]


def _named(keys: Sequence[CellKey], table: sa.FromClause) -> tuple[sa.TableValuedAlias, sa.ColumnElement[bool]]:
    """Return cells' keys as a table, and the condition that a row of another table has one of them."""
    columns = [
        uuids([key.metric_id for key in keys]),
        texts([key.customer_key for key in keys]),
        sa.literal([key.cell_start for key in keys], ARRAY(INSTANT)),
        sa.literal([key.group_digest for key in keys], ARRAY(BYTEA)),
    ]
    wanted = sa.func.unnest(*columns).table_valued(*metric_sql.CELL_KEY).render_derived("wanted")
    return wanted, sa.and_(*(table.c[name] == wanted.c[name] for name in metric_sql.CELL_KEY))


def _events_between(start: datetime, end: datetime | None) -> sa.Subquery:
    columns = usage_events.c
    bounds = [columns.timestamp >= start] + ([columns.timestamp < end] if end else [])
    return stored_events(*bounds).subquery("events")


def _cells(metric: BillableMetric, events: sa.FromClause, *where: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Aggregate events into what usage_cells has of the metric."""
    return metric_sql.cells(metric, events, _bucket(events), *where, with_total=True)


def _bucket(events: sa.FromClause) -> sa.ColumnElement[Any]:
    return metric_sql.cell_start(events.c.timestamp)


def _passed(metric: BillableMetric, events: sa.FromClause) -> list[sa.ColumnElement[bool]]:
    """Condition by which ingest leaves to the backfill what the backfill has yet to count."""
    if metric.backfilled_until is None:
        return []
    return [events.c.timestamp < sa.literal(metric.backfilled_until, INSTANT)]


def _insert_distinct(rows: sa.Select[Any]) -> sa.Insert:
    source = rows.subquery()
    select = sa.select(ORGANIZATION, *(source.c[name] for name in DISTINCT_KEY)).order_by(
        *(source.c[name] for name in DISTINCT_KEY)
    )
    return (
        insert(usage_distinct_values).from_select(["organization_id", *DISTINCT_KEY], select).on_conflict_do_nothing()
    )
