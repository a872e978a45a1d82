"""Claims about ingest: one verdict per event, once and only once, whoever races, fails, leaves or dies."""

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from conftest import FAST, Client, event, running_server, start_server, timestamp
from faults import fault_of, read_fault, until, until_waiting
from google.protobuf.struct_pb2 import Value
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import insert

from metering.v1 import customer_pb2, error_reason_pb2, event_pb2
from service.config import Config
from service.database import POOL_SIZE, Database
from service.domain import checks
from service.domain import events as domain
from service.domain.events import TimeLimits
from service.errors import InvalidArgument
from service.ingest import Batch, Ingest
from service.migrations import upgrade
from service.postgres import EmbeddedPostgres
from service.rpc.wire import events as wire
from service.server import SERVICES, serving
from service.store import events as event_store
from service.store import organizations
from service.store.tables import usage_cells, usage_events

ACCEPTED, DUPLICATE, CONFLICT, REJECTED = (
    event_pb2.Verdict.Value(f"VERDICT_{name}") for name in ("ACCEPTED", "DUPLICATE", "CONFLICT", "REJECTED")
)
DAY = {
    "window_size": "WINDOW_SIZE_DAY",
    "starting_on": timestamp(datetime(2026, 1, 1, tzinfo=UTC)),
    "ending_before": timestamp(datetime(2026, 1, 2, tzinfo=UTC)),
}


# --- What the tests share


async def stored_ids(database: Database) -> list[str]:
    """The transaction ids of all stored events, sorted."""
    async with database.engine.connect() as connection:
        return sorted((await connection.execute(sa.select(usage_events.c.transaction_id))).scalars())


async def counted(database: Database) -> int:
    """How many events all cells together count."""
    async with database.engine.connect() as connection:
        return int((await connection.execute(sa.select(sa.func.sum(usage_cells.c.counted)))).scalar_one() or 0)


@contextlib.asynccontextmanager
async def served(database: Database, **settings: Any) -> AsyncIterator[Client]:
    """A server in this process whose pool the test can look into."""
    config = Config(listen=("127.0.0.1:0",), allow_unsafe_database=True, **settings)
    async with serving(config, database) as (address, *_), grpc.aio.insecure_channel(address) as channel:
        yield Client(address, channel)


class Arrivals:
    """Counts the calls that have come to the queue, so that tests know their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        original = Ingest.ingest

        def arrive(*arguments: Any) -> Any:
            self.number += 1
            return original(*arguments)

        monkeypatch.setattr(Ingest, "ingest", arrive)

    async def start(self, *calls: Awaitable[Any]) -> list["asyncio.Future[Any]"]:
        """Start calls one after the other, each when the one before has come to the queue."""
        tasks = []
        for call in calls:
            expected = self.number + 1
            tasks.append(asyncio.ensure_future(call))
            await until(lambda expected=expected: self.number >= expected)
        return tasks


@contextlib.asynccontextmanager
async def full_queue(
    client: Client, database: Database, arrivals: Arrivals
) -> AsyncIterator[list["asyncio.Future[Any]"]]:
    """Hold the organization's writers off while the block runs: calls that come now will share one transaction."""
    async with database.engine.begin() as connection:
        await organizations.lock_exclusive(connection, "default")
        # It waits for the lock, and all later calls, which are small, wait for it.
        first = await arrivals.start(client.ingest(event("first")))
        yield first
    await asyncio.gather(*first)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Arrivals:
    """The calls that have come to the queue."""
    return Arrivals(monkeypatch)


# --- Races


async def race(database_url: str, rounds: int) -> None:
    """Send one batch from 64 callers at once, over two server processes, again and again."""
    callers, events = 64, 8
    servers = [start_server(METERING_DATABASE_URL=database_url) for _ in range(2)]
    try:
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for server in servers:
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
                clients.append(Client(server.address, channel))
            metric = await clients[0].create_metric(aggregation_type="AGGREGATION_TYPE_SUM", aggregation_key="n")
            customer = await clients[0].create_customer(ingest_aliases=["acme"])
            total = 0
            for number in range(rounds):
                batch = [event(f"{number}-{i}", properties={"n": number * events + i}) for i in range(events)]
                total += sum(number * events + i for i in range(events))
                # Each caller has an order of its own: equal orders could not deadlock.
                orders = [random.sample(range(events), events) for _ in range(callers)]
                answers = await asyncio.gather(
                    *(clients[i % 2].ingest(*(batch[j] for j in order)) for i, order in enumerate(orders))
                )
                verdicts: dict[int, Counter[int]] = {j: Counter() for j in range(events)}
                for order, answer in zip(orders, answers, strict=True):
                    for j, verdict in zip(order, answer.verdicts, strict=True):
                        verdicts[j][verdict] += 1
                assert verdicts == {j: {ACCEPTED: 1, DUPLICATE: callers - 1} for j in range(events)}
            windows = await clients[1].all_usage(**DAY)
            assert [(w.customer_id, w.billable_metric_id, w.value) for w in windows] == [
                (customer.id, metric.id, str(total))
            ]
    finally:
        codes = [server.stop() for server in servers]
    assert codes == [0, 0]


