"""Owns the way to Postgres: one engine, how transactions are begun, bounded, shielded and retried, and what is refused.

It must not know what the statements are; those are in `store`.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import asyncpg
import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.schema import CreateTable

from service.errors import DeadlineExceeded, Reason, Unavailable
from service.store.compiled import Compiled
from service.store.tables import APPLICATION_ROLE, METADATA, ORGANIZATION_SETTING, incoming_events, texts
from service.turns import Turns

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

_TIMEOUT = sa.func.set_config("statement_timeout", sa.bindparam("timeout", type_=sa.Text), True)
_LIMITED = Compiled(sa.select(_TIMEOUT))
# One statement for all: each costs a round trip. The role ends with the transaction, as every such setting does.
_BOUND = Compiled(
    sa.select(
        _TIMEOUT,
        sa.func.set_config(ORGANIZATION_SETTING, sa.bindparam("organization", type_=sa.Text), True),
        sa.func.set_config("role", APPLICATION_ROLE, True),
    )
)

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

    def __init__(self, url: str, *, statement_timeout: timedelta = timedelta(seconds=STATEMENT_TIMEOUT_S)) -> None:
        """Prepare the pool; no connection is made yet. `url` is `postgresql+asyncpg://…` or `postgresql://…`.

        No statement of a caller runs longer than `statement_timeout`.
        """
        self._statement_timeout_s = statement_timeout.total_seconds()
        self._transaction_timeout_s = max(TRANSACTION_TIMEOUT_S, 2 * self._statement_timeout_s)
        parsed, ssl = _parsed(url)
        # Every batch goes through the same handful of statements, so their plans are kept per connection.
        self.engine: AsyncEngine = create_async_engine(
            parsed,
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=5,
            pool_recycle=1800,
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
                    "statement_timeout": str(int(self._statement_timeout_s * 1000)),
                    "idle_in_transaction_session_timeout": "60000",
                    "timezone": "UTC",
                    "jit": "off",
                },
            },
        )
        sa.event.listen(self.engine.sync_engine, "connect", _prepare_connection)
        self._writes = Turns(WRITES_MAX)
        self._reads = Turns(READS_MAX, sheds=True)
        self._stream_reads = Turns(STREAM_READS_MAX)
        self._lookups = asyncio.Semaphore(LOOKUPS_MAX)
        self._running: set[asyncio.Task[Any]] = set()

    async def write(
        self,
        organization: str,
        work: Callable[[AsyncConnection], Awaitable[Result]],
        *,
        limit_s: float | None = None,
        patient: bool = False,
    ) -> Result:
        """Run `work` in one READ COMMITTED transaction of an organization and return its result after the commit.

        Postgres itself shows it the rows of this organization and no others, and takes no others from it. Deadlocks and
        serialization failures run the whole of `work` again. `limit_s` replaces the usual limits of statements and
        transaction. Raises ResourceExhausted when too many wait (see `Turns`), Unavailable when the database does not
        answer (the outcome is then unknown), and whatever `work` raises, after a rollback.
        """
        settings = _settings(organization, self._statement_timeout_s if limit_s is None else limit_s)
        limit_s = limit_s or self._transaction_timeout_s
        await self._writes.take(organization, patient=patient)
        return await self._shielded(lambda: self._attempts(settings, work, limit_s), self._writes.give_back)

    async def read(
        self, organization: str, work: Callable[[AsyncConnection], Awaitable[Result]], *, timeout_s: float | None = None
    ) -> Result:
        """Run `work` in a read-only snapshot of an organization. `timeout_s` bounds statements. Raises as `write`."""
        began = asyncio.get_running_loop().time()
        await self._reads.take(organization)
        if timeout_s is not None:
            timeout_s -= asyncio.get_running_loop().time() - began
        return await self._shielded(lambda: self._reading(organization, work, timeout_s), self._reads.give_back)

    async def read_ahead(
        self, organization: str, work: Callable[[AsyncConnection], Awaitable[Result]], *, timeout_s: float | None = None
    ) -> Result:
        """Run `work` as `read` does, for a stream: many streams must not keep waiting who wants a single answer."""
        # Streams are bounded in number, and there is nobody to refuse once they began.
        await self._stream_reads.take(organization, patient=True)
        return await self._shielded(lambda: self._reading(organization, work, timeout_s), self._stream_reads.give_back)

    async def look_up(self, work: Callable[[AsyncConnection], Awaitable[Result]]) -> Result:
        """Run a short `work` about no organization in one snapshot, never behind callers' queries: credentials."""
        await self._lookups.acquire()
        settings = _settings(None, self._statement_timeout_s)
        return await self._shielded(
            lambda: self._snapshot(settings, work, TRANSACTION_TIMEOUT_S), self._lookups.release
        )

    async def background(
        self,
        work: Callable[[AsyncConnection], Awaitable[Result]],
        *,
        organization: str | None = None,
        snapshot: bool = False,
    ) -> Result:
        """Run `work` in one transaction (or read-only snapshot) outside the admission and the limits of callers.

        Without an organization it sees every one's rows: what looks for work, and operators' commands, do.
        """
        unlimited = _settings(organization, 0)
        if snapshot:
            return await self._snapshot(unlimited, work, BACKGROUND_TIMEOUT_S)
        return await self._attempts(unlimited, work, BACKGROUND_TIMEOUT_S)

    async def ping(self) -> bool:
        """Say whether the database answers now."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3):
                for _ in range(2):  # a connection of the pool may have died
                    with contextlib.suppress(*DATABASE_ERRORS):
                        async with self.engine.connect() as connection:
                            await connection.execute(sa.select(1))
                            return True
        return False

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

    async def check_policies(self) -> None:
        """Refuse a database that does not keep organizations apart by itself; raises UnsafeDatabase.

        See `store.tables`. One that was restored on a server without the role lacks its policies and grants.
        """
        protected = [table.name for table in METADATA.tables.values() if "organization_id" in table.c]
        protected.remove("api_keys")
        protected.append("organizations")
        names = sa.func.unnest(texts(protected)).table_valued("name")
        policies = sa.table("pg_policies", sa.column("tablename"))
        whole = sa.select(
            sa.func.bool_and(
                sa.and_(
                    sa.func.row_security_active(names.c.name),
                    *(sa.func.has_table_privilege(names.c.name, one) for one in ("SELECT", "UPDATE")),
                    sa.or_(names.c.name == "organizations", sa.func.has_table_privilege(names.c.name, "INSERT")),
                    sa.exists().where(policies.c.tablename == names.c.name),
                )
            )
        )
        try:
            async with self.engine.begin() as connection:
                await _BOUND.execute(connection, organization="", timeout="5000")
                found = (await connection.execute(whole)).scalar_one()
        except sa.exc.DBAPIError as error:
            if sqlstate(error) is None:
                raise
            found = False
        if not found:
            raise UnsafeDatabase(
                f"This database does not keep organizations apart: the role {APPLICATION_ROLE}, its grants or policies "
                "are missing, as after a restore on another server. Make the role, then restore: see docs/security.md."
            )

    async def close(self) -> None:
        """Wait for transactions that are still running, then close every connection."""
        if self._running:
            await asyncio.wait(self._running, timeout=STATEMENT_TIMEOUT_S)
        await self.engine.dispose()

    async def _shielded(self, work: Callable[[], Coroutine[Any, Any, Result]], ended: Callable[[], None]) -> Result:
        # From here on a caller that is cancelled cannot stop the transaction, which says itself when it has ended.
        task = asyncio.create_task(work())
        task.add_done_callback(lambda _: ended())
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

    async def _attempts(
        self, settings: "_Settings", work: Callable[[AsyncConnection], Awaitable[Result]], limit_s: float
    ) -> Result:
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                async with asyncio.timeout(limit_s):
                    return await self._transaction(settings, work)
            except DATABASE_ERRORS as error:
                state = sqlstate(error)
                if state in _DEADLOCK_OR_SERIALIZATION and attempt < ATTEMPTS_MAX:
                    await asyncio.sleep(random.uniform(0, 0.005 * 2**attempt))  # noqa: S311 - jitter, not a secret
                    continue
                if (told := _translated(error)) is error:
                    raise
                raise told from error
        raise AssertionError("unreachable")

    async def _reading(
        self, organization: str, work: Callable[[AsyncConnection], Awaitable[Result]], timeout_s: float | None
    ) -> Result:
        limit_s = self._statement_timeout_s if timeout_s is None else min(self._statement_timeout_s, timeout_s)
        return await self._snapshot(_settings(organization, max(0.001, limit_s)), work, self._transaction_timeout_s)

    async def _snapshot(
        self, settings: "_Settings", work: Callable[[AsyncConnection], Awaitable[Result]], limit_s: float
    ) -> Result:
        try:
            async with asyncio.timeout(limit_s):
                return await self._transaction(settings, work, **_SNAPSHOT)
        except DATABASE_ERRORS as error:
            if (told := _translated(error)) is error:
                raise
            raise told from error

    async def _transaction(
        self, settings: "_Settings", work: Callable[[AsyncConnection], Awaitable[Result]], **options: Any
    ) -> Result:
        """Run `work` in one transaction with these settings, on a connection with these options."""
        for pooled in (True, False):
            begun = False
            try:
                async with self._connected() as connection:
                    if options:
                        await connection.execution_options(**options)
                    async with connection.begin():
                        await settings.statement.execute(connection, **settings.values)
                        begun = True
                        return await work(connection)
            except sa.exc.DBAPIError as error:
                # One that died in the pool, as all do when Postgres restarts, shows before anything was asked of it and
                # has the others thrown away. To ask each time if it lives would cost as much as a query.
                if begun or not pooled or not error.connection_invalidated:
                    raise
        raise AssertionError("unreachable")


class _Settings(NamedTuple):
    """What a transaction begins with."""

    statement: Compiled
    values: Mapping[str, str]


_SNAPSHOT = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}


def _settings(organization: str | None, timeout_s: float) -> _Settings:
    """Bind a transaction to an organization (None = all), and its statements to a time (0 = any)."""
    timeout = str(max(1, int(timeout_s * 1000)) if timeout_s else 0)
    if organization is None:
        return _Settings(_LIMITED, {"timeout": timeout})
    return _Settings(_BOUND, {"organization": organization, "timeout": timeout})


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
    # Only this connection sees it, so "everyone" is the same login in its other role.
    grant = f"GRANT SELECT, INSERT ON {incoming_events.name} TO PUBLIC"
    dbapi_connection.run_async(lambda connection: connection.execute(f"{statement}; {grant}"))
