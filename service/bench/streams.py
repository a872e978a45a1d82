"""Measures streams of usage: against the same messages sent by a server that only sends, and with readers that lag."""

import asyncio
import contextlib
import functools
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc

from metering.v1 import usage_pb2 as pb
from service.bench import Comparison, Side, Stopwatch, Summary, Target, Work, at_least, must_be
from service.bench.echo import REPLAY, keep, kept
from service.bench.ground import CALL_TIMEOUT_S, Ground, Server
from service.bench.usage import CUSTOMERS, START, Loaded, load

# Most that the windows are made of; ten windows for each event at least.
EVENTS = 10**5
SLOW_CLIENTS = 50
SLOW_S = 10.0
SLOW_READ_S = 0.5
GROWTH_MAX_MIB = 64
SERVICE, ECHO, GROWTH, BEFORE = "StreamUsage", "echo stream", "growth, MiB", "before, MiB"

_STREAM = "/metering.v1.UsageService/StreamUsage"
_SAMPLED_S = 0.05
_SETTLED_S = 1.0
_MIB = 1024 * 1024
# Without probing for more a connection takes 64 KiB that nobody has read, and the server feels it.
_SMALL_WINDOWS = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 64 * 1024),
    ("grpc.max_receive_message_length", 16 * _MIB),
    ("grpc.use_local_subchannel_pool", 1),
)

Metadata = tuple[tuple[str, str], ...]


class _Streamed:
    """One long stream, and who reads it."""

    def __init__(self, server: Server, loaded: Loaded, windows: int) -> None:
        self.server = server
        self.loaded = loaded
        hours = windows // CUSTOMERS
        self.windows = hours * CUSTOMERS
        request = pb.StreamUsageRequest(window_size=pb.WINDOW_SIZE_HOUR, customer_ids=loaded.customers)
        request.billable_metrics.add(id=loaded.metrics["COUNT"])
        request.starting_on.FromDatetime(START)
        request.ending_before.FromDatetime(START + timedelta(hours=hours))
        self.request = request.SerializeToString()
        # Of the hours that are asked for, which may be fewer than there are events for.
        halves = len(loaded.expected.counts) // CUSTOMERS
        self.counted = sum(
            sum(loaded.expected.counts[i * halves : i * halves + min(halves, 2 * hours)]) for i in range(CUSTOMERS)
        )
        # What a whole stream gave, to set what slow readers get against it.
        self.messages: list[bytes] = []
        self.before = 0

    async def service(self) -> Work:
        """Read it from the service."""
        messages, work = await self._read(self.server, _STREAM, self.request, self.loaded.tenant.metadata)
        parsed = [pb.StreamUsageResponse.FromString(one) for one in messages]
        must_be("windows", sum(len(one.windows) for one in parsed), self.windows)
        counted = sum(int(window.value or 0) for one in parsed for window in one.windows)
        must_be("sum of the windows", counted, self.counted)
        must_be("number of complete messages", [one.complete for one in parsed].count(True), 1)
        must_be("the last message is complete", parsed[-1].complete, True)
        self.messages = messages
        return work

    async def echo(self, server: Server, method: str, path: Path) -> Work:
        """Read what the service sent from a server that only sends it."""
        messages, work = await self._read(server, method, str(path).encode(), ())
        must_be("messages of the echo are those of the service", messages == list(kept(path)), True)
        return work

    async def _read(self, server: Server, method: str, request: bytes, metadata: Metadata) -> tuple[list[bytes], Work]:
        """Read a stream to its end as bytes; the same for whoever sends it."""
        open_stream: Any = server.channel.unary_stream(method)
        messages: list[bytes] = []
        watch = Stopwatch()
        async for message in open_stream(request, metadata=metadata, timeout=CALL_TIMEOUT_S):
            messages.append(message)
        return messages, watch.done(self.windows)

    async def slow(self) -> Work:
        """Let clients read slowly, and tell how much memory the server has more at the most, in MiB."""
        if not self.messages:
            await self.service()
        await asyncio.sleep(_SETTLED_S)
        # Before the first that ever came: what a later run finds is what an earlier one left.
        most = self.server.resident_bytes()
        self.before = self.before or most
        async with contextlib.AsyncExitStack() as stack:
            reading = [asyncio.create_task(self._read_slowly(stack)) for _ in range(SLOW_CLIENTS)]
            while not all(one.done() for one in reading):
                most = max(most, self.server.resident_bytes())
                await asyncio.sleep(_SAMPLED_S)
            found = [one.result() for one in reading]
        longest = max(map(len, found))
        expected = _windows(self.messages[:longest])
        for messages in found:
            windows = _windows(messages)
            must_be("a slow reader got windows", len(windows) > 0, True)
            # Messages may be cut elsewhere when many read, so there may be a few windows more.
            number = min(len(windows), len(expected))
            must_be("windows of a slow reader are the first ones", windows[:number] == expected[:number], True)
        return Work(round((most - self.before) / _MIB), 1.0)

    async def resident_before(self) -> Work:
        """Tell how much memory the server had before the slow readers came, in MiB."""
        return Work(round(self.before / _MIB), 1.0)

    async def _read_slowly(self, stack: contextlib.AsyncExitStack) -> list[bytes]:
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(self.server.address, options=_SMALL_WINDOWS)
        )
        open_stream: Any = channel.unary_stream(_STREAM)
        call: Any = open_stream(self.request, metadata=self.loaded.tenant.metadata, timeout=CALL_TIMEOUT_S)
        found: list[bytes] = []
        watch = Stopwatch()
        while watch.seconds < SLOW_S:
            message = await call.read()
            if not isinstance(message, bytes):
                # A short one may come to its end.
                whole = bool(found) and pb.StreamUsageResponse.FromString(found[-1]).complete
                must_be("the stream goes on, or is complete", whole, True)
                break
            found.append(message)
            await asyncio.sleep(SLOW_READ_S)
        call.cancel()
        return found


