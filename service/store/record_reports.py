"""Every statement about stored hourly reports: listing them, handing them out, taking the marketplace's answers."""

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.partners import Partner
from service.domain.quantities import subtract
from service.domain.record_groups import RecordState
from service.domain.record_reports import LINES_MAX, Answer, Line, Report, ReportOutcome, ReportQuery, ReportStatus
from service.errors import FailedPrecondition, InvalidArgument, NotFound, Reason, Violation
from service.store import entitlements as entitlement_store
from service.store import record_groups as group_store
from service.store.customers import buyer_id_of, with_buyer_id
from service.store.tables import (
    INSTANT,
    entitlement_carries,
    texts,
    usage_record_report_lines,
    usage_record_reports,
    usage_records,
    uuids,
)

_LEASE_LOCK_SEED = 7_301_213

Key = tuple[datetime, uuid.UUID]
"""Marketplace time and id: what reports are listed by, the latest first."""


class Found(NamedTuple):
    """Reports, and whether there are more after them."""

    reports: Sequence[Report]
    more: bool


async def list_reports(
    connection: AsyncConnection, organization: str, query: ReportQuery, after: Key | None, skip: int, limit: int
) -> Found:
    """Return up to `limit` reports after the one given and `skip` more, the latest hour first."""
    columns = usage_record_reports.c
    where = [columns.marketplace_time >= query.start, columns.marketplace_time < query.end]
    for column, value in (
        (columns.partner, query.partner and query.partner.value),
        (columns.entitlement_id, query.entitlement_id),
        (columns.customer_id, query.buyer_id and with_buyer_id(organization, query.buyer_id)),
        (columns.status, query.status and query.status.value),
    ):
        if value is not None:
            where.append(column == value)
    if after is not None:
        last = sa.tuple_(sa.literal(after[0], INSTANT), sa.literal(after[1], sa.Uuid))
        where += [columns.marketplace_time <= after[0], sa.tuple_(columns.marketplace_time, columns.id) < last]
    order = (columns.marketplace_time.desc(), columns.id.desc())
    await group_store.plan_for_values(connection)
    keys = sa.select(columns.id).where(columns.organization_id == organization, *where)
    ids = list((await connection.execute(keys.order_by(*order).offset(skip or None).limit(limit + 1))).scalars())
    wanted = await _fitting(connection, organization, ids[:limit])
    reports = await _reports(connection, organization, columns.id == sa.any_(uuids(wanted)), order=order)
    return Found(reports, len(wanted) < len(ids))


async def lease_reports(
    connection: AsyncConnection,
    organization: str,
    token: str,
    partner: Partner | None,
    limit: int,
    duration: timedelta,
) -> list[Report]:
    """Hand out reports that nobody holds, the most urgent first; or those that this token holds already."""
    # Two calls with one token take turns: the second finds what the first was given.
    name = sa.cast(f"{organization} {token}", sa.Text)
    await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(name, _LEASE_LOCK_SEED))))
    columns = usage_record_reports.c
    order = (columns.report_deadline, columns.id)
    held = (columns.lease_token == token,)
    now = sa.func.clock_timestamp()
    until = now + sa.cast(sa.literal(duration), sa.Interval)
    renewed = (
        sa.update(usage_record_reports)
        .where(columns.organization_id == organization, *held, columns.lease_deadline <= now)
        .values(lease_deadline=until, lease_count=columns.lease_count + 1)
    )
    await connection.execute(renewed)
    if found := await _reports(connection, organization, *held, order=order):
        return found
    where = [
        columns.organization_id == organization,
        columns.status == sa.literal_column("'PENDING'"),
        sa.or_(columns.lease_deadline.is_(None), columns.lease_deadline <= now),
    ]
    if partner is not None:
        where.append(columns.partner == partner.value)
    free = sa.select(columns.id).where(*where).order_by(*order).limit(limit).with_for_update(skip_locked=True)
    ids = await _fitting(connection, organization, list((await connection.execute(free)).scalars()))
    taken = (
        sa.update(usage_record_reports)
        .where(columns.organization_id == organization, columns.id == sa.any_(uuids(ids)))
        .values(lease_token=token, lease_deadline=until, lease_count=columns.lease_count + 1)
    )
    await connection.execute(taken)
    return await _reports(connection, organization, *held, order=order) if ids else []


