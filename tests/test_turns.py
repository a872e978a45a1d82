"""Who goes next, who has no place, and who brings too much: the limits of load, by themselves and over the wire."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client, event, running_server
from faults import Fault, fault_of, read_fault, until, until_waiting
from grpc_health.v1 import health_pb2, health_pb2_grpc

import service.store.customers
import service.turns
from metering.v1 import customer_pb2, event_pb2, usage_record_group_pb2
from service.auth import new_api_key
from service.config import Load
from service.database import READS_MAX, Database
from service.errors import Reason, ResourceExhausted
from service.store import organizations
from service.store.tables import usage_events
from service.turns import Places, Rate, Turns


async def taken(turns: Turns, organization: str, log: list[str]) -> None:
    """Take a turn and give it back at the next chance."""
    await turns.take(organization)
    log.append(organization)
    await asyncio.sleep(0)
    turns.give_back()


async def test_organizations_take_turns() -> None:
    """One with many waiting is let in once between the others, and each organization's own stay in their order."""
    turns, log = Turns(1), []
    await turns.take("holder")
    waiting = [asyncio.create_task(taken(turns, name, log)) for name in ["a"] * 5 + ["b"] * 2 + ["c"]]
    await asyncio.sleep(0)
    turns.give_back()
    await asyncio.gather(*waiting)
    assert log == ["a", "b", "c", "a", "b", "a", "a", "a"]


@pytest.mark.parametrize("at_once", [1, 3])
async def test_so_many_and_no_more_go_at_once(at_once: int) -> None:
    """However calls come, are cancelled or fail, exactly so many go at once, and no turn is lost."""
    turns, going, most = Turns(at_once), 0, 0

    async def go(number: int) -> None:
        nonlocal going, most
        await turns.take(str(number % 4))
        going += 1
        most = max(most, going)
        try:
            await asyncio.sleep(0.001 * (number % 3))
        finally:
            going -= 1
            turns.give_back()

    tasks = [asyncio.create_task(go(number)) for number in range(300)]
    for number, task in enumerate(tasks):
        if number % 3 == 0:
            await asyncio.sleep(0)
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most == at_once
    assert turns._free == at_once
    assert not turns._waiting


async def test_one_that_is_cancelled_as_it_is_let_in_passes_its_turn_on() -> None:
    """A turn given to a caller that leaves in the same moment goes to the next one."""
    turns, log = Turns(1), []
    await turns.take("a")
    leaving = asyncio.create_task(taken(turns, "b", log))
    staying = asyncio.create_task(taken(turns, "c", log))
    await asyncio.sleep(0)
    turns.give_back()  # to b, whose task has not run yet
    leaving.cancel()
    async with asyncio.timeout(5):
        await staying
    assert log == ["c"]
    assert turns._free == 1


async def test_a_queue_that_stands_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once somebody has always waited for a while, the last comes first, and who has waited too long is refused.

    Once the queue was empty a burst waits in its order.
    """
    monkeypatch.setattr(service.turns, "STANDING_S", 0.2)
    monkeypatch.setattr(service.turns, "STANDING_WAIT_S", 0.3)
    turns, log = Turns(1, sheds=True), []

    async def take(name: str) -> None:
        await turns.take("a")
        log.append(name)

    await take("holder")
    late = [asyncio.create_task(take(name)) for name in ("late", "too")]
    await asyncio.sleep(0.35)
    assert not any(one.done() for one in late)
    early, last = (asyncio.create_task(take(name)) for name in ("early", "last"))
    await asyncio.sleep(0)
    for expected in ("last", "early"):
        turns.give_back()
        await asyncio.sleep(0.01)
        assert log[-1] == expected
    for one in late:
        with pytest.raises(ResourceExhausted) as refused:
            await one
        assert refused.value.reason is Reason.OVERLOADED
        assert refused.value.retry_after_s
    await asyncio.gather(early, last)
    burst = [asyncio.create_task(take(name)) for name in ("first", "second")]
    for expected in ("first", "second"):
        await asyncio.sleep(0.01)
        turns.give_back()
        await asyncio.sleep(0.01)
        assert log[-1] == expected
    await asyncio.gather(*burst)


async def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no turn ends at all, whoever waits is refused in the end; the patient wait on."""
    monkeypatch.setattr(service.turns, "WAIT_S", 0.1)
    turns = Turns(1)
    await turns.take("a")
    patient = asyncio.create_task(turns.take("a", patient=True))
    with pytest.raises(ResourceExhausted):
        await turns.take("a")
    assert not patient.done()
    turns.give_back()
    await patient
    assert not turns._waiting


