"""Events that are voided count nowhere, for ever, exactly: whatever the metric, and whoever writes beside it.

Store-level: `void_events` is called as the deletion of a record group does, under the organization's shared lock, but
on events of every kind and metrics of every aggregation.
"""

import asyncio
import contextlib
import functools
import random
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import oracle
import pytest
import sqlalchemy as sa
import test_backfill
from conftest import Client, running_server, timestamp
from faults import until
from sqlalchemy.ext.asyncio import AsyncConnection
from test_backfill import Steps
from test_oracle import create, fetch, grouped_row, read, read_pages, wire

from metering.v1 import billable_metric_pb2, event_pb2, usage_pb2
from service.database import Database, sqlstate
from service.store import events as event_store
from service.store import metrics as metric_store
from service.store import organizations
from service.store.tables import usage_cells, usage_distinct_values, usage_events
from service.verify import verify_cells

steps = test_backfill.steps

ORGANIZATION = organizations.DEFAULT_ORGANIZATION
DAY = datetime(2026, 1, 1, tzinfo=UTC)
HOURS = 6
ACME = "00000000-0000-0000-0000-00000000000a"
OTHER = "00000000-0000-0000-0000-00000000000b"
CUSTOMERS = {ACME: frozenset({ACME, "acme", "acme-eu"}), OTHER: frozenset({OTHER, "other"})}
# Every aggregation, with filters and groups that do not let all events pass.
DEFINITIONS = tuple(
    replace(one, id=str(uuid.UUID(int=i + 1)))
    for i, one in enumerate(
        (
            oracle.Metric("", "COUNT", group_keys=(("g",), ("g", "h"))),
            oracle.Metric("", "SUM", "q", group_keys=(("g",),)),
            oracle.Metric("", "MIN", "q", event_types=("call",), group_keys=(("g",),)),
            oracle.Metric("", "MAX", "q", excluded_event_types=("job",)),
            oracle.Metric("", "AVG", "q", group_keys=(("h",), ("g",))),
            oracle.Metric("", "LATEST", "q", filters=(oracle.Filter("g", exists=True),), group_keys=(("g",),)),
            oracle.Metric("", "UNIQUE", "u", group_keys=(("g",),)),
        )
    )
)
COUNT, SUM, MIN, MAX, AVG, LATEST, UNIQUE = DEFINITIONS
VALUES = (1, 1, 2.5, -7, "0.000000000000000001", "9" * 38, "text", None, 0, "60.0")


# --- What the tests share


@dataclass
class Book:
    """What was stored and what of it was voided, beside a server with every metric."""

    client: Client
    database: Database
    stored: list[oracle.Event] = field(default_factory=list)
    voided: set[str] = field(default_factory=set)
    definitions: Sequence[oracle.Metric] = DEFINITIONS

    @property
    def left(self) -> list[oracle.Event]:
        """The events that count."""
        return [one for one in self.stored if one.transaction_id not in self.voided]

    async def ingest(self, events: Sequence[oracle.Event], client: Client | None = None) -> None:
        """Store events, all new."""
        response = await (client or self.client).ingest(*map(wire, events))
        assert set(response.verdicts) <= {event_pb2.VERDICT_ACCEPTED}
        self.stored += events

    async def void(self, ids: Iterable[str]) -> None:
        """Void events."""
        wanted = list(ids)
        await self.database.write("default", functools.partial(voiding, ids=wanted))
        self.voided |= set(wanted)

    async def check(self) -> None:
        """Fail unless every usage window is what plain Python makes of the events left, and every cell is exact."""
        for size, windows in (
            ("HOUR", oracle.hours(DAY, HOURS)),
            # Both bounds cut an hour: what is in their parts is counted from the events themselves.
            ("NONE", [(DAY + timedelta(minutes=20), DAY + timedelta(hours=HOURS - 1, minutes=40))]),
        ):
            for definition in self.definitions:
                simple = next((key for key in definition.group_keys if len(key) == 1), None)
                request = {
                    "window_size": f"WINDOW_SIZE_{size}",
                    "billable_metrics": [{"id": definition.id, "group_by": {"key": simple[0]} if simple else None}],
                    "customer_ids": list(CUSTOMERS),
                }
                grouped = oracle.GroupBy(simple[0]) if simple else None
                selection = oracle.Selection(CUSTOMERS, [(definition, grouped)], windows)
                expected = oracle.usage(self.left, selection, datetime.now(UTC))
                found = await read(lambda: self.client, request, windows, len(expected))
                # An empty window of a voided event has a time at which it changed; see the tests of that.
                assert _untimed(found) == _untimed(expected), (definition.aggregation, size)
        for definition in self.definitions:
            for key in definition.group_keys:
                wanted = oracle.GroupedSelection(
                    CUSTOMERS[ACME], definition, oracle.hours(DAY, HOURS), key, omit_empty=True
                )
                rows = await read_pages([self.client], "ListUsageWithGroups", _grouped(definition, key), 0)
                expected_rows = oracle.grouped_usage(self.left, wanted, datetime.now(UTC))
                assert [grouped_row(one) for one in rows.rows] == expected_rows, (definition.aggregation, key)
        assert await wrong_cells(self.database) == []


