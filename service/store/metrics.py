"""Every statement about billable metrics and the counting of their past."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import checks
from service.domain.metrics import (
    METRICS_MAX,
    RECORD_KEYS_MAX,
    WEIGHT_MAX,
    Aggregation,
    BillableMetric,
    PropertyFilter,
    record_metric,
    size_violation,
)
from service.domain.windows import CELL, cell_floor
from service.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Reason, invalid
from service.store import cells, events, organizations
from service.store.tables import billable_metrics, texts, usage_cells, usage_events

# The end of a chunk is chosen so that about this many events are counted again while writers wait.
BACKFILL_EVENTS = 20_000
_FIELDS = "billable_metric.custom_fields"

_METRICS = sa.select(
    *(column for column in billable_metrics.c if column.name not in {"organization_id", "create_digest"})
).where(billable_metrics.c.organization_id == cells.ORGANIZATION)
# Asked for by every usage query, and so made once.
_NAMED = _METRICS.where(billable_metrics.c.id == sa.any_(sa.bindparam("ids", type_=ARRAY(sa.Uuid))))


async def create_metric(connection: AsyncConnection, organization: str, metric: BillableMetric) -> BillableMetric:
    """Store a metric, or return the stored one when it was created with the same content.

    If the organization has events, the metric's past is left to `backfill_chunk`. A metric with a key comes with the
    key's record metric. Raises AlreadyExists when the id was
    created with other content or the key is taken.
    """
    await organizations.lock_exclusive(connection, organization)
    others = [one for one in await event_metrics(connection, organization) if one.id != metric.id]
    if len(others) >= METRICS_MAX or sum(one.weight for one in (*others, metric)) > WEIGHT_MAX:
        message = (
            f"would be one metric too many: an organization can have {METRICS_MAX}, archived ones included, "
            "and fewer if they have many filters and group keys"
        )
        raise invalid("billable_metric", Reason.LIMIT_EXCEEDED, message)
    first, last = await events.time_span(connection, organization) or (None, None)
    statement = (
        insert(billable_metrics)
        .values(
            organization_id=organization,
            id=metric.id,
            name=metric.name,
            key=metric.key,
            definition=metric.definition(),
            create_digest=metric.digest(),
            created_at=sa.func.clock_timestamp(),
            # Hours before the first event have nothing to count: writers may count into them at once.
            backfilled_until=first and cell_floor(first),
            backfill_from=first and cell_floor(first),
            backfill_to=last and cell_floor(last) + CELL,
        )
        .on_conflict_do_nothing()
        .returning(billable_metrics.c.id)
    )
    if (await connection.execute(statement)).first() is not None:
        await organizations.bump_catalog_version(connection, organization)
        keys = [metric.key] if metric.key else []
        await ensure_record_metrics(connection, organization, keys, "billable_metric.key")
        return await get_metric(connection, organization, metric.id)
    query = sa.select(billable_metrics.c.create_digest).where(*_one(organization, metric.id))
    digest = (await connection.execute(query)).scalar_one_or_none()
    if digest is None:
        message = f"Another billable metric has the key {metric.key!r}."
        raise AlreadyExists(Reason.METRIC_KEY_IN_USE, message, metadata={"key": str(metric.key)})
    if digest != metric.digest():
        raise AlreadyExists(
            Reason.ID_IN_USE,
            f"Billable metric {metric.id} was created with other content, which cannot change: use a new id.",
            metadata={"id": str(metric.id)},
        )
    return await get_metric(connection, organization, metric.id)


async def get_metric(connection: AsyncConnection, organization: str, metric_id: uuid.UUID) -> BillableMetric:
    """Return one metric; raises NotFound."""
    return (await get_metrics(connection, organization, [metric_id]))[0]


async def get_metrics(connection: AsyncConnection, organization: str, ids: Sequence[uuid.UUID]) -> list[BillableMetric]:
    """Return the metrics with these ids, in that order; raises NotFound naming every id that has none."""
    rows = await connection.execute(_NAMED, {"organization": organization, "ids": list(ids)})
    found = {row.id: _metric(row) for row in rows}
    missing = ", ".join(str(one) for one in ids if one not in found)
    if missing:
        raise NotFound(
            Reason.BILLABLE_METRIC_NOT_FOUND, f"No billable metric has the id {missing}.", metadata={"ids": missing}
        )
    return [found[one] for one in ids]


async def list_metrics(
    connection: AsyncConnection, organization: str, *, include_archived: bool, after: uuid.UUID | None, limit: int
) -> list[BillableMetric]:
    """Return metrics by id, after the one given."""
    where: list[sa.ColumnElement[bool]] = [] if include_archived else [billable_metrics.c.archived_at.is_(None)]
    if after is not None:
        where.append(billable_metrics.c.id > after)
    return await _metrics(connection, organization, *where, limit=limit)


async def countable_metrics(
    connection: AsyncConnection, organization: str, since: datetime | None
) -> list[BillableMetric]:
    """Return the metrics that "all metrics" means: neither archived nor still counting their past.

    Record metrics are among them once something was reported under their keys.
    With `since` also those archived from then on: who read them before must learn of their last changes.
    """
    columns = billable_metrics.c
    wanted: sa.ColumnElement[bool] = columns.archived_at.is_(None)
    if since is not None:
        wanted = sa.or_(wanted, columns.archived_at >= since)
    cell = usage_cells.c
    reported = sa.exists().where(cell.organization_id == organization, cell.metric_id == columns.id)
    used = sa.or_(columns.record_key.is_(None), reported)
    return await _metrics(connection, organization, wanted, columns.backfilled_until.is_(None), used)


async def metric_names(connection: AsyncConnection, organization: str) -> dict[uuid.UUID, str]:
    """Return the name of every metric, archived ones included, by id."""
    query = sa.select(billable_metrics.c.id, billable_metrics.c.name).where(
        billable_metrics.c.organization_id == organization
    )
    return {row.id: row.name for row in await connection.execute(query)}


async def all_metrics(connection: AsyncConnection, organization: str) -> list[BillableMetric]:
    """Return every metric, archived ones and record metrics included."""
    return await _metrics(connection, organization)


async def event_metrics(connection: AsyncConnection, organization: str) -> list[BillableMetric]:
    """Return every metric that counts events sent as such, archived ones included."""
    return await _metrics(connection, organization, billable_metrics.c.record_key.is_(None))


async def record_metrics(
    connection: AsyncConnection, organization: str, keys: Collection[str]
) -> dict[str, BillableMetric]:
    """Return the record metrics of those of the keys that have one, by key."""
    found = await _metrics(connection, organization, billable_metrics.c.record_key == sa.any_(texts(list(keys))))
    return {str(metric.record_key): metric for metric in found}


async def metrics_by_key(
    connection: AsyncConnection, organization: str, keys: Collection[str]
) -> dict[str, BillableMetric]:
    """Return the metrics that records name by these keys, archived ones included, by key."""
    found = await _metrics(connection, organization, billable_metrics.c.key == sa.any_(texts(list(keys))))
    return {str(metric.key): metric for metric in found}


async def count_record_metrics(connection: AsyncConnection, organization: str) -> int:
    """Return how many record metrics the organization has."""
    columns = billable_metrics.c
    query = sa.select(sa.func.count()).where(columns.organization_id == organization, columns.record_key.is_not(None))
    number: int = (await connection.execute(query)).scalar_one()
    return number


async def ensure_record_metrics(
    connection: AsyncConnection, organization: str, keys: Collection[str], field: str
) -> None:
    """Make the record metrics of those of the keys that have none.

    They need no lock and no new version of the catalog: no event can have been made from records of such a key yet, and
    the statements of writers hold no record metrics. Raises InvalidArgument of the `field` that names the keys when the
    organization would have too many.
    """
    if not keys:
        return
    known = await record_metrics(connection, organization, keys)
    rows = [
        {
            "organization_id": organization,
            "id": metric.id,
            "name": metric.name,
            "record_key": metric.record_key,
            "definition": metric.definition(),
            "create_digest": metric.digest(),
            "created_at": sa.func.clock_timestamp(),
        }
        # In order: two transactions that make the same ones wait for each other in one direction only.
        for metric in map(record_metric, sorted(set(keys) - set(known)))
    ]
    if not rows:
        return
    if await count_record_metrics(connection, organization) + len(rows) > RECORD_KEYS_MAX:
        message = f"would be too many keys of usage records: an organization can have {RECORD_KEYS_MAX:,}"
        raise invalid(field, Reason.LIMIT_EXCEEDED, message)
    await connection.execute(insert(billable_metrics).values(rows).on_conflict_do_nothing())


async def update_metric(
    connection: AsyncConnection,
    organization: str,
    metric_id: uuid.UUID,
    *,
    name: str | None = None,
    custom_fields: Mapping[str, str] | None = None,
    more_custom_fields: Mapping[str, str] | None = None,
    archive: bool = False,
) -> BillableMetric:
    """Give a metric another name, other custom fields, or some more of them beside those it has; None = as it is.

    Archives it too if told so. Raises NotFound, InvalidArgument if the custom fields make it too large, and what
    `archive_metric` does.
    """
    if archive:
        await archive_metric(connection, organization, metric_id)
    definition = billable_metrics.c.definition
    values: dict[str, object] = {}
    if name is not None:
        values["name"] = name
    if custom_fields is not None:
        values["definition"] = definition.concat(sa.literal({"custom_fields": dict(custom_fields)}, JSONB))
    if more_custom_fields is not None:
        together = definition["custom_fields"].concat(sa.literal(dict(more_custom_fields), JSONB))
        values["definition"] = definition.concat(sa.func.jsonb_build_object("custom_fields", together))
    if values:
        await connection.execute(sa.update(billable_metrics).where(*_one(organization, metric_id)).values(values))
    metric = await get_metric(connection, organization, metric_id)
    if "definition" in values:
        faults = [size_violation(metric, "billable_metric"), *checks.custom_fields(_FIELDS, metric.custom_fields)]
        if found := [fault for fault in faults if fault]:
            raise InvalidArgument(found)
    return metric


async def archive_metric(connection: AsyncConnection, organization: str, metric_id: uuid.UUID) -> BillableMetric:
    """Archive a metric now, keeping the time of the first archiving; raises NotFound.

    Events stored already with a timestamp after the archive time (they may come a day ahead) are taken out again.
    Raises FailedPrecondition for a record metric: what is reported must count.
    """
    await organizations.lock_exclusive(connection, organization)
    if (await get_metric(connection, organization, metric_id)).record_key is not None:
        message = f"Billable metric {metric_id} sums what records report under its key, and cannot be archived."
        raise FailedPrecondition(Reason.RECORD_METRIC, message, metadata={"id": str(metric_id)})
    statement = (
        sa.update(billable_metrics)
        .where(*_one(organization, metric_id), billable_metrics.c.archived_at.is_(None))
        .values(archived_at=sa.func.clock_timestamp())
        .returning(billable_metrics.c.archived_at)
    )
    archived_at = (await connection.execute(statement)).scalar_one_or_none()
    metric = await get_metric(connection, organization, metric_id)
    if archived_at is not None:
        await organizations.bump_catalog_version(connection, organization)
        # Hours that the backfill has not reached hold no cells yet; it will leave out what it must.
        end = metric.backfilled_until
        if end is None or end > cell_floor(archived_at):
            await cells.recompute(connection, organization, metric, cell_floor(archived_at), end)
    return metric


async def backfilling(connection: AsyncConnection) -> list[tuple[str, uuid.UUID]]:
    """Return the organization and id of every metric that is still counting its past, oldest first."""
    columns = billable_metrics.c
    query = (
        sa.select(columns.organization_id, columns.id)
        .where(columns.backfilled_until.is_not(None))
        .order_by(columns.created_at, columns.id)
    )
    return [(row.organization_id, row.id) for row in await connection.execute(query)]


async def backfill_chunk(
    connection: AsyncConnection, organization: str, metric_id: uuid.UUID, *, events_max: int = BACKFILL_EVENTS
) -> bool:
    """Count the next hours of a metric's past; False once all of it is counted.

    Writers wait meanwhile. They count an event only in hours that are done, so every event is counted once: here if it
    was stored before its hour's turn, by its writer if after. Safe to repeat, to interrupt and to run in many replicas.
    """
    await organizations.lock_exclusive(connection, organization)
    metric = await get_metric(connection, organization, metric_id)
    start = metric.backfilled_until
    if start is None:
        return False
    # The timestamps of the next events decide where the chunk ends, so that sparse history is passed in one step.
    columns = usage_events.c
    ahead = (
        sa.select(columns.timestamp)
        .where(columns.organization_id == organization, columns.timestamp >= start)
        .order_by(columns.timestamp)
        .limit(events_max)
        .subquery()
    )
    first, last, number = (
        await connection.execute(
            sa.select(sa.func.min(ahead.c.timestamp), sa.func.max(ahead.c.timestamp), sa.func.count())
        )
    ).one()
    if first is None:
        first = last = start
    # Fewer than asked for: these are the last ones, and no writer can add to them before this transaction ends.
    # Else the hours that are known whole, at least one.
    end = cell_floor(last) + CELL if number < events_max else max(cell_floor(last), cell_floor(first) + CELL)
    await cells.recompute(connection, organization, metric, start, end)
    until = None if number < events_max else end
    ended = sa.func.clock_timestamp() if until is None else None
    await connection.execute(
        sa.update(billable_metrics)
        .where(*_one(organization, metric_id))
        .values(backfilled_until=until, backfilled_at=ended)
    )
    await organizations.bump_catalog_version(connection, organization)
    return until is not None


async def _metrics(
    connection: AsyncConnection, organization: str, *where: sa.ColumnElement[bool], limit: int | None = None
) -> list[BillableMetric]:
    query = _METRICS.where(*where).order_by(billable_metrics.c.id).limit(limit)
    return [_metric(row) for row in await connection.execute(query, {"organization": organization})]


def _one(organization: str, metric_id: uuid.UUID) -> tuple[sa.ColumnElement[bool], ...]:
    return billable_metrics.c.organization_id == organization, billable_metrics.c.id == metric_id


def _metric(row: "sa.Row[Any]") -> BillableMetric:
    definition = row.definition
    return BillableMetric(
        id=row.id,
        name=row.name,
        key=row.key,
        aggregation=Aggregation(definition["aggregation"]),
        aggregation_key=definition["aggregation_key"],
        event_types=tuple(definition["event_types"]),
        excluded_event_types=tuple(definition["excluded_event_types"]),
        property_filters=tuple(
            PropertyFilter(one["name"], one["exists"], tuple(one["in"]), tuple(one["not_in"]))
            for one in definition["property_filters"]
        ),
        group_keys=tuple(tuple(key) for key in definition["group_keys"]),
        custom_fields=definition["custom_fields"],
        created_at=row.created_at,
        archived_at=row.archived_at,
        backfilled_until=row.backfilled_until,
        backfilled_at=row.backfilled_at,
        backfill_progress=_progress(row.backfilled_until, row.backfill_from, row.backfill_to),
        record_key=row.record_key,
    )


def _progress(until: datetime | None, start: datetime, end: datetime) -> float | None:
    if until is None:
        return None
    return min(0.99, max(timedelta(0), until - start) / max(CELL, end - start))
