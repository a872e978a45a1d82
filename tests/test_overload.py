"""What is left of the service when far more is asked of it than it can do; run by hand, with figures."""

import asyncio
import contextlib
import itertools
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import Client, Process, event, start_server, timestamp
from faults import until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_hostile_input import RST_STREAM, World, frame, opening, wire

from metering.v1 import event_pb2, usage_pb2
from service.postgres import EmbeddedPostgres

pytestmark = pytest.mark.long

START = datetime(2026, 1, 1, tzinfo=UTC)
CALL_S = 10.0


@asynccontextmanager
async def served(*flags: str) -> AsyncIterator[tuple[Process, Client]]:
    """A server in a process of its own on a Postgres that keeps what it is told, with usage to ask for."""
    async with AsyncExitStack() as stack:
        # Not pytest's own directory: it is closed to other users, and as root Postgres must run as one.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.chmod(directory, 0o755)  # noqa: S103
        postgres = stack.enter_context(EmbeddedPostgres(directory / "data"))
        process = start_server("--database-url", postgres.url, "--migrate", *flags)
        stack.callback(process.stop)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(process.address))
        client = Client(process.address, channel)
        await client.create_customer(ingest_aliases=["acme"])
        await client.create_metric(name="sum", aggregation_type="AGGREGATION_TYPE_SUM", aggregation_key="n")
        for day in range(31):
            events = [
                event(at=START + timedelta(days=day, minutes=m), properties={"n": "1"}) for m in range(0, 1440, 15)
            ]
            await client.ingest(*events)
        yield process, client


