"""Claims about streams of events: answered after the commit, in order; however one ends, each event is stored once."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, event, running_server, timestamp
from faults import until, until_waiting
from streaming import NARROW, Proxy, Watched, connected, random_cut, received, watched

from metering.v1 import error_reason_pb2, event_pb2
from service.auth import TRUST_S, new_api_key
from service.config import Load
from service.database import Database
from service.rpc.events import UNANSWERED_BATCHES_MAX, UNANSWERED_BYTES_MAX
from service.store import organizations
from service.store.tables import usage_events

START = datetime(2026, 1, 1, tzinfo=UTC)
ACCEPTED, DUPLICATE = event_pb2.VERDICT_ACCEPTED, event_pb2.VERDICT_DUPLICATE
CONFLICT, REJECTED = event_pb2.VERDICT_CONFLICT, event_pb2.VERDICT_REJECTED
DAY = {
    "window_size": "WINDOW_SIZE_NONE",
    "starting_on": timestamp(START),
    "ending_before": timestamp(START + timedelta(days=1)),
}
MIB = 1024 * 1024


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Watched]:
    """A server with a customer and the sum and number of its events."""
    async with watched(database_url) as server:
        await prepare(server.client)
        yield server


async def prepare(client: Client) -> None:
    """Make a customer, and metrics that show what is counted."""
    await client.create_customer(ingest_aliases=["acme"])
    await client.create_metric(name="count")
    await client.create_metric(name="sum", aggregation_type="AGGREGATION_TYPE_SUM", aggregation_key="n")


async def totals(client: Client) -> dict[str, str]:
    """What the metrics say."""
    return {window.billable_metric_name: window.value for window in await client.all_usage(**DAY)}


def batch(sequence: int, *events: event_pb2.UsageEvent) -> event_pb2.StreamEventsRequest:
    """One batch."""
    return event_pb2.StreamEventsRequest(sequence=sequence, events=events)


async def sent(client: Client, batches: Sequence[Any], **options: Any) -> tuple[list[Any], Any]:
    """Send batches, close the sending side, and read the answers and why it ended early."""
    call = client.events.StreamEvents(**options)

    async def write() -> None:
        try:
            for one in batches:
                await call.write(one)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader is told

    writing = asyncio.ensure_future(write())
    try:
        return await received(call)
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def stored_ids(database: Database) -> Counter[str]:
    """How often each transaction id is stored."""
    async with database.engine.connect() as connection:
        return Counter((await connection.execute(sa.select(usage_events.c.transaction_id))).scalars())


@asynccontextmanager
async def held(database: Database) -> AsyncIterator[None]:
    """Keep every writer of the organization waiting while the block runs."""
    async with database.engine.begin() as connection:
        await organizations.lock_exclusive(connection, "default")
        yield


# --- Answers


async def test_batches_are_answered_in_order_after_their_commit(server: Watched) -> None:
    """Each answer carries its batch's number, in order; what it accepted is in every usage answer from then on."""
    call = server.client.events.StreamEvents()
    total = 0
    for sequence in range(1, 21):
        await call.write(batch(sequence, *(event(properties={"n": sequence}) for _ in range(sequence))))
        answer = await call.read()
        total += sequence
        assert (answer.sequence, list(answer.verdicts)) == (sequence, [ACCEPTED] * sequence)
        assert (await totals(server.client))["count"] == str(total)
    # Many at once, without waiting for answers.
    for sequence in range(21, 61):
        await call.write(batch(sequence, event(properties={"n": 1})))
    await call.done_writing()
    answers, fault = await received(call)
    assert fault is None
    assert [answer.sequence for answer in answers] == list(range(21, 61))
    assert (await totals(server.client))["count"] == str(total + 40)
    assert (server.held, server.errors()) == (0, [])


async def test_a_stream_without_batches_ends_well(server: Watched) -> None:
    """Nothing to store is no error."""
    assert await sent(server.client, []) == ([], None)