async def test_one_of_many_equal_callers_is_accepted(database_url: str, database: Database) -> None:
    """Of 64 callers with the same batch, over two processes, exactly one is told ACCEPTED per event; sums are exact."""
    await race(database_url, 12)
    assert len(await stored_ids(database)) == 12 * 8


@pytest.mark.long
async def test_one_of_many_equal_callers_is_accepted_long(database_url: str) -> None:
    """As above, 200 times."""
    await race(database_url, 200)


async def test_overlapping_batches_count_each_event_once(client: Client, database: Database) -> None:
    """Batches that overlap in every way, in any order, store and count every event once and never fail."""
    await client.create_metric()
    ids = [f"e{i}" for i in range(40)]
    picks = [random.sample(ids, random.randint(1, 40)) for _ in range(150)]
    answers = await asyncio.gather(*(client.ingest(*map(event, pick)) for pick in picks))
    accepted = [
        one
        for pick, a in zip(picks, answers, strict=True)
        for one, v in zip(pick, a.verdicts, strict=True)
        if v == ACCEPTED
    ]
    assert sorted(accepted) == await stored_ids(database)
    assert len(accepted) == len(set(accepted)) == await counted(database)
    assert {verdict for answer in answers for verdict in answer.verdicts} <= {ACCEPTED, DUPLICATE}


@pytest.mark.parametrize(
    ("ending", "other", "verdict"),
    [
        ("commit", {}, DUPLICATE),
        ("commit", {"event_type": "other", "properties": {"n": 2}}, CONFLICT),
        ("commit", {"customer_id": "globex", "at": datetime(2026, 1, 1, 1, tzinfo=UTC)}, CONFLICT),
        ("rollback", {}, ACCEPTED),
        ("rollback", {"event_type": "other"}, ACCEPTED),
    ],
)
async def test_a_duplicate_waits_for_the_first_writer(
    client: Client, database: Database, ending: str, other: dict[str, Any], verdict: int
) -> None:
    """While another transaction holds the id, the call waits; how that ends decides the verdict."""
    await client.create_metric()
    sent = event("held", properties={"n": 1})
    fields = {"properties": {"n": 1}, **other}
    held = wire.event(event("held", **fields))
    assert isinstance(held, domain.Event)
    row = {**held._asdict(), "organization_id": "default", "properties": fields["properties"]}
    async with database.engine.connect() as writer:
        await writer.execute(insert(usage_events).values(row))
        call = asyncio.ensure_future(client.ingest(event("before"), sent, event("zlast")))
        await until_waiting(database.engine)
        assert not call.done()
        await (writer.commit() if ending == "commit" else writer.rollback())
        answer = await call
    assert list(answer.verdicts) == [ACCEPTED, verdict, ACCEPTED]
    assert await stored_ids(database) == ["before", "held", "zlast"]
    # The row written by hand is in no cell.
    assert await counted(database) == (3 if ending == "rollback" else 2)
    if verdict == CONFLICT:
        (issue,) = answer.issues
        assert (issue.index, issue.field) == (1, "events[1].transaction_id")
        differing = ["timestamp" if name == "at" else name for name in other]
        assert f"({', '.join(differing)})" in issue.message
    else:
        assert not answer.issues


# --- Shared transactions


