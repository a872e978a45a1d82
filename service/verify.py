"""Owns the proof that stored aggregates are what their events say, stretch by stretch, and their repair."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from service.database import Database
from service.domain.metrics import BillableMetric
from service.domain.windows import CELL, cell_ceil, cell_floor
from service.store import cells, organizations
from service.store import events as event_store
from service.store import metrics as metric_store

# One comparison covers this much time, so that no statement grows with the history.
STRETCH = timedelta(days=7)
FINDINGS_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Finding:
    """A wrong cell."""

    organization: str
    metric: BillableMetric
    mismatch: cells.Mismatch

    def __str__(self) -> str:
        wrong = self.mismatch
        place = f"{self.organization} {self.metric.id} {wrong.customer_key!r} {wrong.cell_start:%Y-%m-%dT%H:%MZ}"
        if wrong.note:
            return f"{place}: {wrong.note}"
        stored = wrong.stored or {}
        computed = wrong.computed or {}
        differing = [
            f"{name} is {stored.get(name)}, should be {computed.get(name)}"
            for name in sorted(stored.keys() | computed.keys())
            if stored.get(name) != computed.get(name)
        ]
        return f"{place} {wrong.cell_group}: {'; '.join(differing)}"


async def verify_cells(
    database: Database,
    found: Callable[[Finding], None],
    *,
    organization: str | None = None,
    metric_id: uuid.UUID | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
    repair: bool = False,
) -> int:
    """Compare cells with events and report each wrong one to `found`; returns how many metrics were compared.

    `start` and `end` are UTC; naive ones are taken as UTC. Every stretch is one snapshot. With `repair` a stretch with
    a wrong cell is computed again while writers of the organization wait. Raises NotFound for an unknown metric.
    """
    checked = 0
    names = await database.background(organizations.list_organizations, snapshot=True)
    for name in [organization] if organization is not None else names:
        for metric in await database.read(name, lambda c, org=name: _metrics(c, org, metric_id)):  # type: ignore[misc]  # bound as default
            checked += 1
            span = await database.read(name, lambda c, org=name, one=metric: _span(c, org, one, start, end))  # type: ignore[misc]
            begin, stop = span or (None, None)
            while begin and stop and begin < stop:
                until = min(begin + STRETCH, stop)
                await _verify_stretch(database, found, name, metric.id, (begin, until), repair=repair)
                begin = until
    return checked


async def _verify_stretch(
    database: Database,
    found: Callable[[Finding], None],
    organization: str,
    metric_id: uuid.UUID,
    span: tuple[datetime, datetime],
    *,
    repair: bool,
) -> None:
    # The definition is read where it is used: a metric can be archived, or its backfill move, at any time.
    async def compare(connection: AsyncConnection) -> list[Finding]:
        metric = await metric_store.get_metric(connection, organization, metric_id)
        wrong = await cells.mismatches(connection, organization, metric, *span, limit=FINDINGS_MAX)
        return [Finding(organization, metric, mismatch) for mismatch in wrong]

    async def mend(connection: AsyncConnection) -> None:
        await organizations.lock_exclusive(connection, organization)
        metric = await metric_store.get_metric(connection, organization, metric_id)
        await cells.recompute(connection, organization, metric, *span)

    # Not as a caller's query: a stretch of a large organization takes its time.
    findings = await database.background(compare, organization=organization, snapshot=True)
    for finding in findings:
        found(finding)
    if findings and repair:
        await database.background(mend, organization=organization)


async def _metrics(connection: AsyncConnection, organization: str, metric_id: uuid.UUID | None) -> list[BillableMetric]:
    if metric_id is not None:
        return await metric_store.get_metrics(connection, organization, [metric_id])
    return await metric_store.all_metrics(connection, organization)


async def _span(
    connection: AsyncConnection,
    organization: str,
    metric: BillableMetric,
    start: datetime | None,
    end: datetime | None,
) -> tuple[datetime, datetime] | None:
    """Return the cells to compare: those asked for, else all of events or stored cells; never beyond the backfill."""
    known = await event_store.time_span(connection, organization)
    stored = await cells.time_span(connection, organization, metric.id)
    bounds = [bound for span in (known, stored) if span for bound in span]
    if not bounds:
        return None
    first = cell_floor(start.replace(tzinfo=UTC)) if start else cell_floor(min(bounds))
    last = cell_ceil(end.replace(tzinfo=UTC)) if end else cell_floor(max(bounds)) + CELL
    if metric.backfilled_until is not None:
        last = min(last, metric.backfilled_until)
    return (first, last) if first < last else None
