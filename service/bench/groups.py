"""Measures usage record groups: batches of them against COPY into their table, and pages of lists against bare SQL.

No targets are set; the ratios are reported.
"""

import asyncio
import functools
import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import grpc
from google.protobuf.message import Message

from metering.v1 import customer_pb2 as customer_pb
from metering.v1 import entitlement_pb2 as entitlement_pb
from metering.v1 import event_pb2
from metering.v1 import usage_record_group_pb2 as pb
from service.bench import Comparison, Side, Stopwatch, Work, must_be, without_collection
from service.bench.ground import CALL_TIMEOUT_S, Ground, Server, Tenant, unary
from service.bench.ingest import connections

BATCH = 1_000
PAGE = 1_000
ENTITLEMENTS = 50
LISTED_DAYS = 28
# Where pages hold next to nothing, so many times as many of them make a run.
SHORT_TIMES = 10
# One of so many groups has what the rare filter asks for.
RARE = 10_000
PRODUCT, DIMENSION = "bench", "cpu"
# Stands for the part of every id that each run replaces; as long as what takes its place.
_RUN = "########"
_COLUMNS = (
    *("organization_id", "id", "serial_id", "partner", "product_id", "entitlement_id", "customer_id", "status"),
    *("source", "timestamp", "meta_info", "digest", "created_at", "updated_at"),
)


@dataclass(frozen=True)
class _Market:
    """A tenant with a product, and entitlements to it that each have a buyer of their own."""

    tenant: Tenant
    entitlements: Sequence[str]
    customers: Sequence[str]


async def groups(ground: Ground, reported: int, listed: int, pages: int) -> AsyncIterator[Comparison]:
    """Compare batches of so many groups, and lists over so many."""
    async with ground.server() as server:
        batches = _Batches(ground, server, await _market(ground, server), reported)
        yield Comparison(
            "groups: batches of 1,000",
            "groups/s",
            [
                *(
                    Side(f"{name}, {clients} client{'s' * (clients > 1)}", functools.partial(run, clients))
                    for name, run in (("Report", batches.report), ("BatchValidate", batches.validate))
                    for clients in (1, 4)
                ),
                Side("COPY", batches.copy),
            ],
            ["COPY"],
            notes=[
                "COPY writes the groups alone, unchecked; Report judges them, and stores their records and usage too. "
                "Reports of one organization take turns."
            ],
        )
        lists = _Lists(ground, server, await _market(ground, server), pages)
        await lists.load(listed)
        await ground.settle()
        for name, filters in lists.filters(listed).items():
            asked = await lists.asked(filters)
            yield Comparison(
                f"groups: list of {listed:,}, {name}",
                "pages/s",
                [
                    Side("List, 1 caller", functools.partial(lists.calls, asked, 1)),
                    Side("List, 4 callers", functools.partial(lists.calls, asked, 4)),
                    Side("SQL, 1 connection", functools.partial(lists.statements, asked, 1)),
                    Side("SQL, 4 connections", functools.partial(lists.statements, asked, 4)),
                ],
                ["SQL"],
                notes=[f"Pages of {len(asked[0].ids):,} groups with their records."],
            )


async def _market(ground: Ground, server: Server) -> _Market:
    tenant = await ground.tenant()

    async def call(method: str, request: Message, answer: Any) -> Any:
        send = unary(server.channel, method, answer)
        return await send(request.SerializeToString(), metadata=tenant.metadata, timeout=CALL_TIMEOUT_S)

    # What GCP takes may be the oldest.
    product = entitlement_pb.Product(
        id=PRODUCT,
        name="Bench",
        partner=entitlement_pb.PARTNER_GCP,
        dimensions=[entitlement_pb.Dimension(key=DIMENSION, name="CPU hours")],
    )
    await call(
        "EntitlementService/CreateProduct",
        entitlement_pb.CreateProductRequest(product=product),
        entitlement_pb.CreateProductResponse,
    )
    entitlements, customers = [], []
    for i in range(ENTITLEMENTS):
        customer = customer_pb.Customer(name=f"Buyer {i}", buyer_id=f"buyer-{i}")
        made = await call(
            "CustomerService/CreateCustomer",
            customer_pb.CreateCustomerRequest(customer=customer),
            customer_pb.CreateCustomerResponse,
        )
        entitlement = entitlement_pb.Entitlement(id=f"entitlement-{i}", product_id=PRODUCT, buyer_id=customer.buyer_id)
        entitlement.starting_on.FromDatetime(datetime.now(UTC) - timedelta(days=LISTED_DAYS))
        await call(
            "EntitlementService/CreateEntitlement",
            entitlement_pb.CreateEntitlementRequest(entitlement=entitlement),
            entitlement_pb.CreateEntitlementResponse,
        )
        entitlements.append(entitlement.id)
        customers.append(made.customer.id)
    return _Market(tenant, entitlements, customers)


