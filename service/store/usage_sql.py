"""The statements that answer usage queries: cells, and raw events only where a window's bound cuts a cell.

A *piece* is a cell that lies within one window, or a cell made on the fly of the events of a cut cell that belong to
one window. Every answer is an aggregate of pieces; that is how MAX, LATEST, UNIQUE and AVG, which do not add up from
window to window, are right for any window.

Further pieces hold nothing but a time, at which what is behind a window changed: those of cut cells, and of cells under
a key that the customer gave up.
"""

import functools
import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.selectable import LateralFromClause

from service.domain.metrics import Aggregation, BillableMetric
from service.domain.usage import GroupBy
from service.domain.windows import CELL, cell_ceil, cell_floor
from service.store import metric_sql
from service.store.cells import ORGANIZATION, of_records, stored_events
from service.store.compiled import Compiled
from service.store.tables import (
    INSTANT,
    NUMERIC,
    customer_keys,
    customers,
    released_keys,
    texts,
    usage_cells,
    usage_distinct_values,
    usage_events,
    uuids,
)

_HOUR = timedelta(hours=1)

Span = tuple[datetime, datetime]
Bounds = Sequence[Span]
"""Windows that adjoin one another, in order."""


class Pair(NamedTuple):
    """One customer and one metric."""

    customer_id: uuid.UUID
    metric_id: uuid.UUID


def next_customers(
    least: uuid.UUID, customer_ids: Sequence[uuid.UUID] | None, since: datetime | None, limit: int
) -> sa.Select[Any]:
    """Select the ids of the customers named, or of all that are not archived (or with `since`: were not), in order."""
    columns = customers.c
    wanted: sa.ColumnElement[bool] = columns.archived_at.is_(None)
    if since is not None:
        wanted = sa.or_(wanted, columns.archived_at >= since)
    if customer_ids is not None:
        wanted = columns.id == sa.any_(uuids(customer_ids))
    return (
        sa.select(columns.id)
        .where(columns.organization_id == ORGANIZATION, columns.id >= least, wanted)
        .order_by(columns.id)
        .limit(limit)
    )


