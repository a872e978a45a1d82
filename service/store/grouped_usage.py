"""Answers grouped usage queries page by page: one customer, one metric, a row per window and group."""

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.metrics import Aggregation, BillableMetric
from service.domain.usage import (
    Group,
    GroupedPage,
    GroupedPosition,
    GroupedQuery,
    GroupedWindow,
    Measures,
    changed_at,
    check_group_key,
    check_row_count,
    current_windows,
    value,
)
from service.domain.windows import Windows, cell_floor
from service.store import customers as customer_store
from service.store import metrics as metric_store
from service.store import usage_sql
from service.store.cells import ORGANIZATION
from service.store.compiled import Compiled
from service.store.tables import INSTANT, usage_cells
from service.store.usage import PAGE_S, SLICE_MAX, require_backfilled
from service.store.usage_sql import Pair

# How many cells one statement should have to add up; more only if a single window holds them.
CELLS_MAX = 20_000


async def grouped_page(
    connection: AsyncConnection,
    organization: str,
    query: GroupedQuery,
    begin: GroupedPosition | None,
    limit: int,
    bytes_max: int,
    now: datetime,
) -> GroupedPage:
    """Return up to `limit` rows (and about `bytes_max` bytes) of the query from `begin` on. Must run in one snapshot.

    Raises NotFound for an unknown customer or metric, FailedPrecondition for a metric that is still counting its past
    or a customer without a billing period at `now`, and InvalidArgument for an undeclared group key or too many rows.
    """
    customer = await customer_store.get_customer(connection, organization, query.customer_id)
    metric = await metric_store.get_metric(connection, organization, query.metric_id)
    require_backfilled([metric])
    check_group_key(query, metric)
    windows = query.windows or current_windows(query, customer, now)
    if begin is None:
        check_row_count(query, windows)
    reader = _Reader(connection, organization, query, windows, metric)
    rows: list[GroupedWindow] = []
    size = 0
    position = begin or GroupedPosition(0)
    clock = asyncio.get_running_loop().time
    late = clock() + PAGE_S
    while True:
        position = await reader.leap(position) if query.sparse else position
        if position.window >= len(windows):
            return GroupedPage(rows, windows, None)
        if len(rows) >= limit or size >= bytes_max or (position != begin and clock() > late):
            return GroupedPage(rows, windows, position)
        count = await reader.count(position, limit - len(rows))
        found = await reader.rows(position, count, limit - len(rows), bytes_max - size)
        rows += found.rows
        size += found.size
        position = found.following


class _Found(NamedTuple):
    rows: list[GroupedWindow]
    size: int
    following: GroupedPosition