async def test_verdicts_and_issues(server: Watched) -> None:
    """Every event has its verdict, and issues with the path within its own batch, as from IngestEvents."""
    await server.client.ingest(event("stored", properties={"n": 1}))
    bad = event("", event_type="\0")
    bad.ClearField("timestamp")
    events = [
        event("new"), event("stored", properties={"n": 1}), event("stored", properties={"n": 2}), bad,
        event("new"), event("new", event_type="other"), event("urg:x"),
    ]  # fmt: skip
    answers, fault = await sent(server.client, [batch(1, event("first")), batch(2, *events), batch(3, *events)])
    assert fault is None
    assert [answer.sequence for answer in answers] == [1, 2, 3]
    rest = [DUPLICATE, CONFLICT, REJECTED, DUPLICATE, CONFLICT, REJECTED]
    assert list(answers[1].verdicts) == [ACCEPTED, *rest]
    assert list(answers[2].verdicts) == [DUPLICATE, *rest]
    unary = await server.client.ingest(*events)
    for answer in answers[1:]:
        issues = {(issue.index, issue.field) for issue in answer.issues}
        assert {index for index, _ in issues} == {2, 3, 5, 6}
        assert {(2, "events[2].transaction_id"), (3, "events[3].timestamp"), (6, "events[6].transaction_id")} <= issues
        assert list(answer.issues) == list(unary.issues)
    assert answers[1].issues[0].reason == error_reason_pb2.ERROR_REASON_IDEMPOTENCY_CONFLICT


async def test_the_first_of_equal_ids_wins(server: Watched) -> None:
    """Of two contents under one id in two batches of a stream the first is stored, whatever another stream sends."""

    async def many(mark: str) -> list[list[int]]:
        batches = []
        for number in range(60):
            own, common = f"{mark}{number}", f"common{number}"
            batches.append(batch(2 * number + 1, event(own, properties={"n": 1}), event(common, event_type=mark)))
            batches.append(batch(2 * number + 2, event(own, properties={"n": 100}), event(common, event_type=mark)))
        answers, fault = await sent(server.client, batches)
        assert fault is None
        return [list(answer.verdicts) for answer in answers]

    one, two = await asyncio.gather(many("a"), many("b"))
    for verdicts in (one, two):
        assert [first[0] for first in verdicts[::2]] == [ACCEPTED] * 60
        assert [second[0] for second in verdicts[1::2]] == [CONFLICT] * 60
    for mine, other in zip(one[::2], two[::2], strict=True):
        assert {mine[1], other[1]} == {ACCEPTED, CONFLICT}
    for verdicts in (one, two):
        for first, second in zip(verdicts[::2], verdicts[1::2], strict=True):
            assert second[1] == (DUPLICATE if first[1] == ACCEPTED else CONFLICT)
    assert await totals(server.client) == {"count": "180", "sum": "120"}


# --- What may be on its way


@pytest.mark.parametrize(("padding", "most"), [(0, UNANSWERED_BATCHES_MAX), (3 * MIB, 2), (MIB, 4)])
async def test_the_server_stops_reading(server: Watched, padding: int, most: int) -> None:
    """With 8 batches unanswered, or no room for 4 MiB more within 8, the server takes none until it has answered."""
    padded = []
    for sequence in range(1, 41):
        one = batch(sequence, event(f"e{sequence}"))
        # What the server does not know of a message weighs all the same.
        one.MergeFromString(unknown_field(padding))
        padded.append(one)
    async with connected(server.client.address, *NARROW) as narrow:
        async with held(server.database):
            task = asyncio.ensure_future(sent(narrow, padded))
            await until(lambda: server.request_bytes.taken >= most)
            await asyncio.sleep(0.3)
            assert server.request_bytes.taken == most
            assert server.held < UNANSWERED_BYTES_MAX + 4 * MIB
            assert not task.done()
        answers, fault = await task
    assert fault is None
    assert [answer.sequence for answer in answers] == list(range(1, 41))
    assert server.request_bytes.held_most < UNANSWERED_BYTES_MAX + 4 * MIB
    assert server.held == 0


def unknown_field(size: int) -> bytes:
    """The bytes of a field with a number that no message has."""
    if not size:
        return b""
    length, value = b"", size
    while value > 0x7F:
        length += bytes([value & 0x7F | 0x80])
        value >>= 7
    return b"\xfa\x3f" + length + bytes([value]) + b"x" * size


async def test_little_room_slows_and_does_not_refuse(database_url: str) -> None:
    """On a server with hardly any room for requests a stream goes on, batch by batch."""
    async with watched(database_url, load=Load(request_bytes_max=1_000)) as server:
        batches = [batch(i, *(event(properties={"x": "y" * 100}) for _ in range(20))) for i in range(1, 31)]
        answers, fault = await sent(server.client, batches)
        assert fault is None
        assert len(answers) == 30
        assert server.held == 0


