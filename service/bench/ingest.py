"""Measures how fast events come in: against COPY into the same table, the bare statements, and empty calls."""

import asyncio
import contextlib
import functools
import itertools
import random
import secrets
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import grpc
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from metering.v1 import billable_metric_pb2 as metric_pb
from metering.v1 import event_pb2 as pb
from service.bench import Comparison, Side, Stopwatch, Target, Work, at_least, at_least_of_best, must_be
from service.bench.ground import CALL_TIMEOUT_S, Ground, Server, Tenant, connect, create_metrics, unary
from service.domain.events import Event, event
from service.rpc.wire.events import properties_json
from service.store import events as event_store
from service.store import metrics as metric_store
from service.store.tables import incoming_events

BATCH = 1_000
CUSTOMERS = 500
STREAM_UNANSWERED = 8
# Stands for the part of every transaction id that each run replaces; as long as what takes its place.
_RUN = "########"
_COLUMNS = ("organization_id", *event_store.INCOMING)


@dataclass(frozen=True)
class Events:
    """A set of events, cut into batches: as requests in bytes and as rows; and what they add up to."""

    requests: Sequence[bytes]
    rows: Sequence[Sequence[Event]]
    sent: int
    different: int
    tokens: Decimal
    users: int

    def of_run(self) -> tuple[list[bytes], list[list[Event]]]:
        """Return the batches under transaction ids that were never used."""
        run = secrets.token_hex(4)
        requests = [request.replace(_RUN.encode(), run.encode()) for request in self.requests]
        rows = [
            [one._replace(transaction_id=run + one.transaction_id[len(_RUN) :]) for one in batch] for batch in self.rows
        ]
        return requests, rows


def draw(number: int, *, batch: int = BATCH, many_groups: bool = False, duplicates: float = 0.0) -> Events:
    """Draw `number` events of one hour, in batches; the same in every run.

    A batch repeats so large a part of the batch before it. With `many_groups` almost every event is in a group, and so
    in a cell, of its own; else there are 20 groups per customer.
    """
    numbers = random.Random(20_260_101)  # noqa: S311 - sample data
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=2)
    regions, models = (1_000, 100) if many_groups else (4, 5)
    messages: list[list[pb.UsageEvent]] = []
    fresh = itertools.count()
    tokens, users, different = 0, set(), 0
    while different < number:
        again = messages[-1][-int(batch * duplicates) :] if messages and duplicates else []
        new = []
        for _ in range(batch - len(again)):
            customer, user, amount = numbers.randrange(CUSTOMERS), numbers.randrange(40), numbers.randrange(1, 5_000)
            one = pb.UsageEvent(
                transaction_id=f"{_RUN}-{next(fresh):08d}",
                customer_id=f"customer-{customer:04d}",
                event_type="completion",
            )
            one.timestamp.FromDatetime(hour + timedelta(microseconds=numbers.randrange(3_600_000_000)))
            one.properties.update(
                {
                    "region": f"region-{numbers.randrange(regions)}",
                    "model": f"model-{numbers.randrange(models)}",
                    "tokens": amount,
                    "user": f"user-{user}",
                    "latency_ms": numbers.randrange(1_000_000) / 1_000,
                }
            )
            new.append(one)
            tokens += amount
            users.add((customer, user))
        different += len(new)
        messages.append([*again, *new])
    return Events(
        [pb.IngestEventsRequest(events=batch).SerializeToString() for batch in messages],
        [[_row(one) for one in batch] for batch in messages],
        sum(map(len, messages)),
        different,
        Decimal(tokens),
        len(users),
    )


def metrics(number: int) -> list[metric_pb.BillableMetric]:
    """Describe up to three metrics: COUNT, SUM by two group keys, UNIQUE."""
    types = metric_pb.AggregationType
    described = [
        metric_pb.BillableMetric(name="requests", aggregation_type=types.AGGREGATION_TYPE_COUNT),
        metric_pb.BillableMetric(
            name="tokens",
            aggregation_type=types.AGGREGATION_TYPE_SUM,
            aggregation_key="tokens",
            group_keys=[metric_pb.GroupKey(properties=["region", "model"])],
        ),
        metric_pb.BillableMetric(name="users", aggregation_type=types.AGGREGATION_TYPE_UNIQUE, aggregation_key="user"),
    ]
    for one in described:
        one.event_type_filter.in_values.append("completion")
    return described[:number]


