"""The statements that answer usage queries: cells, and raw events only where a window's bound cuts a cell.

A *piece* is a cell that lies within one window, or a cell made on the fly of the events of a cut cell that belong to
one window. Every answer is an aggregate of pieces; that is how MAX, LATEST, UNIQUE and AVG, which do not add up from
window to window, are right for any window.

Further pieces hold nothing but a time, at which what is behind a window changed: those of cut cells, and of cells under
a key that the customer gave up.

The text of a statement depends on the metrics and on what kind of answer is wanted (see `Shape`), never on its values.
It is worked out once and kept: to make it anew takes SQLAlchemy several times as long as Postgres takes to answer it.
"""

import functools
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import LateralFromClause

from service.domain.metrics import Aggregation, BillableMetric
from service.domain.usage import GroupBy
from service.domain.windows import CELL, cell_ceil, cell_floor
from service.store import metric_sql
from service.store.cells import ORGANIZATION, of_records, stored_events
from service.store.compiled import Compiled, PerMetrics
from service.store.tables import (
    INSTANT,
    NUMERIC,
    customer_keys,
    customers,
    released_keys,
    usage_cells,
    usage_distinct_values,
    usage_events,
)

_HOUR = timedelta(hours=1)

Span = tuple[datetime, datetime]
Bounds = Sequence[Span]
"""Windows that adjoin one another, in order."""


class Pair(NamedTuple):
    """One customer and one metric."""

    customer_id: uuid.UUID
    metric_id: uuid.UUID


class Shape(NamedTuple):
    """What the text of a statement depends on beside the metrics: is there but one window, does a bound cut a cell."""

    single: bool
    cut: bool


class Statement(NamedTuple):
    """A statement with the values that it is given this time."""

    compiled: Compiled
    values: Mapping[str, Any]

    async def rows(self, connection: AsyncConnection, organization: str) -> Sequence[Any]:
        """Run it and return its rows as asyncpg gives them."""
        return await self.compiled.fetch(connection, organization=organization, **self.values)


_WHOLE = Shape(single=True, cut=False)
_SINCE = sa.bindparam("since", type_=INSTANT)
_FRESH = sa.bindparam("fresh", type_=ARRAY(sa.Uuid))
_LIMIT = sa.bindparam("limit", type_=sa.Integer)
# Statements about one metric that are kept, of each kind.
KEPT_MAX = 100


def next_customers(
    least: uuid.UUID, customer_ids: Sequence[uuid.UUID] | None, since: datetime | None, limit: int
) -> Statement:
    """Select the ids of the customers named, or of all that are not archived (or with `since`: were not), in order."""
    values = {"least": least, "limit": limit, "since": since, "customer_ids": customer_ids and list(customer_ids)}
    given = {name: value for name, value in values.items() if value is not None}
    return Statement(_next_customers(customer_ids is not None, since is not None), given)


@functools.lru_cache
def _next_customers(named: bool, changed: bool) -> Compiled:
    columns = customers.c
    wanted: sa.ColumnElement[bool] = columns.archived_at.is_(None)
    if changed:
        wanted = sa.or_(wanted, columns.archived_at >= _SINCE)
    if named:
        wanted = columns.id == sa.any_(_ids("customer_ids"))
    least = sa.bindparam("least", type_=sa.Uuid)
    return Compiled(
        sa.select(columns.id)
        .where(columns.organization_id == ORGANIZATION, columns.id >= least, wanted)
        .order_by(columns.id)
        .limit(_LIMIT)
    )


async def pairs_with_usage(
    metrics: Sequence[BillableMetric],
    span: Span,
    customer_ids: Sequence[uuid.UUID],
    least: Pair,
    limit: int,
    since: datetime | None,
) -> Statement:
    """Select the pairs of these customers, from `least` on, that have an event in the span: customer_id, metric_id.

    In order. With `since` the pairs with a change from then on instead.
    """
    values: dict[str, Any] = {
        "metric_ids": sorted(one.id for one in metrics),
        "customer_ids": list(customer_ids),
        "least_customer": least.customer_id,
        "least_metric": least.metric_id,
        "limit": limit,
    }
    if since is not None:
        # Cut cells whole: whether the part in the span changed is found out when its windows are read.
        values |= {"first": cell_floor(span[0]), "last": span[1], "since": since, "fresh": _fresh(metrics, since)}
        return Statement(_pairs_changed(), values)
    cut = _cut([span])
    values |= {"first": cell_ceil(span[0]), "last": cell_floor(span[1])}
    values |= {"part_starts": [start for start, _ in cut], "part_stops": [stop for _, stop in cut]}
    for i, part in enumerate(cut):
        values |= {f"start_{i}": part[0], f"stop_{i}": part[1]}
    compiled = await _PAIRS_WITH_USAGE.get(*defined(metrics, cut=bool(cut)), len(cut))
    return Statement(compiled, values)