@pytest.mark.parametrize("kind", ["python", "database"])
async def test_only_the_poisoned_caller_fails(
    client: Client, database: Database, arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """When a shared transaction fails for one caller's data, each is tried alone and only that one gets INTERNAL."""
    await client.create_metric()
    original, sizes = event_store.insert_events, []

    async def poisonable(connection: Any, organization: str, statements: Any, events: Sequence[Any]) -> set[str]:
        sizes.append(len(events))
        if any(one.transaction_id == "poison" for one in events):
            if kind == "python":
                raise ValueError("SELECT poison FROM /usr/secret")
            await connection.execute(sa.text("SELECT 1 / 0 AS poison"))
        return await original(connection, organization, statements, events)

    monkeypatch.setattr(event_store, "insert_events", poisonable)
    names = ["a", "b", "poison", "c", "d"]
    async with full_queue(client, database, arrivals):
        calls = await arrivals.start(*(client.ingest(event(name), event(f"{name}2")) for name in names))
    await asyncio.wait(calls)
    # The one transaction that was shared, then every caller on its own.
    assert sizes == [1, 10, 2, 2, 2, 2, 2]
    for name, call in zip(names, calls, strict=True):
        if name == "poison":
            fault = await fault_of(call)
            assert (fault.code, fault.reason, fault.fields) == ("INTERNAL", "INTERNAL", ())
            assert "poison" not in fault.text
            assert fault.metadata == {"request_id": fault.request_id}
        else:
            assert list((await call).verdicts) == [ACCEPTED, ACCEPTED]
    assert await stored_ids(database) == ["a", "a2", "b", "b2", "c", "c2", "d", "d2", "first"]
    assert await counted(database) == 9


async def test_equal_ids_of_waiting_callers_are_decided_in_order_of_arrival(
    client: Client, database: Database, arrivals: Arrivals
) -> None:
    """In one shared transaction the first caller is accepted; later ones get DUPLICATE or CONFLICT against it."""
    contents = [1, 2, 1, 2, 1]
    async with full_queue(client, database, arrivals):
        calls = await arrivals.start(*(client.ingest(event("x", properties={"n": n})) for n in contents))
    verdicts = [list((await call).verdicts) for call in calls]
    assert verdicts == [[ACCEPTED], [CONFLICT], [DUPLICATE], [CONFLICT], [DUPLICATE]]


async def test_an_all_or_nothing_call_shares_with_nobody(
    client: Client, database: Database, arrivals: Arrivals
) -> None:
    """A call that fails as a whole takes no other waiting call with it, and a whole one is stored beside them."""
    async with full_queue(client, database, arrivals):
        calls = await arrivals.start(
            client.ingest(event("a")),
            client.ingest(event("b"), faulty("b2"), all_or_nothing=True),
            client.ingest(event("c")),
            # "first" was taken before all of these; two of these in different transactions have no order.
            client.ingest(event("d"), event("first"), all_or_nothing=True),
            client.ingest(event("e"), event("first", event_type="other")),
        )
    assert list((await calls[0]).verdicts) == [ACCEPTED]
    assert list((await calls[2]).verdicts) == [ACCEPTED]
    assert list((await calls[3]).verdicts) == [ACCEPTED, DUPLICATE]
    assert list((await calls[4]).verdicts) == [ACCEPTED, CONFLICT]
    assert (await fault_of(calls[1])).brief == ("INVALID_ARGUMENT", "FIELD_REQUIRED", "events[1].customer_id")
    assert await stored_ids(database) == ["a", "c", "d", "e", "first"]


async def test_a_caller_that_leaves_the_queue_leaves_nothing(
    client: Client, database: Database, arrivals: Arrivals
) -> None:
    """A call cancelled while it waits is not stored; those around it are."""
    async with full_queue(client, database, arrivals):
        calls = await arrivals.start(*(client.ingest(event(name)) for name in "abc"))
        calls[1].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await calls[1]
        await _cancellation_seen(client)
    assert list((await calls[0]).verdicts) == list((await calls[2]).verdicts) == [ACCEPTED]
    assert await stored_ids(database) == ["a", "c", "first"]


@pytest.mark.parametrize(("events", "all_or_nothing", "transactions"), [(499, False, 1), (500, False, 2), (1, True, 2)])
async def test_when_a_second_transaction_begins(
    client: Client, database: Database, arrivals: Arrivals, events: int, all_or_nothing: bool, transactions: int
) -> None:
    """Few events wait for the transaction that runs; many, or what can share with nobody, begin one beside it."""
    writing = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    )
    async with full_queue(client, database, arrivals):
        sent = client.ingest(*(event(f"e{i}") for i in range(events)), all_or_nothing=all_or_nothing)
        (call,) = await arrivals.start(sent)
        await _cancellation_seen(client)
        async with database.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            for _ in range(20):
                found = (await connection.execute(writing)).scalar_one()
                assert found <= transactions
                if found == transactions > 1:
                    break
                await asyncio.sleep(0.02)
        assert found == transactions
    assert set((await call).verdicts) == {ACCEPTED}