class _Batches:
    """One set of groups on its way in, each run under ids of its own."""

    def __init__(self, ground: Ground, server: Server, market: _Market, number: int) -> None:
        self.ground = ground
        self.server = server
        self.market = market
        self.at = datetime.now(UTC).replace(microsecond=0)
        self.ids = [f"{_RUN}-{i:08d}" for i in range(number)]
        new = [self._group(i, group_id) for i, group_id in enumerate(self.ids)]
        # A BatchValidateUsageRecordGroupsRequest is the same.
        self.requests = [
            pb.ReportUsageRecordGroupsRequest(groups=new[start : start + BATCH]).SerializeToString()
            for start in range(0, number, BATCH)
        ]

    def _group(self, i: int, group_id: str) -> pb.NewUsageRecordGroup:
        group = pb.NewUsageRecordGroup(
            id=group_id,
            entitlement_id=self.market.entitlements[i % ENTITLEMENTS],
            records={DIMENSION: f"{i % 1000}.25"},
        )
        group.timestamp.FromDatetime(self.at)
        return group

    async def report(self, clients: int) -> Work:
        method, answer = "UsageRecordGroupService/ReportUsageRecordGroups", pb.ReportUsageRecordGroupsResponse
        run, results, work = await self._send(method, answer, clients)
        verdicts = [one.verdict for one in results]
        must_be("accepted groups", verdicts.count(event_pb2.VERDICT_ACCEPTED), len(self.ids))
        await self._check_stored(run, records=len(self.ids))
        return work

    async def validate(self, clients: int) -> Work:
        method = "UsageRecordGroupService/BatchValidateUsageRecordGroups"
        run, results, work = await self._send(method, pb.BatchValidateUsageRecordGroupsResponse, clients)
        must_be("faults", sum(one.violation_count for one in results), 0)
        await self._check_stored(run, groups=0, records=0)
        return work

    async def _send(self, method: str, answer: Any, clients: int) -> tuple[str, list[Any], Work]:
        """Send the batches, each client one after the other; return the results of all, each group one."""
        run = secrets.token_hex(4)
        queue = iter([request.replace(_RUN.encode(), run.encode()) for request in self.requests])
        results: list[Any] = []
        async with connections([self.server], clients) as channels:
            watch, metadata = Stopwatch(), self.market.tenant.metadata

            async def client(channel: grpc.aio.Channel) -> None:
                send = unary(channel, method, answer)
                for request in queue:
                    results.extend(
                        (await watch.timed(send(request, metadata=metadata, timeout=CALL_TIMEOUT_S))).results
                    )

            await asyncio.gather(*map(client, channels))
            work = watch.done(len(self.ids))
        must_be("ids of results", sorted(one.id for one in results), [one.replace(_RUN, run) for one in self.ids])
        return run, results, work

    async def copy(self) -> Work:
        """COPY the groups into the table itself, over one connection, batch by batch."""
        run, at = secrets.token_hex(4), self.at
        timestamp = f"{at:%Y-%m-%dT%H:%M:%SZ}"
        rows = [
            (
                *(self.market.tenant.organization, group_id.replace(_RUN, run), i, "GCP", PRODUCT),
                *(self.market.entitlements[i % ENTITLEMENTS], self.market.customers[i % ENTITLEMENTS], "CREATED"),
                *("API", at, _meta_info(timestamp, i), secrets.token_bytes(32), at, at),
            )
            for i, group_id in enumerate(self.ids)
        ]
        connection = await self.ground.bare()
        try:
            watch = Stopwatch()
            for start in range(0, len(rows), BATCH):
                await connection.copy_records_to_table(
                    "usage_record_groups", records=rows[start : start + BATCH], columns=_COLUMNS
                )
            work = watch.done(len(rows))
        finally:
            await connection.close()
        await self._check_stored(run, records=0)
        return work

    async def _check_stored(self, run: str, *, records: int, groups: int | None = None) -> None:
        """Require so many groups (None = all) and records of a run, and as many events as records."""
        found = {}
        connection = await self.ground.bare()
        try:
            for table, column, prefix in (
                ("usage_record_groups", "id", ""),
                ("usage_records", "group_id", ""),
                ("usage_events", "transaction_id", "urg:"),
            ):
                query = f"SELECT count(*) FROM {table} WHERE organization_id = $1 AND starts_with({column}, $2)"  # noqa: S608
                found[table] = await connection.fetchval(query, self.market.tenant.organization, prefix + run)
        finally:
            await connection.close()
        expected = {"usage_record_groups": len(self.ids) if groups is None else groups}
        must_be("stored rows", found, expected | {"usage_records": records, "usage_events": records})


