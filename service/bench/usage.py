"""Measures how fast usage is answered: against SQL over the aggregates, SQL over the events, and ClickHouse."""

import array
import asyncio
import contextlib
import functools
import gc
import importlib
import itertools
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg

from metering.v1 import billable_metric_pb2 as metric_pb
from metering.v1 import usage_pb2 as pb
from service.bench import Comparison, Side, Stopwatch, Summary, Target, Work, at_least, must_be, without_collection
from service.bench.ground import CALL_TIMEOUT_S, Ground, Server, Tenant, create_customers, create_metrics, unary

CUSTOMERS = 500
REGIONS, MODELS, USERS, TOKENS_MAX = 4, 5, 40, 4_999
START = datetime(2026, 3, 1, tzinfo=UTC)
DAYS = 31
# A metric of different values has a row for almost every event, and so takes as long to count as all others together.
UNIQUE_MAX = 10**6
# So many events are made by a statement.
_LOADED = 500_000
_LOAD_PROGRESS = 1_000_000
_PAGE = 10_000
_KOLKATA = "Asia/Kolkata"
# All figures are kept by half hours, so that hours of UTC and days of either zone can be made of them.
_HALVES = DAYS * 48
_HALF_US = 1_800_000_000

Key = tuple[int, int, str | None, str | None]
"""Number of the customer, start of the window in seconds since 1970, and the two group values if there are any."""
Values = Mapping[Key, Decimal | int]
"""What a question must be answered with; windows without usage have no entry."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Expected:
    """What the events of a size add up to, worked out one by one in Python; the events themselves are made by SQL."""

    number: int
    counts: Sequence[int]
    sums: Sequence[int]
    # By customer, day and group.
    groups: Sequence[int]
    # By customer and hour, a bit per user.
    users: Sequence[int]

    @classmethod
    def of(cls, number: int) -> "Expected":
        """Work it out: about two seconds per million."""
        # Arrays, which the garbage collector does not look through: it would in the midst of what is measured.
        counts, sums, groups, users = (
            array.array("q", bytes(8 * CUSTOMERS * cells))
            for cells in (_HALVES, _HALVES, DAYS * REGIONS * MODELS, DAYS * 24)
        )
        step = _step_us(number)
        for n in range(number):
            one = (n * 2_654_435_761) & 0xFFFFFFFF
            one = ((one ^ (one >> 15)) * 1_103_515_245) & 0xFFFFFFFF
            two = ((one ^ (one >> 13)) * 1_540_483_477) & 0xFFFFFFFF
            customer, tokens = (one >> 8) % CUSTOMERS, 1 + two % TOKENS_MAX
            half = (n * step + one % step) // _HALF_US
            at = customer * _HALVES + half
            counts[at] += 1
            sums[at] += tokens
            group = (two >> 8) % REGIONS * MODELS + (two >> 11) % MODELS
            groups[(customer * DAYS + half // 48) * REGIONS * MODELS + group] += tokens
            users[customer * DAYS * 24 + half // 2] |= 1 << (two >> 16) % USERS
        return cls(number, counts, sums, groups, users)


# The same in SQL, of Postgres and of ClickHouse: `n` to what an event is made of.
_MIXED = (
    "SELECT n, h, ((h # (h >> 13)) * 1540483477) & 4294967295 AS g FROM ("
    "SELECT n, ((m # (m >> 15)) * 1103515245) & 4294967295 AS h FROM ("
    "SELECT n, (n * 2654435761) & 4294967295 AS m FROM generate_series($2::bigint, $3::bigint) AS n"
    ") AS first) AS second"
)
_INSERT = f"""
INSERT INTO usage_events (organization_id, transaction_id, customer_key, event_type, timestamp, properties, digest)
SELECT $1, 'event-' || lpad(n::text, 10, '0'), 'customer-' || lpad(((h >> 8) % {CUSTOMERS})::text, 4, '0'),
  'completion', $4::timestamptz + (n * $5::bigint + h % $5::bigint) * INTERVAL '1 microsecond',
  jsonb_build_object(
    'region', 'region-' || (g >> 8) % {REGIONS}, 'model', 'model-' || (g >> 11) % {MODELS},
    'user', 'user-' || (g >> 16) % {USERS}, 'tokens', 1 + g % {TOKENS_MAX}, 'latency_ms', h % 1000000 / 1000.0
  ), int8send(h) || int8send(n)
