"""Owns the way to Postgres: one engine, how transactions are begun, bounded, shielded and retried, and what is refused.

It must not know what the statements are; those are in `store`.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import asyncpg
import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.schema import CreateTable

from service.errors import DeadlineExceeded, Reason, Unavailable
from service.store.tables import incoming_events

log = structlog.get_logger("metering.database")

Result = TypeVar("Result")

WRITES_MAX = 4
READS_MAX = 6
STREAM_READS_MAX = 2
LOOKUPS_MAX = 2
# Three more than the admitted work needs: the backfill, the hourly job and the health check never wait behind callers.
POOL_SIZE = WRITES_MAX + READS_MAX + STREAM_READS_MAX + LOOKUPS_MAX + 3
STATEMENT_TIMEOUT_S = 30
# A whole transaction of a caller: past it the connection, not the statement, must be what hangs.
TRANSACTION_TIMEOUT_S = 60
BACKGROUND_TIMEOUT_S = 24 * 3600
ATTEMPTS_MAX = 10
VERSION_MIN = 150000

# What using a database can raise. SQLAlchemy wraps most of it, but not what happens while it connects, nor in COPY.
DATABASE_ERRORS = (
    sa.exc.SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that died while it was being talked on
    OSError,
    TimeoutError,
)

_QUERY_CANCELED = "57014"
_DEADLOCK_OR_SERIALIZATION = {"40001", "40P01"}
# Postgres says these when it stops, starts, or has no connection left.
_UNAVAILABLE_CLASSES = ("08", "53", "57")


class UnsafeDatabase(Exception):
    """The database cannot keep the promise that an acknowledged event is durable; the text says what to do."""


class BadDatabaseUrl(Exception):
    """The database URL is not one; the text says what is wrong, and never the URL, which can hold a password."""


class Database:
    """One pool of connections, and the only ways in which a transaction is run.

    Callers may be cancelled at any time (a client hangs up, a deadline passes). The transaction itself is shielded
    from that: it ends by itself, within the server's statement timeout, and its connection goes back to the pool whole.
    """

    def __init__(self, url: str) -> None:
        """Prepare the pool; no connection is made yet. `url` is `postgresql+asyncpg://…` or `postgresql://…`."""
        parsed, ssl = _parsed(url)
        # Every batch goes through the same handful of statements, so their plans are kept per connection.
        self.engine: AsyncEngine = create_async_engine(
            parsed,
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=5,
            pool_recycle=1800,
            # After a restart of Postgres every pooled connection is dead; without the ping each would cost one call.
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={
                **ssl,
                "timeout": 5,
                "server_settings": {
                    # What a database or role sets as its default must not change what is promised here: a snapshot
                    # taken before the lock is granted would not see the metric that the lock was held for.
                    "default_transaction_isolation": "read committed",
                    "default_transaction_read_only": "off",
                    "application_name": "metering",
                    "synchronous_commit": "on",
                    "statement_timeout": str(STATEMENT_TIMEOUT_S * 1000),
                    "idle_in_transaction_session_timeout": "60000",
                    "timezone": "UTC",
                    "jit": "off",
                },
            },
        )
        sa.event.listen(self.engine.sync_engine, "connect", _prepare_connection)
        self._writes = asyncio.Semaphore(WRITES_MAX)
        self._reads = asyncio.Semaphore(READS_MAX)
        self._stream_reads = asyncio.Semaphore(STREAM_READS_MAX)
        self._lookups = asyncio.Semaphore(LOOKUPS_MAX)
        self._running: set[asyncio.Task[Any]] = set()

    async def write(
        self, work: Callable[[AsyncConnection], Awaitable[Result]], *, limit_s: float | None = None
    ) -> Result:
        """Run `work` in one READ COMMITTED transaction and return its result after the commit.

        Deadlocks and serialization failures run the whole of `work` again. `limit_s` replaces the usual limits of
        statements and transaction. Raises Unavailable when the database does not answer (the outcome is then unknown),
        and whatever `work` raises, after a rollback.
        """

        async def longer(connection: AsyncConnection) -> Result:
            limit = str(int((limit_s or 0) * 1000))
            await connection.execute(sa.func.set_config("statement_timeout", limit, True).select())
            return await work(connection)

        bounded = work if limit_s is None else longer
        return await self._shielded(self._writes, lambda: self._attempts(bounded, limit_s or TRANSACTION_TIMEOUT_S))

    async def read(
        self, work: Callable[[AsyncConnection], Awaitable[Result]], *, timeout_s: float | None = None
    ) -> Result:
        """Run `work` in one read-only snapshot. `timeout_s` bounds each statement. Raises as `write`."""
        return await self._shielded(self._reads, lambda: self._snapshot(work, timeout_s, TRANSACTION_TIMEOUT_S))

    async def read_ahead(
        self, work: Callable[[AsyncConnection], Awaitable[Result]], *, timeout_s: float | None = None
    ) -> Result:
        """Run `work` as `read` does, for a stream: many streams must not keep waiting who wants a single answer."""
        return await self._shielded(self._stream_reads, lambda: self._snapshot(work, timeout_s, TRANSACTION_TIMEOUT_S))

    async def look_up(self, work: Callable[[AsyncConnection], Awaitable[Result]]) -> Result:
        """Run a short `work` as `read` does, but never behind callers' queries: a call must know whose it is."""
        return await self._shielded(self._lookups, lambda: self._snapshot(work, None, TRANSACTION_TIMEOUT_S))

    async def background(
        self, work: Callable[[AsyncConnection], Awaitable[Result]], *, snapshot: bool = False
    ) -> Result:
        """Run `work` in one transaction (or read-only snapshot) outside the admission and the limits of callers."""

        async def unlimited(connection: AsyncConnection) -> Result:
            await connection.execute(sa.func.set_config("statement_timeout", "0", True).select())
            return await work(connection)

        if snapshot:
            return await self._snapshot(unlimited, None, BACKGROUND_TIMEOUT_S)
        return await self._attempts(unlimited, BACKGROUND_TIMEOUT_S)

    async def ping(self) -> bool:
        """Say whether the database answers now."""
        try:
            async with asyncio.timeout(3), self.engine.connect() as connection:
                await connection.execute(sa.select(1))
        except DATABASE_ERRORS:
            return False
        return True

    async def check(self, *, allow_unsafe: bool = False) -> None:
        """Refuse a database that is too old or could lose what was acknowledged; raises UnsafeDatabase."""
        names = ("server_version_num", "fsync", "full_page_writes")
        async with self.engine.connect() as connection:
            row = (
                await connection.execute(
                    sa.select(*(sa.func.current_setting(name) for name in names), sa.func.pg_is_in_recovery())
                )
            ).one()
        if int(row[0]) < VERSION_MIN:
            raise UnsafeDatabase(f"Postgres 15 or newer is needed; this one is {int(row[0]) // 10000}.")
        faults = [f"{name} is off" for name, value in zip(names[1:], row[1:3], strict=True) if value != "on"]
        faults += ["it is a standby in recovery"] if row[3] else []
        if faults and not allow_unsafe:
            raise UnsafeDatabase(
                f"This database can lose acknowledged events ({', '.join(faults)}). Turn it on, use a primary, or set "
                "METERING_ALLOW_UNSAFE_DATABASE=1 for tests."
            )

    async def close(self) -> None:
        """Wait for transactions that are still running, then close every connection."""
        if self._running:
            await asyncio.wait(self._running, timeout=STATEMENT_TIMEOUT_S)
        await self.engine.dispose()

    async def _shielded(self, admission: asyncio.Semaphore, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        # A caller that is cancelled while it waits here leaves nothing behind; from the next line on it cannot stop
        # the transaction, which gives the place back when it ends.
        await admission.acquire()
        task = asyncio.create_task(work())
        task.add_done_callback(lambda _: admission.release())
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncConnection]:
        connection = self.engine.connect()
        try:
            await connection.start()
        except DATABASE_ERRORS as error:
            # Whatever Postgres says when it refuses a connection, it is not the caller's doing.
            raise _unavailable(error) from error
        try:
            yield connection
        finally:
            await connection.close()

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # a caller that left does not fetch it; asyncio must not complain about that

    async def _attempts(self, work: Callable[[AsyncConnection], Awaitable[Result]], limit_s: float) -> Result:
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                async with asyncio.timeout(limit_s), self._connected() as connection, connection.begin():
                    return await work(connection)
            except DATABASE_ERRORS as error:
                state = sqlstate(error)
                if state in _DEADLOCK_OR_SERIALIZATION and attempt < ATTEMPTS_MAX:
                    await asyncio.sleep(random.uniform(0, 0.005 * 2**attempt))  # noqa: S311 - jitter, not a secret
                    continue
                if (told := _translated(error)) is error:
                    raise
                raise told from error
        raise AssertionError("unreachable")

    async def _snapshot(
        self, work: Callable[[AsyncConnection], Awaitable[Result]], timeout_s: float | None, limit_s: float
    ) -> Result:
        try:
            async with asyncio.timeout(limit_s), self._connected() as connection:
                await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
                async with connection.begin():
                    if timeout_s is not None and timeout_s < STATEMENT_TIMEOUT_S:
                        limit = str(max(1, int(timeout_s * 1000)))
                        await connection.execute(sa.func.set_config("statement_timeout", limit, True).select())
                    return await work(connection)
        except DATABASE_ERRORS as error:
            if (told := _translated(error)) is error:
                raise
            raise told from error