@dataclass(frozen=True, slots=True)
class _Reader:
    """The parts of one query that every statement of a page needs."""

    connection: AsyncConnection
    organization: str
    query: GroupedQuery
    windows: Windows
    metric: BillableMetric

    @property
    def pair(self) -> Pair:
        return Pair(self.query.customer_id, self.query.metric_id)

    async def leap(self, position: GroupedPosition) -> GroupedPosition:
        """Pass over windows that are empty for certain."""
        bounds = self.windows.slice(position.window, 1)
        if not bounds:
            return position
        used = (await self._rows(usage_sql.next_cell(self.pair, bounds[0][0], self.windows.end)))[0][0]
        if used is None:
            return GroupedPosition(len(self.windows))
        index = self.windows.index_of(max(used, bounds[0][0]))
        return position if index == position.window else GroupedPosition(index)

    async def count(self, position: GroupedPosition, limit: int) -> int:
        """Decide how many windows one statement takes: those that hold CELLS_MAX cells, but at least one."""
        most = max(1, SLICE_MAX // self.query.combinations)
        if not self.query.sparse:
            most = min(most, limit)  # each gives at least one row
        if position.window + 1 == len(self.windows):
            return 1
        bounds = self.windows.slice(position.window, 1)
        by_groups = bool(self.query.group_key)
        after = await self._rows(_cell_after(self.pair, by_groups, bounds[0][0], self.windows.end, CELLS_MAX))
        if not after:
            return most
        return max(1, min(most, self.windows.index_of(max(after[0][0], bounds[0][0])) - position.window))

    async def rows(self, position: GroupedPosition, count: int, limit: int, bytes_max: int) -> _Found:
        """Return the next rows of `count` windows, and where to go on."""
        bounds = self.windows.slice(position.window, count)
        query = self.query
        shape, values = usage_sql.asked([self.metric], [self.pair], bounds)
        wanted = _Selection(
            self.metric,
            shape,
            query.group_key,
            frozenset(query.filters),
            sparse=query.sparse,
            filled=bool(query.group_key) and query.updated_since is None,
            changed=self._changes_matter(),
            following=position.group is not None,
        )
        # One more than is wanted tells whether these windows hold more.
        values |= {"since": query.updated_since, "limit": limit + 1, "bytes_max": bytes_max, "number": len(bounds)}
        values |= {"row_bytes": query.row_bytes, **_place("after", 0, position.group or ())}
        values |= {f"named_{query.group_key.index(name)}": list(named) for name, named in query.filters.items()}
        found = await self._rows(usage_sql.Statement(_rows(wanted), values))
        places = 1 + len(self.query.group_key)
        numbers: dict[tuple[Any, ...], int] = {}
        if found and self.metric.aggregation is Aggregation.UNIQUE:
            values |= _place("last", found[-1][0], tuple(found[-1][1:places]))
            statement = usage_sql.Statement(_distinct_numbers(wanted), values)
            numbers = {tuple(row[:places]): row[places] for row in await self._rows(statement)}
        rows = []
        for row in found[:limit]:
            measures = Measures(*row[places:])
            if self.metric.aggregation is Aggregation.UNIQUE:
                measures = measures._replace(counted=numbers.get(tuple(row[:places]), 0))
            if self.query.omit_empty and not (measures.counted or measures.skipped):
                continue
            start, stop = bounds[row[0]]
            rows.append(
                GroupedWindow(
                    start=start,
                    end=stop,
                    group=tuple(row[1:places]),
                    value=value(self.metric.aggregation, measures),
                    skipped=measures.skipped,
                    updated_at=changed_at(self.metric, measures.updated_at),
                )
            )
        size = sum(self._row_bytes(row[1:places]) for row in found[:limit])
        if len(found) <= limit and size < bytes_max:
            return _Found(rows, size, GroupedPosition(position.window + count))
        last = found[:limit][-1]
        return _Found(rows, size, GroupedPosition(position.window + last[0], tuple(last[1:places])))

    def _row_bytes(self, group: Group) -> int:
        return self.query.row_bytes + sum(len(one.encode()) for one in group if one)

    def _changes_matter(self) -> bool:
        """Whether rows are left out that did not change: not those of a metric that could be read first since then."""
        since, first_read = self.query.updated_since, self.metric.backfilled_at
        return since is not None and (first_read is None or first_read < since)

    async def _rows(self, statement: usage_sql.Statement) -> Sequence[Any]:
        return await statement.rows(self.connection, self.organization)


class _Selection(NamedTuple):
    """What the text of the statements depends on: the metric, the windows' shape, and what of their groups is wanted.

    `filtered` are the properties with filters. `filled` leaves out groups without events, `changed` rows that did not
    change, `following` those up to a group of the first window.
    """

    metric: BillableMetric
    shape: usage_sql.Shape
    group_key: tuple[str, ...]
    filtered: frozenset[str]
    sparse: bool
    filled: bool
    changed: bool
    following: bool

    def keyed(self, pieces: sa.CompoundSelect[Any]) -> sa.Subquery:
        """Select the pieces that pass the filters, each with the values of the group key as columns of their own."""
        source = pieces.subquery("pieces")
        values = []
        for i, name in enumerate(self.group_key):
            place = self.metric.group_properties.index(name) + 1
            values.append(source.c.cell_group[place].collate("C").label(f"value_{i}"))
        passes = [values[i] == sa.any_(_named(i)) for i, name in enumerate(self.group_key) if name in self.filtered]
        return sa.select(source, *values).where(*passes).subquery("keyed")

    def key(self, rows: sa.FromClause) -> list[sa.ColumnElement[Any]]:
        """Return the columns that tell one row from another: the window, and the values of the group key."""
        return [rows.c.window, *(rows.c[f"value_{i}"] for i in range(len(self.group_key)))]

    def follows(self, columns: Sequence[sa.ColumnElement[Any]], place: str) -> sa.ColumnElement[bool]:
        """Condition that a row comes after a group of a window, given as `_place` does."""
        given: list[sa.ColumnElement[Any]] = [sa.bindparam(f"{place}_window", type_=sa.Integer)]
        for i in range(len(self.group_key)):
            given.append(sa.bindparam(f"{place}_missing_{i}", type_=sa.Boolean))
            given.append(sa.bindparam(f"{place}_value_{i}", type_=sa.Text))
        return sa.tuple_(*_order(columns)) > sa.tuple_(*given)


def _place(place: str, window: int, group: Group) -> dict[str, Any]:
    values: dict[str, Any] = {f"{place}_window": window}
    for i, one in enumerate(group):
        values |= {f"{place}_missing_{i}": one is None, f"{place}_value_{i}": one or ""}
    return values


def _named(i: int) -> sa.BindParameter[Any]:
    return sa.bindparam(f"named_{i}", type_=ARRAY(sa.Text))


@functools.lru_cache(usage_sql.KEPT_MAX)
def _rows(wanted: _Selection) -> Compiled:
    """Select the next rows of a grouped listing, in order: window, the values of the key, and the fields of Measures.

    At most `limit`, and about `bytes_max` bytes. Unless such rows are to be left out, every window has a row for each
    combination of the filters' values that no group matches; without filters that is one row, without values, for a
    window without groups. `counted` of a UNIQUE metric is the number of its values, not of the different ones.
    """
    metrics, with_records = usage_sql.defined([wanted.metric], cut=wanted.shape.cut)
    by_groups = bool(wanted.group_key)
    pieces = wanted.keyed(
        usage_sql.select_pieces(metrics, wanted.shape, with_records=with_records, by_groups=by_groups)
    )
    groups = sa.select(*wanted.key(pieces), *usage_sql.measures_of({wanted.metric.aggregation}, pieces))
    groups = groups.group_by(*wanted.key(pieces))
    if wanted.changed:
        groups = groups.having(sa.func.max(pieces.c.updated_at) >= sa.bindparam("since", type_=INSTANT))
    elif wanted.filled:
        groups = groups.having(usage_sql.any_event(pieces))
    found = groups.cte("groups")
    parts: list[sa.Select[Any]] = [sa.select(found)]
    if not wanted.sparse:
        parts.append(_unmatched_combinations(wanted, found))
    listed = sa.union_all(*parts).subquery("listed")
    key = wanted.key(listed)
    after = [wanted.follows(key, "after")] if wanted.following else []
    limit, bytes_max, row_bytes = (sa.bindparam(name, type_=sa.Integer) for name in ("limit", "bytes_max", "row_bytes"))
    following = sa.select(listed).where(*after).order_by(*_order(key)).limit(limit).subquery("following")
    key = wanted.key(following)
    size = sum((sa.func.octet_length(sa.func.coalesce(one, "")) for one in key[1:]), row_bytes)
    before = sa.func.sum(size).over(order_by=_order(key)) - size
    cut = sa.select(following, before.label("before")).subquery("cut")
    return Compiled(
        sa.select(*(one for one in cut.c if one.name != "before"))
        .where(cut.c.before < bytes_max)
        .order_by(*_order(wanted.key(cut)))
    )


@functools.lru_cache(usage_sql.KEPT_MAX)
def _distinct_numbers(wanted: _Selection) -> Compiled:
    """Select the number of different values per group of a UNIQUE metric, up to the `last`: window, values, number."""
    values = wanted.keyed(usage_sql.select_distinct_pieces([wanted.metric], wanted.shape))
    key = wanted.key(values)
    within = [sa.not_(wanted.follows(key, "last"))]
    if wanted.following:
        within.append(wanted.follows(key, "after"))
    return Compiled(sa.select(*key, sa.func.count(values.c.value_digest.distinct())).where(*within).group_by(*key))


def _cell_after(pair: Pair, by_groups: bool, instant: datetime, end: datetime, number: int) -> usage_sql.Statement:
    """Select the start of the cell of the pair that comes after `number` others from `instant` on, if there is one.

    Of the cells of all groups or, `by_groups`, of those of each.
    """
    values = {"customer_id": pair.customer_id, "metric_id": pair.metric_id, "number": number, "limit": number + 1}
    return usage_sql.Statement(_compiled_cell_after(by_groups), {**values, "first": cell_floor(instant), "last": end})


@functools.lru_cache
def _compiled_cell_after(by_groups: bool) -> Compiled:
    customer_id, metric_id = (sa.bindparam(name, type_=sa.Uuid) for name in ("customer_id", "metric_id"))
    first, last = (sa.bindparam(name, type_=INSTANT) for name in ("first", "last"))
    number, limit = (sa.bindparam(name, type_=sa.Integer) for name in ("number", "limit"))
    key = usage_sql.keys_of(customer_id)
    columns = usage_cells.c
    of_key = (
        columns.organization_id == ORGANIZATION,
        columns.metric_id == metric_id,
        columns.customer_key == key.c.key,
        columns.cell_start >= first,
        columns.cell_start < last,
        usage_sql.level(by_groups=by_groups),
    )
    # Of no key more than are counted off, however many it has.
    cell = sa.select(columns.cell_start).where(*of_key).order_by(columns.cell_start).limit(limit)
    start = cell.correlate_except(usage_cells).lateral().c.cell_start
    rows = sa.select(start).select_from(key.join(start.table, sa.true())).order_by(start)
    return Compiled(rows.offset(number).limit(sa.literal_column("1")))


def _unmatched_combinations(wanted: _Selection, groups: sa.CTE) -> sa.Select[Any]:
    """Select, as `_rows` does, the combinations of the filters' values that no group of a window matches."""
    last = sa.bindparam("number", type_=sa.Integer) - sa.literal_column("1")
    source: Any = sa.func.generate_series(sa.literal_column("0"), last).table_valued("window").render_derived("windows")
    window = source.c.window
    columns: list[sa.ColumnElement[Any]] = [window]
    same = [groups.c.window == window]
    for i, name in enumerate(wanted.group_key):
        if name not in wanted.filtered:
            columns.append(sa.null().cast(sa.Text).collate("C").label(f"value_{i}"))
            continue
        named = sa.func.unnest(_named(i)).table_valued(sa.column("value", sa.Text))
        named = named.render_derived(f"named_{i}")
        source = source.join(named, sa.true())
        columns.append(named.c.value.collate("C").label(f"value_{i}"))
        same.append(groups.c[f"value_{i}"] == named.c.value.collate("C"))
    matched = sa.exists().where(*same)
    nothing = [
        sa.literal_column("0") if name in {"counted", "skipped"} else sa.null().cast(groups.c[name].type)
        for name in Measures._fields
    ]
    return sa.select(*columns, *nothing).select_from(source).where(sa.not_(matched))


def _order(key: Sequence[sa.ColumnElement[Any]]) -> list[sa.ColumnElement[Any]]:
    """Return what orders rows by window and then by the values of the key in byte order, missing ones last."""
    found = [key[0]]
    for one in key[1:]:
        found += [one.is_(None), sa.func.coalesce(one, "").collate("C")]
    return found
