"""The promise that numbers are exact: whatever is sent, however, wherever and in which order, usage is what plain
Python (`oracle`) makes of the raw events.

The plans run against two server processes on one database, each in an organization of its own, all organizations with
the same ids: so nothing may depend on who asks which server, and nothing may leak.
"""

import asyncio
import functools
import itertools
import random
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

import grpc
import oracle
import pytest
import sqlalchemy as sa
from conftest import Client, Process, event, running_server, start_server, timestamp
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from metering.v1 import billable_metric_pb2, customer_pb2, event_pb2, usage_pb2
from service import auth
from service.database import Database
from service.domain import windows as service_windows
from service.rpc import streams as streams_rpc
from service.rpc import usage as usage_rpc
from service.store import cells, organizations
from service.store import metrics as metric_store
from service.store.tables import billable_metrics

EXAMPLES = 40
LONG_FACTOR = 10
STAGES = 4  # events are sent in the first three; in the last, what comes too late for all of them

AGGREGATIONS = ("COUNT", "SUM", "MIN", "MAX", "AVG", "LATEST", "UNIQUE")
ZONES = (
    "UTC",
    "Asia/Kolkata",
    "America/New_York",
    "Africa/Cairo",
    "Pacific/Apia",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
)
PAGE_BYTES_MAX = 1.3 * 1024 * 1024  # "about 1 MiB"
NARROW_MESSAGE_BYTES = 700
NARROW_READ_BYTES = 8_000
MESSAGES_RESUMED = 1  # of a stream of a plan, beside the last one
STREAMED_MAX = 80  # rows
CUT_ONLY = timedelta(minutes=75)
EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
MINUTE = timedelta(minutes=1)

CUSTOMERS = (
    "00000000-0000-0000-0000-000000000000",
    "04ca7e72-4229-4a6e-ab11-9f7376fccbcb",
    "9b85c1c1-e238-4f2a-a409-61905905beb0",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
)
STRANGER = "c0ffee00-0000-4000-8000-00000000000a"  # never a customer; may be an alias
ALIASES = ("acme", "Acme", "Zürich, GmbH / 株式会社", STRANGER)
UNKNOWN_KEY = "nobody"
EVENT_TYPES = ("call", "Call", "größe")
PROPERTIES = ("q", "g", "h %s:x'\"")
ID_PREFIXES = ("", "Z", "a", "é", "\ufb01", "\U0001f600", "10", "9")

PLAIN_VALUES = (1, 0, 60, "60", 2.5, 3.5, "0.5", -7, "1.5", 0.1, 0.2, "-3.25")
NASTY_VALUES = (
    -0.0,
    1e-7,
    1e-18,
    1e-19,
    5e-324,
    0.30000000000000004,
    123456789012.34567,
    2**53 - 1,
    -(2**53 - 1),
    "60.0",
    "060",
    "0.000000000000000001",
    "0.0000000000000000001",
    "-0",
    "-0.00",
    "01.10",
    "9" * 38,
    "-" + "9" * 38,
    "9" * 39,
    "9" * 38 + ".5",
    "9" * 20 + "." + "9" * 18,
    "-" + "9" * 20 + "." + "9" * 18,
    "1." + "3" * 18,
    "1e5",
    "1E5",
    "+1",
    " 1",
    "1 ",
    "1\n",
    "",
    "-",
    ".5",
    "5.",
    "1,5",
    "0x10",
    "1_000",
    "\u0661",  # digits, but not of ASCII
    "\uff11",
    "NaN",
    "Infinity",
    "text",
    "null",
    "true",
    True,
    False,
    None,
    [],
    {},
    [1, 2.50],
    ["1", None, {"b": 1, "aa": [True]}],
    {"aa": "x\n\u007f\u0001é", "b": -0.0},
)
REFUSED_VALUES = (2.0**53, -1e300, float("nan"), float("inf"), [1, {"x": 1e16}])
FILTER_VALUES = ("60", "1", "0", "0.1", "", "true", "null", "2.5", "nowhere", "[1, 2.5]", "text", "60.0")
GROUP_VALUES = (*FILTER_VALUES[:8], "-7", "000")
DELTAS = tuple(
    sign * delta
    for sign in (1, -1)
    for delta in (
        timedelta(0),
        oracle.MICROSECOND,
        30 * MINUTE,
        15 * MINUTE,
        oracle.HOUR - oracle.MICROSECOND,
        oracle.HOUR,
        timedelta(seconds=123.456789),
        timedelta(hours=5, minutes=45),
    )
)
FIXED = (
    EARLIEST,
    datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    datetime(2000, 1, 1, 0, 30, tzinfo=UTC),
)


# --- Plans: what hypothesis draws


class Scene(NamedTuple):
    """A zone and some of its days around which events and bounds lie. `first` None = yesterday."""

    zone: str
    first: date | None
    days: int


class Time(NamedTuple):
    """An instant near something: an edge of the scene, now, an archive time, or a fixed instant."""

    base: str
    index: int
    delta: timedelta


class PlannedEvent(NamedTuple):
    """An event and when it is sent: in which stage, in which of the stage's concurrent calls."""

    key: str
    event_type: str
    at: Time
    properties: dict[str, Any]
    prefix: str
    stage: int
    call: int


class Again(NamedTuple):
    """Another event under the id of the first: with its content, or with that of the other. `nanos` change nothing."""

    of: int
    other: int | None
    stage: int
    call: int
    nanos: int


class PlannedMetric(NamedTuple):
    """A definition, the stages at which a metric of it is made, and the stage that archives the first of these."""

    definition: oracle.Metric
    stages: tuple[int, ...]
    archive: int | None


class Query(NamedTuple):
    """A usage query; `metrics` are numbers of metrics, `pages` says how many there should be (0 = page_size unset)."""

    size: str
    zone: str
    first: Time
    last: Time
    number: int
    customers: tuple[int, ...] | None
    metrics: tuple[tuple[int, oracle.GroupBy | None], ...] | None
    omit_empty: bool
    pages: int


class GroupedQuery(NamedTuple):
    """A grouped query: windows and paging of `query`, one customer and one metric by number.

    `key` is the number of the group key, 0 = none; `order` is how to sort its properties; `filters` are by property.
    """

    query: Query
    customer: int
    metric: int
    key: int
    order: tuple[int, ...]
    filters: dict[str, tuple[str, ...]]


class SearchQuery(NamedTuple):
    """A search: by a number of ids, or by a key (in any case), a type and bounds; None = not by it."""

    ids: int | None
    key: str | None
    event_type: str | None
    first: Time | None
    last: Time | None
    page_size: int


class Plan(NamedTuple):
    """One example. `owners[stage]` is who owns the aliases from that stage on; customers appear at their stage."""

    scene: Scene
    customers: tuple[int, ...]
    archived_customer: int | None
    owners: tuple[tuple[int | None, ...], ...]
    metrics: tuple[PlannedMetric, ...]
    events: tuple[PlannedEvent, ...]
    again: tuple[Again, ...]
    atomic: frozenset[tuple[int, int]]
    queries: tuple[Query, ...]
    grouped: tuple[GroupedQuery, ...]
    searches: tuple[SearchQuery, ...]


SCENES = (
    Scene("Asia/Kolkata", date(2024, 3, 1), 2),
    Scene("America/New_York", date(2024, 3, 9), 3),
    Scene("America/New_York", date(2024, 11, 2), 3),
    Scene("Africa/Cairo", date(2024, 4, 25), 3),  # the 26th has no midnight
    Scene("Africa/Cairo", date(2024, 10, 30), 3),  # the 31st has its last hour twice
    Scene("Pacific/Apia", date(2011, 12, 28), 4),  # there was no 30th
    Scene("Australia/Lord_Howe", date(2024, 4, 6), 3),  # clocks change by half an hour
    Scene("Australia/Lord_Howe", date(2024, 10, 5), 3),
    Scene("Asia/Kathmandu", date(2024, 6, 1), 2),
    Scene("UTC", date(2024, 2, 28), 3),
    Scene("UTC", None, 3),
    Scene("Asia/Kolkata", None, 3),
)

doubles = st.floats(-1e9, 1e9).filter(oracle.storable)
decimals = st.builds(
    lambda whole, places, digits: f"{whole}.{digits:0{places}d}"[: 39 - (whole >= 0)] if places else str(whole),
    st.integers(-(10**20) + 1, 10**20 - 1),
    st.integers(0, 18),
    st.integers(0, 9),
)
values = st.one_of(
    st.sampled_from(PLAIN_VALUES),
    st.sampled_from(PLAIN_VALUES),
    st.sampled_from(NASTY_VALUES),
    doubles,
    decimals,
)
optional_bool = st.sampled_from((None, True, False))
some_stages = st.sets(st.integers(0, STAGES - 1), min_size=1, max_size=2).map(lambda found: tuple(sorted(found)))
times = st.builds(
    Time,
    st.sampled_from(("scene",) * 7 + ("now", "archive", "fixed")),
    st.integers(0, 11),
    st.sampled_from(DELTAS),
)
AROUND_ARCHIVE = (Time("archive", 0, timedelta(0)), Time("archive", 0, -oracle.MICROSECOND))
KEYS = (*ALIASES, *CUSTOMERS, UNKNOWN_KEY)