def _parsed(url: str) -> tuple[sa.URL, dict[str, str]]:
    """Read a database URL as libpq's users write it; returns it for SQLAlchemy, and the TLS mode for asyncpg."""
    try:
        parsed = sa.make_url(url).set(drivername="postgresql+asyncpg")
    except sa.exc.ArgumentError:
        raise BadDatabaseUrl("The database URL cannot be read; it looks like postgresql://user@host/name.") from None
    mode = parsed.query.get("sslmode", parsed.query.get("ssl"))
    rest = parsed.difference_update_query(["sslmode", "ssl"])
    if unknown := sorted(set(rest.query) - {"host", "port"}):
        raise BadDatabaseUrl(f"The database URL has {', '.join(unknown)}; only host, port and sslmode are understood.")
    return rest, {"ssl": str(mode)} if mode else {}


def sqlstate(error: BaseException) -> str | None:
    """Return Postgres' five-letter code of an error, if it came from Postgres."""
    return getattr(getattr(error, "orig", error), "sqlstate", None)


def _translated(error: BaseException) -> BaseException:
    state = sqlstate(error)
    if state == _QUERY_CANCELED:
        message = "The work could not be done in time and was undone: allow more time, or ask for less at once."
        return DeadlineExceeded(Reason.DEADLINE_TOO_SHORT, message)
    gone = (
        isinstance(
            error,
            OSError
            | TimeoutError
            | sa.exc.TimeoutError
            | sa.exc.InterfaceError
            | asyncpg.InterfaceError
            | asyncpg.InternalClientError,
        )
        or (isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated)
        or (state or "").startswith(_UNAVAILABLE_CLASSES)
        or state in _DEADLOCK_OR_SERIALIZATION
    )
    return _unavailable(error) if gone else error


def _unavailable(error: BaseException) -> Unavailable:
    log.warning("database unavailable", error=type(error).__name__, sqlstate=sqlstate(error))
    return Unavailable(
        Reason.DATABASE_UNAVAILABLE,
        "The database did not answer. For writes the outcome is unknown: retry with the same ids.",
        retry_after_s=1,
    )


def _prepare_connection(dbapi_connection: Any, _record: Any) -> None:
    statement = str(CreateTable(incoming_events).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]
    dbapi_connection.run_async(lambda connection: connection.execute(statement))
