"""What a failed call tells its caller, the check that it tells nothing else, and how tests wait for what must come."""

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import grpc
import pytest
import sqlalchemy as sa
from google.rpc import error_details_pb2, status_pb2
from sqlalchemy.ext.asyncio import AsyncEngine

# Words that only a leaked exception, statement or path would bring into an answer.
LEAK = re.compile(rb"sqlalchemy|asyncpg|INSERT|SELECT|/usr/|Traceback|psycopg|postgres", re.IGNORECASE)


class Fault(NamedTuple):
    """A status with its details."""

    code: str
    reason: str
    fields: tuple[str, ...]
    metadata: dict[str, str]
    retry_s: float | None
    text: str
    request_id: str | None
    trailers_size: int

    @property
    def field(self) -> str | None:
        """The first field at fault."""
        return self.fields[0] if self.fields else None

    @property
    def brief(self) -> tuple[str, str, str | None]:
        """What the golden tables compare."""
        return self.code, self.reason, self.field


async def fault_of(call: Awaitable[Any]) -> Fault:
    """Await a call that must fail and read why."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_fault(caught.value)


def read_fault(error: grpc.aio.AioRpcError) -> Fault:
    """Read the status and details of a failed call; fails if they leak the server's insides."""
    trailers = [(str(key), value) for key, value in error.trailing_metadata()]
    raw = dict(trailers).get("grpc-status-details-bin", b"")
    text = error.details() or ""
    # As HTTP/2 counts them: bytes are sent in base64, the text percent-encoded, and each header weighs 32 more.
    sizes = [
        len(key) + 32 + (len(value) * 4 // 3 if isinstance(value, bytes) else len(value)) for key, value in trailers
    ]
    size = sum(sizes) + sum(1 if 0x20 <= byte < 0x7F and byte != 0x25 else 3 for byte in text.encode()) + 64
    assert not LEAK.search(text.encode()), text
    assert not LEAK.search(raw), raw
    status = status_pb2.Status.FromString(raw)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    retry_s = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_s = retry.retry_delay.ToMilliseconds() / 1000
    if raw:
        assert (status.code, status.message, info.domain) == (error.code().value[0], text, "metering")
    return Fault(
        code=error.code().name,
        reason=info.reason,
        fields=tuple(one.field for one in bad.field_violations),
        metadata=dict(info.metadata),
        retry_s=retry_s,
        text=text,
        request_id=next((str(value) for key, value in trailers if key == "x-request-id"), None),
        trailers_size=size,
    )


async def until_waiting(engine: AsyncEngine, number: int = 1) -> None:
    """Wait until this many connections of a database wait for a lock that another one holds.

    Each look is a transaction of its own: within one, Postgres shows only the connections that were there at its first.
    """
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )

    async def seen() -> bool:
        async with engine.connect() as connection:
            return (await connection.execute(waiting)).scalar_one() == number

    await until(seen)


async def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Poll until a condition, which may be awaitable, is true."""
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(0.01)
