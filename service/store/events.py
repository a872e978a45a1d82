"""Every statement about stored events: writing a batch exactly once, and the keys that no customer owns."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.events import Event
from service.domain.metrics import BillableMetric
from service.store import cells
from service.store.compiled import Compiled
from service.store.tables import INSTANT, customer_keys, incoming_events, texts, usage_events

INCOMING = tuple(column.name for column in incoming_events.c)

# How many customer keys one statement walks over when it looks for those that no customer owns.
KEYS_WALKED = 1_000
# How many such statements one call may take.
WALKS_MAX = 20

_ACCEPTED: sa.BindParameter[Any] = sa.bindparam("accepted", type_=ARRAY(sa.Text))


class IngestStatements(NamedTuple):
    """What writes a batch for one version of an organization's metrics; compiled once per version."""

    insert: Compiled
    distinct: Compiled | None = None


class UnmatchedKey(NamedTuple):
    """A customer key that events name and no customer owns, with the timestamps of its first and last event."""

    key: str
    events: int
    first: datetime
    last: datetime


def ingest_statements(metrics: Sequence[BillableMetric]) -> IngestStatements:
    """Compile the metrics into the statements that store events and count them.

    The insert takes events in the order of their ids and cells in theirs (`metric_sql.in_order`), events first:
    concurrent batches wait for each other in one direction only.
    """
    new = _new_events()
    statement = sa.select(new.c.transaction_id)
    if (adding := cells.adding(metrics, new)) is not None:
        statement = statement.add_cte(adding.cte("added"))
    # "IS TRUE" keeps the planner from making it a join, for which it could choose nested loops over thousands of rows;
    # so it is looked up in a hash table, always.
    ids = sa.select(sa.func.unnest(_ACCEPTED))
    is_accepted = incoming_events.c.transaction_id.in_(ids).is_(sa.true())
    distinct = cells.adding_distinct(metrics, sa.select(incoming_events).where(is_accepted).subquery("new"))
    return IngestStatements(Compiled(statement), None if distinct is None else Compiled(distinct))


def record_statements() -> IngestStatements:
    """Compile what stores events made from records and adds them to the cells of their record metrics."""
    new = _new_events()
    return IngestStatements(Compiled(sa.select(new.c.transaction_id).add_cte(cells.adding_records(new).cte("added"))))


def _new_events() -> sa.CTE:
    """Store the incoming events whose ids are new, in the order of their ids, and yield them."""
    rows = sa.select(cells.ORGANIZATION, *incoming_events.c).order_by(incoming_events.c.transaction_id)
    return (
        insert(usage_events)
        .from_select(["organization_id", *INCOMING], rows)
        .on_conflict_do_nothing(index_elements=list(usage_events.primary_key.columns))
        .returning(*(usage_events.c[name] for name in INCOMING if name != "digest"))
        .cte("new_events")
    )


async def insert_events(
    connection: AsyncConnection, organization: str, statements: IngestStatements, events: Sequence[Event]
) -> set[str]:
    """Store and count the events whose transaction ids are new, and return these ids.

    `events` holds each transaction id once. Where another transaction is storing one of the ids, this waits for its
    end: committed, the id is not new; rolled back, it is.
    """
    raw = await connection.get_raw_connection()
    await copy_events(raw.driver_connection, events)
    result = await statements.insert.execute(connection, organization=organization)
    accepted = set(result.scalars())
    if accepted and statements.distinct is not None:
        await statements.distinct.execute(connection, organization=organization, accepted=list(accepted))
    return accepted


async def copy_events(driver: Any, events: Sequence[Event]) -> None:
    """Bring events to the temporary table of an asyncpg connection, from which `ingest_statements` takes them."""
    await driver.copy_records_to_table(incoming_events.name, records=events, columns=INCOMING)


async def void_events(
    connection: AsyncConnection, organization: str, transaction_ids: Sequence[str], metrics: Sequence[BillableMetric]
) -> None:
    """Take events out of the usage of the metrics, for ever; their ids stay taken.

    `metrics` are all that may count them; the organization's lock must be held, shared or exclusive. Locks are taken as
    writers take them: events, then cells in their order; what a cell holds is then computed again without the events.
    """
    columns = usage_events.c
    named = (columns.organization_id == organization, columns.transaction_id == sa.any_(texts(transaction_ids)))
    locked = sa.select(columns.transaction_id).where(*named).order_by(columns.transaction_id).with_for_update()
    await connection.execute(locked)
    await connection.execute(
        sa.update(usage_events).where(*named, columns.voided_at.is_(None)).values(voided_at=sa.func.clock_timestamp())
    )
    keys = {
        metric.id: found
        for metric in metrics
        if (found := await cells.touched(connection, organization, metric, transaction_ids))
    }
    await cells.lock(connection, organization, [key for found in keys.values() for key in found])
    for metric in metrics:
        if metric.id in keys:
            await cells.recompute_cells(connection, organization, metric, keys[metric.id])