FROM ({_MIXED}) AS mixed
"""  # noqa: S608 - numbers of ours
_CLICKHOUSE = f"""
INSERT INTO bench.{{table}}
SELECT 'customer-' || leftPad(toString(bitShiftRight(h, 8) % {CUSTOMERS}), 4, '0'),
  addMicroseconds(toDateTime64('{START:%Y-%m-%d %H:%M:%S}', 6, 'UTC'), toInt64(n * {{step}} + h % {{step}})),
  'region-' || toString(bitShiftRight(g, 8) % {REGIONS}), 'model-' || toString(bitShiftRight(g, 11) % {MODELS}),
  'user-' || toString(bitShiftRight(g, 16) % {USERS}), 1 + g % {TOKENS_MAX}
FROM (SELECT n, h, bitAnd(bitXor(h, bitShiftRight(h, 13)) * 1540483477, 4294967295) AS g FROM (
  SELECT n, bitAnd(bitXor(m, bitShiftRight(m, 15)) * 1103515245, 4294967295) AS h FROM (
    SELECT number AS n, bitAnd(number * 2654435761, 4294967295) AS m FROM numbers({{number}}))))
"""  # noqa: S608 - numbers of ours


def _step_us(number: int) -> int:
    return DAYS * 86_400_000_000 // number


def key_of(customer: int) -> str:
    """Return the key under which a customer's events are."""
    return f"customer-{customer:04d}"


def metrics() -> dict[str, metric_pb.BillableMetric]:
    """Describe the metrics that are asked for, by the name of their aggregation."""
    types = metric_pb.AggregationType
    described = {
        "COUNT": metric_pb.BillableMetric(name="requests", aggregation_type=types.AGGREGATION_TYPE_COUNT),
        "SUM": metric_pb.BillableMetric(
            name="tokens",
            aggregation_type=types.AGGREGATION_TYPE_SUM,
            aggregation_key="tokens",
            group_keys=[metric_pb.GroupKey(properties=["region", "model"])],
        ),
        "UNIQUE": metric_pb.BillableMetric(
            name="users", aggregation_type=types.AGGREGATION_TYPE_UNIQUE, aggregation_key="user"
        ),
    }
    for one in described.values():
        one.event_type_filter.in_values.append("completion")
    return described


@dataclass(frozen=True)
class Question:
    """What is asked: the windows of one customer, or of all, by one metric."""

    title: str
    metric: str
    calls: int
    hourly: bool = False
    every_customer: bool = False
    zone: str = "UTC"
    grouped: bool = False

    @property
    def halves(self) -> range:
        """Half hours since START at which its windows begin, and its end."""
        length = 2 if self.hourly else 48
        # The first day in Kolkata that is in the data as a whole begins 18.5 hours after that of UTC.
        return range(0, _HALVES + 1, length) if self.zone == "UTC" else range(37, _HALVES, length)

    @property
    def span(self) -> tuple[datetime, datetime]:
        """Where it begins and ends."""
        return _instant(self.halves[0]), _instant(self.halves[-1])

    @property
    def windows(self) -> int:
        """How many windows one customer has."""
        return len(self.halves) - 1


