"""Metrics made after their events: the same numbers, whatever comes, stops or fails while the past is counted."""

import asyncio
import contextlib
import itertools
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import Client, event, running_server, timestamp
from faults import fault_of
from sqlalchemy.ext.asyncio import AsyncConnection

from metering.v1 import billable_metric_pb2, event_pb2, usage_pb2
from service.database import Database
from service.store import cells, metrics

DAY = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
# Every aggregation, with filters and groups that do not let all events pass.
DEFINITIONS: dict[str, dict[str, Any]] = {
    "COUNT": {"group_keys": [{"properties": ["region"]}]},
    "SUM": {"aggregation_key": "n", "group_keys": [{"properties": ["region"]}, {"properties": ["user", "region"]}]},
    "MIN": {"aggregation_key": "n"},
    "MAX": {"aggregation_key": "n", "event_type_filter": {"not_in_values": ["login"]}},
    "AVG": {"aggregation_key": "n", "event_type_filter": {"in_values": ["request"]}},
    "LATEST": {"aggregation_key": "n", "property_filters": [{"name": "region", "exists": True}]},
    "UNIQUE": {"aggregation_key": "user", "group_keys": [{"properties": ["region"]}]},
}


# --- What the tests share


class Steps:
    """Holds the backfill of every server in this process and lets it go on chunk by chunk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events_max = 20
        self.chunks = 0
        self._open = False
        self._allowed = 0
        self._changed = asyncio.Condition()
        original = metrics.backfill_chunk

        async def chunk(connection: AsyncConnection, organization: str, metric_id: uuid.UUID) -> bool:
            async with self._changed:
                await self._changed.wait_for(lambda: self._open or self._allowed)
                self._allowed = max(0, self._allowed - 1)
            more = await original(connection, organization, metric_id, events_max=self.events_max)
            self.chunks += 1
            return more

        monkeypatch.setattr(metrics, "backfill_chunk", chunk)
        # Replicas look for each other's work so often.
        monkeypatch.setattr("service.backfill.POLL_S", 0.02)

    async def go(self, database: Database, chunks: int) -> None:
        """Let so many chunks be counted and wait until they are committed."""
        for _ in range(chunks):
            before = await positions(database)
            async with self._changed:
                self._allowed += 1
                self._changed.notify_all()
            async with asyncio.timeout(20):
                while True:
                    if await positions(database) != before:
                        break
                    await asyncio.sleep(0.01)

    async def go_on(self) -> None:
        """Let all the rest be counted."""
        async with self._changed:
            self._open = True
            self._changed.notify_all()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The brake of the backfill, on."""
    return Steps(monkeypatch)


async def positions(database: Database) -> dict[uuid.UUID, datetime | None]:
    """How far the backfill of each metric has come; None = to the end."""
    found = await database.read("default", lambda c: metrics.all_metrics(c, "default"))
    return {metric.id: metric.backfilled_until for metric in found}


async def start_metric(client: Client, aggregation: str = "COUNT", **fields: Any) -> billable_metric_pb2.BillableMetric:
    """Create a metric and do not wait until its past is counted."""
    metric = billable_metric_pb2.BillableMetric(
        name=aggregation, aggregation_type=f"AGGREGATION_TYPE_{aggregation}", **fields
    )
    request = billable_metric_pb2.CreateBillableMetricRequest(billable_metric=metric)
    return (await client.metrics.CreateBillableMetric(request)).billable_metric


async def start_all(client: Client) -> dict[str, billable_metric_pb2.BillableMetric]:
    """Create one metric of each kind and do not wait."""
    return {name: await start_metric(client, name, **fields) for name, fields in DEFINITIONS.items()}


async def counted(client: Client, made: dict[str, billable_metric_pb2.BillableMetric]) -> None:
    """Wait until the past of all these metrics is counted."""
    for metric in made.values():
        request = billable_metric_pb2.GetBillableMetricRequest(id=metric.id)
        await client.counted((await client.metrics.GetBillableMetric(request)).billable_metric)


def drawn(number: int, seed: int, *, hours: float = 36, start: datetime = DAY) -> list[event_pb2.UsageEvent]:
    """Events of several customers, kinds and regions over some hours; some cannot be aggregated, some are no number."""
    draw = random.Random(seed)
    values = [1, 2.5, "0.000000000000000001", "-7", 1e12, "no number", None, "9" * 38, "1e5", True]
    return [
        event(
            f"{seed}-{i}",
            customer_id=draw.choice(["acme", "acme-eu", "nobody"]),
            event_type=draw.choice(["request", "login", "job"]),
            at=start + timedelta(seconds=draw.uniform(0, 3600 * hours)),
            properties={
                "n": draw.choice(values),
                "user": f"user-{draw.randrange(9)}",
                **({"region": draw.choice(["eu", "us", ""])} if draw.random() < 0.8 else {}),
            },
        )
        for i in range(number)
    ]