@st.composite
def definitions(draw: st.DrawFn) -> oracle.Metric:
    """Draw how a metric counts."""
    aggregation = draw(st.sampled_from(AGGREGATIONS))
    names = draw(st.one_of(st.just(()), st.lists(st.sampled_from(PROPERTIES), unique=True, max_size=2)))
    filters = []
    for name in names:
        exists = draw(optional_bool)
        in_values = () if exists is False else draw(st.one_of(st.just(()), _some(FILTER_VALUES, 4)))
        filters.append(oracle.Filter(name, exists, in_values, draw(st.one_of(st.just(()), _some(FILTER_VALUES, 3)))))
    keys = (("g",), (PROPERTIES[2],), ("g", PROPERTIES[2]), ("q",), (PROPERTIES[2], "q", "g"))
    return oracle.Metric(
        id="",
        aggregation=aggregation,
        aggregation_key="" if aggregation == "COUNT" else draw(st.sampled_from(("q", "q", "g"))),
        event_types=draw(st.one_of(st.just(()), _some(EVENT_TYPES, 2))),
        excluded_event_types=draw(st.one_of(st.just(()), st.just(()), _some(EVENT_TYPES, 2))),
        filters=tuple(filters),
        group_keys=draw(_some(keys, 3)),
    )


@st.composite
def events(draw: st.DrawFn, moments: Sequence[Time]) -> PlannedEvent:
    """Draw an event at one of a few moments, so that many meet in one cell and some at one instant."""
    return PlannedEvent(
        key=draw(st.sampled_from(KEYS).flatmap(lambda key: st.sampled_from((key, key.upper() if "-" in key else key)))),
        event_type=draw(st.sampled_from(EVENT_TYPES)),
        at=draw(st.sampled_from(moments)),
        properties=draw(st.fixed_dictionaries({}, optional=dict.fromkeys(PROPERTIES, values))),
        prefix=draw(st.sampled_from(ID_PREFIXES)),
        stage=draw(st.integers(0, STAGES - 2)),
        call=draw(st.integers(0, 3)),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Draw a plan."""
    planned = tuple(
        PlannedMetric(
            draw(definitions()), draw(some_stages), draw(st.sampled_from((None, None, *range(1, STAGES - 1))))
        )
        for _ in range(draw(st.integers(1, 5)))
    )
    number = sum(len(one.stages) for one in planned)
    customers = tuple(draw(st.sampled_from((0, 0, 0, 2, 3))) for _ in range(draw(st.integers(1, len(CUSTOMERS)))))
    owner = st.sampled_from((None, *range(len(customers)), *range(len(customers))))
    moments = [*draw(st.lists(times, min_size=1, max_size=8)), *AROUND_ARCHIVE]
    sent = draw(_list(events(moments if any(one.archive for one in planned) else moments[:-2]), 60))
    if sent and draw(st.booleans()):
        # An event that is refused does not take its id: the next one may.
        bad = {"q": draw(st.sampled_from(REFUSED_VALUES))}
        sent.append(sent[0]._replace(properties=bad, prefix="refused", stage=draw(st.integers(0, 2))))
    position = st.integers(0, max(len(sent) - 1, 0))
    resend = st.builds(
        Again, position, st.one_of(st.none(), position), st.integers(0, 2), st.integers(0, 3), st.sampled_from((0, 999))
    )
    return Plan(
        scene=draw(st.sampled_from(SCENES)),
        customers=customers,
        archived_customer=draw(st.sampled_from((None, None, 0))),
        owners=tuple(tuple(draw(owner) for _ in ALIASES) for _ in range(STAGES)),
        metrics=planned,
        events=tuple(sent),
        again=tuple(draw(_list(resend, 20))) if sent else (),
        atomic=frozenset(draw(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=2))),
        queries=tuple(draw(queries(planned, number, len(customers), moments)) for _ in range(8)),
        grouped=tuple(draw(grouped_queries(planned, number, len(customers), moments)) for _ in range(6)),
        searches=tuple(draw(st.lists(searches(moments), max_size=4))),
    )


@st.composite
def queries(
    draw: st.DrawFn, planned: Sequence[PlannedMetric], metrics: int, customers: int, moments: Sequence[Time]
) -> Query:
    """Draw a query over that many customers and metrics, with bounds at moments of events or anywhere."""
    bound = st.one_of(st.sampled_from(moments), st.sampled_from(moments), times)
    definitions = [one.definition for one in planned for _ in one.stages]
    selected = []
    for i in draw(_some(range(metrics), 4)):
        simple = [key[0] for key in definitions[i].group_keys if len(key) == 1]
        group_by = None
        if simple and draw(st.booleans()):
            named = draw(st.one_of(st.just(()), _some(GROUP_VALUES, 4)))
            group_by = oracle.GroupBy(draw(st.sampled_from(simple)), named)
        selected.append((i, group_by))
    size = draw(st.sampled_from(("NONE", "NONE", "DAY", "DAY", "HOUR")))
    number = draw(st.integers(1, 5)) if size == "DAY" else draw(st.sampled_from((1, 3, 24, 70, 30_000)))
    return Query(
        size=size,
        zone=draw(st.sampled_from(("scene", "scene", *ZONES))),
        first=draw(bound),
        last=draw(bound),
        number=number,
        customers=draw(st.one_of(st.none(), _some(range(customers), customers))),
        metrics=None if draw(st.sampled_from((False, False, True))) else tuple(selected),
        # So many windows are only asked for where the empty ones are left out.
        omit_empty=number > 100 or draw(st.booleans()),
        pages=draw(st.integers(0, 6)),
    )


@st.composite
def grouped_queries(
    draw: st.DrawFn, planned: Sequence[PlannedMetric], metrics: int, customers: int, moments: Sequence[Time]
) -> GroupedQuery:
    """Draw a grouped query, with filters by some of its properties."""
    metric = draw(st.integers(0, metrics - 1))
    keys = [one.definition.group_keys for one in planned for _ in one.stages][metric]
    key = draw(st.integers(0, len(keys)))
    properties = keys[key - 1] if key else ()
    filtered = draw(st.sets(st.sampled_from(properties))) if properties else set()
    values = st.one_of(_some(GROUP_VALUES, 4), _some(GROUP_VALUES, 4), st.just(()))
    return GroupedQuery(
        query=draw(queries(planned, metrics, customers, moments)),
        customer=draw(st.integers(0, customers - 1)),
        metric=metric,
        key=key,
        order=draw(st.permutations(range(len(properties))).map(tuple)),
        filters={name: draw(values) for name in sorted(filtered)},
    )


def searches(moments: Sequence[Time]) -> st.SearchStrategy[SearchQuery]:
    """Draw a search."""
    bound = st.one_of(st.none(), st.sampled_from(moments))
    key = st.sampled_from((*KEYS, *CUSTOMERS)).flatmap(
        lambda key: st.sampled_from((key, key.upper() if "-" in key else key))
    )
    return st.builds(
        SearchQuery,
        st.one_of(st.none(), st.none(), st.integers(0, 9)),
        st.one_of(st.none(), key),
        st.one_of(st.none(), st.sampled_from(EVENT_TYPES)),
        bound,
        bound,
        st.sampled_from((0, 1, 2, 7)),
    )


def _some(items: Sequence[Any], most: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(items), unique=True, min_size=1, max_size=most).map(tuple)


def _list(items: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[list[Any]]:
    return st.integers(0, most).flatmap(lambda number: st.lists(items, min_size=number, max_size=number))


# --- Two servers, and one organization per example


class _Authorized:
    """A channel that sends an API key with every call."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {key}"),)

    def __getattr__(self, kind: str) -> Any:
        def method(*arguments: Any, **options: Any) -> Callable[..., Any]:
            call = getattr(self._channel, kind)(*arguments, **options)
            return lambda request, **more: call(request, metadata=self._metadata, **more)

        return method


class Tenant(NamedTuple):
    """One organization, as seen through each server, and the database under them.

    `narrow` is a client of one more server, whose streams have small messages.
    """

    organization: str
    clients: tuple[Client, ...]
    database: Database
    narrow: Client | None = None