class Bench:
    """One event set on its way in by different ways, each run into an organization of its own."""

    def __init__(self, ground: Ground, servers: Sequence[Server], events: Events, metrics_number: int) -> None:
        self.ground = ground
        self.servers = servers
        self.events = events
        self.metrics = metrics_number

    async def tenant(self) -> Tenant:
        """Make an organization with the metrics."""
        tenant = await self.ground.tenant()
        await create_metrics(self.servers[0], tenant, metrics(self.metrics))
        return tenant

    async def calls(self, clients: int) -> Work:
        """Send the batches by IngestEvents, each client one after the other."""
        tenant = await self.tenant()
        requests, _ = self.events.of_run()
        answers: list[pb.IngestEventsResponse] = []
        async with connections(self.servers, clients) as channels:
            watch, queue = Stopwatch(), iter(requests)

            async def client(channel: grpc.aio.Channel) -> None:
                send = unary(channel, "EventService/IngestEvents", pb.IngestEventsResponse)
                for request in queue:
                    answers.append(await watch.timed(send(request, metadata=tenant.metadata, timeout=CALL_TIMEOUT_S)))

            await asyncio.gather(*map(client, channels))
            work = watch.done(self.events.sent)
        await self.check(tenant, [verdict for answer in answers for verdict in answer.verdicts])
        return work

    async def streams(self, clients: int) -> Work:
        """Send the batches by StreamEvents, each client with up to STREAM_UNANSWERED on the way."""
        tenant = await self.tenant()
        requests, _ = self.events.of_run()
        verdicts: list[int] = []
        async with connections(self.servers, clients) as channels:
            shares = [requests[i::clients] for i in range(clients)]
            # A StreamEventsRequest is an IngestEventsRequest with its events in field 2 and a number in field 1.
            numbered = [[_numbered(sequence, request) for sequence, request in enumerate(share, 1)] for share in shares]
            watch = Stopwatch()

            async def client(channel: grpc.aio.Channel, share: Sequence[bytes]) -> None:
                call: Any = channel.stream_stream(
                    "/metering.v1.EventService/StreamEvents",
                    response_deserializer=pb.StreamEventsResponse.FromString,
                )(metadata=tenant.metadata, timeout=CALL_TIMEOUT_S)
                room = asyncio.Semaphore(STREAM_UNANSWERED)
                sent_at: dict[int, float] = {}

                async def send() -> None:
                    for sequence, request in enumerate(share, 1):
                        await room.acquire()
                        sent_at[sequence] = watch.seconds
                        await call.write(request)
                    await call.done_writing()

                sending = asyncio.create_task(send())
                async for answer in call:
                    watch.waits.append(watch.seconds - sent_at.pop(answer.sequence))
                    verdicts.extend(answer.verdicts)
                    room.release()
                await sending

            await asyncio.gather(*map(client, channels, numbered))
            work = watch.done(self.events.sent)
        await self.check(tenant, verdicts)
        return work

    async def copy(self) -> Work:
        """COPY the rows into the table itself, over one connection, batch by batch as they come."""
        organization = f"bench-copy-{uuid.uuid4()}"
        _, rows = self.events.of_run()
        # There is no way to copy what is there already; the limit writes it once.
        different = list({one.transaction_id: (organization, *one) for batch in rows for one in batch}.values())
        batches = [different[start : start + BATCH] for start in range(0, len(different), BATCH)]
        async with self._connected(1) as (connection,):
            watch = Stopwatch()
            for batch in batches:
                await connection.copy_records_to_table("usage_events", records=batch, columns=_COLUMNS)
            work = watch.done(self.events.different)
            stored = await connection.fetchval(
                "SELECT count(*) FROM usage_events WHERE organization_id = $1", organization
            )
            must_be("copied rows", stored, self.events.different)
        return work

    async def statements(self, connections: int, transaction: int) -> Work:
        """Send the service's own statements by bare asyncpg, so many events in a transaction."""
        tenant = await self.tenant()
        _, rows = self.events.of_run()
        events = [one for batch in rows for one in batch]
        # As the service does it: a statement gets each id once.
        parts = [
            list({one.transaction_id: one for one in events[start : start + transaction]}.values())
            for start in range(0, len(events), transaction)
        ]
        stored = await self.ground.database.background(lambda c: metric_store.event_metrics(c, tenant.organization))
        compiled = event_store.ingest_statements(stored)
        accepted: list[Any] = []
        async with self._connected(connections) as open_connections:
            for connection in open_connections:
                await connection.execute(str(CreateTable(incoming_events).compile(dialect=postgresql.dialect())))  # type: ignore[no-untyped-call]
            watch, queue = Stopwatch(), iter(parts)

            async def send(connection: "asyncpg.Connection[Any]") -> None:
                for part in queue:
                    async with connection.transaction():
                        await event_store.copy_events(connection, part)
                        sql, values = compiled.insert.bound(organization=tenant.organization)
                        new = [row[0] for row in await connection.fetch(sql, *values)]
                        if new and compiled.distinct is not None:
                            sql, values = compiled.distinct.bound(organization=tenant.organization, accepted=new)
                            await connection.execute(sql, *values)
                    accepted.extend(new)

            await asyncio.gather(*map(send, open_connections))
            work = watch.done(self.events.sent)
        must_be("accepted rows", len(accepted), self.events.different)
        await self.check(tenant, None)
        return work

    async def check(self, tenant: Tenant, verdicts: Sequence[int] | None) -> None:
        """Require that every event got its verdict, and that every aggregate is exact."""
        expected = self.events
        if verdicts is not None:
            must_be("verdicts", len(verdicts), expected.sent)
            must_be("accepted events", list(verdicts).count(pb.VERDICT_ACCEPTED), expected.different)
            must_be("duplicates", list(verdicts).count(pb.VERDICT_DUPLICATE), expected.sent - expected.different)
        async with self._connected(1) as (connection,):
            organization = tenant.organization
            stored = await connection.fetchval(
                "SELECT count(*) FROM usage_events WHERE organization_id = $1", organization
            )
            must_be("stored events", stored, expected.different)
            rows = await connection.fetch(
                "SELECT group_digest = '' AS total, sum(counted) AS counted, sum(skipped) AS skipped, sum(sum) AS sum "
                "FROM usage_cells WHERE organization_id = $1 GROUP BY metric_id, group_digest = ''",
                organization,
            )
            must_be("metrics with cells", [row["total"] for row in rows].count(True), self.metrics)
            must_be("events counted by each metric", {row["counted"] for row in rows}, {expected.different})
            must_be("events skipped", {row["skipped"] for row in rows}, {0})
            if self.metrics > 1:
                # Of all groups together, and of each.
                sums = [row["sum"] for row in rows if row["sum"] is not None]
                must_be("sums", sums, [expected.tokens] * 2)
            if self.metrics > 2:
                found = await connection.fetchval(
                    "SELECT count(*) FROM usage_distinct_values WHERE organization_id = $1", organization
                )
                must_be("different users", found, expected.users)

    @contextlib.asynccontextmanager
    async def _connected(self, number: int) -> AsyncIterator[list["asyncpg.Connection[Any]"]]:
        opened = [await self.ground.bare() for _ in range(number)]
        try:
            yield opened
        finally:
            for one in opened:
                await one.close()