async def voiding(connection: AsyncConnection, *, ids: Sequence[str]) -> None:
    """Void events in a transaction, as the deletion of a group does."""
    await organizations.lock_shared(connection, ORGANIZATION)
    metrics = await metric_store.event_metrics(connection, ORGANIZATION)
    await event_store.void_events(connection, ORGANIZATION, ids, metrics)


async def wrong_cells(database: Database) -> list[str]:
    """Compare all cells with the events and say which differ."""
    found: list[str] = []
    await verify_cells(database, lambda one: found.append(str(one)))
    return found


def drawn(draw: random.Random, number: int, name: str = "e", *, hours: int = HOURS) -> list[oracle.Event]:
    """Events of few customers, kinds, values and groups, so that many share a cell."""
    return [
        oracle.Event(
            f"{name} {i}",
            draw.choice(("acme", "acme", "acme-eu", "other", "nobody")),
            draw.choice(("call", "call", "job")),
            DAY + timedelta(minutes=draw.choice((0, 10, 20, 30, 50)), hours=draw.randrange(hours)),
            {
                name: value
                for name, value in (
                    ("q", draw.choice(VALUES)),
                    ("u", draw.choice(("x", "y", "z", None))),
                    ("g", draw.choice(("eu", "us", None))),
                    ("h", draw.choice(("a", "b", None))),
                )
                if value is not None or draw.random() < 0.5
            },
        )
        for i in range(number)
    ]


def _grouped(definition: oracle.Metric, key: Sequence[str]) -> dict[str, Any]:
    return {
        "window_size": "WINDOW_SIZE_HOUR",
        "starting_on": timestamp(DAY),
        "ending_before": timestamp(DAY + HOURS * oracle.HOUR),
        "customer_id": ACME,
        "billable_metric_id": definition.id,
        "group_key": key,
        "omit_empty_windows": True,
    }


def _untimed(rows: Iterable[oracle.Window]) -> list[oracle.Window]:
    return [row._replace(used=None) for row in rows]


async def opened(
    client: Client, database: Database, definitions: Sequence[oracle.Metric] = DEFINITIONS, past: int = 0
) -> Book:
    """Create the customers, then store so many events, then create the metrics."""
    book = Book(client, database, definitions=definitions)
    for customer_id, keys in CUSTOMERS.items():
        await client.create_customer(id=customer_id, ingest_aliases=sorted(keys - {customer_id}))
    if past:
        await book.ingest(drawn(random.Random(past), past, "past"))
    for definition in definitions:
        await create(client, definition)
    return book


@pytest.fixture
async def book(client: Client, database: Database) -> Book:
    """A server with customers and a metric of each aggregation."""
    return await opened(client, database)


async def waits(database: Database) -> bool:
    """Say whether any transaction waits for another's."""
    query = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    async with database.engine.connect() as connection:
        return bool((await connection.execute(query)).scalar_one())