@functools.lru_cache
def _pairs_changed() -> Compiled:
    metric, key = _candidates()
    cell = _of_key(usage_cells, key.c.key, metric.c.id, *_within(_WHOLE), level(by_groups=False))
    changed = sa.or_(_updated_at(cell, key) >= _SINCE, metric.c.id == sa.any_(_FRESH))
    return _pairs_where(metric, _exists(metric, key, cell, changed))


def _pairs_with_usage(metrics: Sequence[BillableMetric], with_records: bool, parts: int) -> Compiled:
    metric, key = _candidates()
    filled = sa.or_(usage_cells.c.counted > 0, usage_cells.c.skipped > 0)
    cell = _of_key(usage_cells, key.c.key, metric.c.id, *_within(_WHOLE), level(by_groups=False), filled)
    found = [_exists(metric, key, cell, key.c.held)]
    for i in range(parts):
        start, stop = (sa.bindparam(f"{name}_{i}", type_=INSTANT) for name in ("start", "stop"))
        events = _events_of_key(key.c.key, start, stop)
        for one in metrics:
            in_part = _exists(metric, key, events, key.c.held, metric_sql.matches(one, events))
            found.append(sa.and_(metric.c.id == one.id, in_part))
    if with_records:
        # Of all record metrics, however many, at once.
        records = of_records(_cut_events(_ids("customer_ids")))
        made = sa.select(records).where(metric_sql.matches(metric_sql.RECORDS, records)).subquery()
        found.append(sa.tuple_(customers.c.id, metric.c.id).in_(_of_owner(made, ("metric_id",))))
    return _pairs_where(metric, *found)


def _candidates() -> tuple[Any, LateralFromClause]:
    """Return the metrics that may have usage, as rows, and the keys of each customer."""
    return sa.func.unnest(_ids("metric_ids")).table_valued("id").render_derived("metric"), keys_of(customers.c.id)


def _exists(
    metric: Any, key: LateralFromClause, rows: LateralFromClause, *where: sa.ColumnElement[bool]
) -> sa.ColumnElement[bool]:
    """Condition that a pair has such rows under any key.

    A scalar subquery with a limit is probed pair by pair, in order, until there are enough. A condition of existence
    the planner may turn into a join over every cell there is.
    """
    select = sa.select(sa.true()).select_from(key.join(rows, sa.true())).where(*where)
    return select.correlate(customers, metric).limit(1).scalar_subquery().is_not(None)


def _pairs_where(metric: Any, *found: sa.ColumnElement[bool]) -> Compiled:
    least_customer, least_metric = (sa.bindparam(name, type_=sa.Uuid) for name in ("least_customer", "least_metric"))
    return Compiled(
        sa.select(customers.c.id, metric.c.id)
        .select_from(customers.join(metric, sa.true()))
        .where(
            customers.c.organization_id == ORGANIZATION,
            customers.c.id == sa.any_(_ids("customer_ids")),
            customers.c.id >= least_customer,
            sa.or_(customers.c.id > least_customer, metric.c.id >= least_metric),
            sa.or_(*found),
        )
        .order_by(customers.c.id, metric.c.id)
        .limit(_LIMIT)
    )


def next_cell(pair: Pair, instant: datetime, end: datetime) -> Statement:
    """Select the start of the pair's first cell that reaches beyond `instant` and starts before `end`, or NULL."""
    values = {"customer_id": pair.customer_id, "metric_id": pair.metric_id}
    return Statement(_next_cell(), {**values, "first": cell_floor(instant), "last": end})


@functools.lru_cache
def _next_cell() -> Compiled:
    customer_id, metric_id = (sa.bindparam(name, type_=sa.Uuid) for name in ("customer_id", "metric_id"))
    key = keys_of(customer_id)
    cell = _of_key(usage_cells, key.c.key, metric_id, *_within(_WHOLE), level(by_groups=False))
    return Compiled(sa.select(sa.func.min(cell.c.cell_start)).select_from(key.join(cell, sa.true())))


