"""The promise of `updated_since`: who reads only what changed has, after every read, what a full read would give.

The world is small and changes in every way that it can: events late and ahead of time, from two servers at once, under
keys that move between customers, into metrics that are created, count their past in small steps and are archived; and
writers stand still between what they wrote and their commit while others read.
"""

import asyncio
import functools
import itertools
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import oracle
import pytest
import sqlalchemy as sa
import test_oracle
from conftest import Client, event, running_server, timestamp
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from test_oracle import (
    CUSTOMERS,
    LONG_FACTOR,
    MINUTE,
    Rows,
    Servers,
    Tenant,
    archive,
    create,
    fetch,
    new_tenant,
    read_pages,
    read_stream,
    wire,
)

from metering.v1 import billable_metric_pb2, customer_pb2, usage_pb2
from service import backfill
from service.database import Database
from service.rpc import usage as usage_rpc
from service.store import metrics as metric_store

only_by_hand = test_oracle.only_by_hand
servers = test_oracle.servers

EXAMPLES = 8
PAGE_SIZES = (0, 4, 0, 25)
CHUNK = 2  # events per step of a backfill

ALIASES = ("a", "b", "c")
KEYS = (*ALIASES, *CUSTOMERS[:3])
# Relative to the hour of the present: archiving a metric takes out what lies ahead.
HOURS = (-30, -29, -2, -1, 0, 1, 3)
MINUTES = (0, 10, 30, 45)
DEFINITIONS = (
    oracle.Metric("", "COUNT", group_keys=(("g",),)),
    oracle.Metric("", "UNIQUE", "q", group_keys=(("h", "g"), ("g",))),
    oracle.Metric("", "LATEST", "q", filters=(oracle.Filter("g", exists=True),), group_keys=(("g",),)),
    oracle.Metric("", "SUM", "q"),
    oracle.Metric("", "AVG", "q", event_types=("call",), group_keys=(("h",), ("g", "h"))),
)
TABLES = ("usage_cells", "released_keys", "customer_keys")

Interval = tuple[datetime, datetime]


# --- Plans


class Send(NamedTuple):
    """Events to send, those of each server in a call of their own, all at once."""

    calls: tuple[tuple["Planned", ...], ...]


class Planned(NamedTuple):
    """An event: its key, type, hour, minute and properties."""

    key: str
    event_type: str
    hour: int
    minute: int
    properties: dict[str, Any]


class Own(NamedTuple):
    """Who owns the aliases from now on."""

    owners: tuple[int | None, ...]


class MakeCustomer(NamedTuple):
    """Create the next customer."""


class MakeMetric(NamedTuple):
    """Create a metric of a definition."""

    definition: int


class Archive(NamedTuple):
    """Archive a metric."""

    metric: int


class Count(NamedTuple):
    """Let the past of metrics be counted: so many steps, or (0) all."""

    chunks: int


class Sync(NamedTuple):
    """Read what changed, with these readers."""

    readers: frozenset[int]


class Held(NamedTuple):
    """Do something that stands still once it has written to a table, and read meanwhile."""

    table: str
    step: Send | Own | Archive
    readers: frozenset[int]


Step = Send | Own | MakeCustomer | MakeMetric | Archive | Count | Sync | Held
READERS = 7

planned = st.builds(
    Planned,
    st.sampled_from(KEYS),
    st.sampled_from(("call", "call", "other")),
    st.sampled_from(HOURS),
    st.sampled_from(MINUTES),
    st.fixed_dictionaries(
        {},
        optional={
            "q": st.sampled_from((1, 2, "0.5", "text")),
            "g": st.sampled_from(("x", "y")),
            "h": st.sampled_from(("x", "z")),
        },
    ),
)
sends = st.builds(Send, st.lists(st.lists(planned, max_size=3).map(tuple), min_size=1, max_size=2).map(tuple))
owns = st.builds(Own, st.tuples(*(st.sampled_from((None, 0, 1, 2)) for _ in ALIASES)))
archives = st.builds(Archive, st.integers(0, 5))
readers = st.frozensets(st.integers(0, READERS - 1), min_size=1, max_size=3)
steps = st.one_of(
    sends,
    sends,
    owns,
    st.just(MakeCustomer()),
    st.builds(MakeMetric, st.integers(0, len(DEFINITIONS) - 1)),
    archives,
    st.builds(Count, st.sampled_from((0, 1, 1, 2))),
    st.builds(Sync, readers),
    st.builds(Sync, readers),
    st.builds(Held, st.sampled_from(TABLES), st.one_of(sends, owns, archives), readers),
)
# Most begin with something to read.
BEGINNING: tuple[Step, ...] = (MakeCustomer(), MakeMetric(1), Own((0, 1, None)))
plans = st.tuples(st.sampled_from(((), BEGINNING, BEGINNING)), st.lists(steps, min_size=3, max_size=14)).map(
    lambda parts: (*parts[0], *parts[1])
)