class Brake:
    """Lets whoever comes by stand still until it is let go."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.released = asyncio.Event()

    async def wait(self) -> None:
        """Stand still."""
        self.reached.set()
        await self.released.wait()


@contextlib.asynccontextmanager
async def held_writer(book: Book, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Brake]:
    """Hold the first one that stores events at the end of its transaction, until the block ends."""
    original, brake = event_store.insert_events, Brake()

    async def insert(*arguments: Any) -> set[str]:
        accepted = await original(*arguments)
        if not brake.reached.is_set():
            await brake.wait()
        return accepted

    with monkeypatch.context() as patch:
        patch.setattr(event_store, "insert_events", insert)
        try:
            yield brake
        finally:
            brake.released.set()


@contextlib.asynccontextmanager
async def held_void(book: Book, ids: Sequence[str]) -> AsyncIterator[Brake]:
    """Void events and hold the transaction before its commit, until the block ends."""
    brake = Brake()

    async def work(connection: AsyncConnection) -> None:
        await voiding(connection, ids=ids)
        await brake.wait()

    task = asyncio.create_task(book.database.write("default", work))
    await asyncio.wait_for(brake.reached.wait(), 20)
    try:
        yield brake
    finally:
        brake.released.set()
        await task
    book.voided |= set(ids)


@pytest.fixture
def deadlocks() -> Iterator[list[str]]:
    """The deadlocks that Postgres ended; who tried again hides them from everybody else."""
    found: list[str] = []

    def noted(context: Any) -> None:
        if sqlstate(context.original_exception) == "40P01":
            found.append(str(context.statement))

    sa.event.listen(sa.Engine, "handle_error", noted)
    yield found
    sa.event.remove(sa.Engine, "handle_error", noted)


def at(minute: int, transaction_id: str, key: str = "acme", **properties: Any) -> oracle.Event:
    """An event in the first hour."""
    return oracle.Event(transaction_id, key, "call", DAY + timedelta(minutes=minute), properties)


# --- What voiding is


@pytest.mark.parametrize("seed", range(3))
async def test_what_is_voided_counts_nowhere(book: Book, seed: int) -> None:
    """However events are chosen, one, some or all, every window of every metric is what the events left give.

    Would catch an extreme, latest or distinct value that stays when its event goes, or a group that keeps its sum.
    """
    draw = random.Random(seed)
    await book.ingest(drawn(draw, 150))
    for number in (1, 20, 60, len(book.stored)):
        left = book.left
        await book.void(one.transaction_id for one in draw.sample(left, min(number, len(left))))
        await book.check()
    assert not book.left


async def test_the_outstanding_values_give_way_to_the_next(book: Book) -> None:
    """Without its largest, least, latest and only event of a value, a cell shows the next ones.

    Would catch measures that are only ever added to.
    """
    await book.ingest(
        [
            at(0, "least", q=-5, u="x", g="eu"),
            at(10, "middle", q=1, u="x", g="eu"),
            at(20, "largest", q=9, u="y", g="eu"),
            at(30, "latest", q=3, u="z", g="eu"),
        ]
    )
    query: dict[str, Any] = {
        "window_size": "WINDOW_SIZE_NONE",
        "starting_on": timestamp(DAY),
        "ending_before": timestamp(DAY + oracle.HOUR),
        "customer_ids": [ACME],
    }

    async def values() -> list[str]:
        rows = await book.client.all_usage(**query, billable_metrics=[{"id": one.id} for one in DEFINITIONS])
        found = {row.billable_metric_id: row.value for row in rows}
        return [found[one.id] for one in (COUNT, SUM, MIN, MAX, AVG, LATEST, UNIQUE)]

    assert await values() == ["4", "8", "-5", "9", "2", "3", "3"]
    await book.void(["largest", "latest", "least"])
    assert await values() == ["1", "1", "1", "1", "1", "1", "1"]
    await book.check()


async def test_an_empty_cell_holds_nothing(book: Book) -> None:
    """Once the last event of a cell is voided its windows have no value, none is skipped, and no value is distinct.

    Would catch a sum of 0 where there is no usage, and distinct values left behind for the next event.
    """
    await book.ingest([at(0, "a", q=1, u="x", g="eu"), at(5, "b", q="text", g="eu")])
    await book.void(["a", "b"])
    await book.check()
    async with book.database.engine.connect() as connection:
        assert (await connection.execute(sa.select(sa.func.count()).select_from(usage_distinct_values))).scalar() == 0
        rows = (await connection.execute(sa.select(usage_cells))).all()
    assert rows
    assert {(row.counted, row.skipped, row.sum, row.min, row.max, row.latest_value) for row in rows} == {
        (0, 0, None, None, None, None)
    }
    await book.ingest([at(7, "c", q=2, u="x", g="eu")])
    await book.check()


async def test_voiding_again_changes_nothing(book: Book) -> None:
    """What is voided twice, alone or among others, keeps the time of the first, and the numbers stay.

    Would catch a subtraction in place of a computation, and a void time that moves.
    """
    await book.ingest(drawn(random.Random(4), 40))
    ids = [one.transaction_id for one in book.stored]

    async def times() -> dict[str, datetime | None]:
        async with book.database.engine.connect() as connection:
            query = sa.select(usage_events.c.transaction_id, usage_events.c.voided_at)
            return {row.transaction_id: row.voided_at for row in await connection.execute(query)}

    await book.void(ids[:10])
    first = await times()
    await book.void(ids[:10])
    await book.void(ids[5:15])
    await book.check()
    now = await times()
    assert {one: now[one] for one in ids[:10]} == {one: first[one] for one in ids[:10]}
    assert all(now[one] for one in ids[:15])
    assert not any(now[one] for one in ids[15:])


async def test_ids_of_voided_events_stay_taken(book: Book) -> None:
    """A voided event that is sent again is DUPLICATE, another under its id CONFLICT, and it stays void.

    Would catch an event that comes back to life, or counts a second time.
    """
    await book.ingest(drawn(random.Random(5), 30))
    gone = book.stored[:12]
    await book.void(one.transaction_id for one in gone)
    response = await book.client.ingest(*map(wire, gone))
    assert set(response.verdicts) == {event_pb2.VERDICT_DUPLICATE}
    response = await book.client.ingest(wire(gone[0]._replace(event_type="another")))
    assert list(response.verdicts) == [event_pb2.VERDICT_CONFLICT]
    await book.check()
    # Also while new events of the same hours come in the same call.
    more = drawn(random.Random(6), 10, "more")
    await book.client.ingest(*map(wire, [*gone, *more]))
    book.stored += more
    await book.check()


async def test_only_what_is_named_is_voided(book: Book) -> None:
    """Ids that nobody stored, no ids at all, and other organizations' events change nothing.

    Would catch a condition that an empty list or a missing organization turns into "all".
    """
    await book.ingest(drawn(random.Random(7), 30))
    await book.database.write("default", functools.partial(voiding, ids=["nobody's", "e", ""]))
    await book.database.write("default", functools.partial(voiding, ids=[]))
    await book.check()

    async def elsewhere(connection: AsyncConnection) -> None:
        await organizations.create_organization(connection, "another")
        metrics = await metric_store.event_metrics(connection, ORGANIZATION)
        ids = [one.transaction_id for one in book.stored]
        await event_store.void_events(connection, "another", ids, metrics)

    await book.database.background(elsewhere)
    await book.check()


async def test_what_does_not_commit_is_not_voided(book: Book) -> None:
    """A transaction that fails after it voided leaves every event and number as they were.

    Would catch cells that are written outside of the transaction.
    """
    await book.ingest(drawn(random.Random(8), 30))

    async def work(connection: AsyncConnection) -> None:
        await voiding(connection, ids=[one.transaction_id for one in book.stored])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await book.database.write("default", work)
    await book.check()


async def test_archived_metrics_lose_what_is_voided_too(book: Book) -> None:
    """What counted before a metric was archived leaves it when it is voided, and no later event comes in by that.

    Would catch a recomputation that forgets the archive time, or that leaves archived metrics alone.
    """
    now = datetime.now(UTC)
    past, ahead = now - timedelta(seconds=1), now + timedelta(hours=1)
    event = at(0, "")
    await book.ingest([event._replace(transaction_id=f"past {i}", timestamp=past) for i in range(3)])
    await book.ingest([event._replace(transaction_id="ahead", timestamp=ahead)])
    metric = await book.client.create_metric()
    request = billable_metric_pb2.ArchiveBillableMetricRequest(id=metric.id)
    await book.client.metrics.ArchiveBillableMetric(request)
    await book.void(["past 0", "ahead"])
    (window,) = await book.client.all_usage(
        window_size="WINDOW_SIZE_NONE",
        starting_on=timestamp(now - 2 * oracle.HOUR),
        ending_before=timestamp(now + 3 * oracle.HOUR),
        customer_ids=[ACME],
        billable_metrics=[{"id": metric.id}],
    )
    assert window.value == "2"
    assert await wrong_cells(book.database) == []


# --- Voiding beside others


async def test_a_void_waits_for_a_writer_of_its_cells(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that stored events of the cell, and has not committed, is counted by the void or after it, once.

    Would catch a recomputation that does not see the writer's events and overwrites what it added: of the same group,
    of a new one, and of the same distinct value.
    """
    await book.ingest([at(0, "a", q=9, u="x", g="eu"), at(5, "b", q=1, u="y", g="eu")])
    more = [at(10, "c", q=4, u="x", g="eu"), at(11, "d", q=-4, u="new", g="us"), at(12, "e", q=2, u="x", g="eu")]
    async with held_writer(book, monkeypatch) as brake:
        writer = asyncio.create_task(book.ingest(more))
        await brake.reached.wait()
        void = asyncio.create_task(book.void(["a"]))
        await until(lambda: waits(book.database))
        assert not void.done()
    await asyncio.gather(writer, void)
    await book.check()