def test_places() -> None:
    """One organization has its most, the server has its own; what is left is as before."""
    places = Places("calls", 3, 2)
    with places.held("a"), places.held("a"):
        with pytest.raises(ResourceExhausted) as own, places.held("a"):
            pass
        assert own.value.reason is Reason.ORGANIZATION_LIMIT
        with places.held("b"):
            with pytest.raises(ResourceExhausted) as all_taken, places.held("c"):
                pass
            assert all_taken.value.reason is Reason.OVERLOADED
        with places.held("c"):
            pass
    assert places._taken == 0
    assert not places._taken_by


def rejection(rate: Rate, number: int) -> ResourceExhausted | None:
    """Why so many may not pass, if they may not."""
    try:
        rate.take("a", number)
    except ResourceExhausted as error:
        return error
    return None


async def test_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over any time no more passes than the rate gives and a burst; the wait that is told is enough, less is not."""
    now = 1000.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    rate, passed = Rate(10, at_once=50), 0
    for step in range(2_000):
        size = 1 + step * 7 % 20
        refused = rejection(rate, size)
        if refused is not None:
            assert refused.reason is Reason.INGEST_RATE
            assert refused.retry_after_s is not None
            now += refused.retry_after_s * 0.99
            assert rejection(rate, size) is not None
            now += refused.retry_after_s * 0.010001
            assert rejection(rate, size) is None
        passed += size
        # One call may be taken on credit.
        assert passed <= 10 * (now - 1000) + 50 + 20
    assert passed >= 10 * (now - 1000)
    rate.take("b", 50)


# --- Over the wire


class Two(NamedTuple):
    """A server, and the credentials of two organizations."""

    client: Client
    one: list[tuple[str, str]]
    two: list[tuple[str, str]]


@asynccontextmanager
async def two_organizations(database: Database, url: str, **load: Any) -> AsyncIterator[Two]:
    """A server with these limits, and two organizations on it."""
    found = []
    for name in ("one", "two"):
        key = new_api_key()
        async with database.engine.begin() as connection:
            await organizations.create_organization(connection, name)
            await organizations.create_api_key(connection, name, key.id, "test", key.secret_hash)
        found.append([("authorization", f"Bearer {key.text}")])
    async with running_server(url, load=Load(**load)) as client:
        yield Two(client, *found)


def ingest(two: Two, credential: list[tuple[str, str]], *events: event_pb2.UsageEvent) -> Any:
    """Begin to ingest events."""
    return two.client.events.IngestEvents(event_pb2.IngestEventsRequest(events=events), metadata=credential)


def listed(two: Two, credential: list[tuple[str, str]]) -> Any:
    """Begin to list customers."""
    return two.client.customers.ListCustomers(customer_pb2.ListCustomersRequest(), metadata=credential)


@asynccontextmanager
async def blocked(database: Database, organization: str) -> AsyncIterator[None]:
    """Let no event of an organization be stored while the block runs."""
    async with database.engine.begin() as connection:
        await organizations.lock_exclusive(connection, organization)
        yield


async def test_one_organizations_calls_leave_places_to_others(database: Database, database_url: str) -> None:
    """With all its calls in flight an organization gets ORGANIZATION_LIMIT at once, the other its answer."""
    async with two_organizations(database, database_url, calls_max=5, calls_of_organization_max=3) as two:
        async with blocked(database, "one"):
            held = await in_flight(database, two, 3)
            found = await fault_of(listed(two, two.one))
            assert found.brief == ("RESOURCE_EXHAUSTED", "ORGANIZATION_LIMIT", None)
            assert found.retry_s
            await listed(two, two.two)
        await asyncio.gather(*held)
        await listed(two, two.one)


async def test_a_full_server_refuses_and_stays_healthy(database: Database, database_url: str) -> None:
    """With all calls in flight everyone gets OVERLOADED with a time to wait; health answers; afterwards all is well."""
    async with two_organizations(database, database_url, calls_max=2, calls_of_organization_max=2) as two:
        async with blocked(database, "one"):
            held = await in_flight(database, two, 2)
            found = await fault_of(listed(two, two.two))
            assert found.brief == ("RESOURCE_EXHAUSTED", "OVERLOADED", None)
            assert found.retry_s
            health = await health_pb2_grpc.HealthStub(two.client.channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        await asyncio.gather(*held)
        await listed(two, two.two)


async def test_bytes_are_shared_too(database: Database, database_url: str) -> None:
    """An organization whose requests hold three quarters of the room gets ORGANIZATION_LIMIT, others do not."""
    big = [event(properties={f"p{i}": "x" * 1_000 for i in range(10)}) for _ in range(100)]
    async with two_organizations(database, database_url, request_bytes_max=4 * 2**20) as two:
        async with blocked(database, "one"):
            held = [asyncio.ensure_future(ingest(two, two.one, *big)) for _ in range(4)]
            refused = await asyncio.wait_for(fault_of(first_failed(held)), 30)
            assert refused.brief == ("RESOURCE_EXHAUSTED", "ORGANIZATION_LIMIT", None)
            await listed(two, two.two)
        ended = await asyncio.gather(*held, return_exceptions=True)
        assert sum(isinstance(one, event_pb2.IngestEventsResponse) for one in ended) == 3


async def test_streams_have_places(database: Database, database_url: str) -> None:
    """An organization with all its streams open gets ORGANIZATION_LIMIT for one more; calls and others go on."""
    async with two_organizations(database, database_url, streams_max=3, streams_of_organization_max=2) as two:
        streams = [two.client.events.StreamEvents(metadata=two.one) for _ in range(2)]
        for number, stream in enumerate(streams):
            await stream.write(event_pb2.StreamEventsRequest(sequence=1, events=[event(f"{number}")]))
            await stream.read()
        more = two.client.events.StreamEvents(metadata=two.one)
        assert (await fault_of(more.read())).brief == ("RESOURCE_EXHAUSTED", "ORGANIZATION_LIMIT", None)
        await listed(two, two.one)
        other = two.client.events.StreamEvents(metadata=two.two)
        await other.write(event_pb2.StreamEventsRequest(sequence=1, events=[event("other")]))
        await other.read()
        for stream in (*streams, other):
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
        again = two.client.events.StreamEvents(metadata=two.one)
        await again.done_writing()
        assert await again.read() is grpc.aio.EOF


async def test_the_rate_of_events_is_limited(database: Database, database_url: str) -> None:
    """An organization over its rate gets INGEST_RATE with the time to wait, and stores nothing; the other's goes on.

    Sent again after that time, every event is stored once.
    """
    async with two_organizations(database, database_url, ingest_rate=5_000) as two:
        batches = [[event(f"{number}-{i}") for i in range(10_000)] for number in range(4)]
        refused = []
        for number, events in enumerate(batches):
            found = await fault_or_none(ingest(two, two.one, *events))
            if found is not None:
                refused.append((number, found))
        assert refused
        for number, found in refused:
            assert found.brief == ("RESOURCE_EXHAUSTED", "INGEST_RATE", None)
            assert found.metadata == {"events_per_second": "5000"}
            assert found.retry_s
            await ingest(two, two.two, event())
            await until_taken(two, batches[number])
        assert await stored_events(database, "one") == 40_000


async def test_records_of_groups_count_for_the_rate(database: Database, database_url: str) -> None:
    """Records are events: groups that bring more of them than the rate gives are refused, before they are judged."""
    async with two_organizations(database, database_url, ingest_rate=1) as two:
        groups = [
            usage_record_group_pb2.NewUsageRecordGroup(
                id=f"g{i}", entitlement_id="e", records={f"k{one}": "1" for one in range(100)}
            )
            for i in range(100)
        ]
        request = usage_record_group_pb2.ReportUsageRecordGroupsRequest(groups=groups)
        call = two.client.groups.ReportUsageRecordGroups
        await call(request, metadata=two.one)
        await call(request, metadata=two.one)  # on credit
        assert (await fault_of(call(request, metadata=two.one))).reason == "INGEST_RATE"
        await call(request, metadata=two.two)


async def test_a_stream_over_the_rate_waits(database: Database, database_url: str) -> None:
    """A stream of events is slowed to the rate, never refused: every batch is answered, and stored once."""
    async with two_organizations(database, database_url, ingest_rate=20_000) as two:
        call = two.client.events.StreamEvents(metadata=two.one)
        began = asyncio.get_running_loop().time()
        for sequence in range(1, 9):
            events = [event(f"{sequence}-{i}") for i in range(10_000)]
            await call.write(event_pb2.StreamEventsRequest(sequence=sequence, events=events))
        await call.done_writing()
        answers = [answer.sequence async for answer in call]
        assert answers == list(range(1, 9))
        # A second's worth at once, a batch on credit, and the rest in its time.
        assert asyncio.get_running_loop().time() - began > (80_000 - 20_000 - 10_000 - 10_000) / 20_000


async def test_the_queue_of_an_organization_is_bounded(database: Database, database_url: str) -> None:
    """While nothing can be stored, events wait up to the limit; one more is refused at once, and the other's are not.

    What waited is stored; what was refused is not, until it is sent again.
    """
    async with two_organizations(database, database_url, ingest_queue_max=20_000) as two:
        async with blocked(database, "one"):
            waiting = [
                asyncio.ensure_future(ingest(two, two.one, *(event(f"{n}-{i}") for i in range(10_000))))
                for n in range(6)
            ]
            refused = await asyncio.wait_for(fault_of(first_failed(waiting)), 30)
            assert refused.brief == ("RESOURCE_EXHAUSTED", "OVERLOADED", None)
            await ingest(two, two.two, event())
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        stored = Counter(type(one).__name__ for one in ended)
        # Two are being stored, and two wait.
        assert stored["IngestEventsResponse"] == 4, stored
        assert await stored_events(database, "one") == 40_000


async def test_another_organization_does_not_wait_behind_a_crowd(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one organization's calls hold every turn and 60 of them wait, another's call has the next turn but one.

    Would catch turns given in the order in which calls come.
    """
    order: list[str] = []
    came: Counter[str] = Counter()
    go = asyncio.Event()
    find, take = service.store.customers.list_customers, Turns.take

    async def gated(connection: Any, organization: str, *arguments: Any, **named: Any) -> Any:
        order.append(organization)
        await go.wait()
        return await find(connection, organization, *arguments, **named)

    async def counted(turns: Turns, organization: str, **named: Any) -> None:
        came[organization] += 1
        await take(turns, organization, **named)

    monkeypatch.setattr(service.store.customers, "list_customers", gated)
    monkeypatch.setattr(Turns, "take", counted)
    async with two_organizations(database, database_url) as two:
        crowd = [asyncio.ensure_future(listed(two, two.one)) for _ in range(READS_MAX + 60)]
        await until(lambda: len(order) == READS_MAX and came["one"] == READS_MAX + 60)
        other = asyncio.ensure_future(listed(two, two.two))
        await until(lambda: came["two"])
        go.set()
        await other
        # Of those that are let in when the first turns end.
        assert order.index("two") < 2 * READS_MAX
        await asyncio.gather(*crowd, return_exceptions=True)