def rss_mib(process: Process) -> float:
    """How much memory a server holds now."""
    with open(f"/proc/{process.process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass
class Tally:
    """What became of calls."""

    codes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    async def count(self, call: Awaitable[Any]) -> None:
        """Await a call and note how it ended, and when."""
        began = time.perf_counter()
        try:
            await call
            code = "OK"
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        self.codes[code] += 1
        self.seconds.setdefault(code, []).append(time.perf_counter() - began)

    def ms(self, share: float, code: str = "OK") -> float:
        """A quantile of the time of calls that ended with a code."""
        found = sorted(self.seconds.get(code, [0.0]))
        return found[min(len(found) - 1, int(share * len(found)))] * 1000

    def __str__(self) -> str:
        times = ", ".join(
            f"{code} p50 {self.ms(0.5, code):.0f} p99 {self.ms(0.99, code):.0f} ms" for code in sorted(self.seconds)
        )
        return f"{dict(self.codes)}; {times}"


def mixed(client: Client) -> Callable[[], Awaitable[Any]]:
    """Begins calls: of five four read a month in days, and one brings ten events."""
    asked = usage_pb2.ListUsageRequest(
        window_size="WINDOW_SIZE_DAY",
        starting_on=timestamp(START),
        ending_before=timestamp(START + timedelta(days=31)),
    )
    numbers = itertools.count()

    def begin() -> Any:
        if next(numbers) % 5:
            return client.usage.ListUsage(asked, timeout=CALL_S)
        events = [event(at=START, properties={"n": "1"}) for _ in range(10)]
        return client.events.IngestEvents(event_pb2.IngestEventsRequest(events=events), timeout=CALL_S)

    return begin


async def one_after_the_other(begin: Callable[[], Awaitable[Any]], workers: int, seconds: float) -> Tally:
    """So many callers, each with a call in flight at any time."""
    tally, ends = Tally(), time.perf_counter() + seconds

    async def work() -> None:
        while time.perf_counter() < ends:
            await tally.count(begin())

    await asyncio.gather(*(work() for _ in range(workers)))
    return tally


async def at_rate(begin: Callable[[], Awaitable[Any]], per_second: float, seconds: float) -> Tally:
    """So many calls a second, whether those before have ended or not."""
    tally, tasks = Tally(), set()
    began = time.perf_counter()
    for number in itertools.count():
        due = began + number / per_second
        if due > began + seconds:
            break
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        elif number % 50 == 0:
            await asyncio.sleep(0)
        task = asyncio.ensure_future(tally.count(begin()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return tally


async def test_four_times_capacity() -> None:
    """A minute of four times what the server can do: health says SERVING, memory is bounded, it recovers by itself.

    Prints how long admitted calls took, beside calls with nothing else going on.
    """
    async with served() as (process, client):
        begin = mixed(client)
        await one_after_the_other(begin, 4, 3)
        alone = await one_after_the_other(begin, 1, 10)
        full = await one_after_the_other(begin, 16, 10)
        capacity = full.codes["OK"] / 10
        half = await at_rate(begin, capacity / 2, 10)
        before = rss_mib(process)
        print(f"\nalone: {alone}\n16 at once: {capacity:.0f}/s, {full}\nhalf of it: {half}\nRSS {before:.0f} MiB")

        health, most, ended = Tally(), 0.0, asyncio.Event()
        async with grpc.aio.insecure_channel(process.address, options=[("grpc.use_local_subchannel_pool", 1)]) as other:

            async def watch() -> None:
                nonlocal most
                stub = health_pb2_grpc.HealthStub(other)
                while not ended.is_set():
                    for name in ("", "metering.v1.UsageService"):
                        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
                        await health.count(answer)
                        if answer.done() and await answer.code() is grpc.StatusCode.OK:
                            assert (await answer).status == health_pb2.HealthCheckResponse.SERVING
                    most = max(most, rss_mib(process))
                    await asyncio.sleep(0.25)

            watching = asyncio.create_task(watch())
            over = await at_rate(begin, 4 * capacity, 60)
            ended.set()
            await watching
        print(f"four times: {over}\nhealth: {health}\nRSS at most {most:.0f} MiB")
        print(f"admitted {over.codes['OK'] / 60:.0f}/s of {4 * capacity:.0f}/s asked")
        for second in range(1, 6):
            after = await one_after_the_other(begin, 1, 1)
            print(f"second {second} after: {after}")
        assert set(health.codes) == {"OK"}
        assert set(over.codes) <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
        assert set(after.codes) == {"OK"}
        assert after.ms(0.5) < 10 * alone.ms(0.5)
        assert most - before < 256


def monthly() -> usage_pb2.StreamUsageRequest:
    """A stream of hours: more than a reader that does not read can hold."""
    return usage_pb2.StreamUsageRequest(
        window_size="WINDOW_SIZE_HOUR",
        starting_on=timestamp(START - timedelta(days=365 * 20)),
        ending_before=timestamp(START + timedelta(days=31)),
    )


async def test_idle_and_slow_streams() -> None:
    """With 1,000 streams that say nothing and 1,000 that are read slowly, calls are answered as without them.

    All stay open, the slow ones go on, and their memory is bounded. Prints the figures.
    """
    async with served("--stream-stall", "600") as (process, client), AsyncExitStack() as stack:
        begin = mixed(client)
        await one_after_the_other(begin, 2, 3)
        without = await one_after_the_other(begin, 2, 15)
        before = rss_mib(process)
        alone = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.lookahead_bytes", 65535),
            ("grpc.http2.bdp_probe", 0),
        ]
        others = [
            Client(process.address, await stack.enter_async_context(grpc.aio.insecure_channel(process.address, alone)))
            for _ in range(20)
        ]
        idle = [others[number % 20].events.StreamEvents() for number in range(1_000)]
        for number, stream in enumerate(idle):
            await stream.write(event_pb2.StreamEventsRequest(sequence=1, events=[event(f"idle-{number}")]))
        for stream in idle:
            assert (await stream.read()).sequence == 1
        slow = [others[number % 20].usage.StreamUsage(monthly()) for number in range(1_000)]
        read, ended = [0] * 1_000, asyncio.Event()

        async def trickle(number: int) -> None:
            while not ended.is_set():
                assert await slow[number].read() is not grpc.aio.EOF
                read[number] += 1
                await asyncio.sleep(10)

        reading = [asyncio.create_task(trickle(number)) for number in range(1_000)]
        began = time.perf_counter()
        await until(lambda: all(read), 400)
        print(f"\nall 2,000 open after {time.perf_counter() - began:.0f} s")
        beside = await one_after_the_other(begin, 2, 30)
        print(f"without: {without}\nbeside:  {beside}")
        print(f"RSS {before:.0f} -> {rss_mib(process):.0f} MiB; slow streams read {min(read)} to {max(read)} messages")
        assert set(beside.codes) == {"OK"}
        assert not any(task.done() for task in reading)
        assert not any(stream.done() for stream in (*idle, *slow))
        for number, stream in enumerate(idle):
            await stream.write(event_pb2.StreamEventsRequest(sequence=2, events=[event(f"again-{number}")]))
        for stream in idle:
            assert (await stream.read()).sequence == 2
        ended.set()
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def test_connections_that_are_none() -> None:
    """Among 1,000 connections that say nothing, and 1,000 that send garbage, a third of which stay, calls are answered.

    Those that say nothing are closed after the time of a handshake. Prints the figures.
    """
    async with served() as (process, client):
        host, _, port = process.address.rpartition(":")
        begin = mixed(client)
        await one_after_the_other(begin, 2, 3)
        without = await one_after_the_other(begin, 2, 10)
        before, files = rss_mib(process), len(os.listdir(f"/proc/{process.process.pid}/fd"))
        left: list[asyncio.StreamWriter] = []
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(1_000)]
        for _, writer in silent:
            left.append(writer)
        generator = random.Random(7)

        async def garbage() -> None:
            for number in range(1_000):
                _, writer = await asyncio.open_connection(host, int(port))
                preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if number % 2 else b""
                writer.write(preface + generator.randbytes(generator.randrange(1, 2_000)))
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                if number % 3:
                    writer.transport.abort()
                else:
                    left.append(writer)

        noise = asyncio.create_task(garbage())
        beside = await one_after_the_other(begin, 2, 20)
        await noise
        print(f"\nwithout: {without}\nbeside:  {beside}\nRSS {before:.0f} -> {rss_mib(process):.0f} MiB")
        assert set(beside.codes) == {"OK"}

        def closed() -> bool:
            return all(reader.at_eof() or reader.exception() is not None for reader, _ in silent)

        began = time.perf_counter()
        reads = [asyncio.create_task(reader.read()) for reader, _ in silent]
        await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 60)
        assert closed()
        print(f"the silent ones are gone {time.perf_counter() - began:.0f} s later")
        for writer in left:
            writer.transport.abort()
        await until(lambda: len(os.listdir(f"/proc/{process.process.pid}/fd")) < files + 50, 60)