def windows_of(windows: Sequence[usage_pb2.UsageWindow], metric_id: str) -> list[tuple[Any, ...]]:
    """What the windows of a metric say, without the metric's identity and the time of the last change."""
    return [
        (
            w.customer_id,
            w.starting_on.seconds,
            w.value if w.HasField("value") else None,
            {name: group.value for name, group in w.groups.items()},
            w.skipped_count,
        )
        for w in windows
        if w.billable_metric_id == metric_id
    ]


async def usage_of(client: Client, metric_id: str, kind: str, size: str = "HOUR") -> list[tuple[Any, ...]]:
    """All windows of a metric from a day before to four days after the first event."""
    selector: dict[str, Any] = {"id": metric_id}
    if kind in {"COUNT", "SUM", "UNIQUE"}:
        selector["group_by"] = {"key": "region"}
    windows = await client.all_usage(
        window_size=f"WINDOW_SIZE_{size}",
        starting_on=timestamp(DAY - 24 * HOUR),
        ending_before=timestamp(DAY + 96 * HOUR),
        billable_metrics=[selector],
        omit_empty_windows=True,
    )
    return windows_of(windows, metric_id)


async def assert_twins(client: Client, early: dict[str, Any], late: dict[str, Any]) -> None:
    """Fail unless each late metric says what its early twin says, by hour and over all."""
    for kind, size in itertools.product(DEFINITIONS, ("HOUR", "NONE")):
        expected = await usage_of(client, early[kind].id, kind, size)
        assert expected, kind
        assert await usage_of(client, late[kind].id, kind, size) == expected, (kind, size)


async def assert_exact(database: Database) -> None:
    """Fail unless every cell of every metric is what a recomputation from the events gives."""
    for metric in await database.read("default", lambda c: metrics.all_metrics(c, "default")):
        assert metric.backfilled_until is None, metric
        found = await database.read(
            "default",
            lambda c, metric=metric: cells.mismatches(
                c, "default", metric, DAY - 3650 * 24 * HOUR, DAY + 3650 * 24 * HOUR, limit=10
            ),
        )
        assert found == [], metric.aggregation


@contextlib.asynccontextmanager
async def with_customer(database_url: str) -> AsyncIterator[Client]:
    """A server in this process with one customer that has two aliases."""
    async with running_server(database_url) as client:
        await client.create_customer(ingest_aliases=["acme", "acme-eu"])
        yield client


async def ingest(client: Client, events: Sequence[event_pb2.UsageEvent]) -> None:
    """Send events; all must be new."""
    response = await client.ingest(*events)
    assert set(response.verdicts) == {event_pb2.VERDICT_ACCEPTED}


# --- Claims


async def test_a_metric_made_after_its_events_gives_the_same_numbers(client: Client, database: Database) -> None:
    """Of twins, one made before and one after the events, the windows are equal for every aggregation."""
    await client.create_customer(ingest_aliases=["acme", "acme-eu"])
    early = await start_all(client)
    await ingest(client, drawn(600, seed=1))
    late = await start_all(client)
    await counted(client, late)
    await assert_twins(client, early, late)
    await assert_exact(database)


@pytest.mark.parametrize("events_max", [1, 3, 8, 1_000])
async def test_the_size_of_chunks_does_not_matter(
    database_url: str, database: Database, steps: Steps, events_max: int
) -> None:
    """However few events end a chunk, also fewer than an hour holds, nothing is left out or counted twice."""
    steps.events_max = events_max
    await steps.go_on()
    async with with_customer(database_url) as client:
        early = await start_all(client)
        crowd = drawn(8, seed=2, hours=0.5) + drawn(4, seed=3, hours=0.1, start=DAY + 40 * HOUR)
        # On the edges of hours, too, and far away from all others.
        edges = [event(f"edge-{i}", at=DAY + i * HOUR, properties={"n": i, "user": "u"}) for i in (0, 1, 40, 41, 70)]
        await ingest(client, crowd + edges)
        late = await start_all(client)
        await counted(client, late)
        await assert_twins(client, early, late)
        await assert_exact(database)


async def test_without_events_there_is_nothing_to_wait_for(client: Client) -> None:
    """The first metric of an organization without events can be asked for at once."""
    metric = await start_metric(client)
    assert not metric.HasField("backfill_progress")