def pairs_with_usage(
    metrics: Sequence[BillableMetric],
    span: Span,
    customer_ids: Sequence[uuid.UUID],
    least: Pair,
    limit: int,
    since: datetime | None,
) -> sa.Select[Any]:
    """Select the pairs of these customers, from `least` on, that have an event in the span: customer_id, metric_id.

    In order. With `since` the pairs with a change from then on instead.
    """
    metric = sa.func.unnest(uuids(sorted(one.id for one in metrics))).table_valued("id").render_derived("metric")
    key = keys_of(customers.c.id)
    found: list[sa.ColumnElement[bool]] = []

    def exists(rows: LateralFromClause, *where: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        select = sa.select(sa.true()).select_from(key.join(rows, sa.true())).where(*where)
        return _any(select.correlate(customers, metric))

    if since is not None:
        # Cut cells whole: whether the part in the span changed is found out when its windows are read.
        start = usage_cells.c.cell_start
        cell = _of_key(usage_cells, key.c.key, metric.c.id, start >= cell_floor(span[0]), start < span[1])
        found.append(exists(cell, sa.or_(_updated_at(cell, key) >= since, _fresh(metric.c.id, metrics, since))))
    else:
        filled = sa.or_(usage_cells.c.counted > 0, usage_cells.c.skipped > 0)
        cell = _of_key(usage_cells, key.c.key, metric.c.id, *_within(usage_cells, [span], cut=()), filled)
        found.append(exists(cell, key.c.held))
        for part in _cut([span]):
            events = _events_of_key(key.c.key, sa.literal(part[0], INSTANT), sa.literal(part[1], INSTANT))
            for one in metrics:
                if one.record_key is None:
                    in_part = exists(events, key.c.held, metric_sql.matches(one, events))
                    found.append(sa.and_(metric.c.id == one.id, in_part))
        if (cut := _cut([span])) and any(one.record_key is not None for one in metrics):
            # Of all record metrics, however many, at once.
            records = of_records(_cut_events(customer_ids, cut))
            made = sa.select(records).where(metric_sql.matches(metric_sql.RECORDS, records)).subquery()
            found.append(sa.tuple_(customers.c.id, metric.c.id).in_(_of_owner(made, ("metric_id",))))
    return (
        sa.select(customers.c.id, metric.c.id)
        .select_from(customers.join(metric, sa.true()))
        .where(
            customers.c.organization_id == ORGANIZATION,
            customers.c.id == sa.any_(uuids(customer_ids)),
            customers.c.id >= least.customer_id,
            sa.or_(customers.c.id > least.customer_id, metric.c.id >= least.metric_id),
            sa.or_(*found),
        )
        .order_by(customers.c.id, metric.c.id)
        .limit(limit)
    )


def next_cell(pair: Pair, instant: datetime, end: datetime) -> sa.Select[Any]:
    """Select the start of the pair's first cell that reaches beyond `instant` and starts before `end`, or NULL."""
    key = keys_of(sa.literal(pair.customer_id, sa.Uuid))
    start = usage_cells.c.cell_start
    metric_id = sa.literal(pair.metric_id, sa.Uuid)
    cell = _of_key(usage_cells, key.c.key, metric_id, start >= cell_floor(instant), start < end)
    return sa.select(sa.func.min(cell.c.cell_start)).select_from(key.join(cell, sa.true()))


def totals(
    metrics: Sequence[BillableMetric], pairs: Sequence[Pair], bounds: Bounds, since: datetime | None
) -> sa.Select[Any]:
    """Select what every window with a cell adds up to: customer_id, metric_id, window, and the fields of Measures.

    With `since` only windows that changed from then on. `metrics` are those of the pairs; `window` is the position in
    `bounds`. `counted` of a UNIQUE metric is the number of its values, not of the different ones.
    """
    pieces = select_pieces(metrics, pairs, bounds).subquery("pieces")
    key = _key(pieces)
    statement = sa.select(*key, *measures_of(metrics, pieces)).group_by(*key)
    if since is None:
        return statement
    return statement.having(
        sa.or_(sa.func.max(pieces.c.updated_at) >= since, _fresh(pieces.c.metric_id, metrics, since))
    )


def whole_totals(
    metrics: Sequence[BillableMetric], pairs: Sequence[Pair], bounds: Bounds
) -> tuple[Compiled, dict[str, Any]] | None:
    """Return the statement of `totals`, and what it is given, from those worked out once; None where it is not one.

    Windows that cut no cell, whatever their number and pairs, are asked for by one statement; making it and its key
    anew takes SQLAlchemy several times as long as Postgres takes to answer it.
    """
    if _cut(bounds):
        return None
    latest = any(metric.aggregation is Aggregation.LATEST for metric in metrics)
    return _whole_totals(single=len(bounds) == 1, latest=latest), {
        "customer_ids": [pair.customer_id for pair in pairs],
        "metric_ids": [pair.metric_id for pair in pairs],
        "first": bounds[0][0],
        "last": bounds[-1][1],
        **({} if len(bounds) == 1 else {"starts": [start for start, _ in bounds]}),
    }


@functools.lru_cache
def _whole_totals(*, single: bool, latest: bool) -> Compiled:
    ids = [sa.bindparam(name, type_=ARRAY(sa.Uuid)) for name in ("customer_ids", "metric_ids")]
    pair: Any = (
        sa.func.unnest(*ids)
        .table_valued(sa.column("customer_id", sa.Uuid), sa.column("metric_id", sa.Uuid))
        .render_derived("pair")
    )
    key = keys_of(pair.c.customer_id)
    start = usage_cells.c.cell_start
    first, last = (sa.bindparam(name, type_=INSTANT) for name in ("first", "last"))
    cell = _of_key(usage_cells, key.c.key, pair.c.metric_id, start >= first, start < last)
    window: sa.ColumnElement[int] = sa.literal_column("0", sa.Integer)
    if not single:
        starts = sa.bindparam("starts", type_=ARRAY(INSTANT))
        window = sa.func.width_bucket(cell.c.cell_start, starts, type_=sa.Integer) - sa.literal_column("1")
    pieces = _cell_pieces(pair, key, cell, window).subquery("pieces")
    columns = _key(pieces)
    of = [Aggregation.LATEST] if latest else []
    return Compiled(sa.select(*columns, *_measures_of(of, pieces)).group_by(*columns))


def distinct_totals(metrics: Sequence[BillableMetric], pairs: Sequence[Pair], bounds: Bounds) -> sa.Select[Any] | None:
    """Select the number of different values per window of UNIQUE metrics: customer_id, metric_id, window, number.

    None if none of the metrics is UNIQUE.
    """
    unique = [metric for metric in metrics if metric.aggregation is Aggregation.UNIQUE]
    if not unique:
        return None
    values = select_distinct_pieces(unique, pairs, bounds).subquery("values")
    key = _key(values)
    return sa.select(*key, sa.func.count(values.c.value_digest.distinct())).group_by(*key)


def group_totals(
    metric: BillableMetric, group_by: GroupBy, limit: int, pairs: Sequence[Pair], bounds: Bounds
) -> sa.Select[Any]:
    """Select what the groups of every window add up to: customer_id, metric_id, window, group_value, Measures.

    The values asked for, or the first `limit` of each window in byte order. `pairs` are of this metric.
    """
    place = metric.group_properties.index(group_by.key) + 1
    pieces = select_pieces([metric], pairs, bounds).subquery("pieces")
    group_value = pieces.c.group_values[place].collate("C")
    wanted: sa.ColumnElement[bool] = group_value.is_not(None)
    if group_by.values:
        wanted = group_value == sa.any_(texts(group_by.values))
    key = [*_key(pieces), group_value.label("group_value")]
    rank = sa.func.row_number().over(partition_by=_key(pieces), order_by=group_value)
    ranked = (
        sa.select(*key, *measures_of([metric], pieces), rank.label("rank"))
        .where(wanted)
        .group_by(*_key(pieces), group_value)
        .having(any_event(pieces))
        .subquery("ranked")
    )
    columns: dict[str, sa.ColumnElement[Any]] = {one.name: one for one in ranked.c if one.name != "rank"}
    source: sa.FromClause = ranked
    if metric.aggregation is Aggregation.UNIQUE:
        values = select_distinct_pieces([metric], pairs, bounds).subquery("values")
        value_key = [*_key(values), values.c.group_values[place].collate("C").label("group_value")]
        number = sa.func.count(values.c.value_digest.distinct()).label("number")
        numbers = sa.select(*value_key, number).group_by(*value_key).subquery("numbers")
        same = [ranked.c[name] == numbers.c[name] for name in ("customer_id", "metric_id", "window", "group_value")]
        source = ranked.outerjoin(numbers, sa.and_(*same))
        columns["counted"] = sa.func.coalesce(numbers.c.number, 0)
    return sa.select(*columns.values()).select_from(source).where(ranked.c.rank <= limit)


def watermark() -> sa.Select[Any]:
    """Select an instant such that whatever a snapshot taken later does not show is stored with a later time.

    Times are taken after their transaction began; so it is the beginning of the oldest one that is still writing, or of
    this statement's own, which began before it looked. One that has not written yet takes its times within moments of
    writing; a minute is more than enough for them. Of other roles' sessions Postgres tells nothing (unless this one has
    pg_read_all_stats), nor with track_activities off; then an hour must do, far longer than a transaction of ours is.
    """
    names = ("datname", "backend_type", "backend_xid", "query", "state")
    activity = sa.table("pg_stat_activity", sa.column("xact_start", INSTANT), *(sa.column(name) for name in names))
    columns: Any = activity.c

    def ago(interval: str) -> sa.ColumnElement[Any]:
        return sa.func.clock_timestamp() - sa.literal_column(f"INTERVAL '{interval}'")

    hidden = sa.or_(columns.query == "<insufficient privilege>", columns.state == "disabled")
    begun = sa.case(
        (hidden, ago("1 hour")),
        (columns.backend_xid.is_not(None), columns.xact_start),
        else_=sa.func.greatest(columns.xact_start, ago("1 minute")),
    )
    oldest = sa.select(sa.func.min(begun)).where(
        columns.datname == sa.func.current_database(),
        sa.or_(hidden, sa.and_(columns.backend_type == "client backend", columns.xact_start.is_not(None))),
    )
    return sa.select(sa.func.least(sa.func.now(), oldest.scalar_subquery(), type_=INSTANT))


def any_event(pieces: sa.Subquery) -> sa.ColumnElement[bool]:
    """Aggregate to whether pieces hold any event: counted or skipped, not only a time."""
    return sa.func.sum(pieces.c.counted + pieces.c.skipped) > 0


def select_pieces(metrics: Sequence[BillableMetric], pairs: Sequence[Pair], bounds: Bounds) -> sa.CompoundSelect[Any]:
    """Columns: customer_id, metric_id, window, group_values, updated_at and the MEASURES."""
    pair = _pair_rows(pairs)
    key = keys_of(pair.c.customer_id)
    cut = _cut(bounds)
    cell = _of_key(usage_cells, key.c.key, pair.c.metric_id, *_within(usage_cells, bounds, cut))
    parts: list[sa.Select[Any]] = [_cell_pieces(pair, key, cell, _window(cell.c.cell_start, bounds))]
    if cut:
        parts.append(_cut_times(pairs, bounds, cut))
    for metric in metrics if cut else ():
        if metric.record_key is None:
            owners = [pair.customer_id for pair in pairs if pair.metric_id == metric.id]
            events = _cut_events(owners, cut)
            made = metric_sql.cells(metric, events, _window(events.c.timestamp, bounds))
            parts.append(_of_owner(_with_updated_at(made), _PIECE))
    records = {metric.id for metric in metrics if metric.record_key is not None}
    own = [pair for pair in pairs if pair.metric_id in records]
    if cut and own:
        # One part for all record metrics, however many.
        events = of_records(_cut_events(sorted({pair.customer_id for pair in own}), cut))
        wanted = events.c.metric_id == sa.any_(uuids(sorted(records)))
        made = metric_sql.cells(metric_sql.RECORDS, events, _window(events.c.timestamp, bounds), wanted)
        rows = _of_owner(_with_updated_at(made), _PIECE).subquery()
        pair = _pair_rows(own)
        same = sa.and_(pair.c.customer_id == rows.c.customer_id, pair.c.metric_id == rows.c.metric_id)
        parts.append(sa.select(rows).join(pair, same))
    return sa.union_all(*parts)


def _cell_pieces(pair: Any, key: Any, cell: Any, window: sa.ColumnElement[int]) -> sa.Select[Any]:
    return sa.select(
        pair.c.customer_id,
        cell.c.metric_id,
        window.label("window"),
        cell.c.group_values,
        _updated_at(cell, key).label("updated_at"),
        *(
            sa.case((key.c.held, cell.c[name]), else_=0 if name in {"counted", "skipped"} else None).label(name)
            for name in metric_sql.MEASURES
        ),
    ).select_from(pair.join(key, sa.true()).join(cell, sa.true()))


# What `select_pieces` has beside the customer.
_PIECE = ("metric_id", "cell_start", "group_values", "updated_at", *metric_sql.MEASURES)


def _with_updated_at(rows: sa.Select[Any]) -> sa.Subquery:
    return rows.add_columns(sa.null().cast(INSTANT).label("updated_at")).subquery()


def _cut_times(pairs: Sequence[Pair], bounds: Bounds, cut: Sequence[Span]) -> sa.Select[Any]:
    """Select for every part of a cut cell a piece with the time at which the cell changed, and nothing else."""
    pair = _pair_rows(pairs)
    key = keys_of(pair.c.customer_id)
    part = _part_rows(cut)
    cell = _of_key(
        usage_cells, key.c.key, pair.c.metric_id, usage_cells.c.cell_start == metric_sql.cell_start(part.c.start)
    )
    return sa.select(
        pair.c.customer_id,
        cell.c.metric_id,
        _window(part.c.start, bounds).label("window"),
        cell.c.group_values,
        _updated_at(cell, key).label("updated_at"),
        *(
            (sa.literal_column("0") if name in {"counted", "skipped"} else sa.null().cast(usage_cells.c[name].type))
            for name in metric_sql.MEASURES
        ),
    ).select_from(pair.join(part, sa.true()).join(key, sa.true()).join(cell, sa.true()))


def _updated_at(cell: sa.FromClause, key: sa.FromClause) -> sa.ColumnElement[Any]:
    """Return when a cell became part of its customer's usage as it is, or ceased to be."""
    return sa.case((key.c.held, sa.func.greatest(cell.c.updated_at, key.c.since)), else_=key.c.since)


def select_distinct_pieces(
    metrics: Sequence[BillableMetric], pairs: Sequence[Pair], bounds: Bounds
) -> sa.CompoundSelect[Any]:
    """The different values of UNIQUE metrics, as `select_pieces` gives the cells.

    Columns: customer_id, metric_id, window, group_values, value_digest.
    """
    pair = _pair_rows([pair for pair in pairs if any(pair.metric_id == metric.id for metric in metrics)])
    key = keys_of(pair.c.customer_id)
    cut = _cut(bounds)
    cell = _of_key(usage_cells, key.c.key, pair.c.metric_id, *_within(usage_cells, bounds, cut))
    in_cell = [usage_distinct_values.c[name] == cell.c[name] for name in ("cell_start", "group_digest")]
    one = _of_key(usage_distinct_values, key.c.key, pair.c.metric_id, *in_cell)
    parts: list[sa.Select[Any]] = [
        sa.select(
            pair.c.customer_id,
            cell.c.metric_id,
            _window(cell.c.cell_start, bounds).label("window"),
            cell.c.group_values,
            one.c.value_digest,
        ).select_from(pair.join(key, key.c.held).join(cell, sa.true()).join(one, sa.true()))
    ]
    for metric in metrics if cut else ():
        owners = [pair.customer_id for pair in pairs if pair.metric_id == metric.id]
        events = _cut_events(owners, cut)
        made = metric_sql.distinct_values(metric, events, _window(events.c.timestamp, bounds)).subquery()
        parts.append(_of_owner(made, ("metric_id", "cell_start", "group_values", "value_digest")))
    return sa.union_all(*parts)


def measures_of(metrics: Sequence[BillableMetric], pieces: sa.Subquery) -> list[sa.ColumnElement[Any]]:
    """Aggregate pieces to the fields of Measures."""
    return _measures_of([metric.aggregation for metric in metrics], pieces)


def _measures_of(aggregations: Sequence[Aggregation], pieces: sa.Subquery) -> list[sa.ColumnElement[Any]]:
    columns = pieces.c
    latest: sa.ColumnElement[Any] = sa.null().cast(NUMERIC)
    # Only where it is asked for: it needs the pieces sorted.
    if Aggregation.LATEST in aggregations:
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


def _cut(bounds: Bounds) -> list[Span]:
    """Return the parts of windows that lie in a cell which a bound cuts: what cells cannot answer."""
    # Windows adjoin, so what is true of all starts and the last end is true of all. Asked without cell_floor, which
    # would cost as much as all the rest.
    if CELL == _HOUR and not any(
        at.minute or at.second or at.microsecond for at in (*(start for start, _ in bounds), bounds[-1][1])
    ):
        return []
    spans: list[Span] = []
    for start, end in bounds:
        first, last = cell_ceil(start), cell_floor(end)
        # Without a whole cell in between, the window itself is the part (of one cell, or of two).
        parts = ((start, first), (last, end)) if first <= last else ((start, end),)
        spans += [part for part in parts if part[0] < part[1]]
    return spans


def _within(table: sa.Table, bounds: Bounds, cut: Sequence[Span]) -> list[sa.ColumnElement[bool]]:
    """Condition that a cell lies within the bounds and no bound cuts it."""
    start, end = bounds[0][0], bounds[-1][1]
    conditions = [table.c.cell_start >= cell_ceil(start), table.c.cell_start < cell_floor(end)]
    if inner := sorted({cell_floor(part[0]) for part in cut}):
        conditions.append(table.c.cell_start != sa.all_(sa.literal(inner, ARRAY(INSTANT))))
    return conditions


def _window(instant: sa.ColumnElement[Any], bounds: Bounds) -> sa.ColumnElement[int]:
    """Return the position in `bounds` of the window that holds an instant."""
    if len(bounds) == 1:
        return sa.literal_column("0", sa.Integer)
    starts = sa.literal([start for start, _ in bounds], ARRAY(INSTANT))
    return sa.func.width_bucket(instant, starts, type_=sa.Integer) - 1


def _cut_events(customer_ids: Sequence[uuid.UUID], cut: Sequence[Span]) -> sa.Subquery:
    """Select the events of these customers within the parts of cut cells, key by key and part by part."""
    keys = customer_keys.c
    owned = (keys.organization_id == ORGANIZATION, keys.customer_id == sa.any_(uuids(customer_ids)))
    owner = sa.select(keys.key).where(*owned).subquery("owner")
    part = _part_rows(cut)
    events = _events_of_key(owner.c.key, part.c.start, part.c.stop)
    return sa.select(events).select_from(owner.join(part, sa.true()).join(events, sa.true())).subquery("events")


def keys_of(customer_id: sa.ColumnElement[uuid.UUID]) -> LateralFromClause:
    """Select the keys of a customer: key, whether it is held still, and since when that is so."""
    parts = [
        sa.select(table.c.key, held.label("held"), since.label("since"))
        .where(table.c.organization_id == ORGANIZATION, table.c.customer_id == customer_id)
        .correlate_except(table)
        for table, held, since in (
            (customer_keys, sa.true(), customer_keys.c.attached_at),
            (released_keys, sa.false(), released_keys.c.released_at),
        )
    ]
    return sa.union_all(*parts).offset(sa.literal_column("0")).lateral()


def _of_key(
    table: sa.Table,
    key: sa.ColumnElement[str],
    metric_id: sa.ColumnElement[uuid.UUID],
    *where: sa.ColumnElement[bool],
) -> LateralFromClause:
    """Select the rows of usage_cells or usage_distinct_values of one metric and customer key."""
    columns = table.c
    of_key = (columns.organization_id == ORGANIZATION, columns.metric_id == metric_id, columns.customer_key == key)
    return _fenced(sa.select(table).where(*of_key, *where), table)


def _events_of_key(
    key: sa.ColumnElement[str], start: sa.ColumnElement[Any], stop: sa.ColumnElement[Any]
) -> LateralFromClause:
    """Select the events of one customer key in a span of time."""
    columns = usage_events.c
    in_span = (columns.timestamp >= start, columns.timestamp < stop)
    return _fenced(stored_events(columns.customer_key == key, *in_span), usage_events)


def _fenced(select: sa.Select[Any], table: sa.Table) -> LateralFromClause:
    """Make a select from `table` that is run once per row of what stands before it, by the index on what it asks for.

    OFFSET 0 keeps the planner from merging it into a join. Left to itself it guesses the size of that join, and is
    wrong by orders of magnitude where it has no statistics yet (a new database) or cannot have any (ranges of time).
    """
    return select.correlate_except(table).offset(sa.literal_column("0")).lateral()


def _of_owner(rows: sa.Subquery, names: Sequence[str]) -> sa.Select[Any]:
    """Select these columns of rows that have a customer_key, led by the id of the customer who owns it."""
    owner = sa.and_(customer_keys.c.organization_id == ORGANIZATION, customer_keys.c.key == rows.c.customer_key)
    return sa.select(customer_keys.c.customer_id, *(rows.c[name] for name in names)).select_from(
        rows.join(customer_keys, owner)
    )


def _fresh(
    metric_id: sa.ColumnElement[uuid.UUID], metrics: Sequence[BillableMetric], since: datetime
) -> sa.ColumnElement[bool]:
    """Condition that a metric could be read first after an instant: all its usage is new, however old its cells."""
    fresh = [one.id for one in metrics if one.backfilled_at is not None and one.backfilled_at >= since]
    return metric_id == sa.any_(uuids(fresh))


def _key(pieces: sa.Subquery) -> list[sa.ColumnElement[Any]]:
    return [pieces.c.customer_id, pieces.c.metric_id, pieces.c.window]


def _any(select: sa.Select[Any]) -> sa.ColumnElement[bool]:
    # A scalar subquery with a limit is probed pair by pair, in order, until there are enough. A condition of existence
    # the planner may turn into a join over every cell there is.
    return select.limit(1).scalar_subquery().is_not(None)


def _pair_rows(pairs: Sequence[Pair]) -> Any:
    return (
        sa.func.unnest(uuids([pair.customer_id for pair in pairs]), uuids([pair.metric_id for pair in pairs]))
        .table_valued(sa.column("customer_id", sa.Uuid), sa.column("metric_id", sa.Uuid))
        .render_derived("pair")
    )


def _part_rows(cut: Sequence[Span]) -> Any:
    return (
        sa.func.unnest(
            sa.literal([start for start, _ in cut], ARRAY(INSTANT)), sa.literal([end for _, end in cut], ARRAY(INSTANT))
        )
        .table_valued(sa.column("start", INSTANT), sa.column("stop", INSTANT))
        .render_derived("part")
    )