async def new_tenant(
    database: Database, organization: str, servers: Sequence[Client], narrow: Client | None = None
) -> Tenant:
    """Make an organization, and clients of these servers that have a key of it."""
    key = auth.new_api_key()

    async def create(connection: Any) -> None:
        await organizations.create_organization(connection, organization)
        await organizations.create_api_key(connection, organization, key.id, "test", key.secret_hash)

    def with_key(client: Client) -> Client:
        return Client(client.address, _Authorized(client.channel, key.text))  # type: ignore[arg-type]

    await database.background(create)
    return Tenant(organization, tuple(map(with_key, servers)), database, narrow and with_key(narrow))


@dataclass
class Servers:
    """Two servers on one database, and a third one in this process whose streams have small messages."""

    processes: Sequence[Process]
    clients: Sequence[Client]
    database: Database
    narrow: Client | None = None
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def tenant(self) -> Tenant:
        """Make a new organization."""
        return await new_tenant(self.database, f"org {next(self.numbers)}", self.clients, self.narrow)


@pytest.fixture(scope="module")
async def servers(postgres: Any, template: str) -> AsyncIterator[Servers]:
    """Two servers, each in a process of its own, that want API keys."""
    url = sa.make_url(postgres.url)
    name = f"test_oracle_{uuid.uuid4().hex}"
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(sa.text(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
    database_url = url.set(database=name).render_as_string(hide_password=False)
    database = Database(database_url)
    servers = Servers([], [], database)
    await servers.tenant()  # the first key: from here on every call needs one
    async with AsyncExitStack() as stack:
        stack.push_async_callback(_drop, engine, name)
        stack.push_async_callback(database.close)
        servers.processes = [start_server("--database-url", database_url) for _ in range(2)]
        for process in servers.processes:
            stack.callback(process.process.kill)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(process.address))
            servers.clients = [*servers.clients, Client(process.address, channel)]
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for module in (usage_rpc, streams_rpc):
            patch.setattr(module, "MESSAGE_BYTES", NARROW_MESSAGE_BYTES)
        patch.setattr(streams_rpc, "READ_BYTES_MAX", NARROW_READ_BYTES)
        servers.narrow = await stack.enter_async_context(running_server(database_url))
        yield servers
        codes = [process.stop() for process in servers.processes]
    assert codes == [0, 0]


async def _drop(engine: AsyncEngine, name: str) -> None:
    async with engine.connect() as connection:
        await connection.execute(sa.text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    await engine.dispose()


# --- Running a plan


class Sent(NamedTuple):
    """An event as it was sent: in which of the stage's calls, and at which place there."""

    event: oracle.Event
    call: int
    position: int


@dataclass
class KnownMetric:
    """A metric that was made, and from which plan."""

    definition: oracle.Metric
    planned: int


class Run:
    """One plan on its way through the servers, and what plain Python knows of it."""

    def __init__(self, plan: Plan, tenant: Tenant) -> None:
        self.plan = plan
        self.tenant = tenant
        self.now = datetime.now(UTC)
        zone, first, number = plan.scene
        self.first_day = first or (self.now.astimezone(oracle.zone_info(zone)).date() - timedelta(days=1))
        spans = oracle.days(zone, self.first_day, number)
        starts = [start for start, _ in spans]
        changes = oracle.clock_changes(zone, (spans[0][0], spans[-1][1]))
        self.edges = [*starts, spans[-1][1], *changes, *(oracle.hour(start) for start in starts)]
        self.metrics: list[KnownMetric | None] = [None for one in plan.metrics for _ in one.stages]
        self.archive_times: list[datetime] = []
        self.stored: dict[str, oracle.Event] = {}
        self.aliases: dict[str, set[str]] = {}
        self.former: dict[str, frozenset[str]] = {}  # every alias a customer had
        self.archived_customers: set[str] = set()
        self._turn = 0

    @property
    def client(self) -> Client:
        """The servers in turn."""
        self._turn += 1
        return self.tenant.clients[self._turn % len(self.tenant.clients)]

    async def run(self) -> None:
        """Do everything, and compare all answers at the end; some of them after every stage."""
        for stage in range(STAGES):
            await self.set_customers(stage)
            await asyncio.gather(
                self.send(stage),
                *(self.create_metric(i) for i in self._metrics_of(stage)),
                *(self.archive_metric(i) for i in self._archived_at(stage)),
            )
            # What was acknowledged is in the very next answer. (Naming no metric would mean all.)
            if stage == STAGES - 1:
                break
            if counted := await self.counted():
                await self.compare(self.everything(counted))
            counted_ids = {one.id for one in counted}
            unfinished = {one.definition.id for one in self.metrics if one} - counted_ids
            await self.compare_search(SearchQuery(None, None, None, None, None, 0), unfinished)
        if self.plan.archived_customer is not None:
            await self.archive_customer(CUSTOMERS[self.plan.archived_customer])
        await asyncio.gather(*(self.wait(known) for known in self.metrics if known))
        known = await self.counted()
        rows = await self.compare(self.everything(known))
        self.compare_twins(rows)
        for query in self.plan.queries:
            await self.compare(self.request(query), streamed=True)
        for grouped in self.plan.grouped:
            await self.compare_grouped(grouped)
        for search in (SearchQuery(None, None, None, None, None, 5), *self.plan.searches):
            await self.compare_search(search)
        for start in sorted({one.timestamp for one in self.stored.values()})[:: max(1, len(self.stored) // 4)]:
            # From an event on, to the microsecond: cells are cut wherever events are.
            await self.compare(self.everything(known, start))
        await check_cells(self.tenant, [one.id for one in known])

    # What is done

    async def set_customers(self, stage: int) -> None:
        """Create the stage's customers and move the aliases to their owners."""
        owned: dict[str, set[str]] = {one: set() for one in CUSTOMERS}
        for alias, owner in zip(ALIASES, self.plan.owners[stage], strict=True):
            if owner is not None and self.plan.customers[owner] <= stage:
                owned[CUSTOMERS[owner]].add(alias)
        for customer_id, aliases in self.aliases.items():
            await self.set_aliases(customer_id, aliases & owned[customer_id])
        for customer_id in list(self.aliases):
            await self.set_aliases(customer_id, owned[customer_id])
        for number, created in enumerate(self.plan.customers):
            if created == stage:
                customer_id = CUSTOMERS[number]
                await self.client.create_customer(id=customer_id, ingest_aliases=owned[customer_id])
                self.aliases[customer_id] = owned[customer_id]

    async def set_aliases(self, customer_id: str, aliases: set[str]) -> None:
        """Set the aliases of a customer, if they are others than before."""
        if aliases != self.aliases[customer_id]:
            # Keys that are UUIDs are the same in any case.
            sent = [alias.upper() if alias == STRANGER else alias for alias in aliases]
            request = customer_pb2.SetIngestAliasesRequest(id=customer_id, ingest_aliases=sent)
            await self.client.customers.SetIngestAliases(request)
            self.former[customer_id] = self.former.get(customer_id, frozenset()) | self.aliases[customer_id]
            self.aliases[customer_id] = aliases

    async def archive_customer(self, customer_id: str) -> None:
        """Archive a customer: "all customers" leaves it out from then on."""
        if customer_id in self.aliases:
            await self.client.customers.ArchiveCustomer(customer_pb2.ArchiveCustomerRequest(id=customer_id))
            self.archived_customers.add(customer_id)

    async def create_metric(self, number: int) -> None:
        """Create a metric, without waiting until its past is counted."""
        planned = self._planned(number)
        # Ids descend, so that their order is not that of creation.
        metric_id = str(uuid.UUID(int=(1 << 128) - 1 - number))
        definition = replace(self.plan.metrics[planned].definition, id=metric_id)
        await create(self.client, definition)
        self.metrics[number] = KnownMetric(definition, planned)

    async def archive_metric(self, number: int) -> None:
        """Archive a metric now, maybe while its past is being counted; its archive time counts."""
        known = self.metrics[number]
        assert known is not None
        known.definition = await archive(self.client, known.definition)
        assert known.definition.archived_at is not None
        self.archive_times.append(known.definition.archived_at)

    async def send(self, stage: int) -> None:
        """Send the stage's events in concurrent calls to both servers, and check every verdict."""
        calls: dict[int, list[Sent]] = {}
        messages: dict[int, list[event_pb2.UsageEvent]] = {}
        for call, one, key, nanos in self._events_of(stage):
            position = len(calls.setdefault(call, []))
            calls[call].append(Sent(one, call, position))
            message = wire(one, key)
            message.timestamp.nanos += nanos
            messages.setdefault(call, []).append(message)
        answers = await asyncio.gather(
            *(
                self._ingest(call, messages[call], all_or_nothing=(stage, call) in self.plan.atomic)
                for call in sorted(calls)
            )
        )
        for call, answer in zip(sorted(calls), answers, strict=True):
            if (stage, call) in self.plan.atomic and isinstance(answer, list):
                assert set(answer) <= {event_pb2.VERDICT_ACCEPTED, event_pb2.VERDICT_DUPLICATE}
        self.account([calls[call] for call in sorted(calls)], answers)

    async def _ingest(self, call: int, sent: Sequence[event_pb2.UsageEvent], *, all_or_nothing: bool) -> Any:
        client = self.tenant.clients[call % len(self.tenant.clients)]
        if call >= len(self.tenant.clients) and not all_or_nothing:
            return await _stream_events(client, sent)
        try:
            return list((await client.ingest(*sent, all_or_nothing=all_or_nothing)).verdicts)
        except grpc.aio.AioRpcError as error:
            if not all_or_nothing:
                raise
            return error.code()

    def account(self, calls: Sequence[Sequence[Sent]], answers: Sequence[Any]) -> None:
        """Check that exactly one of equal ids was accepted, and what all others were told; keep the accepted."""
        before = dict(self.stored)
        assert all(
            len(call) == len(answer) for call, answer in zip(calls, answers, strict=True) if type(answer) is list
        )
        codes = [answer for answer in answers if not isinstance(answer, list)]
        assert set(codes) <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS}
        settled = [
            (one, answer[one.position])
            for call, answer in zip(calls, answers, strict=True)
            if isinstance(answer, list)
            for one in call
        ]
        for one, verdict in settled:
            if verdict == event_pb2.VERDICT_ACCEPTED:
                assert one.event.transaction_id not in self.stored, "accepted twice"
                self.stored[one.event.transaction_id] = one.event
        seen: set[tuple[int, str]] = set()
        for one, verdict in settled:
            transaction_id = one.event.transaction_id
            if not oracle.storable(one.event.properties):
                assert verdict == event_pb2.VERDICT_REJECTED, one
                continue
            stored = self.stored.get(transaction_id)
            assert stored is not None, (one, verdict)
            if verdict == event_pb2.VERDICT_ACCEPTED:
                assert transaction_id not in before, one
                assert (one.call, transaction_id) not in seen, "in a call the first of equal ids speaks"
            elif oracle.same_content(one.event, stored):
                assert verdict == event_pb2.VERDICT_DUPLICATE, one
            else:
                assert verdict == event_pb2.VERDICT_CONFLICT, one
            seen.add((one.call, transaction_id))
        for call, answer in zip(calls, answers, strict=True):
            if not isinstance(answer, list):
                self._check_refusal(call, answer)

    def _check_refusal(self, call: Sequence[Sent], code: grpc.StatusCode) -> None:
        refused = any(not oracle.storable(one.event.properties) for one in call)
        assert code is (grpc.StatusCode.INVALID_ARGUMENT if refused else grpc.StatusCode.ALREADY_EXISTS)
        contents = [self.stored[i] for one in call if (i := one.event.transaction_id) in self.stored]
        contents += [one.event for one in call]
        assert refused or any(
            one.transaction_id == other.transaction_id and not oracle.same_content(one, other)
            for one, other in itertools.combinations(contents, 2)
        )

    # What is compared

    def everything(
        self, metrics: Sequence[oracle.Metric], start: datetime = EARLIEST
    ) -> tuple[dict[str, Any], oracle.Selection]:
        """Ask for all there ever was since the start, of these metrics and of every customer by name."""
        span = (start, datetime(9000, 1, 1, 0, 0, 0, 1, tzinfo=UTC))
        request = {
            "window_size": "WINDOW_SIZE_NONE",
            "customer_ids": list(self.aliases),
            "billable_metrics": [{"id": one.id} for one in metrics],
        }
        named = bool(self.aliases), bool(metrics)
        return request, oracle.Selection(
            self._keys(), [(one, None) for one in metrics], [span], *named, former=self.former
        )

    def request(self, query: Query) -> tuple[dict[str, Any], oracle.Selection]:
        """Turn a planned query into a request, and into what the oracle takes."""
        windows = self._windows(query)
        request: dict[str, Any] = {
            "window_size": f"WINDOW_SIZE_{query.size}",
            "omit_empty_windows": query.omit_empty,
            "pages": query.pages,
        }
        if query.size == "DAY":
            request["time_zone"] = self._zone(query)
        keys = self._keys()
        if query.customers is None:
            keys = {one: owned for one, owned in keys.items() if one not in self.archived_customers}
        else:
            chosen = [CUSTOMERS[i] for i in query.customers]
            request["customer_ids"] = [one.upper() for one in chosen]
            keys = {one: keys[one] for one in chosen}
        known = [one.definition for one in self.metrics if one]
        if query.metrics is None:
            selected = [(one, None) for one in known if one.archived_at is None]
        else:
            selected = [(known[i], group_by) for i, group_by in query.metrics]
            request["billable_metrics"] = [
                {"id": one.id, **({"group_by": group_by._asdict()} if group_by else {})} for one, group_by in selected
            ]
        named = query.customers is not None, query.metrics is not None
        return request, oracle.Selection(keys, selected, windows, *named, query.omit_empty, self.former)

    async def compare(
        self, asked: tuple[dict[str, Any], oracle.Selection], *, streamed: bool = False
    ) -> list[oracle.Window]:
        """Ask, page by page and each page from another server, and require the oracle's answer; returns it."""
        return await compare(lambda: self.client, self.stored.values(), *asked, self.tenant if streamed else None)

    async def compare_grouped(self, grouped: GroupedQuery) -> None:
        """Ask for the groups of one customer and metric, in pages and as a stream, and require the oracle's answer."""
        query, metric = grouped.query, self.metrics[grouped.metric]
        assert metric is not None
        key = metric.definition.group_keys[grouped.key - 1] if grouped.key else ()
        key = tuple(key[i] for i in grouped.order)
        customer_id = CUSTOMERS[grouped.customer]
        windows = self._windows(query)
        selection = oracle.GroupedSelection(
            self._keys()[customer_id],
            metric.definition,
            windows,
            key,
            grouped.filters,
            query.omit_empty,
            self.former.get(customer_id, frozenset()),
        )
        fields: dict[str, Any] = {
            "customer_id": customer_id.upper(),
            "billable_metric_id": metric.definition.id,
            "window_size": f"WINDOW_SIZE_{query.size}",
            "time_zone": self._zone(query) if query.size == "DAY" else "",
            "group_key": key,
            "group_filters": {name: {"values": values} for name, values in grouped.filters.items()},
            "omit_empty_windows": query.omit_empty,
        }
        await compare_grouped(self.tenant, self.stored.values(), fields, selection, query.pages)

    async def compare_search(self, search: SearchQuery, unfinished: Iterable[str] = ()) -> None:
        """Search, page by page, and require the oracle's events and what it makes of them.

        `unfinished` are the metrics that may still be counting their past.
        """
        ids = frozenset(list(self.stored)[:: search.ids + 1]) if search.ids is not None else frozenset()
        request = event_pb2.SearchEventsRequest(page_size=search.page_size)
        asked = oracle.Search(ids=frozenset({*ids, "not stored"}) if ids else ids)
        if ids:
            request.transaction_ids.extend(asked.ids)
        else:
            bounds = [one and self.instant(one) for one in (search.first, search.last)]
            start, end = bounds if None in bounds else sorted(bounds, key=lambda one: one or EARLIEST)
            if start and end and start == end:
                end = end + oracle.MICROSECOND
            keys: frozenset[str] = frozenset()
            if search.key:
                key = search.key.lower() if "-" in search.key else search.key
                keys = self._keys().get(key, frozenset({key}))
            asked = oracle.Search(frozenset(), keys, search.event_type or "", start, end)
            request.customer_id = search.key or ""
            request.event_type = asked.event_type
            for field_name, bound in (("starting_on", start), ("ending_before", end)):
                if bound:
                    getattr(request, field_name).CopyFrom(timestamp(bound))
        known = sorted((one.definition for one in self.metrics if one), key=lambda one: one.id)
        owners = {key: customer_id for customer_id, keys in self._keys().items() for key in keys}
        found = await read_search(lambda: self.client, request)
        assert [one.event.transaction_id for one in found] == [
            one.transaction_id for one in oracle.search(self.stored.values(), asked)
        ], request
        for one in found:
            stored = self.stored[one.event.transaction_id]
            assert one.matched_customer_id == owners.get(stored.customer_key, "")
            assert not one.HasField("void_time")
            require_explained(one, stored, known, unfinished)

    def compare_twins(self, rows: Sequence[oracle.Window]) -> None:
        """Metrics of one definition have the same numbers, whether made before, between or after the events."""
        numbers: dict[str, list[Any]] = {}
        for row in rows:
            numbers.setdefault(row.metric_id, []).append((row.customer_id, row.value, row.skipped))
        by_definition: dict[int, list[Any]] = {}
        for known in self.metrics:
            if known and known.definition.archived_at is None:
                by_definition.setdefault(known.planned, []).append(numbers.get(known.definition.id))
        for twins in by_definition.values():
            assert all(one == twins[0] for one in twins)

    async def counted(self) -> list[oracle.Metric]:
        """Return the metrics whose past is counted by now."""
        found = []
        for known in self.metrics:
            if known:
                metric = await fetch(self.client, known.definition.id)
                if not metric.HasField("backfill_progress"):
                    found.append(known.definition)
        return found

    async def wait(self, known: KnownMetric) -> None:
        """Wait until the metric's past is counted."""
        client = self.client
        await client.counted(await fetch(client, known.definition.id))

    # What the plan means

    def _planned(self, number: int) -> int:
        return [i for i, one in enumerate(self.plan.metrics) for _ in one.stages][number]

    def _metrics_of(self, stage: int) -> list[int]:
        stages = [made for one in self.plan.metrics for made in one.stages]
        return [i for i, made in enumerate(stages) if made == stage]

    def _archived_at(self, stage: int) -> list[int]:
        """The first metric of each definition that is to be archived at this stage, if it was made before."""
        found = []
        first = 0
        for one in self.plan.metrics:
            if one.archive is not None and max(one.archive, one.stages[0] + 1) == stage:
                found.append(first)
            first += len(one.stages)
        return found

    def _events_of(self, stage: int) -> Iterator[tuple[int, oracle.Event, str, int]]:
        for i, one in enumerate(self.plan.events):
            if one.stage == stage:
                yield one.call, self._event(i, i), one.key, 0
        for again in self.plan.again:
            if again.stage == stage:
                content = again.of if again.other is None else again.other
                yield again.call, self._event(again.of, content), self.plan.events[content].key, again.nanos

    def _event(self, number: int, content: int) -> oracle.Event:
        one = self.plan.events[content]
        transaction_id = f"{self.plan.events[number].prefix}{number}"
        known = self.stored.get(transaction_id)
        at = self.instant(one.at)
        if known is not None and content == number:
            at = known.timestamp  # sent again it is what it was, though "now" has moved on
        return oracle.Event(
            transaction_id, one.key.lower() if "-" in one.key else one.key, one.event_type, at, one.properties
        )

    def instant(self, time: Time) -> datetime:
        """Return the instant that a plan means, which must be no more than a day ahead."""
        bases: Mapping[str, Sequence[datetime]] = {
            "scene": self.edges,
            "now": [self.now],
            "archive": self.archive_times or [self.now],
            "fixed": FIXED,
        }
        base = bases[time.base][time.index % len(bases[time.base])]
        found = max(base + time.delta, EARLIEST)
        # Just after midnight, the end of a scene that began yesterday is almost two days away.
        while found > self.now + timedelta(hours=23):
            found -= timedelta(days=1)
        return found

    def _zone(self, query: Query) -> str:
        return self.plan.scene.zone if query.zone == "scene" else query.zone

    def _windows(self, query: Query) -> list[oracle.Span]:
        if query.size == "NONE":
            first, last = sorted((self.instant(query.first), self.instant(query.last)))
            if last - first > CUT_ONLY and query.number % 2:
                last = first + CUT_ONLY  # no whole cell, or one at most
            return [(first, max(last, first + oracle.MICROSECOND))]
        if query.size == "HOUR":
            start = oracle.hour(self.instant(query.first))
            # Many hours begin long before, so that what there is lies anywhere among them.
            earlier = start - oracle.HOUR * (query.number // 2) if start.year > 10 else start
            return oracle.hours(earlier, query.number)
        day = self.first_day + timedelta(days=query.first.index % self.plan.scene.days - 1)
        # A date that the zone skipped is no window; with the next one there is one.
        return oracle.days(self._zone(query), day, query.number) or oracle.days(self._zone(query), day, 2)

    def _keys(self) -> dict[str, frozenset[str]]:
        return {one: frozenset({one, *aliases}) for one, aliases in self.aliases.items()}


# --- What plans and single tests share


async def _stream_events(client: Client, sent: Sequence[event_pb2.UsageEvent]) -> list[Any]:
    """Send events in batches over one stream, and return the verdicts of all."""
    size = max(1, len(sent) // 3)
    parts = [sent[start : start + size] for start in range(0, len(sent), size)]
    requests = [event_pb2.StreamEventsRequest(sequence=i, events=part) for i, part in enumerate(parts, 1)]
    answers = [one async for one in client.events.StreamEvents(iter(requests))]
    assert [one.sequence for one in answers] == [one.sequence for one in requests]
    assert [len(one.verdicts) for one in answers] == [len(part) for part in parts]
    return [verdict for one in answers for verdict in one.verdicts]


class Rows(NamedTuple):
    """A listing read to its end."""

    rows: list[Any]
    next_updated_since: Any


def _requests(method: str, fields: Mapping[str, Any]) -> Any:
    return getattr(usage_pb2, f"{method}Request")(**fields)


async def read_pages(clients: Sequence[Client], method: str, fields: Mapping[str, Any], page_size: int) -> Rows:
    """Read all pages of a listing, each from another server; the time to go on from is the same on all of them."""
    request = _requests(method, fields)
    request.page_size = page_size
    rows: list[Any] = []
    since = None
    for client in itertools.cycle(clients):
        page = await getattr(client.usage, method)(request)
        assert len(page.windows) <= (page_size or 1_000)
        assert since in {None, page.next_updated_since.ToNanoseconds()}
        since = page.next_updated_since.ToNanoseconds()
        rows += page.windows
        if not page.next_page_token:
            return Rows(rows, page.next_updated_since)
        request.page_token = page.next_page_token
    raise AssertionError


async def read_messages(client: Client, method: str, fields: Mapping[str, Any]) -> list[Any]:
    """Read all messages of a stream: each has a token, and the last one alone says that it is complete."""
    messages = [one async for one in getattr(client.usage, method)(_requests(method, fields))]
    assert [one.complete for one in messages] == [False] * (len(messages) - 1) + [True]
    assert all(one.resume_token for one in messages)
    assert len({one.next_updated_since.ToNanoseconds() for one in messages}) == 1
    return messages


async def read_stream(clients: Sequence[Client], method: str, fields: Mapping[str, Any]) -> Rows:
    """Read a stream to its end."""
    messages = await read_messages(clients[0], method, fields)
    return Rows([row for one in messages for row in one.windows], messages[-1].next_updated_since)


async def check_stream(
    tenant: Tenant,
    method: str,
    fields: Mapping[str, Any],
    expected: Sequence[Any],
    row: Callable[[Any], Any],
    resumed: int = MESSAGES_RESUMED,
) -> int:
    """Require that a stream gives these rows, and from every message on (or so many) exactly the rest, elsewhere too.

    Returns of how many messages it is.
    """
    assert tenant.narrow is not None
    messages = await read_messages(tenant.narrow, method, fields)
    rows = [one for message in messages for one in message.windows]
    assert oracle.settled([row(one) for one in rows], expected) == list(expected), fields
    assert all(len(one.windows) <= 1 or one.ByteSize() <= NARROW_MESSAGE_BYTES + 1_000 for one in messages)
    last = len(messages) - 1
    chosen = random.Random(last).sample(range(last), min(last, resumed))
    for number, client in zip([*chosen, last], itertools.cycle((*tenant.clients, tenant.narrow))):
        rest = await read_messages(client, method, {**fields, "resume_token": messages[number].resume_token})
        sent = sum(len(one.windows) for one in messages[: number + 1])
        assert [one for message in rest for one in message.windows] == rows[sent:]
        assert rest[0].next_updated_since == messages[0].next_updated_since
        assert number < last or len(rest) == 1
    return len(messages)


def wire(one: oracle.Event, key: str | None = None) -> event_pb2.UsageEvent:
    """Write an event as it is sent, with its customer key as the caller spells it."""
    return event(
        one.transaction_id,
        customer_id=key or one.customer_key,
        event_type=one.event_type,
        at=one.timestamp,
        properties=one.properties,
    )


async def create(client: Client, definition: oracle.Metric) -> None:
    """Create a metric, without waiting until its past is counted."""
    filters = [
        billable_metric_pb2.PropertyFilter(
            name=one.name, exists=one.exists, in_values=one.in_values, not_in_values=one.not_in_values
        )
        for one in definition.filters
    ]
    types = billable_metric_pb2.EventTypeFilter(
        in_values=definition.event_types, not_in_values=definition.excluded_event_types
    )
    metric = billable_metric_pb2.BillableMetric(
        id=definition.id,
        name=definition.id,
        aggregation_type=f"AGGREGATION_TYPE_{definition.aggregation}",
        aggregation_key=definition.aggregation_key,
        event_type_filter=types,
        property_filters=filters,
        group_keys=[billable_metric_pb2.GroupKey(properties=key) for key in definition.group_keys],
    )
    request = billable_metric_pb2.CreateBillableMetricRequest(billable_metric=metric)
    await client.metrics.CreateBillableMetric(request)


async def archive(client: Client, definition: oracle.Metric) -> oracle.Metric:
    """Archive a metric and return its definition with the archive time."""
    request = billable_metric_pb2.ArchiveBillableMetricRequest(id=definition.id)
    metric = (await client.metrics.ArchiveBillableMetric(request)).billable_metric
    return replace(definition, archived_at=metric.archive_time.ToDatetime(tzinfo=UTC))


async def fetch(client: Client, metric_id: str) -> billable_metric_pb2.BillableMetric:
    """Return a metric as it is now."""
    request = billable_metric_pb2.GetBillableMetricRequest(id=metric_id)
    return (await client.metrics.GetBillableMetric(request)).billable_metric


async def compare(
    client: Callable[[], Client],
    stored: Iterable[oracle.Event],
    request: dict[str, Any],
    selection: oracle.Selection,
    streamed: Tenant | None = None,
) -> list[oracle.Window]:
    """Ask, page by page, and require the oracle's answer over the stored events; returns it.

    `pages` in `request` says in how many pages (0 = the default size); bounds come from the selection. With `streamed`
    the answer is asked for as a stream too.
    """
    before = datetime.now(UTC)
    expected = oracle.usage(stored, selection, before)
    found = await read(client, request, selection.windows, len(expected))
    if oracle.settled(found, expected) != expected and any(
        before < end <= datetime.now(UTC) for _, end in selection.windows
    ):
        expected = oracle.usage(stored, selection, datetime.now(UTC))  # a window ended in between
    assert oracle.settled(found, expected) == expected, request
    if streamed and len(expected) <= STREAMED_MAX:
        await check_stream(streamed, "StreamUsage", _bounded(request, selection.windows), expected, _row)
    return expected


async def compare_grouped(
    tenant: Tenant,
    stored: Iterable[oracle.Event],
    fields: dict[str, Any],
    selection: oracle.GroupedSelection,
    pages: int = 0,
) -> int:
    """Ask in pages and as a stream, and require the oracle's answer; returns of how many messages the stream is."""
    stored = list(stored)
    now = datetime.now(UTC)
    expected = oracle.grouped_usage(stored, selection, now)
    fields = _bounded(fields, selection.windows)
    size = max(1, len(expected) // pages) if pages else 0
    found = await read_pages(tenant.clients, "ListUsageWithGroups", fields, size)
    if any(now < end <= datetime.now(UTC) for _, end in selection.windows):
        expected = oracle.grouped_usage(stored, selection, datetime.now(UTC))  # a window ended in between
    rows = [grouped_row(one) for one in found.rows]
    assert oracle.settled(rows, expected) == expected, fields
    if len(expected) > STREAMED_MAX:
        return 0
    return await check_stream(tenant, "StreamUsageWithGroups", fields, expected, grouped_row)


async def read_search(
    client: Callable[[], Client], request: event_pb2.SearchEventsRequest
) -> list[event_pb2.StoredEvent]:
    """Read all pages of a search."""
    found: list[event_pb2.StoredEvent] = []
    while True:
        page = await client().events.SearchEvents(request)
        assert len(page.events) <= (request.page_size or 100)
        found += page.events
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def require_explained(
    found: event_pb2.StoredEvent, stored: oracle.Event, metrics: Sequence[oracle.Metric], unfinished: Iterable[str] = ()
) -> None:
    """Require that an event is told as it was sent, and of every metric what becomes of it.

    An event that an unfinished metric has not counted yet may be told to be pending.
    """
    assert (found.event.event_type, found.event.timestamp.ToDatetime(tzinfo=UTC)) == stored[2:4]
    assert found.event.customer_id == stored.customer_key
    told = json_format.MessageToDict(found.event.properties)
    assert oracle.json_text(told) == oracle.json_text(stored.properties)
    assert [one.billable_metric_id for one in found.metrics] == [one.id for one in metrics]
    for one, metric in zip(found.metrics, metrics, strict=True):
        outcome = event_pb2.MetricOutcome.Name(one.outcome).removeprefix("METRIC_OUTCOME_")
        expected = oracle.outcome(metric, stored)
        pending = expected[0] in {"COUNTED", "SKIPPED"} and metric.id in unfinished and outcome == "PENDING"
        assert pending or (outcome, one.rule) == expected, (metric, stored)
        assert bool(one.message) == bool(one.rule)
        assert one.billable_metric_name == one.billable_metric_id


def _bounded(fields: Mapping[str, Any], windows: Sequence[oracle.Span]) -> dict[str, Any]:
    bounds = {"starting_on": timestamp(windows[0][0]), "ending_before": timestamp(windows[-1][1])}
    return {name: value for name, value in fields.items() if name != "pages"} | bounds


def grouped_row(row: usage_pb2.GroupedUsageWindow) -> oracle.GroupedRow:
    """Return a row as the oracle gives it."""
    return oracle.GroupedRow(
        start=row.starting_on.ToDatetime(tzinfo=UTC),
        end=row.ending_before.ToDatetime(tzinfo=UTC),
        group=dict(row.group),
        value=row.value if row.HasField("value") else None,
        skipped=row.skipped_count,
        incomplete=row.incomplete,
        used=row.HasField("update_time"),
    )


async def read(
    client: Callable[[], Client], fields: dict[str, Any], windows: Sequence[oracle.Span], number: int
) -> list[oracle.Window]:
    """Read all pages of a query that should give `number` windows."""
    fields = dict(fields)
    pages = fields.pop("pages", 0)
    request = usage_pb2.ListUsageRequest(
        starting_on=timestamp(windows[0][0]), ending_before=timestamp(windows[-1][1]), **fields
    )
    found: list[oracle.Window] = []
    while True:
        if pages:
            # Sizes vary from page to page; with few windows they are 1, or more than there are.
            request.page_size = max(1, number // pages + (len(found) % 3) - 1)
        page = await client().usage.ListUsage(request)
        assert len(page.windows) <= (request.page_size or 1_000)
        assert page.ByteSize() < PAGE_BYTES_MAX
        found += [_row(window) for window in page.windows]
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def _row(window: usage_pb2.UsageWindow) -> oracle.Window:
    # These metrics are named as their ids.
    assert window.billable_metric_name == window.billable_metric_id
    return oracle.Window(
        customer_id=window.customer_id,
        metric_id=window.billable_metric_id,
        start=window.starting_on.ToDatetime(tzinfo=UTC),
        end=window.ending_before.ToDatetime(tzinfo=UTC),
        value=window.value if window.HasField("value") else None,
        skipped=window.skipped_count,
        groups={name: group.value if group.HasField("value") else None for name, group in window.groups.items()},
        truncated=window.groups_truncated,
        incomplete=window.incomplete,
        used=window.HasField("update_time"),
    )


async def check_cells(tenant: Tenant, metric_ids: Iterable[str], spans: Sequence[oracle.Span] = ()) -> None:
    """Require that stored cells are what their events say; `spans` cut the work into pieces where there is much."""
    first, last = (
        service_windows.cell_floor(service_windows.EARLIEST),
        service_windows.cell_floor(service_windows.LATEST),
    )
    bounds = [first, *(start for start, _ in spans), *(end for _, end in spans[-1:]), last]
    async with tenant.database.engine.connect() as connection:
        for metric_id in metric_ids:
            metric = await metric_store.get_metric(connection, tenant.organization, uuid.UUID(metric_id))
            for span in itertools.pairwise(bounds):
                found = await cells.mismatches(connection, tenant.organization, metric, *span, limit=5)
                assert not found, f"{metric}: {found}"


# --- The tests


@given(plan=plans())
@settings(max_examples=EXAMPLES)
async def test_usage_is_what_the_events_say(servers: Servers, plan: Plan) -> None:
    """Every usage answer equals plain Python over the accepted events, window by window."""
    await Run(plan, await servers.tenant()).run()


@pytest.fixture
def only_by_hand(pytestconfig: pytest.Config) -> None:
    """Leave a test out unless it is asked for."""
    if "long" not in pytestconfig.getoption("markexpr"):
        pytest.skip("takes minutes: run it with -m long")


@pytest.mark.long
@pytest.mark.usefixtures("only_by_hand")
@given(plan=plans())
@settings(max_examples=EXAMPLES * LONG_FACTOR)
async def test_usage_is_what_the_events_say_at_length(servers: Servers, plan: Plan) -> None:
    """The same over ten times as many plans."""
    await Run(plan, await servers.tenant()).run()


HISTORY = datetime(2024, 5, 1, tzinfo=UTC)


def _definition(number: int, aggregation: str, **fields: Any) -> oracle.Metric:
    key = "" if aggregation == "COUNT" else "q"
    return oracle.Metric(id=str(uuid.UUID(int=number)), aggregation=aggregation, aggregation_key=key, **fields)


def _always(tenant: Tenant) -> Callable[[], Client]:
    turns = itertools.cycle(tenant.clients)
    return lambda: next(turns)


def _request(size: str, definitions: Iterable[oracle.Metric], **fields: Any) -> dict[str, Any]:
    metrics = [{"id": one.id} for one in definitions]
    return {"window_size": f"WINDOW_SIZE_{size}", "billable_metrics": metrics, **fields}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
async def test_moving_an_alias_moves_its_history(servers: Servers, aggregation: str) -> None:
    """All usage under a key follows the key to its next owner and back, and merges with what the owner has."""
    tenant = await servers.tenant()
    one, other = tenant.clients
    metric = _definition(1, aggregation)
    await create(one, metric)
    # Ties of the timestamp across keys, equal values across keys, and a key that is a UUID in capitals.
    sent = [
        oracle.Event(f"{prefix}{key}", key, "call", HISTORY + oracle.HOUR * i, {"q": value})
        for i in range(2)
        for key in (*ALIASES, *CUSTOMERS[:2])
        for prefix, value in (
            (f"a{i}", 1),
            (f"\ufb01{i}", "1.5"),
            (f"\U0001f600{i}", None),
            (f"Z{i}", ALIASES.index(key) if key in ALIASES else 9),
        )
    ]
    for part in (sent[::2], sent[1::2]):  # ties within one call, and with what an earlier one left
        await one.ingest(*map(wire, part))
    for number in (0, 1):
        await one.create_customer(id=CUSTOMERS[number])
    owners = ((0, 0, 1, None), (1, 0, 0, 0), (1, 1, 1, 1), (None, None, None, None), (0, 0, 1, None))
    for owned in owners:
        keys = {
            CUSTOMERS[i]: {alias for alias, owner in zip(ALIASES, owned, strict=True) if owner == i} for i in (0, 1)
        }
        for aliases in ({customer: set() for customer in keys}, keys):
            for customer, wanted in aliases.items():
                request = customer_pb2.SetIngestAliasesRequest(id=customer, ingest_aliases=wanted)
                await other.customers.SetIngestAliases(request)
        for spans in (oracle.hours(HISTORY, 2), [(HISTORY, HISTORY + oracle.HOUR + oracle.MICROSECOND)]):
            selection = oracle.Selection(
                {customer: frozenset({customer, *aliases}) for customer, aliases in keys.items()},
                [(metric, None)],
                spans,
            )
            request = _request("HOUR" if len(spans) > 1 else "NONE", [metric], customer_ids=list(keys))
            await compare(_always(tenant), sent, request, selection)


async def test_every_value_counts_or_is_skipped(servers: Servers) -> None:
    """Each value, alone and beside the smallest one there is, gives what the rules of quantities say."""
    tenant = await servers.tenant()
    client = _always(tenant)
    customer = await client().create_customer(ingest_aliases=["acme"])
    filtered = (
        oracle.Filter("q", None, ("60", "1.5", "text", "[1, 2.5]")),
        oracle.Filter("q", True, (), ("60", "true")),
    )
    definitions = [
        _definition(10 * i + j, aggregation, filters=filters, group_keys=(("q",),) if j else ())
        for i, aggregation in enumerate(AGGREGATIONS)
        for j, filters in enumerate(((), filtered[:1], filtered[1:]))
    ]
    for one in definitions[::2]:
        await create(client(), one)
    sent = [
        oracle.Event(f"{i} {j}", "acme", "call", HISTORY + oracle.HOUR * (2 * i + bool(j)), {"q": value})
        for i, one in enumerate((*PLAIN_VALUES, *NASTY_VALUES))
        for j, value in enumerate((one, one, "0.000000000000000001"))
    ]
    # In several calls, so that cells without a number meet numbers, and the other way round.
    for part in (sent[2::3], sent[0::3], sent[1::3]):
        await client().ingest(*map(wire, part))
    for one in definitions[1::2]:
        await create(client(), one)
    for one in definitions:
        await client().counted(await fetch(client(), one.id))
    number = 2 * len(PLAIN_VALUES + NASTY_VALUES)
    for size, spans in (
        ("HOUR", oracle.hours(HISTORY, number)),
        ("NONE", [(HISTORY - oracle.MICROSECOND, HISTORY + number * oracle.HOUR)]),
        ("NONE", [(HISTORY, HISTORY + oracle.MICROSECOND)]),
        ("NONE", [(HISTORY + oracle.MICROSECOND, HISTORY + oracle.HOUR + oracle.MICROSECOND)]),
    ):
        # Ungrouped cells mix numbers with what is none; grouped ones keep them apart.
        groups = [oracle.GroupBy("q") if one.group_keys else None for one in definitions]
        selection = oracle.Selection(
            {customer.id: frozenset({"acme"})}, list(zip(definitions, groups, strict=True)), spans
        )
        metrics = [
            {"id": one.id, "group_by": group_by and group_by._asdict()}
            for one, group_by in zip(definitions, groups, strict=True)
        ]
        request = _request(size, (), customer_ids=[customer.id]) | {"billable_metrics": metrics}
        await compare(client, sent, request, selection)


@pytest.mark.parametrize("backfilling", [False, True])
async def test_archived_metrics_count_what_happened_before(servers: Servers, backfilling: bool) -> None:
    """An archived metric counts events before its archive time to the microsecond, whenever they come."""
    tenant = await servers.tenant()
    client = _always(tenant)
    customer = await client().create_customer(ingest_aliases=["acme"])
    definitions = [_definition(i, aggregation, group_keys=(("g",),)) for i, aggregation in enumerate(AGGREGATIONS)]

    def near(moment: datetime, prefix: str) -> list[oracle.Event]:
        deltas = (-oracle.HOUR, -oracle.MICROSECOND, timedelta(0), oracle.MICROSECOND, oracle.HOUR, 3 * oracle.HOUR)
        return [
            oracle.Event(f"{prefix}{i}", "acme", "call", moment + delta, {"q": i, "g": "x"})
            for i, delta in enumerate(deltas)
        ]

    sent = near(datetime.now(UTC) + MINUTE, "before")
    for one in definitions if not backfilling else ():
        await create(client(), one)
    await client().ingest(*map(wire, sent))
    for one in definitions if backfilling else ():
        await create(client(), one)
    archived = [await archive(client(), one) for one in definitions]
    for i, one in enumerate(archived):
        assert one.archived_at is not None
        late = near(one.archived_at, f"after {i} ")
        sent += late
        await asyncio.gather(client().ingest(*map(wire, late)), client().ingest(*map(wire, reversed(late))))
    for one in archived:
        await client().counted(await fetch(client(), one.id))
    for one in archived:
        assert await archive(client(), one) == one  # the first archive time stays
        bounds = oracle.hours(oracle.hour(one.archived_at - 2 * oracle.HOUR), 8)
        for size, spans in (("HOUR", bounds), ("NONE", [(one.archived_at - oracle.HOUR, one.archived_at)])):
            selection = oracle.Selection({customer.id: frozenset({"acme"})}, [(one, None) for one in archived], spans)
            await compare(client, sent, _request(size, archived, customer_ids=[customer.id]), selection)
    await check_cells(tenant, [one.id for one in archived])


@pytest.mark.parametrize("number", [199, 200, 201, 450])
async def test_groups_beyond_200_are_cut_in_byte_order(servers: Servers, number: int) -> None:
    """Without asked-for values the first 200 of each window come, and the window says whether there are more."""
    tenant = await servers.tenant()
    client = _always(tenant)
    customer = await client().create_customer(ingest_aliases=["acme"])
    definitions = [_definition(i, one, group_keys=(("g",), ("g", "h"))) for i, one in enumerate(AGGREGATIONS)]
    for one in definitions:
        await create(client(), one)
    names = [f"{prefix}{i}" for i, prefix in zip(range(number), itertools.cycle(ID_PREFIXES))]
    sent = [
        oracle.Event(f"{i} {name}", "acme", "call", HISTORY + i * 40 * MINUTE, {"g": name, "h": i, "q": i or name})
        for i in range(3)
        for name in names[i:]
    ]
    sent.append(oracle.Event("none", "acme", "call", HISTORY, {"q": 5}))
    for part in range(0, len(sent), 500):
        await client().ingest(*map(wire, sent[part : part + 500]))
    start, end = HISTORY, HISTORY + 3 * oracle.HOUR
    for size, spans in (
        ("HOUR", oracle.hours(start - 70 * oracle.HOUR, 140)),
        ("NONE", [(start + MINUTE, end)]),
        ("NONE", [(start, end)]),
    ):
        for named in ((), (names[0], "nowhere", names[-1])):
            group_by = oracle.GroupBy("g", named)
            selection = oracle.Selection(
                {customer.id: frozenset({"acme"})}, [(one, group_by) for one in definitions], spans
            )
            metrics = [{"id": one.id, "group_by": group_by._asdict()} for one in definitions]
            request = _request(size, (), customer_ids=[customer.id]) | {"billable_metrics": metrics}
            await compare(client, sent, request, selection)


async def test_pages_of_large_groups_stay_small(servers: Servers) -> None:
    """Windows with 200 long group values are spread over pages of about 1 MiB, none lost and none repeated."""
    tenant = await servers.tenant()
    client = _always(tenant)
    customer = await client().create_customer(ingest_aliases=["acme"])
    metric = _definition(1, "SUM", group_keys=(("g",),))
    await create(client(), metric)
    names = [f"{i:04d}" + "é" * 500 for i in range(200)]
    sent = [
        oracle.Event(f"{hour} {name[:4]}", "acme", "call", HISTORY + hour * oracle.HOUR, {"q": "0.25", "g": name})
        for hour in range(12)
        for name in names
    ]
    for part in range(0, len(sent), 600):
        await client().ingest(*map(wire, sent[part : part + 600]))
    group_by = oracle.GroupBy("g")
    selection = oracle.Selection({customer.id: frozenset({"acme"})}, [(metric, group_by)], oracle.hours(HISTORY, 12))
    metrics = [{"id": metric.id, "group_by": group_by._asdict()}]
    request = _request("HOUR", (), customer_ids=[customer.id]) | {"billable_metrics": metrics}
    await compare(client, sent, request, selection)


def _bulk(seed: int, number: int, hours: int) -> list[oracle.Event]:
    """Many events over the hours from HISTORY on."""
    numbers = random.Random(seed)
    return [
        oracle.Event(
            f"{seed}-{i}",
            numbers.choice(ALIASES),
            "call",
            HISTORY + timedelta(microseconds=numbers.randrange(hours * 3_600_000_000)),
            {"q": numbers.choice(PLAIN_VALUES), "g": numbers.randrange(4)},
        )
        for i in range(number)
    ]


async def _backfill_beside_ingest(tenant: Tenant, rounds: int, history: int, call: int) -> None:
    """Create metrics while events come in through all servers until their past is counted; then compare."""
    client = _always(tenant)
    customers = {
        alias: (await client().create_customer(id=CUSTOMERS[i], ingest_aliases=[alias])).id
        for i, alias in enumerate(ALIASES)
    }
    keys = {customer: frozenset({alias}) for alias, customer in customers.items()}
    sent = _bulk(-1, history, 40)
    for part in range(0, len(sent), 5_000):
        await client().ingest(*map(wire, sent[part : part + 5_000]))
    known: list[oracle.Metric] = []
    for number in range(rounds):
        definitions = [
            _definition(10 * number + i, aggregation, group_keys=(("g",),))
            for i, aggregation in enumerate(("UNIQUE", ("SUM", "LATEST", "AVG")[number % 3]))
        ]
        done = asyncio.Event()

        async def send(client: Client, seed: int, done: asyncio.Event = done) -> list[oracle.Event]:
            new: list[oracle.Event] = []
            for i in range(15):
                # Some lie before all that was known when the metrics were made, some were sent before.
                batch = [one._replace(timestamp=one.timestamp - 2 * oracle.HOUR) for one in _bulk(seed + i, call, 44)]
                response = await client.ingest(*map(wire, [*batch, *new[-20:]]))
                assert list(response.verdicts) == [event_pb2.VERDICT_ACCEPTED] * call + [
                    event_pb2.VERDICT_DUPLICATE
                ] * len(new[-20:])
                new += batch
                if done.is_set() and i >= 3:
                    break
            return new

        async def count(definitions: Sequence[oracle.Metric] = definitions, done: asyncio.Event = done) -> None:
            try:
                for one in definitions:
                    await create(client(), one)
                for one in definitions:
                    await client().counted(await fetch(client(), one.id))
            finally:
                done.set()

        seeds = (1_000_000 * (2 * number + 1 + i) for i in range(len(tenant.clients)))
        *new, _ = await asyncio.gather(
            *(send(one, seed) for one, seed in zip(tenant.clients, seeds, strict=True)), count()
        )
        sent += itertools.chain(*new)
        known += definitions
        selection = oracle.Selection(
            keys, [(one, None) for one in definitions], oracle.days("Asia/Kolkata", date(2024, 4, 30), 4)
        )
        request = _request("DAY", definitions, customer_ids=list(keys), time_zone="Asia/Kolkata")
        await compare(client, sent, request, selection)
    await check_cells(tenant, [one.id for one in known], oracle.hours(HISTORY, 40))


async def test_backfill_beside_ingest(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A past that is counted in many small steps while two servers take events comes out exact, five times."""
    chunk = metric_store.backfill_chunk
    monkeypatch.setattr(metric_store, "backfill_chunk", functools.partial(chunk, events_max=300))
    database = Database(database_url)
    async with running_server(database_url) as one, running_server(database_url) as other:
        await _backfill_beside_ingest(Tenant("default", (one, other), database), 5, history=2_000, call=40)
    await database.close()


@pytest.mark.long
@pytest.mark.usefixtures("only_by_hand")
async def test_backfill_beside_ingest_at_length(servers: Servers) -> None:
    """The same with two processes and chunks of the real size."""
    await _backfill_beside_ingest(await servers.tenant(), 5, history=60_000, call=400)


async def test_killed_backfill_is_finished_by_the_next_server(database_url: str) -> None:
    """A server that dies in the middle of counting a metric's past leaves nothing half done: the next one is exact."""
    database = Database(database_url)
    tenant = Tenant("default", (), database)
    definitions = [_definition(1, "UNIQUE", group_keys=(("g",),)), _definition(2, "SUM")]
    sent = _bulk(0, 24_000, 30)
    keys = {CUSTOMERS[i]: frozenset({alias}) for i, alias in enumerate(ALIASES)}
    selection = oracle.Selection(keys, [(one, None) for one in definitions], oracle.hours(HISTORY, 30))
    async with _serving(database_url) as (client, process):
        for customer_id, aliases in keys.items():
            await client.create_customer(id=customer_id, ingest_aliases=aliases)
        for part in range(0, len(sent), 8_000):
            await client.ingest(*map(wire, sent[part : part + 8_000]))
        async with database.engine.connect() as holder:
            for one in definitions:
                await create(client, one)
            # With the metric's row in hand, after its first chunk, the second is counted but cannot be committed.
            await _hold_between_chunks(holder, definitions[0])
            await _someone_waits(database)
            process.kill()
            await holder.rollback()
    async with _serving(database_url) as (client, _):
        unfinished = await fetch(client, definitions[0].id)
        assert unfinished.HasField("backfill_progress")
        for one in definitions:
            await client.counted(await fetch(client, one.id))
        request = _request("HOUR", definitions, customer_ids=list(keys))
        await compare(lambda: client, sent, request, selection)
    await check_cells(tenant, [one.id for one in definitions], selection.windows)
    await database.close()


@asynccontextmanager
async def _serving(database_url: str) -> AsyncIterator[tuple[Client, Process]]:
    process = start_server("--database-url", database_url)
    try:
        async with grpc.aio.insecure_channel(process.address) as channel:
            yield Client(process.address, channel), process
    finally:
        process.kill()


async def _hold_between_chunks(connection: Any, metric: oracle.Metric) -> None:
    """Lock the metric's row once its first chunk is done and before its last."""
    columns = billable_metrics.c
    query = sa.select(columns.backfilled_until, columns.backfill_from).where(columns.id == uuid.UUID(metric.id))
    async with asyncio.timeout(30):
        while True:
            until, start = (await connection.execute(query.with_for_update())).one()
            assert until is not None, "the backfill was done before it could be stopped"
            if until > start:
                return
            await connection.rollback()
            await asyncio.sleep(0.002)


async def _someone_waits(database: Database) -> None:
    """Wait until another connection waits for a lock on a row."""
    query = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND wait_event_type = 'Lock' AND wait_event <> 'advisory'"
    )
    async with asyncio.timeout(30):
        while True:
            async with database.engine.connect() as connection:
                if (await connection.execute(query)).scalar_one():
                    return
            await asyncio.sleep(0.005)
