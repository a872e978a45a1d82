"""Every statement by which the records that wait become the hourly reports of their entitlements."""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.entitlements import IN_FORCE, Dimension, Entitlement
from service.domain.partners import Rules
from service.domain.record_groups import BillableRecord, Circumstances, GroupStatus, NewGroup, RecordState, violations
from service.domain.record_reports import Line, ReportStatus, Used, lines
from service.store import entitlements as entitlement_store
from service.store import metrics as metric_store
from service.store import record_groups as group_store
from service.store.record_reports import carry
from service.store.tables import (
    NUMERIC,
    entitlement_carries,
    entitlements,
    texts,
    usage_record_groups,
    usage_record_report_lines,
    usage_record_reports,
    usage_records,
)

HOUR = timedelta(hours=1)
# Groups judged at once.
_SLICE = 100
_LEADER_LOCK = 7_301_212


class Waiting(NamedTuple):
    """An entitlement of which records wait for a report."""

    organization: str
    entitlement_id: str


async def waiting_entitlements(
    connection: AsyncConnection, hour: datetime, rules: Rules, after: Waiting | None, limit: int
) -> list[Waiting]:
    """Return entitlements after the one given with something to report for an hour, and no report of it yet.

    That is records used before its end that wait; or, while it is in force, enough that was carried.
    """
    columns = entitlements.c
    carry = entitlement_carries.c
    unit = sa.case(*((columns.partner == one.value, sa.literal(rule.unit, NUMERIC)) for one, rule in rules.items()))
    due = sa.and_(
        columns.status == sa.any_(texts([one.value for one in IN_FORCE])),
        sa.or_(columns.ending_before.is_(None), columns.ending_before > hour),
        sa.exists()
        .where(carry.organization_id == columns.organization_id)
        .where(carry.entitlement_id == columns.id)
        .where(carry.carried >= unit),
    )
    waits = (
        sa.exists()
        .where(usage_records.c.organization_id == columns.organization_id)
        .where(usage_records.c.entitlement_id == columns.id)
        .where(usage_records.c.state == sa.literal_column("'CREATED'"))
        .where(usage_records.c.timestamp < hour + HOUR)
    )
    reported = (
        sa.exists()
        .where(usage_record_reports.c.organization_id == columns.organization_id)
        .where(usage_record_reports.c.entitlement_id == columns.id)
        .where(usage_record_reports.c.marketplace_time == hour)
    )
    query = (
        sa.select(columns.organization_id, columns.id)
        .where(sa.or_(waits, due), sa.not_(reported))
        .order_by(columns.organization_id, columns.id)
        .limit(limit)
    )
    if after is not None:
        query = query.where(sa.tuple_(columns.organization_id, columns.id) > sa.tuple_(*after))
    return [Waiting(*row) for row in await connection.execute(query)]


async def lead(connection: AsyncConnection, *, wait: bool) -> bool:
    """Become the only one that rolls up, until this transaction ends; False if another one is and we do not `wait`."""
    if wait:
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LEADER_LOCK)))
        return True
    return bool((await connection.execute(sa.select(sa.func.pg_try_advisory_xact_lock(_LEADER_LOCK)))).scalar_one())


async def roll_up(
    connection: AsyncConnection, organization: str, entitlement_id: str, hour: datetime, rules: Rules
) -> uuid.UUID | None:
    """Make the report of an entitlement's hour out of the records that wait, and of what was carried.

    Returns its id, None if there is nothing to report. Groups that do not validate any more are left out. Locks are
    taken in one order: the entitlement, groups by their ids, what is carried.
    """
    await entitlement_store.lock_entitlement(connection, organization, entitlement_id)
    if await _is_reported(connection, organization, entitlement_id, hour):
        return None
    entitlement = (await entitlement_store.find_entitlements(connection, organization, [entitlement_id]))[
        entitlement_id
    ]
    ids = await _lock_waiting(connection, organization, entitlement_id, hour + HOUR)
    ids = await _still_valid(connection, organization, entitlement, ids, rules)
    ended = entitlement.ending_before is not None and entitlement.ending_before <= hour
    # What is left of one that ended is shown, and not reported by itself.
    if entitlement.partner is None or (not ids and (ended or entitlement.status not in IN_FORCE)):
        return None
    used = await _used(connection, organization, ids)
    carried = await _carried(connection, organization, entitlement_id)
    found = lines(used, carried, rules[entitlement.partner])
    if not found:
        return None
    report_id = uuid.uuid4()
    pending = any(line.outcome is None for line in found)
    now = sa.func.clock_timestamp()
    await connection.execute(
        sa.insert(usage_record_reports).values(
            organization_id=organization,
            id=report_id,
            partner=entitlement.partner.value,
            product_id=entitlement.product_id,
            entitlement_id=entitlement_id,
            customer_id=entitlement.customer_id,
            marketplace_time=hour,
            report_deadline=rules[entitlement.partner].deadline(hour),
            group_count=len(ids),
            status=(ReportStatus.PENDING if pending else ReportStatus.SUCCEEDED).value,
            created_at=now,
            completed_at=None if pending else now,
        )
    )
    await connection.execute(
        sa.insert(usage_record_report_lines),
        [
            {
                "organization_id": organization,
                "report_id": report_id,
                "key": line.key,
                "quantity": line.quantity,
                "used": line.used,
                "carried_before": line.carried_before,
                "record_count": line.record_count,
                "outcome": line.outcome and line.outcome.value,
            }
            for line in found
        ],
    )
    await carry(connection, organization, entitlement_id, {line.key: line.left for line in found})
    await _put_into(connection, organization, report_id, ids, found)
    await group_store.derive_statuses(connection, organization, ids)
    return report_id