@dataclass
class Loaded:
    """The events of one size, in an organization of their own, and what they add up to."""

    number: int
    tenant: Tenant
    customers: Sequence[str]
    expected: Expected
    inserted: Work
    metrics: dict[str, str] = field(default_factory=dict)
    backfills: dict[str, Work] = field(default_factory=dict)
    kept: dict[Question, Values] = field(default_factory=dict)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The number of a customer by key and by id."""
        found = {key_of(i): i for i in range(CUSTOMERS)}
        return found | {one: i for i, one in enumerate(self.customers)}

    @property
    def name(self) -> str:
        """The size as a power of ten, if it is one."""
        power = len(str(self.number)) - 1
        return f"10^{power}" if self.number == 10**power else f"{self.number:,}"

    def values(self, question: Question, customer: int) -> Values:
        """Return what a question about a customer (or all, if it is about all) must be answered with."""
        if not question.every_customer:
            return dict(self._values(question, customer))
        if question not in self.kept:
            self.kept[question] = dict(
                itertools.chain.from_iterable(self._values(question, i) for i in range(CUSTOMERS))
            )
        return self.kept[question]

    def rows(self, question: Question) -> int:
        """Return how many windows the service lists: every one of each customer with usage."""
        if not question.every_customer:
            return question.windows
        return len({key[0] for key in self.values(question, -1)}) * question.windows

    def _values(self, question: Question, customer: int) -> Iterable[tuple[Key, int]]:
        counted = self.expected.counts if question.metric == "COUNT" else self.expected.sums
        for start, end in itertools.pairwise(question.halves):
            second = int(_instant(start).timestamp())
            if question.grouped:
                first = (customer * DAYS + start // 48) * REGIONS * MODELS
                for i, value in enumerate(self.expected.groups[first : first + REGIONS * MODELS]):
                    if value:
                        yield (customer, second, f"region-{i // MODELS}", f"model-{i % MODELS}"), value
                continue
            if question.metric == "UNIQUE":
                value = self.expected.users[customer * DAYS * 24 + start // 2].bit_count()
            else:
                value = sum(counted[customer * _HALVES + start : customer * _HALVES + end])
            if value:
                yield (customer, second, None, None), value


async def load(ground: Ground, server: Server, number: int, say: Say, names: Sequence[str]) -> Loaded:
    """Load so many events, then create the metrics of these names and wait until they count them."""
    tenant = await ground.tenant()
    customers = await create_customers(server, tenant, [key_of(i) for i in range(CUSTOMERS)])
    # Python and Postgres at the same time.
    inserted, expected = await asyncio.gather(
        _insert(ground, tenant, number, say), asyncio.to_thread(Expected.of, number)
    )
    loaded = Loaded(number, tenant, customers, expected, inserted)
    await ground.settle()
    for name in names:
        say(f"{number:,} events: metric {name} counts the past")
        began = time.perf_counter()
        (metric,) = await create_metrics(server, tenant, [metrics()[name]])
        loaded.backfills[name] = Work(number, time.perf_counter() - began)
        loaded.metrics[name] = metric.id
    await ground.settle()
    return loaded


async def _insert(ground: Ground, tenant: Tenant, number: int, say: Say) -> Work:
    connection = await ground.bare()
    try:
        await connection.execute("SET synchronous_commit = off")
        began = time.perf_counter()
        for first in range(0, number, _LOADED):
            if first % _LOAD_PROGRESS == 0:
                say(f"{number:,} events: {first:,} loaded")
            last = min(number, first + _LOADED) - 1
            await connection.execute(_INSERT, tenant.organization, first, last, START, _step_us(number))
        return Work(number, time.perf_counter() - began)
    finally:
        await connection.close()


# The service, bare SQL, raw SQL and ClickHouse.
_SIDES_MAX = 4

Rows = Iterable[Sequence[Any]]
Ask = Callable[[int], Awaitable[Any]]
Read = Callable[[Any], Rows]


class _Asked:
    """One question about one size, put in different ways."""

    def __init__(self, loaded: Loaded, question: Question) -> None:
        self.loaded = loaded
        self.question = question
        self._sides = 0

    def side(self, name: str, ask: Ask, read: Read, calls: int) -> Side:
        """Make a side that asks so often in a run, about another customer each time."""
        # No two sides ask about the same one in a round: the second would find in memory what the first had to fetch.
        firsts = itertools.count(self._sides * CUSTOMERS // _SIDES_MAX, self.question.calls)
        self._sides += 1

        async def run() -> Work:
            first = next(firsts)
            # Far apart, so that those of one run are not neighbours, and each gets its turn.
            asked = [(first + i) * 197 % CUSTOMERS for i in range(calls)]
            answers = []
            with without_collection():
                watch = Stopwatch()
                for customer in asked:
                    answers.append(await watch.timed(ask(customer)))
                work = watch.done(0)
            done = 0
            for customer, answer in zip(asked, answers, strict=True):
                expected = self.loaded.values(self.question, customer)
                self._check(name, customer, read(answer), expected)
                done += self._done(expected)
            return work._replace(done=done)

        return Side(f"{name}, {self.loaded.name}", run)

    def _done(self, expected: Values) -> int:
        if self.question.metric == "UNIQUE":
            return int(sum(expected.values()))
        return len(expected) if self.question.grouped else self.loaded.rows(self.question)

    def _check(self, name: str, customer: int, rows: Rows, expected: Values) -> None:
        question, found = self.question, {}
        for row in rows:
            *who, start, region, model, value = self._spread(row)
            number = self.loaded.numbers[str(who[0])] if question.every_customer else customer
            if value is not None:
                found[number, start, region, model] = Decimal(value)
        what = f"{question.title}: {name}, {self.loaded.name}"
        if found != expected:
            for key in sorted(found.keys() | expected.keys()):
                must_be(f"{what}, {key}", found.get(key), expected.get(key))

    def _spread(self, row: Sequence[Any]) -> list[Any]:
        """Return the columns of a row with those of groups, and the start as a number."""
        *who, start = row[: 2 if self.question.every_customer else 1]
        groups = row[-3:-1] if self.question.grouped else (None, None)
        return [*who, int(start.timestamp() if isinstance(start, datetime) else start), *groups, row[-1]]

    def service(self, server: Server) -> Side:
        """Ask the service."""
        ask, read = (self._grouped(server), self._read_grouped) if self.question.grouped else self._list(server)
        return self.side("service", ask, read, self.question.calls)

    def _list(self, server: Server) -> tuple[Ask, Read]:
        question, loaded = self.question, self.loaded
        call = unary(server.channel, "UsageService/ListUsage", pb.ListUsageResponse)
        requests = [self._request(pb.ListUsageRequest, page_size=_PAGE) for _ in range(CUSTOMERS)]
        for customer_id, request in zip(loaded.customers, requests, strict=True):
            request.billable_metrics.add(id=loaded.metrics[question.metric])
            if not question.every_customer:
                request.customer_ids.append(customer_id)

        async def ask(customer: int) -> list[pb.ListUsageResponse]:
            request, pages = pb.ListUsageRequest.FromString(requests[customer].SerializeToString()), []
            while True:
                raw = request.SerializeToString()
                page = await call(raw, metadata=loaded.tenant.metadata, timeout=CALL_TIMEOUT_S)
                pages.append(page)
                if not page.next_page_token:
                    return pages
                request.page_token = page.next_page_token

        def read(pages: list[pb.ListUsageResponse]) -> Rows:
            must_be("windows", sum(len(page.windows) for page in pages), loaded.rows(question))
            for page in pages:
                for one in page.windows:
                    who = [one.customer_id] if question.every_customer else []
                    yield [*who, one.starting_on.seconds, one.value if one.HasField("value") else None]

        return ask, read

    def _grouped(self, server: Server) -> Ask:
        question, loaded = self.question, self.loaded
        call = unary(server.channel, "UsageService/ListUsageWithGroups", pb.ListUsageWithGroupsResponse)
        request = self._request(pb.ListUsageWithGroupsRequest, page_size=_PAGE, group_key=["region", "model"])
        request.billable_metric_id = loaded.metrics[question.metric]

        async def ask(customer: int) -> pb.ListUsageWithGroupsResponse:
            request.customer_id = loaded.customers[customer]
            found: pb.ListUsageWithGroupsResponse = await call(
                request.SerializeToString(), metadata=loaded.tenant.metadata, timeout=CALL_TIMEOUT_S
            )
            return found

        return ask

    def _read_grouped(self, answer: pb.ListUsageWithGroupsResponse) -> Rows:
        must_be("token of a next page", answer.next_page_token, "")
        for one in answer.windows:
            value = one.value if one.HasField("value") else None
            yield one.starting_on.seconds, one.group.get("region"), one.group.get("model"), value

    def _request(self, kind: Callable[..., Any], **more: Any) -> Any:
        question = self.question
        size = pb.WINDOW_SIZE_HOUR if question.hourly else pb.WINDOW_SIZE_DAY
        request = kind(window_size=size, time_zone="" if question.zone == "UTC" else question.zone, **more)
        start, end = question.span
        request.starting_on.FromDatetime(start)
        request.ending_before.FromDatetime(end)
        return request

    async def bare(self, connection: "asyncpg.Connection[Any]") -> Side:
        """Ask the rollup rows as an expert would who knows them, with one prepared statement."""
        question, loaded = self.question, self.loaded
        unit = "hour" if question.hourly else "day"
        aggregate = {"COUNT": "sum(c.counted)", "SUM": "sum(c.sum)", "UNIQUE": "count(DISTINCT c.value_digest)"}
        table = "usage_distinct_values" if question.metric == "UNIQUE" else "usage_cells"
        start = "c.cell_start" if question.hourly else f"date_trunc('day', c.cell_start, '{question.zone}')"
        of_level = f"AND c.group_digest {'>' if question.grouped else '='} ''" if table == "usage_cells" else ""
        # Of a metric the properties of group keys are stored in order, the model before the region.
        groups = "c.cell_group[2] AS region, c.cell_group[1] AS model," if question.grouped else ""
        inner = (
            f"SELECT k.customer_id, {start} AS start, {groups} {aggregate[question.metric]} AS value "  # noqa: S608
            f"FROM customer_keys k JOIN {table} c ON c.organization_id = k.organization_id AND c.customer_key = k.key "
            "WHERE k.organization_id = $1 AND c.organization_id = $1 AND c.metric_id = $2 "
            f"AND c.cell_start >= $3 AND c.cell_start < $4 {of_level} "
            f"{'' if question.every_customer else 'AND k.customer_id = $5'} "
            f"GROUP BY {', '.join(str(i + 1) for i in range(4 if question.grouped else 2))}"
        )
        series = f"generate_series($3::timestamptz, $4::timestamptz - INTERVAL '1 {unit}', INTERVAL '1 {unit}') AS s"
        if question.grouped:
            sql = f"SELECT start, region, model, value FROM ({inner}) AS found ORDER BY 1, 2, 3"  # noqa: S608
        elif question.every_customer:
            sql = (
                f"WITH found AS MATERIALIZED ({inner}) SELECT k.customer_id, s, f.value FROM "  # noqa: S608
                f"(SELECT DISTINCT customer_id FROM found) AS k CROSS JOIN {series} "
                "LEFT JOIN found f ON f.customer_id = k.customer_id AND f.start = s ORDER BY 1, 2"
            )
        else:
            sql = f"SELECT s, f.value FROM {series} LEFT JOIN ({inner}) AS f ON f.start = s ORDER BY 1"  # noqa: S608
        statement = await connection.prepare(sql)
        fixed = (loaded.tenant.organization, loaded.metrics[question.metric], *question.span)

        async def ask(customer: int) -> Any:
            return await statement.fetch(*fixed, *([] if question.every_customer else [loaded.customers[customer]]))

        def read(rows: Any) -> Rows:
            if not question.grouped:
                must_be("windows", len(rows), loaded.rows(question))
            return map(tuple, rows)

        return self.side("bare SQL", ask, read, question.calls)

    async def raw(self, connection: "asyncpg.Connection[Any]") -> Side:
        """Aggregate the events themselves, as a user would who has only these."""
        question, loaded = self.question, self.loaded
        aggregate = {
            "COUNT": "count(*)",
            "SUM": "sum((properties->>'tokens')::numeric)",
            "UNIQUE": "count(DISTINCT properties->>'user')",
        }
        columns = ["customer_key"] if question.every_customer else []
        columns.append(f"date_trunc('{'hour' if question.hourly else 'day'}', timestamp, '{question.zone}')")
        columns += ["properties->>'region'", "properties->>'model'"] if question.grouped else []
        numbers = ", ".join(str(i + 1) for i in range(len(columns)))
        sql = (
            f"SELECT {', '.join(columns)}, {aggregate[question.metric]} FROM usage_events "  # noqa: S608 - ours
            "WHERE organization_id = $1 AND event_type = 'completion' AND timestamp >= $2 AND timestamp < $3 "
            f"{'' if question.every_customer else 'AND customer_key = $4'} GROUP BY {numbers} ORDER BY {numbers}"
        )
        statement = await connection.prepare(sql)
        fixed = (loaded.tenant.organization, *question.span)

        async def ask(customer: int) -> Any:
            return await statement.fetch(*fixed, *([] if question.every_customer else [key_of(customer)]))

        return self.side("raw SQL", ask, lambda rows: map(tuple, rows), max(1, question.calls // 5))

    def clickhouse(self, query: Callable[[str], bytes]) -> Side:
        """Ask ClickHouse in this process."""
        question, loaded = self.question, self.loaded
        aggregate = {"COUNT": "count()", "SUM": "sum(tokens)", "UNIQUE": "uniqExact(user)"}
        columns = ["customer"] if question.every_customer else []
        columns.append(
            f"toUnixTimestamp({'toStartOfHour' if question.hourly else 'toStartOfDay'}(timestamp, '{question.zone}'))"
        )
        columns += ["region", "model"] if question.grouped else []
        numbers = ", ".join(str(i + 1) for i in range(len(columns)))
        bounds = [f"toDateTime64('{one:%Y-%m-%d %H:%M:%S}', 6, 'UTC')" for one in question.span]

        async def ask(customer: int) -> list[list[bytes]]:
            who = "" if question.every_customer else f"AND customer = '{key_of(customer)}'"
            sql = (
                f"SELECT {', '.join(columns)}, {aggregate[question.metric]} FROM bench.{_table(loaded)} "  # noqa: S608
                f"WHERE timestamp >= {bounds[0]} AND timestamp < {bounds[1]} {who} "
                f"GROUP BY {numbers} ORDER BY {numbers}"
            )
            return [line.split(b"\t") for line in query(sql).splitlines()]

        def read(rows: list[list[bytes]]) -> Rows:
            return ([one.decode() for one in row] for row in rows)

        return self.side("chdb", ask, read, question.calls)


QUESTIONS = (
    Question("(a) 1 customer, 31 days HOUR, COUNT", "COUNT", 50, hourly=True),
    Question("(a) 1 customer, 31 days HOUR, SUM", "SUM", 50, hourly=True),
    Question("(b) all customers, 31 days DAY, COUNT", "COUNT", 1, every_customer=True),
    Question("(b) all customers, 31 days DAY, SUM", "SUM", 1, every_customer=True),
    Question("(c) 1 customer, 31 days DAY by 2 keys, SUM", "SUM", 25, grouped=True),
    Question("(d) 1 customer, 30 days DAY in Kolkata, SUM", "SUM", 25, zone=_KOLKATA),
    Question("(d) all customers, 30 days DAY in Kolkata, SUM", "SUM", 1, every_customer=True, zone=_KOLKATA),
    Question("(e) 1 customer, 31 days HOUR, UNIQUE", "UNIQUE", 25, hourly=True),
)


async def queries(ground: Ground, sizes: Sequence[int], *, progress: Say) -> AsyncIterator[Comparison]:
    """Compare the questions at all sizes with SQL over the aggregates and over the events, and with ClickHouse."""
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(ground.server())
        loads = []
        for number in sorted(sizes):
            names = ["COUNT", "SUM", "UNIQUE"] if number <= UNIQUE_MAX else ["COUNT", "SUM"]
            loads.append(await load(ground, server, number, progress, names))
        clickhouse = stack.enter_context(_clickhouse(loads, progress))
        rolled_up, events = await ground.bare(), await ground.bare()
        stack.push_async_callback(rolled_up.close)
        stack.push_async_callback(events.close)
        # A plan for any span of time may be a bad one; the limit must not suffer from that.
        await events.execute("SET plan_cache_mode = force_custom_plan")
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        yield _counted(loads)
        for question in QUESTIONS:
            sides = []
            having = [one for one in loads if question.metric in one.metrics]
            for loaded in having:
                asked = _Asked(loaded, question)
                sides.append(asked.service(server))
                if question.zone == "UTC":  # no row of an hour says what a day that begins within it has
                    sides.append(await asked.bare(rolled_up))
                sides.append(await asked.raw(events))
                if clickhouse is not None:
                    sides.append(asked.clickhouse(clickhouse))
            unit = "different values/s" if question.metric == "UNIQUE" else "windows/s"
            notes = ["One client, one question after the other, about one metric."]
            if clickhouse is None:
                notes.append("chdb cannot be imported, so nothing is said of ClickHouse.")
            yield Comparison(
                f"usage-query: {question.title}",
                unit,
                sides,
                ["bare SQL", "raw SQL", "chdb"],
                _targets(question, having, with_clickhouse=clickhouse is not None),
                notes,
                rounds_max=3 if question.every_customer else None,
            )


def _counted(loads: Sequence[Loaded]) -> Comparison:
    """Tell what loading measured; it is done once."""

    def told(work: Work) -> Callable[[], Awaitable[Work]]:
        async def run() -> Work:
            return work

        return run

    sides = [Side(f"INSERT of the events, {one.name}", told(one.inserted)) for one in loads]
    for one in loads:
        sides += [Side(f"backfill of {name}, {one.name}", told(work)) for name, work in one.backfills.items()]
    notes = ["Measured once, while loading. A backfill rests as long as it works, so that writers get their turn."]
    return Comparison("usage-query: counting the past", "events/s", sides, ["INSERT"], notes=notes, rounds_max=1)


def _targets(question: Question, loads: Sequence[Loaded], *, with_clickhouse: bool) -> list[Target]:
    if question.zone != "UTC" or not question.title.startswith(("(a)", "(b)")):
        return []
    found = []
    if with_clickhouse:
        found += [at_least(f"service, {one.name}", f"chdb, {one.name}", 1) for one in loads]
    if question.every_customer:
        return found
    found += [at_least(f"service, {one.name}", f"bare SQL, {one.name}", 1 / 3) for one in loads]
    found += [_median_wait(f"service, {one.name}", 5) for one in loads]
    first, last = loads[0], loads[-1]
    if first is not last:
        found.append(at_least(f"service, {last.name}", f"service, {first.name}", 1 / 1.5))
    found += [at_least(f"service, {one.name}", f"raw SQL, {one.name}", 100) for one in loads if one.number == 10**7]
    return found


def _median_wait(side: str, bound_ms: float) -> Target:
    def value(sides: Mapping[str, Summary]) -> float:
        return sides[side].wait(50) * 1000

    return Target(f"p50 of {side}, ms", value, bound_ms, at_most=True)


@contextlib.contextmanager
def _clickhouse(loads: Sequence[Loaded], say: Say) -> Any:
    """Load the same events into ClickHouse in this process, and give what asks it; None if there is none."""
    try:
        chdb: Any = importlib.import_module("chdb.session")
    except ImportError:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="metering-bench-chdb-", ignore_cleanup_errors=True) as directory:
        opened = chdb.Session(directory)

        def query(sql: str) -> bytes:
            found: bytes = opened.query(sql, "TabSeparated").bytes()
            return found

        try:
            query("CREATE DATABASE bench")
            for one in loads:
                say(f"{one.number:,} events: into ClickHouse")
                table = _table(one)
                query(
                    f"CREATE TABLE bench.{table} (customer LowCardinality(String), timestamp DateTime64(6, 'UTC'), "
                    "region LowCardinality(String), model LowCardinality(String), user LowCardinality(String), "
                    "tokens Decimal(18, 6)) ENGINE = MergeTree ORDER BY (customer, timestamp)"
                )
                query(_CLICKHOUSE.format(table=table, step=_step_us(one.number), number=one.number))
                query(f"OPTIMIZE TABLE bench.{table} FINAL")
            yield query
        finally:
            opened.close()


def _table(loaded: Loaded) -> str:
    return f"events_{loaded.number}"


def _instant(half: int) -> datetime:
    return START + half * timedelta(minutes=30)