async def complete_report(
    connection: AsyncConnection, organization: str, report_id: uuid.UUID, token: str, answers: Mapping[str, Answer]
) -> Report:
    """Take what the marketplace said of each line: move its records and their groups on.

    Raises NotFound, InvalidArgument unless each line that tells something has an answer and no other, and
    FailedPrecondition when the report is another reporter's now or was completed with other answers.
    """
    columns = usage_record_reports.c
    named = (columns.organization_id == organization, columns.id == report_id)
    held = sa.select(columns.lease_token, columns.entitlement_id).where(*named).with_for_update()
    row = (await connection.execute(held)).first()
    if row is None:
        message = f"No usage record report has the id {report_id}."
        raise NotFound(Reason.USAGE_RECORD_REPORT_NOT_FOUND, message, metadata={"id": str(report_id)})
    if row.lease_token != token:
        message = f"Usage record report {report_id} is not leased with this token (any more). Lease again."
        raise FailedPrecondition(Reason.LEASE_LOST, message, metadata={"id": str(report_id)})
    (report,) = await _reports(connection, organization, columns.id == report_id)
    told = {line.key: line for line in report.lines if line.quantity}
    _check_answers(told, answers)
    if report.status is not ReportStatus.PENDING:
        if all(Answer(line.outcome, line.message) == answers[key] for key, line in told.items() if line.outcome):
            return report
        message = f"Usage record report {report_id} was completed with other outcomes; nothing changed."
        raise FailedPrecondition(Reason.REPORT_COMPLETED, message, metadata={"id": str(report_id)})
    await entitlement_store.lock_entitlement(connection, organization, row.entitlement_id)
    answered = [
        told[key]._replace(outcome=answer.outcome, message=answer.message) for key, answer in sorted(answers.items())
    ]
    failed = [line for line in answered if line.outcome is ReportOutcome.FAILED]
    await _answer(connection, organization, report_id, answered)
    # What a failed line had left over goes with it: its records will be added up again.
    await carry(
        connection, organization, report.entitlement_id, {line.key: subtract(Decimal(0), line.left) for line in failed}
    )
    status = ReportStatus.FAILED if failed else ReportStatus.SUCCEEDED
    statement = sa.update(usage_record_reports).where(*named)
    ended = {"status": status.value, "completed_at": sa.func.clock_timestamp(), "lease_deadline": None}
    await connection.execute(statement.values(**ended))
    (report,) = await _reports(connection, organization, columns.id == report_id)
    return report


async def carry(
    connection: AsyncConnection, organization: str, entitlement_id: str, more: Mapping[str, Decimal]
) -> None:
    """Add to what is carried to the next report. The entitlement must be locked."""
    rows = [
        {"organization_id": organization, "entitlement_id": entitlement_id, "key": key, "carried": quantity}
        for key, quantity in sorted(more.items())
        if quantity
    ]
    if not rows:
        return
    statement = insert(entitlement_carries).values(rows)
    total = entitlement_carries.c.carried + statement.excluded.carried
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=list(entitlement_carries.primary_key.columns), set_={"carried": total}
        )
    )


