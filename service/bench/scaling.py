"""Measures what a second server process brings: the same load on one process and on two, over one database."""

import asyncio
import functools
import itertools
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import grpc

from metering.v1 import event_pb2
from metering.v1 import usage_pb2 as pb
from service.bench import Comparison, Side, Stopwatch, Work, at_least, must_be
from service.bench.ground import CALL_TIMEOUT_S, Ground, create_customers, unary
from service.bench.ingest import Bench, connections, draw

STREAMS = 8
CALLERS = 16
METRICS = 2
HOURS = 24
ONE, TWO = "1 process", "2 processes"
FACTOR = 1.6


class _Load(Bench):
    """What is done to one process or to several: streams of events, and questions about them."""

    async def queries(self, loaded: "_Loaded", calls: int) -> Work:
        """Ask for a customer's hours of both metrics, all callers at once."""
        answers: list[tuple[int, pb.ListUsageResponse]] = []
        async with connections(self.servers, CALLERS) as channels:
            watch, queue = Stopwatch(), iter(range(calls))

            async def caller(channel: grpc.aio.Channel) -> None:
                ask = unary(channel, "UsageService/ListUsage", pb.ListUsageResponse)
                for i in queue:
                    request, _ = loaded.questions[i % len(loaded.questions)]
                    asked = ask(request, metadata=loaded.metadata, timeout=CALL_TIMEOUT_S)
                    answers.append((i, await watch.timed(asked)))

            await asyncio.gather(*map(caller, channels))
            work = watch.done(calls)
        must_be("answers", len(answers), calls)
        for i, answer in answers:
            must_be("windows", len(answer.windows), HOURS * METRICS)
            found = sum((Decimal(one.value) for one in answer.windows if one.HasField("value")), Decimal())
            must_be("usage of a customer, both metrics together", found, loaded.questions[i % len(loaded.questions)][1])
        return work


class _Loaded:
    """Events of one tenant that are stored, and what a customer's hours add up to."""

    def __init__(self) -> None:
        self.metadata: tuple[tuple[str, str], ...] = ()
        self.questions: list[tuple[bytes, Decimal]] = []

    async def load(self, bench: Bench, customers: int) -> None:
        """Send the events, and prepare a question for each of some customers."""
        tenant = await bench.tenant()
        self.metadata = tenant.metadata
        requests, rows = bench.events.of_run()
        server = bench.servers[0]
        send = unary(server.channel, "EventService/IngestEvents", event_pb2.IngestEventsResponse)
        for request in requests:
            await send(request, metadata=tenant.metadata, timeout=CALL_TIMEOUT_S)
        keys = [f"customer-{i:04d}" for i in range(customers)]
        ids = await create_customers(server, tenant, keys)
        totals = dict.fromkeys(keys, Decimal())
        for event in itertools.chain.from_iterable(rows):
            if event.customer_key in totals:
                totals[event.customer_key] += 1 + json.loads(event.properties)["tokens"]
        end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        for key, customer_id in zip(keys, ids, strict=True):
            question = pb.ListUsageRequest(customer_ids=[customer_id], window_size=pb.WINDOW_SIZE_HOUR)
            question.starting_on.FromDatetime(end - timedelta(hours=HOURS))
            question.ending_before.FromDatetime(end)
            self.questions.append((question.SerializeToString(), totals[key]))


async def scaling(ground: Ground, number: int, calls: int) -> AsyncIterator[Comparison]:
    """Compare one process with two: so many events streamed in, and so many questions."""
    events = draw(number)
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(ground.server()) for _ in range(2)]
        loads = {
            name: _Load(ground, servers, events, METRICS) for name, servers in ((ONE, [first]), (TWO, [first, second]))
        }
        notes = [
            f"{os.cpu_count()} cores for the client, the servers and Postgres together: where all of them are busy, it "
            "is the cores that hold a second process back. The connections are spread over both processes evenly."
        ]
        yield Comparison(
            f"scaling: {STREAMS} StreamEvents clients, {METRICS} metrics",
            "events/s",
            [Side(name, functools.partial(load.streams, STREAMS)) for name, load in loads.items()],
            [ONE],
            [at_least(TWO, ONE, FACTOR)],
            notes,
        )
        loaded = _Loaded()
        await loaded.load(loads[ONE], CALLERS)
        await ground.settle()
        yield Comparison(
            f"scaling: {CALLERS} concurrent ListUsage callers, HOUR",
            "calls/s",
            [Side(name, functools.partial(load.queries, loaded, calls)) for name, load in loads.items()],
            [ONE],
            [at_least(TWO, ONE, FACTOR)],
            [*notes, f"Each call asks for {HOURS} hours of {METRICS} metrics of one customer."],
        )
