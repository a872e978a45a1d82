"""Finds stored events, and explains what every metric makes of them by the very rules that count them."""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, array
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.events import EventQuery, EventSource, Explanation, MetricOutcome, StoredEvent
from service.domain.metrics import BillableMetric
from service.store import metric_sql
from service.store import metrics as metric_store
from service.store.cells import ORGANIZATION, of_records
from service.store.compiled import ByCatalog, Compiled
from service.store.organizations import catalog_version
from service.store.tables import INSTANT, customer_keys, texts, usage_events

# How many events one statement looks at for those of a type, and how long one call may go on with that.
SCAN = 5_000
SEARCH_S = 2.0
# How many results of a metric for an event one page works out.
EXPLANATIONS_MAX = 20_000

_IDS: sa.BindParameter[Any] = sa.bindparam("transaction_ids", type_=ARRAY(sa.Text))

Key = tuple[datetime, str]
"""Timestamp and transaction id: what events are listed by, the latest first."""


class Explainer:
    """An organization's metrics as one statement; record metrics, of which at most one counts an event, as another."""

    def __init__(self, metrics: Sequence[BillableMetric]) -> None:
        self.metrics = metrics
        self._failures = [
            [(rule.path, rule.failure) for rule in metric_sql.rules(metric, usage_events)] for metric in metrics
        ]
        outcomes: list[sa.ColumnElement[Any]] = [metric_sql.outcome(metric, usage_events) for metric in metrics]
        columns = usage_events.c
        each: sa.ColumnElement[Any] = array(outcomes, type_=sa.Integer)
        statement = sa.select(columns.transaction_id, each).where(
            columns.organization_id == ORGANIZATION, columns.transaction_id == sa.any_(_IDS)
        )
        self._statement = Compiled(statement)
        self._record_failures = [
            (rule.path, rule.failure) for rule in metric_sql.rules(metric_sql.RECORDS, usage_events)
        ]
        named = sa.select(usage_events).where(
            columns.organization_id == ORGANIZATION, columns.transaction_id == sa.any_(_IDS)
        )
        records = of_records(named.subquery())
        made: sa.Select[Any] = sa.select(
            records.c.transaction_id, records.c.metric_id, metric_sql.outcome(metric_sql.RECORDS, records)
        ).where(records.c.source == int(EventSource.GROUP))
        self._of_records = Compiled(made)

    async def explain(
        self, connection: AsyncConnection, organization: str, ids: Sequence[str]
    ) -> dict[str, list[Explanation]]:
        """Return what each metric makes of each event, by transaction id."""
        if not ids:
            return {}
        # Read each time: a name may change while the rules, and so this statement, do not.
        names = await metric_store.metric_names(connection, organization)
        rows: Any = await self._statement.execute(connection, organization=organization, transaction_ids=list(ids))
        found = {
            row[0]: [
                _explanation(self.metrics[i], self._failures[i], outcome, names[self.metrics[i].id])
                for i, outcome in enumerate(row[1])
            ]
            for row in rows
        }
        rows = await self._of_records.execute(connection, organization=organization, transaction_ids=list(ids))
        for transaction_id, metric_id, outcome in rows:
            metric = replace(metric_sql.RECORDS, id=metric_id)
            found[transaction_id].insert(0, _explanation(metric, self._record_failures, outcome, names[metric_id]))
        return found


def _explanation(metric: BillableMetric, failures: Sequence[tuple[str, str]], outcome: int, name: str) -> Explanation:
    key = metric.aggregation_key
    match outcome:
        case metric_sql.COUNTED:
            found = (MetricOutcome.COUNTED, "", "")
        case metric_sql.PENDING:
            found = (MetricOutcome.PENDING, "", "")
        case metric_sql.MISSING:
            found = (MetricOutcome.SKIPPED, "aggregation_key", f'property "{key}" is missing')
        case metric_sql.NOT_DECIMAL:
            message = f'property "{key}" is no plain decimal of at most 38 digits, 18 of them after the point'
            found = (MetricOutcome.SKIPPED, "aggregation_key", message)
        case _:
            found = (MetricOutcome.NOT_MATCHED, *failures[outcome])
    return Explanation(metric.id, name, *found)


class Found(NamedTuple):
    """Events, latest first, and the one after which to go on (None = there are no more)."""

    events: Sequence[StoredEvent]
    following: Key | None