async def totals(
    metrics: Sequence[BillableMetric], pairs: Sequence[Pair], bounds: Bounds, since: datetime | None
) -> Statement:
    """Select what every window with a cell adds up to: pair, window, and the fields of Measures.

    With `since` only windows that changed from then on. `metrics` are those of the pairs; `pair` is the position in
    `pairs`, from 1 on, and `window` that in `bounds`. `counted` of a UNIQUE metric is the number of its values, not of
    the different ones.
    """
    shape, values = asked(metrics, pairs, bounds)
    if since is not None:
        fresh = set(_fresh(metrics, since))
        fresh_pairs = [number for number, pair in enumerate(pairs, 1) if pair.metric_id in fresh]
        values |= {"since": since, "fresh_pairs": fresh_pairs}
    aggregations = frozenset(one.aggregation for one in metrics)
    compiled = await _TOTALS.get(*defined(metrics, cut=shape.cut), aggregations, shape, since is not None)
    return Statement(compiled, values)


def _totals(
    metrics: Sequence[BillableMetric],
    with_records: bool,
    aggregations: Collection[Aggregation],
    shape: Shape,
    changed: bool,
) -> Compiled:
    pieces = select_pieces(metrics, shape, with_records=with_records, by_groups=False).subquery("pieces")
    key = _key(pieces)
    statement = sa.select(*key, *measures_of(aggregations, pieces)).group_by(*key)
    if changed:
        # Of a pair whose metric could be read first since then everything changed, however old its cells.
        fresh = pieces.c.pair == sa.any_(sa.bindparam("fresh_pairs", type_=ARRAY(sa.BigInteger)))
        statement = statement.having(sa.or_(sa.func.max(pieces.c.updated_at) >= _SINCE, fresh))
    return Compiled(statement)


async def distinct_totals(metrics: Sequence[BillableMetric], pairs: Sequence[Pair], bounds: Bounds) -> Statement:
    """Select the number of different values per window of UNIQUE metrics: pair, window, number.

    `pairs` are of these metrics.
    """
    shape, values = asked(metrics, pairs, bounds)
    return Statement(await _DISTINCT_TOTALS.get(tuple(metrics) if shape.cut else (), shape), values)


def _distinct_totals(metrics: Sequence[BillableMetric], shape: Shape) -> Compiled:
    values = select_distinct_pieces(metrics, shape).subquery("values")
    key = _key(values)
    return Compiled(sa.select(*key, sa.func.count(values.c.value_digest.distinct())).group_by(*key))


def group_totals(
    metric: BillableMetric, group_by: GroupBy, limit: int, pairs: Sequence[Pair], bounds: Bounds
) -> Statement:
    """Select what the groups of every window add up to: pair, window, group_value, and the fields of Measures.

    The values asked for, or the first `limit` of each window in byte order. `pairs` are of this metric.
    """
    shape, values = asked([metric], pairs, bounds)
    values |= {"limit": limit, **({"named": list(group_by.values)} if group_by.values else {})}
    return Statement(_group_totals(metric, group_by.key, bool(group_by.values), shape), values)


@functools.lru_cache(KEPT_MAX)
def _group_totals(metric: BillableMetric, name: str, named: bool, shape: Shape) -> Compiled:
    place = metric.group_properties.index(name) + 1
    metrics, with_records = defined([metric], cut=shape.cut)
    pieces = select_pieces(metrics, shape, with_records=with_records, by_groups=True).subquery("pieces")
    group_value = pieces.c.cell_group[place].collate("C")
    wanted: sa.ColumnElement[bool] = group_value.is_not(None)
    if named:
        wanted = group_value == sa.any_(sa.bindparam("named", type_=ARRAY(sa.Text)))
    key = [*_key(pieces), group_value.label("group_value")]
    rank = sa.func.row_number().over(partition_by=_key(pieces), order_by=group_value)
    ranked = (
        sa.select(*key, *measures_of({metric.aggregation}, pieces), rank.label("rank"))
        .where(wanted)
        .group_by(*_key(pieces), group_value)
        .having(any_event(pieces))
        .subquery("ranked")
    )
    columns: dict[str, sa.ColumnElement[Any]] = {one.name: one for one in ranked.c if one.name != "rank"}
    source: sa.FromClause = ranked
    if metric.aggregation is Aggregation.UNIQUE:
        values = select_distinct_pieces([metric], shape).subquery("values")
        value_key = [*_key(values), values.c.cell_group[place].collate("C").label("group_value")]
        number = sa.func.count(values.c.value_digest.distinct()).label("number")
        numbers = sa.select(*value_key, number).group_by(*value_key).subquery("numbers")
        same = [ranked.c[name] == numbers.c[name] for name in ("pair", "window", "group_value")]
        source = ranked.outerjoin(numbers, sa.and_(*same))
        columns["counted"] = sa.func.coalesce(numbers.c.number, 0)
    return Compiled(sa.select(*columns.values()).select_from(source).where(ranked.c.rank <= _LIMIT))