async def test_an_unfinished_metric_is_refused_by_name_and_left_out_of_all(
    database_url: str, database: Database, steps: Steps
) -> None:
    """Named: FAILED_PRECONDITION with its id, a progress that grows and when to retry. In "all metrics": left out."""
    async with with_customer(database_url) as client:
        done = await client.create_metric()
        await ingest(client, drawn(100, seed=4))
        metric = await start_metric(client)
        query = {
            "window_size": "WINDOW_SIZE_NONE",
            "starting_on": timestamp(DAY),
            "ending_before": timestamp(DAY + 96 * HOUR),
        }
        named = usage_pb2.ListUsageRequest(billable_metrics=[{"id": done.id}, {"id": metric.id}], **query)
        progresses = [metric.backfill_progress]
        for _ in range(3):
            fault = await fault_of(client.usage.ListUsage(named))
            assert (fault.code, fault.reason) == ("FAILED_PRECONDITION", "METRIC_BACKFILLING")
            assert fault.metadata["ids"] == metric.id
            assert fault.retry_s is not None
            assert fault.retry_s > 0
            assert 0 <= float(fault.metadata["progress"]) < 1
            everything = await client.all_usage(**query)
            assert {w.billable_metric_id for w in everything} == {done.id}
            await steps.go(database, 1)
            request = billable_metric_pb2.GetBillableMetricRequest(id=metric.id)
            progresses.append((await client.metrics.GetBillableMetric(request)).billable_metric.backfill_progress)
        assert progresses == sorted(set(progresses))
        assert all(0 <= progress < 1 for progress in progresses)
        await steps.go_on()
        await counted(client, {"": metric})
        assert (await client.usage.ListUsage(named)).windows
        assert {w.billable_metric_id for w in await client.all_usage(**query)} == {done.id, metric.id}


async def test_repeating_the_creation_does_not_count_again(database_url: str, database: Database, steps: Steps) -> None:
    """A retried creation, while the past is counted and after it, answers with the metric and changes no number."""
    chosen = str(uuid.uuid4())
    async with with_customer(database_url) as client:
        early = await client.create_metric(name="COUNT")
        await ingest(client, drawn(60, seed=5))
        await start_metric(client, id=chosen)
        await steps.go(database, 2)
        before = await positions(database)
        assert (await start_metric(client, id=chosen)).HasField("backfill_progress")
        assert await positions(database) == before
        await steps.go_on()
        metric = await client.counted(await start_metric(client, id=chosen))
        assert not (await start_metric(client, id=chosen)).HasField("backfill_progress")
        assert await usage_of(client, metric.id, "") == await usage_of(client, early.id, "")


async def test_a_backfill_survives_the_server(database_url: str, database: Database, steps: Steps) -> None:
    """A server that stops halfway leaves the rest to the next one, and the sum is exact."""
    async with with_customer(database_url) as client:
        early = await start_all(client)
        await ingest(client, drawn(120, seed=6))
        late = await start_all(client)
        await steps.go(database, 9)
    unfinished = [until for until in (await positions(database)).values() if until is not None]
    assert len(unfinished) == len(DEFINITIONS)
    assert max(unfinished) > DAY
    async with running_server(database_url) as client:
        await steps.go(database, 3)
        await ingest(client, drawn(50, seed=7))
        await steps.go_on()
        await counted(client, late)
        await assert_twins(client, early, late)
        await assert_exact(database)