async def search_events(
    connection: AsyncConnection,
    organization: str,
    query: EventQuery,
    after: Key | None,
    limit: int,
    explainers: ByCatalog[Explainer],
) -> Found:
    """Return up to `limit` events after the one given, explained. Must run in one snapshot."""
    version = await catalog_version(connection, organization)
    explainer = explainers.find(organization, version)
    if explainer is None:
        metrics = await metric_store.event_metrics(connection, organization)
        # In a thread: an organization with many metrics must not keep the others' calls from the loop.
        compiled = await asyncio.to_thread(Explainer, metrics)
        explainer = explainers.keep(organization, version, len(metrics), compiled)
    limit = max(1, min(limit, EXPLANATIONS_MAX // max(1, len(explainer.metrics))))
    keys = await _customer_keys(connection, organization, query.customer) if query.customer else None
    wanted: list[Key] = []
    scan = limit + 1
    if query.event_type:
        scan = max(scan, SCAN // len(keys or "1"))  # so many of each key
    clock = asyncio.get_running_loop().time
    late = clock() + SEARCH_S
    following = after
    while True:
        rows = (await connection.execute(_candidates(organization, query, keys, following, scan))).all()
        wanted += [(row[0], row[1]) for row in rows if row[2]]
        following = (rows[-1][0], rows[-1][1]) if len(rows) == scan else None
        if len(wanted) > limit:
            wanted = wanted[:limit]
            following = wanted[-1]
            break
        if following is None or clock() > late:
            break
    ids = [key[1] for key in wanted]
    explained = await explainer.explain(connection, organization, ids)
    events = {row.transaction_id: row for row in (await connection.execute(_details(organization, ids)))} if ids else {}
    found = []
    for transaction_id in ids:
        event = StoredEvent(*events[transaction_id])
        if event.voided_at is None:
            event = event._replace(explanations=explained.get(transaction_id, ()))
        found.append(event)
    return Found(found, following)


async def _customer_keys(connection: AsyncConnection, organization: str, customer: str) -> Sequence[str]:
    """Return the keys of the customer with this id, or the text itself where no customer has it."""
    try:
        customer_id = uuid.UUID(customer)
    except ValueError:
        return [customer]
    if str(customer_id) != customer:  # what Python also reads as a UUID, such as one without dashes
        return [customer]
    query = sa.select(customer_keys.c.key).where(
        customer_keys.c.organization_id == organization, customer_keys.c.customer_id == customer_id
    )
    return (await connection.execute(query)).scalars().all() or [customer]


def _candidates(
    organization: str, query: EventQuery, keys: Sequence[str] | None, after: Key | None, limit: int
) -> sa.Select[Any]:
    """Select the next events by everything but their type: timestamp, transaction id, and whether the type fits."""
    columns = usage_events.c
    fits = columns.event_type == query.event_type if query.event_type else sa.true()
    where: list[sa.ColumnElement[bool]] = [columns.organization_id == organization]
    if query.start is not None:
        where.append(columns.timestamp >= query.start)
    if query.end is not None:
        where.append(columns.timestamp < query.end)
    if after is not None:
        # The first condition is implied, and is the one by which the index finds the place.
        where.append(columns.timestamp <= after[0])
        last = sa.tuple_(sa.literal(after[0], INSTANT), sa.literal(after[1], columns.transaction_id.type))
        where.append(sa.tuple_(columns.timestamp, columns.transaction_id) < last)
    order = (columns.timestamp.desc(), columns.transaction_id.desc())
    found = sa.select(columns.timestamp, columns.transaction_id, fits.label("fits"))
    if query.transaction_ids:
        named = columns.transaction_id == sa.any_(texts(query.transaction_ids))
        return found.where(*where, named).order_by(*order).limit(limit)
    if keys is None:
        return found.where(*where).order_by(*order).limit(limit)
    # Key by key, each by the index; then the first of them all.
    key = sa.func.unnest(texts(keys)).table_valued("key").render_derived("keys")
    of_key = found.where(*where, columns.customer_key == key.c.key).order_by(*order).limit(limit)
    rows = of_key.correlate_except(usage_events).lateral()
    return (
        sa.select(rows)
        .select_from(key.join(rows, sa.true()))
        .order_by(rows.c.timestamp.desc(), rows.c.transaction_id.collate("C").desc())
        .limit(limit)
    )


def _details(organization: str, ids: Sequence[str]) -> sa.Select[Any]:
    """Select the fields of StoredEvent, explanations apart."""
    columns = usage_events.c
    owner = sa.and_(customer_keys.c.organization_id == organization, customer_keys.c.key == columns.customer_key)
    return (
        sa.select(
            columns.transaction_id,
            columns.customer_key,
            columns.event_type,
            columns.timestamp,
            columns.properties,
            columns.ingested_at,
            columns.voided_at,
            customer_keys.c.customer_id,
            columns.source,
        )
        .select_from(usage_events.outerjoin(customer_keys, owner))
        .where(columns.organization_id == organization, columns.transaction_id == sa.any_(texts(ids)))
    )