async def stored_digests(
    connection: AsyncConnection, organization: str, transaction_ids: Sequence[str]
) -> dict[str, bytes]:
    """Return the content digests of those of the ids that are stored.

    A statement of its own, after the insert: only so it sees what a concurrent writer committed meanwhile.
    """
    columns = usage_events.c
    query = sa.select(columns.transaction_id, columns.digest).where(
        columns.organization_id == organization, columns.transaction_id == sa.any_(texts(transaction_ids))
    )
    return {row.transaction_id: row.digest for row in await connection.execute(query)}


async def differing_fields(
    connection: AsyncConnection, organization: str, events: Mapping[int, Event]
) -> dict[int, list[str]]:
    """Compare events with what is stored under their ids; return the names of the fields that differ, by index.

    Digests only speed the comparison up: content is what decides that two events conflict.
    """
    sent = (
        sa.func.unnest(
            sa.literal(list(events), ARRAY(sa.Integer)),
            texts([event.transaction_id for event in events.values()]),
            texts([event.customer_key for event in events.values()]),
            texts([event.event_type for event in events.values()]),
            sa.literal([event.timestamp for event in events.values()], ARRAY(INSTANT)),
            texts([event.properties for event in events.values()]),
        )
        .table_valued("position", "transaction_id", "customer_key", "event_type", "timestamp", "properties")
        .render_derived("sent")
    )
    stored = usage_events.c
    query = (
        sa.select(
            sent.c.position,
            (stored.customer_key != sent.c.customer_key).label("customer_id"),
            (stored.event_type != sent.c.event_type).label("event_type"),
            (stored.timestamp != sent.c.timestamp).label("timestamp"),
            (stored.properties != sa.cast(sent.c.properties, JSONB)).label("properties"),
        )
        .select_from(sent)
        .join(
            usage_events,
            sa.and_(stored.organization_id == organization, stored.transaction_id == sent.c.transaction_id),
        )
    )
    rows = (await connection.execute(query)).mappings()
    return {row["position"]: [name for name, differs in row.items() if differs is True] for row in rows}


async def time_span(connection: AsyncConnection, organization: str) -> tuple[datetime, datetime] | None:
    """Return the timestamps of the first and the last stored event."""
    query = sa.select(sa.func.min(usage_events.c.timestamp), sa.func.max(usage_events.c.timestamp)).where(
        usage_events.c.organization_id == organization
    )
    first, last = (await connection.execute(query)).one()
    return None if first is None else (first, last)


async def list_unmatched_keys(
    connection: AsyncConnection, organization: str, *, after: str, limit: int
) -> tuple[list[UnmatchedKey], str | None]:
    """Return keys after the one given that stored events name and no customer owns, in byte order.

    Also returns the key after which to go on, None at the end. Walks the index from one key to the next, so the cost
    grows with the number of keys and not of events; and a bounded number of them, so it may find few or none.
    """
    found: list[UnmatchedKey] = []
    for _ in range(WALKS_MAX):
        walked = list((await connection.execute(_next_keys(organization, after))).scalars())
        found += [UnmatchedKey(*row) for row in await connection.execute(_unmatched(organization, walked))]
        if len(found) > limit:
            return found[:limit], found[limit - 1].key
        if len(walked) < KEYS_WALKED:
            return found, None
        after = walked[-1]
    return found, after


def _next_keys(organization: str, after: str) -> sa.Select[Any]:
    """Select the next different customer keys of events, in order, up to KEYS_WALKED."""
    columns = usage_events.c

    def least_after(key: Any) -> sa.Select[Any]:
        return sa.select(sa.func.min(columns.customer_key)).where(
            columns.organization_id == organization, columns.customer_key > key
        )

    first = least_after(after).scalar_subquery()
    keys = sa.select(first.label("key"), sa.literal(1).label("number")).cte("keys", recursive=True)
    following = least_after(keys.c.key).scalar_subquery()
    keys = keys.union_all(
        sa.select(following, keys.c.number + 1).where(keys.c.key.is_not(None), keys.c.number < KEYS_WALKED)
    )
    return sa.select(keys.c.key).where(keys.c.key.is_not(None)).order_by(keys.c.number)


def _unmatched(organization: str, keys: Sequence[str]) -> sa.Select[Any]:
    """Select the totals of those of the keys that no customer owns and that have events, in order."""
    columns = usage_events.c
    key = sa.func.unnest(texts(keys)).table_valued("key").render_derived("walked")
    totals = (
        sa.select(
            sa.func.count().label("events"),
            sa.func.min(columns.timestamp).label("first"),
            sa.func.max(columns.timestamp).label("last"),
        )
        .where(
            columns.organization_id == organization,
            columns.customer_key == key.c.key,
            columns.voided_at.is_(None),
        )
        .lateral("totals")
    )
    owned = sa.exists().where(customer_keys.c.organization_id == organization, customer_keys.c.key == key.c.key)
    return (
        sa.select(key.c.key, totals.c.events, totals.c.first, totals.c.last)
        .select_from(key.join(totals, sa.true()))
        .where(sa.not_(owned), totals.c.events > 0)
        .order_by(key.c.key.collate("C"))
    )