async def test_calls_on_their_way_in_share_a_transaction(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that come some turns of the loop after one another are stored by one transaction, though it could begin."""
    monkeypatch.setattr("service.ingest.GATHERING_S", 60)  # the machine may be busy
    stored: list[int] = []
    insert_events = event_store.insert_events

    async def counted(*given: Any) -> set[str]:
        stored.append(len(given[3]))
        return await insert_events(*given)

    monkeypatch.setattr(event_store, "insert_events", counted)
    ingest = Ingest(database, TimeLimits())

    async def call(i: int) -> list[domain.Outcome]:
        for _ in range(2 * i):
            await asyncio.sleep(0)
        item = wire.event(event(f"e{i}"))
        assert isinstance(item, domain.Event)
        return await ingest.ingest("default", Batch([item]))

    outcomes = await asyncio.gather(*map(call, range(10)))
    assert [one.verdict for found in outcomes for one in found] == [domain.Verdict.ACCEPTED] * 10
    assert stored == [10]


async def _cancellation_seen(client: Client) -> None:
    # Frames of one connection are handled in order: once a later call is answered, the cancellation was seen.
    await client.customers.ListCustomers(customer_pb2.ListCustomersRequest())


# --- Reading


def test_long_names_are_not_kept() -> None:
    """Names of properties are kept between events only if they are short: a refused one could be megabytes."""
    long = "x" * 100_000
    for value in (1, "text", True, None):
        sent = event("e", properties={"object": {long: value, "short": 1}})
        assert isinstance(wire.event(sent), tuple)
    assert long not in wire._names
    assert wire._names["short"] == '"short":'


@given(text=st.text(max_size=8) | st.text(" \x00\x1f\x7f\u2028a", max_size=8) | st.integers(126, 258).map("x".__mul__))
def test_plain_texts_are_identifiers_without_a_fault(text: str) -> None:
    """What is taken for an identifier at a glance is one by the rule."""
    if checks.is_plain(text):
        assert checks.identifier("field", text) is None


# --- One batch


def faulty(transaction_id: str) -> event_pb2.UsageEvent:
    """An event without a customer."""
    return event(transaction_id, customer_id="")


def ahead(transaction_id: str) -> event_pb2.UsageEvent:
    """An event of the day after tomorrow."""
    return event(transaction_id, at=datetime.now(UTC) + timedelta(days=2))


def other(transaction_id: str) -> event_pb2.UsageEvent:
    """An event with other content than the usual one."""
    return event(transaction_id, event_type="other")


ALL_OR_NOTHING = [
    # what is sent (s is stored before), and the code, reason and fields; None = OK with these verdicts
    ([event, "n"], [ACCEPTED]),
    ([event, "n", event, "s"], [ACCEPTED, DUPLICATE]),
    ([event, "s", event, "s"], [DUPLICATE, DUPLICATE]),
    ([event, "n", event, "n"], [ACCEPTED, DUPLICATE]),
    ([event, "n", faulty, "m"], ("INVALID_ARGUMENT", "FIELD_REQUIRED", ("events[1].customer_id",))),
    ([faulty, "n", event, "s"], ("INVALID_ARGUMENT", "FIELD_REQUIRED", ("events[0].customer_id",))),
    ([event, "n", ahead, "m"], ("INVALID_ARGUMENT", "TIMESTAMP_TOO_FAR_AHEAD", ("events[1].timestamp",))),
    ([event, "n", event, "urg:1"], ("INVALID_ARGUMENT", "TRANSACTION_ID_RESERVED", ("events[1].transaction_id",))),
    ([event, "n", other, "s"], ("ALREADY_EXISTS", "IDEMPOTENCY_CONFLICT", ("events[1].transaction_id",))),
    ([event, "n", other, "n"], ("ALREADY_EXISTS", "IDEMPOTENCY_CONFLICT", ("events[1].transaction_id",))),
    ([event, "n", ahead, "s"], ("ALREADY_EXISTS", "IDEMPOTENCY_CONFLICT", ("events[1].transaction_id",))),
    # A rejected event outweighs a conflict, wherever it stands.
    ([other, "s", event, "n", faulty, "m"], ("INVALID_ARGUMENT", "FIELD_REQUIRED", ("events[2].customer_id",))),
    ([event, "n", faulty, "m", other, "s"], ("INVALID_ARGUMENT", "FIELD_REQUIRED", ("events[1].customer_id",))),
    (
        [other, "s", event, "n", other, "n", event, "s"],
        ("ALREADY_EXISTS", "IDEMPOTENCY_CONFLICT", ("events[0].transaction_id", "events[2].transaction_id")),
    ),
    (
        [faulty, "n", ahead, "m"],
        ("INVALID_ARGUMENT", "FIELD_REQUIRED", ("events[0].customer_id", "events[1].timestamp")),
    ),
]


async def test_all_or_nothing(client: Client, database: Database) -> None:
    """Stored events do not fail an all-or-nothing call; rejected ones do, else conflicting ones; then nothing stays."""
    await client.create_metric()
    for number, (sent, expected) in enumerate(ALL_OR_NOTHING):
        await client.ingest(event(f"s{number}"))
        before, count = await stored_ids(database), await counted(database)
        batch = []
        for make, name in zip(sent[::2], sent[1::2], strict=True):
            batch.append(make(f"{name}{number}"))
        call = client.ingest(*batch, all_or_nothing=True)
        if isinstance(expected, list):
            answer = await call
            assert (list(answer.verdicts), list(answer.issues)) == (expected, []), number
            continue
        fault = await fault_of(call)
        assert (fault.code, fault.reason, fault.fields) == expected, number
        assert fault.metadata == {"field": expected[2][0], "violations": str(len(expected[2]))}
        assert (await stored_ids(database), await counted(database)) == (before, count), number
        # The id of the event that was whole is free: nothing of the call was kept.
        assert list((await client.ingest(event(f"n{number}"))).verdicts) == [ACCEPTED]


async def test_conflicts_may_be_ignored(client: Client, database: Database) -> None:
    """A whole batch that ignores conflicts stores the rest and tells them; what cannot be stored fails it."""
    await client.create_metric()
    await client.ingest(event("a"), event("b"))
    ingest = Ingest(database, TimeLimits())

    async def send(*events: event_pb2.UsageEvent) -> list[domain.Verdict]:
        batch = await wire.batch(events, all_or_nothing=True)
        outcomes = await ingest.ingest("default", Batch(batch.items, True, ignores_conflicts=True))
        return [one.verdict for one in outcomes]

    try:
        told = await send(event("a"), other("b"), event("c"), other("c"), event("c"), event("d"))
        verdict = domain.Verdict
        expected = [verdict.DUPLICATE, verdict.CONFLICT, verdict.ACCEPTED, verdict.CONFLICT, verdict.DUPLICATE]
        assert told == [*expected, verdict.ACCEPTED]
        assert (await stored_ids(database), await counted(database)) == (["a", "b", "c", "d"], 4)
        for bad in (faulty("e"), ahead("e")):
            with pytest.raises(InvalidArgument) as caught:
                await send(other("a"), event("f"), bad)
            assert caught.value.violations[0].field.startswith("events[2].")
        assert (await stored_ids(database), await counted(database)) == (["a", "b", "c", "d"], 4)
        # Without it the same batch is refused as a whole.
        fault = await fault_of(client.ingest(other("a"), event("f"), all_or_nothing=True))
        assert fault.code == "ALREADY_EXISTS"
        assert await stored_ids(database) == ["a", "b", "c", "d"]
    finally:
        await ingest.close()


async def test_the_first_of_equal_ids_in_a_batch_wins(client: Client, database: Database) -> None:
    """Every mix of two contents and a faulty event under one id: the first sound one is stored, the rest follow it."""
    await client.create_metric()
    kinds = {"a": event, "b": other, "x": faulty}
    mixes = ["".join(mix) for length in (1, 2, 3, 4) for mix in itertools.product("abx", repeat=length)]
    batch, expected = [], []
    for mix in mixes:
        winner = next((kind for kind in mix if kind != "x"), None)
        seen = False
        for kind in mix:
            batch.append(kinds[kind](mix))
            expected.append(
                REJECTED if kind == "x" else CONFLICT if kind != winner else DUPLICATE if seen else ACCEPTED
            )
            seen = seen or kind == winner
    answer = await client.ingest(*batch)
    assert list(answer.verdicts) == expected
    assert [issue.index for issue in answer.issues] == [i for i, v in enumerate(expected) if v in {CONFLICT, REJECTED}]
    assert await stored_ids(database) == sorted(mix for mix in mixes if set(mix) != {"x"})
    assert await counted(database) == expected.count(ACCEPTED)
    async with database.engine.connect() as connection:
        rows = await connection.execute(sa.select(usage_events.c.transaction_id, usage_events.c.event_type))
        kept = {row.transaction_id: row.event_type for row in rows}
    assert kept == {mix: "request" if mix.strip("x")[0] == "a" else "other" for mix in mixes if set(mix) != {"x"}}
    # And again: what was accepted is a duplicate now, everything else is as it was.
    again = await client.ingest(*batch)
    assert list(again.verdicts) == [DUPLICATE if verdict == ACCEPTED else verdict for verdict in expected]


async def test_content_decides_and_not_the_digest(client: Client, database: Database) -> None:
    """An event stored under another digest (an older version's) is still a duplicate of the same content."""
    stored = [event(f"e{i}", properties={"n": i, "list": [1, {"deep": None}]}) for i in range(3)]
    await client.ingest(*stored)
    async with database.engine.begin() as connection:
        await connection.execute(sa.update(usage_events).values(digest=b"old"))
    conflicting = event("e1", properties={"n": 1})
    answer = await client.ingest(*stored, conflicting)
    assert list(answer.verdicts) == [DUPLICATE, DUPLICATE, DUPLICATE, CONFLICT]
    assert "(properties)" in answer.issues[0].message


async def test_a_stored_event_is_a_duplicate_for_ever(database_url: str, database: Database) -> None:
    """What time limits would reject now is answered as stored if it is; else it is rejected with the reason."""
    now = datetime.now(UTC)
    stored, soon = event("old", at=now - timedelta(hours=3)), event("soon", at=now + timedelta(hours=3))
    async with running_server(database_url) as client:
        assert list((await client.ingest(stored, soon)).verdicts) == [ACCEPTED, ACCEPTED]
    limits = TimeLimits(ahead=timedelta(minutes=5), oldest=timedelta(hours=1))
    async with running_server(database_url, time_limits=limits) as client:
        answer = await client.ingest(
            stored,
            soon,
            event("old", at=now - timedelta(hours=4)),
            event("soon", at=now + timedelta(hours=4)),
            event("old2", at=now - timedelta(hours=3)),
            event("soon2", at=now + timedelta(hours=3)),
            event("old2", at=now - timedelta(hours=3)),
            event("now", at=now),
        )
        assert list(answer.verdicts) == [
            DUPLICATE, DUPLICATE, CONFLICT, CONFLICT, REJECTED, REJECTED, REJECTED, ACCEPTED,
        ]  # fmt: skip
        assert [(i.index, error_reason_pb2.ErrorReason.Name(i.reason), i.field) for i in answer.issues] == [
            (2, "ERROR_REASON_IDEMPOTENCY_CONFLICT", "events[2].transaction_id"),
            (3, "ERROR_REASON_IDEMPOTENCY_CONFLICT", "events[3].transaction_id"),
            (4, "ERROR_REASON_TIMESTAMP_TOO_OLD", "events[4].timestamp"),
            (5, "ERROR_REASON_TIMESTAMP_TOO_FAR_AHEAD", "events[5].timestamp"),
            (6, "ERROR_REASON_TIMESTAMP_TOO_OLD", "events[6].timestamp"),
        ]
        # all_or_nothing follows the same rule.
        assert list((await client.ingest(stored, soon, all_or_nothing=True)).verdicts) == [DUPLICATE, DUPLICATE]
    assert await stored_ids(database) == ["now", "old", "soon"]


@pytest.mark.parametrize(
    ("offset", "verdict"), [(timedelta(hours=24, seconds=-30), ACCEPTED), (timedelta(hours=24, seconds=30), REJECTED)]
)
async def test_events_may_lie_a_day_ahead(client: Client, offset: timedelta, verdict: int) -> None:
    """The default limit is 24 hours ahead and none backwards."""
    answer = await client.ingest(
        event(at=datetime.now(UTC) + offset), event(at=datetime(1, 1, 2, tzinfo=UTC)), event(at=datetime.now(UTC))
    )
    assert list(answer.verdicts) == [verdict, ACCEPTED, ACCEPTED]


# --- What counts as the same content

KEY = "04CA7E72-4229-4A6E-AB11-9F7376FCCBCB"


def at_nanos(nanos: int) -> event_pb2.UsageEvent:
    """An event so many nanoseconds after the start of 2026."""
    made = event("e", properties={"a": 1})
    made.timestamp.nanos = nanos
    return made


SAME = [
    ("upper-case UUID", event("e", customer_id=KEY), event("e", customer_id=KEY.lower()), True),
    ("mixed-case UUID", event("e", customer_id=KEY.lower()), event("e", customer_id=KEY.title()), True),
    ("UUID without dashes is an alias", event("e", customer_id=KEY.replace("-", "")),
     event("e", customer_id=KEY.replace("-", "").lower()), False),
    ("alias case", event("e", customer_id="Acme"), event("e", customer_id="acme"), False),
    ("trailing blank", event("e", customer_id="acme"), event("e", customer_id="acme "), False),
    ("NFC and NFD", event("e", customer_id="\u00e9"), event("e", customer_id="e\u0301"), False),
    ("fields run together", event("e", customer_id="ab", event_type="c"),
     event("e", customer_id="a", event_type="bc"), False),
    ("nanoseconds are cut", at_nanos(1_999), at_nanos(1_000), True),
    ("microseconds are not", at_nanos(2_000), at_nanos(1_999), False),
    ("milliseconds", at_nanos(123_000_000), at_nanos(123_000_999), True),
    ("last nanosecond is not rounded up", at_nanos(999_999_999), at_nanos(999_999_000), True),
    ("integer and float", event("e", properties={"a": 1}), event("e", properties={"a": 1.0}), True),
    ("minus zero", event("e", properties={"a": 0}), event("e", properties={"a": -0.0}), True),
    ("key order", event("e", properties={"a": 1, "b": 2}), event("e", properties={"b": 2, "a": 1}), True),
    ("deep key order", event("e", properties={"x": {"a": 1, "b": [1]}}),
     event("e", properties={"x": {"b": [1.0], "a": 1}}), True),
    ("list order", event("e", properties={"x": [1, 2]}), event("e", properties={"x": [2, 1]}), False),
    ("number and string", event("e", properties={"a": 1}), event("e", properties={"a": "1"}), False),
    ("trailing zero in a string", event("e", properties={"a": "1.0"}), event("e", properties={"a": "1"}), False),
    ("true and string", event("e", properties={"a": True}), event("e", properties={"a": "true"}), False),
    ("no properties and empty ones", event("e"), event("e", properties={}), True),
    ("value without a kind is null", event("e", properties={"a": None}), event("e", properties={"a": None}), True),
    ("tiny number", event("e", properties={"a": 5e-324}), event("e", properties={"a": 5e-324}), True),
]  # fmt: skip


async def test_what_is_the_same_content(client: Client, database: Database) -> None:
    """UUID case, nanoseconds, number forms and key order do not make another fact; everything else does."""
    for number, (name, first, second, same) in enumerate(SAME):
        one, two = event_pb2.UsageEvent(), event_pb2.UsageEvent()
        one.CopyFrom(first)
        two.CopyFrom(second)
        one.transaction_id = two.transaction_id = f"e{number}"
        if name == "value without a kind is null":
            two.properties.fields["a"].CopyFrom(Value())
        expected = DUPLICATE if same else CONFLICT
        together = await client.ingest(one, two)
        assert list(together.verdicts) == [ACCEPTED, expected], name
        assert list((await client.ingest(two, one)).verdicts) == [expected, DUPLICATE], name
        # The same when contents must be compared, not digests.
        async with database.engine.begin() as connection:
            await connection.execute(sa.update(usage_events).values(digest=b""))
        assert list((await client.ingest(two, one)).verdicts) == [expected, DUPLICATE], name


async def test_what_is_stored_of_an_event(client: Client, database: Database) -> None:
    """Keys that look like a UUID are stored in lower case, instants cut to microseconds, numbers plain."""
    sent = event("e", customer_id=KEY, properties={"a": 1e-7, "b": 2**53 - 1, "c": 0.1, "d": [1.50, None, True, "x"]})
    sent.timestamp.nanos = 123_456_789
    await client.ingest(sent)
    columns = usage_events.c
    query = sa.select(
        columns.customer_key, columns.timestamp, sa.cast(columns.properties, sa.Text), columns.ingested_at
    )
    async with database.engine.connect() as connection:
        key, at, properties, ingested_at = (await connection.execute(query)).one()
    assert (key, at) == (KEY.lower(), datetime(2026, 1, 1, microsecond=123_456, tzinfo=UTC))
    assert properties == '{"a": 0.0000001, "b": 9007199254740991, "c": 0.1, "d": [1.5, null, true, "x"]}'
    assert abs(datetime.now(UTC) - ingested_at) < timedelta(minutes=1)


# --- Callers that leave


async def test_callers_that_leave(database: Database) -> None:
    """Cancelled and expired calls store each event once or not at all, and cost neither connections nor counts."""
    connects: list[None] = []
    sa.event.listen(database.engine.sync_engine, "connect", lambda *_: connects.append(None))
    acknowledged: set[str] = set()
    outcomes: Counter[str] = Counter()

    async def call(client: Client, number: int) -> None:
        ids = [f"{number}-{i}" for i in range(3)] if number % 3 else []
        seconds = random.uniform(0.001, 0.05)
        timeout = seconds if number % 2 else None
        if ids:
            pending = client.events.IngestEvents(event_pb2.IngestEventsRequest(events=map(event, ids)), timeout=timeout)
        elif number % 4:
            pending = client.customers.ListCustomers(customer_pb2.ListCustomersRequest(), timeout=timeout)
        else:
            customer = customer_pb2.Customer(name=f"{number}")
            pending = client.customers.CreateCustomer(
                customer_pb2.CreateCustomerRequest(customer=customer), timeout=timeout
            )
        try:
            if not number % 2:
                async with asyncio.timeout(seconds):
                    await pending
            else:
                await pending
        except TimeoutError:
            pending.cancel()
            outcomes["cancelled"] += 1
        except grpc.aio.AioRpcError as error:
            outcomes[error.code().name] += 1
        else:
            acknowledged.update(ids)
            outcomes["ok"] += 1

    # A transaction that is not shielded takes its connection along, and what comes after waits for ever.
    async with served(database) as client, asyncio.timeout(60):
        await client.create_metric()
        await client.ingest(event("warm"))
        for start in range(0, 600, 60):
            await asyncio.gather(*(call(client, number) for number in range(start, start + 60)))
        await until(lambda: _idle(database))
        # Nothing is stuck: the next call is served at once.
        assert list((await client.ingest(event("next"))).verdicts) == [ACCEPTED]
        await until(lambda: _idle(database))
        stored = await stored_ids(database)
        assert len(stored) == len(set(stored)) == await counted(database)
        assert acknowledged <= set(stored)
    assert outcomes.keys() - {"ok"} == {"cancelled", "DEADLINE_EXCEEDED"}
    assert len(connects) <= POOL_SIZE
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def _idle(database: Database) -> bool:
    """Say whether every connection stays in the pool for a moment."""
    for _ in range(5):
        if database.engine.pool.checkedout():  # type: ignore[attr-defined]
            return False
        await asyncio.sleep(0.01)
    return True


async def test_a_call_whose_write_began_is_stored_though_its_caller_left(client: Client, database: Database) -> None:
    """The transaction is shielded: a caller that hangs up while it waits for a row still has its events stored."""
    await client.create_metric()
    held = wire.event(event("held"))
    assert isinstance(held, domain.Event)
    async with database.engine.connect() as writer:
        row = {**held._asdict(), "organization_id": "default", "properties": {}}
        await writer.execute(insert(usage_events).values(row))
        call = client.events.IngestEvents(event_pb2.IngestEventsRequest(events=[event("held"), event("mine")]))
        await until_waiting(database.engine)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        await _cancellation_seen(client)
        await writer.rollback()
    await until(lambda: _stored(database, {"held", "mine"}))
    assert await counted(database) == 2


async def test_a_transaction_outlives_its_caller(database: Database) -> None:
    """A write whose caller hangs up inside it ends by itself: it is stored, and its connection is kept."""
    connects: list[None] = []
    async with served(database) as client:
        for number in range(4):
            async with database.engine.connect() as writer:
                # Reads go on, writes wait.
                await writer.execute(sa.text("LOCK TABLE customers IN SHARE MODE"))
                customer = customer_pb2.Customer(name=f"{number}")
                call = client.customers.CreateCustomer(customer_pb2.CreateCustomerRequest(customer=customer))
                await until_waiting(database.engine)
                if not number:  # every connection that this takes is there by now
                    sa.event.listen(database.engine.sync_engine, "connect", lambda *_: connects.append(None))
                call.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await call
                await _cancellation_seen(client)
                await writer.rollback()
            await until(lambda number=number: _has_customers(client, number + 1), 5)
    assert len(connects) <= 1


async def _has_customers(client: Client, number: int) -> bool:
    return len((await client.customers.ListCustomers(customer_pb2.ListCustomersRequest())).customers) == number


async def _stored(database: Database, ids: set[str]) -> bool:
    return set(await stored_ids(database)) == ids


async def test_ten_thousand_calls_at_once(client: Client, database: Database) -> None:
    """A burst of 10,000 calls on one channel is answered OK to the last."""
    await client.create_metric()
    answers = await asyncio.gather(*(client.ingest(event(f"{i}")) for i in range(10_000)), return_exceptions=True)
    assert Counter(str(answer) if isinstance(answer, BaseException) else answer.verdicts[0] for answer in answers) == {
        ACCEPTED: 10_000
    }
    assert await counted(database) == 10_000


# --- The database goes away


@pytest.fixture
async def own_postgres() -> AsyncIterator[EmbeddedPostgres]:
    """A Postgres that the test may stop."""
    root = Path(tempfile.mkdtemp(prefix="metering-gone-"))
    os.chmod(root, 0o755)  # noqa: S103 - as root, Postgres runs as another user
    postgres = EmbeddedPostgres(root / "data", settings=FAST, sync=False)
    try:
        await asyncio.to_thread(postgres.start)
        database = Database(postgres.url)
        await upgrade(database.engine)
        await database.close()
        yield postgres
    finally:
        await asyncio.to_thread(postgres.stop)
        shutil.rmtree(root, ignore_errors=True)


async def health(client: Client) -> dict[str, int]:
    """What health says of the process and each service."""
    stub = health_pb2_grpc.HealthStub(client.channel)
    names = ("", *SERVICES)
    answers = await asyncio.gather(*(stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in names))
    return {name: answer.status for name, answer in zip(names, answers, strict=True)}


async def test_the_database_is_gone_and_comes_back(own_postgres: EmbeddedPostgres) -> None:
    """Without its database every call says UNAVAILABLE and when to retry, health tells; afterwards all is as before."""
    serving_all = dict.fromkeys(("", *SERVICES), health_pb2.HealthCheckResponse.SERVING)
    gone = serving_all | dict.fromkeys(SERVICES, health_pb2.HealthCheckResponse.NOT_SERVING)
    batch = [event(f"e{i}") for i in range(5)]
    database = Database(own_postgres.url)
    async with served(database) as client:
        await client.create_metric()
        customer = await client.create_customer(ingest_aliases=["acme"])
        assert list((await client.ingest(batch[0])).verdicts) == [ACCEPTED]
        assert await health(client) == serving_all
        await asyncio.to_thread(own_postgres.stop)
        for call in (
            client.ingest(*batch),
            client.ingest(*batch, all_or_nothing=True),
            client.all_usage(**DAY),
            client.customers.ListCustomers(customer_pb2.ListCustomersRequest()),
            client.create_metric(),
        ):
            fault = await fault_of(call)
            assert (fault.code, fault.reason, fault.retry_s) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE", 1)
        await until(lambda: _has_health(client, gone))
        await asyncio.to_thread(own_postgres.start)
        await until(lambda: _has_health(client, serving_all))
        assert list((await client.ingest(*batch)).verdicts) == [DUPLICATE, *[ACCEPTED] * 4]
        (window,) = await client.all_usage(**DAY)
        assert (window.customer_id, window.value) == (customer.id, "5")
    await database.close()


async def _has_health(client: Client, expected: dict[str, int]) -> bool:
    return await health(client) == expected


async def test_the_database_is_killed_under_load(own_postgres: EmbeddedPostgres) -> None:
    """Killed in mid-work: calls are OK or UNAVAILABLE, nothing acknowledged is lost, and retries count once."""
    database = Database(own_postgres.url)
    outcomes: Counter[str] = Counter()
    acknowledged: set[str] = set()

    async def send(client: Client, caller: int, over: asyncio.Event) -> None:
        for number in itertools.count():
            if over.is_set():
                return
            ids = [f"{caller}-{number}-{i}" for i in range(3)]
            while True:  # resend until it is known
                try:
                    answer = await client.ingest(*map(event, ids))
                except grpc.aio.AioRpcError as error:
                    fault = read_fault(error)
                    assert (fault.code, fault.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE"), fault
                    outcomes["unavailable"] += 1
                    await asyncio.sleep(0.02)
                    continue
                assert set(answer.verdicts) <= {ACCEPTED, DUPLICATE}
                outcomes["ok"] += 1
                acknowledged.update(ids)
                break

    async def more(outcome: str, number: int) -> None:
        target = outcomes[outcome] + number
        await until(lambda: outcomes[outcome] >= target, 60)

    async with served(database) as client:
        await client.create_metric()
        over = asyncio.Event()
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for caller in range(16):
                group.create_task(send(client, caller, over))
            for _ in range(2):
                await more("ok", 50)
                assert own_postgres.pid
                os.kill(own_postgres.pid, signal.SIGKILL)
                await more("unavailable", 1)
            await more("ok", 50)
            over.set()
        stored = await stored_ids(database)
        assert set(stored) == acknowledged
        assert len(stored) == await counted(database)
    await database.close()


async def test_a_connection_that_dies_inside_the_copy(
    client: Client, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection lost between statements is UNAVAILABLE, also where rows go in past SQLAlchemy."""
    original = event_store.insert_events

    async def cut_off(connection: Any, organization: str, statements: Any, events: Sequence[Any]) -> set[str]:
        backend = (await connection.execute(sa.select(sa.func.pg_backend_pid()))).scalar_one()
        async with database.engine.connect() as killer:
            await killer.execute(sa.select(sa.func.pg_terminate_backend(backend, 5000)))
        return await original(connection, organization, statements, events)

    with monkeypatch.context() as patch:
        patch.setattr(event_store, "insert_events", cut_off)
        fault = await fault_of(client.ingest(event("e")))
    assert (fault.code, fault.reason) == ("UNAVAILABLE", "DATABASE_UNAVAILABLE")
    assert list((await client.ingest(event("e"))).verdicts) == [ACCEPTED]