async def in_flight(database: Database, two: Two, number: int) -> list["asyncio.Future[Any]"]:
    """Calls of the first organization, which is blocked, that are being served: one of them holds a connection."""
    calls = []
    for _ in range(number):
        calls.append(asyncio.ensure_future(ingest(two, two.one, event())))
        await until_waiting(database.engine)
    await asyncio.sleep(0.5)
    return calls


async def stored_events(database: Database, organization: str) -> int:
    """How many events of an organization are stored."""
    columns = usage_events.c
    query = sa.select(sa.func.count()).select_from(usage_events).where(columns.organization_id == organization)
    async with database.engine.connect() as connection:
        return int(await connection.scalar(query) or 0)


async def until_taken(two: Two, events: Sequence[event_pb2.UsageEvent]) -> None:
    """Send events again until they are taken, when the server says."""
    for _ in range(100):
        again = await fault_or_none(ingest(two, two.one, *events))
        if again is None:
            return
        await asyncio.sleep(again.retry_s or 0.01)
    raise AssertionError("never taken")


async def first_failed(calls: list["asyncio.Future[Any]"]) -> Any:
    """The answer of the first of the calls that ends, which must fail."""
    ended, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    return await ended.pop()


async def fault_or_none(call: Any) -> Fault | None:
    """Why a call failed, if it did."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return read_fault(error)
    return None