_PAIRS_WITH_USAGE = PerMetrics(_pairs_with_usage)
_TOTALS = PerMetrics(_totals)
_DISTINCT_TOTALS = PerMetrics(_distinct_totals)


def defined(metrics: Sequence[BillableMetric], *, cut: bool) -> tuple[tuple[BillableMetric, ...], bool]:
    """Return what the text of a statement depends on: the metrics that are not of records, and if there are others.

    Of whole cells neither matters.
    """
    if not cut:
        return (), False
    of_events = tuple(metric for metric in metrics if metric.record_key is None)
    return of_events, len(of_events) < len(metrics)


def asked(metrics: Sequence[BillableMetric], pairs: Sequence[Pair], bounds: Bounds) -> tuple[Shape, dict[str, Any]]:
    """Return the shape of windows of pairs, and what statements of `select_pieces` are given for them.

    `metrics` are those of the pairs, in the order in which the pieces are selected.
    """
    cut = _cut(bounds)
    values: dict[str, Any] = {
        "customer_ids": [pair.customer_id for pair in pairs],
        "metric_ids": [pair.metric_id for pair in pairs],
        "first": bounds[0][0],
        "last": bounds[-1][1],
    }
    if len(bounds) > 1:
        values["starts"] = [start for start, _ in bounds]
    if cut:
        values["first"], values["last"] = cell_ceil(bounds[0][0]), cell_floor(bounds[-1][1])
        values["cut_cells"] = sorted({cell_floor(start) for start, _ in cut})
        values["part_starts"], values["part_stops"] = [start for start, _ in cut], [stop for _, stop in cut]
        owners: dict[uuid.UUID, list[uuid.UUID]] = {}
        for pair in pairs:
            owners.setdefault(pair.metric_id, []).append(pair.customer_id)
        of_events, _ = defined(metrics, cut=True)
        for i, metric in enumerate(of_events):
            values[f"owners_{i}"] = owners.get(metric.id, [])
        records = [metric.id for metric in metrics if metric.record_key is not None]
        values["records"] = records
        values["record_owners"] = sorted({one for metric_id in records for one in owners.get(metric_id, ())})
    return Shape(len(bounds) == 1, bool(cut)), values


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


def select_pieces(
    metrics: Sequence[BillableMetric], shape: Shape, *, with_records: bool, by_groups: bool
) -> sa.CompoundSelect[Any]:
    """Columns: pair (its number, from 1 on), window, cell_group, updated_at and the MEASURES.

    One piece for all groups together or, `by_groups`, one for each. It takes the values that `asked` gives. Where no
    bound cuts a cell the metrics do not matter (see `defined`).
    """
    pair = _pair_rows()
    key = keys_of(pair.c.customer_id)
    cell = _of_key(usage_cells, key.c.key, pair.c.metric_id, *_within(shape), level(by_groups=by_groups))
    parts: list[sa.Select[Any]] = [_cell_pieces(pair, key, cell, _window(cell.c.cell_start, shape))]
    if not shape.cut:
        return sa.union_all(*parts)
    parts.append(_cut_times(shape, by_groups=by_groups))
    for i, metric in enumerate(metrics):
        events = _cut_events(_ids(f"owners_{i}"))
        wanted = metric if by_groups else replace(metric, group_keys=())
        made = metric_sql.cells(wanted, events, _window(events.c.timestamp, shape))
        parts.append(_of_pair(_with_updated_at(made), _PIECE))
    if with_records:
        # One part for all record metrics, however many.
        events = of_records(_cut_events(_ids("record_owners")))
        asked_for = events.c.metric_id == sa.any_(_ids("records"))
        made = metric_sql.cells(metric_sql.RECORDS, events, _window(events.c.timestamp, shape), asked_for)
        parts.append(_of_pair(_with_updated_at(made), _PIECE))
    return sa.union_all(*parts)