async def test_rapid_resets() -> None:
    """100,000 calls that are taken back as soon as they were sent do not keep others from their answers for long."""
    async with served() as (process, client):
        begin = mixed(client)
        await one_after_the_other(begin, 2, 3)
        without = await one_after_the_other(begin, 2, 10)
        before = rss_mib(process)
        world = World(client, None)  # type: ignore[arg-type]  # nothing is looked up

        async def reset(connections: int) -> int:
            sent = 0
            for _ in range(connections):
                with contextlib.suppress(ConnectionError, OSError):
                    async with wire(world) as connection:
                        for stream in range(1, 10_000, 2):
                            code = (8).to_bytes(4, "big")
                            await connection.send(opening(world, stream), frame(RST_STREAM, 0, stream, code))
                            sent += 1
            return sent

        began = time.perf_counter()
        resets = asyncio.gather(*(reset(5) for _ in range(4)))
        beside = await one_after_the_other(begin, 2, 10)
        sent = sum(await resets)
        took = time.perf_counter() - began
        print(f"\n{sent:,} resets in {took:.0f} s\nwithout: {without}\nbeside:  {beside}")
        print(f"RSS {before:.0f} -> {rss_mib(process):.0f} MiB")
        after = await one_after_the_other(begin, 2, 5)
        print(f"after: {after}")
        assert sent >= 100_000
        # gRPC itself drops some of what comes, whosever it is, when tens of thousands of calls wait to be taken in.
        assert set(beside.codes) <= {"OK", "CANCELLED", "RESOURCE_EXHAUSTED"}
        assert beside.codes["OK"] > 4 * beside.codes["CANCELLED"]
        assert set(after.codes) == {"OK"}