async def _is_reported(connection: AsyncConnection, organization: str, entitlement_id: str, hour: datetime) -> bool:
    columns = usage_record_reports.c
    query = sa.exists().where(
        columns.organization_id == organization,
        columns.entitlement_id == entitlement_id,
        columns.marketplace_time == hour,
    )
    return bool((await connection.execute(sa.select(query))).scalar_one())


async def _lock_waiting(
    connection: AsyncConnection, organization: str, entitlement_id: str, end: datetime
) -> list[str]:
    """Lock, in the order of their ids, the groups with records used before `end` that wait; returns their ids."""
    waiting = (
        sa.select(usage_records.c.group_id)
        .where(
            usage_records.c.organization_id == organization,
            usage_records.c.entitlement_id == entitlement_id,
            usage_records.c.state == sa.literal_column("'CREATED'"),
            usage_records.c.timestamp < end,
        )
        .distinct()
    )
    ids = list((await connection.execute(waiting)).scalars())
    # One that was deleted meanwhile does not wait any more.
    return await group_store.lock_groups(connection, organization, ids, GroupStatus.CREATED)


async def _still_valid(
    connection: AsyncConnection, organization: str, entitlement: Entitlement, ids: Sequence[str], rules: Rules
) -> list[str]:
    """Judge groups once more by the catalog as it is now; returns those that stay, the others become INVALID."""
    # A record's key was found when it was reported; names do not matter any more.
    keyed = replace(entitlement, dimensions=tuple(Dimension(one.key, one.key) for one in entitlement.dimensions or ()))
    metrics = await metric_store.metrics_by_key(connection, organization, entitlement.billable_metric_keys)
    circumstances = Circumstances({entitlement.id: keyed}, metrics, rules, None)
    valid: list[str] = []
    for start in range(0, len(ids), _SLICE):
        # So that calls of the server that this runs in get their turns.
        await asyncio.sleep(0)
        groups = await _as_reported(connection, organization, entitlement.id, ids[start : start + _SLICE])
        found = {group.id: violations(group, circumstances) for group in groups}
        faults = {group_id: reasons for group_id, reasons in found.items() if reasons}
        if faults:
            await group_store.invalidate_groups(connection, organization, faults)
        valid += [group_id for group_id in ids[start : start + _SLICE] if group_id not in faults]
    return valid


async def _as_reported(
    connection: AsyncConnection, organization: str, entitlement_id: str, ids: Sequence[str]
) -> list[NewGroup]:
    """Return what waits of groups as it would be reported now, those apart that were stored without validation."""
    columns, own = usage_records.c, usage_record_groups.c
    query = (
        sa.select(
            columns.group_id,
            columns.key,
            columns.quantity,
            sa.cast(columns.properties, sa.Text).label("properties"),
            columns.timestamp,
        )
        .join(
            usage_record_groups,
            sa.and_(own.organization_id == columns.organization_id, own.id == columns.group_id),
        )
        .where(
            columns.organization_id == organization,
            columns.group_id == sa.any_(texts(ids)),
            columns.state == RecordState.CREATED.value,
            sa.not_(own.meta_info.has_key("skip_validation")),
        )
        .order_by(columns.group_id, columns.position)
    )
    records: dict[str, list[Any]] = {}
    for row in await connection.execute(query):
        records.setdefault(row.group_id, []).append(row)
    return [
        NewGroup(
            id=group_id,
            entitlement_id=entitlement_id,
            records={row.key: row.quantity for row in rows if row.properties is None},
            billable_records=tuple(
                BillableRecord(row.key, row.properties, row.quantity) for row in rows if row.properties is not None
            ),
            timestamp=rows[0].timestamp,
        )
        for group_id, rows in records.items()
    ]


async def _used(connection: AsyncConnection, organization: str, ids: Sequence[str]) -> dict[str, Used]:
    columns = usage_records.c
    query = (
        sa.select(columns.key, sa.func.sum(columns.quantity), sa.func.count())
        .where(
            columns.organization_id == organization,
            columns.group_id == sa.any_(texts(ids)),
            columns.state == RecordState.CREATED.value,
        )
        .group_by(columns.key)
    )
    return {row[0]: Used(row[1], row[2]) for row in await connection.execute(query)}


async def _carried(connection: AsyncConnection, organization: str, entitlement_id: str) -> dict[str, Decimal]:
    columns = entitlement_carries.c
    query = sa.select(columns.key, columns.carried).where(
        columns.organization_id == organization, columns.entitlement_id == entitlement_id
    )
    return {row.key: row.carried for row in await connection.execute(query)}


async def _put_into(
    connection: AsyncConnection, organization: str, report_id: uuid.UUID, ids: Sequence[str], found: Sequence[Line]
) -> None:
    """Put the records of groups that wait into a report; those of a line that tells nothing are reported by that."""
    columns = usage_records.c
    settled = texts([line.key for line in found if line.outcome is not None])
    state = sa.case(
        (columns.key == sa.any_(settled), RecordState.REPORTED.value), else_=RecordState.REPORT_PENDING.value
    )
    await connection.execute(
        sa.update(usage_records)
        .where(
            columns.organization_id == organization,
            columns.group_id == sa.any_(texts(ids)),
            columns.state == RecordState.CREATED.value,
        )
        .values(state=state, report_id=report_id)
    )
    own = usage_record_groups.c
    await connection.execute(
        sa.update(usage_record_groups)
        .where(own.organization_id == organization, own.id == sa.any_(texts(ids)))
        .values(report_id=report_id)
    )