MALFORMED: dict[str, tuple[bytes, str, str]] = {
    "skipped number": (batch(5, event()).SerializeToString(), "FIELD_INVALID", "sequence"),
    "same number": (batch(3, event()).SerializeToString(), "FIELD_INVALID", "sequence"),
    "no number": (batch(0, event()).SerializeToString(), "FIELD_INVALID", "sequence"),
    "negative number": (batch(-4, event()).SerializeToString(), "FIELD_INVALID", "sequence"),
    "no events": (batch(4).SerializeToString(), "FIELD_REQUIRED", "events"),
    "too many events": (
        batch(4, *[event_pb2.UsageEvent()] * 10_001).SerializeToString(), "LIMIT_EXCEEDED", "events",
    ),
    "not a message": (b"\xff\xff\xff", "MALFORMED_REQUEST", "request"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_message_ends_the_stream_after_those_before(server: Watched, name: str) -> None:
    """What was sent before a malformed message is stored and answered; then INVALID_ARGUMENT; nothing after it is."""
    raw, reason, field = MALFORMED[name]
    good = [batch(i, event(f"good{i}")).SerializeToString() for i in range(1, 4)]
    after = batch(4, event("after")).SerializeToString()
    call: Any = server.client.channel.stream_stream(
        "/metering.v1.EventService/StreamEvents", response_deserializer=event_pb2.StreamEventsResponse.FromString
    )()
    async with held(server.database):
        for one in (*good, raw, after):
            await call.write(one)
        await asyncio.sleep(0.1)
    answers, fault = await asyncio.wait_for(received(call), 10)
    assert [answer.sequence for answer in answers] == [1, 2, 3]
    assert fault is not None
    assert fault.brief == ("INVALID_ARGUMENT", reason, field)
    assert set(await stored_ids(server.database)) == {"good1", "good2", "good3"}
    await until(lambda: server.held == 0)


async def test_the_first_number_is_one(server: Watched) -> None:
    """A stream that begins with another number is refused at once, though the client keeps its side open."""
    for sequence in (0, 2):
        call = server.client.events.StreamEvents()
        await call.write(batch(sequence, event()))
        answers, fault = await asyncio.wait_for(received(call), 10)
        assert (answers, fault and fault.brief) == ([], ("INVALID_ARGUMENT", "FIELD_INVALID", "sequence"))


# --- Ends


async def test_the_database_goes_away(server: Watched) -> None:
    """A database that ends its connections ends the stream with UNAVAILABLE; sent again each event counts once."""
    batches = [batch(i, event(f"e{i}", properties={"n": i})) for i in range(1, 31)]
    kill = sa.text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    async with server.database.engine.begin() as connection:
        await organizations.lock_exclusive(connection, "default")
        task = asyncio.ensure_future(sent(server.client, batches))
        await until_waiting(server.database.engine)
        assert (await connection.execute(kill)).scalar_one() == 1
        answers, fault = await asyncio.wait_for(task, 10)
    assert fault is not None
    assert fault.brief == ("UNAVAILABLE", "DATABASE_UNAVAILABLE", None)
    assert fault.retry_s == 1
    again, fault = await sent(server.client, batches)
    assert fault is None
    assert len(again) == 30
    assert [list(answer.verdicts) for answer in again[: len(answers)]] == [[DUPLICATE]] * len(answers)
    assert await totals(server.client) == {"count": "30", "sum": str(sum(range(31)))}
    assert server.held == 0


@pytest.mark.parametrize("how", ["cancel", "close", "cut"])
async def test_a_client_that_leaves(server: Watched, how: str) -> None:
    """Whatever is unanswered when clients leave is given up, and the log has no error of it."""
    tasks = len(asyncio.all_tasks())
    async with Proxy(server.client.address) as proxy, connected(proxy.address) as client:
        calls = [client.events.StreamEvents() for _ in range(4)]
        async with held(server.database):
            for number, call in enumerate(calls):
                for sequence in range(1, 6):
                    await call.write(batch(sequence, event(f"{number}-{sequence}", properties={"x": "y" * 1000})))
            await until(lambda: server.request_bytes.taken == 20)
            assert server.held > 20_000
            if how == "cancel":
                for call in calls:
                    call.cancel()
            elif how == "close":
                await client.channel.close()
            else:
                proxy.cut()
            if how == "cancel":
                # Given up at once, though the database does not answer.
                await until(lambda: server.held == 0, 5)
        for call in calls:
            call.cancel()
    await until(lambda: (server.held, server.connections) == (0, 0), 10)
    await until(lambda: len(asyncio.all_tasks()) <= tasks, 5)
    assert [entry["event"] for entry in server.errors()] == []
    # The server serves on, and nothing is stored twice.
    assert set((await stored_ids(server.database)).values()) <= {1}
    answers, fault = await sent(server.client, [batch(1, event())])
    assert (len(answers), fault) == (1, None)


async def test_the_drain_answers_what_was_read(database_url: str, database: Database) -> None:
    """When the server ends, batches that it read are stored and answered, then SERVER_DRAINING; no other is stored."""
    stop = asyncio.Event()
    ready: asyncio.Future[Watched] = asyncio.get_running_loop().create_future()

    async def serve() -> None:
        async with watched(database_url, drain=timedelta(seconds=8)) as server:
            ready.set_result(server)
            await stop.wait()

    serving = asyncio.ensure_future(serve())
    server = await ready
    async with connected(server.client.address) as client:
        call, idle = client.events.StreamEvents(), client.events.StreamEvents()
        await idle.write(batch(1, event("idle")))
        assert (await idle.read()).sequence == 1
        async with held(database):
            for sequence in range(1, 21):
                await call.write(batch(sequence, event(f"e{sequence}")))
            await until(lambda: server.request_bytes.taken == 1 + UNANSWERED_BATCHES_MAX)
            stop.set()
            # Who has nothing under way is told at once.
            answers, fault = await asyncio.wait_for(received(idle), 5)
            assert (answers, fault and fault.brief) == ([], ("UNAVAILABLE", "SERVER_DRAINING", None))
        answers, fault = await asyncio.wait_for(received(call), 10)
        await asyncio.wait_for(serving, 10)
    assert fault is not None
    assert fault.brief == ("UNAVAILABLE", "SERVER_DRAINING", None)
    assert fault.retry_s == 1
    assert [answer.sequence for answer in answers] == list(range(1, UNANSWERED_BATCHES_MAX + 1))
    expected = {"idle", *(f"e{i}" for i in range(1, UNANSWERED_BATCHES_MAX + 1))}
    assert set(await stored_ids(database)) == expected


@pytest.mark.parametrize("first", [1, 2_000])
async def test_a_stalled_reader_of_answers_is_ended(database_url: str, first: int) -> None:
    """Who sends and does not take the answers is ended at the limit; and what was stored is known when resent."""
    async with watched(database_url, stream_stall=timedelta(seconds=0.5)) as server:
        bad = event_pb2.UsageEvent(transaction_id="x")
        # The first answer is small, or more than flow control lets in at once.
        batches = [batch(i, event(f"e{i}"), *[bad] * (2_000 if i > 1 else first)) for i in range(1, 9)]
        async with connected(server.client.address, *NARROW) as narrow:
            call = narrow.events.StreamEvents()
            for one in batches:
                await call.write(one)
            await until(lambda: server.request_bytes.taken > 0)
            await until(lambda: server.held == 0, 10)
            answers, fault = await asyncio.wait_for(received(call), 10)
            assert fault is not None
            assert fault.brief == ("ABORTED", "STREAM_STALLED", None)
            assert [answer.sequence for answer in answers] == list(range(1, len(answers) + 1))
            assert len(answers) < 8
            again, fault = await sent(narrow, batches)
        assert fault is None
        assert [answer.verdicts[0] for answer in again[: len(answers)]] == [DUPLICATE] * len(answers)
        assert len(await stored_ids(server.database)) == 8
        assert server.errors() == []


async def test_a_quiet_stream_is_not_ended(database_url: str) -> None:
    """A client may be silent for longer than the stall limit: only answers that it does not take end a stream."""
    async with watched(database_url, stream_stall=timedelta(seconds=0.2)) as server:
        call = server.client.events.StreamEvents()
        for sequence in (1, 2):
            await asyncio.sleep(0.5)
            await call.write(batch(sequence, event()))
            assert (await call.read()).sequence == sequence
        await call.done_writing()
        assert await received(call) == ([], None)


async def test_a_revoked_key_ends_the_stream(database_url: str, database: Database) -> None:
    """Batches sent after a key's revocation was felt are not stored, and the stream ends with UNAUTHENTICATED."""
    key = new_api_key()
    async with database.engine.begin() as connection:
        await organizations.create_api_key(connection, "default", key.id, "test", key.secret_hash)
    async with watched(database_url) as server:
        call = server.client.events.StreamEvents(metadata=[("authorization", f"Bearer {key.text}")])
        await call.write(batch(1, event("before")))
        assert (await call.read()).sequence == 1
        async with database.engine.begin() as connection:
            assert await organizations.revoke_api_key(connection, "default", key.id)
        await asyncio.sleep(TRUST_S + 0.2)
        await call.write(batch(2, event("after")))
        answers, fault = await asyncio.wait_for(received(call), 5)
        assert (answers, fault and fault.brief) == ([], ("UNAUTHENTICATED", "CREDENTIAL_INVALID", None))
        assert set(await stored_ids(database)) == {"before"}


@pytest.mark.parametrize("seed", range(5))
async def test_cut_connections(server: Watched, database_url: str, seed: int) -> None:
    """Cut at any byte and sent again over two replicas, what was not answered is stored, and every event once."""
    generator = random.Random(seed)
    events = [event(f"e{i}", properties={"n": i, "pad": "x" * generator.randrange(200)}) for i in range(400)]
    todo = [events[i : i + 10] for i in range(0, 400, 10)]
    size = sum(one.ByteSize() for one in events)
    cuts = 0
    async with running_server(database_url) as other, Proxy(server.client.address) as proxy:
        while todo:
            proxy.target = generator.choice([server.client.address, other.address])
            direction = generator.choice(["up", "up", "down"])
            proxy.cut_after(direction, random_cut(generator, size if direction == "up" else 2_000))
            async with connected(proxy.address) as client:
                answers, fault = await sent(client, [batch(i, *one) for i, one in enumerate(todo, 1)])
            assert [answer.sequence for answer in answers] == list(range(1, len(answers) + 1))
            assert {verdict for answer in answers for verdict in answer.verdicts} <= {ACCEPTED, DUPLICATE}
            # grpcio's client says INTERNAL of its own accord when the connection goes while it writes.
            assert fault is None or (fault.code in {"UNAVAILABLE", "INTERNAL"} and not fault.reason)
            assert fault is not None or len(answers) == len(todo), "an end that is OK answered all"
            cuts += fault is not None
            todo = todo[len(answers) :]
        assert await stored_ids(server.database) == Counter({f"e{i}": 1 for i in range(400)})
        for client in (server.client, other):
            assert await totals(client) == {"count": "400", "sum": str(sum(range(400)))}
    await until(lambda: (server.held, server.connections) == (0, 0), 10)


async def test_load_from_streams_and_calls(server: Watched) -> None:
    """Streams and calls at once, with events that several of them send: the aggregates are what is stored."""
    everything = [event(f"e{i}", properties={"n": i}) for i in range(3_000)]
    accepted: Counter[str] = Counter()

    def note(events: Sequence[Any], verdicts: Sequence[int]) -> None:
        assert len(events) == len(verdicts)
        assert set(verdicts) <= {ACCEPTED, DUPLICATE}
        accepted.update(
            one.transaction_id for one, verdict in zip(events, verdicts, strict=True) if verdict == ACCEPTED
        )

    async def by_stream(seed: int) -> None:
        chosen = random.Random(seed).sample(everything, 2_000)
        parts = [chosen[i : i + 40] for i in range(0, 2_000, 40)]
        answers, fault = await sent(server.client, [batch(i, *part) for i, part in enumerate(parts, 1)])
        assert fault is None
        for part, answer in zip(parts, answers, strict=True):
            note(part, answer.verdicts)

    async def by_call(seed: int) -> None:
        chosen = random.Random(seed).sample(everything, 800)
        for i in range(0, 800, 40):
            note(chosen[i : i + 40], (await server.client.ingest(*chosen[i : i + 40])).verdicts)

    await asyncio.gather(*(by_stream(i) for i in range(4)), *(by_call(i) for i in range(4, 8)))
    assert set(accepted.values()) == {1}
    assert await stored_ids(server.database) == accepted
    expected = sum(int(name[1:]) for name in accepted)
    assert await totals(server.client) == {"count": str(len(accepted)), "sum": str(expected)}
    assert (server.held, server.errors()) == (0, [])