def _cell_pieces(pair: Any, key: Any, cell: Any, window: sa.ColumnElement[int]) -> sa.Select[Any]:
    return sa.select(
        pair.c.number.label("pair"),
        window.label("window"),
        cell.c.cell_group,
        _updated_at(cell, key).label("updated_at"),
        *(
            sa.case((key.c.held, cell.c[name]), else_=0 if name in {"counted", "skipped"} else None).label(name)
            for name in metric_sql.MEASURES
        ),
    ).select_from(pair.join(key, sa.true()).join(cell, sa.true()))


# What `select_pieces` has beside the pair.
_PIECE = ("cell_start", "cell_group", "updated_at", *metric_sql.MEASURES)


def _with_updated_at(rows: sa.Select[Any]) -> sa.Subquery:
    return rows.add_columns(sa.null().cast(INSTANT).label("updated_at")).subquery()


def _cut_times(shape: Shape, *, by_groups: bool) -> sa.Select[Any]:
    """Select for every part of a cut cell a piece with the time at which the cell changed, and nothing else."""
    pair = _pair_rows()
    key = keys_of(pair.c.customer_id)
    part = _part_rows()
    in_cell = usage_cells.c.cell_start == metric_sql.cell_start(part.c.start)
    cell = _of_key(usage_cells, key.c.key, pair.c.metric_id, in_cell, level(by_groups=by_groups))
    return sa.select(
        pair.c.number.label("pair"),
        _window(part.c.start, shape).label("window"),
        cell.c.cell_group,
        _updated_at(cell, key).label("updated_at"),
        *(
            (sa.literal_column("0") if name in {"counted", "skipped"} else sa.null().cast(usage_cells.c[name].type))
            for name in metric_sql.MEASURES
        ),
    ).select_from(pair.join(part, sa.true()).join(key, sa.true()).join(cell, sa.true()))


def _updated_at(cell: sa.FromClause, key: sa.FromClause) -> sa.ColumnElement[Any]:
    """Return when a cell became part of its customer's usage as it is, or ceased to be."""
    return sa.case((key.c.held, sa.func.greatest(cell.c.updated_at, key.c.since)), else_=key.c.since)


def select_distinct_pieces(metrics: Sequence[BillableMetric], shape: Shape) -> sa.CompoundSelect[Any]:
    """The different values of UNIQUE metrics, as `select_pieces` gives the cells; all pairs must be of these metrics.

    Columns: pair, window, cell_group, value_digest.
    """
    pair = _pair_rows()
    key = keys_of(pair.c.customer_id)
    cell = _of_key(usage_cells, key.c.key, pair.c.metric_id, *_within(shape))
    in_cell = [usage_distinct_values.c[name] == cell.c[name] for name in ("cell_start", "group_digest")]
    one = _of_key(usage_distinct_values, key.c.key, pair.c.metric_id, *in_cell)
    parts: list[sa.Select[Any]] = [
        sa.select(
            pair.c.number.label("pair"),
            _window(cell.c.cell_start, shape).label("window"),
            cell.c.cell_group,
            one.c.value_digest,
        ).select_from(pair.join(key, key.c.held).join(cell, sa.true()).join(one, sa.true()))
    ]
    for i, metric in enumerate(metrics if shape.cut else ()):
        events = _cut_events(_ids(f"owners_{i}"))
        made = metric_sql.distinct_values(metric, events, _window(events.c.timestamp, shape)).subquery()
        parts.append(_of_pair(made, ("cell_start", "cell_group", "value_digest")))
    return sa.union_all(*parts)