async def test_a_chunk_that_fails_is_counted_again(
    database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other chunk fails after its work and before its commit; the numbers are exact all the same."""
    original = metrics.backfill_chunk
    calls = itertools.count()

    async def chunk(connection: AsyncConnection, organization: str, metric_id: uuid.UUID) -> bool:
        more = await original(connection, organization, metric_id, events_max=60)
        if next(calls) % 2 == 0:
            raise ConnectionResetError
        return more

    monkeypatch.setattr(metrics, "backfill_chunk", chunk)
    monkeypatch.setattr("service.backfill.POLL_S", 0.02)
    async with with_customer(database_url) as client:
        early = await start_all(client)
        await ingest(client, drawn(200, seed=8))
        late = await start_all(client)
        await counted(client, late)
        assert next(calls) > 2 * len(DEFINITIONS)
        await assert_twins(client, early, late)
        await assert_exact(database)


async def test_two_replicas_may_count_at_once(database_url: str, database: Database, steps: Steps) -> None:
    """Two servers that work on the same metrics at the same time count everything once."""
    steps.events_max = 15
    async with with_customer(database_url) as client, running_server(database_url) as other:
        early = await start_all(client)
        await ingest(client, drawn(120, seed=9))
        late = await start_all(client)
        await steps.go_on()
        await asyncio.gather(counted(client, late), counted(other, late))
        assert steps.chunks > 2 * len(DEFINITIONS)
        await assert_twins(other, early, late)
        await assert_exact(database)


async def test_events_may_come_while_the_past_is_counted(database_url: str, database: Database, steps: Steps) -> None:
    """Events before, in and after the hour that is next, before the first and after the last, count once each."""
    async with with_customer(database_url) as client:
        early = await start_all(client)
        await ingest(client, drawn(200, seed=10))
        late = await start_all(client)
        for turn in range(4):
            await steps.go(database, len(DEFINITIONS))
            reached = max(until for until in (await positions(database)).values() if until)
            places = {
                "before the first event": DAY - 20 * HOUR + turn * HOUR,
                "in an hour that is done": reached - HOUR,
                "at the end of an hour that is done": reached - timedelta(microseconds=1),
                "at the start of the next hour": reached,
                "in the next hour": reached + timedelta(minutes=59),
                "far ahead": DAY + 80 * HOUR + turn * HOUR,
            }
            await ingest(
                client,
                [
                    event(f"{turn} {place}", at=at, properties={"n": i, "user": f"new-{i}", "region": "eu"})
                    for i, (place, at) in enumerate(places.items())
                ],
            )
        await steps.go_on()
        await counted(client, late)
        await assert_twins(client, early, late)
        await assert_exact(database)


async def test_a_busy_service_backfills_exactly(database_url: str, database: Database, steps: Steps) -> None:
    """While writers send events through two replicas without pause, both count the past, and the sum is exact."""
    steps.events_max = 40
    await steps.go_on()
    async with with_customer(database_url) as client, running_server(database_url) as other:
        early = await start_all(client)
        await ingest(client, drawn(100, seed=11))
        over = asyncio.Event()

        async def write(to: Client, seed: int) -> None:
            # Not for ever: the backfill goes hour by hour and these events are within its hours.
            for turn in range(10):
                if over.is_set():
                    break
                await ingest(to, drawn(12, seed=seed + turn))

        writers = [asyncio.create_task(write(to, 1_000 * i)) for i, to in enumerate((client, other, client), 1)]
        late = await start_all(other)
        await counted(client, late)
        over.set()
        await asyncio.gather(*writers)
        await assert_twins(client, early, late)
        await assert_exact(database)


@pytest.mark.parametrize("done", [0, 1, 2, 3, 5])
async def test_archiving_may_come_while_the_past_is_counted(
    database_url: str, database: Database, steps: Steps, done: int
) -> None:
    """However far the backfill has come, also into the time after it, the archive time is what limits the count."""
    steps.events_max = 2
    now = datetime.now(UTC)
    async with with_customer(database_url) as client:
        # Chunks: two of the past, then the hours that lie ahead.
        ago = [event(at=now - hours * HOUR) for hours in (30, 30, 5, 5, 5)]
        ahead = [event(at=now + hours * HOUR) for hours in (2, 3, 3, 4, 6, 8)]
        await ingest(client, ago + ahead)
        metric = await start_metric(client)
        unique = await start_metric(client, "UNIQUE", aggregation_key="user")
        await steps.go(database, 2 * done)
        for one in (metric, unique):
            request = billable_metric_pb2.ArchiveBillableMetricRequest(id=one.id)
            archived = (await client.metrics.ArchiveBillableMetric(request)).billable_metric
            assert archived.HasField("archive_time")
        # Those count by their timestamp, not by when they come.
        await ingest(client, [event(at=now - 10 * HOUR), event(at=now - 6 * HOUR), event(at=now + 5 * HOUR)])
        await steps.go_on()
        await counted(client, {"": metric, " ": unique})
        (window,) = await client.all_usage(
            window_size="WINDOW_SIZE_NONE",
            starting_on=timestamp(now - 48 * HOUR),
            ending_before=timestamp(now + 48 * HOUR),
            billable_metrics=[{"id": metric.id}],
        )
        assert window.value == str(len(ago) + 2)
        for stored in await database.read("default", lambda c: metrics.all_metrics(c, "default")):
            compare: Callable[[AsyncConnection], Awaitable[Any]] = lambda c, stored=stored: cells.mismatches(  # noqa: E731
                c, "default", stored, DAY - 3650 * 24 * HOUR, DAY + 3650 * 24 * HOUR, limit=10
            )
            assert await database.read("default", compare) == []


async def test_organizations_take_turns(database_url: str, database: Database, steps: Steps) -> None:
    """Of several unfinished metrics each gets a chunk in turn; none waits for another's whole past."""
    async with with_customer(database_url) as client:
        await ingest(client, drawn(150, seed=12))
        made = [await start_metric(client) for _ in range(3)]
        # The round that runs may have begun when there was but the first.
        await steps.go(database, 1 + 2 * len(made))
        reached = [until for until in (await positions(database)).values() if until is not None]
        assert len(reached) == len(made)
        assert min(reached) > DAY + HOUR
        await steps.go_on()
        await counted(client, {metric.id: metric for metric in made})