async def batches(ground: Ground, number: int) -> AsyncIterator[Comparison]:
    """Compare batches of 1,000 events with both limits."""
    plain, many = draw(number), draw(number, many_groups=True)
    async with ground.server() as server:
        for title, events, count in (
            ("1 metric (COUNT)", plain, 1),
            ("2 metrics (COUNT; SUM by 2 keys)", plain, 2),
            ("3 metrics (and UNIQUE)", plain, 3),
            ("3 metrics, a group per event", many, 3),
            ("3 metrics, 20 % duplicates", draw(number, duplicates=0.2), 3),
        ):
            bench = Bench(ground, [server], events, count)
            sides = [
                Side("IngestEvents, 1 client", functools.partial(bench.calls, 1)),
                Side("IngestEvents, 4 clients", functools.partial(bench.calls, 4)),
                Side("IngestEvents, 8 clients", functools.partial(bench.calls, 8)),
                Side("StreamEvents, 1 client", functools.partial(bench.streams, 1)),
                Side("StreamEvents, 4 clients", functools.partial(bench.streams, 4)),
                Side("COPY", bench.copy),
                *(
                    Side(
                        f"statements, {connections} x {size:,}", functools.partial(bench.statements, connections, size)
                    )
                    for connections, size in ((1, 1_000), (2, 1_000), (4, 1_000), (2, 5_000))
                ),
            ]
            # None for one metric: Postgres has so little to do then that reading the events is most of it.
            share = {2: 0.60, 3: 0.55}.get(count)
            targets = [] if share is None else [at_least_of_best("StreamEvents, 4 clients", "statements", share)]
            if count == 2:
                targets += [
                    at_least("StreamEvents, 4 clients", "COPY", 0.40),
                    Target(
                        "p99 of an ack, IngestEvents, 4 clients, ms",
                        lambda found: found["IngestEvents, 4 clients"].wait(99) * 1000,
                        100,
                        at_most=True,
                    ),
                ]
            yield Comparison(f"ingest-batch: {title}", "events/s", sides, ["COPY", "statements"], targets)


def _row(message: pb.UsageEvent) -> Event:
    text = properties_json(message.properties, [])
    at = message.timestamp.ToDatetime(UTC)
    return event(message.transaction_id, message.customer_id, message.event_type, at, text)


def _numbered(sequence: int, request: bytes) -> bytes:
    message = pb.StreamEventsRequest(sequence=sequence)
    message.events.extend(pb.IngestEventsRequest.FromString(request).events)
    return message.SerializeToString()


@contextlib.asynccontextmanager
async def connections(servers: Sequence[Server], number: int) -> AsyncIterator[list[grpc.aio.Channel]]:
    """Open connections, to each server in turn, that are ready before the clock runs."""
    channels = [connect(servers[i % len(servers)].address) for i in range(number)]
    try:
        for channel in channels:
            await channel.channel_ready()
        yield channels
    finally:
        for channel in channels:
            await channel.close()