def measures_of(aggregations: Collection[Aggregation], pieces: sa.Subquery) -> list[sa.ColumnElement[Any]]:
    """Aggregate pieces of metrics that aggregate so to the fields of Measures."""
    columns = pieces.c
    made = {
        Aggregation.SUM: sa.func.sum(columns.sum),
        Aggregation.AVG: sa.func.sum(columns.sum),
        Aggregation.MIN: sa.func.min(columns.min),
        Aggregation.MAX: sa.func.max(columns.max),
        Aggregation.LATEST: metric_sql.latest(
            columns.latest_value, columns.latest_at, columns.latest_transaction_id, columns.latest_at.is_not(None)
        ),
    }
    # The cells of a metric have but one of them, and those of COUNT and UNIQUE none.
    quantity = sa.func.coalesce(*(one for aggregation, one in made.items() if aggregation in aggregations), sa.null())
    return [
        sa.cast(sa.func.sum(columns.counted), sa.BigInteger).label("counted"),
        sa.cast(sa.func.sum(columns.skipped), sa.BigInteger).label("skipped"),
        # As the text that is shown: asyncpg takes its time to make decimals, and Python to print them.
        sa.cast(sa.func.trim_scale(sa.cast(quantity, NUMERIC)), sa.Text).label("quantity"),
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


def _within(shape: Shape) -> list[sa.ColumnElement[bool]]:
    """Condition that a cell lies within the bounds and no bound cuts it."""
    start = usage_cells.c.cell_start
    conditions = [start >= sa.bindparam("first", type_=INSTANT), start < sa.bindparam("last", type_=INSTANT)]
    if shape.cut:
        conditions.append(start != sa.all_(sa.bindparam("cut_cells", type_=ARRAY(INSTANT))))
    return conditions


def level(*, by_groups: bool) -> sa.ColumnElement[bool]:
    """Condition that a cell is of one group, or the one of its hour for all groups together."""
    digest = usage_cells.c.group_digest
    # Nothing comes before the empty one; and unlike "is another", "comes after" is asked of the index.
    return digest > metric_sql.TOTAL if by_groups else digest == metric_sql.TOTAL


def _window(instant: sa.ColumnElement[Any], shape: Shape) -> sa.ColumnElement[int]:
    """Return the position in the bounds of the window that holds an instant."""
    if shape.single:
        return sa.literal_column("0", sa.Integer)
    starts = sa.bindparam("starts", type_=ARRAY(INSTANT))
    return sa.func.width_bucket(instant, starts, type_=sa.Integer) - sa.literal_column("1")


def _cut_events(customer_ids: sa.ColumnElement[Any]) -> sa.Subquery:
    """Select the events of these customers within the parts of cut cells, key by key and part by part."""
    keys = customer_keys.c
    owned = (keys.organization_id == ORGANIZATION, keys.customer_id == sa.any_(customer_ids))
    owner = sa.select(keys.key).where(*owned).subquery("owner")
    part = _part_rows()
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


def _of_pair(rows: sa.Subquery, names: Sequence[str]) -> sa.Select[Any]:
    """Select these columns of rows that have a customer_key and a metric_id, led by the number of their pair."""
    pair = _pair_rows()
    owned = _of_owner(rows, ("metric_id", *names)).subquery("owned")
    same = sa.and_(pair.c.customer_id == owned.c.customer_id, pair.c.metric_id == owned.c.metric_id)
    # Of how many rows there are the planner knows nothing, and would look through all pairs for each. A full join is
    # never done so; and this condition, unlike IS NOT NULL, does not let the planner make it another.
    both = sa.func.num_nulls(pair.c.number, owned.c.customer_id) == sa.literal_column("0")
    source = owned.join(pair, same, full=True)
    return sa.select(pair.c.number.label("pair"), *(owned.c[name] for name in names)).select_from(source).where(both)


def _fresh(metrics: Sequence[BillableMetric], since: datetime) -> list[uuid.UUID]:
    """Return which metrics could be read first after an instant: all their usage is new, however old their cells."""
    return [one.id for one in metrics if one.backfilled_at is not None and one.backfilled_at >= since]


def _key(pieces: sa.Subquery) -> list[sa.ColumnElement[Any]]:
    return [pieces.c.pair, pieces.c.window]


def _ids(name: str) -> sa.BindParameter[Any]:
    return sa.bindparam(name, type_=ARRAY(sa.Uuid))


def _pair_rows() -> Any:
    return (
        sa.func.unnest(_ids("customer_ids"), _ids("metric_ids"))
        .table_valued(sa.column("customer_id", sa.Uuid), sa.column("metric_id", sa.Uuid), with_ordinality="number")
        .render_derived("pair")
    )


def _part_rows() -> Any:
    starts, stops = (sa.bindparam(name, type_=ARRAY(INSTANT)) for name in ("part_starts", "part_stops"))
    return (
        sa.func.unnest(starts, stops)
        .table_valued(sa.column("start", INSTANT), sa.column("stop", INSTANT))
        .render_derived("part")
    )