ALL = Sync(frozenset(range(READERS)))
USED = tuple(Planned("a", "call", hour, 0, {"g": "x", "h": "z", "q": 1}) for hour in (-1, 1, 3))
# A key that is given up, taken back and given up again; and the archiving of a metric with usage ahead.
MOVING = (
    *(MakeCustomer(), MakeMetric(1), Own((0, None, None)), Send((USED,)), ALL, Own((None, None, None)), ALL),
    *(Own((0, None, None)), ALL, Own((None, None, None)), ALL, Own((0, None, None)), ALL),
)
ARCHIVING = (MakeCustomer(), MakeMetric(1), Own((0, None, None)), Send((USED,)), ALL, Archive(0), ALL)


# --- Two servers whose backfills go on step by step


@dataclass
class Gate:
    """Lets chunks of backfills pass: any number, or as many as there are tickets."""

    opened: bool = True
    tickets: int = 0
    passed: int = 0

    async def wait(self) -> None:
        """Wait for leave to count a chunk."""
        await until(lambda: self.opened or self.tickets > 0)
        self.tickets = max(0, self.tickets - 1)


async def until(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float | None = None) -> None:
    """Wait until a condition holds, by asking again and again."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.002)


@dataclass
class World:
    """Two servers on a database in which writers can be made to stand still."""

    clients: Sequence[Client]
    database: Database
    engine: AsyncEngine
    gate: Gate

    async def tenant(self) -> Tenant:
        """Make a new organization."""
        return await new_tenant(self.database, f"org {uuid.uuid4()}", self.clients)

    @asynccontextmanager
    async def holding(self, table: str) -> AsyncIterator[Callable[["asyncio.Task[Any]"], Awaitable[None]]]:
        """Let whoever writes to the table stand still at the end of the statement, until the block ends.

        Yields what waits until a task does so, or is done.
        """
        number = TABLES.index(table)
        waits = sa.text("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = :number")
        async with self.engine.connect() as connection:
            await connection.execute(sa.text("SELECT pg_advisory_lock(:number)"), {"number": number})

            async def stands(task: "asyncio.Task[Any]") -> None:
                async def reached() -> bool:
                    return task.done() or (await connection.execute(waits, {"number": number})).first() is not None

                await until(reached, 20)

            try:
                yield stands
            finally:
                await connection.execute(sa.text("SELECT pg_advisory_unlock(:number)"), {"number": number})


async def _let_writers_be_held(connection: AsyncConnection) -> None:
    for number, table in enumerate(TABLES):
        for statement in (
            f"CREATE FUNCTION hold_{table}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$BEGIN PERFORM pg_advisory_xact_lock_shared({number}); RETURN NULL; END$$",
            f"CREATE TRIGGER hold AFTER INSERT OR UPDATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION hold_{table}()",
        ):
            await connection.execute(sa.text(statement))


@pytest.fixture(scope="module")
async def world(postgres: Any, template: str) -> AsyncIterator[World]:
    """Two servers with nothing between them but the database, and backfills that wait to be told to go on."""
    url = sa.make_url(postgres.url)
    name = f"test_updated_since_{uuid.uuid4().hex}"
    administration = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with administration.connect() as connection:
        await connection.execute(sa.text(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
    database_url = url.set(database=name).render_as_string(hide_password=False)
    gate = Gate()
    original = backfill.Backfill._count_chunk

    async def count_chunk(self: backfill.Backfill, organization: str, metric_id: uuid.UUID) -> None:
        await gate.wait()
        await original(self, organization, metric_id)
        gate.passed += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backfill.Backfill, "_count_chunk", count_chunk)
        chunk = functools.partial(metric_store.backfill_chunk, events_max=CHUNK)
        patch.setattr(metric_store, "backfill_chunk", chunk)
        # Old watermarks give more than they must: they would hide what is missed.
        patch.setattr(usage_rpc, "_WATERMARK_S", 0.0)
        async with AsyncExitStack() as stack:
            engine = create_async_engine(
                url.set(database=name, drivername="postgresql+asyncpg"), isolation_level="AUTOCOMMIT"
            )
            stack.push_async_callback(engine.dispose)
            async with engine.connect() as connection:
                await _let_writers_be_held(connection)
            database = Database(database_url)
            stack.push_async_callback(database.close)
            await new_tenant(database, "first", [])  # from here on every call needs a key
            clients = [await stack.enter_async_context(running_server(database_url)) for _ in range(2)]
            yield World(clients, database, engine, gate)
            gate.opened = True
    async with administration.connect() as connection:
        await connection.execute(sa.text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    await administration.dispose()


# --- Readers


Key = tuple[Any, ...]


@dataclass
class Reader:
    """Someone who keeps a copy of an answer up to date by reading what changed."""

    method: str
    fields: Mapping[str, Any]
    copy: dict[Key, Any] = field(default_factory=dict)
    since: Any = None

    async def sync(self, clients: Sequence[Client], page_size: int) -> None:
        """Read what changed and put it over the copy; then require that the copy is what a full read gives."""
        changed = await self.read(clients, page_size, updated_since=self.since)
        for row in changed.rows:
            if _holds_anything(row):
                self.copy[_key(row)] = row
            else:
                self.copy.pop(_key(row), None)
        self.since = changed.next_updated_since

    async def require_complete(self, clients: Sequence[Client], archived: Iterable[str]) -> None:
        """Require that the copy is what a full read gives."""
        full = await self.read(clients, 0, omit_empty_windows=True)
        kept = self.copy
        if "billable_metrics" not in self.fields and "billable_metric_id" not in self.fields:
            # "All metrics" means those that are not archived; who archives one knows that.
            kept = {key: row for key, row in kept.items() if row.billable_metric_id not in set(archived)}
        expected = {_key(row): row for row in full.rows}
        assert {key: _comparable(row) for key, row in kept.items()} == {
            key: _comparable(row) for key, row in expected.items()
        }, self

    async def read(self, clients: Sequence[Client], page_size: int, **more: Any) -> Rows:
        """Read to the end with further fields in the request."""
        fields = {**self.fields, **{name: value for name, value in more.items() if value is not None}}
        if self.method.startswith("Stream"):
            return await read_stream(clients, self.method, fields)
        return await read_pages(clients, self.method, fields, page_size)


def _key(row: Any) -> Key:
    start = row.starting_on.ToDatetime()
    if isinstance(row, usage_pb2.UsageWindow):
        return row.customer_id, row.billable_metric_id, start
    return start, frozenset(row.group.items())


def _holds_anything(row: Any) -> bool:
    return bool(row.HasField("value") or row.skipped_count > 0)


def _comparable(row: Any) -> bytes:
    copy = type(row)()
    copy.CopyFrom(row)
    copy.ClearField("incomplete")  # that a window ends is no change of it
    serialized: bytes = copy.SerializeToString(deterministic=True)
    return serialized


# --- Running a plan


@dataclass
class Known:
    """A metric that was made, and when; `counted` once its past is."""

    definition: oracle.Metric
    since: datetime
    counted: bool = False
    vague: bool = False  # archived while its past was being counted: when its cells changed is not tracked


class Run:
    """One plan on its way, and what is known of when anything changed."""

    def __init__(self, world: World, tenant: Tenant) -> None:
        self.world, self.tenant = world, tenant
        self.hour = oracle.hour(datetime.now(UTC))
        self.numbers = itertools.count()
        self.turns = itertools.count()
        self.customers: dict[str, set[str]] = {}
        self.metrics: list[Known] = []
        self.stored: list[oracle.Event] = []
        self.readers: dict[int, Reader] = {}
        # By metric, key and hour: when the cell first and last changed. By customer and key: when it came, and left.
        self.first: dict[tuple[str, str, datetime], Interval] = {}
        self.last: dict[tuple[str, str, datetime], Interval] = {}
        self.attached: dict[tuple[str, str], Interval] = {}
        self.released: dict[tuple[str, str], Interval] = {}

    @property
    def clients(self) -> Sequence[Client]:
        """The servers, another one first each time."""
        return self.tenant.clients[:: -1 if next(self.numbers) % 2 else 1]

    @property
    def archived(self) -> list[str]:
        """Ids of the metrics that are archived."""
        return [one.definition.id for one in self.metrics if one.definition.archived_at]

    async def run(self, plan: Sequence[Step]) -> None:
        """Do every step, then read once more with all readers, and look at the times told."""
        self.world.gate.opened, self.world.gate.tickets = False, 0
        try:
            for step in plan:
                await self.do(step)
            await self.sync(range(READERS))
            if not await self._look_what_is_counted():
                await self.do(Count(0))
                await self.sync(range(READERS))
            await self.check_times()
        finally:
            self.world.gate.opened = True

    async def do(self, step: Step) -> None:
        """Do one step."""
        match step:
            case Send(calls):
                await self.send(calls)
            case Own(owners):
                await self.set_owners(owners)
            case MakeCustomer():
                await self.make_customer()
            case MakeMetric(number):
                await self.make_metric(number)
            case Archive(number):
                await self.archive(number)
            case Count(chunks):
                await self.count(chunks)
            case Sync(readers):
                await self.sync(readers)
            case Held(table, inner, readers):
                await self.hold(table, self.do(inner), readers)

    async def hold(self, table: str, action: Coroutine[Any, Any, None], readers: Iterable[int]) -> None:
        """Read while an action stands still in the middle of a transaction, and again after it."""
        async with self.world.holding(table) as stands:
            task = asyncio.create_task(action)
            try:
                await stands(task)
                await self.sync(readers)
            except BaseException:
                task.cancel()
                raise
        await task
        await self.sync(readers)

    async def send(self, calls: Sequence[Sequence[Planned]]) -> None:
        """Send events, from all servers at once."""
        before = datetime.now(UTC)
        made = [[self._event(one) for one in call] for call in calls]
        await asyncio.gather(
            *(client.ingest(*map(wire, call)) for client, call in zip(self.tenant.clients, made, strict=False) if call)
        )
        interval = before, datetime.now(UTC)
        for one in itertools.chain(*made):
            self.stored.append(one)
            for known in self.metrics:
                if oracle.matches(known.definition, one):
                    self._cell_changed(known.definition.id, one, interval)

    async def set_owners(self, owners: Sequence[int | None]) -> None:
        """Give every alias to its owner: all that move are given up first."""
        ids = list(self.customers)
        wanted: dict[str, set[str]] = {one: set() for one in ids}
        for alias, owner in zip(ALIASES, owners, strict=True):
            if owner is not None and owner < len(ids):
                wanted[ids[owner]].add(alias)
        for one in ids:
            await self.set_aliases(one, wanted[one] & self.customers[one])
        for one in ids:
            await self.set_aliases(one, wanted[one])

    async def set_aliases(self, customer_id: str, aliases: set[str]) -> None:
        """Set the aliases of a customer if they change."""
        old = self.customers[customer_id]
        if aliases == old:
            return
        before = datetime.now(UTC)
        request = customer_pb2.SetIngestAliasesRequest(id=customer_id, ingest_aliases=aliases)
        await self.clients[0].customers.SetIngestAliases(request)
        interval = before, datetime.now(UTC)
        self.attached |= {(customer_id, key): interval for key in aliases - old}
        self.released |= {(customer_id, key): interval for key in old - aliases}
        self.customers[customer_id] = set(aliases)

    async def make_customer(self) -> None:
        """Create the next customer, if there is one."""
        if len(self.customers) == 3:
            return
        customer_id = CUSTOMERS[len(self.customers)]
        before = datetime.now(UTC)
        await self.clients[0].create_customer(id=customer_id)
        self.attached[customer_id, customer_id] = before, datetime.now(UTC)
        self.customers[customer_id] = set()

    async def make_metric(self, number: int) -> None:
        """Create a metric, whose past is counted when it may be."""
        if len(self.metrics) == 6:
            return
        # Ids do not ascend in the order of creation.
        metric_id = str(uuid.UUID(int=1000 - 7 ** len(self.metrics) % 1000))
        definition = replace(DEFINITIONS[number], id=metric_id)
        before = datetime.now(UTC)
        await create(self.clients[0], definition)
        self.metrics.append(Known(definition, before))
        await self._look_what_is_counted()

    async def archive(self, number: int) -> None:
        """Archive a metric, if there are so many."""
        if number >= len(self.metrics) or self.metrics[number].definition.archived_at:
            return
        known = self.metrics[number]
        before = datetime.now(UTC)
        known.definition = await archive(self.clients[0], known.definition)
        interval = before, datetime.now(UTC)
        known.vague = not known.counted
        assert known.definition.archived_at is not None
        for cell in self.last:
            if cell[0] == known.definition.id and cell[2] >= oracle.hour(known.definition.archived_at):
                self.last[cell] = interval

    async def count(self, chunks: int) -> None:
        """Let some of the past be counted, or all of it."""
        gate = self.world.gate
        if not any(not known.counted for known in self.metrics):
            return
        if not chunks:
            gate.opened = True
            await until(self._look_what_is_counted, 20)
            gate.opened = False
            return
        wanted = gate.passed + chunks
        gate.tickets += chunks

        async def done() -> bool:
            return gate.passed >= wanted or await self._look_what_is_counted()

        await until(done, 20)
        gate.tickets = 0

    async def sync(self, readers: Iterable[int]) -> None:
        """Read what changed and compare with what there is."""
        for number in sorted(readers):
            if number not in self.readers and (made := self._reader(number)):
                self.readers[number] = made
            if number in self.readers:
                await self.readers[number].sync(self.clients, PAGE_SIZES[next(self.numbers) % 4])
                await self.readers[number].require_complete(self.clients, self.archived)

    # What the times say

    async def check_times(self) -> None:
        """Every update_time lies where something changed, and `updated_since` gives exactly what it should."""
        counted = [known for known in self.metrics if known.counted]
        if not counted or not self.customers:
            return
        for size, zone, span in (
            ("HOUR", "", (self.hour + HOURS[0] * oracle.HOUR, self.hour + 4 * oracle.HOUR)),
            ("DAY", "Asia/Kolkata", self._days()),
            ("NONE", "", (self.hour - 150 * MINUTE, self.hour + 15 * MINUTE)),
        ):
            fields: dict[str, Any] = {
                "window_size": f"WINDOW_SIZE_{size}",
                "time_zone": zone,
                "starting_on": timestamp(span[0]),
                "ending_before": timestamp(span[1]),
            }
            named = {
                "customer_ids": list(self.customers),
                "billable_metrics": [{"id": one.definition.id} for one in counted],
            }
            full = await Reader("ListUsage", {**fields, **named}).read(self.clients, 0)
            for row in full.rows:
                self.check_time(row)
            times = sorted({row.update_time.ToDatetime() for row in full.rows if row.HasField("update_time")})
            for since in _some_of(times):
                await self._check_since({**fields, **named}, full.rows, since)
            live = [row for row in full.rows if row.billable_metric_id not in self.archived]
            for since in sorted({row.update_time.ToDatetime() for row in live if row.HasField("update_time")})[-1:]:
                await self._check_since(fields, live, since)  # of all customers and metrics
            known = counted[0].definition
            for group_key in ((), *known.group_keys):
                grouped = {
                    **fields,
                    "customer_id": next(iter(self.customers)),
                    "billable_metric_id": known.id,
                    "group_key": group_key,
                }
                full = await Reader("ListUsageWithGroups", grouped).read(self.clients, 0)
                for since in _some_of(times)[:2]:
                    await self._check_grouped_since(grouped, full.rows, since)

    def check_time(self, row: usage_pb2.UsageWindow) -> None:
        """The window's update_time is that of the last change behind it, and unset if there never was any."""
        known = next(one for one in self.metrics if one.definition.id == row.billable_metric_id)
        if known.vague:
            return
        start, end = (one.ToDatetime(tzinfo=UTC) for one in (row.starting_on, row.ending_before))
        certain: list[Interval] = []
        possible: list[Interval] = []
        customer_id = row.customer_id
        for cell, changed in self.last.items():
            metric_id, key, hour = cell
            if metric_id != row.billable_metric_id or hour >= end or hour + oracle.HOUR <= start:
                continue
            if key in {customer_id, *self.customers[customer_id]}:
                attached = self.attached[customer_id, key]
                certain.append((max(changed[0], attached[0]), max(changed[1], attached[1])))
            released = self.released.get((customer_id, key))
            # What came under the key only after it had left the customer was never the customer's; its time may show.
            if released:
                (certain if self.first[cell][0] <= released[1] else possible).append(released)
                # A metric made later has all its windows from the end of its backfill on.
                possible.append((max(changed[0], released[0]), max(changed[1], released[1])))
        if not row.HasField("update_time"):
            assert not certain, row
            return
        found = row.update_time.ToDatetime(tzinfo=UTC)
        assert all(one[0] <= found for one in certain), (row, certain)
        assert any(one[0] <= found <= one[1] for one in (*certain, *possible)), (row, certain, possible)

    async def _check_since(self, fields: dict[str, Any], rows: Sequence[Any], since: datetime) -> None:
        wanted = [row for row in rows if row.HasField("update_time") and row.update_time.ToDatetime() >= since]
        method, omitted = self._one_of("ListUsage", "StreamUsage")
        expected = [row for row in wanted if _holds_anything(row) or not omitted]
        reader = Reader(method, {**fields, "omit_empty_windows": omitted})
        found = await reader.read(self.clients, next(self.numbers) % 4, updated_since=timestamp(since))
        # Of all metrics, those archived since tell their last changes too.
        named = fields.get("billable_metrics")
        told = [row for row in found.rows if named or row.billable_metric_id not in self.archived]
        assert list(map(_comparable, told)) == list(map(_comparable, expected)), (method, since)

    async def _check_grouped_since(self, fields: dict[str, Any], rows: Sequence[Any], since: datetime) -> None:
        expected = [row for row in rows if _holds_anything(row) and row.update_time.ToDatetime() >= since]
        method, omitted = self._one_of("ListUsageWithGroups", "StreamUsageWithGroups")
        reader = Reader(method, {**fields, "omit_empty_windows": omitted})
        found = await reader.read(self.clients, next(self.numbers) % 3, updated_since=timestamp(since))
        filled = [row for row in found.rows if _holds_anything(row)]
        assert list(map(_comparable, filled)) == list(map(_comparable, expected)), (method, since)
        assert not omitted or filled == found.rows
        assert all(row.update_time.ToDatetime() >= since for row in found.rows)
        assert len({_key(row) for row in found.rows}) == len(found.rows)

    def _one_of(self, *methods: str) -> tuple[str, bool]:
        """Return one of the methods, and whether to leave empty rows out; all in turn."""
        turn = next(self.turns)
        return methods[turn % 2], turn % 4 > 1

    # What the plan means

    def _event(self, one: Planned) -> oracle.Event:
        at = self.hour + one.hour * oracle.HOUR + one.minute * MINUTE
        return oracle.Event(f"t{next(self.numbers)}", one.key, one.event_type, at, one.properties)

    def _cell_changed(self, metric_id: str, one: oracle.Event, interval: Interval) -> None:
        cell = metric_id, one.customer_key, oracle.hour(one.timestamp)
        self.first.setdefault(cell, interval)
        self.last[cell] = interval

    async def _look_what_is_counted(self) -> bool:
        """Note which metrics' past is counted by now; says whether that of all is."""
        for known in self.metrics:
            if known.counted or (await fetch(self.clients[0], known.definition.id)).HasField("backfill_progress"):
                continue
            known.counted = True
            # Each of its cells changed at some time since it was made, by a writer or by the backfill.
            for one in self.stored:
                if oracle.matches(known.definition, one):
                    self._cell_changed(known.definition.id, one, (known.since, datetime.now(UTC)))
        return all(known.counted for known in self.metrics)

    def _days(self) -> oracle.Span:
        first = self.hour.astimezone(oracle.zone_info("Asia/Kolkata")).date() - timedelta(days=2)
        spans = oracle.days("Asia/Kolkata", first, 5)
        return spans[0][0], spans[-1][1]

    def _reader(self, number: int) -> Reader | None:
        """Make a reader for ever the same question; None if what it names is not there yet."""
        days = {
            "window_size": "WINDOW_SIZE_DAY",
            "time_zone": "Asia/Kolkata",
            "starting_on": timestamp(self._days()[0]),
            "ending_before": timestamp(self._days()[1]),
        }
        hours = {
            "window_size": "WINDOW_SIZE_HOUR",
            "starting_on": timestamp(self.hour - 40 * oracle.HOUR),
            "ending_before": timestamp(self.hour + 5 * oracle.HOUR),
        }
        cut = {
            "window_size": "WINDOW_SIZE_NONE",
            "starting_on": timestamp(self.hour - 29 * oracle.HOUR + 20 * MINUTE),
            "ending_before": timestamp(self.hour + 3 * oracle.HOUR + 20 * MINUTE),
        }
        known = next((one.definition for one in self.metrics if one.counted and one.definition.group_keys), None)
        customer_id = next(iter(self.customers), None)
        match number:
            case 0:
                return Reader("ListUsage", hours)
            case 1:
                return Reader("StreamUsage", days)
            case 2 if customer_id:
                return Reader("ListUsage", {**cut, "customer_ids": list(self.customers)})
        if known is None or customer_id is None:
            return None
        one = {"customer_id": customer_id, "billable_metric_id": known.id}
        simple = next((key for key in known.group_keys if len(key) == 1), ())
        match number:
            case 3:
                group_by = {"key": simple[0]} if simple else None
                metrics = [{"id": known.id, "group_by": group_by}]
                return Reader("ListUsage", {**cut, "billable_metrics": metrics, "customer_ids": list(self.customers)})
            case 4:
                return Reader("ListUsageWithGroups", {**hours, **one, "group_key": known.group_keys[0]})
            case 5:
                return Reader("StreamUsageWithGroups", {**days, **one, "group_key": known.group_keys[0][::-1]})
            case 6:
                filters = {simple[0]: {"values": ["x", "nowhere"]}} if simple else {}
                return Reader("ListUsageWithGroups", {**cut, **one, "group_key": simple, "group_filters": filters})
        return None