@dataclass(frozen=True)
class _Asked:
    """A page: the request for it in bytes, the condition in SQL with its values, and the ids that it must have."""

    request: bytes
    condition: str
    values: Sequence[Any]
    ids: Sequence[str]


_Filter = tuple[dict[str, Any], str, tuple[Any, ...]]


_Page = Callable[[], tuple[list[str], int]]
"""What looks into an answer: the ids of its groups, and the number of their records."""


class _Lists:
    """Many groups, and pages of them."""

    def __init__(self, ground: Ground, server: Server, market: _Market, pages: int) -> None:
        self.ground = ground
        self.server = server
        self.market = market
        self.pages = pages
        self.today = datetime.now(UTC).date()

    async def load(self, number: int) -> None:
        """Store groups as if they had been reported over the last days; those that are no more wait for no report."""
        connection = await self.ground.bare()
        try:
            span = timedelta(days=LISTED_DAYS)
            await connection.execute(_LOAD_GROUPS, self.market.tenant.organization, number, *self._sold(), span)
            await connection.execute(_LOAD_RECORDS, self.market.tenant.organization)
        finally:
            await connection.close()

    def _sold(self) -> tuple[list[str], list[str]]:
        return list(self.market.entitlements), list(self.market.customers)

    def filters(self, number: int) -> dict[str, list[_Filter]]:
        """Describe the filters by name: fields of the request, and the same in SQL. Calls take turns over each's."""
        some = range(0, ENTITLEMENTS, 7)
        days = [self.today - timedelta(days=back) for back in range(2, LISTED_DAYS - 2, 5)]
        sold, bought = self._sold()
        scoped = "metering_scoped(organization_id, meta_info) @> metering_scoped($1, $2::jsonb)"
        return {
            "no filter": [({}, "true", ())],
            "by status": [({"status": pb.USAGE_RECORD_GROUP_STATUS_REPORT_FAILED}, "status = $2", ("REPORT_FAILED",))],
            "by entitlement": [({"entitlement_id": sold[i]}, "entitlement_id = $2", (sold[i],)) for i in some],
            "by buyer": [({"buyer_id": f"buyer-{i}"}, "customer_id = $2", (bought[i],)) for i in some],
            "by day": [
                (
                    {"start_date": f"{day}", "end_date": f"{day}"},
                    "created_at >= $2 AND created_at < $3",
                    tuple(datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=more) for more in (0, 1)),
                )
                for day in days
            ],
            "by meta_info that is rare": [
                ({"meta_info": f"stripe_invoice_id=in_{i}"}, scoped, (f'{{"stripe_invoice_id": "in_{i}"}}',))
                for i in range(max(1, number // RARE))
            ],
            "by meta_info that none has": [
                ({"meta_info": "stripe_invoice_id=none"}, scoped, ('{"stripe_invoice_id": "none"}',))
            ],
        }

    async def asked(self, filters: Sequence[_Filter]) -> list[_Asked]:
        """Find out what the page of each filter must have, by a statement that no index can serve."""
        found = []
        connection = await self.ground.bare()
        try:
            await connection.execute("SET enable_indexscan = off; SET enable_bitmapscan = off")
            for fields, condition, values in filters:
                query = _page("id", condition)
                ids = [row[0] for row in await connection.fetch(query, self.market.tenant.organization, *values)]
                request = pb.ListUsageRecordGroupsRequest(page_size=PAGE, **fields).SerializeToString()
                found.append(_Asked(request, condition, values, ids))
        finally:
            await connection.close()
        return found

    def _pages(self, asked: Sequence[_Asked]) -> list[_Asked]:
        times = 1 if len(asked[0].ids) > PAGE // 10 else SHORT_TIMES
        return list(itertools.islice(itertools.cycle(asked), self.pages * times))

    async def calls(self, asked: Sequence[_Asked], callers: int) -> Work:
        """Read pages over the API."""
        async with connections([self.server], callers) as channels:

            def page(channel: grpc.aio.Channel) -> Callable[[_Asked], Awaitable[_Page]]:
                send = unary(channel, "UsageRecordGroupService/ListUsageRecordGroups", pb.ListUsageRecordGroupsResponse)

                async def read(one: _Asked) -> _Page:
                    answer = await send(one.request, metadata=self.market.tenant.metadata, timeout=CALL_TIMEOUT_S)
                    groups = answer.usage_record_groups
                    return lambda: ([group.id for group in groups], sum(len(group.usage_records) for group in groups))

                return read

            return await _read(self._pages(asked), [page(channel) for channel in channels])

    async def statements(self, asked: Sequence[_Asked], connections: int) -> Work:
        """Read the same pages by SQL: the groups, then their records."""
        opened = [await self.ground.bare() for _ in range(connections)]
        try:

            def page(connection: "asyncpg.Connection[Any]") -> Callable[[_Asked], Awaitable[_Page]]:
                async def read(one: _Asked) -> _Page:
                    organization = self.market.tenant.organization
                    query = (
                        f"SELECT page.*, buyer_id FROM ({_page('*', one.condition)}) AS page JOIN customers "  # noqa: S608
                        "ON customers.organization_id = page.organization_id AND customers.id = customer_id "
                        "ORDER BY page.created_at DESC, serial_id DESC"
                    )
                    rows = await connection.fetch(query, organization, *one.values)
                    found = [row["id"] for row in rows]
                    records = await connection.fetch(_RECORDS, organization, found)
                    return lambda: (found, len(records))

                return read

            return await _read(self._pages(asked), [page(connection) for connection in opened])
        finally:
            for connection in opened:
                await connection.close()


async def _read(pages: Sequence[_Asked], readers: Sequence[Callable[[_Asked], Awaitable[_Page]]]) -> Work:
    """Read pages, each reader one after the other, then require of each what it must have."""
    answers: list[tuple[_Asked, _Page]] = []

    async def reading(read: Callable[[_Asked], Awaitable[_Page]]) -> None:
        for one in queue:
            answers.append((one, await watch.timed(read(one))))

    with without_collection():
        watch, queue = Stopwatch(), iter(pages)
        await asyncio.gather(*map(reading, readers))
        work = watch.done(len(pages))
    must_be("pages", len(answers), len(pages))
    for one, page in answers:
        ids, records = page()
        must_be("groups of a page", ids, one.ids)
        must_be("records of a page", records, len(one.ids))
    return work


def _page(columns: str, condition: str) -> str:
    return (
        f"SELECT {columns} FROM usage_record_groups WHERE organization_id = $1 AND {condition} "  # noqa: S608
        f"ORDER BY created_at DESC, serial_id DESC LIMIT {PAGE}"
    )


def _meta_info(timestamp: str, i: int) -> str:
    return f'{{"source":"API","timestamp":"{timestamp}","origin_records":{{"{DIMENSION}":"{i % 1000}.25"}}}}'


_RECORDS = "SELECT * FROM usage_records WHERE organization_id = $1 AND group_id = ANY($2) ORDER BY group_id, position"
# One in ten failed; neither they nor those that were reported are taken up by the hourly job.
_LOAD_GROUPS = f"""
INSERT INTO usage_record_groups ({", ".join(_COLUMNS)})
SELECT $1, 'group-' || i, i, 'GCP', '{PRODUCT}',
       ($3::text[])[1 + i % {ENTITLEMENTS}], ($4::uuid[])[1 + i % {ENTITLEMENTS}],
       CASE i % 10 WHEN 0 THEN 'REPORT_FAILED' ELSE 'REPORTED' END, 'API', at,
       jsonb_build_object('source', 'API', 'timestamp', to_char(at, 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
                          'origin_records', jsonb_build_object('{DIMENSION}', (i % 1000) || '.25'))
       || CASE WHEN i % {RARE} = 1 THEN jsonb_build_object('stripe_invoice_id', 'in_' || i / {RARE}) ELSE '{{}}' END,
       sha256(i::text::bytea), at, at
FROM generate_series(1, $2::bigint) AS i,
     LATERAL (SELECT now() - $5::interval * (($2 - i)::float8 / $2) AS at) AS moment
"""  # noqa: S608 - of constants
_LOAD_RECORDS = f"""
INSERT INTO usage_records (organization_id, group_id, position, entitlement_id, key, quantity, "timestamp", state)
SELECT organization_id, id, 0, entitlement_id, '{DIMENSION}', (meta_info->'origin_records'->>'{DIMENSION}')::numeric,
       "timestamp", status
FROM usage_record_groups WHERE organization_id = $1
"""  # noqa: S608 - of constants
