"""Measures what calls with one event cost: against calls that are answered with nothing, on the same settings."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc

from metering.v1 import event_pb2 as pb
from service.bench import Comparison, Side, Stopwatch, Work, at_least, must_be
from service.bench.echo import EMPTY
from service.bench.ground import CALL_TIMEOUT_S, Ground, Server, Tenant, unary
from service.bench.ingest import Bench, Events, connections, draw

CALLERS = 100
CHANNELS = 4
METRICS = 2
SERVICE, ECHO, NOTHING = "IngestEvents, 1 event", "echo, same request", "echo, empty request"

_Caller = Callable[[grpc.aio.Channel, Stopwatch, Iterator[bytes]], Awaitable[None]]


class _Small(Bench):
    """Many callers at once, each with one event after the other."""

    def __init__(self, ground: Ground, server: Server, echo: Server, events: Events) -> None:
        super().__init__(ground, [server], events, METRICS)
        self.echo = echo

    async def ingest(self) -> Work:
        tenant = await self.tenant()
        requests, _ = self.events.of_run()
        answers: list[pb.IngestEventsResponse] = []

        async def caller(channel: grpc.aio.Channel, watch: Stopwatch, queue: Iterator[bytes]) -> None:
            send = unary(channel, "EventService/IngestEvents", pb.IngestEventsResponse)
            for request in queue:
                answers.append(await watch.timed(send(request, metadata=tenant.metadata, timeout=CALL_TIMEOUT_S)))

        work = await _called(self.servers[0], requests, caller)
        await self.check(tenant, [verdict for answer in answers for verdict in answer.verdicts])
        return work

    async def empty(self, tenant: Tenant, *, with_request: bool) -> Work:
        """Send the same requests, or as many empty ones, to a server that does nothing with them."""
        requests, _ = self.events.of_run()
        if not with_request:
            requests = [b""] * len(requests)
        answers: list[bytes] = []

        async def caller(channel: grpc.aio.Channel, watch: Stopwatch, queue: Iterator[bytes]) -> None:
            send: Any = channel.unary_unary(EMPTY)
            for request in queue:
                # A credential too: what it weighs is part of the call, what is done with it is not.
                answers.append(await watch.timed(send(request, metadata=tenant.metadata, timeout=CALL_TIMEOUT_S)))

        work = await _called(self.echo, requests, caller)
        must_be("empty answers", answers, [b""] * len(requests))
        return work


async def _called(server: Server, requests: Sequence[bytes], caller: _Caller) -> Work:
    """Let all callers take from the same requests until there are none left."""
    async with connections([server], CHANNELS) as channels:
        watch, queue = Stopwatch(), iter(requests)
        await asyncio.gather(*(caller(channels[i % CHANNELS], watch, queue) for i in range(CALLERS)))
        return watch.done(len(requests))


async def calls(ground: Ground, number: int) -> AsyncIterator[Comparison]:
    """Compare so many calls with one event each with as many that are answered with nothing."""
    tenant = await ground.tenant()
    async with ground.server() as server, ground.server(module=("service.bench.echo",)) as echo:
        bench = _Small(ground, server, echo, draw(number, batch=1))
        sides = [
            Side(SERVICE, bench.ingest),
            Side(ECHO, functools.partial(bench.empty, tenant, with_request=True)),
            Side(NOTHING, functools.partial(bench.empty, tenant, with_request=False)),
        ]
        notes = [
            f"{CALLERS} concurrent callers over {CHANNELS} connections, {METRICS} metrics; the echo is a process with "
            "the server's own gRPC settings, and answers before anything is read or stored."
        ]
        yield Comparison(
            "ingest-small: one event per call",
            "calls/s",
            sides,
            [ECHO, NOTHING],
            [at_least(SERVICE, ECHO, 0.70)],
            notes,
        )