def _windows(messages: Sequence[bytes]) -> list[tuple[str, int, str]]:
    parsed = (pb.StreamUsageResponse.FromString(one) for one in messages)
    return [(one.customer_id, one.starting_on.seconds, one.value) for message in parsed for one in message.windows]


async def streams(ground: Ground, windows: int, *, progress: Callable[[str], None]) -> AsyncIterator[Comparison]:
    """Compare a stream of usage with one of the same messages, then let many clients read slowly."""
    async with ground.server() as server, ground.server(module=("service.bench.echo",)) as echo:
        loaded = await load(ground, server, min(EVENTS, max(1_000, windows // 10)), progress, ["COUNT"])
        streamed = _Streamed(server, loaded, windows)
        progress("stream: reading the messages that the limit sends")
        await streamed.service()
        with tempfile.TemporaryDirectory(prefix="metering-bench-") as directory:
            path = Path(directory) / "messages"
            keep(path, streamed.messages)
            yield Comparison(
                f"stream: {streamed.windows:,} windows to one client",
                "windows/s",
                [Side(SERVICE, streamed.service), Side(ECHO, functools.partial(streamed.echo, echo, REPLAY, path))],
                [ECHO],
                [at_least(SERVICE, ECHO, 0.50)],
                [f"{len(streamed.messages):,} messages, {sum(map(len, streamed.messages)):,} bytes."],
            )
        if server.pid is None:
            progress("stream: the memory of a server that was not started here is not measured")
            return
        yield Comparison(
            f"stream: memory with {SLOW_CLIENTS} clients that read a message in {SLOW_READ_S:g} s",
            "MiB",
            [Side(GROWTH, streamed.slow), Side(BEFORE, streamed.resident_before)],
            (),
            [Target("growth of the server's memory, MiB", _most_growth, GROWTH_MAX_MIB, at_most=True)],
            [f"For {SLOW_S:g} s, by the most that was sampled every {_SAMPLED_S:g} s, over what it had before."],
            rounds_max=3,
        )


def _most_growth(sides: Mapping[str, Summary]) -> float:
    return max(sides[GROWTH].rates)
