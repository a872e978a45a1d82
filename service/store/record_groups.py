"""Every statement about stored usage record groups: reading and listing them, and every change of their state."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.events import RESERVED_PREFIX
from service.domain.partners import Partner
from service.domain.record_groups import (
    STATUS_ORDER,
    GroupQuery,
    GroupStatus,
    RecordState,
    StoredGroup,
    StoredRecord,
)
from service.domain.record_reports import MESSAGE_MAX
from service.domain.usage import PAGE_BYTES_MAX
from service.errors import FailedPrecondition, NotFound, Reason, Violation
from service.store import entitlements as entitlement_store
from service.store import events as event_store
from service.store import metrics as metric_store
from service.store import organizations
from service.store.customers import buyer_id_of, with_buyer_id
from service.store.tables import INSTANT, texts, usage_record_groups, usage_records

# About what a group and each of its records take on the wire beside their texts.
_GROUP_BYTES, _RECORD_BYTES = 300, 120
# How many of the newest groups are looked through for those whose meta_info contains something.
_LOOKED_THROUGH = 5_000

# What `metering_groups_containing` tells of each group.
_OF_CONTAINING = (
    "id",
    "created_at",
    "serial_id",
    "partner",
    "product_id",
    "entitlement_id",
    "customer_id",
    "status",
    "source",
)

Key = tuple[datetime, int]
"""Time of creation and serial id: what groups are listed by, the newest first."""


class Found(NamedTuple):
    """Groups, newest first, and the one after which to go on (None = there are no more)."""

    groups: Sequence[StoredGroup]
    following: Key | None


async def get_group(connection: AsyncConnection, organization: str, group_id: str) -> StoredGroup:
    """Return one group; raises NotFound."""
    found = await get_groups(connection, organization, [group_id])
    if not found:
        raise _not_found(group_id)
    return found[group_id]


async def get_groups(connection: AsyncConnection, organization: str, ids: Sequence[str]) -> dict[str, StoredGroup]:
    """Return the groups that have these ids, with their records, by id."""
    columns = usage_records.c
    query = (
        sa.select(usage_records)
        .where(columns.organization_id == organization, columns.group_id == sa.any_(texts(ids)))
        .order_by(columns.group_id, columns.position)
    )
    records: dict[str, list[StoredRecord]] = {}
    for row in await connection.execute(query):
        record = StoredRecord(
            row.key, row.quantity, row.properties, RecordState(row.state), row.report_id, row.failure or ""
        )
        records.setdefault(row.group_id, []).append(record)
    own = usage_record_groups.c
    named = (own.organization_id == organization, own.id == sa.any_(texts(ids)))
    rows = await connection.execute(_GROUPS.where(*named))
    return {row.id: _group(row, records.get(row.id, ())) for row in rows}


async def groups_within(
    connection: AsyncConnection, organization: str, ids: Sequence[str], bytes_max: int
) -> dict[str, StoredGroup]:
    """Return the groups that have these ids, in their order, as many as take about so many bytes."""
    sizes = await _sizes(connection, organization, ids)
    wanted = []
    for one in dict.fromkeys(ids):
        bytes_max -= sizes[one]
        if bytes_max < 0:
            break
        wanted.append(one)
    return await get_groups(connection, organization, wanted)


async def list_groups(
    connection: AsyncConnection, organization: str, query: GroupQuery, after: Key | None, skip: int, limit: int
) -> Found:
    """Return up to `limit` groups after the one given and `skip` more, or as many as make about one page of bytes."""
    await plan_for_values(connection)
    for keys in _keys(organization, query, after):
        rows = (await connection.execute(keys.offset(skip or None).limit(limit + 1))).all()
        if len(rows) > limit:
            break
    sizes = await _sizes(connection, organization, [row.id for row in rows])
    wanted: list[Any] = []
    size = 0
    for row in rows[:limit]:
        size += sizes[row.id]
        if wanted and size > PAGE_BYTES_MAX:
            break
        wanted.append(row)
    found = await get_groups(connection, organization, [row.id for row in wanted])
    following = (wanted[-1].created_at, wanted[-1].serial_id) if len(wanted) < len(rows) else None
    return Found([found[row.id] for row in wanted], following)


async def delete_group(connection: AsyncConnection, organization: str, group_id: str) -> StoredGroup:
    """Delete a group that is not reported, and take its records out of usage; raises NotFound, FailedPrecondition."""
    await organizations.lock_shared(connection, organization)
    entitlement_id = (await get_group(connection, organization, group_id)).entitlement_id
    await entitlement_store.lock_entitlement(connection, organization, entitlement_id)
    group = await _locked(connection, organization, group_id)
    if group.status is GroupStatus.DELETED:
        return group
    states = {record.state for record in group.records}
    if not states <= {RecordState.CREATED, RecordState.INVALID}:
        known = "some of its records were reported" if RecordState.REPORTED in states else "its records are in a report"
        raise _illegal(
            group, f"only a CREATED or INVALID group of which nothing is in a report can be deleted: {known}"
        )
    # What failed may have left a rest before it did, which a later report told.
    carried = (await entitlement_store.get_entitlement(connection, organization, entitlement_id)).carried
    if owed := [one.key for one in group.records if one.report_id and carried.get(one.key, 0) < 0]:
        known = f"more of {', '.join(map(repr, owed))} was told than is left without it; that evens out as more is used"
        raise _illegal(group, f"it cannot be deleted now: {known}")
    metrics = await metric_store.record_metrics(connection, organization, {record.key for record in group.records})
    ids = [transaction_id(group_id, position) for position in range(len(group.records))]
    await event_store.void_events(connection, organization, ids, list(metrics.values()))
    await _set_states(connection, organization, [group_id], RecordState.DELETED)
    await derive_statuses(connection, organization, [group_id])
    return await get_group(connection, organization, group_id)


async def retry_group(connection: AsyncConnection, organization: str, group_id: str) -> StoredGroup:
    """Let the failed records of a group wait for the next report; raises NotFound, FailedPrecondition."""
    group = await _locked(connection, organization, group_id)
    if group.status is GroupStatus.CREATED:
        return group
    if group.status is not GroupStatus.REPORT_FAILED:
        raise _illegal(group, "only a REPORT_FAILED group can be retried")
    await _set_states(connection, organization, [group_id], RecordState.CREATED, RecordState.REPORT_FAILED)
    await derive_statuses(connection, organization, [group_id])
    return await get_group(connection, organization, group_id)


async def lock_groups(
    connection: AsyncConnection, organization: str, ids: Sequence[str], status: GroupStatus | None = None
) -> list[str]:
    """Lock the groups that have these ids, in their order, and are in a state if one is given; returns their ids.

    A statement of its own, by ids that are known: where it has no statistics yet, the planner would join whatever
    finds them to every group in turn.
    """
    columns = usage_record_groups.c
    where = [columns.organization_id == organization, columns.id == sa.any_(texts(ids))]
    if status is not None:
        where.append(columns.status == status.value)
    query = sa.select(columns.id).where(*where).order_by(columns.id).with_for_update(key_share=True)
    return list((await connection.execute(query)).scalars())


async def invalidate_groups(
    connection: AsyncConnection, organization: str, faults: Mapping[str, Sequence[Violation]]
) -> None:
    """Take groups that wait out of the way of reports, for the reasons given; they must be locked.

    They become INVALID. Of one that is reported in part the records that wait fail instead: what was reported cannot be
    deleted with them, and they can be retried once they are valid again.
    """
    reason = (
        sa.func.unnest(
            texts(list(faults)),
            texts([json.dumps([_reason(one) for one in found]) for found in faults.values()]),
            texts([f"not valid any more: {one.field} {one.message}"[:MESSAGE_MAX] for one, *_ in faults.values()]),
        )
        .table_valued("id", "reasons", "failure")
        .render_derived("found")
    )
    records, groups = usage_records.c, usage_record_groups.c
    other = usage_records.alias("other").c
    in_part = sa.exists().where(
        other.organization_id == organization,
        other.group_id == reason.c.id,
        other.state == RecordState.REPORTED.value,
    )
    await connection.execute(
        sa.update(usage_record_groups)
        .where(groups.organization_id == organization, groups.id == reason.c.id, sa.not_(in_part))
        .values(invalid_reasons=sa.cast(reason.c.reasons, JSONB))
    )
    await connection.execute(
        sa.update(usage_records)
        .where(
            records.organization_id == organization,
            records.group_id == reason.c.id,
            records.state == RecordState.CREATED.value,
        )
        .values(
            state=sa.case((in_part, RecordState.REPORT_FAILED.value), else_=RecordState.INVALID.value),
            failure=sa.case((in_part, reason.c.failure)),
        )
    )
    await derive_statuses(connection, organization, list(faults))


async def derive_statuses(connection: AsyncConnection, organization: str, ids: Sequence[str]) -> None:
    """Give groups the status that follows from the states of their records."""
    columns = usage_records.c
    first = sa.case(
        *((sa.func.bool_or(columns.state == state.value), sa.literal(state.value)) for state in STATUS_ORDER)
    )
    own = (
        sa.select(columns.group_id, first.label("status"))
        .where(columns.organization_id == organization, columns.group_id == sa.any_(texts(ids)))
        .group_by(columns.group_id)
        .subquery("own")
    )
    groups = usage_record_groups.c
    now = sa.func.clock_timestamp()
    reported = own.c.status == GroupStatus.REPORTED.value
    statement = (
        sa.update(usage_record_groups)
        .where(groups.organization_id == organization, groups.id == own.c.group_id)
        .values(status=own.c.status, updated_at=now, reported_at=sa.case((reported, now)))
    )
    await connection.execute(statement)


def transaction_id(group_id: str, position: int) -> str:
    """Return the id of the event that a record is counted by."""
    return f"{RESERVED_PREFIX}{group_id}:{position}"


async def _sizes(connection: AsyncConnection, organization: str, ids: Sequence[str]) -> dict[str, int]:
    """Return about how many bytes the groups that have these ids take on the wire, by id."""
    groups, records = usage_record_groups.c, usage_records.c
    own = (
        sa.select(
            sa.func.sum(
                2 * sa.func.octet_length(records.key)
                + sa.func.coalesce(sa.func.octet_length(sa.cast(records.properties, sa.Text)), 0)
                + sa.func.coalesce(sa.func.octet_length(records.failure), 0)
                + _RECORD_BYTES
            )
        )
        .where(records.organization_id == groups.organization_id, records.group_id == groups.id)
        .scalar_subquery()
    )
    meta = sa.func.octet_length(sa.cast(groups.meta_info, sa.Text))
    size = sa.cast(meta + sa.func.coalesce(own, 0) + _GROUP_BYTES, sa.BigInteger)
    query = sa.select(groups.id, size).where(groups.organization_id == organization, groups.id == sa.any_(texts(ids)))
    return {row[0]: row[1] for row in await connection.execute(query)}


async def _locked(connection: AsyncConnection, organization: str, group_id: str) -> StoredGroup:
    columns = usage_record_groups.c
    query = sa.select(columns.id).where(columns.organization_id == organization, columns.id == group_id)
    if (await connection.execute(query.with_for_update(key_share=True))).first() is None:
        raise _not_found(group_id)
    return await get_group(connection, organization, group_id)


async def _set_states(
    connection: AsyncConnection,
    organization: str,
    ids: Sequence[str],
    state: RecordState,
    only: RecordState | None = None,
) -> None:
    columns = usage_records.c
    where = [columns.organization_id == organization, columns.group_id == sa.any_(texts(ids))]
    if only is not None:
        where.append(columns.state == only.value)
    await connection.execute(sa.update(usage_records).where(*where).values(state=state.value, failure=None))


async def plan_for_values(connection: AsyncConnection) -> None:
    """Let the rest of this transaction be planned for the values it has: which index is right depends on them."""
    await connection.execute(sa.func.set_config("plan_cache_mode", "force_custom_plan", True).select())


def _keys(organization: str, query: GroupQuery, after: Key | None) -> Iterator[sa.Select[Any]]:
    """Yield ways to select what a list shows, in order: id, created_at, serial_id. The last one finds all of it."""
    columns = usage_record_groups.c
    where = [columns.organization_id == organization, *_conditions(organization, query, after, columns)]
    shown = (columns.id, columns.created_at, columns.serial_id)
    if query.meta_info is None:
        yield _newest_first(sa.select(*shown).where(*where), columns)
        return
    wanted = sa.cast(sa.literal(query.meta_info, sa.Text), JSONB)
    # How many contain a value the planner can hardly tell, least of all for large ones, of which it has no statistics.
    # So it is not asked: first the newest are looked through, which is enough where many match; then all that match.
    newest = _newest_first(sa.select(*shown, columns.meta_info).where(*where), columns).limit(_LOOKED_THROUGH)
    found: Any = newest.subquery("newest")
    yield _newest_first(
        sa.select(found.c.id, found.c.created_at, found.c.serial_id).where(found.c.meta_info.contains(wanted)), found.c
    )
    containing: Any = (
        sa.func.metering_groups_containing(wanted, query.start, query.end)
        .table_valued(*(sa.column(name, columns[name].type) for name in _OF_CONTAINING))
        .alias("containing")
    )
    matching = sa.select(*(containing.c[one.name] for one in shown)).where(
        *_conditions(organization, query, after, containing.c)
    )
    yield _newest_first(matching, containing.c)


def _newest_first(select: sa.Select[Any], columns: Any) -> sa.Select[Any]:
    return select.order_by(columns.created_at.desc(), columns.serial_id.desc())


def _conditions(organization: str, query: GroupQuery, after: Key | None, columns: Any) -> list[sa.ColumnElement[bool]]:
    """Return the conditions of a list on these columns of groups, those on the organization and meta_info apart."""
    where = [columns.created_at >= query.start, columns.created_at < query.end]
    if after is not None:
        last = sa.tuple_(sa.literal(after[0], INSTANT), sa.literal(after[1], sa.BigInteger))
        where += [columns.created_at <= after[0], sa.tuple_(columns.created_at, columns.serial_id) < last]
    for column, value in (
        (columns.partner, query.partner and query.partner.value),
        (columns.product_id, query.product_id),
        (columns.entitlement_id, query.entitlement_id),
        (columns.customer_id, query.buyer_id and with_buyer_id(organization, query.buyer_id)),
        (columns.status, query.status and query.status.value),
        (columns.source, query.source and query.source.value),
    ):
        if value is not None:
            where.append(column == value)
    return where


def _not_found(group_id: str) -> NotFound:
    message = f"No usage record group has the id {group_id!r}."
    return NotFound(Reason.USAGE_RECORD_GROUP_NOT_FOUND, message, metadata={"id": group_id})


def _illegal(group: StoredGroup, message: str) -> FailedPrecondition:
    return FailedPrecondition(
        Reason.STATUS_TRANSITION,
        f"Usage record group {group.id!r} is {group.status.value}; {message}.",
        metadata={"id": group.id, "status": group.status.value},
    )


def _reason(violation: Violation) -> dict[str, str]:
    return {"field": violation.field, "reason": violation.reason.value, "message": violation.message}


_GROUPS = sa.select(usage_record_groups, buyer_id_of(usage_record_groups))


def _group(row: Any, records: Sequence[StoredRecord]) -> StoredGroup:
    return StoredGroup(
        id=row.id,
        serial_id=row.serial_id,
        partner=Partner(row.partner),
        product_id=row.product_id,
        entitlement_id=row.entitlement_id,
        buyer_id=row.buyer_id,
        status=GroupStatus(row.status),
        meta_info=row.meta_info,
        report_id=row.report_id,
        invalid_reasons=tuple(
            Violation(one["field"], Reason(one["reason"]), one["message"]) for one in row.invalid_reasons or ()
        ),
        created_at=row.created_at,
        updated_at=row.updated_at,
        reported_at=row.reported_at,
        records=tuple(records),
    )
