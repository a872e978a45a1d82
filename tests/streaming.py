"""What the tests of streams share: servers that can be looked into, narrow channels, and a proxy that cuts."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from conftest import Client
from faults import Fault, read_fault
from structlog.testing import capture_logs

import service.server
from service.config import Config
from service.database import Database
from service.rpc.interceptor import RequestBytes
from service.rpc.streams import Streams
from service.server import serving

# Only the first window of HTTP/2 and no more: who does not read is noticed after the first few messages.
NARROW = (("grpc.http2.lookahead_bytes", 65535), ("grpc.http2.bdp_probe", 0))
# A connection of its own, with none of gRPC's pauses before the next attempt.
ALONE = (("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100))


class WatchedStreams(Streams):
    """Streams that tell what they do."""

    sent = 0
    sending = 0

    async def send(self, context: Any, message: Any) -> None:
        """Count what is sent, and what waits to be."""
        self.sending += 1
        try:
            await super().send(context, message)
        finally:
            self.sending -= 1
        self.sent += 1


class WatchedBytes(RequestBytes):
    """Request bytes that tell how many messages were waited for and taken."""

    taken = 0
    held_most = 0

    async def take(self, size: int, organization: str) -> None:
        """Count messages of streams."""
        await super().take(size, organization)
        self.taken += 1
        self.held_most = max(self.held_most, self._held)


@dataclass
class Watched:
    """A server in this process, with what a test looks at."""

    client: Client
    database: Database
    streams: WatchedStreams
    all_bytes: Sequence[WatchedBytes]
    logs: Sequence[Any]
    tasks_before: int = 0
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def open(self) -> int:
        """How many streams of usage are open."""
        return self.streams._reading

    @property
    def held(self) -> int:
        """How many bytes of requests are held."""
        return sum(one._held for one in self.all_bytes)

    @property
    def request_bytes(self) -> WatchedBytes:
        """What batches of streams of events hold: the last that the server makes."""
        return self.all_bytes[-1]

    @property
    def connections(self) -> int:
        """How many database connections are in use."""
        return int(self.database.engine.pool.checkedout())  # type: ignore[attr-defined]

    def errors(self) -> list[Any]:
        """What was logged as the server's own error."""
        return [entry for entry in self.logs if entry["log_level"] == "error"]

    async def quiet(self) -> None:
        """Wait until every open stream waits for its reader, and nothing moves."""
        async with asyncio.timeout(20):
            while True:
                before = self.streams.sent
                await asyncio.sleep(0.15)
                if self.streams.sent == before and self.streams.sending >= self.open and not self.connections:
                    return


@asynccontextmanager
async def watched(database_url: str, **settings: Any) -> AsyncIterator[Watched]:
    """Run a server in this process that can be looked into."""
    made: dict[type, list[Any]] = {}

    def remembering(kind: type) -> Callable[..., Any]:
        def make(*arguments: Any) -> Any:
            one = kind(*arguments)
            made.setdefault(kind, []).append(one)
            return one

        return make

    database = Database(database_url)
    config = Config(**{"listen": ("127.0.0.1:0",), "allow_unsafe_database": True, **settings})
    async with AsyncExitStack() as stack:
        logs = stack.enter_context(capture_logs())
        stack.push_async_callback(database.close)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.server, "Streams", remembering(WatchedStreams))
            patch.setattr(service.server, "RequestBytes", remembering(WatchedBytes))
            (address, *_) = await stack.enter_async_context(serving(config, database))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield Watched(Client(address, channel), database, made[WatchedStreams][0], made[WatchedBytes], logs)


@asynccontextmanager
async def connected(address: str, *options: tuple[str, int]) -> AsyncIterator[Client]:
    """A client with a connection of its own."""
    async with grpc.aio.insecure_channel(address, options=(*ALONE, *options)) as channel:
        yield Client(address, channel)


async def received(call: Any, number: int | None = None, pause: float = 0) -> tuple[list[Any], Fault | None]:
    """Read messages until the end of a stream, or `number` of them, and why it ended early."""
    found: list[Any] = []
    try:
        while len(found) != number:
            message = await call.read()
            if message is grpc.aio.EOF:
                return found, None
            found.append(message)
            await asyncio.sleep(pause)
    except grpc.aio.AioRpcError as error:
        return found, read_fault(error)
    return found, None


async def idle_transactions(database: Database) -> int:
    """How many connections of the database hold a transaction and do nothing."""
    query = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
    )
    async with database.engine.connect() as connection:
        return int((await connection.execute(query)).scalar_one())


class Proxy:
    """A TCP proxy before a server, whose connections are cut after a number of bytes in one direction."""

    def __init__(self, target: str) -> None:
        """Lead to `target` until told otherwise; nothing is cut until `cut_after` is called."""
        self.target = target
        self.address = ""
        self._limits = {"up": 1 << 60, "down": 1 << 60}
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut_after(self, direction: str, number: int) -> None:
        """Let each new connection pass so many bytes `up` to the server or `down` from it, and cut it then."""
        self._limits = {"up": 1 << 60, "down": 1 << 60, direction: number}

    def cut(self) -> None:
        """Cut every connection now, without a farewell."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        limits = dict(self._limits)
        try:
            host, port = self.target.rsplit(":", 1)
            onward_reader, onward = await asyncio.open_connection(host, int(port))
            self._writers.add(onward)
            both = writer, onward
            pipes = [
                asyncio.create_task(self._pipe(reader, onward, limits["up"], both)),
                asyncio.create_task(self._pipe(onward_reader, writer, limits["down"], both)),
            ]
            try:
                await asyncio.gather(*pipes)
            finally:
                for pipe in pipes:
                    pipe.cancel()
                await asyncio.gather(*pipes, return_exceptions=True)
                self._writers.discard(onward)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)

    @staticmethod
    async def _pipe(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int, both: Sequence[asyncio.StreamWriter]
    ) -> None:
        with contextlib.suppress(OSError):
            while limit > 0 and (data := await reader.read(min(limit, 1 << 16))):
                writer.write(data)
                await writer.drain()
                limit -= len(data)
            # What was written before the cut shall arrive.
            await asyncio.sleep(0)
        for one in both:
            if limit > 0:
                one.close()
            else:
                one.transport.abort()


def random_cut(generator: random.Random, most: int) -> int:
    """Draw after how many bytes to cut: often early, where the frames of the protocol itself are."""
    return generator.randint(0, generator.choice([100, 2_000, most]))