async def _answer(
    connection: AsyncConnection, organization: str, report_id: uuid.UUID, answered: Sequence[Line]
) -> None:
    """Store the outcomes of a report's lines, and move its records and groups on."""
    values = {
        "key": texts([line.key for line in answered]),
        "outcome": texts([line.outcome.value for line in answered if line.outcome]),
        "message": texts([line.message for line in answered]),
    }
    said = sa.func.unnest(*values.values()).table_valued(*values).render_derived("said")
    line = usage_record_report_lines.c
    await connection.execute(
        sa.update(usage_record_report_lines)
        .where(line.organization_id == organization, line.report_id == report_id, line.key == said.c.key)
        .values(outcome=said.c.outcome, message=said.c.message)
    )
    columns = usage_records.c
    pending = (
        columns.organization_id == organization,
        columns.report_id == report_id,
        columns.state == RecordState.REPORT_PENDING.value,
    )
    found = await connection.execute(sa.select(columns.group_id).where(*pending).distinct())
    ids = await group_store.lock_groups(connection, organization, list(found.scalars()))
    failed = said.c.outcome == ReportOutcome.FAILED.value
    await connection.execute(
        sa.update(usage_records)
        .where(*pending, columns.key == said.c.key)
        .values(
            state=sa.case((failed, RecordState.REPORT_FAILED.value), else_=RecordState.REPORTED.value),
            failure=sa.case((failed, said.c.message)),
        )
    )
    await group_store.derive_statuses(connection, organization, ids)


def _check_answers(told: Mapping[str, Line], answers: Mapping[str, Answer]) -> None:
    faults = [
        Violation(f"outcomes[{i}].key", Reason.FIELD_INVALID, f"is {key!r}, of which the report tells nothing")
        for i, key in enumerate(answers)
        if key not in told
    ]
    if missing := sorted(set(told) - set(answers)):
        faults.append(Violation("outcomes", Reason.FIELD_REQUIRED, f"lack an outcome of {', '.join(missing)}"))
    if faults:
        raise InvalidArgument(faults)


async def _fitting(connection: AsyncConnection, organization: str, ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
    """Return the first of the reports, as many as one answer can hold; at least one."""
    line = usage_record_report_lines.c
    query = (
        sa.select(line.report_id, sa.func.count().label("lines"))
        .where(line.organization_id == organization, line.report_id == sa.any_(uuids(ids)))
        .group_by(line.report_id)
    )
    sizes = {row.report_id: row.lines for row in await connection.execute(query)}
    fitting: list[uuid.UUID] = []
    for one in ids:
        if fitting and sum(sizes[kept] for kept in fitting) + sizes[one] > LINES_MAX:
            break
        fitting.append(one)
    return fitting


async def _reports(
    connection: AsyncConnection,
    organization: str,
    *where: sa.ColumnElement[bool],
    order: Sequence[sa.ColumnElement[Any]] = (),
) -> list[Report]:
    query = (
        sa.select(usage_record_reports, buyer_id_of(usage_record_reports))
        .where(usage_record_reports.c.organization_id == organization, *where)
        .order_by(*order)
    )
    rows = (await connection.execute(query)).all()
    line = usage_record_report_lines.c
    named = sa.select(usage_record_report_lines).where(
        line.organization_id == organization, line.report_id == sa.any_(uuids([row.id for row in rows]))
    )
    found: dict[uuid.UUID, list[Line]] = {}
    for one in await connection.execute(named.order_by(line.report_id, line.key)):
        outcome = one.outcome and ReportOutcome(one.outcome)
        found.setdefault(one.report_id, []).append(
            Line(one.key, one.quantity, one.used, one.carried_before, one.record_count, outcome, one.message)
        )
    return [
        Report(
            id=row.id,
            partner=Partner(row.partner),
            product_id=row.product_id,
            entitlement_id=row.entitlement_id,
            buyer_id=row.buyer_id,
            marketplace_time=row.marketplace_time,
            report_deadline=row.report_deadline,
            group_count=row.group_count,
            status=ReportStatus(row.status),
            created_at=row.created_at,
            completed_at=row.completed_at,
            lease_deadline=row.lease_deadline,
            lease_count=row.lease_count,
            lines=tuple(found.get(row.id, ())),
        )
        for row in rows
    ]