def _some_of(times: Sequence[datetime]) -> list[datetime]:
    """The first, the last and some in between, and just after one of them."""
    chosen = [*times[:1], *times[1:-1][:: max(1, len(times) // 2)], *times[-1:]]
    return [*chosen, *(one + oracle.MICROSECOND for one in chosen[-1:])]


# --- The tests


@given(plan=plans)
@example(plan=MOVING)
@example(plan=ARCHIVING)
# Not shrunk: that takes many minutes, and the plan is printed anyway.
@settings(max_examples=EXAMPLES, phases=(Phase.explicit, Phase.reuse, Phase.generate))
async def test_reading_what_changed_gives_what_there_is(world: World, plan: Sequence[Step]) -> None:
    """A copy kept by `updated_since` equals a full read after each of its reads, whatever happens in between; and the
    times told are those of the changes.
    """
    await Run(world, await world.tenant()).run(plan)


@pytest.mark.long
@pytest.mark.usefixtures("only_by_hand")
@given(plan=plans)
@settings(max_examples=EXAMPLES * LONG_FACTOR)
async def test_reading_what_changed_gives_what_there_is_at_length(world: World, plan: Sequence[Step]) -> None:
    """The same over ten times as many plans."""
    await Run(world, await world.tenant()).run(plan)


async def test_a_counted_past_is_a_change(world: World) -> None:
    """Who reads all metrics while one still counts its past is given all of its usage once it is counted."""
    run = Run(world, await world.tenant())
    past = tuple(Planned("a", "call", hour, 0, {"g": "x"}) for hour in (-30, -29, -2, -1))
    early = Planned("a", "call", -31, 0, {"g": "x"})  # before all there was: counted at once
    readers = Sync(frozenset({0, 1}))
    await run.run(
        (
            MakeCustomer(),
            Own((0, None, None)),
            Send((past,)),
            MakeMetric(0),
            Send(((early,),)),
            readers,
            Count(1),
            readers,
            Count(1),
            readers,
            Count(0),
            readers,
        )
    )


async def test_readers_beside_writers(servers: Servers) -> None:
    """Copies that are read beside writers in two processes, page by page and as streams, are complete in the end."""
    tenant = await servers.tenant()
    numbers = random.Random(7)
    clients = tenant.clients
    for customer_id in CUSTOMERS[:3]:
        await clients[0].create_customer(id=customer_id)
    definitions = [replace(one, id=str(uuid.UUID(int=i + 1))) for i, one in enumerate(DEFINITIONS)]
    for definition in definitions[:3]:
        await create(clients[0], definition)
    hour = oracle.hour(datetime.now(UTC))
    bounds = {"starting_on": timestamp(hour - 30 * oracle.HOUR), "ending_before": timestamp(hour + 15 * MINUTE)}
    whole = {"window_size": "WINDOW_SIZE_NONE", **bounds}
    grouped = {**whole, "customer_id": CUSTOMERS[0], "billable_metric_id": definitions[1].id, "group_key": ["g", "h"]}
    readers = [
        Reader("ListUsage", whole),
        Reader("StreamUsage", whole),
        Reader("ListUsageWithGroups", grouped),
        Reader("StreamUsageWithGroups", grouped),
    ]
    writing = True

    async def write(client: Client, name: str) -> None:
        for i in range(60):
            sent = [
                oracle.Event(
                    f"{name} {i} {j}",
                    numbers.choice(KEYS),
                    "call",
                    hour - numbers.randrange(31) * oracle.HOUR + numbers.choice(MINUTES[:2]) * MINUTE,
                    {"g": numbers.choice("xy"), "h": numbers.choice("xz"), "q": numbers.randrange(3)},
                )
                for j in range(numbers.choice((1, 3, 40)))
            ]
            await client.ingest(*map(wire, sent))

    async def move() -> None:
        while writing:
            owner = numbers.randrange(3)
            for i in sorted(range(3), key=lambda one: one == owner):
                request = customer_pb2.SetIngestAliasesRequest(
                    id=CUSTOMERS[i], ingest_aliases=ALIASES[:2] * (i == owner)
                )
                await numbers.choice(clients).customers.SetIngestAliases(request)
            await asyncio.sleep(numbers.random() / 20)

    async def make() -> None:
        for definition in definitions[3:]:
            await asyncio.sleep(0.3)
            await create(numbers.choice(clients), definition)

    async def read(reader: Reader) -> None:
        while writing:
            await reader.sync(clients[:: numbers.choice((1, -1))], numbers.randrange(4))

    others = [asyncio.create_task(one) for one in (move(), *map(read, readers))]
    await asyncio.gather(make(), *(write(client, str(i)) for i, client in enumerate((*clients, *clients))))
    writing = False
    await asyncio.gather(*others)
    for definition in definitions:
        await clients[0].counted(await fetch(clients[0], definition.id))
    for reader in readers:
        await reader.sync(clients, 3)
        await reader.require_complete(clients, ())


async def test_what_was_archived_tells_its_last_changes(client: Client) -> None:
    """What changed before a metric or customer was archived is among the changes of all, though neither is in all."""
    kept, archived = await client.create_metric(), await client.create_metric()
    ours, left = await client.create_customer(ingest_aliases=["a"]), await client.create_customer(ingest_aliases=["b"])
    start = datetime(2026, 1, 1, tzinfo=UTC)
    whole: dict[str, Any] = {
        "window_size": "WINDOW_SIZE_NONE",
        "starting_on": timestamp(start),
        "ending_before": timestamp(start + oracle.HOUR),
    }
    since = (await client.usage.ListUsage(usage_pb2.ListUsageRequest(**whole))).next_updated_since
    await client.ingest(*(event(customer_id=alias, at=start) for alias in "ab"))
    await client.metrics.ArchiveBillableMetric(billable_metric_pb2.ArchiveBillableMetricRequest(id=archived.id))
    await client.customers.ArchiveCustomer(customer_pb2.ArchiveCustomerRequest(id=left.id))
    changed = await client.all_usage(**whole, updated_since=since)
    pairs = {(window.customer_id, window.billable_metric_id) for window in changed}
    assert pairs == {(customer.id, metric.id) for customer in (ours, left) for metric in (kept, archived)}
    assert {window.value for window in changed} == {"1"}
    assert {(one.customer_id, one.billable_metric_id) for one in await client.all_usage(**whole)} == {
        (ours.id, kept.id)
    }