async def test_a_writer_waits_for_a_void_of_its_cells(book: Book) -> None:
    """What comes into a cell while an event of it is being voided comes on top of what the void leaves.

    Would catch a void that lets a writer add to the cell of before.
    """
    await book.ingest([at(0, "a", q=9, u="x", g="eu"), at(5, "b", q=1, u="y", g="eu")])
    async with held_void(book, ["a"]):
        writer = asyncio.create_task(book.ingest([at(10, "c", q=4, u="x", g="eu"), at(11, "d", q=-4, u="new", g="us")]))
        await until(lambda: waits(book.database))
        assert not writer.done()
    await writer
    await book.check()


async def test_the_same_value_comes_while_its_only_event_goes(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distinct value whose only event is voided while another one of it is being stored is counted, once.

    Would catch a value that is deleted after the writer found it there, in both orders.
    """
    await book.ingest([at(0, "a", u="x", g="eu"), at(0, "p", u="x", g="us")])
    async with held_writer(book, monkeypatch) as brake:
        writer = asyncio.create_task(book.ingest([at(10, "b", u="x", g="eu")]))
        await brake.reached.wait()
        void = asyncio.create_task(book.void(["a"]))
        await until(lambda: waits(book.database))
    await asyncio.gather(writer, void)
    await book.check()
    async with held_void(book, ["p"]):
        writer = asyncio.create_task(book.ingest([at(10, "q", u="x", g="us")]))
        await until(lambda: waits(book.database))
    await writer
    await book.check()


async def test_writers_of_other_cells_do_not_wait(client: Client, database: Database) -> None:
    """While an event is being voided, events of other hours and customers are stored at once, of its hour afterwards.

    Would catch a void that locks more than the cells it changes: all writers would stand still behind a deletion.
    """
    book = await opened(client, database, [UNIQUE])
    await book.ingest([at(0, "a", u="x", g="eu")])
    async with held_void(book, ["a"]), asyncio.timeout(10):
        await book.ingest([at(70, "later", u="x", g="eu"), at(0, "theirs", "other", u="x", g="eu")])
        await book.ingest([at(71, "later too", u="x", g="us")])
        # All groups of an hour share a cell.
        writer = asyncio.create_task(book.ingest([at(1, "us", u="x", g="us")]))
        await until(lambda: waits(book.database))
    await writer
    await book.check()


async def test_two_voids_of_the_same_cells(book: Book, deadlocks: list[str]) -> None:
    """Voids that share events and cells, in any order of their ids, wait for each other and end right.

    Would catch cells or events that are locked in the order in which they are named.
    """
    draw = random.Random(9)
    await book.ingest(drawn(draw, 200, hours=3))
    ids = [one.transaction_id for one in book.stored]
    await asyncio.gather(*(book.void(draw.sample(ids, 25)) for _ in range(12)))
    await book.check()
    assert deadlocks == []


@pytest.mark.parametrize("seed", range(2))
async def test_voids_beside_writers(database_url: str, database: Database, deadlocks: list[str], seed: int) -> None:
    """Of many tasks that void and store in the same cells, through two servers, the sum is exact, without deadlocks.

    Would catch a cell that was computed from another moment than the one in which it was locked.
    """
    draw = random.Random(seed)
    async with running_server(database_url) as client, running_server(database_url) as other:
        book = await opened(client, database)
        await book.ingest(drawn(draw, 120, hours=2))
        writing = 8

        async def write(to: Client, name: str) -> None:
            nonlocal writing
            for i in range(8):
                events = drawn(draw, draw.choice((1, 2, 15)), f"{name} {i}", hours=2)
                # New groups come into the same hours all the time.
                fresh = [one._replace(properties={**one.properties, "g": f"{name} {i % 3}"}) for one in events[:2]]
                await book.ingest([*fresh, *events[2:]], to)
            writing -= 1

        async def void() -> None:
            while writing:
                left = book.left
                await book.void(one.transaction_id for one in draw.sample(left, min(len(left), draw.choice((1, 3, 9)))))

        async with asyncio.timeout(60):
            await asyncio.gather(*(write((client, other)[i % 2], f"w{i}") for i in range(8)), *(void() for _ in "1234"))
        assert book.voided
        await book.check()
    assert deadlocks == []


async def test_one_value_comes_and_goes_in_many_tasks(book: Book) -> None:
    """Events of one distinct value that are stored and voided again and again, by many at once, leave what is left.

    Would catch a distinct value without an event, or an event without its distinct value.
    """
    draw = random.Random(11)

    async def work(name: str) -> None:
        for i in range(8):
            one = at(draw.randrange(60), f"{name} {i}", u=draw.choice("xy"), g="eu", q=i)
            await book.ingest([one])
            if draw.random() < 0.8:
                await book.void([one.transaction_id])

    async with asyncio.timeout(60):
        await asyncio.gather(*(work(f"t{i}") for i in range(6)))
    await book.check()


# --- While the past is counted


@pytest.mark.parametrize("done", [0, 1, 2, 4])
async def test_voiding_while_the_past_is_counted(
    database_url: str, database: Database, steps: Steps, done: int
) -> None:
    """However far a backfill has come, an event voided in hours that are done, next, or far ahead counts nowhere.

    Would catch a void that writes cells the backfill will count again, and a backfill that counts what was voided.
    """
    steps.events_max = 20
    draw = random.Random(12)
    async with running_server(database_url) as client:
        book = await opened(client, database, past=120)
        await steps.go(database, done * len(DEFINITIONS))
        for i in range(3):
            await book.void(one.transaction_id for one in draw.sample(book.left, 15))
            await book.ingest(drawn(draw, 10, f"more {i}"))
        if done < 4:
            await steps.go(database, len(DEFINITIONS))
        await book.void(one.transaction_id for one in draw.sample(book.left, 15))
        await steps.go_on()
        for definition in DEFINITIONS:
            await client.counted(await fetch(client, definition.id))
        await book.check()


async def test_voids_beside_a_busy_backfill(database_url: str, database: Database, steps: Steps) -> None:
    """While two servers count the past of metrics, voids and writers go on, and the sum is exact.

    Would catch a void that trusts a backfill position that has moved on.
    """
    steps.events_max = 30
    await steps.go_on()
    draw = random.Random(13)
    async with running_server(database_url) as client, running_server(database_url) as other:
        book = await opened(client, database, (), past=300)
        over = False

        async def void() -> None:
            while not over:
                left = book.left
                await book.void(one.transaction_id for one in draw.sample(left, min(3, len(left))))

        async def write(to: Client, name: str) -> None:
            for i in range(15):
                await book.ingest(drawn(draw, 5, f"{name} {i}"), to)

        tasks = [asyncio.create_task(one) for one in (void(), void(), write(client, "c"), write(other, "o"))]
        for definition in DEFINITIONS:
            await create(client, definition)
        for definition in DEFINITIONS:
            await other.counted(await fetch(other, definition.id))
        over = True
        await asyncio.gather(*tasks)
        book.definitions = DEFINITIONS
        await book.check()


# --- Voiding is a change


async def test_a_void_is_a_change(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads what changed learns of a void: the window's update_time moves, also when nothing is left in it.

    Would catch a cell that is computed again and keeps its time, and an emptied one that is forgotten.
    """
    await book.ingest(
        [at(0, "a", q=1, u="x", g="eu"), at(10, "b", q=2, u="x", g="eu"), at(65, "c", q=3, u="x", g="eu")]
    )
    whole: dict[str, Any] = {
        "window_size": "WINDOW_SIZE_HOUR",
        "starting_on": timestamp(DAY),
        "ending_before": timestamp(DAY + 3 * oracle.HOUR),
        "customer_ids": [ACME],
        "billable_metrics": [{"id": one.id} for one in DEFINITIONS],
    }

    async def sync(since: Any) -> tuple[dict[str, list[usage_pb2.UsageWindow]], Any]:
        answer = await book.client.usage.ListUsage(usage_pb2.ListUsageRequest(**whole, updated_since=since))
        found: dict[str, list[usage_pb2.UsageWindow]] = {}
        for row in answer.windows:
            found.setdefault(row.billable_metric_id, []).append(row)
        return found, answer.next_updated_since

    before, since = await sync(None)
    for ids, starts, left in ((["a"], [0], "1"), (["b"], [0], None), (["c"], [1], None)):
        await book.void(ids)
        changed, since = await sync(since)
        assert changed.keys() == {one.id for one in DEFINITIONS}
        for metric_id, rows in changed.items():
            hours = [(row.starting_on.ToDatetime(tzinfo=UTC) - DAY) // oracle.HOUR for row in rows]
            assert hours == starts
            for row, hour in zip(rows, hours, strict=True):
                assert row.update_time.ToDatetime() > before[metric_id][hour].update_time.ToDatetime()
                assert row.HasField("value") == (left is not None)
        # What changed while another transaction ran is told once more.
        async with asyncio.timeout(20):
            while changed:
                changed, since = await sync(since)
    await book.check()


async def test_a_void_that_commits_late_is_not_missed(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who asked while a void had not committed yet is told of it by the next read.

    Would catch times taken before the transaction began, or a watermark that passes it.
    """
    monkeypatch.setattr("service.rpc.usage._WATERMARK_S", 0.0)
    await book.ingest([at(0, "a", q=1, u="x", g="eu"), at(10, "b", q=2, u="y", g="eu")])
    whole: dict[str, Any] = {
        "window_size": "WINDOW_SIZE_NONE",
        "starting_on": timestamp(DAY),
        "ending_before": timestamp(DAY + oracle.HOUR),
        "customer_ids": [ACME],
        "billable_metrics": [{"id": one.id} for one in DEFINITIONS],
    }
    async with held_void(book, ["a"]):
        answer = await book.client.usage.ListUsage(usage_pb2.ListUsageRequest(**whole))
        await asyncio.sleep(0.05)
    answer = await book.client.usage.ListUsage(
        usage_pb2.ListUsageRequest(**whole, updated_since=answer.next_updated_since)
    )
    found = {row.billable_metric_id: row.value for row in answer.windows}
    assert found == {one.id: value for one, value in zip(DEFINITIONS, ("1", "2", "2", "2", "2", "2", "1"), strict=True)}
